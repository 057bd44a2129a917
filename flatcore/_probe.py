"""Probe: the head of a model and what went through it, captured by hooks."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ._head_metrics import HeadMetrics, feature_gradient_norms, head_metrics, hessian_trace, relative_flatness
from ._validate import check_flag, check_temperature, check_tensor

_ROWS = 64  # on so many rows the model's output is compared with the head's: enough to see a scale, too few to cost
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # in names, of the wrappers that torch puts around a model
_HALF = (torch.float16, torch.bfloat16)


class _Capture:
    """What hooks saw in the last forward pass. They hold this and not the probe, so that a lost probe takes them away."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.ran: list[nn.Module] = []
        self.module: nn.Linear | None = None
        self.features: Tensor | None = None
        self.logits: Tensor | None = None
        self.versions: tuple[int, int] | None = None  # of the weight and the logits, as they left the head
        self.output: Any = None
        self.called = False

    def before_model(self, module: nn.Module, args: Any) -> None:
        self.clear()

    def after_linear(self, module: nn.Linear, args: Any, kwargs: Any, output: Any) -> None:
        self.ran.append(module)
        self.module, self.logits = module, output
        self.features = args[0] if args else kwargs["input"]
        if torch.compiler.is_compiling():
            self.versions = None
        else:
            self.versions = _version(module.weight), _version(output)

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output, self.called = output, True


def _version(tensor: Any) -> int:
    return -1 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version


class Probe:
    r"""Finds the last linear layer of a model, captures what goes through it, and measures it.

    Within ``with Probe(model) as probe:`` (or between :meth:`attach` and :meth:`detach`) every forward pass of the model
    leaves :attr:`features` and :attr:`logits` behind: the tensors themselves, not copies, so that the measures are
    differentiable with respect to everything the model computed them from. The head is the last ``torch.nn.Linear`` that
    ran, or the one that is named.

    Args:
        model: a ``torch.nn.Module``; also wrapped in DistributedDataParallel or compiled. What it returns must hold the
            logits: a tensor, an object with ``.logits``, or a mapping, tuple or dataclass with one tensor (..., C).
        head: None; the name of a ``torch.nn.Linear`` in ``model.named_modules()`` (names of wrappers, as ``module.``, may be
            left out); or that module itself.
        temperature: T, if the model divides the head's output by it.
        verify: compare, on up to 64 rows, the model's output with the head's: at the first use after each ``attach``, once
            in training and once in evaluation mode (not while torch.compile traces). A constant added to a row is no
            difference, as the softmax sees none.

    Raises:
        TypeError: a model that is no module; a head that is no linear layer; DataParallel; a sharded weight (DTensor) when a
            measure is taken: pass ``linear_weight=probe.head.weight.full_tensor()`` to it.
        ValueError: a head that is not in the model, or whose name fits several; a model without linear layers; a bad
            temperature; a freed weight (FSDP) when a measure is taken.
        RuntimeError: when a measure is taken: no forward pass was seen; the head did not run in it; the head's weight has
            changed since; the model's output is not the head's (a softcap, scale or temperature follows): the message lists
            the linear layers that ran.

    Gradients: the measures flow into features and weight; :meth:`head_metrics` detaches its inputs, for it has no
        derivative.

    Numerics: where the model made its logits in float16 or bfloat16, or float32 products are not at their highest
        precision, they are not used: they are computed again from the features, in float32. A bfloat16 logit is off by
        0.1 at 35.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> with flatcore.Probe(model) as probe:
        ...     loss = torch.nn.functional.cross_entropy(model(torch.ones(5, 4)), torch.zeros(5, dtype=torch.long))
        ...     (loss + 0.01 * probe.relative_flatness(log=True)).backward()
        >>> probe.head_name, tuple(probe.features.shape), model[0].weight.grad is not None
        ('2', (5, 8), True)
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | nn.Module | None = None,
        *,
        temperature: float = 1.0,
        verify: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}")
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "model must not be a torch.nn.DataParallel, whose replicas run at once in several threads: probe its "
                ".module, or use DistributedDataParallel"
            )
        self.model = model
        self.temperature = check_temperature(temperature)
        self.verify = check_flag(verify, "verify")
        self._names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._capture = _Capture()
        self._chosen = None if head is None else self._find(head)
        if not self._names:
            raise ValueError("model must contain a torch.nn.Linear, got none: there is no head to probe")
        self._verified: set[bool] = set()
        self._detach: weakref.finalize | None = None

    def _find(self, head: Any) -> nn.Linear:
        if isinstance(head, str):
            named = dict(self.model.named_modules())
            found = [named[head]] if head in named else [m for n, m in named.items() if _unwrapped(n) == head]
            if len(found) > 1:
                raise ValueError(f"head must name one module, got {head!r}, which fits {len(found)}; {self._listed()}")
            if not found:
                raise ValueError(f"head must name a module of the model, got {head!r}; {self._listed()}")
            module = found[0]
        elif isinstance(head, nn.Module):
            module = head
            if all(module is not other for other in self.model.modules()):
                raise ValueError(f"head must be a module of the model, got another one: {head}; {self._listed()}")
        else:
            raise TypeError(f"head must be None, a name or a torch.nn.Linear, got {type(head).__qualname__}")
        if not isinstance(module, nn.Linear):
            raise TypeError(f"head must be a torch.nn.Linear, got {type(module).__qualname__}; {self._listed()}")
        return module

    # ------------------------------------------------------------------------------------------------------- the hooks
    def attach(self) -> Probe:
        """Begin to listen: every forward pass from now on is captured.

        Compiled code does not see hooks that come later: if the model is compiled, ``torch.compiler.reset()`` is called,
        here and in :meth:`detach`, and whatever is compiled will be compiled again.

        Raises:
            RuntimeError: this probe is attached already.
        """
        if self.is_attached:
            raise RuntimeError("this probe is attached already: call detach() first")
        capture = self._capture
        capture.clear()
        self._verified.clear()
        watched = self._names if self._chosen is None else (self._chosen,)
        handles = [self.model.register_forward_pre_hook(capture.before_model)]
        handles += [module.register_forward_hook(capture.after_linear, with_kwargs=True) for module in watched]
        handles.append(self.model.register_forward_hook(capture.after_model))
        self._detach = weakref.finalize(self, _remove, handles)
        self._recompile()
        return self

    def detach(self) -> None:
        """Take all hooks away; what was captured stays readable. Without effect where none are attached."""
        if self.is_attached:
            self._detach()  # type: ignore[misc]  # attached: there is one
            self._recompile()

    def _recompile(self) -> None:
        if any(
            type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in self.model.modules()
        ):
            torch.compiler.reset()

    @property
    def is_attached(self) -> bool:
        """Whether hooks are in the model."""
        return self._detach is not None and self._detach.alive

    def __enter__(self) -> Probe:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    # --------------------------------------------------------------------------------------------- what was captured
    @property
    def head(self) -> nn.Linear:
        """The linear layer that was measured."""
        return self._captured()[0]

    @property
    def head_name(self) -> str:
        """Its name in ``model.named_modules()``."""
        return self._names[self.head]

    @property
    def features(self) -> Tensor:
        """The head's input, (..., D), as the model computed it."""
        return self._captured()[1]

    @property
    def logits(self) -> Tensor:
        """The head's output before the temperature, (..., C); in float32 where the model made it in half precision."""
        head, features, _ = self._captured()
        given = self._given_logits()
        if given is not None:
            return given
        with torch.autocast(features.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(features.float(), head.weight.float(), bias)

    def _given_logits(self) -> Tensor | None:
        """The model's own logits, if they are as good as computed ones."""
        logits = self._captured()[2]
        if logits.dtype == torch.float64:
            return logits
        # the precision of products is not to be seen while torch.compile traces
        exact = not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() == "highest"
        return logits if logits.dtype == torch.float32 and exact else None

    def _captured(self) -> tuple[nn.Linear, Tensor, Tensor]:
        capture = self._capture
        if capture.module is None or capture.features is None or not isinstance(capture.logits, Tensor):
            if not capture.called:
                raise RuntimeError(
                    "no forward pass was seen: call the model within `with Probe(model) as probe:` or after attach(). "
                    "(A function that was compiled around the model must be called first while the probe is attached.)"
                )
            which = "no linear layer" if self._chosen is None else f"not the head {self._names[self._chosen]!r}"
            raise RuntimeError(f"the model ran, but {which} ran in it; {self._listed()}")
        if capture.versions is not None:
            if capture.versions[0] != _version(capture.module.weight) and self._is_plain_parameter(capture.module):
                raise RuntimeError(
                    "the head's weight has changed since the forward pass: take the measure before optimizer.step()"
                )
            if capture.versions[1] != _version(capture.logits):
                raise RuntimeError(
                    "the head's output was changed in place after the head (a scale or temperature?): make the change out "
                    "of place and, if it is a division, pass temperature"
                )
        return capture.module, capture.features, capture.logits

    @staticmethod
    def _is_plain_parameter(module: nn.Linear) -> bool:
        return "weight" in module._parameters  # a parametrised weight is another tensor at each look

    # ---------------------------------------------------------------------------------------------------- the measures
    def hessian_trace(self, target: Any = None, **options: Any) -> Any:
        """:func:`flatcore.hessian_trace` of the captured features; ``options`` are its other arguments.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        return hessian_trace(target=target, **self._arguments(options))

    def relative_flatness(self, target: Any = None, **options: Any) -> Any:
        """:func:`flatcore.relative_flatness` of the captured features; ``options`` are its other arguments.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        return relative_flatness(target=target, **self._arguments(options))

    def feature_gradient_norms(self, target: Any, **options: Any) -> Any:
        """:func:`flatcore.feature_gradient_norms` of the captured features; ``options`` are its other arguments.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        return feature_gradient_norms(target=target, **self._arguments(options))

    def head_metrics(self, target: Any = None, **options: Any) -> HeadMetrics:
        """:func:`flatcore.head_metrics` of the captured features, detached: these statistics have no derivative.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        arguments = self._arguments(options)
        return head_metrics(
            target=target, **{k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        )

    def _arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        head, features, _ = self._captured()
        if "temperature" in options:
            raise TypeError(
                "temperature is given to Probe(model, temperature=...), where the model's output is checked"
            )
        arguments: dict[str, Any] = {
            "features": features,
            "linear_weight": head.weight,
            "linear_bias": head.bias,
            "logits": self._given_logits(),
            "temperature": self.temperature,
        } | options
        for name in ("features", "linear_weight", "linear_bias"):  # before anything reads them: memory may be freed
            if isinstance(arguments[name], Tensor):
                check_tensor(arguments[name], name)
        mode = self.model.training
        if self.verify and mode not in self._verified and not torch.compiler.is_compiling():
            self._check_output(arguments["linear_weight"], arguments["linear_bias"])
            self._verified.add(mode)
        return arguments

    # -------------------------------------------------------------------------------------------------- the comparison
    @torch.no_grad()
    def _check_output(self, weight: Tensor, bias: Tensor | None) -> None:
        head, features, logits = self._captured()
        C = logits.shape[-1]
        found = _logits_in(self._capture.output, C)
        if not self._capture.called:
            raise RuntimeError(
                "the head ran, but not through the model that is probed, so its output could not be checked: call "
                "that model, or pass verify=False"
            )
        if not found:
            raise RuntimeError(
                f"the model returned {_described(self._capture.output)}, in which no tensor of shape (..., C = {C}) was "
                f"found to compare with the output of the head {self._names[head]!r}; pass verify=False if the logits "
                f"are the head's output, or name the head: {self._listed()}"
            )
        if torch._C._len_torch_dispatch_stack() > 0:
            return  # fake tensors hold no numbers
        here = logits.reshape(-1, C)
        pick = torch.linspace(0, here.shape[0] - 1, min(here.shape[0], _ROWS), device=here.device).long()
        made = here[pick].double()
        if made.numel() == 0:
            return
        products = features.reshape(-1, features.shape[-1])[pick].double()
        again, size = products @ weight.double().T, products.abs() @ weight.double().abs().T
        if bias is not None:
            again, size = again + bias.double(), size + bias.double().abs()
        coarse = logits.dtype in _HALF or torch.get_float32_matmul_precision() != "highest"
        unit = 2.0**-8 if coarse else torch.finfo(logits.dtype).eps
        width = 2 * math.sqrt(features.shape[-1]) + 4  # of a product's own rounding, in units of its absolute terms
        if not _alike(made, again, width * unit * (_largest(size) + 1)):
            raise RuntimeError(
                f"the output of the head {self._names[head]!r} is not features W^T + b: something changes it in place or in "
                f"a hook; {self._listed()}"
            )
        outputs = [x.reshape(-1, C) for x in found if x.numel() == logits.numel()]
        if not outputs:
            raise RuntimeError(
                f"the model returned logits of shape {tuple(found[0].shape)}, its head {self._names[head]!r} made "
                f"{tuple(logits.shape)}: not the same samples; {self._listed()}"
            )
        factors = []
        for output in outputs:
            given = output[pick].double() * self.temperature
            narrow = max(torch.finfo(output.dtype).eps, torch.finfo(logits.dtype).eps)
            if _alike(given, made, 4 * narrow * (_largest(made) + 1)):
                return
            finite = made.isfinite() & given.isfinite()
            a, b = _centered(made, finite), _centered(given, finite)
            factor = ((a * b).sum() / (b * b).sum()).item()
            if factor > 0 and _alike(factor * given, made, 8 * narrow * (_largest(made) + 1)):
                factors.append(factor)
        hint = "a softcap, a mask or another layer follows"
        if factors:
            hint = f"it is the head's output divided by {factors[0] * self.temperature:.6g}: pass that as temperature"
        raise RuntimeError(
            f"the model's output is not the output of {self._names[head]!r}, the last linear layer that ran "
            f"({hint}), so the closed form would be wrong; {self._listed()}"
        )

    def _listed(self) -> str:
        """The linear layers, those that ran marked."""
        ran = self._capture.ran
        entries = [
            f"{name!r} ({module.in_features} -> {module.out_features}{', ran' if module in ran else ''})"
            for module, name in self._names.items()
        ]
        shown = entries if len(entries) <= 20 else [*entries[:4], f"{len(entries) - 16} more", *entries[-12:]]
        return f"its linear layers are: {', '.join(shown) or 'none'}"

    def __repr__(self) -> str:
        if self._capture.module is None:
            state = "attached, no forward pass yet" if self.is_attached else "not attached"
            return f"flatcore.Probe({type(self.model).__name__}: {state})"
        head, features = self._capture.module, self._capture.features
        return (
            f"flatcore.Probe({type(self.model).__name__}: head {self._names[head]!r}, "
            f"{head.in_features} -> {head.out_features}, features {_described(features)})"
        )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _unwrapped(name: str) -> str:
    """A module's name without those of the wrappers around the model."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return f"a {type(value).__qualname__}"


def _logits_in(output: Any, C: int) -> list[Tensor]:
    """Tensors (..., C) in what a model returned; those called logits alone, if there are any."""
    if isinstance(output, Tensor):
        return [output] if output.dim() > 0 and output.shape[-1] == C and output.is_floating_point() else []
    if output is None:
        return []
    if isinstance(output, Mapping):
        named, parts = output.get("logits"), list(output.values())
    else:
        named = getattr(output, "logits", None)
        parts = list(output) if isinstance(output, (tuple, list)) else []
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    if isinstance(named, Tensor):
        return _logits_in(named, C)
    return [x for part in parts if isinstance(part, Tensor) for x in _logits_in(part, C)]


def _centered(x: Tensor, finite: Tensor) -> Tensor:
    """Rows less the mean of their finite entries; 0 at the others."""
    x = torch.where(finite, x, 0)
    mean = x.sum(dim=1, keepdim=True) / finite.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(finite, x - mean, 0)


def _largest(x: Tensor) -> Tensor:
    """The largest finite magnitude: a NaN row or an absent class (-inf) says nothing about the others."""
    return torch.where(x.isfinite(), x, 0).abs().amax()


def _alike(a: Tensor, b: Tensor, bound: Any) -> bool:
    """Whether rows are equal to a bound, up to a constant in each; infinities and NaN in the same places."""
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(torch.where(finite, 0, a).nan_to_num(0.5), torch.where(finite, 0, b).nan_to_num(0.5)):
        return False
    return bool(((_centered(a, finite) - _centered(b, finite)).abs() <= bound).all())
