"""The works W1 to W6 by count, and the table of docs/cuda.md: ``python tests/count_works.py --write`` renews it.

Ours is counted on the real Python path at the works' own sizes, kernels over emulated threads that do not run (counting.py);
eager is the best of the plain forms that the benchmark times, on meta tensors. The works, their questions and the forms are
the benchmark's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from counting import RATES, Counter, counted, counted_eagerly, on_the_kernels_path
from hot_kernels import HOT
from torch import Tensor

from flatcore._bench import candidates, works
from flatcore._bench import inputs as drawn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/cuda.md"
BEFORE = {"W4-trace": "21,000 launches", "W6-forward": "23, 25", "W6-backward": "82, 77"}
"""Launches and allocations before the present kernels: of W4 in chunks of 175 rows, as estimated then; of W6 without the
kernels for a measure and without a bias, as counted then."""
OVER = {
    "W3-trace": "15 launches against 8 (two blocks of rows, a measure from its log); float64 exponentials, for the bias",
    "W3-neuronwise": "the product of the shares has D = 2,048 columns, that of eager's Gram matrix 1,000; and 38 launches",
    "W4-trace": "two launches for each tile and block keep the logits out of memory, 4.2 GB in eager; float64 exponentials",
    "W4-neuronwise": "the shares' product in three pieces of bfloat16, 24 bits, where eager multiplies 8 bits once; "
    "ten launches for each tile and block",
}
"""Works that exceed the best eager form by count, and why."""
HEADER = "| work | launches, allocations | before | bytes | operations, 10⁹ | by count: ours | best eager | bound |"


COMPILED = "| work | kernel | registers | shared bytes | blocks | instructions | to issue them | what they are |"
COMPILED_TEXT = """\
The kernels that this time goes to, as nvcc 13.0 leaves them for sm_80 / sm_90 (`tests/hot_kernels.py`; compared with the
compiled code, 25 % either way, by `tests/test_cuda_compiled.py`): no stack frame, registers a thread, static shared memory a
block, blocks that a multiprocessor holds, and the instructions of the loop that the work is done in, counted in the
disassembly, branches that are rare included. To issue them takes about what the next figure says of sm_90, at an instruction
a lane and clock, half the float32 rate above: it is no part of the time by count. W3's and W4's kernels run between products
and not beside them."""
START, END = "<!-- python tests/count_works.py --write -->", "<!-- end -->"


# ------------------------------------------------------------------------------------------------- the benchmark's works
WORKS: dict[str, Any] = {
    work.key: work.on("cuda")
    for work in works.WORKS
    if re.match(r"W[1-6]\b", work.key) and work.rows != "twins" and (not work.backward or work.number == "W6")
}
Ready = Callable[[Any], Callable[[], Any]]
"""From inputs to the call that is counted: what is made of them beforehand is not."""


def resized(work: Any, **sizes: int) -> Any:
    """The same question at other sizes."""
    return dataclasses.replace(work, **sizes)


def answers(work: Any) -> tuple[Ready, dict[str, Ready]]:
    """Who answers: flatcore, and the plain forms by name."""
    (native, *forms), _ = candidates.candidates(work, compile=False, reference=False)
    eager = (form for form in forms if form.role == "eager")
    return native.prepare, {form.name.removeprefix("eager, "): form.prepare for form in eager}


def numbers(work: Any) -> Any:
    """Inputs as the benchmark draws them."""
    return drawn.inputs(work)


def inputs(work: Any, device: str) -> Any:
    """Inputs without numbers: nothing touches their memory."""

    def empty(*shape: int, dtype: str = work.dtype) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)

    if not work.C:
        return drawn.Inputs(empty(work.N, work.D))
    target = empty(work.N, dtype="int64")
    return drawn.Inputs(empty(work.N, work.D), empty(work.C, work.D), empty(work.C), target)


# ------------------------------------------------------------------------------------------------------------- the counts
class Counts(NamedTuple):
    """A work's counts: ours, the best plain form's by time, and that form's name."""

    ours: Counter
    eager: Counter
    form: str


def counted_work(work: Any, x: Any = None) -> Counter:
    """What flatcore asks for; without inputs nothing is run."""
    native, _ = answers(work)
    with torch.no_grad(), on_the_kernels_path():
        return counted(native(inputs(work, "cpu") if x is None else x), dry=x is None)[1]


def counted_forms(work: Any) -> dict[str, Counter]:
    """What each plain form asks for."""
    x = inputs(work, "meta")
    with torch.no_grad():
        return {name: counted_eagerly(form(x)) for name, form in answers(work)[1].items()}


@functools.cache
def counts(key: str) -> Counts:
    """Of one work at its own size."""
    eager = counted_forms(WORKS[key])
    form = min(eager, key=lambda name: eager[name].time)
    return Counts(counted_work(WORKS[key]), eager[form], form)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.3g} µs" if seconds < 999e-6 else f"{seconds * 1e3:,.3g} ms"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.3g} MB" if nbytes < 999e6 else f"{nbytes / 1e9:,.3g} GB"


def row(key: str) -> str:
    """The work's line."""
    ours, eager, form = counts(key)
    operations = sum(ours.operations.values()) / 1e9
    cells = (
        key, f"{ours.launches:,}, {ours.allocations}", BEFORE.get(key, ""), _size(ours.bytes),
        f"{operations:,.3g}" if operations < 1000 else f"{operations:,.0f}",
        _time(ours.time), f"{_time(eager.time)} ({form}; {eager.launches})", ours.bound,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All lines."""
    return "\n".join((HEADER, "|---|---|---|---:|---:|---:|---|---|", *map(row, WORKS)))


def compiled_table() -> str:
    """What the compiler left of the kernels that this time goes to: hot_kernels.py."""
    lines = [COMPILED, "|---|---|---|---:|---|---|---:|---|"]
    for hot in HOT:
        issued = hot.instructions[1] * hot.count / (RATES["single"] / 2)
        registers, blocks = (" / ".join(f"{n:g}" for n in pair) for pair in (hot.registers, hot.blocks))
        cells = (
            hot.work, f"`{hot.name}`", registers, f"{hot.shared:,}", blocks,
            f"{' / '.join(f'{n:.3g}' for n in hot.instructions)} {hot.unit}", _time(issued), hot.why,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def block() -> str:
    """What the page has between its marks."""
    over = (f"- {key}: {why}." for key, why in OVER.items())
    return "\n".join((table(), "", "Over eager by this count:", *over, "", COMPILED_TEXT, "", compiled_table()))


def written() -> str:
    """The same as the page has it now."""
    return PAGE.read_text().split(f"{START}\n")[1].split(f"\n{END}")[0]


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the table of docs/cuda.md")
    found = block()
    if parser.parse_args().write:
        before, after = PAGE.read_text().split(f"{START}\n{written()}\n{END}")
        PAGE.write_text(f"{before}{START}\n{found}\n{END}{after}")
    print(found)


if __name__ == "__main__":
    main()
