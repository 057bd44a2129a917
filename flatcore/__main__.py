"""The command line: ``python -m flatcore``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__, show_config

_EXAMPLES = """\
examples:
  python -m flatcore demo                          train on digits, measure, and write flatcore-demo/
  python -m flatcore demo --out /tmp/run --seed 3  another network, another folder
  python -m flatcore config                        what was compiled and what runs here

exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted
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
        "logit gap above 15, measure it, print a table, and write digits.csv and digits.png (seconds on 2 cores). "
        "Needs the packages of flatcore[demo].",
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
    commands.add_parser(
        "config",
        help="print what was compiled, what is usable here and what would run",
        description="Print flatcore.show_config(): what was compiled, what is usable here and what would run.",
    )
    return parser


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


def _fail(sentence: str) -> int:
    print(f"flatcore: {sentence}", file=sys.stderr)
    return 1


def _run_demo(arguments: argparse.Namespace) -> int:
    try:
        from ._demo import run
    except ImportError as error:
        package = (error.name or "a package").partition(".")[0]
        return _fail(
            f"the demo needs {_DISTRIBUTIONS.get(package, package)}, which cannot be imported ({error}); "
            "pip install 'flatcore[demo]' brings it."
        )
    run(arguments.out, arguments.seed, arguments.epochs_max)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version (0) and wrong usage (2): argparse has printed what there is to say
        return int(stop.code or 0)
    try:
        status = _run_demo(arguments) if arguments.command == "demo" else _print_config()
        sys.stdout.flush()
        return status
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
