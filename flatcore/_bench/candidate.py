"""What a candidate is: someone who answers a work's question; and someone who does not, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .inputs import Inputs


@dataclass(frozen=True)
class Candidate:
    """Someone who answers a work's question."""

    name: str
    role: str  # native, eager, compile, neighbour, tool, sampling or reference
    prepare: Callable[[Inputs], Callable[[], Any]]  # what is made beforehand, and the call that is timed
    note: str = ""
    is_quick: bool = True  # whether --quick has it

    @property
    def is_exact(self) -> bool:
        """Held to flatcore's contract; the others to what their formula can give in their dtype."""
        return self.role in ("native", "reference")

    def run(self, x: Inputs) -> Any:
        """Prepare, and call once."""
        return self.prepare(x)()


class Absent(NamedTuple):
    """Someone who does not answer in this run, and why."""

    name: str
    reason: str
