"""Draw calls of the public functions, compute them on every path, and hold each number against the exact one.

    python tests/fuzz.py --cases 10000 --seed 0
    python tests/fuzz.py --minutes 60 --seed 1 --function layerwise --function neuronwise --path chunked-avx2
    python tests/fuzz.py --seed 0 --only 4711        one case again, with its reproduction

A case is one drawn call (``strategies.py``) on each of the paths. Case i of a seed is the same on every machine and
whatever ran before it, under the same restrictions. Truth and tolerances: ``oracles.py`` and
``flatcore/_check/tolerance.py``.
"""

from __future__ import annotations

import argparse
import base64
import math
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # flatcore's Python from this tree

import oracles
import torch
from answers import OPEN, ORDS, Answers, Found, check
from strategies import FLOATS, FUNCTIONS, GRADIENT_NORMS, KINDS, Call, Seeded, draw_call
from torch import Tensor

import flatcore
from flatcore._engine import paths as engine_paths

CUDA = ("cuda-fused", "cuda-chunked")
LONGEST_FUSED = 4096


def paths() -> tuple[str, ...]:
    """All that run on this CPU; the emulated CUDA kernels, which have to be compiled first, are asked for by name."""
    targets = flatcore.show_config()["cpu_targets"]
    return ("reference", *(f"{kind}-{target}" for kind in ("fused", "chunked") for target in targets))


@contextmanager
def on_path(name: str) -> Iterator[None]:
    """Force the path, and require that nothing else ran."""
    with ExitStack() as stack:
        engine_paths.last_path = None
        kind, _, target = name.partition("-")
        if name == "reference":
            stack.enter_context(flatcore.backend("reference"))
        elif kind == "cuda":
            import emulation

            stack.enter_context(flatcore.backend("native"))
            stack.enter_context(engine_paths.forced(path="chunked" if target == "chunked" else None))
            stack.enter_context(emulation.cuda_kernels())
        else:
            stack.enter_context(flatcore.backend("native"))
            stack.enter_context(engine_paths.forced(path=kind, cpu=target))
        yield


# -------------------------------------------------------------------------------------------------------- reproduction
def only_row(call: Call, n: int) -> Call:
    """The same call of one row."""
    rows = slice(n, n + 1)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows].clone()

    upstream = call.upstream if call.upstream is None or call.upstream.dim() == 0 else cut(call.upstream)
    return replace(
        call, features=cut(call.features), logits=cut(call.logits), target=cut(call.target), nothing=cut(call.nothing),
        upstream=upstream,
    )  # fmt: skip


def reproduction(call: Call, path: str) -> str:
    """A program that makes the call again, without this file."""
    lines = [
        "import base64, zlib, torch, flatcore",
        "from flatcore._engine import paths",
        "nan, inf = float('nan'), float('inf')",
    ]
    names = {"features": call.features, "weight": call.weight, "bias": call.bias, "logits": call.logits,
             "target": call.target, "class_weight": call.class_weight, "upstream": call.upstream}  # fmt: skip
    for name, tensor in names.items():
        lines.append(f"{name} = {_literal(tensor)}")
    kind, _, target = path.partition("-")
    force = "flatcore.backend('reference')" if path == "reference" else f"paths.forced(path={kind!r}, cpu={target!r})"
    arguments = f"linear_bias=bias, logits=logits, temperature={call.temperature}, ignore_index={call.ignore_index}"
    reduced = f"reduction={call.reduction!r}, log={call.log}"
    if call.function == "head_metrics":
        line = f"flatcore.head_metrics(features, weight, target, {arguments})"
    elif call.function == "unmasked_cross_entropy":
        line = (f"flatcore.unmasked_cross_entropy(logits, target, reduction={call.reduction!r}, "
                f"ignore_index={call.ignore_index})")  # fmt: skip
    elif call.function == "input_gradients":
        line = (f"flatcore.input_gradients(lambda x: x @ weight.T, features, target, "
                f"ignore_index={call.ignore_index})")  # fmt: skip
    elif call.function in GRADIENT_NORMS:
        ord = {1: "1", 2: "2", math.inf: "inf"}[ORDS[call.function]]
        line = f"flatcore.feature_gradient_norms(features, weight, target, {arguments}, ord={ord}, {reduced})"
    else:
        arguments += f", weight=class_weight, include_bias={call.include_bias}, {reduced}"
        name = "hessian_trace" if call.function == "hessian_trace" else "relative_flatness"
        if name == "relative_flatness":
            arguments += f", measure={call.function!r}, norm_power={call.norm_power}"
        line = f"flatcore.{name}(features, weight, target, {arguments})"
    if call.upstream is not None:
        leaves = ["logits"] if call.function == "unmasked_cross_entropy" else [
            {"linear_weight": "weight", "linear_bias": "bias"}.get(key, key) for key in Answers(call)._inputs()
        ]  # fmt: skip
        lines.append("".join(f"{leaf}.requires_grad_(); " for leaf in leaves).rstrip("; "))
    lines += [f"with {force}:", f"    value = {line}", "    print(value)"]
    if call.upstream is not None:
        lines.append(f"    print(torch.autograd.grad(value, ({', '.join(leaves)},), upstream))")
    return "\n".join(lines)


def _literal(x: Tensor | None) -> str:
    if x is None:
        return "None"
    if x.dim() == 2 and not x.is_contiguous():
        return f"{_literal(x.T.contiguous())}.T"
    if x.numel() <= 400:
        return f"torch.tensor({x.tolist()}, dtype={x.dtype})"
    raw = x.contiguous().view(torch.uint8).numpy().tobytes()
    packed = base64.b85encode(zlib.compress(raw, 9)).decode()
    return (f"torch.frombuffer(bytearray(zlib.decompress(base64.b85decode({packed!r}))), "
            f"dtype={x.dtype}).reshape({tuple(x.shape)}).clone()")  # fmt: skip


def smallest(call: Call, path: str) -> tuple[Call, list[Found]]:
    """The row of the call that is most wrong by itself, or the call as it is; and what is wrong there."""
    best, at = (call, []), 1.0
    for n in range(call.features.shape[0] if call.features.shape[0] > 1 else 0):
        one = only_row(call, n)
        try:
            wrong = [f for f in run(one, path) if not f.ratio <= 1]
        except Exception:  # what raises on one row is shown by the whole call
            continue
        if wrong and (ratio := max(f.ratio for f in wrong)) > at:
            best, at = (one, wrong), ratio
    return best


def run(call: Call, path: str, answers: Answers | None = None) -> list[Found]:
    """Check the call on a path."""
    answers = answers or Answers(call)
    with on_path(path):
        return check(call, answers)


def runs_on(call: Call, path: str) -> bool:
    """Whether the path takes such a head; a reference in float64 over many classes costs seconds."""
    C = call.weight.shape[0]
    if path == "cuda-fused" or path.startswith("fused"):
        return C <= LONGEST_FUSED
    return path != "reference" or C <= LONGEST_FUSED


# ------------------------------------------------------------------------------------------------------------ command
class Counts:
    """What ran and how far it was off."""

    def __init__(self) -> None:
        self.cases = self.wrong = self.runs = self.compared = self.open = 0
        self.by: dict[str, Counter[str]] = {key: Counter() for key in ("path", "function", "kind", "dtype")}
        self.worst: dict[str, float] = {}

    def add(self, call: Call, path: str, found: Sequence[Found]) -> None:
        self.runs += 1
        names = [str(x.dtype).removeprefix("torch.") for x in (call.features, call.weight)]
        for key, value in (
            ("path", path),
            ("function", call.function),
            ("kind", call.kind),
            ("dtype", "/".join(names)),
        ):
            self.by[key][value] += 1
        for f in found:
            self.compared += not f.quantity.endswith(OPEN)
            if f.quantity.endswith(OPEN):
                self.open += 1
                continue
            kind = "float64" if "float64" in names else "float32"
            key = f"{f.quantity.split(' (')[0]} {kind}"
            self.worst[key] = max(self.worst.get(key, 0.0), f.ratio)

    def report(self, seconds: float) -> str:
        lines = [f"{self.cases} cases, {self.runs} runs in {seconds:.0f} s, {self.wrong} wrong"]
        lines.append(f"{self.compared} quantities compared, {self.open} left open by their conditioning or range")
        for key, counter in self.by.items():
            lines.append(f"runs by {key}: " + ", ".join(f"{k} {v}" for k, v in sorted(counter.items())))
        lines.append("largest error in tolerances:")
        lines += [f"  {value:9.3g}  {key}" for key, value in sorted(self.worst.items(), key=lambda item: -item[1])]
        return "\n".join(lines)


def case(seed: int, i: int, functions: Sequence[str], dtypes: Sequence[torch.dtype], kinds: Sequence[str]) -> Call:
    """Case i of a seed."""
    return draw_call(Seeded(f"{seed}/{i}"), functions, dtypes, kinds)


def fuzz(calls: Iterator[tuple[str, Call]], paths: Sequence[str], counts: Counts, show: Callable[[str], None]) -> None:
    """Run the calls on the paths; show what is wrong, with a reproduction on the first such path, and go on."""
    for name, call in calls:
        counts.cases += 1
        answers, where, texts = Answers(call), "", []
        for path in paths:
            if not runs_on(call, path):
                continue
            try:
                found = run(call, path, answers)
            except Exception:
                texts.append(f"  {path}: raised\n{traceback.format_exc()}")
                where = where or path
                continue
            counts.add(call, path, found)
            wrong = [f for f in found if not f.ratio <= 1]
            texts += [f"  {path}: {f.quantity} {f.text}" for f in wrong]
            where = where or (path if wrong else "")
        if where:
            counts.wrong += 1
            small, wrong = smallest(call, where)
            alone = [f"  one row of it on {where}: {f.quantity} {f.text}" for f in wrong if small is not call]
            show("\n".join([f"WRONG case {name}: {call!r}", *texts, *alone, reproduction(small, where), ""]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="how many calls to draw (default 300, or no end with --minutes)")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, action="append", metavar="CASE", help="run this case of the seed; repeatable"
    )
    parser.add_argument("--function", action="append", choices=FUNCTIONS, help="only this function; repeatable")
    parser.add_argument(
        "--path",
        action="append",
        choices=(*paths(), *CUDA),
        help="only this path; repeatable (default: all of the CPU's)",
    )
    names = {str(d).removeprefix("torch."): d for d in FLOATS}
    parser.add_argument("--dtype", action="append", choices=tuple(names), help="only this input dtype; repeatable")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only heads of this kind; repeatable")
    parser.add_argument("--show", type=int, default=20, help="print so many wrong cases in full, the rest are counted")
    given = parser.parse_args(arguments)
    functions, kinds = given.function or FUNCTIONS, given.kind or KINDS
    dtypes = [names[d] for d in given.dtype] if given.dtype else FLOATS
    chosen = given.path or paths()
    torch.set_num_threads(1)
    counts, start = Counts(), time.monotonic()
    limit = math.inf if given.minutes is None else 60 * given.minutes
    cases = given.cases if given.cases is not None else 300 if given.minutes is None else sys.maxsize

    def drawn() -> Iterator[tuple[str, Call]]:
        for i in given.only or range(cases):
            if time.monotonic() - start > limit:
                return
            oracles._CACHE.clear()
            yield f"{given.seed}/{i}", case(given.seed, i, functions, dtypes, kinds)

    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        shown += text.startswith("WRONG")
        if shown <= given.show:
            print(text, flush=True)

    print(f"seed {given.seed}, paths {', '.join(chosen)}", flush=True)
    fuzz(drawn(), chosen, counts, show)
    print(f"seed {given.seed}: {counts.report(time.monotonic() - start)}")
    return int(counts.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
