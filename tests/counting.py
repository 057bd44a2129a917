"""Counts of a call on the real Python path: launches, allocations, waits for the device, bytes and operations.

Kernels are counted where the emulated runtime launches them and priced by ``kernel_costs``; the framework's operators by a
dispatch mode: one that writes is a launch, its tensors are the bytes, and a product's operations are those of torch's own
table. ``dry`` counts a call at any size without running it: launches return at once, and an operator's result is
uninitialised memory that no one touches, so that a head of 128,256 classes is counted in seconds.
"""

from __future__ import annotations

import sys
from collections import Counter as Sums
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import emulation
import kernel_costs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import flatcore
from flatcore._engine import chunked_cuda, direct
from flatcore._engine import cuda as native_cuda

UNINITIALISED = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operators that hand numbers to the host, or whose result's size depends on them; an index of booleans is one too."""
READING = "tolist", "numpy", "cpu", "__array__"
"""Methods that copy to the host, which no dispatch mode sees where all tensors are the host's."""
ONLY_WRITING = {"copy_", "zero_", "fill_"}

LAUNCH = 3e-6  # seconds
BANDWIDTH = 3.0e12  # bytes a second, read and written
RATES = {"half": 790e12, "single": 66.9e12, "double": 33.5e12}
"""Operations a second that the counts assume, of an H100: 16-bit products, and float32 and float64 of any kind. Figures to
count with, not measured with flatcore."""
_KIND = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "single", torch.float64: "double"}


def size_of(x: Tensor) -> int:
    """The bytes of a tensor's elements; a dimension that repeats them counts once."""
    return x.itemsize * torch.Size(n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 0).numel()


class Counter(TorchDispatchMode):
    """What a call asks of a device, the framework's operators and the emulated kernels together."""

    def __init__(self, *, dry: bool = False) -> None:
        super().__init__()
        self.dry = dry
        self.launches, self.allocations, self.waits = 0, 0, 0
        self.of_kernels, self.of_operators, self.operations = 0.0, 0, Sums[str]()  # bytes, and by kind
        self.names, self.calls = Sums[str](), Sums[str]()  # operators that are launches; kernel calls
        self._reading = ExitStack()

    def __enter__(self) -> Counter:
        for name in READING:
            self._reading.enter_context(mock.patch.object(Tensor, name, self._noted(getattr(Tensor, name))))
        self._reading.enter_context(mock.patch.object(torch.cuda, "synchronize", self._noted(lambda *device: None)))
        self.launches -= emulation.module().devices.launches
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.launches += emulation.module().devices.launches
        self._reading.close()
        super().__exit__(*error)

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.waits += 1
            return method(*arguments, **options)

        return call

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.waits += _waits(function, args)
        written = _written(function, args, kwargs)
        result = _pretended(function, args, kwargs, written) if self.dry else function(*args, **kwargs)
        ours = {_storage(x) for x in given}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _storage(x) not in ours]
        self.allocations += len(made)
        if name in UNINITIALISED or not (made or written):
            return result
        self.launches += 1
        self.names[name] += 1
        unread = [w for i, w in enumerate(written) if name in ONLY_WRITING or _is_out(function, i)]
        self.of_operators += sum(size_of(x) for x in given if all(x is not w for w in unread))
        self.of_operators += sum(map(size_of, (*made, *written)))
        packet = getattr(torch.ops.aten, name.rstrip("_"), None)
        if packet in flop_registry:
            a = next(x for x in reversed(given) if x.dim() > 1)
            self.operations[_KIND[a.dtype]] += flop_registry[packet](*args, **kwargs, out_val=result)
        return result

    def kernel(self, name: str, cost: kernel_costs.Cost) -> None:
        """Add what a call of a kernel costs; its launches are counted where they are made."""
        self.calls[name] += 1
        self.of_kernels += cost.bytes
        self.operations.update(cost.operations)

    def product(self, out: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
        """Count a product of 16-bit matrices into a float32 one, which is one launch on a device."""
        self.launches += 1
        self.names["half product"] += 1
        self.of_operators += size_of(a) + size_of(b) + size_of(out) * (2 if adds else 1)
        self.operations["half"] += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    @property
    def bytes(self) -> float:
        """Read and written by all launches."""
        return self.of_kernels + self.of_operators

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that the launches, the bytes and the operations take, each for themselves."""
        operations = sum(count / RATES[kind] for kind, count in self.operations.items())
        return {"launches": LAUNCH * self.launches, "bytes": self.bytes / BANDWIDTH, "operations": operations}

    @property
    def time(self) -> float:
        """Seconds by count: 3 us a launch, and the longer of what the bytes and the operations take."""
        return self.parts["launches"] + max(self.parts["bytes"], self.parts["operations"])

    @property
    def bound(self) -> str:
        """What most of that time goes to."""
        return max(self.parts, key=lambda name: self.parts[name])


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _waits(function: Any, args: Any) -> bool:
    name = function.overloadpacket.__name__
    if name not in ("index", "index_put", "index_put_"):
        return name in WAITING
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _is_out(function: Any, index: int) -> bool:
    writes = [a for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return bool(writes[min(index, len(writes) - 1)].is_out)


def _pretended(function: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
    """The operator's result without its numbers; a view is made as it is."""
    if _waits(function, args):
        raise RuntimeError(f"{function} waits for the device")
    if function.is_view or function.overloadpacket.__name__ in UNINITIALISED:
        return function(*args, **kwargs)
    if written:
        return written[0] if len(function._schema.returns) == 1 else tuple(written)

    def shape(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("meta")
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

    if any(argument.name == "device" for argument in function._schema.arguments) and not any(
        isinstance(x, Tensor) for x in tree_leaves(args)
    ):
        kwargs = kwargs | {"device": "meta"}
    result = function(*tree_map(shape, args), **tree_map(shape, kwargs))
    return tree_map(
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x, result
    )


@contextmanager
def on_the_kernels_path() -> Iterator[None]:
    """The kernels by force, called as if no mode counted; nor are labels looked at, which lie on a device elsewhere."""
    with flatcore.backend("native"), emulation.emulated(), mock.patch.object(direct, "_dispatch_modes", lambda: 0):
        patches = [
            mock.patch.object(module, "refuse_bad_labels", lambda *arguments: None)
            for name, module in list(sys.modules.items())
            if name.startswith("flatcore._engine.ops.") and hasattr(module, "refuse_bad_labels")
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


@contextmanager
def _priced(counter: Counter) -> Iterator[None]:
    """Every call of a kernel adds its bytes and operations; a 16-bit product is the one launch of a device."""
    core = emulation.module()

    def product(run: Callable[..., None], adds: bool) -> Callable[..., None]:
        def counted(out: Tensor, a: Tensor, b: Tensor) -> None:
            counter.product(out, a, b, adds)
            if not counter.dry:
                with _disable_current_modes():
                    run(out, a, b)

        return counted

    names = {name: getattr(core, name) for name in dir(core) if not name.startswith("__")}
    priced = SimpleNamespace(**names | kernel_costs.priced(core, counter.kernel))
    was, core.devices.dry = core.devices.dry, counter.dry
    try:
        with (
            mock.patch.object(native_cuda, "cuda_module", lambda: priced),
            mock.patch.object(chunked_cuda, "half_product", product(chunked_cuda.half_product, False)),
            mock.patch.object(chunked_cuda, "add_half_product", product(chunked_cuda.add_half_product, True)),
        ):
            yield
    finally:
        core.devices.dry = was


def counted(call: Callable[[], Any], *, dry: bool = False, counter: Counter | None = None) -> tuple[Any, Counter]:
    """The result of a call on the kernels' path, and what it asked for."""
    counter = counter or Counter(dry=dry)
    with _priced(counter), counter:
        result = call()
    return result, counter


def counted_eagerly(call: Callable[[], Any]) -> Counter:
    """What plain PyTorch asks for, of tensors on the meta device."""
    with Counter() as counter:
        call()
    return counter
