"""What small heads take since compute capability 8.0: tensor cores for 16-bit features, a ring of copies for the others.

Over emulated threads; the tensor cores are emulated as devices are known to add, cutting off and not rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import emulation
import pytest
import torch
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same
from flatcore._engine import cuda as native_cuda
from flatcore._engine import paths
from flatcore._engine.head import Head
from flatcore.reference import FIELDS

UNIT = 2.0**-24
HALVES = (torch.bfloat16, torch.float16)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def capability(value: int, order: str = "forwards") -> Iterator[None]:
    """Run on an emulated device of this compute capability."""
    devices = emulation.module().devices
    with flatcore.backend("native"), emulation.emulated(order):
        devices.set(0, True, value)
        try:
            yield
        finally:
            devices.set(0, True, 80)
            emulation.module().set_order(0)


def margins(features: Tensor, weight: Tensor) -> Tensor:
    """Of rows whose other logits are all 0: the logit of the first class."""
    return flatcore.head_metrics(features, weight).margin


def first_row(w: Tensor, C: int) -> Tensor:
    """A head whose other rows are 0."""
    return torch.cat([w[None], torch.zeros(C - 1, len(w), dtype=w.dtype)])


def logits_and_bounds(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first class's logit, and what the contract allows it: a difference has twice that, the other logit is exact."""
    x, w = features.double(), weight[0].double()
    return x @ w, (2 * math.sqrt(len(w)) + 4) * UNIT * (x.abs() @ w.abs())


# ------------------------------------------------------------------------------------------------------ tensor cores
def spread(D: int, seed: int) -> Tensor:
    """Positive numbers over 8 binary orders: products reach below the last bit that a tensor core keeps of their sum."""
    return (-8 * _random(D, seed=seed)).exp2()


def test_a_sum_over_all_columns_in_a_tensor_core_is_beyond_the_contract() -> None:
    """What is cut off has one sign: a sum of one sign that never leaves the accumulator goes astray, carried it does not."""
    core = emulation.module()
    D = 4096
    for seed in range(3):
        x, w = spread(D, 2 * seed).bfloat16(), spread(D, 2 * seed + 1).bfloat16()
        truth = float(x.double() @ w.double())
        bound = (2 * math.sqrt(D) + 4) * UNIT * truth
        whole, carried = (core.tensor_sum(x.data_ptr(), w.data_ptr(), D, carried) for carried in (False, True))
        assert bound < truth - whole < 0.01 * truth
        assert abs(truth - carried) < bound / 4


@pytest.mark.parametrize("D", (16, 512, 4096))
@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=_name)
@pytest.mark.parametrize("dtype", HALVES, ids=_name)
def test_logits_of_one_sign_keep_the_contract(dtype: torch.dtype, weight_dtype: torch.dtype, D: int) -> None:
    """The case above, through the kernel, which is to keep four times the contract.

    Its accumulators see 16 columns: 4 units of 2^-24 as a rule, where 12 are a quarter of the contract at D = 512. One that
    saw all 512 columns of a float's sum would be off by 20 with one piece, and more with three.
    """
    x = torch.stack([spread(D, seed) for seed in range(5)]).to(dtype)
    w = first_row(spread(D, 9).to(weight_dtype), 3)
    truth, bound = logits_and_bounds(x, w)
    with capability(80):
        got = margins(x, w)
    assert got.dtype == torch.float32
    assert ((got.double() - truth).abs() < bound / 4).all()


@pytest.mark.parametrize("dtype", HALVES, ids=_name)
def test_products_that_floats_hold_are_exact(dtype: torch.dtype) -> None:
    """24 bits of W in three pieces, whose partial sums are within 24 bits: not one is lost."""
    w = first_row(torch.tensor([2.0**23 + 1, -(2.0**23) + 3, 0.0, 2.0**-20] + [0.0] * 30 + [255.0, -257.0]), 2)
    x = torch.zeros(4, 36)
    x[0, 0] = x[1, 1] = x[2, 3] = 1
    x[3, 34:] = 2
    with capability(80):
        value = flatcore.head_metrics(x.to(dtype), w)
    truth = x.double() @ w[0].double()
    assert torch.equal(value.margin.double(), truth.abs())
    assert torch.equal(value.prediction, (truth < 0).long())


@pytest.mark.parametrize("exponent", (-126, -115, -70, -60, 0, 60, 110))
@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16), ids=_name)
def test_pieces_of_small_and_large_weights(weight_dtype: torch.dtype, exponent: int) -> None:
    x, w = 1 + _random(3, 40), first_row(1 + _random(40, seed=3), 2)
    x, w = (x * 2.0**-exponent).bfloat16(), (w * 2.0**exponent).to(weight_dtype)
    truth, bound = logits_and_bounds(x, w)
    with capability(80):
        assert ((margins(x, w).double() - truth).abs() < bound / 2).all()


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("dtype", HALVES, ids=_name)
def test_a_row_that_is_not_finite_leaves_the_others_alone(dtype: torch.dtype, bad: float) -> None:
    x, w = _random(40, 70).to(dtype), _random(4, 70, seed=1)
    with capability(80):
        want = flatcore.head_metrics(x, w)
        x[17, 5] = bad
        got = flatcore.head_metrics(x, w)
        w[2, 9] = bad
        assert flatcore.head_metrics(x, w).confidence.isnan().all()
    assert got.prediction[17] == -1 and got.confidence[17].isnan()
    others = torch.arange(40) != 17
    for name in ("confidence", "margin", "log_hessian_trace"):
        assert_same(name, getattr(got, name)[others], getattr(want, name)[others])


# ---------------------------------------------------------------------------------------------------- rows as they lie
@pytest.mark.parametrize("order", emulation.ORDERS)
@pytest.mark.parametrize("C", (3, 10, 12, 17, 32))
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32, torch.float64), ids=_name)
def test_a_row_s_value_does_not_depend_on_where_it_lies(dtype: torch.dtype, C: int, order: str) -> None:
    """On 16-byte boundaries (packs, or the ring), beside them, or strided: the same sums in the same order."""
    for N, D in ((37, 130), (3, 29)):
        x, w = _random(N, D, seed=C).to(dtype), _random(C, D, seed=D) - 0.5
        whole = torch.zeros(N, -(-D // 8) * 8 + 8, dtype=dtype)
        lying = {"padded": whole[:, :D], "beside": torch.zeros(N * (D + 1), dtype=dtype)[1 : N * D + 1].view(N, D),
                 "strided": torch.zeros(D, N, dtype=dtype).T}  # fmt: skip
        with capability(80, order):
            want = flatcore.head_metrics(x, w)
            for name, place in lying.items():
                place.copy_(x)
                got = flatcore.head_metrics(place, w)
                for field in ("log_hessian_trace", "margin", "log_feature_norm", "log_neuronwise"):
                    assert_same(f"{name} {field}", getattr(got, field), getattr(want, field))
        with flatcore.backend("reference"):
            truth = flatcore.head_metrics(x, w)
        torch.testing.assert_close(want.log_hessian_trace, truth.log_hessian_trace, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("C", (2, 7, 10, 20, 31))
@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=_name)
def test_code_for_seven_five(dtype: torch.dtype, C: int) -> None:
    """Without tensor cores and copies: lanes over D, the features straight into registers."""
    x, w = _random(34, 77).to(dtype), first_row(_random(77, seed=1), C)
    truth, bound = logits_and_bounds(x, w)
    with capability(75):
        got = margins(x, w)
        loss = flatcore.relative_flatness(x, w, measure="neuronwise", log=True)
    assert ((got.double() - truth).abs() < bound).all()
    with capability(80):
        torch.testing.assert_close(flatcore.relative_flatness(x, w, measure="neuronwise", log=True), loss)
        torch.testing.assert_close(margins(x, w), got, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------- norms that want differences of W's own rows
@pytest.mark.parametrize("C", (2, 8, 9, 16, 17, 32))
@pytest.mark.parametrize("given", (False, True))
@pytest.mark.parametrize("weight_dtype", ("same", "float32"))
@pytest.mark.parametrize("dtype", HALVES, ids=_name)
def test_other_norms_beside_16_bit_features(
    dtype: torch.dtype, weight_dtype: str, given: bool, C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L1 and L-infinity take W whole, not in pieces: on both sides of 8.0, bit for bit alike, and by float64's reference.

    A logit may be off by what the contract allows, each p by twice that; of a norm at least a quarter of its terms is left.
    """
    monkeypatch.setattr(paths, "CUDA_FUSED_ROWS", 0)  # not the kernel of a training step
    for N, D in ((1, 77), (33, 300), (70, 5)):
        x, w = (_random(N, D, seed=C) - 0.5).to(dtype), 8 / D**0.5 * (_random(C, D, seed=N) - 0.5)
        w = w.to(dtype) if weight_dtype == "same" else w
        z = (10 * _random(N, C, seed=D)).to(dtype) if given else None
        y = torch.arange(N) % C
        y[1::7] = -100
        exact = x.double(), w.double(), None if z is None else z.double()
        off = 0.0 if given else (2 * math.sqrt(D) + 4) * UNIT * (exact[0].abs() @ exact[1].abs().T).amax(1)
        for ord in (1, math.inf):
            got = []
            for device in (75, 80):
                with capability(device):
                    got.append(flatcore.feature_gradient_norms(x, w, y, logits=z, ord=ord, reduction="none", log=True))
                assert paths.last_path == "fused"
            with flatcore.backend("reference"):
                want = flatcore.feature_gradient_norms(
                    exact[0], exact[1], y, logits=exact[2], ord=ord, reduction="none", log=True
                )
            assert_same(f"ord {ord}", *got)
            kept = y != -100
            assert want[kept].isfinite().all() and torch.equal(got[1][~kept].double(), want[~kept])
            room = 4 * (2 * off + (C + 4) * UNIT) + UNIT * want.abs()
            assert ((got[1].double() - want).abs() <= room)[kept].all()


@pytest.mark.parametrize("dtype", HALVES, ids=_name)
def test_all_fields_at_once_are_those_of_one_at_a_time(dtype: torch.dtype) -> None:
    """With W whole, or in pieces: both within what the contract allows of each other."""
    x, w, y = (_random(40, 70) - 0.5).to(dtype), _random(17, 70, seed=1) - 0.5, torch.arange(40) % 17
    off = (2 * math.sqrt(70) + 4) * UNIT * float((x.double().abs() @ w.double().abs().T).max())
    names = (
        "margin",
        "log_hessian_trace",
        "log_neuronwise",
        "log_feature_gradient_norm",
        "log_feature_gradient_norm_1",
    )
    bits = [FIELDS.index(name) for name in names]
    head = Head(x, w, target=y)
    with capability(80):
        together = native_cuda.head_metrics(head, sum(1 << bit for bit in bits), True)[0]
        for row, bit in enumerate(bits):
            alone = native_cuda.head_metrics(head, 1 << bit, True)[0][0]
            assert ((together[row] - alone).abs() <= 16 * off).all(), FIELDS[bit]


# ------------------------------------------------------------------------------------------------------- the emulator
@pytest.mark.parametrize("order", emulation.ORDERS.values())
def test_the_emulator_shows_a_copy_that_nobody_waited_for(order: int) -> None:
    core = emulation.module()
    core.set_order(order)
    assert core.planted("copy") == 4
    assert math.isnan(core.planted("no wait"))
    with pytest.raises(RuntimeError, match="a copy is not of up to 16 bytes from and to a 16-byte boundary"):
        core.planted("address")
    core.set_order(0)
