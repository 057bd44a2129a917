"""Whether a probe measures what the model returns: when to compare, when to read the result, and what to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._arguments.arrays import as_tensor
from .._engine.precision import products_are_exact
from .capture import Pass
from .comparison import Compared, compared, is_row, row_agrees, rows_of, seen, tensors_in
from .layers import alike, kind, remedy, sizes

if TYPE_CHECKING:
    from .probe import Probe

_ROWS = 64  # on so many rows the model's output is compared with the head's: enough to see a scale, too few to cost
_QUICK = 32  # classes, up to which a row is compared as Python numbers
_LATER = {"cuda"}  # devices where a later pass's comparison is read afterwards, so that nobody waits for it


class Later:
    """A comparison whose result is on its way from the device."""

    def __init__(self, number: int, head: nn.Module, beside: str, result: Compared):
        self.number, self.head, self.beside, self.result = number, head, beside, result
        flags = torch.stack((result.head, result.output))
        self.event: Any = None
        if flags.device.type == "cuda":
            self.flags = torch.empty(2, dtype=torch.bool, pin_memory=True)
            self.flags.copy_(flags, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.flags = flags

    def has_come(self) -> bool:
        return self.event is None or self.event.query()

    def failed(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return not bool(self.flags.all())


def given_logits(used: Pass) -> Tensor | None:
    """The model's own logits, if they are as good as computed ones."""
    logits = used.logits
    if logits.dtype == torch.float64:
        return logits
    # the precision of products is not to be seen while torch.compile traces
    return logits if logits.dtype == torch.float32 and not torch.compiler.is_compiling() and _exact(used) else None


def _exact(used: Pass) -> bool:
    return products_are_exact(used.logits.device.type) if used.exact is None else used.exact


@torch.no_grad()
def check(probe: Probe, used: Pass, weight: Any, bias: Any, given: list[str]) -> bool:
    """Compare a pass with what the model returned, at its first measure; with what is ``given`` for the head, if anything.

    Returns:
        False where nothing may be compared: fake tensors, the capture of a CUDA graph.

    Raises:
        RuntimeError: it is something else.
    """
    if torch._C._len_torch_dispatch_stack() > 0:
        return False  # fake tensors hold no numbers
    device, mode = used.features.device.type, used.mode
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    first = mode not in probe._verified
    weight, bias = as_tensor(weight, "linear_weight"), None if bias is None else as_tensor(bias, "linear_bias")
    features = used.features.reshape(-1, used.features.shape[-1])
    N, C = features.shape[0], weight.shape[0]
    outputs = _outputs(probe, used, N, C)
    if N == 0:
        return True
    if first:
        rows: Any = torch.linspace(0, N - 1, min(N, _ROWS), device=features.device).long()
    else:
        rows = slice(used.number % N, used.number % N + 1)
    logits = None if given else used.logits.reshape(-1, C)
    same = not given and probe.temperature == 1 and any(x is used.logits for x in tensors_in(used.output))
    result = compared(
        features, weight, bias, logits, outputs, probe.temperature, rows, exact=_exact(used), few=not first, same=same
    )
    if used.row is not None and not given:  # coarse logits do not tell a weight from its moving average
        result = result._replace(head=result.head & ((weight[:1] == used.row) | used.row.isnan()).all())
    head: Any = used.module
    if not first and device in _LATER:
        probe._later.append(Later(used.number, head, _beside(probe, used), result))
        return True
    _judge(probe, head, _beside(probe, used), result, given)
    if first:
        if probe._chosen is None:
            _check_alone(probe, used)
        probe._verified.add(mode)
        probe._capture.sampled.discard(mode)
    return True


def agrees_quickly(probe: Probe, used: Pass, weight: Any, bias: Any) -> bool:
    """Whether a later pass agrees, asked as cheaply as possible; False says nothing."""
    logits, output = used.logits, used.output
    dtype = logits.dtype
    if not (
        used.mode in probe._verified
        and logits.device.type == "cpu" and "cpu" not in _LATER and weight.shape[0] <= _QUICK and logits.numel()
        and (dtype is torch.float64 or (dtype is torch.float32 and used.exact is True))
        and used.features.dtype is dtype and weight.dtype is dtype and (bias is None or bias.dtype is dtype)
        and not torch.is_autocast_enabled("cpu") and torch._C._len_torch_dispatch_stack() == 0
    ):  # fmt: skip
        return False
    other = None
    if output is not logits or probe.temperature != 1:
        found = [x for x in tensors_in(output) if x.shape == logits.shape]
        if len(found) != 1:
            return False
        if found[0] is not logits or probe.temperature != 1:
            other = found[0]
    row = used.number % (logits.numel() // logits.shape[-1])
    return row_agrees(used.features, weight, bias, logits, other, probe.temperature, row)


def read(probe: Probe, *, wait: bool) -> None:
    """Judge the comparisons of earlier passes that have come in by now, or all.

    Raises:
        RuntimeError: one has failed: it names the pass.
    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    while probe._later and (wait or probe._later[0].has_come()):
        later = probe._later.pop(0)
        if later.failed():
            probe._later.clear()
            when = f"in forward pass {later.number} since attach(), an earlier one, whose comparison is read only now: "
            _judge(probe, later.head, later.beside, later.result, [], when)


# ------------------------------------------------------------------------------------------------------ what may be wrong
def _outputs(probe: Probe, used: Pass, N: int, C: int) -> list[Tensor]:
    """The tensors (N, C) of the model's output, one of which should be the head's."""
    name = probe._names[used.module]  # type: ignore[index]  # it ran
    found = [x for x in tensors_in(used.output) if x.shape[-1] == C]
    if not found:
        raise RuntimeError(
            f"the model returned {described(used.output)}, in which no tensor of shape (..., C = {C}) was "
            f"found to compare with the output of the head {name!r}; pass verify=False if the logits "
            f"are the head's output, or name the head: {listed(probe)}"
        )
    outputs = [x.reshape(-1, C) for x in found if x.numel() == N * C]
    if not outputs:
        what = "not the same samples"
        if any(rows_of(x, used.logits) for x in found):
            what = (
                "rows are selected after the head (a token of a sequence?), so these are not the same samples: select them "
                "in the features and use the functional form, as flatcore.relative_flatness(probe.features[:, -1], "
                "probe.head.weight, linear_bias=probe.head.bias) for the last token, or select before the head"
            )
        ran = used.ran.count(used.module)  # type: ignore[arg-type]
        raise RuntimeError(
            f"the model returned logits of shape {tuple(found[0].shape)}, its head {name!r} made "
            f"{tuple(used.logits.shape)}{f' in the last of {ran} calls' if ran > 1 else ''}: {what}; {listed(probe)}"
        )
    return outputs


def _beside(probe: Probe, used: Pass) -> str:
    """Layers that ran in the pass and have as many outputs as the head: what may have been averaged with it."""
    head: Any = used.module
    found = [m for m in used.ran if m is not head and m.out_features == head.out_features]
    return " and ".join(repr(probe._names[m]) for m in dict.fromkeys(found))


def _judge(probe: Probe, head: Any, beside: str, result: Compared, given: list[str], when: str = "") -> None:
    """Raise if a comparison has failed."""
    name = probe._names[head]
    if not result.head.item():
        raise RuntimeError(
            f"{when}the output of the head {name!r} is not features W^T + b: its weight, bias or features were changed "
            "through .data after the pass (weights that were swapped back? take the measure inside that block), or the "
            f"layer ({kind(head)}) computes something else, in its forward or a hook; {listed(probe)}"
        )
    if result.output.item():
        return
    hint = seen(result.given, result.made, result.unit, probe.temperature)
    if not hint and head in probe._adapters:
        around, layer = probe._adapters[head]
        hint = f"it is the base layer of {around!r}, a {kind(layer)}, which changes its output"
    if not hint and beside:
        hint = f"{beside} ran too, with as many outputs: were several heads averaged or added?"
    hint = hint or "no factor, no mask and no function of each logit: something else follows"
    what = "the last linear layer that ran" if probe._chosen is None else "the head that was named"
    if given:
        what = f"{what}, with the {' and '.join(given)} given"
    raise RuntimeError(
        f"{when}the model's output is not the output of {name!r} ({kind(head)}), {what} "
        f"({hint}), so the closed form would be wrong. Where the logits are linear in the features after all, give their "
        "weight to the measure (linear_weight=..., linear_bias=...), or use the functional form "
        f"flatcore.relative_flatness(features, weight, ...); {listed(probe)}"
    )


def _check_alone(probe: Probe, used: Pass) -> None:
    """Refuse a model that returns the outputs of several linear layers, where none was named."""
    if used.module is None or not used.calls:
        return
    head, T = used.module, probe.temperature
    tensors, own = tensors_in(used.output), used.calls[-1][2]
    others = [x for x in tensors if not is_row(x, own / T)]
    for module, source, row in used.calls[:-1]:
        feeds = module.out_features == head.in_features and source() is not used.features
        if not feeds and any(is_row(x, row) or is_row(x, row / T) for x in others):
            more = "it ran more than once: use the functional form for the features of each call"
            raise RuntimeError(
                f"the model returns the outputs of several linear layers, {probe._names[module]!r} ({sizes(module)}) and "
                f"{probe._names[head]!r} ({sizes(head)}): "
                f"{more if module is head else 'name the one to measure, Probe(model, head=...)'}; {listed(probe)}"
            )


# ------------------------------------------------------------------------------------------------------------- in words
def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return f"a {type(value).__qualname__}"


def listed(probe: Probe) -> str:
    """The linear layers, those that ran marked, and what looks like one."""
    used = probe._capture.last()
    ran = used.ran if used is not None else []
    entries = [
        f"{name!r} ({sizes(module)}{', ran' if module in ran else ''}"
        f"{'' if type(module) is nn.Linear else ', ' + kind(module)})"
        for module, name in probe._names.items()
    ]
    shown = entries if len(entries) <= 20 else [*entries[:4], f"{len(entries) - 16} more", *entries[-12:]]
    others = alike(probe.model)
    text = f"its linear layers are: {', '.join(shown) or 'none'}"
    if others:
        text += f"; like one, but no torch.nn.Linear: {', '.join(f'{n!r} ({kind(m)})' for n, m in others[-4:])}"
        text += remedy(others[-1][1])
    return text
