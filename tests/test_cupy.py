"""CuPy's arrays: over a stand-in on the CPU the protocol, on a device CuPy itself.

A device's array says how its memory may be read when it is told in which stream; what comes back is CuPy's again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import flatcore
from flatcore._arguments.arrays import as_tensor
from flatcore._engine import device as engine_device

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------------------------- a stand-in on the CPU
class Device:
    """CuPy's device, which it makes current; its streams are each device's own."""

    def __init__(self, id: int, entered: list[Any] | None = None):
        self.id, self.entered = id, [] if entered is None else entered

    def __enter__(self) -> None:
        self.entered.append(self.id)

    def __exit__(self, *exception: object) -> None:
        self.entered.append("left")


class DeviceArray:
    """A device's array as far as flatcore and torch look at it: DLPack, a device and the stream that is asked for."""

    def __init__(self, array: np.ndarray | Tensor, device: int = 0, versioned: bool = True):
        self.array, self.versioned, self.asked = array, versioned, []
        self.device = Device(device)

    def __dlpack__(self, *, stream: int, **options: Any) -> Any:
        if not self.versioned and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.asked.append(stream)
        return self.array.__dlpack__(**{name: value for name, value in options.items() if name == "max_version"})

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id


DeviceArray.__module__ = "cupy"


class Stream:
    """A stream of a device, which notes for what it waits."""

    def __init__(self, streams: Streams, address: int, device: int):
        self.streams, self.cuda_stream, self.device = streams, address, device

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device
        self.streams.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


class Streams:
    """torch's streams and CuPy's, without a device: which is current, which waits, and in which order that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, address: int, ours: int = 0):
        self.current = ours  # torch's
        self.captured: int | None = None
        self.log: list[str] = []
        self.cupy = mock.MagicMock()
        self.cupy.cuda.get_current_stream.return_value.ptr = address
        self.cupy.from_dlpack = lambda tensor: ("cupy", tensor, self.current)
        monkeypatch.setitem(sys.modules, "cupy", self.cupy)
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: Stream(self, address, device))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream(self, 0, device))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, self.current, _index(device)))
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current == self.captured)

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"in {stream.cuda_stream} of {stream.device}")
        before, self.current = self.current, stream.cuda_stream
        try:
            yield
        finally:
            self.current = before
            self.log.append("left")


def _index(device: Any) -> int:
    return device if isinstance(device, int) else device.index or 0


@pytest.mark.parametrize("address", (0, 1234))
def test_arrays_are_read_worked_on_and_given_back_in_cupys_stream(
    address: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch, address, ours=77)
    for give in (lambda x: flatcore.row_norms(x, ord=1), lambda x: flatcore.row_norms(x=x, ord=1)):
        streams.log.clear()
        x = DeviceArray(torch.ones(2, 5), device=3)
        kind, norms, handed_back_in = give(x)
        assert kind == "cupy" and norms.tolist() == [5, 5]
        before, after = f"{address} waits for 77", f"77 waits for {address}"
        assert streams.log == [f"in {address} of 3", before, after, "left"]
        assert x.asked == [address or 1]  # 1 is DLPack's name of the default stream
        assert handed_back_in == address
        assert x.device.entered == [3, "left"]  # CuPy's current stream is the one of the array's device


def _metric() -> Any:
    return flatcore.metrics.HessianTrace().update


def _probe() -> Any:
    model = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(model.weight)
    probe = flatcore.Probe(model).attach()
    model(torch.ones(2, 3))
    return lambda features, weight: probe.hessian_trace(linear_weight=weight)


DOORS: dict[str, Callable[[], Any]] = {
    "hessian_trace": lambda: flatcore.hessian_trace, "head_metrics": lambda: flatcore.head_metrics,
    "keywords": lambda: lambda x, w: flatcore.hessian_trace(linear_weight=w, features=x),
    "metrics": _metric, "Probe": _probe,
    "robustness": lambda: lambda x, w: flatcore.robustness.loss_change_bound(x, w, torch.tensor([0, 0]), 0.1, lipschitz=1.0),
}  # fmt: skip
"""Everything that takes arrays: (features, linear_weight)."""


@pytest.mark.parametrize(
    ("door", "kind"), [(door, "weight") for door in DOORS]
    + [(door, kind) for door in DOORS if door != "Probe" for kind in ("both", "features")],
)  # fmt: skip
def test_torchs_stream_and_cupys_wait_for_each_other(door: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a call reads or adds to of torch's was written in torch's stream, and will be read there."""
    call = DOORS[door]()
    x, w = torch.tensor([[2.0, 0.0, 0.0], [3.0, 1.0, 0.0]]), torch.eye(3)
    streams = Streams(monkeypatch, 1234, ours=77)
    features, weight = x if kind == "weight" else DeviceArray(x), w if kind == "features" else DeviceArray(w)
    place = engine_device.place
    monkeypatch.setattr(
        engine_device, "place", lambda x: (streams.log.append(f"work in {streams.current}"), place(x))[1]
    )
    call(features, weight)
    begin, end = ["in 1234 of 0", "1234 waits for 77"], ["77 waits for 1234", "left"]
    assert streams.log[:2] == begin and streams.log[-2:] == end
    assert set(streams.log[2:-2]) == {"work in 1234"}
    for array in (features, weight):
        assert not isinstance(array, DeviceArray) or set(array.asked) == {1234}
    assert streams.current == 77


@pytest.mark.parametrize("door", [name for name in DOORS if name != "Probe"])
def test_they_wait_after_an_error_too(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = DOORS[door]()
    streams = Streams(monkeypatch, 1234, ours=77)
    with pytest.raises(ValueError, match="features must have shape"):
        call(DeviceArray(torch.ones(2, 5)), DeviceArray(torch.eye(3)))
    assert streams.log == ["in 1234 of 0", "1234 waits for 77", "77 waits for 1234", "left"] and streams.current == 77


def test_the_values_of_a_record_are_formed_in_cupys_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch, 1234, ours=77)
    log = DeviceArray(torch.zeros(2))
    kind, value, handed_back_in = flatcore.HeadMetrics(*[log] * len(flatcore.HeadMetrics._fields)).hessian_trace
    assert (kind, value.tolist(), handed_back_in, log.asked) == ("cupy", [1, 1], 1234, [1234])


def test_one_stream_of_both_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, 1234, ours=1234)
    flatcore.row_norms(DeviceArray(torch.ones(2, 5)))
    assert streams.log == []


def test_a_graph_that_cupy_captures_waits_for_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, 1234, ours=77)
    streams.captured = 1234
    flatcore.row_norms(DeviceArray(torch.ones(2, 5)))
    assert streams.log == ["in 1234 of 0", "left"]


def test_torchs_own_arrays_stay_in_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, 1234, ours=77)
    assert flatcore.hessian_trace(torch.ones(2, 3), torch.eye(3)) == 2 and streams.log == []


LAYOUTS = {
    "plain": lambda x: x,
    "transposed": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, axis=0)[::2],
    "broadcast": lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (0, x.strides[1])),
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "every other column from the end": lambda x: np.repeat(x[:, ::-1], 2, axis=1)[:, ::-2],
    "reversed in every dimension": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "no rows, reversed": lambda x: x[:0][::-1],
}


def _read_all_layouts() -> int:
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        Streams(patch, 0)
        for name, layout in LAYOUTS.items():
            for dtype in (np.float16, np.float32, np.float64, np.int64):
                for versioned in (True, False):
                    array = layout(np.arange(12).reshape(4, 3).astype(dtype))
                    got = as_tensor(DeviceArray(array, versioned=versioned), "features")
                    assert np.array_equal(got.numpy(), array), (name, dtype, versioned)
                    assert got.data_ptr() % got.itemsize == 0
                    count += 1
    return count


def test_every_layout_is_read_in_a_process_of_its_own() -> None:
    """At a negative stride torch ends the process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import test_cupy; print(test_cupy._read_all_layouts())"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    assert int(done.stdout) == len(LAYOUTS) * 4 * 2


def test_memory_that_is_not_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch, 0)
    crooked = torch.frombuffer(bytearray(4 * 12 + 1), dtype=torch.float32, offset=1, count=12).view(3, 4)
    crooked.copy_(torch.arange(12.0).view(3, 4))
    assert crooked.data_ptr() % 4 == 1
    got = as_tensor(DeviceArray(crooked), "features")
    assert got.data_ptr() % 4 == 0 and torch.equal(got, torch.arange(12.0).view(3, 4))


def test_the_array_lives_as_long_as_the_tensor_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch, 0)
    array = np.ones((3, 4))
    count = sys.getrefcount(array)
    tensor = as_tensor(DeviceArray(array), "features")
    assert sys.getrefcount(array) == count + 1
    del tensor
    assert sys.getrefcount(array) == count


# ----------------------------------------------------------------------------------------------------- CuPy on a device
@pytest.fixture
def cupy(request: pytest.FixtureRequest) -> ModuleType:
    """CuPy with a device; a failure without one where a run requires CUDA."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
        why = "CuPy finds no device"
    except Exception as error:  # not installed, or no driver: CuPy has errors of its own
        count, why = 0, f"{type(error).__name__}: {error}"
    if not count:
        way = "pip install cupy-cuda13x (or cupy-cuda12x), and a GPU"
        (pytest.fail if request.config.getoption("--require-cuda") else pytest.skip)(f"needs {way}; {why}")
    return cupy


def test_arrays_on_a_stream_of_their_own(cupy: Any) -> None:
    with cupy.cuda.Stream(non_blocking=True):
        x = cupy.random.standard_normal((4096, 4096), dtype=cupy.float32)
        for _ in range(50):
            x = x * 1
        got = flatcore.row_norms(x, ord=1)
        assert isinstance(got, cupy.ndarray)
        cupy.testing.assert_allclose(got, cupy.abs(x).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ("float16", "float32", "float64"))
def test_every_layout_gives_the_value_of_its_copy(cupy: Any, layout: str, dtype: str) -> None:
    r = np.random.default_rng(0)
    weight, target = r.normal(size=(5, 3)).astype(dtype), r.integers(0, 5, 4)
    features = r.normal(size=(4, 3)).astype(dtype)
    views: dict[str, Any] = {
        "transposed": lambda x: cupy.asfortranarray(x), "every other": lambda x: cupy.repeat(x, 2, axis=0)[::2],
        "broadcast": lambda x: cupy.broadcast_to(x[:1], x.shape), "reversed": lambda x: x[::-1].copy()[::-1],
        "every other column from the end": lambda x: cupy.repeat(x[:, ::-1], 2, axis=1)[:, ::-2],
        "reversed in every dimension": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
        "no rows, reversed": lambda x: x[:0][::-1], "plain": lambda x: x,
    }  # fmt: skip
    x = views[layout](cupy.asarray(features))
    y = cupy.asarray(target[: len(x)])
    got = flatcore.head_metrics(x, cupy.asarray(weight), y)
    want = flatcore.head_metrics(x.copy(), cupy.asarray(weight), y)
    for a, b in zip(got, want, strict=True):
        if a is not None:
            assert isinstance(a, cupy.ndarray)
            cupy.testing.assert_allclose(a, b, rtol=1e-6)


def test_memory_that_is_not_aligned_on_a_device(cupy: Any) -> None:
    memory = cupy.zeros(4 * 40 + 1, dtype=cupy.uint8)
    x = cupy.ndarray((4, 10), dtype=cupy.float32, memptr=memory.data + 1)
    memory[1:] = cupy.ones(40, dtype=cupy.float32).view(cupy.uint8)
    assert flatcore.row_norms(x, ord=1).get().tolist() == [10.0] * 4


def test_arrays_on_different_devices_are_refused_by_name(cupy: Any) -> None:
    with pytest.raises(ValueError, match="linear_weight"):
        flatcore.hessian_trace(cupy.ones((2, 3), dtype=cupy.float32), np.ones((2, 3), dtype=np.float32))


def test_without_cupy_nothing_imports_it() -> None:
    script = """
        import sys, numpy as np, torch, flatcore
        flatcore.row_norms(np.ones((2, 3))), flatcore.row_norms(torch.ones(2, 3))
        assert "cupy" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
