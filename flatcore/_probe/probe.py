"""Probe: the head of a model and what went through it, captured by hooks and measured."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments.arrays import on_the_arrays_stream
from .._arguments.checks import check_flag, check_temperature, check_tensor, one_output, storage_covers
from .._engine.precision import full_precision
from .._head_metrics import HeadMetrics, feature_gradient_norms, head_metrics, hessian_trace, relative_flatness
from . import verify
from .capture import Capture, Pass, address, install, is_dead, remove, version
from .comparison import tensors_in
from .layers import adapters, adapts, kind, parts, readable, remedy, sizes
from .verify import given_logits, listed

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # in names, of the wrappers that torch puts around a model

_TWO_CLASSES = (
    "with w = probe.head.weight, b = probe.head.bias and z = torch.zeros_like, "
    "flatcore.relative_flatness(probe.features, torch.cat([z(w), w]), linear_bias=torch.cat([z(b), b]))"
)


class Probe:
    r"""Finds the last linear layer of a model, captures what goes through it, and measures it.

    Within ``with Probe(model) as probe:`` (or between :meth:`attach` and :meth:`detach`) every forward pass of the model
    leaves :attr:`features` and :attr:`logits` behind: the tensors themselves, not copies, so that the measures are
    differentiable with respect to everything the model computed them from. The head is the last ``torch.nn.Linear`` that
    ran, or the one that is named. A pass is a call of the model, from its beginning to its return, with the weight and bias
    that the head used in it; what runs outside of one (layers called by themselves, recomputation in a backward) changes
    nothing. A thread measures its own last pass, or, if it made none, the last of any. Copies of the model are not probed.

    Args:
        model: a ``torch.nn.Module``; also wrapped in DistributedDataParallel or compiled. What it returns must hold the
            logits: a tensor, an object with ``.logits``, or a mapping, tuple or dataclass with one tensor (..., C).
        head: None; the name of a ``torch.nn.Linear`` in ``model.named_modules()`` (names of wrappers, as ``module.``, may be
            left out); or that module itself.
        temperature: T, if the model divides the head's output by it; a number.
        verify: compare the model's output with the head's, and the head's with features W^T + b: on up to 64 rows at the
            first use after each ``attach``, once in training and once in evaluation mode, and on one row at the first use of
            every later pass (neither while torch.compile traces nor while a CUDA graph is captured). On CUDA the latter
            waits for nothing: it is read at a later measure, or in :meth:`detach`. A constant added to a row is no
            difference, as the softmax sees none.

    Raises:
        TypeError: a model that is no module; a head that is no linear layer (a quantised one, say); DataParallel; a
            temperature that is a tensor. When a measure is taken: a weight or bias that is sharded (DTensor) otherwise than
            by ``fully_shard``, offloaded (meta), quantised, or of a subclass that hides its numbers: pass ``linear_weight``
            and ``linear_bias``.
        ValueError: a head that is not in the model, or whose name fits several; a model without linear layers; a bad
            temperature. When a measure is taken: a freed weight (FSDP); a head of one output (a sigmoid's).
        RuntimeError: when a measure is taken: no forward pass was seen, or it did not come to its end, or it ran inside a
            transform of ``torch.func`` that has ended; the head did not run in it; features, weight, bias or logits have
            changed since; a derivative is wanted and the head ran under no_grad (a reentrant checkpoint); the outputs of
            several linear layers are returned; adapters (LoRA) run beside the head; the model's output is not the head's (a
            softcap, scale or temperature follows): the message lists the linear layers that ran.

    Gradients: the measures flow into features and weight; :meth:`head_metrics` detaches its inputs, for it has no
        derivative. A pass under no_grad is measured without.

    Numerics: where the model made its logits in float16 or bfloat16, or float32 products were not at their highest
        precision, they are not used: they are computed again from the features, in float32. A bfloat16 logit is off by
        0.1 at 35. They are computed again, too, where ``features``, ``linear_weight`` or ``linear_bias`` are given to a
        measure; the model's output is then compared with those.

    FSDP2: weight and bias that ``fully_shard`` has freed are gathered, as ``full_tensor(grad_placements=[Partial("avg")])``:
        their gradients are averaged over the processes, as its own are unless it is told another factor. Every process has
        to take the measure.

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
            raise TypeError(f"model must be a torch.nn.Module, got {kind(model)}")
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "model must not be a torch.nn.DataParallel, whose replicas run at once in several threads: probe its "
                ".module, or use DistributedDataParallel"
            )
        if isinstance(temperature, Tensor):
            raise TypeError(
                f"temperature must be a number, got a tensor {tuple(temperature.shape)}: pass temperature.item() if it is "
                "one number that is not learned; else use the functional form on what a probe with verify=False captures, "
                "flatcore.relative_flatness(probe.features, probe.head.weight, linear_bias=probe.head.bias, "
                "logits=probe.logits / T, reduction='none') / T**2 with a T for each row (feature_gradient_norms: / T), "
                "whose gradient reaches it"
            )
        self.model = model
        self.temperature = check_temperature(temperature)
        self.verify = check_flag(verify, "verify")
        self._chosen: nn.Linear | None = None
        self._fresh()
        self._chosen = None if head is None else self._find(head)
        if not self._names:
            raise ValueError(
                f"model must contain a torch.nn.Linear, got none: there is no head to probe; {listed(self)}"
            )

    def _fresh(self) -> None:
        """What is not configuration."""
        self._names = {module: name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        self._adapters = adapters(self.model)
        self._capture = Capture()
        self._verified: set[bool] = set()
        self._later: list[verify.Later] = []
        self._detach: weakref.finalize | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("model", "temperature", "verify", "_chosen")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def _find(self, head: Any) -> nn.Linear:
        if isinstance(head, str):
            named = dict(self.model.named_modules())
            found = [named[head]] if head in named else [m for n, m in named.items() if _unwrapped(n) == head]
            if len(found) > 1:
                raise ValueError(f"head must name one module, got {head!r}, which fits {len(found)}; {listed(self)}")
            if not found:
                raise ValueError(f"head must name a module of the model, got {head!r}; {listed(self)}")
            module = found[0]
        elif isinstance(head, nn.Module):
            module = head
            if all(module is not other for other in self.model.modules()):
                raise ValueError(f"head must be a module of the model, got another one: {head}; {listed(self)}")
        else:
            raise TypeError(f"head must be None, a name or a torch.nn.Linear, got {kind(head)}")
        for base, (_, layer) in self._adapters.items():
            if module is layer and isinstance(base, nn.Linear):
                return base
        if not isinstance(module, nn.Linear):
            raise TypeError(f"head must be a torch.nn.Linear, got {kind(module)}{remedy(module)}; {listed(self)}")
        return module

    # ------------------------------------------------------------------------------------------------------- the hooks
    def attach(self) -> Probe:
        """Begin to listen: every forward pass from now on is captured.

        Compiled code does not see hooks that come later: if the model is compiled, ``torch.compiler.reset()`` is called,
        here and in :meth:`detach`, and whatever is compiled will be compiled again.

        Raises:
            RuntimeError: this probe is attached already.
            ValueError: the head that was named is not in the model any more.
        """
        if self.is_attached:
            raise RuntimeError("this probe is attached already: call detach() first")
        self._fresh()  # layers may have been replaced
        if self._chosen is not None and self._chosen not in self._names:
            raise ValueError(f"the head is not in the model any more: make another Probe; {listed(self)}")
        capture = self._capture
        inside = {m for _, layer in self._adapters.values() for m in parts(layer)} - {self._chosen}
        capture.parts = frozenset(inside)
        if self.verify and self._chosen is None:
            capture.sampled = {True, False}
        watched = [m for m in self._names if self._chosen is None or m is self._chosen or m in inside]
        self._detach = weakref.finalize(self, remove, install(capture, self.model, watched))
        self._recompile()
        return self

    def detach(self) -> None:
        """Take all hooks away; what was captured stays readable. Without effect where none are attached.

        Raises:
            RuntimeError: on CUDA, where a comparison that was not read yet has failed: it names the pass.
        """
        if self.is_attached:
            self._detach()  # type: ignore[misc]  # attached: there is one
            self._recompile()
        verify.read(self, wait=True)

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
        if kind is not None:
            self._later.clear()  # the exception at hand comes first
        self.detach()

    # --------------------------------------------------------------------------------------------- what was captured
    @property
    def head(self) -> nn.Linear:
        """The linear layer that was measured."""
        return self._used().module  # type: ignore[return-value]  # it ran

    @property
    def head_name(self) -> str:
        """Its name in ``model.named_modules()``."""
        return self._names[self.head]

    @property
    def features(self) -> Tensor:
        """The head's input, (..., D), as the model computed it."""
        used = self._used()
        self._check_unchanged(used, ("linear_weight", "linear_bias"))
        return used.features

    @property
    def logits(self) -> Tensor:
        """The head's output before the temperature, (..., C); in float32 where the model made it in half precision."""
        used = self._used()
        self._check_unchanged(used, ())
        given = given_logits(used)
        if given is not None:
            return given
        weight, bias = self._readable(used, "weight"), self._readable(used, "bias")
        device = used.features.device.type
        off = torch.autocast(device, enabled=False) if torch.compiler.is_compiling() else full_precision(device)
        with off:
            return nn.functional.linear(used.features.float(), weight.float(), None if bias is None else bias.float())

    def _used(self) -> Pass:
        """The pass to measure, in which the head has run."""
        used = self._capture.last()
        if used is None:
            if self._capture.outside:
                raise RuntimeError(
                    "linear layers ran, but not through the model that is probed: a pass is a call of that model itself "
                    "(model.forward(...) runs no hooks); call it, or probe the part that is called"
                )
            raise RuntimeError(
                "no forward pass was seen: call the model within `with Probe(model) as probe:` or after attach(). "
                "(A function that was compiled around the model must be called first while the probe is attached.)"
            )
        if not used.done:
            raise RuntimeError(
                "the last forward pass has not come to its end (the measure was taken within it, or an exception ended it): "
                "take the measure after a call of the model that returned"
            )
        if used.module is None or not isinstance(used.features, Tensor) or not isinstance(used.logits, Tensor):
            which = "no linear layer" if self._chosen is None else f"not the head {self._names[self._chosen]!r}"
            raise RuntimeError(f"the model ran, but {which} ran in it; {listed(self)}")
        if not torch.compiler.is_compiling() and is_dead(used.features):
            raise RuntimeError(
                "the forward pass ran inside a transform of torch.func (vmap, grad), which has ended and taken its tensors "
                "with it: take the measure inside the transform, or of a pass outside of it"
            )
        return used

    def _check_unchanged(self, used: Pass, given: Any) -> None:
        """Refuse what has changed since the head used it, except for what is given in its place."""
        if used.versions is None:
            return
        features, weight, bias, logits = used.versions
        if "features" not in given and version(used.features) != features:
            raise RuntimeError(
                "the head's features were changed in place after it had used them: take the measure before, or make the "
                "change out of place"
            )
        for name, tensor, before in (("weight", used.weight, weight), ("bias", used.bias, bias)):
            moved = name == "weight" and used.address not in (0, address(tensor)) and storage_covers(tensor)
            if f"linear_{name}" not in given and (version(tensor) != before or moved):
                raise RuntimeError(
                    f"the head's {name} has changed since the forward pass: take the measure before optimizer.step(), and "
                    "inside the block that swaps weights (average_parameters() and the like)"
                )
        if not given and version(used.logits) != logits:
            raise RuntimeError(
                "the head's output was changed in place after the head (a scale or temperature?): make the change out "
                "of place and, if it is a division, pass temperature"
            )

    def _readable(self, used: Pass, name: str) -> Any:
        tensor = used.weight if name == "weight" else used.bias
        if torch.compiler.is_compiling():
            return tensor
        module: Any = used.module
        return readable(tensor, name, module, self._names[module], self.model)

    # ---------------------------------------------------------------------------------------------------- the measures
    @on_the_arrays_stream
    def hessian_trace(self, target: Any = None, **options: Any) -> Any:
        """:func:`flatcore.hessian_trace` of the captured features; ``options`` are its other arguments.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        return hessian_trace(target=target, **self._arguments(options))

    @on_the_arrays_stream
    def relative_flatness(self, target: Any = None, **options: Any) -> Any:
        """:func:`flatcore.relative_flatness` of the captured features; ``options`` are its other arguments.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        return relative_flatness(target=target, **self._arguments(options))

    @on_the_arrays_stream
    def feature_gradient_norms(self, target: Any, **options: Any) -> Any:
        """:func:`flatcore.feature_gradient_norms` of the captured features; ``options`` are its other arguments.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        return feature_gradient_norms(target=target, **self._arguments(options))

    @on_the_arrays_stream
    def head_metrics(self, target: Any = None, **options: Any) -> HeadMetrics:
        """:func:`flatcore.head_metrics` of the captured features, detached: these statistics have no derivative.

        Raises:
            TypeError, ValueError, RuntimeError: as the class says, and as that function.
        """
        with torch.no_grad():
            return head_metrics(target=target, **self._arguments(options))

    def _arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """What the functions take. With grad mode off nothing of it needs a derivative."""
        if "temperature" in options:
            raise TypeError(
                "temperature is given to Probe(model, temperature=...), where the model's output is checked"
            )
        tracing = torch.compiler.is_compiling()
        if self._later:
            verify.read(self, wait=False)
        used = self._used()
        given = [n for n, own in (("features", used.features), ("linear_weight", used.weight), ("linear_bias", used.bias))
                 if n in options and options[n] is not own]  # fmt: skip
        self._check_unchanged(used, given)
        self._check_adapters(used, given)
        weight = options["linear_weight"] if "linear_weight" in options else self._readable(used, "weight")
        bias = options["linear_bias"] if "linear_bias" in options else self._readable(used, "bias")
        arguments: dict[str, Any] = {
            "features": used.features,
            "linear_weight": weight,
            "linear_bias": bias,
            "logits": None if given else given_logits(used),
            "temperature": self.temperature,
        }
        if not used.grad and not tracing and torch.is_grad_enabled():
            self._check_grad(used, given)
            for name in arguments:
                if isinstance(arguments[name], Tensor) and name not in given:
                    arguments[name] = arguments[name].detach()
        arguments |= options
        for name in ("features", *given):  # before anything reads them: memory may be freed
            if isinstance(arguments[name], Tensor):
                check_tensor(arguments[name], name)
        if tuple(getattr(weight, "shape", ()))[:1] == (1,):
            raise ValueError(one_output(f"the head {self.head_name!r}", _TWO_CLASSES))
        if self.verify and not tracing and (given or not used.checked):
            replaced = [name for name in given if name != "features"]
            if replaced or not verify.agrees_quickly(self, used, weight, bias):
                looked = verify.check(self, used, weight, bias, replaced)
                used.checked = used.checked or (looked and not given)
            else:
                used.checked = True
        return arguments

    def _check_grad(self, used: Pass, given: list[str]) -> None:
        outputs = (used.logits, *tensors_in(used.output))  # checkpoint gives them a history after the hooks
        if "features" not in given and any(x.requires_grad for x in outputs):
            raise RuntimeError(
                "the head ran under no_grad in a pass whose output requires gradient (torch.utils.checkpoint with "
                "use_reentrant=True around it?), so that the measure's gradient would not reach the features: use "
                "checkpoint(..., use_reentrant=False), take the measure inside the function that is checkpointed, or "
                "under torch.no_grad() if only its value is wanted"
            )

    def _check_adapters(self, used: Pass, given: list[str]) -> None:
        head: Any = used.module
        if "linear_weight" in given or not (self._adapters or hasattr(head, "lora_A")):
            return
        name, layer = self._adapters.get(head) or (self._names[head], head)
        if not hasattr(layer, "lora_A"):
            return
        if adapts(layer, used.ran):
            raise RuntimeError(
                f"the head {name!r} is a LoRA layer ({kind(layer)}): its output is that of W + scaling * B A, the captured "
                "weight is W alone. Pass the merged one to the measure, linear_weight=W + scaling * B @ A (in peft: "
                f"layer.base_layer.weight + layer.get_delta_weight(adapter)), or merge the adapters first; {listed(self)}"
            )

    def __repr__(self) -> str:
        used = self._capture.last()
        if used is None or not used.done or used.module is None:
            state = "attached, no forward pass yet" if self.is_attached else "not attached"
            return f"flatcore.Probe({type(self.model).__name__}: {state})"
        return (
            f"flatcore.Probe({type(self.model).__name__}: head {self._names[used.module]!r}, "
            f"{sizes(used.module)}, features {verify.described(used.features)})"
        )


def _unwrapped(name: str) -> str:
    """A module's name without those of the wrappers around the model."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
