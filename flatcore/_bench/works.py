"""The works that are timed: a question, and the sizes at which it is asked on a CPU and on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

QUICK_ROUNDS = 5
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class UnknownWorkError(ValueError):
    """A name that no work has."""


@dataclass(frozen=True)
class Work:
    """One line of the performance goals."""

    key: str
    question: str  # a key of rivals.EAGER, or "training step"
    N: int
    D: int  # K for row norms, 0 for works on logits
    C: int
    rounds: int = 15
    calls: int = 1  # of a call that is too short for the clock, to a timed sample
    dtype: str = "float32"
    rows: str = "mixed"  # of which confidence: a key of inputs.GAPS; "twins" has nearly equal rows of W
    backward: bool = False  # the gradient is timed: for W6 with the forward pass
    quick_rows: int = 0  # N under --quick, where all N take too long
    is_quick: bool = True  # whether --quick has it

    @property
    def number(self) -> str:
        """The line of the performance goals: W3 of W3-trace."""
        return self.key.partition("-")[0]

    @property
    def measure(self) -> str:
        """The question without how a large head is asked it."""
        return self.question.partition(",")[0]

    def __str__(self) -> str:
        sizes = "".join(
            f", {k}={n:,}" for k, n in (("N", self.N), ("D" if self.C else "K", self.D), ("C", self.C)) if n
        )
        both = "forward and backward" if self.number == "W6" else "backward"
        rows = {"mixed": "", "twins": ", 1 % of rows between nearly equal classes"}.get(
            self.rows, f", {self.rows} rows"
        )
        return f"{self.key}: {self.measure}{', ' + both if self.backward else ''}{sizes}, {self.dtype}{rows}"

    def quick(self) -> Work:
        """Return it with fewer rounds, and fewer rows where all of them take seconds: its title says how many."""
        return replace(self, N=self.quick_rows or self.N, rounds=min(self.rounds, QUICK_ROUNDS))

    def on(self, device: str) -> Work:
        """Return it at the sizes of a kind of device, "cpu" or "cuda"."""
        changed: dict[str, Any] = ON_CUDA.get(self.key, {})
        return replace(self, **changed) if device == "cuda" else self

    @property
    def operations(self) -> float:
        """Multiplications and additions that the question needs, of its products alone where those are most of them."""
        N, D, C = self.N, self.D, self.C
        product = 2.0 * N * D * C
        if self.question == "row norms":
            return 4.0 * N * D  # absolute value and sum, multiply-add, maximum
        if self.question == "all fields":
            return product + 2.0 * N * (D + C * C)
        if self.backward and self.number != "W6":
            return product * (3 if self.measure == "trace" else 5)
        return product + (2.0 * N * C * min(C, D) if self.measure == "neuronwise" else 0.0)

    @property
    def nbytes(self) -> float:
        """Bytes that have to be read: features and W, each once."""
        return float(self.N * self.D + self.C * self.D) * BYTES[self.dtype]


WORKS = (
    Work("W1", "all fields", 100_000, 512, 10, rounds=21),
    Work("W1-bfloat16", "all fields", 100_000, 512, 10, dtype="bfloat16"),
    Work("W2", "all fields", 50_000, 640, 100),
    Work("W3-trace", "trace", 8_192, 2_048, 1_000, rounds=9, quick_rows=2_048),
    Work("W3-neuronwise", "neuronwise", 8_192, 2_048, 1_000, rounds=9, quick_rows=2_048),
    Work("W3-twins", "neuronwise", 8_192, 2_048, 1_000, rounds=9, rows="twins", quick_rows=2_048),
    Work("W4-trace", "trace, chunked", 1_024, 2_048, 32_000, rounds=7, quick_rows=128),
    Work("W4-neuronwise", "neuronwise, chunked", 1_024, 2_048, 32_000, rounds=7, quick_rows=128),
    Work("W4-twins", "neuronwise, chunked", 1_024, 2_048, 32_000, rounds=5, rows="twins", is_quick=False),
    Work("W5", "row norms", 512, 150_528, 0, rounds=21),
    Work("W6-forward", "mean layerwise", 128, 512, 10, rounds=31, calls=200),
    Work("W6-backward", "mean layerwise", 128, 512, 10, rounds=31, calls=100, backward=True),
    Work("W7-easy", "data set trace", 1_024, 512, 10, rounds=21, rows="easy"),
    Work("W7-confident", "data set trace", 1_024, 512, 10, rounds=21, rows="confident"),
    Work("W8-10", "cotangent", 1_000_000, 0, 10),
    Work("W8-1000", "cotangent", 16_384, 0, 1_000),
    Work("W8-100000", "cotangent", 256, 0, 100_000, rounds=9),
    Work("W9", "training step", 128, 128, 10, rounds=61),
    Work("W3-trace-backward", "trace", 8_192, 2_048, 1_000, rounds=7, backward=True, is_quick=False),
    Work("W3-neuronwise-backward", "neuronwise", 8_192, 2_048, 1_000, rounds=7, backward=True, is_quick=False),
    Work("W4-trace-backward", "trace, chunked", 1_024, 2_048, 32_000, rounds=5, backward=True, is_quick=False),
    Work("W4-neuronwise-backward", "neuronwise, chunked", 1_024, 2_048, 32_000, rounds=5, backward=True, is_quick=False),
)  # fmt: skip

_VOCABULARY: dict[str, int | str] = {
    "N": 8_192,
    "D": 4_096,
    "C": 128_256,
    "dtype": "bfloat16",
    "rounds": 5,
    "quick_rows": 0,
}
ON_CUDA: dict[str, dict[str, int | str]] = {
    "W1": {"N": 1_000_000},
    "W1-bfloat16": {"N": 1_000_000},
    **{work.key: _VOCABULARY for work in WORKS if work.number == "W4"},
    "W6-forward": {"calls": 20},
    "W6-backward": {"calls": 20},
}
"""What differs on a CUDA device."""


def select(names: str | None, device: str = "cpu") -> list[Work]:
    """Works by key ("W3-trace") or number ("W3"), separated by commas; all without a name.

    Raises:
        UnknownWorkError: an unknown name.
    """
    if names is None:
        return [work.on(device) for work in WORKS]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {work.key for work in WORKS} | {work.number for work in WORKS}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UnknownWorkError(
            f"there is no work {', '.join(unknown)}; there are {', '.join(work.key for work in WORKS)} and growth, and W3 "
            "stands for all that begin with it"
        )
    return [work.on(device) for work in WORKS if work.key in wanted or work.number in wanted]
