import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# For benchmarks/, which is not installed; last, so that what is installed comes first.
sys.path.append(str(Path(__file__).parent.parent))

# Read when triton is first imported: without a GPU its kernels run in its interpreter, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Seeded and without time limits: the same examples on every machine, however slow.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "native", "triton"], scope="session")
def backend(request):
    """For ``linear_logprobs(..., backend=backend)``; its tensors belong on ``problems.device_of(backend)``. Tests whose operands
    are 16-bit and have no softcap take ``problems.with_cached`` to run on "triton:cached" too."""
    if request.param.startswith("triton"):
        pytest.importorskip("triton")
    return request.param
