"""row_norms: every norm of every row from one read, safe from overflow and underflow, on every CPU target."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

import flatcore
from flatcore import __main__
from flatcore._check.tolerance import assert_same, assert_within, tolerance

INF = math.inf

ORDS = (1, 2, math.inf)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# one below, at and above multiples of 4, 8, 16 lanes and of four unrolled vectors of them, and of the 65,536 of a block
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 65535, 65536, 65537, 131075)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check(x: Tensor, got: Tensor | None = None) -> None:
    """Require all three norms of a finite matrix."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    got = flatcore.row_norms(x) if got is None else got
    for ord, norms in zip(ORDS, got, strict=True):
        truth = oracles.exact_row_norms(x, ord)
        with np.errstate(divide="ignore"):
            bound = tolerance("row_norm", truth, np.log(truth), dtype, terms=x.shape[1])
        if ord == math.inf:
            bound = type(bound)(0.0, 0.0)  # an entry of the row, so exact
        assert_within(f"ord {ord} of {tuple(x.shape)} {x.dtype}", norms, truth, bound, dtype)


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_ragged_widths(target: str, width: int, dtype: torch.dtype) -> None:
    x = _randn(3 if width < 10_000 else 2, width, seed=width)
    x[0, -1] = 40  # the last element is the largest: a tail that is dropped shows in every norm
    _check(x.to(dtype))


@pytest.mark.parametrize("width", (1, 5, 33, 64, 65537))
@pytest.mark.parametrize("size", (1e20, 3e38, 1e-25, 1e-38, 1e-44))
def test_float32_whose_squares_leave_its_range(target: str, size: float, width: int) -> None:
    x = torch.rand(2, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64) * size
    _check_finite(x.float())


@pytest.mark.parametrize("width", (1, 5, 33, 64, 1000))
@pytest.mark.parametrize("size", (1e200, 1e300, 1e160, 1e-160, 1e-200, 1e-300, 1e-308, 1e-320))
def test_float64_whose_squares_leave_its_range(target: str, size: float, width: int) -> None:
    _check_finite(torch.rand(2, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64) * size)


def _check_finite(x: Tensor) -> None:
    """As _check, where the truth may round to a subnormal number, which carries half a unit of the least one."""
    dtype = x.dtype
    least = 2.0**-1074 if dtype == torch.float64 else 2.0**-149
    for ord, norms in zip(ORDS, flatcore.row_norms(x), strict=True):
        truth = oracles.exact_row_norms(x, ord)
        with np.errstate(divide="ignore"):
            bound = tolerance("row_norm", truth, np.log(truth), dtype, terms=x.shape[1])
        subnormal = truth < torch.finfo(dtype).tiny
        bound = type(bound)(np.where(subnormal, least, 0.0), bound.relative)
        assert_within(f"ord {ord}", norms, truth, bound, dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=_name)
def test_large_and_small_entries_in_one_row(target: str, dtype: torch.dtype) -> None:
    large, small = (1e200, 1e-200) if dtype == torch.float64 else (1e20, 1e-25)
    x = torch.tensor([[small] * 70 + [large], [large] + [small] * 70, [small] * 71], dtype=dtype)
    _check(x)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=_name)
def test_half_rows_whose_norms_leave_their_range(target: str, dtype: torch.dtype) -> None:
    """The result is float32: 1,000 entries of 60,000 have norms that float16 does not reach."""
    _check(torch.full((2, 1001), 60000.0, dtype=dtype))
    _check(torch.full((2, 1001), 6e-8, dtype=dtype))


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("width", (1, 7, 64, 130, 65600))
def test_nan_and_infinity(target: str, width: int, dtype: torch.dtype) -> None:
    places = {0, width // 2, width - 1}
    for place in places:
        x = _randn(4, width).to(dtype)
        x[1, place] = math.nan
        x[2, place] = -math.inf
        x[3, place], x[3, 0] = math.inf, math.nan
        got = flatcore.row_norms(x)
        assert got[:, 1].isnan().all() and got[:, 3].isnan().all()
        assert (got[:, 2] == math.inf).all()
        _check(x[:1], got[:, :1])


def test_zero_rows(target: str) -> None:
    x = torch.zeros(3, 21)
    x[1, 20] = -2.0
    x[2, 4] = -0.0
    got = flatcore.row_norms(x)
    assert got.tolist() == [[0.0, 2.0, 0.0]] * 3 and not got.signbit().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_no_rows_and_no_columns(target: str, dtype: torch.dtype) -> None:
    result = torch.float64 if dtype == torch.float64 else torch.float32
    got = flatcore.row_norms(torch.empty(0, 5, dtype=dtype))
    assert got.shape == (3, 0) and got.dtype == result
    got = flatcore.row_norms(torch.empty(4, 0, dtype=dtype))
    assert got.shape == (3, 4) and got.dtype == result and (got == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_strides_and_views(target: str, dtype: torch.dtype) -> None:
    base = _randn(24, 40).to(dtype)
    views = {
        "rows": base[::3],
        "columns": base[:, ::3],
        "both": base[1::2, 1::2],
        "transposed": base.T,
        "expanded row": base[:1].expand(5, 40),
        "expanded column": base[:, :1].expand(24, 9),
        "overlapping": base.flatten().as_strided((20, 37), (3, 1)),
        "a slice": base[3:9, 5:38],
    }
    for name, x in views.items():
        assert_same(name, flatcore.row_norms(x), flatcore.row_norms(x.contiguous())) if x.stride(1) == 1 else _check(x)
        _check(x)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("offset", range(1, 9))
def test_misaligned_rows(target: str, offset: int, dtype: torch.dtype) -> None:
    """Storage that starts between the boundaries of a vector, rows of odd length."""
    x = _randn(5 * 67 + 8).to(dtype)[offset : offset + 5 * 67].view(5, 67)
    _check(x)


@pytest.mark.parametrize("ord", (1, 2, math.inf, 1.0, 2.0, (2,), (math.inf, 1), (2, 2, 1), (1, 2, math.inf)))
def test_each_choice_of_norms(target: str, ord: object) -> None:
    x = _randn(6, 50).float()
    by_ord = dict(zip(ORDS, flatcore.row_norms(x), strict=True))
    expected = torch.stack([by_ord[p] for p in ord]) if isinstance(ord, tuple) else by_ord[ord]
    assert_same(str(ord), flatcore.row_norms(x, ord=ord), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_two_runs_agree_bit_for_bit_whatever_the_threads(target: str, dtype: torch.dtype) -> None:
    x = _randn(2, 150_001).to(dtype)
    threads = torch.get_num_threads()
    first = flatcore.row_norms(x)
    try:
        torch.set_num_threads(1)
        second = flatcore.row_norms(x)
    finally:
        torch.set_num_threads(threads)
    if target == "reference":  # PyTorch's own sums promise it at equal threads only
        second = flatcore.row_norms(x)
    assert_same("repeated", first, second)


def test_rows_beyond_32_bits(target: str) -> None:
    """The second row starts 2^31 elements after the first; only the touched pages of the 4 GiB exist."""
    step = 2**31 + 64
    storage = torch.empty(step + 64, dtype=torch.float16)
    x = storage.as_strided((2, 33), (step, 1))
    x.copy_(_randn(2, 33))
    _check(x)


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_numpy_in_numpy_out(target: str, dtype: type) -> None:
    x = _randn(7, 33).numpy().astype(dtype)
    got = flatcore.row_norms(x)
    assert isinstance(got, np.ndarray) and got.dtype == (np.float64 if dtype is np.float64 else np.float32)
    _check(torch.from_numpy(x), torch.from_numpy(got))


@pytest.mark.parametrize(
    ("name", "ord"),
    (("l1", 1), ("L1", 1), ("l2", 2), ("L2", 2), ("inf", INF), ("linf", INF), ("Linf", INF), ("LINF", INF)),
)
def test_norms_by_their_names(name: str, ord: float) -> None:
    """As attack libraries call them, wherever a norm is named."""
    x, w, y = torch.randn(5, 4), torch.randn(3, 4), torch.arange(5) % 3
    assert_same("row_norms", flatcore.row_norms(x, name), flatcore.row_norms(x, ord))
    assert_same("row_norms", flatcore.row_norms(x, (name, 2)), flatcore.row_norms(x, (ord, 2)))
    named, numbered = (flatcore.feature_gradient_norms(x, w, y, ord=o) for o in (name, ord))
    assert_same("feature_gradient_norms", named, numbered)
    head = torch.nn.Linear(4, 3)
    named, numbered = (flatcore.input_gradient_norms(head, x, y, ord=o) for o in (name, ord))
    assert_same("input_gradient_norms", named, numbered)
    options = {"eps": 0.5, "step": 0.25, "steps": 2, "clip": None}
    attacks = (flatcore.robustness.pgd, flatcore.robustness.attack_path)
    if ord == 1:
        for attack in attacks:
            with pytest.raises(ValueError, match="norm must be one of 2, inf, got 1"):
                attack(head, x, y, norm=name, **options)
        return
    named, numbered = (flatcore.robustness.pgd(head, x, y, norm=o, **options) for o in (name, ord))
    assert_same("pgd", named, numbered)
    named, numbered = (flatcore.robustness.attack_path(head, x, y, norm=o, **options) for o in (name, ord))
    assert_same("attack_path", named.input_displacement, numbered.input_displacement)
    options["gradient"] = "exact"
    sweeps = [flatcore.robustness.scaling_sweep(head, [(x, y)], (1,), norm=o, **options) for o in (name, ord)]
    assert sweeps[0] == sweeps[1]
    sweeps = [flatcore.robustness.transfer(head, [(x, y)], norm=o, **options) for o in (name, ord)]
    assert sweeps[0] == sweeps[1]
    assert __main__._norm(name) == ord
