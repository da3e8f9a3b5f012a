"""Every default kernel configuration, compiled ahead of time for every target: no GPU is needed for any of this."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.broad
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# What the tensor cores of each are driven with.
INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma"}
# Bytes of shared memory a block may have; of sm_80's, what 8.6 and 8.9 have, which run the same code.
SHARED_MEMORY = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@pytest.fixture(scope="module")
def compiled():
    # A process of its own: here Triton may be in the interpreter, which compiles nothing.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bupo_kernels.backends.triton_.compile", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_no_configuration_spills_or_asks_for_more_shared_memory_than_there_is(compiled, target):
    of_target = [kernel for kernel in compiled if kernel["target"] == target]
    assert {kernel["kernel"] for kernel in of_target} == {"linear_statistics", "merge", "gradient_recompute", "gradient_cached"}
    assert [kernel for kernel in of_target if kernel["spills"]] == []
    assert [kernel for kernel in of_target if kernel["shared"] > SHARED_MEMORY[target]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_the_tensor_cores(compiled, target):
    products = [k for k in compiled if k["target"] == target and k["kernel"] in ("linear_statistics", "gradient_recompute")]
    assert len(products) > 30
    assert [kernel for kernel in products if not kernel["instruction"].startswith(INSTRUCTIONS[target])] == []
