"""Linear layers of every kind that models have: plain, sharded, offloaded, quantised, with adapters, or only alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments.checks import FLOATS, check_tensor, is_dtensor, is_exact, storage_covers


def kind(value: Any) -> str:
    """The qualified name of an object's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def sizes(module: nn.Linear) -> str:
    return f"{module.in_features} -> {module.out_features}"


# ------------------------------------------------------------------------------------------------- weights, made readable
def readable(tensor: Any, name: str, head: nn.Module, title: str, model: nn.Module) -> Any:
    """A head's ``weight`` or ``bias`` as it was used in a pass, whole, or the reason why its numbers cannot be read.

    None is a bias that the head does not have.
    """
    if tensor is None:
        if head._parameters.get(name, head) is None:
            return None
        raise RuntimeError(
            f"the {name} of the head {title!r} ({kind(head)}) is computed, and what the pass used was not seen: if it was "
            f"parametrised while the probe was attached, call detach() and attach(); else pass linear_{name} to the measure"
        )
    if is_exact(tensor) and tensor.dtype in FLOATS and not tensor.is_meta and storage_covers(tensor):
        return tensor
    what = f"the {name} of the head {title!r}"
    held: Any = tensor if is_dtensor(tensor) else head._parameters.get(name)
    if held is not None and is_dtensor(held):
        if _is_fully_sharded(model, head, held):
            return _gathered(held)
        raise TypeError(
            f"{what} is a {type(held).__name__} {tuple(held.placements)} that fully_shard does not manage: pass "
            "linear_weight and linear_bias to the measure, made whole by full_tensor(grad_placements=...) with what each "
            'process adds to the gradient: [Partial("avg")] where each has its own batch, [Replicate()] where all have the '
            "same"
        )
    if tensor.is_meta:
        by = " by an accelerate hook" if hasattr(head, "_hf_hook") else ""
        raise TypeError(
            f"{what} is offloaded{by}: outside of the head's forward it is on the meta device, without numbers; pass "
            "linear_weight and linear_bias, loaded to the features' device, to the measure"
        )
    hidden = not is_exact(tensor) and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if (hidden or tensor.dtype not in FLOATS) and torch._C._len_torch_dispatch_stack() == 0:  # else a fake tensor
        given = f"probe.head.{name}.dequantize()" if hasattr(tensor, "dequantize") else f"its {name}"
        raise TypeError(
            f"{what} is a {kind(tensor)} of {tensor.dtype} (quantised?), not the plain numbers that the layer multiplies "
            f"by: pass linear_{name}={given}, a plain floating tensor, to the measure"
        )
    check_tensor(tensor, f"linear_{name}")  # freed, sparse, nested
    return tensor


def _is_fully_sharded(model: nn.Module, head: nn.Module, weight: Any) -> bool:
    """Whether FSDP2 manages a DTensor, over processes of which each has its own batch."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is None or not any(isinstance(m, sharded) and head in set(m.modules()) for m in model.modules()):
        return False
    # two dimensions: (Replicate, Shard) is FSDP2 over groups; with tensor parallelism the first one is sharded
    return weight.device_mesh.ndim == 1 or (weight.device_mesh.ndim == 2 and weight.placements[0].is_replicate())


def _gathered(weight: Any) -> Tensor:
    """A DTensor made whole, whose gradient is the average over the processes, as fully_shard's own."""
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


# --------------------------------------------------------------------------------------------------------------- adapters
def adapters(model: nn.Module) -> dict[nn.Module, tuple[str, nn.Module]]:
    """Layers around another one, as peft builds them: base layer -> (name, layer)."""
    return {
        layer._modules["base_layer"]: (name, layer)
        for name, layer in model.named_modules()
        if "base_layer" in layer._modules and isinstance(layer._modules["base_layer"], nn.Module)
    }


def parts(layer: nn.Module) -> list[nn.Module]:
    """The linear layers of an adapter, besides the one that it adapts."""
    inside = [m for name, child in layer.named_children() if name != "base_layer" for m in child.modules()]
    return [m for m in inside if isinstance(m, nn.Linear)]


def adapts(layer: nn.Module, ran: Sequence[nn.Module]) -> bool:
    """Whether an adapter takes part in its layer's output: not merged into the weight, and not switched off."""
    if getattr(layer, "merged", False) is True or getattr(layer, "disable_adapters", False) is True:
        return False
    active, known = getattr(layer, "active_adapters", None), getattr(layer, "lora_A", None)
    if isinstance(active, (list, tuple)) and isinstance(known, (nn.ModuleDict, nn.ParameterDict)):
        return any(name in known for name in active)
    inside = parts(layer)
    return not inside or any(m in ran for m in inside)


# ---------------------------------------------------------------------------------------------------- what is only alike
def alike(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that work like a linear one and are none: quantised, packed, of another library."""
    known = {layer for _, layer in adapters(model).values()}
    return [
        (name, m)
        for name, m in model.named_modules()
        if not isinstance(m, nn.Linear) and m not in known
        and ("Linear" in type(m).__name__ or (hasattr(m, "in_features") and hasattr(m, "out_features")))
    ]  # fmt: skip


def remedy(module: nn.Module) -> str:
    """How a layer that is no torch.nn.Linear can be measured nevertheless."""
    weight: Any = getattr(module, "weight", None)
    if type(module).__module__.startswith("torch.ao.") or hasattr(module, "_packed_params"):
        return (
            " (quantised: its weight is packed); use the functional form on its input, flatcore.relative_flatness(features, "
            "layer.weight().dequantize(), linear_bias=layer.bias())"
        )
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return (
            "; use the functional form on its input, flatcore.relative_flatness(features, weight, linear_bias=bias) with a "
            "weight (C, D)"
        )
    return ""
