"""Every shape, stride, alignment and kind of array gives the values of the plain contiguous call's inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import BY_NAME, Case
from checks import LABELLED_LOGS, Problem, bits
from torch import Tensor

import flatcore
from flatcore._engine import chunked_cpu, paths, tiles
from flatcore._engine.backend import _core
from flatcore._engine.head import Head
from flatcore.reference import FIELDS

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

DTYPES = (torch.float32, torch.float64)
# one below, at and one above 4, 8, 16, 32 and 64
RAGGED = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def _case(n: int, d: int, c: int, *, bias: bool = False) -> Case:
    features = 3 * _randn(n, d, seed=n) / math.sqrt(max(d, 1))
    target = (torch.arange(n) * 7 % c).unsqueeze(1)
    return Case(f"{n}x{d}x{c}", features, _randn(c, d, seed=c), target, bias=_randn(c, seed=d) if bias else None)


# --------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", RAGGED)
def test_ragged_features(path: str, width: int, dtype: torch.dtype) -> None:
    Problem(_case(5, width, 6).at(dtype)).check_head_metrics()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", RAGGED)
def test_ragged_classes(path: str, classes: int, dtype: torch.dtype) -> None:
    Problem(_case(5, 6, classes, bias=True).at(dtype)).check_head_metrics()


@pytest.mark.parametrize("size", (15, 16, 17, 33, 65))
def test_ragged_features_and_classes(path: str, size: int) -> None:
    problem = Problem(_case(4, size, size + 1).at(torch.float32))
    problem.check_head_metrics()
    problem.check_views()


@pytest.mark.parametrize("rows", (*range(1, 18), 31, 32, 33, 65))
def test_ragged_rows(path: str, rows: int) -> None:
    Problem(_case(rows, 9, 5).at(torch.float32)).check_head_metrics()


def test_no_features(path: str) -> None:
    """D = 0: the bias alone decides, and nothing curves."""
    features, weight, bias = torch.empty(4, 0), torch.empty(3, 0), torch.tensor([0.5, 2.0, -1.0])
    metrics = flatcore.head_metrics(features, weight, torch.tensor([0, 1, 2, 0]), linear_bias=bias)
    for field in (
        "log_hessian_trace",
        "log_layerwise",
        "log_neuronwise",
        "log_feature_norm",
        "log_feature_gradient_norm",
    ):
        assert (getattr(metrics, field) == -math.inf).all(), field
    case = Case("no-features", features, weight, torch.tensor([[0], [1], [2], [0]]), bias=bias)
    problem = Problem(case)
    for field in ("loss", "confidence", "margin", "log_one_minus_confidence"):
        problem.check(field, getattr(metrics, field))


@pytest.mark.parametrize("given", (False, pytest.param(True, marks=pytest.mark.exhaustive)), ids=("features", "logits"))
@pytest.mark.parametrize("kind", (pytest.param("reference", marks=pytest.mark.exhaustive), "chunked"))
def test_a_vocabulary_of_200_000(kind: str, given: bool) -> None:
    """Rows of W and logits come from 50 different ones, so that the exact value counts instead of summing 200,000."""
    classes, n = 200_000, 3
    index = torch.randperm(classes, generator=torch.Generator().manual_seed(0)) % 50
    rows = _randn(50, 4, seed=3)
    features = torch.tensor([[0.5], [3.0], [40.0]], dtype=torch.float64) * _randn(1, 4, seed=4)
    logits = (features @ rows.T)[:, index] if given else None
    if given:
        logits[torch.arange(n), torch.tensor([17, 123_456, classes - 1])] += 30.0
    target = torch.tensor([[17], [123_456], [5]])
    case = Case("vocabulary", features, rows[index], target, logits=logits).at(torch.float32)
    with flatcore.backend("reference" if kind == "reference" else "native"):
        Problem(case).check_head_metrics()
    if kind == "chunked":
        assert flatcore.show_config()["last_path"] == "chunked"


@pytest.mark.crossed
@pytest.mark.parametrize("rows", (1, 7, 16))
@pytest.mark.parametrize("classes", (1, 3, 64))
@pytest.mark.parametrize("name", ("features-142", "logits-142", "features-and-bias-10", "wide-300-15", "wide-17-301"))
def test_many_blocks_and_tiles(path: str, name: str, classes: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows and a few classes at a time: the last block and the last tile are ragged, each starts at its own place."""
    case = BY_NAME[name].at(torch.float32)
    monkeypatch.setattr(tiles, "block_rows", lambda *_: rows)
    monkeypatch.setattr(tiles, "TILE_CLASSES", classes)
    monkeypatch.setattr(tiles, "_COPY_BYTES", 1)  # pieces of 64 columns
    problem = Problem(case)
    problem.check_head_metrics()
    problem.check_views()


# --------------------------------------------------------------------------------------------------- leading shapes
@pytest.mark.parametrize("leading", ((), (1,), (6,), (2, 3), (1, 2, 3), (0,), (2, 0, 3)))
@pytest.mark.parametrize("given", (False, True), ids=("features", "logits"))
def test_leading_dimensions_are_free(path: str, given: bool, leading: tuple[int, ...]) -> None:
    case = _case(math.prod(leading), 7, 5).at(torch.float32)
    logits = case.features @ case.weight.T if given else None
    flat = {"features": case.features, "target": case.targets.flatten(), "logits": logits}
    shaped = {
        "features": case.features.view(*leading, 7),
        "target": case.targets.view(leading),
        "logits": None if logits is None else logits.view(*leading, 5),
    }
    expected = flatcore.head_metrics(**flat, linear_weight=case.weight)
    got = flatcore.head_metrics(**shaped, linear_weight=case.weight)
    for field, value in bits(got).items():
        assert value.shape == leading, field
        assert torch.equal(value.flatten(), getattr(expected, field)), field
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        value = function(**shaped, linear_weight=case.weight, reduction="none")
        assert value.shape == leading
        assert torch.equal(value.flatten(), function(**flat, linear_weight=case.weight, reduction="none"))
        assert function(**shaped, linear_weight=case.weight, reduction="sum").shape == ()
    soft = torch.ones(*leading, 5)
    assert flatcore.hessian_trace(shaped["features"], case.weight, soft, reduction="none").shape == leading


# ------------------------------------------------------------------------------------------------ strides, alignment
def _offset(x: Tensor, elements: int) -> Tensor:
    """The same values in a storage that starts some elements before them."""
    storage = torch.full((x.numel() + elements,), math.nan, dtype=x.dtype)
    storage[elements:] = x.flatten()
    return storage[elements:].view(x.shape)


def _wide_rows(x: Tensor) -> Tensor:
    """Rows that are 3 elements apart from each other, NaN between them."""
    storage = torch.full((x.shape[0], x.shape[1] + 3), math.nan, dtype=x.dtype)
    storage[:, 1:-2] = x
    return storage[:, 1:-2]


def _every_other_column(x: Tensor) -> Tensor:
    storage = torch.full((x.shape[0], 2 * x.shape[1]), math.nan, dtype=x.dtype)
    storage[:, ::2] = x
    return storage[:, ::2]


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


_LAYOUTS = {
    "offset by 1": lambda x: _offset(x, 1),
    "offset by 3": lambda x: _offset(x, 3),
    "wide rows": _wide_rows,
    "every other column": _every_other_column,
    "transposed": _transposed,
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("argument", ("features", "weight", "logits"))
def test_layouts(path: str, argument: str, layout: str, dtype: torch.dtype) -> None:
    case = BY_NAME["logits-10" if argument == "logits" else "features-and-bias-10"].at(dtype)
    case = replace(case, targets=case.targets[:, :1], **{argument: _LAYOUTS[layout](getattr(case, argument))})
    problem = Problem(case)
    arguments = case.arguments()  # repeat_interleave makes its inputs contiguous: pass them as they are
    arguments |= {"features": case.features, "logits": case.logits}
    metrics = flatcore.head_metrics(**arguments)
    for field in ("log_hessian_trace", "log_layerwise", "log_neuronwise", "log_feature_norm", *LABELLED_LOGS, "loss"):
        problem.check(field, getattr(metrics, field))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_with_strides(path: str, dtype: torch.dtype) -> None:
    """Bias, labels and class weights that are columns of something larger."""
    case = BY_NAME["features-and-bias-10"].at(dtype)
    bias = torch.stack([case.bias, torch.full_like(case.bias, math.nan)], dim=1)[:, 0]
    target = case.targets[:, 0]
    assert bias.stride() == (2,) and target.stride() != (1,)
    problem = Problem(replace(case, bias=bias, targets=target.unsqueeze(1)))
    metrics = flatcore.head_metrics(case.features, case.weight, target, linear_bias=bias)
    for field in ("log_neuronwise", "loss", *LABELLED_LOGS):
        problem.check(field, getattr(metrics, field))
    weight = torch.rand(10, 3, dtype=dtype)[:, 1]
    got = flatcore.hessian_trace(case.features, case.weight, target, linear_bias=bias, weight=weight)
    s = weight[target].double().tolist()
    problem.check_mean("hessian_trace", got, s, math.fsum(s))


@pytest.mark.parametrize("argument", ("features", "linear_weight", "logits"))
def test_expanded_inputs(path: str, argument: str) -> None:
    """Rows of stride 0."""
    case = _case(6, 7, 5).at(torch.float32)
    logits = 2 * _randn(6, 5, seed=9).float()
    values = {"features": case.features, "linear_weight": case.weight, "logits": logits}
    values[argument] = values[argument][:1].expand_as(values[argument])
    problem = Problem(
        Case("expanded", values["features"], values["linear_weight"], case.targets, logits=values["logits"])
    )
    metrics = flatcore.head_metrics(**values, target=case.targets.flatten())
    for field in ("log_hessian_trace", "log_layerwise", "log_neuronwise", "loss", *LABELLED_LOGS):
        problem.check(field, getattr(metrics, field))


@pytest.mark.parametrize("argument", ("features", "weight", "logits"))
def test_rows_beyond_32_bits(path: str, argument: str) -> None:
    """Rows 2^31 elements apart (only the touched pages of the 4 GiB exist): offsets are 64-bit."""
    case = _case(2, 5, 2).at(torch.float16)
    case = replace(case, logits=_randn(2, 2, seed=5).half() if argument == "logits" else None)
    values = getattr(case, argument)
    step = 2**31 + 64
    far = torch.empty(step + 64, dtype=torch.float16).as_strided(values.shape, (step, 1))
    far.copy_(values)
    problem = Problem(case)
    arguments = {"features": case.features, "linear_weight": case.weight, "logits": case.logits}
    arguments["linear_weight" if argument == "weight" else argument] = far
    metrics = flatcore.head_metrics(**arguments, target=case.targets.flatten())
    for field in ("log_hessian_trace", "log_layerwise", "log_neuronwise", "log_feature_norm", "loss", *LABELLED_LOGS):
        problem.check(field, getattr(metrics, field))


# ------------------------------------------------------------------------------------------------------------- NumPy
def _misaligned(x: np.ndarray) -> np.ndarray:
    raw = np.zeros(x.nbytes + 1, dtype=np.uint8)
    out = np.frombuffer(raw.data, dtype=x.dtype, offset=1, count=x.size).reshape(x.shape)
    out[...] = x
    assert not out.flags.aligned
    return out


def _read_only(x: np.ndarray) -> np.ndarray:
    out = x.copy()
    out.flags.writeable = False
    return out


def _between_fields(x: np.ndarray) -> np.ndarray:
    """A field of a structured array: its strides are no multiple of its item size."""
    table = np.zeros(x.shape, dtype=[("flag", np.uint8), ("value", x.dtype)])
    table["value"] = x
    return table["value"]


_ARRAYS = {
    "plain": lambda x: x,
    "rows reversed": lambda x: x[::-1].copy()[::-1],
    "columns reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "read-only": _read_only,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "misaligned": _misaligned,
    "a field": _between_fields,
    "Fortran order": lambda x: np.asfortranarray(x),
    "broadcast": lambda x: np.broadcast_to(x, x.shape),
}


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kind", _ARRAYS)
def test_numpy_arrays(path: str, kind: str, dtype: torch.dtype) -> None:
    case = BY_NAME["features-and-bias-10"].at(dtype)
    case = replace(case, targets=case.targets[:, :1])
    make = _ARRAYS[kind]
    arrays = {
        "features": make(case.features.numpy()),
        "linear_weight": make(case.weight.numpy()),
        "target": make(case.targets.flatten().numpy()),
        "linear_bias": make(case.bias.numpy()),
    }
    metrics = flatcore.head_metrics(**arrays)
    problem = Problem(case)
    assert all(isinstance(value, np.ndarray) for value in metrics)
    assert metrics.prediction.dtype == np.int64
    for field in ("log_hessian_trace", "log_layerwise", "log_neuronwise", "loss", *LABELLED_LOGS, "neuronwise"):
        value = getattr(metrics, field)
        assert isinstance(value, np.ndarray), field
        problem.check(field, torch.from_numpy(value))
    mean = flatcore.hessian_trace(**arrays)
    assert isinstance(mean, np.ndarray) and mean.shape == ()
    n = float(case.targets.numel())
    problem.check_mean("hessian_trace", torch.from_numpy(mean), [1.0] * int(n), n)


def test_tensor_features_with_numpy_head(path: str) -> None:
    """The result is of the features' kind."""
    case = _case(4, 7, 5).at(torch.float32)
    got = flatcore.hessian_trace(case.features, case.weight.numpy(), case.targets.flatten().numpy(), reduction="none")
    assert isinstance(got, Tensor)
    Problem(case).check("hessian_trace", got)
    got = flatcore.hessian_trace(case.features.numpy(), case.weight, case.targets.flatten(), reduction="none")
    assert isinstance(got, np.ndarray)
    Problem(case).check("hessian_trace", torch.from_numpy(got))


class _Exporter:
    """Some library's array: nothing but DLPack."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> object:
        return self._tensor.__dlpack_device__()


def test_a_head_through_dlpack(path: str) -> None:
    case = _case(4, 7, 5).at(torch.float32)
    got = flatcore.hessian_trace(case.features, _Exporter(case.weight), reduction="none")
    Problem(case).check("hessian_trace", got)


# --------------------------------------------------------------------------------------------------- batch invariance
_INVARIANT = {
    "hessian_trace": {},
    "relative_flatness": {"measure": "neuronwise"},
    "feature_gradient_norms": {"ord": 1},
}


@pytest.mark.crossed
@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("classes", (3, 300, 2500))
@pytest.mark.parametrize("kind", ("fused", "chunked"))
def test_a_row_does_not_depend_on_how_many_come_with_it(
    kind: str, classes: int, dtype: torch.dtype, threads: int
) -> None:
    """Bit for bit. Promised where the head is small; on the tiled path as far as the library's products do not depend on it.

    Formula, tiles and path come from C, D and the dtypes, and the library is given multiples of 16 rows. Up to 16 rows of a
    large head take products of our own, whose order of sums is another than the library's: promised among them.
    """
    if kind == "fused" and classes > 300:
        classes = 100
    features, weight = _randn(2100, 48, seed=1).to(dtype), _randn(classes, 48, seed=2).to(dtype)
    weight[classes // 2 :: 3] = weight[0]  # the order of the classes is another one then
    target = torch.arange(2100) % classes
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with flatcore.backend("native"), paths.forced(kind):
            for name, options in _INVARIANT.items():
                function = getattr(flatcore, name)
                whole = function(features, weight, target, reduction="none", log=True, **options)
                few = function(features[:16], weight, target[:16], reduction="none", log=True, **options)
                if kind == "fused":
                    assert torch.equal(few, whole[:16]), name
                for part in (slice(0, 1), slice(2, 9), slice(1, 16)):
                    some = function(features[part], weight, target[part], reduction="none", log=True, **options)
                    assert torch.equal(some, few[part]), (name, part)
                for part in (slice(0, 17), slice(0, 19), slice(700, 1029), slice(1, 2099)):
                    some = function(features[part], weight, target[part], reduction="none", log=True, **options)
                    assert torch.equal(some, whole[part]), (name, part)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", (1, 3, 16))
@pytest.mark.parametrize("width", (1, 47, 1100))
@pytest.mark.parametrize("kind", ("dense", "centered", "bfloat16", "columns"))
def test_few_rows_of_a_large_head(kind: str, width: int, rows: int) -> None:
    """The products of our own: every remainder of rows, classes and columns, a center, W as it stands, and W by columns."""
    x, w = _randn(rows, width, seed=1), _randn(2100, width, seed=2) + (5.0 if kind == "centered" else 0.0)
    x, w = x.float(), w.bfloat16() if kind == "bfloat16" else w.float()
    if kind == "columns":
        w = w.T.contiguous().T
        x = torch.cat([x, x], dim=1)[:, ::2][:, :width]
    target = torch.arange(rows) * 131
    for function, options in (
        (flatcore.hessian_trace, {}),
        (flatcore.relative_flatness, {"measure": "neuronwise"}),
        (flatcore.feature_gradient_norms, {"target": target}),
    ):
        with flatcore.backend("native"):
            got = function(x, w, reduction="none", log=True, **options)
        with flatcore.backend("reference"):
            truth = function(x.double(), w.double(), reduction="none", log=True, **options)
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("scale", (1e-39, 1e-41, 3e38))
def test_a_float_weight_at_the_ends_of_its_range_beside_float64_features(scale: float) -> None:
    """The power of two that brings it into range is float64's: no float for denormal rows (NaN once)."""
    x, z = _randn(5, 32, seed=1).double(), 3 * _randn(5, 600, seed=3).double()
    w = (_randn(600, 32, seed=2).clamp(-3, 3) / 3 * scale).float()
    values = []
    for name in ("native", "reference"):
        with flatcore.backend(name):
            values.append(flatcore.relative_flatness(x, w, logits=z, measure="neuronwise", reduction="none", log=True))
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", (0, 1, 5, 40))
def test_every_row_of_a_large_weight_has_its_projection(width: int) -> None:
    """Of no features too, where the bias alone tells rows apart: what the memory held before decided which were near."""
    bias = _randn(300, seed=2)
    head = Head(_randn(2, width), _randn(300, width, seed=1), bias, include_bias=True)
    problem = _core.HeadProblem.of(head, 1 << FIELDS.index("log_neuronwise"), 1, False, True)
    workspace, summary, squares = (torch.empty(n, dtype=torch.float64) for n in (600, 3, 300))
    center, keys = torch.empty(width + 1, dtype=torch.float64), torch.full((301 + width,), math.nan).double()
    _core.head_summary("", problem, *(x.data_ptr() for x in (workspace, summary, center, squares, keys)))
    vector = keys[300:]
    torch.testing.assert_close(keys[:300], head.linear_weight @ vector[:-1] + bias * vector[-1])


def test_the_path_of_a_head_is_chosen_from_its_classes_and_fields() -> None:
    x, w = _randn(20, 8, seed=1).float(), _randn(300, 8, seed=2).float()
    with flatcore.backend("native"):
        flatcore.hessian_trace(x, w)
        assert paths.last_path == "fused"  # no table of distances
        flatcore.relative_flatness(x, w, measure="neuronwise")
        assert paths.last_path == "chunked"


@pytest.mark.parametrize("measure", ("neuronwise", "gradient"))
def test_a_gradient_in_shorter_blocks_takes_the_values_over(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers take more of a row, so that its blocks are shorter; what is known of the rows is not found again."""
    x, w = _randn(100, 24, seed=1).float().requires_grad_(), _randn(300, 24, seed=2).float().requires_grad_()
    target = torch.arange(100) % 300

    def gradients() -> tuple[Tensor, ...]:
        if measure == "neuronwise":
            value = flatcore.relative_flatness(x, w, measure="neuronwise")
        else:
            value = flatcore.feature_gradient_norms(x, w, target, reduction="mean")
        return torch.autograd.grad(value, (x, w))

    found: list[int] = []
    statistics = chunked_cpu.Forward.statistics
    monkeypatch.setattr(
        chunked_cpu.Forward, "statistics", lambda self, *block: (found.append(block[1]), statistics(self, *block))[1]
    )
    with flatcore.backend("native"), paths.forced("chunked"):
        whole = gradients()
        assert found == [100]
        lengths = [112, 32]  # of the values' blocks, and the gradient's
        monkeypatch.setattr(tiles, "block_rows", lambda *sizes: lengths.pop(0))
        parts = gradients()
    assert found == [100, 100] and not lengths
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))
