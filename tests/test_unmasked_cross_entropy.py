"""unmasked_cross_entropy: the cross-entropy's value, and its exact direction at every confidence.

Letters: N samples, C classes; logits z (N, C), target y; q the softmax over the classes other than y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import flatcore
from flatcore._check.tolerance import Bound, assert_same, assert_within, cotangent_tolerance, tolerance
from flatcore._engine import ops

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

INF, NAN = math.inf, math.nan
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# one below, at and above the lanes of each target and four vectors of them, and beyond a task's 16,384 logits
WIDTHS = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1000, 16400)
GAPS = (0.0, 0.125, 1.0, 6.0, 17.0, 40.0, 104.0, 800.0, 10_000.0)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _result(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    return z.to(dtype), torch.randint(classes, (rows,), generator=g)


def _compute(z: Tensor, y: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log(1 - p_y) and cotangent; the public function must give the same loss and gradient."""
    loss, log_scale, cotangent = ops.unmasked_cross_entropy(z, y, ignore_index, True)
    leaf = z.detach().clone().requires_grad_()
    public = flatcore.unmasked_cross_entropy(leaf, y, reduction="none", ignore_index=ignore_index)
    assert_same("public loss", public.detach(), loss)
    with torch.no_grad():
        assert_same("loss without gradient", flatcore.unmasked_cross_entropy(z, y, reduction="none",
                                                                             ignore_index=ignore_index), loss)  # fmt: skip
    public.sum().backward()
    assert_same("gradient", leaf.grad, cotangent)
    return loss, log_scale, cotangent


def _check(z: Tensor, y: Tensor) -> None:
    """Require loss, scale and cotangent of rows whose label is not the only class."""
    loss, log_scale, cotangent = _compute(z, y)
    truth, dtype = oracles.exact_cross_entropy(z, y), _result(z.dtype)
    assert_within("loss", loss, truth["loss"], tolerance("loss", truth["loss"], truth["log_loss"], dtype), dtype)
    bound = tolerance("log_scale", None, truth["log_scale"], dtype)
    assert_within("log_scale", log_scale, truth["log_scale"], bound, dtype)
    assert cotangent.dtype == z.dtype and cotangent.shape == z.shape
    assert_within("cotangent", cotangent, truth["cotangent"], cotangent_tolerance(z.dtype))


# ------------------------------------------------------------------------------------------------------------- values
@pytest.mark.crossed
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("classes", WIDTHS)
def test_ragged_widths(target: str, classes: int, dtype: torch.dtype) -> None:
    z, y = _logits(3 if classes < 10_000 else 2, classes, dtype, seed=classes)
    y[0], y[-1] = 0, classes - 1
    z[0, -1] = 15  # the last class carries the row: a tail that is dropped shows
    _check(z, y)


@pytest.mark.parametrize("classes", (2, 3, 10, 33, 1000))
def test_plain_rows_against_autograd(target: str, classes: int) -> None:
    """The cross-entropy's own gradient over 1 - p_y, in float64, where nothing has vanished."""
    z, y = _logits(8, classes, torch.float64)
    z = z / 4
    leaf = z.clone().requires_grad_()
    loss = functional.cross_entropy(leaf, y, reduction="none")
    loss.sum().backward()
    p = leaf.detach().softmax(1).gather(1, y.unsqueeze(1))
    got_loss, log_scale, cotangent = _compute(z, y)
    # autograd's 1 - p_y carries a few roundings of 1
    bound = Bound(1e-14, 1e-12) + Bound(0.0, 64 * 2.0**-53 / (1 - p).min().item())
    assert_within("loss", got_loss, loss.detach().numpy(), bound)
    assert_within("log_scale", log_scale, (1 - p).log().squeeze(1).numpy(), bound)
    assert_within("cotangent", cotangent, (leaf.grad / (1 - p)).numpy(), bound)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("classes", (2, 3, 20))
def test_confident_rows(target: str, classes: int, dtype: torch.dtype) -> None:
    """Gaps to 10,000; the label on top, second and last."""
    rows, labels = [], []
    for gap in GAPS:
        row = torch.linspace(-3, 0, classes, dtype=torch.float64)
        row[1] = gap
        for y in {1, classes - 1, 0}:
            rows.append(row)
            labels.append(y)
    _check(torch.stack(rows).to(dtype), torch.tensor(labels))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=_name)
def test_large_logits_and_differences(target: str, dtype: torch.dtype) -> None:
    """Differences of float32 are not exact; the cotangent is right all the same."""
    g = torch.Generator().manual_seed(1)
    offset = torch.tensor([0, 0.1, 9.7, -60.3, 1e3, -1e5], dtype=torch.float64)
    z = (70 * torch.rand(6, 40, generator=g, dtype=torch.float64) + offset.unsqueeze(1)).to(dtype)
    _check(z, torch.arange(6))


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_ties_and_extremes(target: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max / 4  # so that the loss is finite too
    z = torch.tensor([[0.0] * 9, [5.0] * 4 + [1.0] * 5, [top] + [-top] * 8, [-top] * 8 + [top]], dtype=dtype)
    _check(z, torch.tensor([3, 2, 4, 8]))
    _check(z[:, :3], torch.tensor([1, 0, 1, 2]))


def test_many_classes(target: str) -> None:
    z, y = _logits(2, 200_000, torch.float32)
    z = (8 * z).round() / 8  # few distinct values: the oracle takes each one's exp once
    y[0], z[1, y[1]] = 199_999, 60.0
    _check(z, y)


# --------------------------------------------------------------------------------------------------------- edge rules
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_masked_classes(target: str, dtype: torch.dtype) -> None:
    z, _ = _logits(4, 21, dtype)
    z[0, 3:] = z[1, :7] = z[2, ::2] = z[3, 20] = -INF
    y = torch.tensor([1, 9, 3, 20])
    _check(z[:3], y[:3])
    _check(z[:, :20], torch.tensor([2, 19, 1, 0]))
    # a masked label: loss inf, the cotangent is finite and the scale is 1
    loss, log_scale, cotangent = _compute(z, y)
    assert loss[3] == INF and log_scale[3] == 0 and not log_scale[3].signbit()
    assert cotangent[3, 20] == -1 and (cotangent[3, :20] > 0).all()
    assert abs(cotangent[3, :20].double().sum().item() - 1) <= 21 * cotangent_tolerance(dtype).relative


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("classes", (1, 5, 40))
def test_a_label_that_is_the_only_class(target: str, classes: int, dtype: torch.dtype) -> None:
    z = torch.full((2, classes), -INF, dtype=dtype)
    z[:, classes // 2] = 3
    loss, log_scale, cotangent = _compute(z, torch.full((2,), classes // 2))
    assert loss.tolist() == [0, 0] and log_scale.tolist() == [-INF, -INF] and (cotangent == 0).all()
    if classes > 1:  # the only class is another one: e_m - e_y
        loss, log_scale, cotangent = _compute(z, torch.zeros(2, dtype=torch.long))
        want = torch.zeros_like(z)
        want[:, 0], want[:, classes // 2] = -1, 1
        assert loss.tolist() == [INF, INF] and log_scale.tolist() == [0, 0]
        assert_same("cotangent", cotangent, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("classes", (1, 2, 9, 33, 70))
def test_bad_rows_stay_alone(target: str, classes: int, dtype: torch.dtype) -> None:
    z, y = _logits(5, classes, dtype)
    clean = _compute(z, y)
    for place in {0, classes // 2, classes - 1}:
        for label in {0, classes - 1}:
            bad, labels = z.clone(), y.clone()
            bad[1, place], bad[2, place], bad[3] = NAN, INF, -INF
            labels[1:4] = label
            for got, want in zip(_compute(bad, labels), clean, strict=True):
                assert got[1:4].isnan().all()
                assert_same("a good row", got[::4], want[::4])
    masked = torch.full((1, classes), -INF, dtype=dtype)
    masked[0, -1] = NAN  # NaN beside masked classes only
    assert all(x.isnan().all() for x in _compute(masked, torch.tensor([0])))


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("ignore_index", (-100, 2, 7))
def test_ignored_rows(target: str, ignore_index: int, dtype: torch.dtype) -> None:
    z, y = _logits(6, 7, dtype)
    y[:] = torch.tensor([1, ignore_index, 0, ignore_index, 6, 1])
    z[3] = NAN
    loss, log_scale, cotangent = _compute(z, y, ignore_index)
    assert loss[[1, 3]].tolist() == [0, 0] and log_scale[[1, 3]].tolist() == [-INF, -INF]
    assert (cotangent[[1, 3]] == 0).all()
    keep = [0, 2, 4, 5]
    for got, want in zip((loss, log_scale, cotangent), _compute(z[keep], y[keep], -1), strict=True):
        assert_same("a valid row", got[keep], want)


def test_no_rows(target: str) -> None:
    z, y = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert flatcore.unmasked_cross_entropy(z, y) == 0
    assert flatcore.unmasked_cross_entropy(z, y, reduction="mean").isnan()
    assert flatcore.unmasked_cross_entropy(z, y, reduction="none").shape == (0,)


# -------------------------------------------------------------------------------------------- reductions, shapes, views
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_reductions(target: str, dtype: torch.dtype) -> None:
    z, y = _logits(7, 12, dtype)
    y[2] = -100
    loss, _, cotangent = _compute(z, y)
    for reduction, value, scale in (("sum", loss.sum(), 3.0), ("mean", loss.sum() / 6, 3.0 / 6)):
        leaf = z.clone().requires_grad_()
        got = flatcore.unmasked_cross_entropy(leaf, y, reduction=reduction)
        assert got.dtype == _result(dtype) and got.shape == ()
        assert_within(reduction, got, value.double().numpy(), tolerance("loss", value.double().numpy(), 0.0, got.dtype))
        (3 * got).backward()
        bound = cotangent_tolerance(dtype) + Bound(0.0, cotangent_tolerance(dtype).relative)
        assert_within("gradient", leaf.grad, scale * cotangent.double().numpy(), bound)
    leaf = z.clone().requires_grad_()
    upstream = torch.arange(7.0, dtype=_result(dtype))
    upstream[2] = NAN  # selected away
    flatcore.unmasked_cross_entropy(leaf, y, reduction="none").backward(upstream)
    upstream[2] = 0
    want = upstream.double().unsqueeze(1) * cotangent.double()
    assert_within("gradient", leaf.grad, want.numpy(), cotangent_tolerance(dtype))


def test_mean_of_nothing_has_no_gradient(target: str) -> None:
    z = torch.randn(3, 4, requires_grad=True)
    loss = flatcore.unmasked_cross_entropy(z, torch.full((3,), -100), reduction="mean")
    loss.backward()
    assert loss.isnan() and (z.grad == 0).all()


def test_leading_dimensions(target: str) -> None:
    z, y = _logits(24, 5, torch.float32)
    want = flatcore.unmasked_cross_entropy(z, y, reduction="none")
    for shape in ((24,), (2, 12), (2, 3, 4)):
        got = flatcore.unmasked_cross_entropy(z.reshape(*shape, 5), y.reshape(shape), reduction="none")
        assert_same("none", got, want.reshape(shape))
    assert_same("(C,)", flatcore.unmasked_cross_entropy(z[0], y[0]), want[0])
    leaf = z.reshape(2, 12, 5).clone().requires_grad_()
    flatcore.unmasked_cross_entropy(leaf, y.reshape(2, 12)).backward()
    assert_same("gradient", leaf.grad.reshape(24, 5), _compute(z, y)[2])


@pytest.mark.parametrize("integer", (torch.uint8, torch.int8, torch.int16, torch.int32))
def test_labels_of_any_integer_type(target: str, integer: torch.dtype) -> None:
    z, y = _logits(5, 9, torch.float32)
    assert_same("loss", flatcore.unmasked_cross_entropy(z, y.to(integer)), flatcore.unmasked_cross_entropy(z, y))


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_strides_and_misaligned_rows(target: str, dtype: torch.dtype) -> None:
    base, _ = _logits(40, 40, dtype)
    y = torch.arange(40) % 7
    flat = base.flatten()
    views = {
        "rows": base[::3, :], "columns": base[:, ::3], "transposed": base.T, "a slice": base[3:9, 5:38],
        "expanded": base[:1].expand(5, 40), "equal logits": base[:, :1].expand(40, 9),
        "overlapping": flat.as_strided((20, 37), (3, 1)), "offset": flat[1 : 1 + 23 * 67].view(23, 67),
    }  # fmt: skip
    for name, z in views.items():
        labels = y[: z.shape[0]]
        want = ops.unmasked_cross_entropy(z.contiguous(), labels, -100, True)
        for got, expected in zip(ops.unmasked_cross_entropy(z, labels, -100, True), want, strict=True):
            if target == "cuda":
                # a row's 16-byte boundaries decide which lane takes what: within the contract of tolerance.py
                rtol = 1e-12 if got.dtype == torch.float64 else max(4e-6, torch.finfo(got.dtype).eps)
                torch.testing.assert_close(got, expected, rtol=rtol, atol=0, msg=name)
            else:
                assert_same(name, got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_rows_do_not_depend_on_neighbours_or_threads(target: str, dtype: torch.dtype) -> None:
    z, y = _logits(300, 130, dtype)
    together = ops.unmasked_cross_entropy(z, y, -100, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = ops.unmasked_cross_entropy(z, y, -100, True)
    finally:
        torch.set_num_threads(threads)
    for n in (0, 7, 299):
        for whole, one in zip(
            together, ops.unmasked_cross_entropy(z[n : n + 1], y[n : n + 1], -100, True), strict=True
        ):
            if target != "reference":  # PyTorch's sums promise nothing of the kind
                assert_same("alone", one, whole[n : n + 1])
    if target != "reference":
        for a, b in zip(together, single, strict=True):
            assert_same("threads", a, b)


def test_numpy_in_numpy_out(target: str) -> None:
    z, y = _logits(4, 6, torch.float32)
    got = flatcore.unmasked_cross_entropy(z.numpy(), y.numpy(), reduction="none")
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    assert_same("loss", torch.from_numpy(got), flatcore.unmasked_cross_entropy(z, y, reduction="none"))


def test_autocast_leaves_the_logits_as_they_are(target: str) -> None:
    z, y = _logits(5, 9, torch.bfloat16)
    want = flatcore.unmasked_cross_entropy(z, y)
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flatcore.unmasked_cross_entropy(leaf, y)
    assert_same("loss", got.detach(), want)
    got.backward()
    assert leaf.grad.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------- operators, transforms
@pytest.fixture(params=("reference", "native"))
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Backend that is forced."""
    with flatcore.backend(request.param):
        yield request.param
    torch.compiler.reset()


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("learns", (False, True))
def test_opcheck(learns: bool, dtype: torch.dtype, engine: str) -> None:
    z, y = _logits(4, 6, dtype)
    y[1] = -100
    torch.library.opcheck(torch.ops.flatcore.unmasked_cross_entropy.default, (z.requires_grad_(learns), y, -100))
    _, _, cotangent = ops.unmasked_cross_entropy(z.detach(), y, -100, True)
    torch.library.opcheck(
        torch.ops.flatcore.unmasked_cross_entropy_backward.default, (torch.ones(4), cotangent, z.detach())
    )


@pytest.mark.crossed
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_compile(reduction: str, backend: str, engine: str) -> None:
    def attack(z: Tensor, y: Tensor) -> Tensor:
        return flatcore.unmasked_cross_entropy(z, y, reduction=reduction)

    compiled = torch.compile(attack, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 9):
        z, y = _logits(rows, 7, torch.float32, seed=rows)
        leaves = [z.clone().requires_grad_() for _ in range(2)]
        for function, leaf in zip((attack, compiled), leaves, strict=True):
            function(leaf, y).sum().backward()
        assert_same("value", compiled(z, y), attack(z, y))
        assert_same("gradient", leaves[1].grad, leaves[0].grad)


def test_function_transforms(engine: str) -> None:
    z, y = _logits(5, 4, torch.float32)
    cotangent = ops.unmasked_cross_entropy(z, y, -100, True)[2]
    gradient = torch.func.grad(flatcore.unmasked_cross_entropy)
    assert_same("grad", gradient(z, y), cotangent)
    assert_same("vmap of grad", torch.vmap(gradient)(z, y), cotangent)
    stacked, labels = torch.stack([z, 2 * z], dim=1), torch.stack([y, y])
    want = torch.stack([flatcore.unmasked_cross_entropy(z, y), flatcore.unmasked_cross_entropy(2 * z, y)])
    assert_same("vmap", torch.vmap(flatcore.unmasked_cross_entropy, in_dims=(1, 0))(stacked, labels), want)
    assert_same("jacrev", torch.func.jacrev(flatcore.unmasked_cross_entropy)(z, y), cotangent)
    leaf = torch.stack([z, z]).requires_grad_()
    torch.vmap(flatcore.unmasked_cross_entropy, in_dims=(0, None))(leaf, y).sum().backward()
    assert_same("backward of vmap", leaf.grad, torch.stack([cotangent, cotangent]))


def test_twice_is_refused(engine: str) -> None:
    """Also where only the constant cotangent stands between: a penalty on the gradient would lack its main term."""
    z, y = _logits(3, 4, torch.float32)
    leaf, w = z.clone().requires_grad_(), torch.ones(4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(flatcore.unmasked_cross_entropy(leaf @ w, y), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.jacrev(torch.func.grad(flatcore.unmasked_cross_entropy))(z, y)


# ------------------------------------------------------------------------------------------------------------- errors
Z, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
REFUSED = {
    "integer logits": (TypeError, "logits must have dtype", lambda: (Z.long(), Y), {}),
    "a list": (TypeError, "logits must be a torch.Tensor", lambda: ([[1.0]], Y), {}),
    "soft target": (TypeError, "target must hold integer class labels", lambda: (Z, Z), {}),
    "no class": (ValueError, "at least one class", lambda: (torch.zeros(3, 0), Y), {}),
    "a scalar": (ValueError, r"logits must have shape \(\.\.\., C\)", lambda: (torch.tensor(1.0), Y), {}),
    "short target": (ValueError, "target must have the logits' leading shape", lambda: (Z, Y[:2]), {}),
    "classes in the middle": (
        ValueError,
        "classes are the last",
        lambda: (torch.zeros(3, 4, 2), torch.zeros(3, 2).long()),
        {},
    ),
    "reduction": (ValueError, "reduction must be one of", lambda: (Z, Y), {"reduction": "average"}),
    "ignore_index": (TypeError, "ignore_index must be an integer", lambda: (Z, Y), {"ignore_index": 1.5}),
    "label above": (
        ValueError,
        r"target must hold labels in 0\.\.3.* got 4 in row 2",
        lambda: (Z, torch.tensor([0, 1, 4])),
        {},
    ),
    "label below": (ValueError, r"got -1 in row 0", lambda: (Z, torch.tensor([-1, 1, 9])), {}),
    "ignored elsewhere": (
        ValueError,
        r"ignore_index \(1\), got -100",
        lambda: (Z, torch.tensor([0, 1, -100])),
        {"ignore_index": 1},
    ),
    "sparse": (ValueError, "strided layout", lambda: (Z.to_sparse(), Y), {}),
    "device": (ValueError, "target must be on the device of logits", lambda: (Z, Y.to("meta")), {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, target: str) -> None:
    error, message, arguments, options = REFUSED[case]
    with pytest.raises(error, match=message):
        flatcore.unmasked_cross_entropy(*arguments(), **options)
