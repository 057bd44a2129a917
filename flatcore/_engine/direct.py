"""May a call read the tensors' addresses without going through the dispatcher? One predicate for every stem."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .._arguments.checks import is_exact, is_wrapped, storage_covers

# looked up once: by name through torch._C these take as long as all that is asked of a tensor below
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def is_plain(*tensors: Tensor | None, checked: bool = False) -> bool:
    """Whether a call may read the tensors' addresses without going through the dispatcher.

    Anything that changes what a tensor means (a subclass, a mode, a transform, tracing, a tangent, a lazy negation, a
    freed storage) makes its raw address wrong or dangerous, so then the operator is called. ``checked``: check_tensor has
    just seen that the storages are there.
    """
    if (
        is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms() is not None
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.version.hip is not None
    ):
        return False
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
