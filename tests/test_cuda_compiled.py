"""The hot kernels' machine code for sm_80 and sm_90: registers, shared memory, blocks a multiprocessor, instructions.

A hot loop is found in the disassembly: a branch to an earlier instruction closes a loop, instructions of loops inside are
not its own, and the one with most of the table's anchor opcode as its own is where the work is done. Figures may be 25 %
off: a compiler's patch release changes some, a second copy of the work doubles them.
"""

from __future__ import annotations

import re

import compiled
import pytest
from compiled import Instruction
from hot_kernels import ARCHITECTURES, HOT, Hot

ROOM = 1.25
IDS = [f"{hot.work}-{hot.name.partition('<')[0]}" for hot in HOT]


def _built(hot: Hot, architecture: str) -> tuple[compiled.Built, compiled.Kernel]:
    built = compiled.build(hot.source, architecture)
    assert built.returncode == 0, built.said
    return built, built.kernel(hot.name)


def instructions(hot: Hot, architecture: str) -> float:
    """Of the hot loop, per unit of the work."""
    built, kernel = _built(hot, architecture)
    loop = compiled.hot_loop(built.code(kernel), hot.anchor)
    assert loop.count(hot.anchor), "the loop has none of these"
    return loop.length / (loop.count(hot.anchor) * hot.elements)


@pytest.mark.needs("nvcc")
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hot", HOT, ids=IDS)
def test_registers_shared_memory_and_blocks(hot: Hot, architecture: str) -> None:
    _, kernel = _built(hot, architecture)
    i = ARCHITECTURES.index(architecture)
    assert kernel.stack == 0
    assert hot.registers[i] / ROOM <= kernel.registers <= hot.registers[i] * ROOM
    assert kernel.shared <= max(hot.shared * ROOM, 256)
    assert kernel.occupancy(architecture) >= hot.blocks[i]


@pytest.mark.needs("nvcc")
@pytest.mark.needs("nvdisasm")
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hot", HOT, ids=IDS)
def test_instructions_of_the_hot_loop(hot: Hot, architecture: str) -> None:
    wanted = hot.instructions[ARCHITECTURES.index(architecture)]
    assert wanted / ROOM <= instructions(hot, architecture) <= wanted * ROOM


# ------------------------------------------------------------------------------------------------- without a compiler
@pytest.mark.parametrize(
    ("threads", "registers", "shared", "architecture", "blocks"),
    (
        (128, 168, 33_792, "sm_90", 3),  # 16,384 registers hold 3 warps of 168, twelve on all four parts
        (128, 236, 33_792, "sm_90", 2),
        (128, 64, 33_792, "sm_80", 4),  # shared memory
        (128, 64, 33_792, "sm_90", 6),
        (256, 32, 0, "sm_80", 8),  # threads
        (32, 16, 0, "sm_80", 32),
        (256, 65, 0, "sm_80", 3),  # 65 count as 72
        (256, 64, 0, "sm_80", 4),
    ),
)
def test_blocks_of_a_multiprocessor(threads: int, registers: int, shared: int, architecture: str, blocks: int) -> None:
    """As the occupancy calculator of the toolkit has it."""
    assert compiled.Kernel("k", "k", threads, registers, shared, 0).occupancy(architecture) == blocks


LISTING = """
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, 0x1, PT ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   FFMA R0, R4, R5, R0 ;
        /*0040*/              @!P1 FFMA R0, R4, R5, R0 ;
        /*0050*/              @P1 BRA `(.L_x_2) ;
        /*0060*/                   NOP ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
        /*00a0*/                   NOP;
"""


def test_loops_are_found_by_the_branches_back() -> None:
    code = compiled._instructions(LISTING)
    assert code[2] == Instruction("LDG.E.128.CONSTANT", None) and code[5] == Instruction("BRA", 3)
    outer, inner = sorted(compiled.loops(code), key=lambda loop: loop.first)
    assert (outer.first, outer.last, outer.length) == (2, 7, 2)  # a load and a branch; a filler does not count
    assert (inner.first, inner.last, inner.length) == (3, 5, 3)
    assert compiled.hot_loop(code, "FFMA") == inner and compiled.hot_loop(code, r"LDG\.E\S*128") == outer


def test_every_hot_kernel_stands_in_its_source() -> None:
    for hot in HOT:
        file = compiled.ROOT / "csrc/cuda" / hot.source
        texts = [file.read_text()]
        texts += [(compiled.ROOT / "csrc" / name).read_text() for name in re.findall(r'#include "(.+)"', texts[0])]
        assert any(re.search(rf"\b{hot.name.partition('<')[0]}\(", text) for text in texts), hot.name


if __name__ == "__main__":  # what is seen, to be put into hot_kernels.py
    for hot in HOT:
        seen = [(_built(hot, a)[1], instructions(hot, a), a) for a in ARCHITECTURES]
        registers, shared = tuple(k.registers for k, _, _ in seen), max(k.shared for k, _, _ in seen)
        blocks, own = tuple(k.occupancy(a) for k, _, a in seen), tuple(round(count, 1) for _, count, _ in seen)
        print(f"{hot.work}, {hot.name}: registers {registers}, shared {shared}, blocks {blocks}, instructions {own}")
