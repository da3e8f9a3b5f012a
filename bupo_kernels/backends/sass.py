"""Machine code of NVIDIA's GPUs, as nvdisasm prints it: instructions, jumps, and the shortest way from one to another."""

from __future__ import annotations

import heapq
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)[^;]*;")
BRANCH = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?U?BRA(\.\S+)?\s.*?`\((\.L_\w+)\)")
LABEL = re.compile(r"\s*(\.L_\w+):")
# The instructions of matrix units: wgmma, tcgen05, mma.sync.
MATRIX = re.compile(r"HGMMA|UTC\w*MMA|HMMA")


def disassembler() -> str | None:
    """Return nvdisasm, the toolkit's or the one that Triton brings; None where there is neither."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.exists() else None


def disassemble(cubin: Path) -> str:
    """Return what nvdisasm prints of a file. Raise ``RuntimeError`` where it fails, or is not there."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError("nvdisasm: neither on the path nor with Triton")
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm: {done.stderr or done.stdout}")
    return done.stdout


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel, numbered from 0."""

    opcodes: list[str]
    following: list[tuple[int, ...]]  # of each instruction, those that may come next
    loops: list[tuple[int, int]]  # first and last instruction, of each jump backwards

    @staticmethod
    def of(text: str) -> Code:
        """Return the code of one kernel."""
        labels: dict[str, int] = {}
        opcodes: list[str] = []
        jumps: dict[int, tuple[bool, str]] = {}  # of an instruction: whether it may go on, and the label, "" for the end
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(opcodes)
            elif instruction := INSTRUCTION.search(line):
                if branch := BRANCH.search(line):
                    jumps[len(opcodes)] = bool(branch[1] or branch[2]), branch[3]
                elif instruction[2] in ("EXIT", "RET"):
                    jumps[len(opcodes)] = bool(instruction[1]), ""
                opcodes.append(instruction[2])
        following = []
        for at in range(len(opcodes)):
            goes_on, to = jumps.get(at, (True, ""))
            following.append((at + 1,) * (goes_on and at + 1 < len(opcodes)) + ((labels[to],) if to else ()))
        loops = [(labels[to], at) for at, (_, to) in jumps.items() if to and labels[to] < at]
        return Code(opcodes, following, sorted(loops))

    def shortest(self, starts: Iterable[int], goals: Collection[int], within: Collection[int] | None = None) -> list[int]:
        """Return the instructions of the shortest way from one of ``starts`` to one of ``goals``, both included, without leaving
        ``within``; none where there is no way."""
        queue, before = [(1, at, -1) for at in starts], {}
        heapq.heapify(queue)
        while queue:
            length, at, previous = heapq.heappop(queue)
            if at in before or (within is not None and at not in within):
                continue
            before[at] = previous
            if at in goals:
                way = []
                while at != -1:
                    way.append(at)
                    at = before[at]
                return way[::-1]
            for to in self.following[at]:
                heapq.heappush(queue, (length + 1, to, at))
        return []

    def between_products(self) -> int | None:
        """Return how many instructions a kernel that multiplies tile after tile has from the end of one tile's loop over D until it
        is in that of the next; None where it has no such loop, or comes to it but once."""
        products = [at for at, opcode in enumerate(self.opcodes) if MATRIX.match(opcode)]
        loops = [(first, last) for first, last in self.loops if any(first <= at <= last for at in products)]
        if not loops:
            return None
        first, last = min(loops, key=lambda loop: loop[1] - loop[0])
        inside = range(first, last + 1)
        way = self.shortest([at for at in self.following[last] if at not in inside], inside)
        return len(way) - 1 if way else None
