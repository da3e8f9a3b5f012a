"""No compilation in the middle of a run: what Triton specialises its kernels on is the same whatever the numbers of rows, columns
and slices. The launches are real but for the last step, for GPUs that need not be there."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
import triton

from bupo_kernels.backends import triton_
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Operands, Problem, Readout, Tile
from bupo_kernels.backends.triton_ import compile as ahead

ROWS = (1, 15, 32, 45)  # Triton tells 1, multiples of 16 and other numbers apart; of halves and thirds of these too
VOCABULARIES = {"multiples of 16": (32, 151936), "others": (300, 50257)}
CASES = [(*case, name) for case in (("sm_80", 64), ("sm_80", 77), ("sm_90", 64), ("gfx942", 64)) for name in VOCABULARIES]
KERNELS = ("linear_statistics_kernel", "merge_kernel", "gradient_recompute_kernel", "gradient_cached_kernel")


def entries(target, width, vocabularies):
    """Return how many entries each kernel has in Triton's cache after steps of all sizes, without compiling any of them."""
    work, seen = ahead.work_for(target), defaultdict(set)

    def note(*, key, fn, **_):
        seen[fn.name.rpartition(".")[2]].add(key)
        return True  # it need not be compiled, and is asked for again by the next launch

    triton_.target_of = lambda device: work.target
    triton.knobs.runtime.jit_cache_hook = note
    backend, cpu = triton_.Triton(), torch.device("cpu")
    with ahead._compiling(work.gpu):
        for vocab in VOCABULARIES[vocabularies]:
            weight = torch.zeros(vocab, width, dtype=torch.bfloat16)
            for rows in ROWS:
                readout = Readout(0.7, 1.0, None)
                hidden, targets = torch.zeros(rows, width, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
                operands = Operands(hidden, weight, None, targets, readout)
                problem = Problem(rows, rows, vocab, width, torch.bfloat16, cpu, True, True, False, False, 2**30)
                numbers, positions = torch.zeros(rows), torch.arange(rows)
                coefficients = Coefficients(numbers, numbers, numbers, numbers, targets)
                for cached in sorted({0, rows // 2, rows}):
                    plan = backend.plan(problem, "recompute")._replace(cached_rows=cached, tile=Tile(rows // 3 + 1, 16384))
                    _, cache = backend.statistics(operands, positions % 3 != 1, plan, True)
                    list(backend.gradient_tiles(operands, positions, coefficients, plan, cache, positions if cached else None))
                backend.row_statistics(operands, positions, plan, with_entropy=True, keep=False)
    return {kernel: len(keys) for kernel, keys in seen.items()}


def filled(folder):
    """Fill a cache folder for one dtype, and return how many kernels that were and which of a call's are found there then."""
    os.environ["TRITON_CACHE_DIR"] = folder
    work, hits = dataclasses.replace(ahead.work_for("sm_80"), dtypes=("float32",)), []
    count = ahead.fill(work, jobs=1)
    triton_.target_of = lambda device: work.target
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    rows, vocab, width = 300, 1600, 1088
    problem = Problem(rows, rows, vocab, width, torch.float32, torch.device("cpu"), True, True, False, False, 2**30)
    hidden, weight, targets = torch.zeros(rows, width), torch.zeros(vocab, width), torch.zeros(rows, dtype=torch.int64)
    operands, numbers = Operands(hidden, weight, None, targets, Readout(1.0, 1.0, None)), torch.zeros(rows)
    coefficients, positions = Coefficients(numbers, numbers, numbers, numbers, targets), torch.arange(rows)
    backend = triton_.Triton()
    plan = backend.plan(problem, "recompute")
    with ahead._compiling(work.gpu):
        list(backend.gradient_tiles(operands, positions, coefficients, plan, backend.empty_cache(problem, 0), None))
        backend.statistics(operands, positions % 3 != 1, plan, True)
    return count, hits


def alone(*arguments):
    """Run this file in a process of its own: here Triton may be in the interpreter, which specialises and compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kernel_is_compiled_once_whatever_the_sizes_of_a_call():
    # linear_statistics_kernel is another one where it stores E.
    once = {kernel: 1 + (kernel == "linear_statistics_kernel") for kernel in KERNELS}
    assert alone() == {str(case): once for case in CASES}


@pytest.mark.broad
def test_kernels_compiled_ahead_are_those_that_a_call_then_launches(tmp_path):
    count, hits = alone(str(tmp_path))
    assert count == sum(1 for _ in dataclasses.replace(ahead.work_for("sm_80"), dtypes=("float32",)).cases())
    assert hits == [True, True, True]  # recompute, statistics and merge


if __name__ == "__main__":
    print(json.dumps(filled(sys.argv[1]) if sys.argv[1:] else {str(case): entries(*case) for case in CASES}))
