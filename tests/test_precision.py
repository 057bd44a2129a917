"""The process's precision switches: no result follows them, nothing raises, and all stand afterwards as they stood."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from processes import forks
from torch import Tensor

import flatcore
from flatcore._engine import paths, tiles
from flatcore._engine.precision import full_precision, products_are_exact

backends = torch.backends
_NEW = hasattr(backends.cuda.matmul, "fp32_precision")
_KEYS = [("generic", "all"), *itertools.product(("cuda", "mkldnn"), ("all", "conv", "rnn", "matmul"))]
_READERS: dict[str, Callable[[], Any]] = {
    "older": torch.get_float32_matmul_precision,
    "cuda.allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
    "cudnn.allow_tf32": lambda: backends.cudnn.allow_tf32,
    "fp16_accumulation": lambda: getattr(backends.cuda.matmul, "allow_fp16_accumulation", None),
    "fp16_reduction": lambda: backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    "bf16_reduction": lambda: backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
}
if _NEW:
    _READERS |= {
        "all": lambda: backends.fp32_precision,
        "cuda.matmul": lambda: backends.cuda.matmul.fp32_precision,
        "cudnn": lambda: backends.cudnn.fp32_precision,
        "cudnn.conv": lambda: backends.cudnn.conv.fp32_precision,
        "cudnn.rnn": lambda: backends.cudnn.rnn.fp32_precision,
        "mkldnn": lambda: backends.mkldnn.fp32_precision,
        "mkldnn.matmul": lambda: backends.mkldnn.matmul.fp32_precision,
        "mkldnn.conv": lambda: backends.mkldnn.conv.fp32_precision,
        "mkldnn.rnn": lambda: backends.mkldnn.rnn.fp32_precision,
    }


def _readings() -> dict[str, Any]:
    """Every switch as its documented name reads it; torch's own error where older and newer names disagree."""
    found = {}
    for name, read in _READERS.items():
        try:
            found[name] = read()
        except RuntimeError as error:
            found[name] = str(error)
    return found


def _set(path: str, value: Any) -> Callable[[], None]:
    *owners, name = path.split(".")

    def run() -> None:
        owner = backends
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)

    return run


def _older(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def _several(*steps: Callable[[], None]) -> Callable[[], None]:
    return lambda: [step() for step in steps] and None


def _backend_alone() -> None:
    """``torch.backends.mkldnn.fp32_precision = "bf16"`` sets the process's; ``flags(fp32_precision=...)`` this."""
    torch._C._set_fp32_precision_setter("mkldnn", "all", "bf16")


SWITCHES: dict[str, Callable[[], None]] = {
    "high": _older("high"),
    "medium": _older("medium"),
    "highest": _older("highest"),
    "cuda.allow_tf32": _set("cuda.matmul.allow_tf32", True),
    "medium, then cuda.allow_tf32 off": _several(_older("medium"), _set("cuda.matmul.allow_tf32", False)),
    "cudnn.allow_tf32 off": _set("cudnn.allow_tf32", False),
    "fp16 and bf16 reductions": _several(
        _set("cuda.matmul.allow_fp16_reduced_precision_reduction", False),
        _set("cuda.matmul.allow_bf16_reduced_precision_reduction", False),
    ),
}
if hasattr(backends.cuda.matmul, "allow_fp16_accumulation"):
    SWITCHES["fp16 accumulation"] = _set("cuda.matmul.allow_fp16_accumulation", True)
if _NEW:
    SWITCHES |= {
        f"{where} {value}": _set(f"{where}.fp32_precision" if where else "fp32_precision", value)
        for where, values in {
            "": ("tf32", "bf16", "ieee"),
            "mkldnn": ("tf32", "bf16", "ieee"),
            "mkldnn.matmul": ("tf32", "bf16", "ieee"),
            "cuda.matmul": ("tf32", "ieee"),
            "cudnn": ("tf32", "ieee"),
            "cudnn.conv": ("tf32", "ieee"),
        }.items()
        for value in values
    }
    SWITCHES |= {
        "matmul as above it": _several(_set("fp32_precision", "bf16"), _set("mkldnn.matmul.fp32_precision", "bf16")),
        "backend and process alike": _several(_set("fp32_precision", "bf16"), _backend_alone),
        "backend alone": _backend_alone,
        "cuda as above it": _several(_set("fp32_precision", "tf32"), _set("cuda.matmul.fp32_precision", "tf32")),
        "exact below": _several(_set("fp32_precision", "bf16"), _set("mkldnn.matmul.fp32_precision", "ieee")),
        "older, then newer": _several(_older("medium"), _set("mkldnn.matmul.fp32_precision", "tf32")),
        "newer, then older": _several(_set("fp32_precision", "bf16"), _older("high")),
        "medium, then exact on the CPU": _several(_older("medium"), _set("mkldnn.matmul.fp32_precision", "ieee")),
    }


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    kept = {key: torch._C._get_fp32_precision_getter(*key) for key in _KEYS} if _NEW else {}
    others = _readings()
    yield
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = others["cudnn.allow_tf32"]
    backends.cuda.matmul.allow_fp16_reduced_precision_reduction = others["fp16_reduction"]
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = others["bf16_reduction"]
    if others["fp16_accumulation"] is not None:
        backends.cuda.matmul.allow_fp16_accumulation = others["fp16_accumulation"]
    for key, value in kept.items():
        torch._C._set_fp32_precision_setter(*key, value)
    assert _readings() == others


@pytest.fixture(autouse=True)
def _chunked() -> Iterator[None]:
    with flatcore.backend("native"), paths.forced(path="chunked"):
        yield


def _head(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features, weight = (torch.randn(n, 256, generator=generator) for n in (64, 300))
    return features, weight, torch.randint(0, 300, (64,), generator=generator)


def _measures(features: Tensor, weight: Tensor, target: Tensor, between: Callable[[], None]) -> list[Tensor]:
    """Every kind of product: values and gradients, with ``between`` called between forward and backward.

    The path is one for all threads, so it is forced around them (``_chunked``).
    """
    results: list[Tensor] = [*flatcore.head_metrics(features, weight, target)]
    for function in (
        flatcore.hessian_trace,
        lambda *given: flatcore.relative_flatness(*given, measure="layerwise"),
        lambda *given: flatcore.relative_flatness(*given, measure="neuronwise"),
        lambda *given: flatcore.feature_gradient_norms(*given, reduction="mean"),
    ):
        leaves = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = function(*leaves, target)
        between()
        results += [value.detach(), *torch.autograd.grad(value, leaves)]
    assert flatcore.show_config()["last_path"] == "chunked"
    return results


def _nothing() -> None:
    pass


def _assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def wanted() -> list[Tensor]:
    with flatcore.backend("native"), paths.forced(path="chunked"):
        return _measures(*_head(), _nothing)


def test_every_product_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this processor multiplies in float32 whatever the switches say."""
    seen = []
    for name in ("multiply", "add"):
        function = getattr(tiles.Rows, name)
        monkeypatch.setattr(
            tiles.Rows,
            name,
            lambda *given, run=function, **options: (seen.append(products_are_exact("cpu")), run(*given, **options)),
        )
    torch.set_float32_matmul_precision("medium")
    _measures(*_head(), _nothing)
    assert len(seen) > 10 and all(seen)


@pytest.mark.parametrize("moment", ("before", "between"))
@pytest.mark.parametrize("switch", SWITCHES)
def test_no_result_follows_a_switch(switch: str, moment: str, wanted: list[Tensor], one_thread: None) -> None:
    if moment == "before":
        SWITCHES[switch]()
        before = _readings()
        got = _measures(*_head(), _nothing)
        assert _readings() == before
    else:
        got = _measures(*_head(), SWITCHES[switch])
    _assert_same_bits(got, wanted)


@pytest.mark.parametrize("switch", SWITCHES)
def test_no_result_follows_a_switch_in_eight_threads(switch: str, wanted: list[Tensor], one_thread: None) -> None:
    SWITCHES[switch]()
    before = _readings()
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: _measures(*_head(), _nothing), range(16)):
            _assert_same_bits(got, wanted)
    assert _readings() == before


def test_eight_threads_that_each_set_their_own(wanted: list[Tensor], one_thread: None) -> None:
    """The last setting stands, whichever it is: none is undone, and nobody computes with another's."""
    names = list(SWITCHES)

    def work(index: int) -> list[Tensor]:
        with full_precision():
            pass
        SWITCHES[names[index % len(names)]]()
        return [torch.tensor(products_are_exact("cpu"))]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    SWITCHES["medium"]()
    before = _readings()
    _assert_same_bits(_measures(*_head(), _nothing), wanted)
    assert _readings() == before


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("switch", SWITCHES)
def test_products_are_exact_inside_and_all_is_as_before_afterwards(switch: str, device: str) -> None:
    SWITCHES[switch]()
    before = _readings()
    with full_precision(device):
        assert products_are_exact(device)
        inside = _readings()
        with full_precision("cpu"), full_precision(device):
            assert products_are_exact("cpu") and products_are_exact(device)
    assert _readings() == before
    # other threads may read the switches meanwhile: a name that could be read can be read
    for name in ("older", "cuda.allow_tf32"):
        if "mix of the legacy" not in str(before[name]) and switch != "medium, then exact on the CPU":
            assert "mix of the legacy" not in str(inside[name])
    if device == "cuda":
        assert not inside["fp16_accumulation"]


@pytest.mark.skipif(not _NEW, reason="this torch has the older names alone")
@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("switch", [name for name in SWITCHES if name not in ("high", "medium", "highest")])
def test_settings_that_were_inherited_still_are(switch: str, device: str) -> None:
    def after() -> list[dict[str, Any]]:
        found = []
        for value in ("ieee", "tf32", "none", "bf16"):
            backends.fp32_precision = value
            found.append(_readings())
        for value in ("ieee", "bf16", "none"):
            torch._C._set_fp32_precision_setter("mkldnn", "all", value)
            found.append(_readings())
        for value in ("ieee", "tf32", "none"):
            backends.cudnn.fp32_precision = value
            found.append(_readings())
        return found

    start = {key: torch._C._get_fp32_precision_getter(*key) for key in _KEYS}
    SWITCHES[switch]()
    want = after()
    torch.set_float32_matmul_precision("highest")
    for key, value in start.items():
        torch._C._set_fp32_precision_setter(*key, value)
    SWITCHES[switch]()
    with full_precision(device):
        pass
    assert after() == want


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_a_switch_moved_meanwhile_keeps_its_new_value(device: str) -> None:
    torch.set_float32_matmul_precision("medium")
    with full_precision(device):
        torch.set_float32_matmul_precision("high")
        new = _readings()
        with full_precision(device):  # another thread that begins now
            assert products_are_exact(device)
    assert _readings() == new


def test_products_are_exact_says_which_device() -> None:
    assert products_are_exact("cpu") and products_are_exact("cuda")
    torch.set_float32_matmul_precision("medium")
    assert not products_are_exact("cpu") and not products_are_exact("cuda")
    if _NEW:
        backends.mkldnn.matmul.fp32_precision = "ieee"
        assert products_are_exact("cpu") and not products_are_exact("cuda")
        backends.cuda.matmul.fp32_precision = "ieee"
        assert products_are_exact("cuda")
        backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        assert not products_are_exact("cpu") and not products_are_exact("cuda")


def test_the_environments_switch() -> None:
    """Set where torch starts: the older call says "high" although nobody called it."""
    code = (
        "import torch\n"
        "from flatcore._engine.precision import full_precision, products_are_exact\n"
        "assert torch.backends.cuda.matmul.allow_tf32 and not products_are_exact('cuda')\n"
        "with full_precision('cuda'):\n"
        "    assert products_are_exact('cuda') and not torch.backends.cuda.matmul.allow_tf32\n"
        "assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == 'high'\n"
    )
    environment = dict(os.environ, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@forks
def test_a_child_forked_in_the_middle_of_another_threads_call() -> None:
    code = (
        "import os, threading, torch\n"
        "from flatcore._engine import precision\n"
        "torch.set_float32_matmul_precision('medium')\n"
        "inside, done = threading.Event(), threading.Event()\n"
        "def other():\n"
        "    with precision.full_precision():\n"
        "        inside.set(); done.wait()\n"
        "thread = threading.Thread(target=other); thread.start(); inside.wait()\n"
        "with precision._lock:\n"
        "    child = os.fork()\n"
        "if child == 0:\n"
        "    assert not precision.products_are_exact('cpu')\n"
        "    with precision.full_precision():\n"
        "        assert precision.products_are_exact('cpu')\n"
        "    os._exit(0 if not precision.products_are_exact('cpu') else 1)\n"
        "status = os.waitpid(child, 0)[1]; done.set(); thread.join()\n"
        "assert status == 0, status\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
