"""What this build can do on a CUDA device."""

from __future__ import annotations

from ._backend import _core


def is_built() -> bool:
    """Whether the extension was compiled with CUDA kernels.

    Example:
        >>> import flatcore
        >>> isinstance(flatcore.cuda.is_built(), bool)
        True
    """
    return _core is not None and bool(_core.CUDA)


def is_available() -> bool:
    """Whether the CUDA kernels were compiled and a device can run them.

    Without them CUDA tensors run on the PyTorch reference, on their own device, with the same results.

    Example:
        >>> import flatcore
        >>> flatcore.cuda.is_available() <= flatcore.cuda.is_built()
        True
    """
    return is_built()
