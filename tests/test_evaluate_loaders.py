"""evaluate's loaders: batches of every form that is taken, and those that are refused; each is read once.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import C, data, loader, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import flatcore


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------- bad input
class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(6), torch.tensor(0)


def ones(shape: tuple[int, ...], dtype: torch.dtype = torch.long, rows: int = 3) -> list[tuple[Tensor, Tensor]]:
    """A loader of one batch, whose target has another form than it should."""
    return [(torch.zeros(rows, 6), torch.ones(shape, dtype=dtype))]


def named(rows: int, *targets: str) -> list[dict[str, Tensor]]:
    return [{"x": torch.zeros(2, 6)} | {name: torch.zeros(rows).long() for name in targets}]


ONE_HOT = torch.eye(C)[:3]
BAD = {
    "no module": ({"model": lambda x: x}, TypeError, r"model must be a torch\.nn\.Module, got builtins\.function"),
    "empty": ({"loader": []}, ValueError, r"at least one batch, got an empty one \(or one that was used up before\)"),
    "no rows": ({"loader": [(torch.zeros(0, 6), torch.zeros(0).long())]}, ValueError, "at least one row"),
    "ignored alone": ({"loader": [(torch.zeros(2, 6), torch.full((2,), -100))]}, ValueError, "at least one row"),
    "a tensor": ({"loader": [torch.zeros(2, 6)]}, TypeError, r"pairs \(inputs, target\), got a Tensor as batch 0"),
    "one pair, not a list of pairs": (
        {"loader": (torch.zeros(2, 6), torch.zeros(2))},
        TypeError,
        r"is the loader itself one pair\? \[\(inputs, target\)\] is a loader of one batch",
    ),
    "a dictionary": ({"loader": [{"x": 1, "y": 2}]}, TypeError, "got a dict of 2 as batch 0"),
    "three": ({"loader": [(1, 2, 3)]}, TypeError, "got a tuple of 3 as batch 0"),
    "lists": ({"loader": [([[0.0] * 6], [0])]}, TypeError, "got target of type list in batch 0"),
    "masked": ({"loader": [(np.ma.zeros((2, 6)), np.zeros(2, int))]}, TypeError, "masked array"),
    "float arrays": ({"loader": [(np.zeros((2, 6)), np.zeros(2))]}, TypeError, r"got torch\.float64: pass target\.long\(\)"),
    "soft": ({"loader": [(torch.zeros(2, 6), torch.zeros(2))]}, TypeError, "integer class labels as target, got"),
    "label": ({"loader": [(torch.zeros(2, 6), torch.tensor([0, C]))]}, ValueError, rf"in 0\.\.{C - 1} .* got {C} in row 1$"),
    "a column": ({"loader": ones((3, 1))}, ValueError, r"\(3, 1\): pass target\.squeeze\(1\)$"),
    "a float column": ({"loader": ones((3, 1), torch.float)}, TypeError, r"target\.squeeze\(1\).*\.long\(\)"),
    "one-hot": ({"loader": [(torch.zeros(3, 6), ONE_HOT.long())]}, ValueError, r"one-hot: pass target\.argmax\(1\)$"),
    "float one-hot": ({"loader": [(torch.zeros(3, 6), ONE_HOT)]}, TypeError, r"one-hot: pass target\.argmax\(1\)$"),
    "bool": ({"loader": ones((3,), torch.bool)}, TypeError, r"got torch\.bool: pass target\.long\(\)"),
    "four": ({"loader": [(*ones((3,))[0], 1, 2)]}, TypeError, r"tuple of 4 .*: leave out the rest, \(\(x, y\)"),
    "no target": ({"loader": named(2)}, TypeError, "under 'labels' or 'label' or 'target', got .* keys 'x': rename"),
    "two targets": ({"loader": named(2, "label", "labels")}, TypeError, "'x', 'label', 'labels': leave one of them"),
    "a row": ({"loader": [(torch.zeros(6), torch.tensor(0))]}, ValueError, "a single row .* is it a data set"),
    "a row's number": ({"loader": [(torch.zeros(6), 0)]}, TypeError, "target of type int in batch 0: is it a data set"),
    "lengths": ({"loader": ones((2,))}, ValueError, r"as many rows, got shapes \(3, 6\) and \(2,\)"),
    "mapping lengths": ({"loader": named(3, "label")}, ValueError, "as many rows"),
    "mapping norms": (
        {"loader": named(2, "label"), "input_gradient_norms": True},
        TypeError, "input_gradient_norms needs inputs as one tensor, got a mapping",
    ),
    "nothing": ({"loader": 3}, TypeError, "got int, which yields nothing"),
    "device": ({"device": "meta"}, ValueError, r"on device meta, got one on cpu: move it with model.to\('meta'\)"),
    "no device": ({"device": "tpu9"}, ValueError, "device must name a torch device, got 'tpu9'"),
    "head": ({"head": "nope"}, ValueError, "head must name a module of the model, got 'nope'"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be finite and above 0"),
    "table": ({"rows": 3}, TypeError, "rows must be True, False or a path, got int"),
    "progress": ({"progress": "yes"}, TypeError, "progress must be True or False"),
    "norms": ({"input_gradient_norms": 2}, TypeError, "input_gradient_norms must be True or False"),
    "folder": ({"rows": "/nowhere/rows.csv"}, OSError, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        flatcore.evaluate(**{"model": network(), "loader": loader(*data(10))} | changes)


@pytest.mark.parametrize("options", ({}, {"input_gradient_norms": True}), ids=("", "gradients"))
def test_a_bad_label_is_named_by_its_row_in_the_loader(options: dict[str, Any]) -> None:
    model, (x, y) = network(), data(200)
    y[[137, 150]] = torch.tensor([7, -3])
    with pytest.raises(ValueError, match=rf"labels \(target\) in 0\.\.{C - 1} .* got 7 in row 137$"):
        flatcore.evaluate(model, loader(x, y, 16), **options)
    tokens = nn.Sequential(nn.Linear(6, C))
    target = torch.zeros(30, 4).long()
    target[25, 2] = -1
    with pytest.raises(ValueError, match=r"got -1 in row 25, position 2$"):
        flatcore.evaluate(tokens, loader(torch.randn(30, 4, 6), target, 7))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32, torch.uint64))
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model, (x, y) = network(), data(60)
    want = flatcore.evaluate(model, loader(x, y))
    found = flatcore.evaluate(model, loader(x, y.to(dtype)))
    for name, column in want.rows.items():
        np.testing.assert_array_equal(found.rows[name], column)
    if dtype == torch.uint64:
        wrong = y.clone()
        wrong[3] = -100  # 2^64 - 100
        with pytest.raises(ValueError, match="in row 3"):
            flatcore.evaluate(model, loader(x, wrong.view(torch.uint64)))


class Named(nn.Module):
    """Takes its input by name, as transformers' models do, and returns an object with logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: Tensor, scale: Tensor | None = None, note: Any = None) -> dict[str, Tensor]:
        return {"hidden": values, "logits": self.model(values if scale is None else values * scale)}


@pytest.mark.parametrize("key", ("labels", "label", "target"))
@pytest.mark.parametrize("kind", ("dict", "UserDict", "arrays", "pair"))
def test_batches_by_name(kind: str, key: str) -> None:
    from collections import UserDict  # what transformers' BatchEncoding is

    model, (x, y) = network(), data(100)
    scale = torch.rand(100, 1)
    want = flatcore.evaluate(model, loader(x * scale, y, 16))
    held: list[Any] = []
    for values, factors, labels in zip(x.split(16), scale.split(16), y.split(16), strict=True):
        if kind == "pair":
            held.append(({"values": values, "scale": factors, "note": "a text"}, labels))
            continue
        batch = {"values": values, "scale": factors, key: labels, "note": ["a", "list"]}
        if kind == "arrays":
            batch = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in batch.items()}
        held.append(UserDict(batch) if kind == "UserDict" else batch)
    found = flatcore.evaluate(Named(model), held)
    for name, column in want.rows.items():
        np.testing.assert_allclose(found.rows[name], column, rtol=1e-6, err_msg=name)


def test_labels_that_a_causal_model_would_shift_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.embedding(input_ids).cumsum(1))}

    ids = torch.randint(0, 7, (5, 6))
    labels = torch.where(torch.arange(6) < 4, ids, -100)
    with pytest.raises(
        ValueError, match=r"labels equal to input_ids in batch 0.* shift them here, labels = .*pad\(labels"
    ):
        flatcore.evaluate(Model(), [{"input_ids": ids, "labels": labels}])
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    report = flatcore.evaluate(Model(), [{"input_ids": ids, "labels": shifted}])
    assert report.groups["all"].rows == 15
    assert flatcore.evaluate(Model(), [({"input_ids": ids}, labels)]).groups["all"].rows == 20


class _Batched(IterableDataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Mapped(torch.utils.data.Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {"values": self.x[k], "label": int(self.y[k])}


def test_a_data_set_in_a_loaders_place() -> None:
    model, (x, y) = network(), data(600)
    want = flatcore.evaluate(model, loader(x, y, 256))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    rows = list(zip(x, y.tolist(), strict=True))
    for dataset in (TensorDataset(x, y), _Batched(rows), _Batched(loader(x, y, 100)), _Mapped(x, y)):
        sizes.clear()
        net = Named(model) if isinstance(dataset, _Mapped) else model
        found = flatcore.evaluate(net, dataset)
        assert sizes == ([100] * 6 if dataset.__dict__.get("batches") not in (None, rows) else [256, 256, 88])
        for name, column in want.rows.items():
            np.testing.assert_allclose(found.rows[name], column, rtol=3e-5, atol=3e-5, err_msg=name)
    with pytest.raises(ValueError, match="at least one batch"):
        flatcore.evaluate(model, _Batched([]))


def test_numpy_batches() -> None:
    model, (x, y) = network(), data(100)
    want = flatcore.evaluate(model, loader(x, y))
    for labels in (y.numpy(), y.numpy().astype(">i4"), y.numpy().astype(np.uint16)):
        arrays = [(x[k : k + 64].numpy(), labels[k : k + 64]) for k in (0, 64)]
        found = flatcore.evaluate(model, arrays)
        for name, column in want.rows.items():
            np.testing.assert_array_equal(found.rows[name], column)
    backwards = flatcore.evaluate(model, [(x.numpy()[::-1], y.numpy()[::-1])])
    np.testing.assert_array_equal(backwards.rows["target"][::-1], want.rows["target"])


@pytest.mark.parametrize("options", ({}, {"head": "0"}, {"input_gradient_norms": True}), ids=("", "named", "gradients"))
@pytest.mark.parametrize("labels", ([0, 0, 0], [0, 1, 1]))
def test_a_head_with_one_output_is_refused_at_the_first_batch(options: dict[str, Any], labels: list[int]) -> None:
    model = nn.Sequential(nn.Linear(6, 1))
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"has one output \(C = 1\).*softmax head of two classes"):
        flatcore.evaluate(model, [(torch.randn(3, 6), torch.tensor(labels))] * 5, **options)
    assert len(calls) <= 1


def test_logits_scaled_from_the_second_batch_on_are_seen() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.calls = nn.Linear(6, C), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(x) * (1.0 if self.calls == 1 else 3.0)

    with pytest.raises(RuntimeError, match="the model's output is not the output of"):
        flatcore.evaluate(Late(), loader(*data(200)))


def test_other_loaders() -> None:
    model, (x, y) = network(), data(100)
    want = flatcore.evaluate(model, loader(x, y))
    for other in (DataLoader(TensorDataset(x, y), batch_size=7), iter(loader(x, y, 9)), [[x, y]]):
        found = flatcore.evaluate(model, other, progress=False)
        assert found["layerwise"].log_mean == pytest.approx(want["layerwise"].log_mean, rel=1e-6)
    assert flatcore.evaluate(model, DataLoader(_Endless(), batch_size=4)).groups["all"].rows == 1
    with pytest.raises(KeyError, match="the report has loss, hessian_trace"):
        want["flatness"]


def test_progress_bar_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    flatcore.evaluate(network(), loader(*data(100)), progress=True)
    assert "evaluating" in capsys.readouterr().err
    for progress in (None, False):
        flatcore.evaluate(network(), loader(*data(100)), progress=progress)
        assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------------- read once
def test_the_loader_is_read_once_and_the_model_runs_once_a_batch() -> None:
    model, (x, y) = network(), data(200)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for options in ({}, {"input_gradient_norms": True}):
        calls.clear()
        flatcore.evaluate(model, iter(loader(x, y, 50)), **options)
        assert len(calls) == 4
