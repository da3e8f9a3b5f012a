"""Other libraries' heads in the benchmarks: a reason where one does not run, float64's numbers where it does."""

import re
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers as module
from benchmarks.contenders import GROUPS, Contender
from benchmarks.inputs import DISTRIBUTIONS, Case, Exact, Inputs
from benchmarks.peers import VERSIONS, peers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = Case.of("tiny", 24, dtype="float32", active=0.5)
IMPORTED = {"liger-kernel": "liger_kernel", "trl": "trl", "verl": "verl", "cut-cross-entropy": "cut_cross_entropy"}
OWNERS = {"Liger": "liger-kernel", "TRL": "trl", "verl": "verl", "Apple": "cut-cross-entropy"}
PAIRS = [(group, c.name) for group in GROUPS for c in peers(group, Inputs(HALF, CPU))]


def contender(group: str, name: str, x: Inputs) -> Contender:
    return next(c for c in peers(group, x) if c.name == name)


def test_the_heads_of_verl_are_its_own_although_this_library_is_a_plugin_of_it():
    pytest.importorskip("verl")
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy

    assert not FusedLinearForPPO.forward.__module__.startswith("bupo")
    assert not linear_cross_entropy.linear_cross_entropy.__module__.startswith("bupo")


def package_of(c: Contender) -> str:
    return OWNERS.get(c.name.split()[0], "torch")


def on_hopper(monkeypatch, case: Case = HALF) -> Inputs:
    """Inputs that say so; their tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    x = Inputs(case, CPU)
    x.device = CUDA
    return x


# ---- which there are


@pytest.mark.broad
def test_importing_and_listing_peers_imports_none_of_them():
    code = (
        "import sys, torch; from benchmarks.peers import peers; from benchmarks.inputs import Case, Inputs\n"
        "x = Inputs(Case.of('tiny', 4), torch.device('cpu'))\n"
        "[list(peers(group, x)) for group in ('forward', 'forward+backward', 'one-pass loss', 'lens')]\n"
        f"print(*(name for name in {list(IMPORTED.values())} if name in sys.modules))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_group_but_the_lens_has_each_peer_once():
    assert len(set(PAIRS)) == len(PAIRS)
    for group in GROUPS:
        found = list(peers(group, Inputs(HALF, CPU)))
        assert {package_of(c) for c in found} == (set() if group == "lens" else {*VERSIONS, "torch"})
        assert all(c.group == group and c.who == "peer" for c in found)
        one_pass = {"policy loss", "cross entropy"}
        assert {c.computes for c in found} <= (one_pass if group == "one-pass loss" else {"log-prob", "log-prob, entropy"})


def test_names_carry_the_versions_read():
    for group, name in PAIRS:
        version = VERSIONS.get(package_of(contender(group, name, Inputs(HALF, CPU))), torch.__version__.partition("+")[0])
        assert f" {version} " in f"{name} ".replace(",", " ")


def test_an_unknown_group_is_named():
    with pytest.raises(ValueError, match=r"^group: 'backward' given, accepted are 'forward'"):
        list(peers("backward", Inputs(HALF, CPU)))


def test_products_are_over_all_rows_unless_the_peer_skips_those_that_do_not_count(monkeypatch):
    full = Inputs(Case.of("tiny", 24, dtype="float32"), CPU)
    for group, name in PAIRS:
        ratio = contender(group, name, Inputs(HALF, CPU)).products / contender(group, name, full).products
        assert ratio == (1 if name.startswith("Apple") else 2)
        assert contender(group, name, full).products >= GROUPS[group]
    (trl,) = (c for c in peers("forward+backward", on_hopper(monkeypatch)) if c.name.startswith("TRL"))
    assert trl.products == 4


def test_remarks_on_rounding_and_gradients_are_where_they_apply():
    x, rounded = Inputs(HALF, CPU), Inputs(Case.of("tiny", 4), CPU)
    assert not any("float" in c.remark for group in GROUPS for c in peers(group, x))
    assert not any("gradients" in c.remark for c in peers("forward", rounded))
    (filtered,) = (c for c in peers("forward+backward", rounded) if "filters" in c.remark)
    assert "2^-12" in filtered.remark


# ---- why one does not run


def test_without_their_packages_every_row_names_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in IMPORTED.values()] + list(IMPORTED.values()):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    x = Inputs(HALF, CPU)
    for group, name in PAIRS:
        c = contender(group, name, x)
        package = package_of(c)
        wanted = "torch>=2.13" if package == "torch" else f"{package}=={VERSIONS[package]}"
        assert f"needs pip install {wanted}" in c.why_not(x)


def test_another_version_is_named_and_not_run(monkeypatch):
    monkeypatch.setattr(module, "import_module", lambda name: None)
    monkeypatch.setattr(module, "installed", lambda name: "9.9.9")
    x = Inputs(HALF, CPU)
    for group, name in PAIRS:
        c = contender(group, name, x)
        if package_of(c) != "torch":
            assert re.search(r"needs pip install [\w-]+==[\d.]+, 9\.9\.9 is installed$", c.why_not(x))


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(module, "import_module", lambda name: None)
    monkeypatch.setattr(module, "installed", VERSIONS.get)


def test_triton_kernels_need_a_gpu(all_installed):
    x = Inputs(Case.of("tiny", 4), CPU)
    reasons = {name: contender(group, name, x).why_not(x) for group, name in PAIRS}
    needy = {name for name, reason in reasons.items() if reason == "its Triton kernels need a GPU"}
    assert {name.split()[0] for name in needy} == {"Apple", "Liger", "verl"}
    assert all(name.startswith("Apple") or "Triton" in name for name in needy)


def test_what_the_kernels_do_not_take_is_said(all_installed, monkeypatch):
    x = on_hopper(monkeypatch)
    reasons = {name: contender("forward+backward", name, x).why_not(x) for name in (c.name for c in peers("forward+backward", x))}
    assert reasons["Apple CCE 25.1.1"] == "its gradients need bfloat16 or float16"
    assert reasons["Liger 0.8.5 scaled CE, CuTe"] == "bfloat16 only on Hopper"
    assert reasons["verl 0.9.1 Triton"] == "its kernels need a width that is a multiple of 128, not 64"
    x = on_hopper(monkeypatch, Case("small", 300, 128, 4))
    assert all(c.why_not(x) is None for c in peers("forward+backward", x) if package_of(c) != "torch")


def test_ligers_scaled_cross_entropy_is_named_after_the_path_it_takes(monkeypatch):
    def names(x: Inputs) -> set[str]:
        return {c.name.rpartition(", ")[2] for c in peers("forward", x) if "scaled" in c.name}

    assert names(Inputs(HALF, CPU)) == {"torch"}
    x = on_hopper(monkeypatch)
    assert names(x) == {"CuTe"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert names(x) == {"torch"}
    monkeypatch.setenv("LIGER_KERNEL_IMPL", "cuTile")
    assert names(x) == {"cuTile"}


# ---- what those that run compute


def assert_exact(c: Contender, x: Inputs) -> None:
    """Against float64, on flat and on peaked policies, within what fp32 logits and sums cost."""
    for distribution in DISTRIBUTIONS:
        x.refresh(distribution)
        exact = Exact.of(x)
        largest = (x.hidden @ x.weight.T).abs().max().item()
        bound = 16 * torch.finfo(torch.float32).eps * (1 + largest)
        with torch.set_grad_enabled(c.group != "forward"), torch.compiler.set_stance("force_eager"):
            found = c.call(x)
            if c.group != "forward":
                outputs = [found] if c.group == "one-pass loss" else [value for value in found if value is not None]
                upstream = [None] if c.group == "one-pass loss" else [x.g_logprob, x.g_entropy][: len(outputs)]
                gradients = torch.autograd.grad(outputs, x.leaves, upstream)
                truths = exact.gradients(x, *x.coefficients(c.computes))
                for gradient, at, truth in zip(gradients, (exact.rows, exact.columns), truths, strict=True):
                    assert gradient.isfinite().all()
                    assert (gradient[at] - truth).norm() <= bound * truth.norm()
        if c.group == "one-pass loss":
            means = {"cross entropy": -exact.logprobs.sum(), "policy loss": -x.advantages.double().sum()}
            assert found.item() == pytest.approx(means[c.computes].item() / x.active_rows, abs=bound)
            continue
        assert (found[1] is None) == (c.computes == "log-prob")
        for value, truth in zip(found, (exact.logprobs, exact.entropy), strict=True):
            if value is not None:
                assert value.shape == truth.shape
                assert (value - truth)[x.mask].abs().max() <= bound


@pytest.mark.parametrize(("group", "name"), PAIRS)
def test_a_peer_that_runs_agrees_with_float64(group, name):
    x = Inputs(HALF, CPU)
    c = contender(group, name, x)
    if reason := c.why_not(x):
        pytest.skip(reason)
    assert_exact(c, x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is in Triton's interpreter where there is no GPU only")
@pytest.mark.parametrize("group", ["forward", "forward+backward", "one-pass loss"])
def test_ligers_triton_kernel_agrees_with_float64(group):
    pytest.importorskip("liger_kernel.ops")
    x = Inputs(HALF, CPU)
    assert_exact(contender(group, "Liger 0.8.5 Triton", x), x)


def test_trls_rows_that_count_are_gathered_on_a_gpu_and_put_back(monkeypatch):
    utils = pytest.importorskip("trl.trainer.utils")
    x = on_hopper(monkeypatch)
    trl = {group: contender(group, "TRL 1.16.0 chunked", x) for group in ("forward", "forward+backward", "one-pass loss")}
    seen = []
    real = utils._ChunkedLogProbFunction

    class Spy:
        @staticmethod
        def apply(hidden, *options):
            seen.append(len(hidden))
            return real.apply(hidden, *options)

    x.device = CPU
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spy)
    for c in trl.values():
        assert_exact(c, x)
    assert set(seen) == {x.active_rows}


@pytest.mark.parametrize("name", ["Liger 0.8.5 Triton", "Apple CCE 25.1.1, torch.compile"])
def test_a_forward_without_gradients_hands_over_operands_that_want_none(monkeypatch, name):
    at = {"Liger": ("liger_kernel.ops.fused_linear_cross_entropy", "fused_linear_cross_entropy_forward")}
    at |= {"Apple": ("cut_cross_entropy", "linear_cross_entropy")}
    owner, function = at[name.split()[0]]
    pytest.importorskip(owner)
    owner, wanted = import_module(owner), []

    def spy(*operands, **options):
        operands = [*operands, *options.values()]
        wanted.append([x.requires_grad for x in operands if isinstance(x, torch.Tensor)])
        raise RuntimeError("seen")

    monkeypatch.setattr(owner, function, spy)
    x = Inputs(HALF, CPU)
    for mode in (torch.no_grad(), nullcontext()):
        with mode, pytest.raises(RuntimeError, match="seen"):
            contender("forward", name, x).call(x)
    assert not any(wanted[0])
    assert any(wanted[1])
