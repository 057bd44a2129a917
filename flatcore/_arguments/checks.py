"""Checks of arguments: each error names the argument, what was required and what came."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_is_of_a_transform = torch._C._functorch.is_functorch_wrapped_tensor
_has_storage = torch._C._has_storage
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKAGE = str(Path(__file__).parents[1] / "_")[:-1]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def kind_of(value: Any) -> str:
    """The type of a value, with its module."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ in ("DTensor", "ShardedTensor")


def check_tensor(tensor: Tensor, name: str) -> None:
    """Refuse by name the kinds of tensor whose numbers could not be read rightly."""
    exact = is_exact(tensor)
    if not exact and is_dtensor(tensor):
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(tensor).__name__} shard; pass {name}.full_tensor(), and where a "
            "gradient is wanted full_tensor(grad_placements=...) with what each process adds to it: [Partial('avg')] where "
            "each has its own batch (data parallelism, fully_shard), [Replicate()] where all have the same"
        )
    if not exact:
        _check_subclass(tensor, name)
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested tensor; pass its rows with {name}.values()")
    if tensor.is_quantized:
        raise TypeError(f"{name} must not be quantized, got {tensor.dtype}; pass {name}.dequantize()")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must have a strided layout, got {tensor.layout}; pass {name}.to_dense()")
    if is_compiling():
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name} carries a forward-mode tangent, which flatcore does not propagate; "
            "pass torch.autograd.forward_ad.unpack_dual(...).primal"
        )
    if exact and not storage_covers(tensor):
        raise ValueError(
            f"{name} must own its memory: its storage of {tensor.untyped_storage().nbytes()} bytes does not "
            f"hold shape {tuple(tensor.shape)} (freed, as FSDP does between uses?)"
        )


def _check_subclass(tensor: Tensor, name: str) -> None:
    """Refuse subclasses that hold other numbers than they say, or none yet."""
    kind = type(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{name} must have values, got an {kind.__name__} of a lazy module: run one forward pass through it first"
        )
    # the tensors of quantising libraries (torchao, quanto) say float32 or bfloat16 and hold codes and scales
    if kind.dequantize is not Tensor.dequantize or kind.__module__.startswith(("torchao.", "bitsandbytes.")):
        way = "get_original_weight()" if hasattr(kind, "get_original_weight") else "dequantize()"
        raise TypeError(f"{name} must be a plain tensor, got the quantized {kind_of(tensor)}; pass {name}.{way}")


def is_exact(tensor: Tensor) -> bool:
    """Whether this is a tensor or a parameter, not one of their subclasses, which may mean something else."""
    kind = type(tensor)
    return kind is Tensor or kind is torch.nn.Parameter


def is_wrapped(tensor: Tensor) -> bool:
    """Whether this stands for several tensors or a value of a transform, and has no memory of its own.

    Of torch.func, or of the older vmap that ``torch.autograd.grad(is_grads_batched=True)`` runs.
    """
    return _is_of_a_transform(tensor) or not _has_storage(tensor)


def storage_covers(tensor: Tensor) -> bool:
    """Whether the storage holds every element of the view (FSDP frees a storage and keeps its views)."""
    nbytes = tensor.nbytes
    if nbytes == 0 or tensor.is_meta or is_wrapped(tensor):
        return True
    if not tensor.is_contiguous():
        count = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = count * tensor.itemsize
    return tensor.storage_offset() * tensor.itemsize + nbytes <= tensor.untyped_storage().nbytes()


def check_matrix(
    tensor: Tensor, name: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Require what raw addresses rely on: kind, dtype, sizes (None: any) and a storage that holds them."""
    check_tensor(tensor, name)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(want not in (None, got) for want, got in zip(shape, sizes, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {sizes}")


def check_floating(tensor: Tensor, name: str) -> None:
    """Only float16, bfloat16, float32 and float64."""
    if tensor.dtype not in FLOATS:
        way = ""
        if str(tensor.dtype).startswith(("torch.float8", "torch.float4")):
            way = f"; its scale is not in it: pass {name}.to(torch.bfloat16) times the scale, or {name}.dequantize()"
        elif tensor.dtype in (torch.uint8, torch.int8):
            way = ": the codes of a quantized layer? Pass the dequantized values"
        raise TypeError(f"{name} must have dtype float16, bfloat16, float32 or float64, got {tensor.dtype}{way}")


def check_no_grad(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that requires gradient while grad mode is on: nothing is detached silently."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires gradient, which this function does not propagate: "
            f"pass {name}.detach(), or call under torch.no_grad()"
        )


def check_device(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Require all tensors on one device."""
    if tensor.device != like.device:
        way = ""
        for one, its_name in ((tensor, name), (like, like_name)):
            if one.is_meta:
                way = (
                    f": {its_name} holds no values (offloaded, or built on the meta device); load them first, and pass "
                    f"the loaded tensor"
                )
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}{way}")


def check_number(value: Any, name: str) -> float:
    """Return a Python number that is no bool, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {kind_of(value)}")
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def check_temperature(value: Any) -> float:
    """Return a finite number above 0 whose inverse is finite too."""
    number = check_number(value, "temperature")
    if not (2.0**-1022 <= number < math.inf):
        raise ValueError(f"temperature must be finite and above 0 (at least 2^-1022), got {value!r}")
    return number


def check_flag(value: Any, name: str) -> bool:
    """Return a bool, and refuse what only looks like one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {kind_of(value)}")
    return value


def check_integer(value: Any, name: str) -> int:
    """Return a Python integer that is no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {kind_of(value)}")
    value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit int64, got {value}")
    return value


def check_option(value: Any, name: str, options: tuple[Any, ...]) -> Any:
    """Return one of a fixed set."""
    try:
        known = not isinstance(value, (bool, Tensor)) and value in options
    except (TypeError, RuntimeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def check_norm(value: Any, name: str, options: tuple[float, ...] = (1, 2, math.inf)) -> float:
    """Return 1, 2 or inf, given as a number or by the names that libraries have for it: "inf", "Linf", "l2", "L1"."""
    known = value
    if isinstance(value, str):
        known = _NORMS.get(value.lower(), value)
    return float(check_option(known, name, options))


_NORMS = {"l1": 1, "l2": 2, "linf": math.inf, "inf": math.inf}


def as_labels(target: Tensor, ignore_index: int) -> Tensor:
    """Integer labels as int64, so that they are compared with ``ignore_index`` by value.

    In its own dtype a label wraps ``ignore_index``: -100 is 156 in uint8. An unsigned label above int64 becomes a number
    that is no class and not ignored.
    """
    if target.dtype is torch.int64:
        return target
    labels = target.to(torch.int64)
    if target.dtype is torch.uint64:
        labels = torch.where(labels < 0, 2**63 - 1 - (ignore_index == 2**63 - 1), labels)
    return labels


def warn(message: str) -> None:
    """Warn at the caller's line, the first one outside this package; not while tracing."""
    if not is_compiling():
        warn_at_caller(message, UserWarning)


def warn_at_caller(message: str, category: type[Warning]) -> None:
    """Warn at the first line outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def one_output(what: str, remedy: str) -> str:
    """Text about a head of one class, nearly always a sigmoid's, whose softmax measures are all 0.

    ``remedy`` completes the sentence for the caller at hand: where the row of zeros goes.
    """
    return (
        f"{what} has one output (C = 1): the softmax over one class is the constant 1, so that the trace, every measure and "
        f"every gradient are 0 (log -inf). If it is the head of a sigmoid (a binary classifier), use the softmax head of "
        f"two classes that has its probabilities, a row of zeros before its own: {remedy}"
    )
