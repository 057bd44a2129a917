"""The tiled loop of large heads on a CUDA device: what a tile costs in launches and memory, and where tiles meet.

Counted on the real Python path over emulated threads: kernels by the emulator, the library's operations by a mode that sees
each one. Letters: N rows, D features, C classes; tiles of 16 classes where nothing else is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import emulation
import numpy as np
import pytest
import torch
from cases import Case
from checks import Problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import flatcore
from flatcore._check.tolerance import assert_same, logit_error
from flatcore._engine import chunked_cuda, chunked_cuda_backward, paths, tiles
from flatcore._engine import cuda as native_cuda
from flatcore._engine.head import Head
from flatcore._engine.memory import HeadCall
from flatcore.reference import FIELDS

WIDTH = 16
TRACE = 1 << FIELDS.index("log_hessian_trace")
NEURONWISE = 1 << FIELDS.index("log_neuronwise")
NO_LAUNCH = {"view", "slice", "select", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "as_strided", "permute",
             "_unsafe_view", "squeeze", "resize_", "lift_fresh"}  # fmt: skip
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided"}

LIBRARY = chunked_cuda.half_product, chunked_cuda.add_half_product
"""The products as they are called on a device; emulation has others in their place."""


@pytest.fixture(autouse=True)
def emulated(one_thread: None) -> Iterator[None]:
    """The CUDA path over emulated threads, by force."""
    with flatcore.backend("native"), paths.forced(path="chunked"), emulation.emulated():
        yield


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 classes."""
    monkeypatch.setattr(tiles, "TILE_CLASSES", WIDTH)


class Counted(TorchDispatchMode):
    """Launches and bytes of a call: operations that are no view, and what was allocated by hand or by an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.buffers, self.largest, self.names = 0, 0, 0, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if name in NO_LAUNCH:
            return result
        self.names.append(name)
        self.launches += name not in ALLOCATIONS
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.nbytes)
                self.buffers += x.nbytes if name in ALLOCATIONS else 0
        return result


def counted(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Run it: kernels, operations, and a 16-bit product as the one launch that it is on a device."""
    mode = Counted()

    def one(product: Callable[..., None]) -> Callable[..., None]:
        def launch(*tensors: Tensor) -> None:
            mode.launches += 1
            with _disable_current_modes():
                product(*tensors)

        return launch

    monkeypatch.setattr(chunked_cuda, "half_product", one(chunked_cuda.half_product))
    monkeypatch.setattr(chunked_cuda, "add_half_product", one(chunked_cuda.add_half_product))
    devices = emulation.module().devices
    before = devices.launches
    with mode:
        run()
    mode.launches += devices.launches - before
    monkeypatch.undo()
    return mode


def head_of(N: int, D: int, C: int, dtype: torch.dtype, **given: Tensor) -> Head:
    g = torch.Generator().manual_seed(C)
    return Head(torch.randn(N, D, generator=g).to(dtype), torch.randn(C, D, generator=g).to(dtype), **given)


# ------------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    ("field", "dtype", "most"),
    (
        (TRACE, torch.float32, 2),  # product, statistics
        (TRACE, torch.bfloat16, 2),
        (TRACE, torch.float64, 2),
        (NEURONWISE, torch.float32, 4),  # ... W - center, its product
        (NEURONWISE, torch.bfloat16, 4),  # ... W thrice, its product with all pieces
    ),
)
def test_launches_of_a_class_tile(field: int, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def launches(count: int) -> tuple[int, int]:
        monkeypatch.setattr(tiles, "TILE_CLASSES", WIDTH)
        head = head_of(3, 8, count * WIDTH, dtype)
        mode = counted(lambda: native_cuda.head_metrics(head, field, False), monkeypatch)
        return mode.launches, sum(name in ALLOCATIONS for name in mode.names)

    (few, allocations), (many, more) = launches(2), launches(7)
    assert many - few == 5 * most
    assert allocations == more, "a tile allocates nothing"
    assert few < 40


def test_launches_of_a_gradients_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    def launches(count: int) -> int:
        monkeypatch.setattr(tiles, "TILE_CLASSES", WIDTH)
        head = head_of(3, 8, count * WIDTH, torch.float32)
        wanted = True, True, False, False
        index = FIELDS.index("log_hessian_trace")
        mode = counted(lambda: native_cuda.head_metrics_backward(torch.ones(3), None, head, index, wanted), monkeypatch)
        return mode.launches

    # the statistics' two, and product, cotangent, the features' product, W's product
    assert launches(7) - launches(2) == 5 * 6


@pytest.mark.parametrize("field", ("log_hessian_trace", "log_neuronwise", "log_feature_gradient_norm"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_buffer_has_n_times_c_numbers_and_all_are_bounded(
    field: str, dtype: torch.dtype, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows follow the bound, in the values and in the gradient, and all buffers of a call together keep it."""
    N, D, C, bound = 200, 8, 330, (40 if "trace" in field else 60) << 10
    monkeypatch.setattr(chunked_cuda, "WORKSPACE_BYTES", bound)
    monkeypatch.setattr(chunked_cuda, "_SCRATCH_BYTES", 1)
    head = head_of(N, D, C, dtype, target=torch.arange(N) % C)
    index = FIELDS.index(field)
    blocks = []
    real = chunked_cuda.Forward.blocks

    def noted(self: chunked_cuda.Forward) -> Iterator[tuple[int, int]]:
        for block in real(self):
            blocks.append(block)
            yield block

    monkeypatch.setattr(chunked_cuda.Forward, "blocks", noted)
    wanted = True, True, False, False
    for run, results in (
        (lambda: native_cuda.head_metrics(head, 1 << index, False), 12 * N),
        (lambda: native_cuda.head_metrics_backward(torch.ones(N), None, head, index, wanted), 4 * D * (N + C)),
    ):
        blocks.clear()
        with pytest.MonkeyPatch.context() as patch:
            mode = counted(run, patch)
        assert len(blocks) > 1 and mode.largest < 4 * N * C / 8
        assert mode.buffers <= bound + results


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize(
    ("D", "C", "dtype", "least"),
    (
        (640, 100, torch.float32, 16_384),  # narrow heads: blocks as long as the tile's bytes allow
        (2048, 1000, torch.float32, 4096),
        (4096, 128_256, torch.bfloat16, 1024),
        (4096, 128_256, torch.float32, 1024),
        (8192, 256_000, torch.float64, 256),
    ),
)
def test_rows_of_a_block(D: int, C: int, dtype: torch.dtype, least: int, gradient: bool) -> None:
    """Enough for a product to take longer than reading W for it, and a tile of logits that the cache holds."""
    core = emulation.module()
    features, weight = torch.zeros(1, D, dtype=dtype), torch.zeros(1, 1, dtype=dtype).expand(C, D)
    for field in (TRACE, NEURONWISE):
        call = HeadCall(core, Head(features, weight), field, 1)
        known = chunked_cuda.Weights(core, (0, 0), HeadCall(core, Head(features, weight), TRACE, 1))
        if field == NEURONWISE:  # what is found of W would take a minute here; its size counts
            known.center, known.squares = torch.zeros(D + 1), torch.zeros(C)
            known.nbytes = 8 * core.cuda_head_weights_workspace(D, C) + 40 * C
        kept = chunked_cuda.Kept(known, None, None, 0)
        call.prepared = kept
        if gradient:
            one = torch.ones(1, dtype=torch.float64)
            forward = chunked_cuda_backward._Backward(core, (0, 0), call, one, None, None, None, None, None).forward
        else:
            forward = chunked_cuda.Forward(core, (0, 0), call, kept=kept)
        assert forward.block >= (least // 2 if gradient else least), field
        itemsize = call.dtype.itemsize
        assert forward.block * forward.known.order.width * itemsize <= 16 << 20
        assert forward.known.order.width * itemsize <= core.HEAD_TILE_BYTES


# -------------------------------------------------------------------------------------------------------------- tiles
def case(N: int, D: int, C: int, seed: int = 0, **changes: Any) -> Case:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(N, D, generator=g).double()
    given = {"features": features, "weight": torch.randn(C, D, generator=g).double()} | changes
    return Case(f"{N}x{D}x{C}", targets=(torch.arange(N) * 7 % C).unsqueeze(1), **given)


def checked(given: Case, dtype: torch.dtype) -> None:
    problem = Problem(given.at(dtype))
    problem.check_head_metrics()
    problem.check_views()


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", (WIDTH - 1, WIDTH + 1, 3 * WIDTH + 5))
def test_the_last_tile_is_narrower(C: int, dtype: torch.dtype, narrow: None) -> None:
    checked(case(3, 6, C), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", (0.05, 1.0, 12.0))
def test_the_anchor_moves_from_tile_to_tile(step: float, dtype: torch.dtype, narrow: None) -> None:
    """Each class beats the one before, by little, by one, and by more than the shares so far keep of themselves."""
    C, D = 3 * WIDTH + 2, 5
    weight = torch.randn(C, D, generator=torch.Generator().manual_seed(1)).double() * 0.3
    weight[:, 0] = torch.arange(C) * step
    features = torch.tensor([[1.0, 0.5, -0.25, 1, 0], [-1.0, 1, 0, 0, 0.5], [0.0, 1, 2, -1, 0.5]]).double()
    checked(case(3, D, C, weight=weight, features=features), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("zeros", "a few", "one in each tile", "all", "two kinds"))
def test_equal_rows_across_tiles(kind: str, dtype: torch.dtype, narrow: None) -> None:
    C, D = 4 * WIDTH + 3, 5
    weight = torch.randn(C, D, generator=torch.Generator().manual_seed(2)).double()
    if kind == "zeros":
        weight[7:] = 0
    elif kind == "a few":
        weight[3:25] = weight[0]
    elif kind == "one in each tile":
        weight[::WIDTH] = weight[5]
    elif kind == "all":
        weight[:] = weight[0]
    else:
        weight[:] = weight[torch.arange(C) % 2]
    checked(case(4, D, C, weight=weight), dtype)


@pytest.mark.parametrize("width", (64, 2048))
@pytest.mark.parametrize(("seed", "scale"), ((6, 1), (11, 16)))
def test_terms_that_are_equal_do_not_round_to_one_side(
    seed: int, scale: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse head: term by term neuronwise would be 9e-5 off (seed 6), a gradient norm 1.6e-5 (seed 11)."""
    monkeypatch.setattr(tiles, "TILE_CLASSES", width)
    g = torch.Generator().manual_seed(seed)
    w = (torch.randint(-4, 5, (600, 3), generator=g) * (torch.rand(600, 3, generator=g) < 0.03)).float()
    x, y = (torch.randint(-4, 5, (6, 3), generator=g) / scale).float(), torch.arange(6)
    got = flatcore.head_metrics(x, w, y)
    with flatcore.backend("reference"):
        want = flatcore.head_metrics(x.double(), w.double(), y)
    for name in ("log_neuronwise", "log_feature_gradient_norm"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=4 * 2.0**-24, atol=4e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_many_equal_rows_in_one_tile(dtype: torch.dtype) -> None:
    """600 rows of zeros, each with a share: their sum has the rounding of one number, and float16 does not overflow."""
    C, D = 640, 6
    weight = torch.randn(C, D, generator=torch.Generator().manual_seed(3)).double()
    weight[40:] = 0
    checked(case(3, D, C, weight=weight), dtype)


@pytest.mark.parametrize("N", (1, 16, 37))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_one_row_and_more_rows_than_a_block(
    N: int, dtype: torch.dtype, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "block_rows", lambda *_: 16)
    checked(case(N, 6, 2 * WIDTH + 3), dtype)


def test_a_rows_values_do_not_depend_on_the_others(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is chosen from N: tiles, blocks and formulas are those of a single row."""
    head = head_of(40, 8, 50, torch.float32)
    seen: list[tuple[int, list[int]]] = []
    real = chunked_cuda.Forward.blocks

    def blocks(self: chunked_cuda.Forward) -> Iterator[tuple[int, int]]:
        seen.append((self.block, self.known.order.bounds))
        return real(self)

    monkeypatch.setattr(chunked_cuda.Forward, "blocks", blocks)
    for rows in (1, 7, 40):
        native_cuda.head_metrics(head._replace(features=head.features[:rows]), NEURONWISE, False)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("measure", ("layerwise", "neuronwise", "norm", "l1", "linf"))
@pytest.mark.parametrize("repeated", (False, True))
def test_a_gradient_by_tiles_and_blocks_is_that_of_the_formula(
    measure: str, repeated: bool, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share their top class, labels that are and are not the top class, over three blocks and four tiles."""
    N, D, C = 37, 6, 3 * WIDTH + 5
    given = case(N, D, C, seed=5)
    features, weight = given.features.clone(), given.weight.clone()
    features[20:] = features[:17] * 1.5
    if repeated:
        weight[::5] = weight[1]
    y = torch.arange(N) % C
    y[::3] = (features @ weight.T).argmax(dim=1)[::3]
    orders = {"norm": 2, "l1": 1, "linf": math.inf}

    def gradients() -> tuple[Tensor, ...]:
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        b = torch.linspace(-1, 1, C, dtype=torch.float64).requires_grad_()
        if measure in orders:
            value = flatcore.feature_gradient_norms(x, w, y, linear_bias=b, ord=orders[measure], reduction="sum")
        else:
            value = flatcore.relative_flatness(x, w, y, linear_bias=b, measure=measure, include_bias=True)
        return torch.autograd.grad(value, (x, w, b))

    monkeypatch.setattr(tiles, "block_rows", lambda *_: 16)
    got = gradients()
    with flatcore.backend("reference"):
        want = gradients()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(), got, strict=True):
        assert_same("two runs", a, b)


def test_statistics_are_kept_for_the_gradient(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step runs the values' tiles once."""
    calls = []
    real = chunked_cuda.Forward.statistics
    monkeypatch.setattr(
        chunked_cuda.Forward, "statistics", lambda self, *block: (calls.append(block), real(self, *block))[1]
    )
    head = head_of(9, 8, 3 * WIDTH, torch.float32)
    for measure in ("layerwise", "neuronwise"):
        calls.clear()
        w = head.linear_weight.clone().requires_grad_()
        flatcore.relative_flatness(head.features, w, measure=measure).backward()
        assert calls == [(0, 9)], measure


# ------------------------------------------------------------------------------------------------- the 16-bit products
def test_a_torch_without_16_bit_products_into_float32(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_cuda, "takes_half_products", lambda: False)
    for name in ("half_product", "add_half_product"):
        monkeypatch.setattr(chunked_cuda, name, None)
    checked(case(3, 70, 2 * WIDTH + 3), torch.bfloat16)


def test_the_library_declares_the_products_that_it_is_asked_for() -> None:
    """Argument lists, types and shapes, on tensors without memory: no device is at hand to say so."""
    a, b = (torch.empty(4, 8, dtype=torch.bfloat16, device="meta") for _ in range(2))
    tile = torch.empty(4, 16, device="meta")[:, :4]
    for product in LIBRARY:
        product(tile, a, b.T)
        assert tile.shape == (4, 4) and tile.stride() == (16, 1)


def test_a_torch_that_adds_16_bit_products_to_16_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused once, by its check of the types; any other error is the caller's."""
    calls = []

    def addmm(*_: Tensor, **options: Any) -> None:
        calls.append(options)
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(chunked_cuda, "_adds_in_place", True)
    total, a = torch.ones(3, 3), torch.eye(3, dtype=torch.bfloat16)
    for _ in range(2):
        LIBRARY[1](total, a, 2 * a)
    assert torch.equal(total, torch.ones(3, 3) + 4 * torch.eye(3)) and len(calls) == 1

    def full(*_: Tensor, **options: Any) -> None:
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(torch, "addmm", full)
    monkeypatch.setattr(chunked_cuda, "_adds_in_place", True)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        LIBRARY[1](total, a, a)


def _cut(x: np.ndarray) -> np.ndarray:
    """The next float32 towards 0."""
    with np.errstate(over="ignore"):
        near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near).astype(float)


def _cut_product(a: Tensor, b: Tensor) -> Tensor:
    """As tensor cores sum: 16 terms exactly, then what they make of the sum so far cut off to float32."""
    x, w = a.double().numpy(), b.double().numpy()
    total = np.zeros((x.shape[0], w.shape[1]))
    for k in range(0, x.shape[1], 16):
        total = _cut(total + x[:, k : k + 16] @ w[k : k + 16])
    return torch.from_numpy(total).float()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_sums_that_are_cut_off_keep_the_promise(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,100 classes that all count.

    Of means over them tensor cores lose 3e-5 in one product, 5e-5 with the largest pieces first, and 7e-7 in slices of 512
    classes with the smallest first.
    """
    monkeypatch.setattr(chunked_cuda, "half_product", lambda out, a, b: out.copy_(_cut_product(a, b)))
    monkeypatch.setattr(chunked_cuda, "add_half_product", lambda out, a, b: out.add_(_cut_product(a, b)))
    C, D = 4100, 6
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(C, D, generator=g)
    weight[:, 0] += 1.5  # sums of one sign
    x, w, y = (torch.randn(2, D, generator=g) * 0.1).to(dtype), weight.to(dtype), torch.tensor([5, 4000])
    got = flatcore.head_metrics(x, w, y)
    with flatcore.backend("reference"):
        want = flatcore.head_metrics(x.double(), w.double(), y)
    error = logit_error(x, w, None, 1.0, torch.float32)  # of the features' own product
    for name in ("log_hessian_trace", "log_neuronwise", "log_feature_gradient_norm"):
        a, b = (getattr(m, name).double() for m in (got, want))
        assert ((a - b).abs().numpy() < 4e-6 + 2 * error).all(), name
