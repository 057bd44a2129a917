"""Arrays of other libraries in, the same kind out.

NumPy arrays are read by their own attributes; anything else with ``__dlpack__`` goes through it. CuPy's are worked on in
CuPy's current stream.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NUMPY_FLOATS = (np.float16, np.float32, np.float64)


class _Writable:
    """The memory of a read-only array under an interface that does not say so: nothing here writes to it.

    ``torch.from_numpy`` warns on a read-only array, and a copy of a memory-mapped feature matrix would be wasted.
    """

    def __init__(self, array: np.ndarray):
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array; got a numpy masked array, whose mask would be dropped (fill it first)"
        )
    if array.dtype.type not in _NUMPY_FLOATS and array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must have a floating dtype (float16, float32, float64) or, for labels, an integer one; "
            f"got numpy dtype {array.dtype}"
        )
    array = np.asarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{name} must hold labels that fit int64, got {array.max()}")
        array = array.astype(np.int64)
    itemsize = array.dtype.itemsize
    if not array.flags.aligned or any(s < 0 or s % itemsize for s in array.strides):
        array = np.array(array, order="C", copy=True)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


def _from_dlpack(array: Any, name: str) -> Tensor:
    strides = getattr(array, "strides", None)
    if isinstance(strides, tuple) and any(isinstance(s, int) and s < 0 for s in strides):
        raise ValueError(
            f"{name} must have non-negative strides to be exchanged through DLPack, got {strides}; copy it first"
        )
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} of type {_kind(array)} could not be read through DLPack: {error}") from error


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def as_tensor(value: Any, name: str) -> Tensor:
    """Tensor view of an array, without a copy where the memory allows it.

    Raises:
        TypeError: not a tensor, NumPy array or object with ``__dlpack__``; or a dtype that flatcore does not take.
        ValueError: negative strides in an array other than NumPy's.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return _from_numpy(value, name)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
        return _from_dlpack(value, name)
    raise TypeError(f"{name} must be a torch.Tensor, a numpy.ndarray or an array with __dlpack__, got {_kind(value)}")


def returner(like: Any) -> Callable[[Tensor], Any]:
    """Return the function that turns a result tensor into the kind of ``like``."""
    if isinstance(like, Tensor):
        return lambda tensor: tensor
    if isinstance(like, np.ndarray):
        return lambda tensor: tensor.numpy()
    namespace = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    if not hasattr(namespace, "from_dlpack"):
        namespace = importlib.import_module(type(like).__module__.partition(".")[0])
    from_dlpack = getattr(namespace, "from_dlpack", None)
    if from_dlpack is None:
        raise TypeError(
            f"features of type {_kind(like)} can be read through DLPack but not given back: "
            "its library has no from_dlpack; pass torch tensors or NumPy arrays"
        )
    return from_dlpack


def on_the_arrays_stream(function: _Function) -> _Function:
    """Let a public function work in the stream that the library of its first array is working in.

    torch tensors have torch's; of the others only CuPy has streams of its own.
    """

    @functools.wraps(function)
    def run(*arguments, **options):
        first = arguments[0] if arguments else next(iter(options.values()), None)
        if isinstance(first, Tensor) or type(first).__module__.partition(".")[0] != "cupy":
            return function(*arguments, **options)
        with _cupy_stream(first):
            return function(*arguments, **options)

    return run  # type: ignore[return-value]


def _cupy_stream(array: Any) -> AbstractContextManager[Any]:
    device = array.device.id
    with array.device:
        address = sys.modules["cupy"].cuda.get_current_stream().ptr
    stream = torch.cuda.ExternalStream(address, device=device) if address else torch.cuda.default_stream(device)
    return torch.cuda.stream(stream)
