"""The CUDA row kernels without a GPU: what nvcc makes of them, and their source on emulated blocks of threads against float64."""

from __future__ import annotations

import itertools
import math
import mmap
from dataclasses import dataclass, replace

import cuda_counts
import emulation
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import CONTRACT, chain_error, contract, examples
from torch import Tensor

from bupo_kernels.backends import algebra
from bupo_kernels.policy_losses import PolicyObjective, policy_terms

BF16, FP32 = torch.bfloat16, torch.float32
EPS = torch.finfo(FP32).eps
KERNELS = {"row_statistics": 6, "row_gradient": 6, "row_policy_loss": 6}  # instantiations


@pytest.fixture(scope="module")
def cuda():
    if reason := emulation.why_not():
        pytest.skip(reason)
    module = emulation.emulated_cuda()
    yield module
    module.run_threads("ascending")


# --- what nvcc makes of them ---


@pytest.mark.broad
@pytest.mark.parametrize("arch", cuda_counts.ARCHS)
@pytest.mark.parametrize("source", cuda_counts.SOURCES, ids=lambda source: source.stem)
def test_kernels_move_words_of_16_bytes_within_registers_and_their_budget_of_instructions(source, arch):
    if reason := cuda_counts.why_not():
        pytest.skip(reason)
    found = cuda_counts.count(source, arch)
    assert len(found) == KERNELS[source.stem]
    assert {str(row): cuda_counts.faults(row) for row in found} == {str(row): [] for row in found}


LOOP = """
.L_x_1:
        /*0100*/              @!P0 EXIT ;
        /*0110*/               @P1 BRA `(.L_x_2) ;
        /*0120*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0130*/                   LDG.E.128 R8, desc[UR6][R2.64+0x10] ;
        /*0140*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0150*/                   LDG.E.U16 R4, desc[UR6][R2.64] ;
        /*0160*/                   LDG.E.U16 R4, desc[UR6][R2.64+0x2] ;
        /*0170*/                   LDG.E.U16 R4, desc[UR6][R2.64+0x4] ;
        /*0180*/                   LDG.E.U16 R4, desc[UR6][R2.64+0x6] ;
.L_x_3:
        /*0190*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*01a0*/                   BRA `(.L_x_1) ;
"""


def test_the_shortest_way_around_a_loop_is_counted():
    assert cuda_counts._loops(LOOP) == ((7 / cuda_counts.GROUP, 2, 1),)
    twice = LOOP + LOOP.replace(".L_x_", ".L_y_").replace("@!P0 EXIT", "NOP")  # the same loop with a bias, say
    assert cuda_counts._loops(twice) == ((7 / cuda_counts.GROUP, 2, 1),)
    assert cuda_counts._loops(LOOP.replace(".128", "")) == ()
    # The second word is asked for after the first has been waited for.
    assert cuda_counts._loops(LOOP.replace("/*0130*/ ", "/*0128*/ MUFU.EX2 R4, R4 ;\n        /*0130*/ ")) == ()


def test_what_a_kernel_may_not_have_is_named(monkeypatch):
    monkeypatch.setattr(cuda_counts, "release", lambda: cuda_counts.MEASURED_WITH)
    right = cuda_counts.Counted("row_statistics", "bf16", "", "affine", "90", 64, 0, ((19.0, 2, 0),))
    assert cuda_counts.faults(right) == []
    assert cuda_counts.faults(replace(right, local=16)) == ["it reaches for local memory (16)"]
    assert cuda_counts.faults(replace(right, loops=((30.0, 2, 0),)))[0].startswith("it has 30.0 instructions for a logit")
    for loops in (((19.0, 1, 0),), (), ((19.0, 2, 0), (17.0, 2, 2))):
        assert "words of 16 bytes" in cuda_counts.faults(replace(right, loops=loops))[0]
    writes = replace(right, kernel="row_policy_loss", products="fp32", gradient="bf16", loops=((18.0, 4, 0), (16.0, 4, 2)))
    assert cuda_counts.faults(writes) == []
    assert cuda_counts.faults(replace(writes, loops=writes.loops[:1])) != []
    monkeypatch.setattr(cuda_counts, "release", lambda: "12.4")
    assert cuda_counts.faults(replace(right, loops=((30.0, 2, 0),))) == []


# --- chunks in memory ---


@dataclass
class Chunk:
    """[rows, columns] in memory with gaps of NaN between its rows and around them, and how its products become logits."""

    products: Tensor  # a view into `memory`
    memory: Tensor
    bias: Tensor | None = None  # [columns] fp32
    temperature: float | Tensor = 1.0  # or [rows]
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self) -> tuple[Tensor, Tensor]:
        """In float64, of products that are a leaf."""
        leaf = self.products.double().requires_grad_()
        z = leaf if self.bias is None else leaf + self.bias.double()
        z = z * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        by_row = isinstance(self.temperature, Tensor)
        return z / (self.temperature.double().unsqueeze(1) if by_row else self.temperature), leaf

    def readout(self, columns: slice = slice(None)) -> dict:
        """Return the arguments of the readout."""
        by_row = isinstance(self.temperature, Tensor)
        bias = None if self.bias is None else self.bias[columns]  # memory of self.bias, which lives
        return {
            "bias": address(bias),
            "row_temperature": address(self.temperature) if by_row else 0,
            "temperature": 7.0 if by_row else self.temperature,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }

    @property
    def product_scale(self) -> Tensor:  # [rows]
        return torch.as_tensor(self.logit_scale / self.temperature, dtype=torch.float64).expand(len(self.products))

    def gaps_are_untouched(self) -> bool:
        rest = self.memory.clone()
        rest.as_strided(self.products.shape, self.products.stride(), self.products.storage_offset()).fill_(math.nan)
        return bool(rest.isnan().all())


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def in_memory(values: Tensor, padding: int = 0, offset: int = 0, **options) -> Chunk:
    """A copy whose rows are ``padding`` elements apart and begin ``offset`` elements past a multiple of 64 bytes."""
    rows, columns = values.shape
    stride, border = columns + padding, 64 + offset
    memory = torch.full((rows * stride + border + 192,), math.nan, dtype=values.dtype)
    start = border + (-memory.data_ptr() // values.itemsize) % 64
    products = memory.as_strided((rows, columns), (stride, 1), start)
    products.copy_(values)
    return Chunk(products, memory, **options)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def place(chunk: Chunk, columns: slice = slice(None)) -> dict:
    products = chunk.products[:, columns]
    return {
        "products": address(products),
        "dtype": dtype_name(products.dtype),
        "rows": products.shape[0],
        "columns": products.shape[1],
        "stride": products.stride(0),
    }


VALUES = {
    "normal": lambda shape: torch.randn(shape),
    "large": lambda shape: torch.randn(shape) * 150,
    "nearly uniform": lambda shape: torch.randn(shape) * 1e-4,
    "equal": lambda shape: torch.full(shape, 3.25),
    "far below zero": lambda shape: torch.randn(shape) * 3 - 5e4,
    "one far above": lambda shape: torch.randn(shape).index_fill_(1, torch.tensor([shape[1] // 2]), 90.0),
    "ascending": lambda shape: torch.linspace(-40, 40, shape[1]).expand(shape),
}
OPTIONS = ("plain", "bias", "temperature", "temperature per row", "logit scale", "softcap", "everything")
# Columns on both sides of every border: of a word, of a group, of the block's size and of its whole steps.
COLUMNS = st.one_of(
    st.integers(1, 300), st.sampled_from([511, 512, 513, 1023, 1024, 1032, 2047, 2060, 4099, 8191, 8192, 9001, 16500, 33000])
)


def options_of(name: str, rows: int, columns: int) -> dict:
    everything = name == "everything"
    options = {}
    if everything or name == "bias":
        options["bias"] = torch.randn(columns)
    if everything or name == "temperature per row":
        options["temperature"] = torch.rand(rows) + 0.5
    elif name == "temperature":
        options["temperature"] = 0.7
    if everything or name == "logit scale":
        options["logit_scale"] = 0.3
    if everything or name == "softcap":
        options["softcap"] = 30.0
    return options


@st.composite
def chunks(draw, most_rows: int = 3, dtypes=(FP32, BF16)) -> Chunk:
    columns = draw(COLUMNS)
    rows = draw(st.integers(1, most_rows if columns < 2000 else 2))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    values = VALUES[draw(st.sampled_from(list(VALUES)))]((rows, columns)).to(draw(st.sampled_from(dtypes)))
    options = options_of(draw(st.sampled_from(OPTIONS)), rows, columns)
    padding, offset = draw(st.sampled_from([(0, 0), (-columns % 8, 0), (-columns % 8, 4), (1, 1), (3, 0), (5, 7)]))
    return in_memory(values, padding, offset, **options)


ORDERS = st.sampled_from(["ascending", "descending"])


# --- statistics ---


def row_statistics(cuda, chunk: Chunk, targets: Tensor, cuts=(), found: Tensor | None = None) -> algebra.Statistics:
    """Of a vocabulary in slices."""
    found = torch.full((4, len(targets)), math.nan) if found is None else found
    for index, (first, last) in enumerate(itertools.pairwise([0, *cuts, chunk.products.shape[1]])):
        columns = slice(first, last)
        cuda.row_statistics(
            **place(chunk, columns),
            **chunk.readout(columns),
            first_column=first,
            targets=address(targets),
            **{name: address(row) for name, row in zip(("m", "s", "t", "z_y"), found, strict=True)},
            first=index == 0,
            stream=0,
        )
    return algebra.Statistics(*found)


def exact_statistics(z: Tensor, targets: Tensor) -> algebra.Statistics:
    m = z.amax(1)
    x = z - m.unsqueeze(1)
    return algebra.Statistics(m, x.exp().sum(1), (x * x.exp()).sum(1), z.gather(1, targets.unsqueeze(1)).squeeze(1))


def some_targets(rows: int, columns: int) -> Tensor:
    targets = torch.randint(0, columns, (rows,))
    targets[0] = columns - 1
    return targets


def assert_results(found: algebra.Results, exact: algebra.Results, z: Tensor):
    error = CONTRACT * (1 + z.abs().amax(1))
    assert ((found.logprob - exact.logprob).abs() <= error).all()
    assert ((found.logsumexp - exact.logsumexp).abs() <= error).all()
    assert ((found.entropy - exact.entropy).abs() <= error * (1 + math.log(z.shape[1]))).all()


@examples(250)
@given(chunk=chunks(), order=ORDERS, data=st.data())
def test_statistics_of_any_chunk_and_slicing(cuda, chunk, order, data):
    cuda.run_threads(order)
    rows, columns = chunk.products.shape
    targets = some_targets(rows, columns)
    z = chunk.logits()[0].detach()
    exact = exact_statistics(z, targets)
    whole = row_statistics(cuda, chunk, targets)
    cuts = sorted(data.draw(st.sets(st.integers(1, columns), max_size=3), label="cuts") - {columns})
    for found in (whole, row_statistics(cuda, chunk, targets, cuts)):
        assert torch.equal(found.m, whole.m)
        assert torch.equal(found.z_y, whole.z_y)
        wanted = algebra.finish(exact, columns, with_entropy=True)
        assert_results(algebra.finish(found, columns, with_entropy=True), wanted, z)
        if chunk.readout() == Chunk(chunk.products, chunk.memory).readout():  # then the logits are exact, and sums of one sign
            assert torch.equal(found.m.double(), exact.m)
            assert torch.equal(found.z_y.double(), exact.z_y)
            of_sum = chain_error(columns) + 4 * EPS  # and of each exponential
            assert torch.allclose(found.s.double(), exact.s, rtol=of_sum, atol=0)
            assert torch.allclose(found.t.double(), exact.t, rtol=2 * of_sum, atol=1e-30)
    assert chunk.gaps_are_untouched()


def test_running_statistics_may_begin_as_those_of_nothing(cuda):
    chunk = in_memory(torch.randn(3, 100))
    targets = some_targets(3, 100)
    wanted = row_statistics(cuda, chunk, targets)
    found = algebra.Statistics.empty(3, FP32, torch.device("cpu"))
    arguments = dict(zip(("m", "s", "t", "z_y"), map(address, found), strict=True))
    cuda.row_statistics(
        **place(chunk), **chunk.readout(), first_column=0, targets=address(targets), **arguments, first=False, stream=0
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_the_targets_logit_is_0_until_its_slice_comes_and_stays_after(cuda):
    values, targets = torch.randn(3, 90), torch.tensor([10, 40, 89])
    chunk = in_memory(values)
    found = row_statistics(cuda, replace(chunk, products=chunk.products[:, :60]), targets, cuts=(30,))
    assert torch.equal(found.z_y, torch.tensor([values[0, 10], values[1, 40], 0.0]))


@examples(60)
@given(
    dtype=st.sampled_from([FP32, BF16]),
    columns=COLUMNS,
    padding=st.integers(0, 9),
    offset=st.integers(0, 9),
    option=st.sampled_from(OPTIONS),
)
def test_a_row_has_the_same_bits_in_any_chunk_and_order_of_threads(cuda, dtype, columns, padding, offset, option):
    torch.manual_seed(columns)
    values, targets = torch.randn(3, columns).to(dtype) * 5, some_targets(3, columns)
    options = options_of(option, 3, columns)
    alone = {**options, "temperature": options["temperature"][1:2]} if option in ("temperature per row", "everything") else options
    cuda.run_threads("ascending")
    of_chunk = row_statistics(cuda, in_memory(values, **options), targets)
    cuda.run_threads("descending")
    of_row = row_statistics(cuda, in_memory(values[1:2], padding, offset, **alone), targets[1:2])
    for many, one in zip(of_chunk, of_row, strict=True):
        assert torch.equal(many[1:2], one)


def test_rows_may_lie_more_than_2_31_elements_apart(cuda):
    stride, columns = 2**31 + 8, 50
    size = 2 * (stride + columns)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)) as pages:
        memory = np.frombuffer(pages, dtype=np.uint16)
        values = torch.randn(2, columns).to(BF16)
        for row in range(2):
            memory[row * stride : row * stride + columns] = values[row].view(torch.uint16).numpy()
        start, targets = memory.ctypes.data, torch.tensor([3, 49])
        chunk = Chunk(values, values)
        where = {**place(chunk), "products": start, "stride": stride}
        found = torch.empty(4, 2)
        of_rows = dict(zip(("m", "s", "t", "z_y"), map(address, found), strict=True))
        cuda.row_statistics(**where, **chunk.readout(), first_column=0, targets=address(targets), **of_rows, first=True, stream=0)
        wanted = exact_statistics(values.double(), targets)
        assert torch.allclose(found, torch.stack(wanted).float(), rtol=2 * (chain_error(columns) + 4 * EPS))

        coefficients = algebra.Coefficients(found[0], torch.ones(2), None, torch.zeros(2), targets)
        gradient = {"gradient": start, "gradient_dtype": "bfloat16", "gradient_stride": stride, "n": 2}
        cuda.row_gradient(**where, **chunk.readout(), first_column=0, **of_coefficients(coefficients), **gradient, stream=0)
        second = torch.from_numpy(memory[stride : stride + columns].copy()).view(BF16)
        assert torch.allclose(second[:49].float(), (values[1].float() - found[0, 1]).exp()[:49], rtol=2**-8)
        assert second[49] == 0
        del memory


# --- gradients ---


def of_coefficients(coefficients: algebra.Coefficients) -> dict:
    return {name: address(x) for name, x in coefficients._asdict().items()}


def row_gradient(cuda, chunk, coefficients, *, to: Chunk, columns=slice(None)):
    cuda.row_gradient(
        **place(chunk, columns),
        **chunk.readout(columns),
        first_column=columns.start or 0,
        **of_coefficients(coefficients),
        n=len(coefficients.m),
        gradient=address(to.products),
        gradient_dtype=dtype_name(to.products.dtype),
        gradient_stride=to.products.stride(0),
        stream=0,
    )


def exact_gradient(chunk: Chunk, targets: Tensor, upstream: list[Tensor | None]) -> tuple[Tensor, algebra.Coefficients]:
    """Of products by autograd, float64; and the coefficients that say the same, float64."""
    z, leaf = chunk.logits()
    logprobs = z.log_softmax(1)
    lp = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)
    entropy, lse = -(logprobs.exp() * logprobs).sum(1), z.logsumexp(1)
    total = sum((g * x).sum() for g, x in zip(upstream, (lp, entropy, lse), strict=True) if g is not None)
    (dz,) = torch.autograd.grad(total, leaf)
    m, s, *_ = exact_statistics(z.detach(), targets)
    coefficients = algebra.coefficients(*upstream, m, s.log(), lp.detach(), entropy.detach(), targets)
    return dz, coefficients.scaled(chunk.product_scale)


def in_fp32(coefficients: algebra.Coefficients) -> algebra.Coefficients:
    return algebra.Coefficients(*(x if x is None or x.dtype == torch.int64 else x.float() for x in coefficients))


def assert_gradient(found: Tensor, exact: Tensor, bound: Tensor, z: Tensor):
    """Within the error of the logits times the largest dz there could be, and one rounding to bf16."""
    error = 2 * CONTRACT * (1 + z.abs().amax(1, keepdim=True)) * bound.unsqueeze(1)
    if found.dtype == BF16:
        error = error + 2**-8 * exact.abs()
    assert ((found.double() - exact).abs() <= error).all()


@examples(150)
@given(
    chunk=chunks(), order=ORDERS, with_entropy=st.booleans(), narrow=st.booleans(), gap=st.sampled_from([0, 1, 8]), data=st.data()
)
def test_gradients_of_any_chunk_and_slicing(cuda, chunk, order, with_entropy, narrow, gap, data):
    cuda.run_threads(order)
    rows, columns = chunk.products.shape
    targets = some_targets(rows, columns)
    upstream = [torch.randn(rows).double(), torch.randn(rows).double() if with_entropy else None, torch.randn(rows).double()]
    exact, coefficients = exact_gradient(chunk, targets, upstream)
    count = data.draw(st.integers(0, rows), label="count")  # the first of the rows
    of_rows = algebra.Coefficients(*(x if x is None else x[:count] for x in coefficients))
    cut = data.draw(st.integers(0, columns - 1), label="cut")
    dtype = BF16 if narrow else chunk.products.dtype
    for part in (slice(0, cut), slice(cut, columns)):
        if part.start == part.stop:
            continue
        to = in_memory(torch.full((count, part.stop - part.start), 77.0).to(dtype), gap)
        row_gradient(cuda, chunk, in_fp32(of_rows), to=to, columns=part)
        z = chunk.logits()[0].detach()[:count]
        assert_gradient(to.products, exact[:count, part], of_rows.bound(), z)
        assert to.gaps_are_untouched()
    assert chunk.gaps_are_untouched()


@examples(60)
@given(chunk=chunks(), order=ORDERS)
def test_in_place_and_rounded_gradients_are_the_same(cuda, chunk, order):
    cuda.run_threads(order)
    rows, columns = chunk.products.shape
    targets = some_targets(rows, columns)
    coefficients = in_fp32(exact_gradient(chunk, targets, [torch.randn(rows).double() for _ in range(3)])[1])
    wide = replace(chunk, products=chunk.products.float().contiguous())
    apart = Chunk(torch.empty_like(wide.products), wide.products)
    row_gradient(cuda, wide, coefficients, to=apart)
    rounded = Chunk(torch.empty_like(wide.products, dtype=BF16), wide.products)
    row_gradient(cuda, wide, coefficients, to=rounded)
    row_gradient(cuda, chunk, coefficients, to=chunk)
    assert torch.equal(rounded.products, apart.products.to(BF16))
    assert torch.equal(chunk.products, apart.products.to(chunk.products.dtype))
    assert chunk.gaps_are_untouched()


def test_a_rounded_gradient_is_the_nearest_and_of_two_the_even_one(cuda):
    # Products of 0 with m = 0 make the constant the gradient, whatever its bits.
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x7F7FFFFF, 0x00000001, 0x00018000, 0x7FC00000, 0x7F800000]
    )
    bits = torch.cat([bits, bits + 2**31]).to(torch.uint32).view(torch.int32).view(FP32)
    n = len(bits)
    zeros, to = in_memory(torch.zeros(n, 9)), in_memory(torch.zeros(n, 9, dtype=BF16))
    row_gradient(cuda, zeros, algebra.Coefficients(torch.zeros(n), bits, None, bits, torch.zeros(n, dtype=torch.int64)), to=to)
    want = bits.to(BF16).unsqueeze(1).expand(n, 9)
    assert torch.equal(to.products.nan_to_num(0.5), want.nan_to_num(0.5))


# --- the policy loss ---

OBJECTIVES = {
    "ppo": PolicyObjective(),
    "clip-higher": PolicyObjective(clip_low=0.2, clip_high=0.28),
    "dual clip": PolicyObjective(dual_clip=2.5),
    "delta": PolicyObjective(delta=1.6),
    "unclipped": PolicyObjective(clip=None),
    "unclipped, delta": PolicyObjective(clip=None, delta=2.0),
    "reinforce": PolicyObjective(ratio="none", clip=None),
    "cispo": PolicyObjective(clip="cispo", clip_high=0.3),
    "sapo": PolicyObjective(clip="sapo", sapo_temperature_pos=0.8, sapo_temperature_neg=2.0),
    "k1": PolicyObjective(kl="k1", kl_coefficient=0.1),
    "k2": PolicyObjective(kl="k2", kl_coefficient=0.1),
    "k3": PolicyObjective(kl="k3", kl_coefficient=0.1),
    "k3, measured": PolicyObjective(kl="k3"),
    "entropy": PolicyObjective(entropy_coefficient=0.05),
    "importance": PolicyObjective(importance="token", importance_cap=1.5),
    "cispo, importance, k2": PolicyObjective(clip="cispo", importance="token", kl="k2", kl_coefficient=0.2),
    "reinforce, entropy, k1": PolicyObjective(ratio="none", clip=None, entropy_coefficient=0.1, kl="k1", kl_coefficient=0.1),
    "everything": PolicyObjective(
        dual_clip=3.5, kl="k3", kl_coefficient=0.1, entropy_coefficient=0.02, importance="token", importance_cap=3.0
    ),
}
# ln ratio: inside and outside of every bound above, and far from each.
LOG_RATIOS = torch.tensor([-25.0, -3.0, -0.5, -0.1, 0.0, 0.1, 0.35, 0.6, 1.1, 3.0, 25.0], dtype=torch.float64)
PER_ROW = ("weights", "advantages", "old_logprobs", "reference_logprobs", "sampler_logprobs")


def row_policy_loss(cuda, chunk: Chunk, objective, targets, given: dict, to: Chunk | None):
    rows = len(targets)
    loss, logprob, entropy, used = *torch.full((3, rows), 77.0), torch.ones(rows, dtype=torch.bool)
    per_row = {name: given[name] if given[name] is None else given[name].float().contiguous() for name in PER_ROW}
    cuda.row_policy_loss(
        **place(chunk),
        **chunk.readout(),
        objective=objective,
        targets=address(targets),
        **{name: address(x) for name, x in per_row.items()},
        loss=address(loss),
        logprob=address(logprob),
        entropy=address(entropy),
        used=address(used),
        gradient=0 if to is None else address(to.products),
        gradient_dtype=dtype_name(chunk.products.dtype if to is None else to.products.dtype),
        gradient_stride=0 if to is None else to.products.stride(0),
        stream=0,
    )
    return loss, logprob, entropy, used


def some_tokens(logprob: Tensor, objective: PolicyObjective, on_policy: bool, with_sampler: bool) -> dict:
    """What comes per row, float64 but of values that fp32 holds."""
    rows = len(logprob)

    def near(distance: Tensor) -> Tensor:
        return (logprob - distance[torch.randint(0, len(distance), (rows,))]).float().double()

    sampler = near(LOG_RATIOS[2:9]) if objective.needs_sampler or with_sampler else None
    if sampler is not None and rows > 2:
        sampler[1] = math.nan
        sampler[2] = -math.inf
    return {
        "weights": (torch.rand(rows) + 0.1).double(),
        "advantages": torch.randn(rows).double() * (torch.rand(rows) > 0.2),
        "old_logprobs": None if on_policy else near(LOG_RATIOS),
        "reference_logprobs": near(LOG_RATIOS[LOG_RATIOS != 0]) if objective.needs_reference else None,
        "sampler_logprobs": sampler,
    }


@examples(300)
@given(
    chunk=chunks(most_rows=6),
    name=st.sampled_from(list(OBJECTIVES)),
    order=ORDERS,
    on_policy=st.booleans(),
    with_sampler=st.booleans(),
    where=st.sampled_from(["in place", "apart", "narrower"]),
)
def test_policy_loss_and_gradient_of_any_chunk_and_objective(cuda, chunk, name, order, on_policy, with_sampler, where):
    cuda.run_threads(order)
    objective, (rows, columns) = OBJECTIVES[name], chunk.products.shape
    targets = some_targets(rows, columns)
    z = chunk.logits()[0].detach()
    exact = algebra.finish(exact_statistics(z, targets), columns, with_entropy=True)
    given = some_tokens(exact.logprob, objective, on_policy, with_sampler)
    inputs = {k: v for k, v in given.items() if k not in ("weights", "advantages")}
    terms = policy_terms(objective, exact.logprob, exact.entropy, given["advantages"], **inputs)
    upstream = [given["weights"] * terms.d_logprob, given["weights"] * terms.d_entropy, None]
    gradient, _ = exact_gradient(chunk, targets, upstream)

    to = chunk
    if where != "in place":
        to = in_memory(torch.full((rows, columns), 77.0).to(chunk.products.dtype if where == "apart" else BF16), 3)
    loss, logprob, entropy, used = row_policy_loss(cuda, chunk, objective, targets, given, to)

    assert_results(algebra.Results(logprob, entropy, exact.logsumexp, None), exact, z)
    reach = 1 + math.log(columns)
    size = (
        terms.loss.abs() + terms.d_logprob.abs() + terms.d_entropy.abs() * reach + objective.kl_coefficient * (1 + terms.kl.abs())
    )
    size = given["weights"] * (size + terms.weight * given["advantages"].abs())
    assert ((loss - given["weights"] * terms.loss).abs() <= 2 * CONTRACT * (1 + z.abs().amax(1)) * size).all()
    assert torch.equal(used, (upstream[0] != 0) | (upstream[1] != 0))
    assert (to.products[~used] == 0).all()
    bound = chunk.product_scale.abs() * (size + upstream[1].abs() * 2 * reach)
    assert_gradient(to.products, gradient, bound, z)
    assert chunk.gaps_are_untouched()
    assert to.gaps_are_untouched()


@pytest.mark.parametrize("option", ["plain", "softcap"])
def test_small_gradients_beside_a_sure_target_are_as_accurate_as_large_ones(cuda, option):
    values = torch.randn(4, 700)
    targets = some_targets(4, 700)
    values[torch.arange(4), targets] = torch.tensor([14.0, 18.0, 22.0, 26.0])
    chunk = in_memory(values, **options_of(option, 4, 700))
    given = dict.fromkeys(PER_ROW) | {"weights": torch.ones(4), "advantages": torch.ones(4)}
    exact, _ = exact_gradient(chunk, targets, [-torch.ones(4).double(), None, None])
    to = in_memory(torch.zeros(4, 700))
    row_policy_loss(cuda, chunk, PolicyObjective(), targets, given, to)
    error = (to.products - exact).abs()
    on_target = torch.zeros_like(error, dtype=torch.bool).scatter_(1, targets.unsqueeze(1), True)
    assert (error[~on_target] <= contract(26.0) * exact.abs()[~on_target]).all()
    assert (error[on_target] <= 3.6e-7).all()  # three units in the last place of s, which is little more than 1


@examples(40)
@given(columns=COLUMNS, dtype=st.sampled_from([FP32, BF16]), offset=st.integers(0, 9))
def test_a_row_of_a_policy_loss_has_the_same_bits_in_any_chunk(cuda, columns, dtype, offset):
    torch.manual_seed(columns)
    values, targets, objective = torch.randn(3, columns).to(dtype) * 3, some_targets(3, columns), OBJECTIVES["everything"]
    given = some_tokens(torch.full((3,), -1.0).double(), objective, False, True)
    one = {name: x[2:] for name, x in given.items()}
    given["sampler_logprobs"][2] = one["sampler_logprobs"][0] = -1.25
    many_dz, one_dz = in_memory(values), in_memory(values[2:], 5, offset)
    cuda.run_threads("ascending")
    many = row_policy_loss(cuda, many_dz, objective, targets, given, many_dz)
    cuda.run_threads("descending")
    alone = row_policy_loss(cuda, one_dz, objective, targets[2:], one, one_dz)
    for a, b in zip(many, alone, strict=True):
        assert torch.equal(a[2:], b)
    assert torch.equal(many_dz.products[2:], one_dz.products)


def test_without_a_gradient_the_loss_is_the_same_and_nothing_else_is_written(cuda):
    chunk, targets, objective = in_memory(torch.randn(3, 600)), some_targets(3, 600), OBJECTIVES["k3"]
    given = some_tokens(torch.full((3,), -6.0).double(), objective, False, False)
    before = chunk.products.clone()
    found = row_policy_loss(cuda, chunk, objective, targets, given, None)
    assert torch.equal(chunk.products, before)
    for a, b in zip(found, row_policy_loss(cuda, chunk, objective, targets, given, chunk), strict=True):
        assert torch.equal(a, b)


def test_a_target_outside_of_the_vocabulary_is_no_number(cuda):
    chunk = in_memory(torch.randn(2, 40))
    given = dict.fromkeys(PER_ROW) | {"weights": torch.ones(2), "advantages": torch.ones(2)}
    loss, logprob, *_ = row_policy_loss(cuda, chunk, PolicyObjective(), torch.tensor([40, -1]), given, None)
    assert loss.isnan().all()
    assert logprob.isnan().all()


# --- the terms of a token ---


def torch_terms(objective, **token) -> tuple[float, float, float]:
    values = {name: torch.tensor([x], dtype=FP32) for name, x in token.items()}
    terms = policy_terms(objective, values.pop("logprobs"), values.pop("entropy"), values.pop("advantages"), **values)
    return terms.loss.item(), terms.d_logprob.item(), terms.d_entropy.item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_of_a_token_are_those_of_torch(cuda, name):
    objective = OBJECTIVES[name]
    special = [math.nan, math.inf, -math.inf]
    ratios = [*LOG_RATIOS.tolist(), 20.0, -20.0, 20.00001, -20.00001, 1e-6]
    tokens = [(-30.0, -30.0 - r, a, -1.0, -2.0) for r in ratios for a in (1.5, -0.7, 0.0)]
    tokens += [(-30.0, -30.0, 1.0, -30.0 + r, -30.0 - r) for r in ratios]
    tokens += [(-2.0, -2.1, 1.0, -1.0, x) for x in special] + [(-2.0, -2.1, x, -1.0, -2.0) for x in special]
    tokens += [(-2.0, x, 1.0, -1.0, -2.0) for x in special] + [(-2.0, -2.0, 1.0, x, -2.0) for x in special]
    tokens += [(x, -2.0, 1.0, -2.0, -2.0) for x in special]
    for logprob, old, advantage, reference, sampler in tokens:
        got = cuda.policy_terms(objective, logprob, 1.7, advantage, old, reference, sampler)
        token = {"logprobs": logprob, "entropy": 1.7, "advantages": advantage, "old_logprobs": old}
        want = torch_terms(objective, **token, reference_logprobs=reference, sampler_logprobs=sampler)
        assert got == pytest.approx(want, rel=8 * EPS, abs=EPS, nan_ok=True), (logprob, old, advantage, reference, sampler)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("distance", [0.0, 0.2, 0.9])
def test_a_token_exactly_on_a_bound_keeps_its_gradient(cuda, advantage, distance):
    def terms(objective):
        return cuda.policy_terms(objective, -1.0, 0.0, advantage, -1.0 - sign * distance, 0.0, 0.0)

    sign = 1 if advantage > 0 else -1
    ratio = abs(terms(PolicyObjective(clip=None))[0])
    bound = {"clip_high": ratio - 1} if advantage > 0 else {"clip_low": 1 - ratio}
    loss, d_logprob, _ = terms(PolicyObjective(**bound))
    assert d_logprob == loss == -advantage * ratio
    if distance:
        nearer = {name: x * (1 - 1e-6) for name, x in bound.items()}
        assert terms(PolicyObjective(**nearer))[1] == 0


# --- what no kernel takes, and what the emulation takes for an error ---


def test_arguments_that_no_kernel_takes_are_refused(cuda):
    chunk, targets = in_memory(torch.randn(4, 64)), some_targets(4, 64)
    coefficients = algebra.Coefficients(*torch.zeros(2, 4), None, torch.zeros(4), targets)
    before = chunk.products.clone()
    narrow = Chunk(chunk.products.view(BF16)[:, ::2], chunk.memory)  # rows in place, of half the size
    for to in (narrow, Chunk(chunk.products[1:], chunk.memory)):
        with pytest.raises(ValueError, match=r"row_gradient: .*apart from the products"):
            row_gradient(cuda, chunk, coefficients, to=to)
    narrow_chunk = in_memory(torch.randn(4, 64).to(BF16))
    with pytest.raises(ValueError, match="dtype"):
        row_gradient(cuda, narrow_chunk, coefficients, to=in_memory(torch.zeros(4, 64)))
    with pytest.raises(ValueError, match="float16"):
        cuda.row_threads(5, "float16")
    given = dict.fromkeys(PER_ROW) | {"weights": torch.ones(4), "advantages": torch.ones(4)}
    for objective, complaint in (
        (PolicyObjective(ratio="sequence"), "whole sequences"),
        (PolicyObjective(importance="sequence"), "whole sequences"),
        (PolicyObjective(top_entropy_quantile=0.2), "top_entropy_quantile"),
        (OBJECTIVES["k3"], "reference_logprobs"),
        (OBJECTIVES["importance"], "sampler_logprobs"),
    ):
        with pytest.raises(ValueError, match=complaint):
            row_policy_loss(cuda, chunk, objective, targets, given, chunk)
    with pytest.raises(ValueError, match="stride"):
        row_statistics(cuda, Chunk(chunk.products.as_strided((4, 64), (63, 1)), chunk.memory), targets)
    assert torch.equal(chunk.products, before)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("thread ends", "of 64 threads 63 wait for the block, 0 for their warp, and 1 have ended"),
        ("half a barrier", "of 64 threads 64 wait for the block"),
        ("lane leaves", "62 for their warp, and 2 have ended"),
        ("misaligned", "misaligned address"),
    ],
)
def test_the_emulation_reports_what_a_gpu_leaves_undefined(cuda, fault, complaint):
    for order in ("ascending", "descending"):
        cuda.run_threads(order)
        with pytest.raises(RuntimeError, match=complaint):
            cuda.run_faulty(fault, address(in_memory(torch.zeros(1, 64)).products))


def test_the_emulation_shows_a_missing_barrier_by_the_order_of_threads(cuda):
    results = []
    for order in ("ascending", "descending"):
        cuda.run_threads(order)
        x = torch.zeros(64)
        cuda.run_faulty("no barrier", address(x))
        results.append(x)
    assert not torch.equal(*results)


@pytest.mark.parametrize(
    ("columns", "dtype", "threads"),
    [(1, FP32, 32), (1023, FP32, 32), (1024, FP32, 64), (32768, FP32, 512), (32769, FP32, 1024), (65536, BF16, 512)],
)
def test_threads_of_a_block_follow_from_the_row(cuda, columns, dtype, threads):
    assert cuda.row_threads(columns, dtype_name(dtype)) == threads
