"""What went through a model's head in one forward pass, seen by hooks."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._arguments.checks import is_exact
from .._engine.precision import products_are_exact
from .comparison import tensors_in


class Pass:
    """One forward pass: the tensors that the last linear layer used, as they were while it ran."""

    thread = 0  # 0: traced by the compiler, where threads cannot be told apart
    task = -1  # of the backward it runs in, -1: none
    depth = 1  # a model may call itself
    number = 0
    mode = True  # whether the model was in training mode
    sampling = False  # whether every layer leaves a row of its output
    open, done, checked = True, False, False
    module: nn.Linear | None = None
    features: Any = None
    weight: Any = None
    bias: Any = None
    logits: Any = None
    versions: tuple[int, int, int, int] | None = None  # of these four, as the head left them
    address = 0  # of the weight: `weight.data = other` leaves its version alone
    row: Tensor | None = None  # of the weight, where the logits are too coarse to tell two weights apart
    grad = True  # whether grad mode was on in the head
    exact: bool | None = None  # whether float32 products were exact; None: unknown, the pass was traced
    output: Any = None

    def __init__(self) -> None:
        self.ran: list[nn.Linear] = []
        self.calls: list[tuple[nn.Linear, Any, Tensor]] = []  # (layer, its input, one row of its output), where sampled
        self.made: list[tuple[nn.Module, Tensor]] = []  # what parametrisations computed since a layer used it

    def computed(self, module: nn.Module, name: str) -> Tensor | None:
        """The weight or bias that the layer has just used, never computed again: spectral_norm iterates at each look."""
        held = module._parameters.get(name)
        if held is not None or name in module._parameters:
            return held
        if name in module.__dict__:  # a plain attribute: torch.nn.utils.spectral_norm, FSDP's views
            return module.__dict__[name]
        lists = module._modules.get("parametrizations")
        source = lists._modules.get(name) if lists is not None else None
        for made_by, tensor in reversed(self.made):
            if made_by is source:
                return tensor
        if not torch.compiler.is_compiling():
            return parametrize._cache.get((id(module), name))  # within parametrize.cached() it is computed once
        return None

    def take(self, module: nn.Linear, args: Any, kwargs: Any, output: Any) -> None:
        self.ran.append(module)
        self.module, self.logits = module, output
        self.features = args[0] if args else kwargs.get("input")
        self.weight, self.bias = self.computed(module, "weight"), self.computed(module, "bias")
        self.grad = torch.is_grad_enabled()
        if self.made:
            self.made = []

    def seal(self, output: Any) -> None:
        """The model has returned: nothing is added any more."""
        self.output, self.open, self.done = output, False, True
        if self.versions is None or not isinstance(self.logits, Tensor):
            return
        self.address = address(self.weight)
        if self.logits.dtype is torch.float32:
            self.exact = products_are_exact(self.logits.device.type)
        elif self.logits.dtype is not torch.float64 and self.address and torch._C._len_torch_dispatch_stack() == 0:
            self.row = self.weight.detach()[:1].clone()


class _Slot:
    """The pass that is running in a thread, and the last that has ended."""

    open: Pass | None = None
    done: Pass | None = None


class _Slots(threading.local):
    """A thread's own: one slot for its passes, one for those inside a backward (a checkpoint computing again)."""

    def __init__(self) -> None:
        self.plain, self.backward = _Slot(), _Slot()

    def of(self, task: int) -> _Slot:
        return self.plain if task < 0 else self.backward


class Capture:
    """The hooks. They hold this and not the probe, so that a lost probe takes them away.

    A pass is what happens between the model's pre-hook and its post-hook, in one thread. Layers that run outside of it
    (called by themselves, or again in a backward) change nothing. Copies and pickles of a model that is probed are made
    without hooks (:class:`_State`); where a class copies its modules in its own way, the copy of a hook does nothing.
    """

    def __init__(self, dead: bool = False) -> None:
        self.dead = dead
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Capture, (True,)

    def clear(self) -> None:
        self.slots = _Slots()
        self.traced = _closed()  # written to by compiled code
        self.latest: Pass | None = None  # of all threads
        self.passes = 0
        self.outside = False  # a layer ran outside of a pass
        self.parts: frozenset[nn.Module] = frozenset()  # linear layers inside adapters, which are no heads
        # the modes (training or not) whose passes are sampled: until one is measured, if several tensors are returned
        self.sampled: set[bool] = set()

    # ------------------------------------------------------------------------------------------------------- the hooks
    def before_model(self, module: nn.Module, args: Any) -> None:
        if self.dead:
            return
        if torch.compiler.is_compiling():
            self.traced = Pass()
            self.traced.mode = module.training
            self.latest = None
            return
        task = torch._C._current_graph_task_id()
        slot = self.slots.of(task)
        running = slot.open
        if running is not None and running.task == task and _calls_itself(module):
            running.depth += 1
            return
        fresh = slot.open = Pass()
        slot.done = None
        fresh.thread, fresh.task = threading.get_ident(), task
        fresh.mode = module.training
        fresh.sampling = module.training in self.sampled
        if task < 0:
            if self.slots.backward.done is not None or self.slots.backward.open is not None:
                self.slots.backward = _Slot()
            if self.latest is not None and self.latest.thread in (0, fresh.thread):
                self.latest = None
            self.passes += 1
        fresh.number = self.passes
        if self.traced.ran:
            self.traced = Pass()
        self.traced.open = True

    def after_parametrization(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.dead:
            running = self.traced if torch.compiler.is_compiling() else self._running()
            if running is not None and running.open:
                running.made.append((module, output))

    def after_linear(self, module: nn.Linear, args: Any, kwargs: Any, output: Any) -> None:
        if self.dead:
            return
        if torch.compiler.is_compiling():
            if self.traced.open and module not in self.parts:
                self.traced.take(module, args, kwargs, output)
            return
        running = self._running()
        if running is None:
            self.outside = True
            return
        if module in self.parts:
            running.ran.append(module)
            return
        running.take(module, args, kwargs, output)
        features, weight, bias = running.features, running.weight, running.bias
        try:
            running.versions = (
                features._version, weight._version, -1 if bias is None else bias._version, output._version
            )  # fmt: skip
        except (RuntimeError, AttributeError):  # inference tensors have none
            running.versions = version(features), version(weight), version(bias), version(output)
        if self.traced.ran:
            self.traced.module = None  # what compiled code saw before is not the last any more
        if running.sampling and isinstance(features, Tensor) and isinstance(output, Tensor) and output.numel():
            row = output.detach()[(0,) * (output.dim() - 1)].clone()
            running.calls.append((module, weakref.ref(features), row))

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.dead:
            return
        if torch.compiler.is_compiling():
            self.traced.seal(output)
            self.latest = self.traced
            return
        task = torch._C._current_graph_task_id()
        slot = self.slots.of(task)
        running = slot.open
        if running is None or running.task != task:
            return  # attached in the middle of it
        running.depth -= 1
        if running.depth:
            return
        slot.open, slot.done = None, running
        if self.traced.module is not None:  # the last layer ran in compiled code
            traced = self.traced
            running.module, running.features, running.logits = traced.module, traced.features, traced.logits
            running.weight, running.bias, running.grad = traced.weight, traced.bias, traced.grad
            features, weight, bias, logits = running.features, running.weight, running.bias, running.logits
            running.versions = version(features), version(weight), version(bias), version(logits)  # as the pass ends
        if self.traced.ran:
            running.ran += self.traced.ran
            self.traced = _closed()
        self.traced.open = False
        running.seal(output)
        if running.sampling and len(tensors_in(output)) < 2:
            self.sampled.discard(running.mode)
        if task < 0:
            self.latest = running

    # ------------------------------------------------------------------------------------------------------ what to read
    def _running(self) -> Pass | None:
        task = torch._C._current_graph_task_id()
        running = self.slots.of(task).open
        return running if running is not None and running.task == task else None

    def last(self) -> Pass | None:
        """The pass to measure: this thread's own, else the last of any; open, if it has not ended."""
        if torch.compiler.is_compiling():
            return self.latest
        task = torch._C._current_graph_task_id()
        slot = self.slots.of(task)
        if task >= 0:  # computed again by a checkpoint, with the measure: that pass, not the first one
            for found in (slot.open, slot.done):
                if found is not None and found.task == task:
                    return found
            slot = self.slots.plain
        if slot.open is not None:
            return slot.open
        latest = self.latest
        if latest is not None and slot.done is not None and latest.thread not in (0, threading.get_ident()):
            return slot.done
        return latest


def _closed() -> Pass:
    empty = Pass()
    empty.open = False
    return empty


def version(tensor: Any) -> int:
    return -1 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version


def address(tensor: Any) -> int:
    """Of a plain tensor's first element; 0 where it has none."""
    if not isinstance(tensor, Tensor) or not is_exact(tensor) or not torch._C._has_storage(tensor):
        return 0
    return 0 if torch._C._functorch.is_functorch_wrapped_tensor(tensor) else tensor.data_ptr()


def is_dead(tensor: Tensor) -> bool:
    """Whether it is a value of a torch.func transform that has ended."""
    transforms = torch._C._functorch
    if not transforms.is_functorch_wrapped_tensor(tensor):
        return False
    level = transforms.maybe_get_level(tensor)  # -2: a gradient's, unwrapped by now
    return level < 0 or level > (transforms.maybe_current_level() or 0)


def _calls_itself(module: nn.Module) -> bool:
    """Whether a call of the module is under way, besides the one whose pre-hook asks; else a pass was left by an exception.

    Looked for on the stack: a reference to what ran there would keep its memory alive after an exception.
    """
    frame: Any = sys._getframe(2)
    code = frame.f_code
    while (frame := frame.f_back) is not None:
        if frame.f_code is code and frame.f_locals.get("self") is module:
            return True
    return False


# ------------------------------------------------------------------------------------------------------ in and out again
class _State:
    """``__getstate__`` of a module that is probed: as before, without the hooks, so that copies and pickles have none."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _State, (nn.Module(),)

    def __call__(self) -> Any:
        module: Any = self.module()
        kind: Any = type(module)
        state = kind.__getstate__(module)
        if not isinstance(state, dict):
            return state
        state = {k: v for k, v in state.items() if k != "__getstate__"}
        ours = {k for name in _HOOKS for k, hook in state.get(name, {}).items() if _is_ours(hook)}
        for name in (*_HOOKS, "_forward_hooks_with_kwargs"):
            if name in state:
                kept = type(state[name])((k, v) for k, v in state[name].items() if k not in ours)
                state[name] = kept
        return state


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), Capture)


def install(capture: Capture, model: nn.Module, watched: list[nn.Linear]) -> list[Any]:
    """Put hooks in: what :func:`remove` takes."""
    handles: list[Any] = [model.register_forward_pre_hook(capture.before_model)]
    hooked: list[nn.Module] = [model]
    for module in watched:
        handles.append(module.register_forward_hook(capture.after_linear, with_kwargs=True))
        hooked.append(module)
        lists = module._modules.get("parametrizations")
        for made in () if lists is None else lists.children():
            handles.append(made.register_forward_hook(capture.after_parametrization))
            hooked.append(made)
    handles.append(model.register_forward_hook(capture.after_model))
    for each in hooked:
        each.__dict__.setdefault("__getstate__", _State(each))
    return [*handles, *map(weakref.ref, hooked)]


def remove(handles: list[Any]) -> None:
    """Take hooks out, and the rest with the last of a module's."""
    for handle in handles:
        if not isinstance(handle, weakref.ref):
            handle.remove()
    for reference in handles:
        if isinstance(reference, weakref.ref) and (module := reference()) is not None:
            found = [hook for name in _HOOKS for hook in getattr(module, name).values()]
            if isinstance(module.__dict__.get("__getstate__"), _State) and not any(map(_is_ours, found)):
                del module.__dict__["__getstate__"]
