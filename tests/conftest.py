import gc
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
settings.register_profile("broad", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.register_profile("quick", settings.get_profile("broad"), max_examples=10)


def pytest_addoption(parser):
    parser.addoption("--broad", action="store_true", help="run all of what is broad rather than deep too: see the marker `broad`")


def pytest_configure(config):
    settings.load_profile("broad" if config.getoption("broad") else "quick")


# Of these files one worker of pytest-xdist runs all tests, since they share what is dear to make.
SHARED = {
    "test_analyze_command.py": "analyze",
    "test_benchmark_kernels.py": "benchmark",
    "test_benchmark_report.py": "report",
    "test_cuda_rows.py": "emulation",
    "test_native_cuda.py": "emulation",
    "test_distributed.py": "distributed",
    "test_fsdp_groupings.py": "groupings",
    "test_kernels.py": "kernels",
    "test_trl.py": "trl",
    "test_verl.py": "verl",
    "test_verl_ulysses.py": "ulysses",
    "test_vocab_parallel_lens.py": "vocabulary",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # As `--dist loadgroup`, which changes node ids where pytest 9.2 no longer has them.
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrTest(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = Path(nodeid.split("::")[0]).name
            return SHARED.get(file, nodeid)

    return ByFileOrTest(config, log)


def pytest_collection_modifyitems(config, items):
    from gpu_sizes import size_of  # which imports the library, for which the environment is set by now

    # Small problems first, after tests of none: when time runs out, or a kernel faults, the most is known.
    items.sort(key=lambda item: size.work if (size := size_of(item)) else 0)
    if config.getoption("broad"):
        return
    broad = [item for item in items if item.get_closest_marker("broad")]
    config.hook.pytest_deselected(items=broad)
    items[:] = [item for item in items if not item.get_closest_marker("broad")]


def pytest_collection_finish():
    gc.freeze()  # what is imported by now stays, and who collects garbage in a test need not look at all of it for 0.3 s


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_rates(monkeypatch):
    """The machine's rates take seconds of products: benchmarks have none."""
    for name in ("divergence", "lens", "support"):
        monkeypatch.setattr(f"benchmarks.{name}.rates", lambda device: {})


@pytest.fixture
def pictures_only_where_they_matter(request, monkeypatch):
    """Pictures of a run take seconds: an empty file stands for one, but in tests that have "picture" in their name."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("bupo.monitor.draw_run", lambda metrics, accuracies, path: path.touch())
        monkeypatch.setattr("bupo.monitor.draw_training", lambda metrics, path: [])


@pytest.fixture(params=["torch", "native", "triton"], scope="session")
def backend(request):
    """For ``linear_logprobs(..., backend=backend)``; its tensors belong on ``problems.device_of(backend)``. Tests whose operands
    are 16-bit and have no softcap take ``problems.with_cached`` to run on "triton:cached" too."""
    if request.param.startswith("triton"):
        pytest.importorskip("triton")
    return request.param
