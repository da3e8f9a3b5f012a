"""No compilation in the middle of a run: what Triton specialises its kernels on is the same whatever the numbers of rows, columns
and slices. The launches are real but for the last step, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

pytest.importorskip("triton")
ROWS = (1, 2, 15, 16, 17, 32, 48, 300)
VOCABULARIES = (1, 300, 1024, 32003, 50257, 151936)
KERNELS = ("linear_statistics_kernel", "merge_kernel", "gradient_recompute_kernel", "gradient_cached_kernel")


def entries(target, width):
    """Return how many entries each kernel has in Triton's cache after steps of all sizes, without compiling any of them."""
    import torch
    import triton

    from bupo_kernels.backends import triton_
    from bupo_kernels.backends.algebra import Coefficients
    from bupo_kernels.backends.base import Operands, Problem, Readout, Tile
    from bupo_kernels.backends.triton_ import compile as ahead

    work, seen = ahead.work_for(target), defaultdict(set)

    def note(*, key, fn, **_):
        seen[fn.name.rpartition(".")[2]].add(key)
        return True  # it need not be compiled, and is asked for again by the next launch

    triton_.target_of = lambda device: work.target
    triton.knobs.runtime.jit_cache_hook = note
    backend, cpu = triton_.Triton(), torch.device("cpu")
    with ahead._compiling(work.gpu):
        for vocab in VOCABULARIES:
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


@pytest.fixture(scope="module")
def counted():
    # A process of its own: here Triton may be in the interpreter, which specialises nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("width", ["64", "77"], ids=["regular", "irregular"])
def test_a_kernel_is_compiled_once_whatever_the_sizes_of_a_call(counted, target, width):
    # linear_statistics_kernel is another one where it stores E.
    assert counted[target][width] == {kernel: 1 + (kernel == "linear_statistics_kernel") for kernel in KERNELS}


if __name__ == "__main__":
    print(json.dumps({t: {w: entries(t, w) for w in (64, 77)} for t in ("sm_80", "sm_90", "gfx942")}))
