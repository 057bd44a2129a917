"""Gradients of the loss with respect to a model's inputs, exact at every confidence: the public functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from ._arguments.checks import (
    FLOATS,
    INTEGERS,
    as_labels,
    check_device,
    check_flag,
    check_floating,
    check_integer,
    check_tensor,
    kind_of,
    one_output,
)
from ._engine import ops
from ._row_norms import check_orders
from ._unmasked_cross_entropy import integer_labels


class InputGradients(NamedTuple):
    """Per-sample gradients of the loss with respect to the inputs: the true gradient is exp(log_scale) * direction.

    ``direction`` (the inputs' shape and dtype) is the exact direction at a scale that confidence does not touch: the
    unit-scale cotangent q - e_y (L2 norm in [1, sqrt 2]) seen through the model. ``log_scale`` (N,) is log(1 - p_y),
    float32 (float64 if the logits are); 0 for soft targets, whose gradient does not vanish, -inf in ignored rows.

    Example:
        >>> import torch, flatcore
        >>> head = torch.nn.Linear(2, 2, bias=False)
        >>> _ = head.weight.data.copy_(torch.eye(2))
        >>> found = flatcore.input_gradients(head, torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        >>> [round(g, 4) for g in found.gradient()[0].tolist()]
        [-0.1192, 0.1192]
    """

    direction: Tensor
    log_scale: Tensor

    def gradient(self) -> Tensor:
        """Return exp(log_scale) * direction, in the direction's dtype: 0 where that underflows."""
        # in two steps, so that a large direction meets a scale below the smallest normal number without losing digits
        wide = torch.promote_types(self.direction.dtype, self.log_scale.dtype)
        half = (0.5 * self.log_scale).exp().to(wide).reshape(-1, *(1,) * (self.direction.dim() - 1))
        return (self.direction * half * half).to(self.direction.dtype)


def input_gradients(
    model: Callable[[Tensor], Any],
    inputs: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    allow_train_mode: bool = False,
) -> InputGradients:
    r"""Per-sample gradient of the cross-entropy with respect to the inputs, right at every confidence.

    :math:`\nabla_x \ell_n = J_n^T (p_n - e_{y_n}) = (1 - p_{y_n})\, J_n^T (q_n - e_{y_n})`, with z = model(x), p
    its softmax, q the softmax over the classes other than y and J the Jacobian of the logits. The vector J^T(q - e_y)
    comes from one backward pass for the whole batch, seeded with the cotangent q - e_y, which does not shrink with
    confidence; the factor is kept as its log. The usual gradient is wrong from a logit gap of 17 on (float32) and 0 from
    104 on. This is the gradient of the unchanged loss.

    Args:
        model: a ``torch.nn.Module`` or any callable that maps inputs (N, ...) to logits (N, C), each row from its own
            sample: a tensor, an object with ``.logits``, or a mapping with the key ``"logits"``. Give the module itself,
            not a function around it, where you can: only a module can be checked for its mode and have its parameters
            frozen for the call.
        inputs: (N, ...), any shape; float16, bfloat16, float32 or float64.
        target: (N,) integer labels 0..C-1 or ``ignore_index``: the exact form. Or (N, C) soft or smoothed targets t >= 0
            of a floating dtype, for which :math:`\partial\ell/\partial z = s p - t`, s = sum_j t_j, and log_scale is 0.
        ignore_index: label of rows whose gradient is 0 (log_scale -inf), also where their values are NaN.
        chunk_size: rows per pass through the model, for its memory; None takes all at once.
        allow_train_mode: take a model in training mode as it is, with what its BatchNorm and Dropout then do.

    Returns:
        :class:`InputGradients`: ``direction`` with the shape, dtype and device of ``inputs``, and ``log_scale`` (N,), per
        sample, not divided by N; ``.gradient()`` gives the true gradient. N = 0 gives empty ones.

    Raises:
        TypeError: ``inputs`` or ``target`` no tensor; integer inputs (token ids have no gradient: pass embeddings); a
            dtype not above; a model that returns no logits.
        ValueError: shapes or devices that do not fit; logits that are not (N, C): several positions per sample (N, L, C)
            have a loss, and a scale, each, so flatten them into N or select one; logits that do not depend on the inputs
            (a model that detaches them or runs under ``no_grad`` itself); a model of one output (nearly always a
            sigmoid's, whose softmax gradient is 0); a label that is no class; a negative soft
            target; a ``chunk_size`` below 1; a module whose samples share statistics or chance: BatchNorm that normalises
            by its batch, or Dropout and its kin in training mode, unless ``allow_train_mode=True``.

    Nothing of the caller's is changed: ``.grad`` of parameters and inputs, ``requires_grad`` flags, modes and hooks are as
    before, also if the model raises (buffers that the model itself updates in training mode are the model's doing). The
    parameters do not require gradient while the call runs: do not train the same model in another thread meanwhile. It
    works under ``torch.no_grad()`` and ``torch.inference_mode()``, which are left for the call; parameters that were *made*
    in inference mode cannot be differentiated through, and torch says so. Hooks and autocast of the caller are in force
    for the model; the backward pass runs without autocast.

    Numerics: the cotangent is formed in float32 or wider from the logits as the model gave them and has a few roundings,
    whatever the gap; float16 and bfloat16 logits round it once to their dtype. The rest is the model's own backward
    pass. A soft target that is one-hot in floating point does lose what s p - t loses to the difference: give labels.
    Rows with NaN or +inf logits give NaN in that row only.

    Cost: one forward and one backward pass to the inputs alone, and one read of the logits.

    Source: docs/mathematics.md, "Input gradients". That underflow of the usual gradient overstates robustness: Lee et al.
    2020; MIFPE; arXiv 2507.22428.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x = torch.tensor([[300.0, 0.0]], requires_grad=True)
        >>> torch.nn.functional.cross_entropy(model(x), torch.tensor([0])).backward()
        >>> x.grad.tolist()
        [[0.0, 0.0]]
        >>> flatcore.input_gradients(model, x, torch.tensor([0]))
        InputGradients(direction=tensor([[-1.,  1.]]), log_scale=tensor([-300.]))
    """
    call = _Passes(model, inputs, target, ignore_index, chunk_size, allow_train_mode)
    found = list(call.chunks())
    if len(found) == 1:
        return found[0]
    direction = torch.empty_like(inputs, requires_grad=False)
    for start, part in zip(call.starts(), found, strict=True):
        direction[start : start + call.rows] = part.direction
    return InputGradients(direction, torch.cat([part.log_scale for part in found]))


def input_gradient_norms(
    model: Callable[[Tensor], Any],
    inputs: Tensor,
    target: Tensor,
    *,
    ord: float | str | tuple[float | str, ...] = 2,
    log: bool = False,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    allow_train_mode: bool = False,
) -> Tensor:
    r"""Per-sample norms of the input gradient, several from one read, which never vanish in the log domain.

    :math:`\log\|\nabla_x\ell_n\| = \log(1 - p_{y_n}) + \log\|J_n^T (q_n - e_{y_n})\|`; see :func:`flatcore.input_gradients`.

    Args:
        model: as in :func:`flatcore.input_gradients`.
        inputs: (N, ...), as there; each sample is taken as one vector.
        target: (N,) labels or (N, C) soft targets, as there.
        ord: ``1``, ``2``, ``inf``, or a tuple of them in any order; or names, as in :func:`flatcore.row_norms`.
        log: give natural logs: right also where the norm itself underflows.
        ignore_index: label of rows whose norm is 0 (log -inf).
        chunk_size: rows per pass; the gradients of one chunk are what is held in memory.
        allow_train_mode: as in :func:`flatcore.input_gradients`.

    Returns:
        Plain (not squared) norms per sample: (N,) for one number, (len(ord), N) for a tuple; float32, float64 if inputs
        or logits are.

    Raises:
        TypeError: as :func:`flatcore.input_gradients`; a ``log`` that is no bool.
        ValueError: as there; an ``ord`` other than 1, 2, inf, or an empty tuple.

    Numerics: sums in float64 (see :func:`flatcore.row_norms`), added to the scale in the log domain.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[300.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> flatcore.input_gradient_norms(model, x, y, ord=(1, float("inf")), log=True)
        tensor([[-2.9931e+02,  5.6622e-01],
                [-3.0000e+02, -1.2693e-01]])
    """
    orders = check_orders(ord)
    check_flag(log, "log")
    call = _Passes(model, inputs, target, ignore_index, chunk_size, allow_train_mode)
    norms = torch.cat([_norms(part, orders, log) for part in call.chunks()], dim=1)
    return norms if isinstance(ord, tuple) else norms[0]


def _norms(found: InputGradients, orders: tuple[float, ...], log: bool) -> Tensor:
    """Norms (len(orders), N) of one chunk: the scale enters in the log domain."""
    direction = found.direction
    # no norm asks for the order of the entries: dimensions by stride, so that channels-last gradients are not copied
    order = sorted(range(1, direction.dim()), key=direction.stride, reverse=True)
    rows = direction.permute(0, *order).reshape(direction.shape[0], -1) if direction.numel() else direction.flatten(1)
    norms = ops.row_norms(rows, orders)
    wide = reference.widest(norms.device)
    logs = norms.to(wide).log() + found.log_scale.to(wide)
    return (logs if log else logs.exp()).to(torch.promote_types(norms.dtype, found.log_scale.dtype))


class _Passes:
    """Validated arguments of one call, and the passes through the model."""

    def __init__(self, model: Any, inputs: Any, target: Any, ignore_index: Any, chunk_size: Any, allow_train_mode: Any):
        if not callable(model):
            raise TypeError(f"model must be callable (inputs to logits), got {kind_of(model)}")
        for value, name in ((inputs, "inputs"), (target, "target")):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {kind_of(value)}")
            check_tensor(value, name)
        if inputs.dtype not in FLOATS:
            raise TypeError(
                f"inputs must have dtype float16, bfloat16, float32 or float64, got {inputs.dtype}: integers (token ids, "
                "raw pixels) have no gradient; pass embeddings, or a floating copy"
            )
        if inputs.dim() == 0:
            raise ValueError("inputs must have shape (N, ...), got ()")
        check_device(target, "target", inputs, "inputs")
        if target.dim() == 0 or target.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"target must have one row per sample, N = {inputs.shape[0]}, got shape {tuple(target.shape)}"
            )
        self.ignore_index = check_integer(ignore_index, "ignore_index")
        labels = as_labels(target, self.ignore_index) if target.dtype in INTEGERS else target
        self.model, self.inputs, self.target = model, inputs, labels.detach()
        if chunk_size is not None and check_integer(chunk_size, "chunk_size") < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.rows = max(chunk_size or inputs.shape[0], 1)
        if not check_flag(allow_train_mode, "allow_train_mode"):
            refuse_shared_statistics(model, ALLOW)

    def starts(self) -> range:
        """First row of each chunk: one, empty, where there are no rows."""
        return range(0, max(self.inputs.shape[0], 1), self.rows)

    def chunks(self) -> Iterator[InputGradients]:
        """Directions and scales, a chunk of rows at a time."""
        for start in self.starts():
            stop = start + self.rows
            yield self._chunk(self.inputs[start:stop], self.target[start:stop])

    def _chunk(self, inputs: Tensor, target: Tensor) -> InputGradients:
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.model):
            # a leaf of its own over the same memory; a tensor made in inference mode has to be copied out of it
            x = (inputs.clone() if inputs.is_inference() else inputs).detach().requires_grad_()
            # the model gets a copy: a first layer that works in place would change the caller's inputs
            logits = differentiable_logits_of(self.model(x.clone()), inputs)
            cotangent, log_scale = self._seed(logits.detach(), target)
            autocast = torch.is_autocast_enabled(inputs.device.type)
            with torch.autocast(inputs.device.type, enabled=False) if autocast else nullcontext():
                (direction,) = torch.autograd.grad(logits, x, cotangent, allow_unused=True)
        if direction is None:
            raise ValueError("the model's logits do not depend on inputs: there is no gradient")
        if not target.is_floating_point():
            ignored = target == self.ignore_index
            if ignored.any():  # by selection: 0 times an infinite derivative would be NaN
                direction = torch.where(ignored.reshape(-1, *(1,) * (direction.dim() - 1)), 0, direction)
        return InputGradients(direction, log_scale)

    def _seed(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangent (N, C) of the logits, and the log of what it leaves out (N,)."""
        if target.is_floating_point():
            check_floating(target, "target")
            if target.shape != logits.shape:
                raise ValueError(
                    f"a soft target must have the logits' shape {tuple(logits.shape)}, got {tuple(target.shape)}"
                )
            if bool((target < 0).any()):
                raise ValueError(f"a soft target must not be negative, got {target.min().item()}")
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            scale = torch.zeros(logits.shape[0], dtype=wide, device=logits.device)
            return reference.soft_cross_entropy_cotangent(logits, target), scale
        labels = integer_labels(target, logits, self.ignore_index)
        _, log_scale, cotangent = ops.unmasked_cross_entropy(logits, labels, self.ignore_index, with_cotangent=True)
        return cotangent, log_scale


TWO_OUTPUTS = "let the model return torch.cat([torch.zeros_like(z), z], dim=-1) for its output z"


def logits_of(output: Any, inputs: Tensor) -> Tensor:
    """Logits (N, C) of a model's output, refused by name where they are none."""
    logits: Any
    if isinstance(output, Tensor):
        logits = output
    elif isinstance(output, Mapping) and "logits" in output:
        logits = output["logits"]
    else:
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "model must return its logits as a tensor, as an object with .logits or as a mapping with the key 'logits', "
            f"got {kind_of(output)}; wrap the model in a function that picks them"
        )
    check_tensor(logits, "the model's logits")
    check_floating(logits, "the model's logits")
    N = inputs.shape[0]
    if logits.dim() != 2 or logits.shape[0] != N or logits.shape[1] == 0:
        raise ValueError(
            f"the model's logits must have shape (N, C) with N = {N} as the inputs and C >= 1, got {tuple(logits.shape)}: "
            "several positions per sample have a loss and a scale each; select one, or flatten them into N"
        )
    if logits.shape[1] == 1:
        raise ValueError(one_output("the model", TWO_OUTPUTS))
    check_device(logits, "the model's logits", inputs, "inputs")
    return logits


def differentiable_logits_of(output: Any, inputs: Tensor) -> Tensor:
    """The same, refused also where they have no derivative."""
    logits = logits_of(output, inputs)
    if not logits.requires_grad:
        raise ValueError(
            "the model's logits carry no gradient to inputs: the model detaches them or runs under torch.no_grad() or "
            "torch.inference_mode() itself"
        )
    return logits


def _modules(model: Any) -> list[nn.Module]:
    """Return the modules behind a callable: a module's own, or those of a bound method such as ``model.forward``."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return list(owner.modules()) if isinstance(owner, nn.Module) else []


ALLOW = ", or pass allow_train_mode=True to take it as it is"


def refuse_shared_statistics(model: Any, otherwise: str = "") -> None:
    """Refuse modules through which a sample's result depends on its neighbours or on chance."""
    for module in _modules(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or module.running_mean is None:
                mode = "in training mode" if module.training else "without running statistics"
                raise ValueError(
                    f"model holds a {type(module).__name__} {mode}, which mixes the samples of a batch: their gradients "
                    f"are not per-sample; call model.eval(){otherwise}"
                )
        elif module.training and _is_random(module):
            raise ValueError(
                f"model holds a {type(module).__name__} in training mode, which draws at random: the gradient would not "
                f"be the model's; call model.eval(){otherwise}"
            )


def _is_random(module: nn.Module) -> bool:
    """Whether a module in training mode draws random numbers: dropout in its forms, and random slopes."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    if isinstance(module, nn.RReLU):
        return module.lower != module.upper
    if type(module).__name__ in ("DropPath", "StochasticDepth"):  # timm's and torchvision's dropout of whole branches
        return bool(getattr(module, "drop_prob", None) or getattr(module, "p", None))
    return False


_LOCK = threading.Lock()
_FROZEN: dict[int, int] = {}  # by id: calls that hold the parameter frozen, so that calls side by side restore it once


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Let the parameters not require gradient, so that neither pass works or stores for theirs; then as before.

    Flags, not ``torch.func.functional_call``: that takes 10 us per parameter, fails on scripted modules and leaves out
    parameters that a module keeps in lists of its own (RNN's flat weights).
    """
    with _LOCK:
        held = []
        parameters = {id(p): p for module in _modules(model) for p in module._parameters.values() if p is not None}
        for parameter in parameters.values():
            # flags of tensors made in inference mode cannot be restored from here; torch refuses them in the forward pass
            if (
                parameter.is_leaf
                and not parameter.is_inference()
                and (parameter.requires_grad or id(parameter) in _FROZEN)
            ):
                _FROZEN[id(parameter)] = _FROZEN.get(id(parameter), 0) + 1
                parameter.requires_grad_(False)
                held.append(parameter)
    try:
        yield
    finally:
        with _LOCK:
            for parameter in held:
                _FROZEN[id(parameter)] -= 1
                if not _FROZEN[id(parameter)]:
                    del _FROZEN[id(parameter)]
                    parameter.requires_grad_(True)
