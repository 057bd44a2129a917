"""May a call read the tensors' addresses without going through the dispatcher? One predicate for every stem."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._validate import is_exact, is_wrapped, storage_covers


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call may read the tensors' addresses without going through the dispatcher.

    Anything that changes what a tensor means (a subclass, a mode, a transform, tracing, a tangent, a lazy negation, a
    freed storage) makes its raw address wrong or dangerous, so then the operator is called.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
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
            or not storage_covers(x)
        ):
            return False
    return True


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call without a derivative may read addresses: the tensors are plain, and none requires gradient."""
    return is_plain(*tensors) and not needs_gradient(*tensors)
