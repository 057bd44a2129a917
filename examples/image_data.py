"""The images that the examples train on, the small network that learns them, and its training; no example itself."""

from __future__ import annotations

import gzip
import pickle
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


class Data(NamedTuple):
    """Images (N, 1, S, S) in [0, 1] and labels, with what training and attacking them takes."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    epochs: int
    batch: int
    epsilon_linf: float
    epsilon_l2: float


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Bytes of one gzipped IDX file, in its own shape."""
    start = 4 * (1 + dimensions)
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""
    header = np.frombuffer(content[:start].ljust(start, b"\0"), ">i4")
    if header[0] != 0x0800 + dimensions or len(content) != start + header[1:].prod():
        raise OSError(0, f"it is no gzipped IDX file of bytes in {dimensions} dimensions", str(path))
    return np.frombuffer(content, np.uint8, offset=start).reshape(header[1:])


def fashion_mnist(folder: Path) -> Data:
    """Read the data set from its four files.

    Raises:
        OSError: A file is missing, cannot be read, or is no IDX file.
    """
    arrays = []
    for part in ("train", "t10k"):
        images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        arrays += [torch.tensor(images / np.float32(255)).unsqueeze(1), torch.tensor(labels.astype(np.int64))]
    return Data("Fashion-MNIST", *arrays, epochs=6, batch=128, epsilon_linf=0.05, epsilon_l2=1.0)


def digits(seed: int) -> Data:
    """scikit-learn's 1,797 digits of 8x8 pixels, 540 of them for testing."""
    bundle = load_digits()
    images = torch.tensor(bundle.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bundle.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, rest = order.split([540, len(labels) - 540])
    return Data(
        "digits", images[rest], labels[rest], images[test], labels[test],
        epochs=20, batch=64, epsilon_linf=0.2, epsilon_l2=1.0,
    )  # fmt: skip


def network(size: int) -> nn.Sequential:
    """Two convolutions and two linear layers for one-channel images of ``size`` x ``size`` pixels; the last is the head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute on so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(data: Data, seed: int, perturb: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None) -> nn.Sequential:
    """Train with Adam and one cycle of the learning rate; the caller's random state is left as it was.

    ``perturb`` (model, images, labels) returns the images to train on in their place, as adversarial training does.
    """
    # batches of digits are too small to share: threads would spend the time waiting for one another
    number = 1 if data.train_images.shape[-1] < 16 else torch.get_num_threads()
    with threads(number), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(data.train_images.shape[-1])
        per_epoch = -(-len(data.train_labels) // data.batch)
        optimiser = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=data.epochs * per_epoch)
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=data.epochs * per_epoch, desc="training", disable=None) as bar:
            for _ in range(data.epochs):
                for batch in torch.randperm(len(data.train_labels)).split(data.batch):
                    images, labels = data.train_images[batch], data.train_labels[batch]
                    if perturb is not None:
                        images = perturb(model, images, labels)
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(model(images), labels).backward()
                    optimiser.step()
                    schedule.step()
                    bar.update()
    return model


def trained(
    data: Data, seed: int, out: Path,
    perturb: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None, kind: str = "cnn",
) -> nn.Sequential:  # fmt: skip
    """Load the weights of an earlier run from ``out``; without any, train and keep them there."""
    path = out / f"{data.name.lower()}-{kind}-{data.epochs}-epochs-seed-{seed}.pt"
    model = network(data.train_images.shape[-1])
    if path.exists():
        try:
            model.load_state_dict(torch.load(path, weights_only=True))
            print(f"Weights of an earlier run: {path}")
            return model.eval().requires_grad_(False)
        except (RuntimeError, EOFError, AttributeError, TypeError, pickle.UnpicklingError):
            print(f"{path} holds no weights of this network: training anew.")
    start = time.perf_counter()
    model = train(data, seed, perturb)
    print(f"Trained for {data.epochs} epochs in {time.perf_counter() - start:.1f} s; weights: {path}")
    unfinished = path.with_suffix(".part")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model.eval().requires_grad_(False)


def choose(folder: Path | None, quick: bool, seed: int) -> Data:
    """Fashion-MNIST where it is, else (or for a quick run) the digits.

    Raises:
        OSError: as :func:`fashion_mnist`.
    """
    if not quick and (folder or FASHION_MNIST.is_dir()):
        return fashion_mnist(folder or FASHION_MNIST)
    if not quick:
        print(f"There is no {FASHION_MNIST} (Debian's package dataset-fashion-mnist): scikit-learn's digits instead.")
    return digits(seed)
