"""May a call read the tensors' addresses without going through the dispatcher? One predicate for every stem."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .._arguments.checks import is_exact, is_wrapped, storage_covers
from .extensions import _core
from .head import Head

# looked up once: by name through torch._C these take as long as all that is asked of a tensor below
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def is_undisturbed() -> bool:
    """Whether nothing around the call changes what tensors mean: no mode, transform, tracing or tangent."""
    return not (
        is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms() is not None
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.version.hip is not None
    )


def plain_head(head: Head) -> tuple[int, int, int, bool] | None:
    """(N, D, C, whether any input is float64) of a head whose tensors are simply their memory and fit.

    Of one device, labels in int64. None: they are not, or it takes the long way to find out: check by name. A trace has to
    see where N came from, or it keeps the number.
    """
    if is_compiling() or forward_ad._current_level >= 0 or _tracing_state() is not None or _core is None:
        return None
    return _core.plain_head(head)


def is_plain(*tensors: Tensor | None, checked: bool = False) -> bool:
    """Whether a call may read the tensors' addresses without going through the dispatcher.

    Anything that changes what a tensor means (a subclass, a mode, a transform, tracing, a tangent, a lazy negation, a
    freed storage) makes its raw address wrong or dangerous, so then the operator is called. ``checked``: check_tensor has
    just seen that the storages are there.
    """
    return is_undisturbed() and _are_plain(*tensors, checked=checked)


def _are_plain(*tensors: Tensor | None, checked: bool) -> bool:
    for x in tensors:
        if x is None:
            continue
        if (
            not is_exact(x)
            or x.layout is not torch.strided
            or not (x.is_cpu or x.is_cuda)
            or x.is_neg()
            or x.is_conj()
            or is_wrapped(x)
            or not (checked or storage_covers(x))
            # autograd's zeros, a functionalised tensor: numbers without memory
            or (x.data_ptr() == 0 and x.numel() > 0)
        ):
            return False
    return True


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call without a derivative may read addresses: the tensors are plain, and none requires gradient."""
    return is_plain(*tensors) and not needs_gradient(*tensors)


def is_direct_head(head: Head, upstream: Tensor) -> bool:
    """The same of a head's gradient; the labels have been seen."""
    if not is_undisturbed() or needs_gradient(upstream, *head.inputs) or not _are_plain(upstream, checked=False):
        return False
    return plain_head(head) is not None or _are_plain(*head.inputs, checked=False)
