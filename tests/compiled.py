"""The CUDA sources compiled for one architecture: what ptxas says of each kernel, and its machine code.

A file is compiled once a run, with the warnings of test_cuda_build.py, and keeps PTX and cubin beside the object; nvdisasm
reads the cubin.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10}
"""Bytes of shared memory of a multiprocessor, as the programming guide's table of compute capabilities has them."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as the compiler left it; ``name`` without namespaces, ``<float, float, 10>`` and the like included."""

    name: str
    symbol: str
    threads: int  # of __launch_bounds__
    registers: int
    shared: int  # static
    stack: int

    def occupancy(self, architecture: str, dynamic: int = 0) -> int:
        """Blocks on a multiprocessor: by registers, threads and shared memory, at most 32.

        Each of four parts has 16,384 registers, given to warps in units of 256; shared memory comes in units of 128 bytes,
        and the system has 1 KiB a block.
        """
        warps = self.threads // 32
        of_a_warp = -(-self.registers * 32 // 256) * 256
        shared = -(-(self.shared + dynamic + 1024) // 128) * 128
        return min(16384 // of_a_warp * 4 // warps, 2048 // self.threads, SHARED[architecture] // shared, 32)


@dataclass(frozen=True)
class Built:
    """One source for one architecture."""

    returncode: int
    said: str
    folder: Path

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """All of the file."""
        ptx = "\n".join(path.read_text() for path in self.folder.glob("*.ptx"))
        bounds = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx))
        found = []
        for symbol, stack, used in re.findall(
            r"Function properties for (\S+)\n\s+(\d+) bytes stack frame.*\n.*: Used (.*)", self.said
        ):
            registers, shared = re.search(r"(\d+) registers", used), re.search(r"(\d+) bytes smem", used)
            assert registers is not None
            found.append((symbol, int(registers[1]), int(shared[1]) if shared else 0, int(stack)))
        names = demangled(tuple(symbol for symbol, *_ in found))
        return [
            Kernel(name, symbol, int(bounds.get(symbol, 1024)), registers, shared, stack)
            for name, (symbol, registers, shared, stack) in zip(names, found, strict=True)
        ]

    def kernel(self, name: str) -> Kernel:
        """The one of that name."""
        (found,) = (kernel for kernel in self.kernels if kernel.name == name)
        return found

    def code(self, kernel: Kernel) -> list[Instruction]:
        """Its machine code."""
        return self._code[kernel.symbol]

    @functools.cached_property
    def _code(self) -> dict[str, list[Instruction]]:
        (cubin,) = self.folder.glob("*.cubin")
        program = disassembler()
        assert program is not None
        text = subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        sections = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
        return {name: _instructions(body) for name, body in zip(sections[::2], sections[1::2], strict=True)}


@functools.cache
def build(source: str, architecture: str) -> Built:
    """Compile ``csrc/cuda/<source>``, warnings as errors; 10 to 50 s, once a run."""
    folder = Path(tempfile.mkdtemp(prefix=f"flatcore_{Path(source).stem}_{architecture}_"))
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror",
         "-Xptxas=-v", "-I", str(ROOT / "csrc"), '-DFLATCORE_CUDA_ARCHITECTURES="90"', "--keep", "--keep-dir", str(folder),
         "-c", str(ROOT / "csrc/cuda" / source), "-o", str(folder / "object.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Built(done.returncode, done.stderr, folder)


def disassembler() -> str | None:
    """The toolkit's nvdisasm, or PyPI's."""
    if found := shutil.which("nvdisasm"):
        return found
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for path in Path(folder).glob("*/bin/nvdisasm"):
            return str(path)
    return None


def demangled(symbols: tuple[str, ...]) -> list[str]:
    """Names with template arguments, enumerators as numbers, without namespaces, return type and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    found = []
    for line in done.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|flatcore::|cuda::", "", line)
        name = re.sub(r"\(\w+\)(?=\d)", "", name).replace("> >", ">>")  # an enumerator's type
        found.append(name.partition("(")[0].removeprefix("void ").strip())
    return found


# ------------------------------------------------------------------------------------------------------ machine code
@dataclass(frozen=True)
class Instruction:
    """Its opcode with modifiers, and where a branch goes: an index into the kernel's code."""

    opcode: str
    target: int | None


def _instructions(text: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L\S+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found[1].strip())
    found_code = []
    for line in lines:
        words = re.sub(r"^@!?U?P\w+\s+", "", line)
        opcode = words.split()[0]
        target = re.search(r"`\((\.L\S+?)\)", words) if opcode.startswith("BRA") else None
        found_code.append(Instruction(opcode, labels.get(target[1]) if target else None))
    return found_code


@dataclass(frozen=True)
class Loop:
    """A backward branch and what lies before it, down to its target; ``own``: without the loops inside."""

    first: int
    last: int
    own: tuple[Instruction, ...]

    def count(self, pattern: str) -> int:
        """Own instructions whose opcode begins so."""
        return sum(re.match(pattern, instruction.opcode) is not None for instruction in self.own)

    @property
    def length(self) -> int:
        """Own instructions, without those that only fill up."""
        return len(self.own) - self.count("NOP")


def loops(code: list[Instruction]) -> list[Loop]:
    """All of a kernel; of several branches back to one place the last one closes the loop."""
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code):
        if instruction.target is not None and instruction.target <= i:
            if instruction.target == i:  # the trap behind the last instruction
                continue
            ends[instruction.target] = i
    found = []
    for first, last in ends.items():
        inner = [(a, b) for a, b in ends.items() if (first < a and b <= last) or (first == a and b < last)]
        own = (code[i] for i in range(first, last + 1) if not any(a <= i <= b for a, b in inner))
        found.append(Loop(first, last, tuple(own)))
    return found


def hot_loop(code: list[Instruction], pattern: str) -> Loop:
    """The loop that has most instructions of this kind as its own: the one that the work is done in."""
    return max(loops(code), key=lambda loop: loop.count(pattern))
