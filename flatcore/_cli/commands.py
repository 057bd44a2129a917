"""What the commands do that work on a user's model: find it, measure it, write files, print a summary."""

from __future__ import annotations

import argparse
import csv
import errno
import importlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from .._report.evaluate import evaluate
from .._report.loading import batches, check_module, device_of, evaluation_mode
from .._report.report import dumps, number, write


class CommandError(Exception):
    """A sentence for the user."""


def load(place: str) -> tuple[nn.Module, Any]:
    """Call the factory named ``package.module:function`` and return its (model, loader).

    Raises:
        CommandError: it does not exist, raises, or returns something else.
    """
    name, colon, function = place.partition(":")
    if not (name and colon and function):
        raise CommandError(f"a factory is named package.module:function, got {place!r}")
    if str(Path.cwd()) not in sys.path:  # as python -m does; the installed command does not
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise CommandError(f"there is no module {error.name!r} (looked for from {Path.cwd()})") from None
        raise CommandError(f"importing {name} failed: {type(error).__name__}: {error}") from None
    except SystemExit as stop:
        raise CommandError(
            f"importing {name} {_ended(stop)}: what it does as a script belongs under if __name__ == '__main__'"
        ) from None
    except Exception as error:
        raise CommandError(f"importing {name} failed: {type(error).__name__}: {error}") from None
    try:
        factory = getattr(module, function)
    except AttributeError:
        raise CommandError(f"module {name} has no {function!r}") from None
    if not callable(factory):
        raise CommandError(f"{place} is no function, but a {type(factory).__qualname__}")
    try:
        found = factory()
    except SystemExit as stop:
        raise CommandError(f"{place} {_ended(stop)} instead of returning (model, loader)") from None
    except Exception as error:
        call = f"python -c 'import {name}; {name}.{function}()'"
        raise CommandError(f"{place} raised {type(error).__name__}: {error} (to see where: {call})") from None
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not isinstance(found[0], nn.Module):
        raise CommandError(f"{place} must return (model, loader), a torch.nn.Module first, got {_described(found)}")
    return found[0], found[1]


def _ended(stop: SystemExit) -> str:
    return f"called sys.exit({'' if stop.code is None else repr(stop.code)})"


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__qualname__} of {', '.join(type(x).__qualname__ for x in value) or 'nothing'}"
    return f"a {type(value).__qualname__}"


def check_writable(path: Path) -> None:
    """Raise OSError now rather than after the work; the folder is made."""
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    path.open("ab").close()
    if not existed:
        path.unlink()


def require(*packages: str, extra: str = "lab") -> None:
    """Say now, and not after the work, what is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{package} is not installed; pip install 'flatcore[{extra}]' brings it")


def _save(out: Path, files: dict[str, Callable[[Path], None]], summary: str) -> int:
    """Write files into a folder, and say so after the summary: printing may fail, and then they are there.

    Those that cannot be written there go into a new one, so that nothing is lost.
    """
    spare: Path | None = None
    written = []
    for name, save in files.items():
        path = out / name
        try:
            save(path)
        except OSError as error:
            if spare is None:
                spare = Path(tempfile.mkdtemp(prefix="flatcore-"))
            print(f"flatcore: cannot write {path} ({error.strerror or error}): writing it to {spare}.", file=sys.stderr)
            path = spare / name
            save(path)
        written.append(f"Written: {path}")
    print(summary, *written, sep="\n")
    return 0 if spare is None else 1


def run_evaluate(arguments: argparse.Namespace) -> int:
    """``evaluate``: rows.csv, report.json and report.html."""
    require("matplotlib", "jinja2")
    with _processes() as first:
        return _evaluate(arguments, first)


def _evaluate(arguments: argparse.Namespace, first: bool) -> int:
    out = arguments.out.absolute()
    names = ("report.html", "report.json", "rows.csv")
    if first:
        for name in names:
            check_writable(out / name)
    model, loader = load(arguments.factory)
    report = evaluate(
        model, loader, head=arguments.head, device=arguments.device, temperature=arguments.temperature,
        ignore_index=arguments.ignore_index, input_gradient_norms=arguments.input_gradients,
        progress=None if first else False,
    )  # fmt: skip
    if not first:
        return 0
    status = _save(
        out,
        {
            "rows.csv": report.to_csv,
            "report.json": report.to_json,
            "report.html": lambda path: report.to_html(path, title=f"Flatness of {arguments.factory}"),
        },
        repr(report),
    )
    if missing := report.info.get("missing_rows"):
        print(f"flatcore: {missing} rows of the data set are missing; the files are about the others.", file=sys.stderr)
        return 1
    if not report.complete:
        print("flatcore: interrupted; the files hold what was measured before.", file=sys.stderr)
        return 130
    return status


@contextmanager
def _processes() -> Iterator[bool]:
    """Under torchrun, work with the other processes; yield whether this one is the first, which prints and writes."""
    joined = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and not dist.is_initialized()
    if joined:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group()
    try:
        yield not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if joined:
            dist.destroy_process_group()  # its threads abort an interpreter that ends before them


def _attack_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "norm": arguments.norm, "eps": arguments.eps, "step": arguments.step or 2.5 * arguments.eps / arguments.steps,
        "steps": arguments.steps, "random_start": arguments.random_start,
        "clip": None if arguments.no_clip else tuple(arguments.clip),
    }  # fmt: skip


def _first_samples(loader: Any, number_wanted: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parts, count = [], 0
    for inputs, target in batches(loader):
        parts.append((inputs[: number_wanted - count].to(device), target[: number_wanted - count].to(device)))
        count += len(parts[-1][0])
        if count >= number_wanted:
            break
    return parts


def run_attack_path(arguments: argparse.Namespace) -> int:
    """``attack-path``: attack_path.csv, one row per sample and step, and attack_path.png."""
    from ..robustness import attack_path

    require("matplotlib")
    out = arguments.out.absolute()
    for name in ("attack_path.csv", "attack_path.png"):
        check_writable(out / name)
    model, loader = load(arguments.factory)
    place = device_of(check_module(model), arguments.device)
    torch.manual_seed(arguments.seed)
    with evaluation_mode(model):
        parts = _first_samples(loader, arguments.samples, place)
        inputs, target = (torch.cat(column) for column in zip(*parts, strict=True))
        path = attack_path(
            model, inputs, target, gradient=arguments.gradient, head=arguments.head, chunk_size=arguments.chunk,
            **_attack_options(arguments),
        )  # fmt: skip
    names = path._fields[:-1]
    columns = [getattr(path, name).cpu() for name in names]
    shown = ("log_layerwise", "log_neuronwise", "log_input_gradient_norm", "margin")
    lines = [f"{'step':>4} {'correct':>8}  medians:" + "".join(f"  {name}" for name in shown)]
    for k in range(len(path.correct)):
        medians = [getattr(path, name)[k].double().quantile(0.5).item() for name in shown]
        cells = "".join(f"  {m:>{len(name)}.4g}" for name, m in zip(shown, medians, strict=True))
        lines.append(f"{k:>4} {path.correct[k].double().mean().item():>8.3f}  {'':8}{cells}")

    def save(file: Path) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(("step", "row", "target", *names))
        texts = [(c.to(torch.int64) if c.dtype == torch.bool else c).numpy().astype(str) for c in columns]
        labels = target.tolist()
        for k in range(len(path.correct)):
            writer.writerows((k, n, labels[n], *(c[k, n] for c in texts)) for n in range(len(labels)))
        write(file, text.getvalue())

    files = {"attack_path.csv": save, "attack_path.png": lambda file: _draw(path.plot(shown[:3]), file)}
    return _save(out, files, "\n".join(lines))


def _draw(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=160, format="png")


def run_sweep(arguments: argparse.Namespace) -> int:
    """``sweep``: scaling_sweep.json and scaling_sweep.png."""
    from ..robustness import plot_scaling, scaling_sweep
    from ..robustness._scaling import Quantiles

    require("matplotlib")
    out = arguments.out.absolute()
    for name in ("scaling_sweep.json", "scaling_sweep.png"):
        check_writable(out / name)
    model, loader = load(arguments.factory)
    place = device_of(check_module(model), arguments.device)
    torch.manual_seed(arguments.seed)
    found = scaling_sweep(
        model, _first_samples(loader, arguments.samples, place), arguments.scales, gradient=tuple(arguments.gradients),
        head=arguments.head, device=arguments.device, **_attack_options(arguments),
    )  # fmt: skip
    lines = [
        f"{'scale':>8} {'gradient':>9} {'clean':>7} {'robust':>7} {'median loss increase':>21} {'median flatness':>16}"
    ]
    for r in found:
        flatness = number(r.log_layerwise.q50)
        lines.append(
            f"{r.scale:>8g} {r.gradient:>9} {r.clean_accuracy:>7.3f} {r.robust_accuracy:>7.3f} "
            f"{r.loss_increase.q50:>21.4g} {flatness:>16}"
        )
    plain = [{k: v._asdict() if isinstance(v, Quantiles) else v for k, v in r._asdict().items()} for r in found]
    return _save(
        out,
        {
            "scaling_sweep.json": lambda file: write(file, dumps(plain)),
            "scaling_sweep.png": lambda file: _draw(plot_scaling(found), file),
        },
        "\n".join(lines),
    )
