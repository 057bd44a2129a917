"""The command line: ``python -m flatcore``."""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import __version__, check, show_config
from ._arguments.checks import check_norm

_EXAMPLES = """\
examples:
  python -m flatcore demo                          train on digits, measure, and write flatcore-demo/
  python -m flatcore demo --out /tmp/run --seed 3  another network, another folder
  python -m flatcore config                        what was compiled and what runs here
  python -m flatcore check                         whether it computes right on this machine
  python -m flatcore bench --quick                 how fast it is here, beside the others (two minutes)

A factory is a function of yours that returns (model, loader), named package.module:function:
  python -m flatcore evaluate mine:trained --out report
  python -m flatcore attack-path mine:trained --norm inf --eps 0.03
  python -m flatcore sweep mine:trained --norm 2 --eps 0.5 --scales 1 10 100

exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted
"""
_FACTORY = """\
example, with mine.py in this folder:
  import torch
  def trained():
      model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
      data = torch.utils.data.TensorDataset(torch.rand(100, 8, 8), torch.arange(100) % 10)
      return model, torch.utils.data.DataLoader(data, batch_size=50)

  python -m flatcore {command} mine:trained{options}
"""
_BENCH = """\
works:
  W1, W2  head_metrics, all fields, 10 and 100 classes
  W3, W4  the trace and neuronwise of a head of 1,000 classes, and of a vocabulary; -twins: 1 % of the rows between
          nearly equal classes; -backward: the gradient
  W5      row_norms
  W6      a training batch's flatness; -backward: with its gradient
  W7      the exact trace of a data set's Hessian, beside BackPACK, curvlinops, PyHessian and hessian-eigenthings
  W8      the loss and its exact gradient by the logits
  W9      a training step with the regulariser, over one without
  growth  over N, D, C and dtypes

examples:
  python -m flatcore bench                              everything, about 30 minutes on 2 cores
  python -m flatcore bench --quick                      fewer rounds and rows, two minutes
  python -m flatcore bench --works W1,W3-trace,growth   some works
  python -m flatcore bench --device cuda                the works at a GPU's sizes
  python -m flatcore bench compare A.json B.json        what changed beyond the spread
  python -m flatcore bench draw A.json                  a report's pictures again

Answers are checked before and after timing. Exit status: 1 if one was wrong.
"""
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""What pip calls a module of another name."""


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flatcore",
        description="Exact flatness metrics of a network's last layer, right at every confidence.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flatcore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a small network on scikit-learn's digits and report on its test images",
        description="Train a small network on scikit-learn's digits until a fifth of its test images have a top-two "
        "logit gap above 15, measure it, print a table, and write digits.csv, digits.png and the report digits.html "
        "(seconds on 2 cores). Needs the packages of flatcore[demo].",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("flatcore-demo"), metavar="DIR",
        help="folder for the files, made if absent; older ones of these names are replaced (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--seed", type=_integer(0, 2**63 - 1), default=0, metavar="N",
        help="seed of the split, the initial weights and the order of training (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--epochs-max", type=_integer(1, 100_000), default=500, metavar="N",
        help="stop the training after so many epochs at the latest (default: %(default)s)",
    )  # fmt: skip
    _add_model_commands(commands)
    checking = commands.add_parser(
        "check",
        help="compare this machine's kernels with exact answers",
        description="Compare the kernels of this machine, on its processor and its GPUs, with exact answers that came with "
        "the package: about 100 small calls for each CPU target, device and path. Prints a table with the worst error in "
        "tolerances (1 is the last that passes); a failure names the case, what was wanted and what came. Seconds.",
    )
    checking.add_argument(
        "--device", choices=("cpu", "cuda", "all"), default="all", metavar="cpu|cuda|all",
        help="cuda: every CUDA device, and a failure where none can be used; all: the CPU and the CUDA devices that are "
        "here (default: %(default)s)",
    )  # fmt: skip
    checking.add_argument(
        "--full", action="store_true", help="large sizes too; on CUDA also a second stream, a graph capture and times"
    )
    _add_bench(commands)
    commands.add_parser(
        "config",
        help="print what was compiled, what is usable here and what would run",
        description="Print flatcore.show_config(): what was compiled, what is usable here and what would run.",
    )
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def _norm(text: str) -> float:
    try:
        return check_norm(2 if text == "2" else text, "norm", (2, math.inf))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be 2 or inf, got {text!r}") from None


def _add_model_commands(commands: Any) -> None:
    def add(name: str, out: str, brief: str, description: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=brief, description=textwrap.fill(description + " Needs the packages of flatcore[lab].", 78),
            epilog=_FACTORY.format(command=name, options="" if name == "evaluate" else " --norm inf --eps 0.03"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument(
            "factory", metavar="package.module:function", help="a function that returns (model, loader); the loader "
            "yields (inputs, target)",
        )  # fmt: skip
        parser.add_argument(
            "--out", type=Path, default=Path(out), metavar="DIR", help="folder for the files (default: %(default)s)"
        )
        parser.add_argument(
            "--head", metavar="NAME", help="name of the head (default: the last linear layer that runs)"
        )
        parser.add_argument("--device", metavar="NAME", help="a device that the model must be on (default: its own)")
        return parser

    parser = add(
        "evaluate", "flatcore-report", "measure a model of yours on a data set and write a report",
        "Measure a model on a data set, print a summary, and write report.html, report.json and rows.csv. Under torchrun "
        "every process takes its share.",
    )  # fmt: skip
    parser.add_argument("--input-gradients", action="store_true", help="measure input-gradient norms too")
    parser.add_argument(
        "--temperature", type=_positive, default=1.0, metavar="T", help="the model divides its logits by T (default: 1)"
    )
    parser.add_argument(
        "--ignore-index", type=int, default=-100, metavar="LABEL", help="label of rows left out (default: %(default)s)"
    )
    attacks = (
        add(
            "attack-path", "flatcore-attack-path", "follow flatness along an attack on a model of yours",
            "Attack the first samples of a loader by projected gradient descent and follow flatness, loss and gradients; "
            "print medians, and write attack_path.csv and attack_path.png.",
        ),
        add(
            "sweep", "flatcore-sweep", "attack a model of yours at several scales of its head",
            "Scale the head without training again, attack with the usual and with the exact gradient, print what looks "
            "robust, and write scaling_sweep.json and scaling_sweep.png.",
        ),
    )  # fmt: skip
    for parser in attacks:
        parser.add_argument("--norm", type=_norm, required=True, metavar="2|inf", help="norm of the attack")
        parser.add_argument("--eps", type=_positive, required=True, help="radius, in the inputs' units")
        parser.add_argument("--step", type=_positive, help="length of a step (default: 2.5 eps / steps)")
        parser.add_argument("--steps", type=_integer(1, 100_000), default=10, help="(default: %(default)s)")
        parser.add_argument("--random-start", action="store_true", help="start at a random point of the ball")
        parser.add_argument(
            "--clip", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
            help="range of the inputs (default: 0 1)",
        )  # fmt: skip
        parser.add_argument("--no-clip", action="store_true", help="inputs have no range")
        parser.add_argument(
            "--samples", type=_integer(1, 10**9), default=1000, metavar="N", help="(default: %(default)s)"
        )
        parser.add_argument(
            "--seed", type=_integer(0, 2**63 - 1), default=0, metavar="N", help="(default: %(default)s)"
        )
    path, sweep = attacks
    path.add_argument("--gradient", choices=("exact", "usual"), default="exact", help="(default: %(default)s)")
    path.add_argument("--chunk", type=_integer(1, 10**9), default=250, metavar="N", help="samples at a time")
    sweep.add_argument(
        "--scales", type=_positive, nargs="+", default=[0.25, 1.0, 5.0, 10.0, 50.0, 100.0], metavar="S",
        help="(default: 0.25 1 5 10 50 100)",
    )  # fmt: skip
    sweep.add_argument(
        "--gradients", choices=("exact", "usual"), nargs="+", default=["usual", "exact"], help="(default: both)"
    )


def _add_bench(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time this machine: flatcore, the best plain PyTorch, other tools, and the limit",
        description=textwrap.fill(
            "Time flatcore's functions on this machine beside the best plain PyTorch, torch.compile of it, other tools and "
            "the machine's own limit, all in turn in one run; print a table for each work, and write bench.json, bench.md "
            "and three pictures: ratios, roofline, growth. Needs the packages of flatcore[bench].", 78,
        ),
        epilog=_BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what is timed; a GPU has larger sizes (default: cpu)"
    )
    parser.add_argument(
        "--works", metavar="W1,W3-trace,...", help="which works, as listed below (default: all, and growth)"
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="fewer rounds, fewer rows of the slow works, no torch.compile, no memory; the tables say so",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("flatcore-bench"), metavar="PATH",
        help="folder for the files, or the name of the JSON file, beside which the others go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=_integer(1, 4096), metavar="N", help="threads of the CPU (default: torch's)")
    parser.add_argument("--seconds", type=_positive, metavar="S", help="begin no work when so many have passed")
    for name, what in (
        ("native", "do without flatcore's kernels: only the others and the limits"), ("compile", "leave torch.compile out"),
        ("memory", "measure no memory, for which each candidate runs in a process of its own"),
        ("pictures", "draw nothing, and do without matplotlib"),
    ):  # fmt: skip
        parser.add_argument(f"--no-{name}", dest=name, action="store_false", help=what)
    others = parser.add_subparsers(dest="what", metavar="compare|draw", required=False)
    comparing = others.add_parser(
        "compare", help="say what changed between two reports beyond the spread",
        description="Compare two reports of one machine: each candidate's ratio of medians, faster or slower only where the "
        "ranges from the 10th to the 90th percentile do not meet; and what differs in provenance.",
    )  # fmt: skip
    comparing.add_argument("before", type=Path, metavar="A.json")
    comparing.add_argument("after", type=Path, metavar="B.json")
    comparing.add_argument("--force", action="store_true", help="even if the machines or the threads differ")
    drawing = others.add_parser(
        "draw", help="draw a report's pictures beside it", description="Draw a report's pictures."
    )
    drawing.add_argument("report", type=Path, metavar="A.json")


def _print_config() -> int:
    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {item}" for key, item in value.items())
        if isinstance(value, tuple):
            return ", ".join(map(str, value)) or "none"
        if value is None or isinstance(value, bool):
            return {None: "none", True: "yes", False: "no"}[value]
        return str(value)

    config = show_config()
    width = max(map(len, config))
    for key, value in config.items():
        print(f"{key:<{width}}  {text(value)}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    found = check(None if arguments.device == "all" else arguments.device, full=arguments.full)
    print(found)
    return 0 if found.ok else 1


def _fail(sentence: str) -> int:
    print(f"flatcore: {sentence}", file=sys.stderr)
    return 1


def _run(arguments: argparse.Namespace) -> int:
    name, extra = {"demo": ("the demo", "demo"), "bench": ("bench", "bench")}.get(
        arguments.command, (arguments.command, "lab")
    )
    try:
        from ._cli import commands

        if arguments.command == "demo":
            from ._cli import demo

            demo.run(arguments.out, arguments.seed, arguments.epochs_max)
            return 0
        if arguments.command == "bench":
            from ._cli import bench

            return _told(bench.run, arguments)
    except ImportError as error:
        package = (error.name or "a package").partition(".")[0]
        return _fail(
            f"{name} needs {_DISTRIBUTIONS.get(package, package)}, which cannot be imported ({error}); "
            f"pip install 'flatcore[{extra}]' brings it."
        )
    run = {
        "evaluate": commands.run_evaluate, "attack-path": commands.run_attack_path, "sweep": commands.run_sweep
    }[arguments.command]  # fmt: skip
    return _told(run, arguments)


def _told(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; what stops it is a sentence."""
    from ._cli.commands import CommandError

    try:
        return run(arguments)
    except (CommandError, TypeError, ValueError, RuntimeError, ImportError) as error:
        return _fail(f"{str(error).rstrip('.')}.")


@contextmanager
def _replacing(stream: Any) -> Iterator[None]:
    """Write what the stream's encoding lacks as an escape (as standard error does), rather than fail."""
    before = getattr(stream, "errors", None)
    if before is None or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version (0) and wrong usage (2): argparse has printed what there is to say
        return int(stop.code or 0)
    try:
        with _replacing(sys.stdout):
            if arguments.command == "config":
                status = _print_config()
            elif arguments.command == "check":
                status = _check(arguments)
            else:
                status = _run(arguments)
            sys.stdout.flush()
        return status
    except SystemExit as stop:  # of the model or the loader: nothing was finished
        return _fail(f"the command was ended by sys.exit({'' if stop.code is None else repr(stop.code)}).")
    except KeyboardInterrupt:
        _fail("interrupted.")
        return 130
    except BrokenPipeError:
        # the reader of our output has gone (| head); a sink keeps the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"cannot use {error.filename or 'the output'}: {error.strerror or error}.")


if __name__ == "__main__":
    sys.exit(main())
