"""``logit_lens`` and ``linear_divergence`` of a vocabulary that lies on several ranks, against one process and the oracle."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from lenses import OF_ANY_BACKEND, OUTPUTS, Lens, assert_agrees, random_lens
from models import in_float64, tiny_model, token_batch
from problems import (
    OPTIONS,
    Case,
    assert_same_gradients,
    case_with,
    contract_of,
    covering,
    divergence_factor,
    random_case,
)
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bupo.measurement import peak_bytes
from bupo_kernels import LensStatistics, explain, linear_divergence, self_distillation_loss
from bupo_kernels.integrations.transformers import apply_fused_head
from bupo_kernels.numerics import entropy_factor

VOCAB = 37
SPLITS = {
    2: [(20, 17), (37, 0), (0, 37), (1, 36)],
    3: [(12, 13, 12), (0, 37, 0), (5, 0, 32)],
}
KINDS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5, "gjsd": 0.2}
EXACT = {"rtol": 1e-10, "atol": 1e-12, "equal_nan": True}
DTYPES = torch.float32, torch.bfloat16, torch.float64


def splits() -> list[tuple[int, ...]]:
    return SPLITS[dist.get_world_size()]


def chosen(*parameters: Sequence) -> list:
    """Cases of a product of parameters: all pairs of their values on two ranks, each value on three."""
    cases = covering([*itertools.product(*parameters)], 2 if dist.get_world_size() == 2 else 1, unpacked=True)
    return [case.values for case in cases if not case.marks]


def mine(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The part of this rank, a leaf that needs a gradient where the whole does."""
    return x.detach().split(list(sizes))[dist.get_rank()].clone().requires_grad_(x.requires_grad)


def assert_same_on_all_ranks(*results: Tensor | None) -> None:
    """Bit for bit."""
    for x in results:
        if x is not None and x.numel():
            bits = x.detach().contiguous().view(-1).view(torch.uint8)
            of_first = bits.clone()
            dist.broadcast(of_first, 0)
            assert torch.equal(bits, of_first)


def assert_raises(call, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    dist.barrier()  # nobody hangs, nor takes what another call says for an answer


# ---- the lens


def of_ranks(lens: Lens, sizes: Sequence[int], outputs=OUTPUTS, top_k=0, **arguments) -> LensStatistics:
    """The lens of a vocabulary of which each rank has a part."""
    options, bias = lens.options, lens.options.get("bias")
    if bias is not None:
        options = options | {"bias": mine(bias, sizes)}
    shard = replace(lens, weight=mine(lens.weight, sizes), options=options)
    found = shard.run(outputs, top_k, group=dist.group.WORLD, **arguments)
    assert_same_on_all_ranks(*found)
    return found


def every_output_and_option_of_a_lens():
    backends = [("torch", dtype) for dtype in DTYPES] + [("native", torch.float32), ("native", torch.bfloat16)]
    for sizes, name, (backend, dtype), budget in chosen(splits(), OPTIONS, backends, (None, 2**16)):
        lens = random_lens((0.2, 1.0, 3.0), vocab=VOCAB, dtype=dtype, options=OPTIONS[name])
        found = of_ranks(lens, sizes, top_k=5, backend=backend, memory_budget=budget)
        assert_agrees(found, lens, top_k=5)
        if dtype == torch.float64:
            for output, got, want in zip(found._fields, found, lens.run(top_k=5), strict=True):
                torch.testing.assert_close(got, want, **EXACT, msg=output)


def an_output_of_a_lens_alone_and_what_any_backend_gives():
    lens = random_lens(leading=(2, 3), vocab=VOCAB, options={"mask": True})
    for i, output in enumerate(OUTPUTS):
        assert_agrees(of_ranks(lens, splits()[i % 2], (output,)), lens, (output,))
    assert_agrees(of_ranks(lens, splits()[-1], OF_ANY_BACKEND, norm=lambda rows: 1 * rows), lens, OF_ANY_BACKEND)
    assert_agrees(of_ranks(lens, splits()[-1], (), VOCAB), lens, (), VOCAB)


def large_and_small_logits_in_slices_of_chunks_that_differ_by_rank():
    vocab = 5003
    for scale, sizes in ((1e-3, (2100, 2903, 0)), (300.0, (3, 4000, 1000))):
        sizes = sizes if dist.get_world_size() == 3 else (sizes[0], vocab - sizes[0])
        lens = random_lens((scale, 1.0), (24,), vocab, 16)
        lens.targets[:6] = torch.tensor([0, sizes[0] - 1, sizes[0], 2047, 2048, 5002])  # where slices and shards begin and end
        for backend in ("torch", "native"):
            # On the first rank there is room for a few rows at a time, of which the others take no more.
            budget = 2**20 if dist.get_rank() == 0 else 2**25
            found = of_ranks(lens, sizes, top_k=10, backend=backend, memory_budget=budget)
            assert_agrees(found, lens, top_k=10)


def ruled_out_columns_of_a_lens():
    for sizes, backend in itertools.product(splits(), ("torch", "native")):
        lens = random_lens((1.0, 2.0, 1.0), vocab=VOCAB, width=4)
        first = slice(0, max(sizes[0], 1))
        for ruled_out in ([0, 5, 36], range(VOCAB)[first], range(1, VOCAB), range(VOCAB)):
            bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
            bias[list(ruled_out)] = -math.inf
            _assert_as_alone(replace(lens, options={"bias": bias}), sizes, backend)
        # In some rows, of some policies, by a product of −inf, of all columns of a shard or of one.
        for columns in (slice(3, 4), first):
            states, weight = lens.states.clone(), lens.weight.clone()
            weight[:, 0], weight[columns, 0] = 0, 1e30
            states[1, 2:4, 0] = -1e30
            _assert_as_alone(replace(lens, states=states, weight=weight), sizes, backend)
    lens.weight[3, 0] = math.nan
    _assert_as_alone(lens, splits()[0], "torch")


def _assert_as_alone(lens: Lens, sizes: Sequence[int], backend: str) -> None:
    """As one process has it, but for the order of ids that are ruled out."""
    alone, found = lens.run(top_k=3, backend=backend), of_ranks(lens, sizes, top_k=3, backend=backend)
    for output, got, want in zip(found._fields, found, alone, strict=True):
        unordered = output in ("top_ids", "argmax", "rank") and (output == "top_ids" or not alone.entropy.isfinite().all())
        if not unordered:
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True, msg=f"{output}: {got} for {want}")


def ties_across_ranks():
    """Of whole numbers, whose products are exact."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((2, 12, 4), (VOCAB, 4)))
    targets = torch.randint(0, VOCAB, (12,), generator=generator)
    z = states @ weight.T  # [L, N, V]
    of_target = z.gather(2, targets.expand(2, -1).unsqueeze(2))
    for sizes, backend in itertools.product(splits(), ("torch", "native")):
        lens = Lens(states, weight, targets, states[0])
        found = of_ranks(lens, sizes, ("argmax", "rank"), 9, backend=backend)
        assert torch.equal(found.argmax, torch.from_numpy(z.numpy().argmax(-1)))
        assert torch.equal(found.rank, (z > of_target).sum(-1))
        ids = found.top_ids
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
        assert torch.equal(z.gather(2, ids), z.topk(9, -1).values)


def few_rows_or_none():
    for leading, options in (((0,), {}), ((2, 0), {}), ((1,), {}), ((5,), {"mask": torch.zeros(5, dtype=torch.bool)})):
        lens = random_lens(leading=leading, vocab=VOCAB)
        lens.options.update(options)
        for outputs, top_k in ((OUTPUTS, 2), (("entropy",), 0)):
            assert_agrees(of_ranks(lens, splits()[-1], outputs, top_k), lens, outputs, top_k)


def a_rank_that_raises_in_a_lens():
    rank, sizes, lens = dist.get_rank(), splits()[0], random_lens(vocab=VOCAB, leading=(40,))
    told = (ValueError, ".") if rank == 1 else (RuntimeError, "group: rank 1 raises an error")

    def bad_norm(rows):
        if rank == 1:
            raise ValueError("norm: mine")
        return rows

    of_rank_1 = {"memory_budget": 1} if rank == 1 else {}
    for outputs in (OUTPUTS, ("entropy",)):
        assert_raises(lambda: of_ranks(lens, sizes, outputs, norm=bad_norm), *told)  # noqa: B023 (called at once)
        assert_raises(lambda: of_ranks(lens, sizes, outputs, **of_rank_1), *told)  # noqa: B023
        shapes = {"mask": torch.ones(39 + (rank != 1), dtype=torch.bool)}
        assert_raises(lambda: of_ranks(lens, sizes, outputs, **shapes), *told)  # noqa: B023
        outside = replace(lens, targets=lens.targets.clone().fill_(VOCAB))
        assert_raises(lambda: of_ranks(outside, sizes, outputs), ValueError, "targets: 37 given, accepted are ids in \\[0, 37\\)")  # noqa: B023
    assert_raises(lambda: of_ranks(lens, sizes, top_k=VOCAB + 1), ValueError, "top_k: 38 given, accepted are 0 to 37")
    others = OUTPUTS[: 5 + rank]
    assert_raises(lambda: of_ranks(lens, sizes, others), ValueError, "^group: calls or options given whose digests are")
    seen = itertools.count()

    def late(rows):  # of the second chunk
        if rank == 1 and next(seen) >= 3:
            raise ValueError("norm: mine")
        return rows

    assert_raises(lambda: of_ranks(lens, sizes, norm=late, memory_budget=2**14), *told)


# ---- the divergence


def both(name: str, dtype: torch.dtype, shared: bool = False, rows: int = 9) -> tuple[Case, Case]:
    """A student's case, with one of :data:`OPTIONS`, and its teacher's, of another width."""
    torch.manual_seed(0)
    student = case_with(OPTIONS[name], rows=rows, vocab=VOCAB, width=6, dtype=dtype)
    teacher = random_case(rows, VOCAB, 6 if shared else 7, dtype=dtype, seed=1)
    if name == "everything" and not shared:
        teacher.options = {"logit_scale": 0.8, "softcap": 5.0, "temperature": 1.3}
    return student, teacher


def arguments_of(student: Case, teacher: Case, shared: bool, sizes: Sequence[int] | None) -> tuple[tuple, dict]:
    """What the op takes, of the whole or of this rank's part; leaves of their own."""

    def part(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad) if sizes is None else mine(x, sizes)

    def whole(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)

    options = {name: part(x) if name == "bias" else x for name, x in student.options.items()}
    options |= {f"teacher_{name}": x for name, x in teacher.options.items()}
    if sizes is not None:
        options["group"] = dist.group.WORLD
    operands = (whole(student.hidden), part(student.weight), whole(teacher.hidden))
    return operands if shared else (*operands, part(teacher.weight)), options


def assert_as_alone(student: Case, teacher: Case, sizes: Sequence[int], shared: bool = False, reduction="none", **options) -> None:
    """Values as the oracle has them, equal on all ranks; gradients as one process has them, of each shard on its rank."""
    found, gradients = [], []
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(2, len(student.hidden), generator=generator).to(torch.promote_types(student.hidden.dtype, torch.float32))
    upstream[:, 3] = 0
    for some in (None, sizes):
        operands, of_case = arguments_of(student, teacher, shared, some)
        given = {"backend": "torch"} if some is None else {}
        result = linear_divergence(*operands, **of_case, **given, **options, reduction=reduction)
        leaves = [x for x in (*operands, of_case.get("bias")) if x is not None and x.requires_grad]
        loss = result.divergence if reduction != "none" else (upstream[0] * result.divergence + upstream[1] * result.entropy).sum()
        found.append(result)
        gradients.append(torch.autograd.grad(loss, leaves) if loss.requires_grad else [])
    alone, of_group = found
    assert_same_on_all_ranks(*of_group)
    wide = student.hidden.dtype == torch.float64
    # Of one row a process is within a bound of the oracle, so two are within two of one another.
    bound = 2 * max(contract_of(replace(case, options=_readout(case))) for case in (student, teacher))
    slack = sum(bound * divergence_factor(value) for value in alone.per_row.tolist())
    bounds = {"divergence": 2 * slack, "per_row": slack, "entropy": bound * entropy_factor(VOCAB)}
    for name, got, want in zip(of_group._fields, of_group, alone, strict=True):
        limits = EXACT if wide else {"rtol": 0, "atol": bounds[name]}
        torch.testing.assert_close(got, want, **limits, msg=lambda message: f"{name}: {message}")  # noqa: B023
    for got, want in zip(gradients[1], gradients[0], strict=True):
        want = mine(want, sizes) if want.shape[0] == VOCAB else want
        if wide:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        else:
            assert got.dtype == want.dtype
            if got.numel():
                assert_same_gradients([got], [want], replace(student, options=_readout(student)))
    if student.hidden.requires_grad:
        assert_same_on_all_ranks(gradients[1][0])


def _readout(case: Case) -> dict:
    return {name: x for name, x in case.options.items() if name not in ("mask", "memory_budget", "backend")}


def every_kind_and_option_of_a_divergence():
    parameters = splits(), OPTIONS, KINDS, DTYPES, (False, True), ("none", "mean")
    for sizes, name, kind, dtype, shared, reduction in chosen(*parameters):
        student, teacher = both(name, dtype, shared)
        options = {"kind": kind} | ({"beta": KINDS[kind]} if kind == "gjsd" else {})
        assert_as_alone(student, teacher, sizes, shared, reduction, **options)


def a_divergence_from_the_top_of_a_teacher():
    for sizes, name, kind, dtype, k in chosen(splits(), OPTIONS, KINDS, DTYPES, (0, 4, VOCAB)):
        student, _ = both(name, dtype)
        logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(3))
        logprobs, ids = logits.log_softmax(-1).topk(k)
        options = {"kind": kind} | ({"beta": KINDS[kind]} if kind == "gjsd" else {})
        found, gradients = [], []
        for some in (None, sizes):
            (hidden, weight, *_), of_case = arguments_of(student, random_case(9, VOCAB, 7), True, some)
            result = linear_divergence(hidden, weight, teacher_top=(ids, logprobs), **of_case, **options)
            loss = (result.divergence + 0.3 * result.entropy).sum()
            found.append(result)
            gradients.append(torch.autograd.grad(loss, [x for x in (hidden, weight, of_case.get("bias")) if x is not None]))
        assert_same_on_all_ranks(*found[1], gradients[1][0])
        limits = EXACT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
        for got, want in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, want, **limits)
        for got, want in zip(gradients[1], (gradients[0][0], *(mine(x, sizes) for x in gradients[0][1:])), strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
            elif got.numel():
                assert (got - want).float().norm() <= (2 * torch.finfo(got.dtype).eps + 1e-4) * want.float().norm() + 1e-6


def chunks_of_a_divergence_that_differ_by_rank():
    student, teacher = both("everything", torch.float32, rows=23)
    for kind in ("jsd", "reverse_kl"):
        for reduction in ("none", "sum"):
            budget = 60_000 if dist.get_rank() == 0 else 2**24
            assert_as_alone(student, teacher, splits()[0], False, reduction, kind=kind, memory_budget=budget)


def ruled_out_columns_of_a_divergence():
    for sizes, kind in itertools.product(splits(), KINDS):
        student, teacher = both("plain", torch.float64)
        for ruled_out in ([0, 5, 36], range(VOCAB)[: max(sizes[0], 1)], range(1, VOCAB)):
            bias = torch.zeros(VOCAB, dtype=torch.float64)
            bias[list(ruled_out)] = -math.inf
            student.options = {"bias": bias, "teacher_bias": bias}
            beta = {"beta": KINDS[kind]} if kind == "gjsd" else {}
            operands, of_case = arguments_of(student, teacher, False, None)
            alone = linear_divergence(*operands, kind=kind, **of_case, **beta)
            operands, of_case = arguments_of(student, teacher, False, sizes)
            of_case["teacher_bias"] = mine(bias, sizes)
            found = linear_divergence(*operands, kind=kind, **of_case, **beta)
            torch.testing.assert_close(found, alone, **EXACT)


def no_rows_of_a_divergence_and_rows_without_gradient():
    for options in ({"mask": torch.zeros(9, dtype=torch.bool)}, {"row_weights": torch.tensor([0.0, 2, -1] * 3)}):
        for reduction in ("none", "mean"):
            student, teacher = both("plain", torch.float64)
            assert_as_alone(student, teacher, splits()[-1], False, reduction, **options)
    student, teacher = both("plain", torch.float64, rows=0)
    operands, options = arguments_of(student, teacher, False, splits()[0])
    assert linear_divergence(*operands, **options).divergence.shape == (0,)


def a_frozen_side_of_a_divergence():
    for frozen in itertools.product((False, True), repeat=4):
        student, teacher = both("plain", torch.float64)
        for x, is_frozen in zip((student.hidden, student.weight, teacher.hidden, teacher.weight), frozen, strict=True):
            x.requires_grad_(not is_frozen)
        for reduction in ("none", "sum"):
            assert_as_alone(student, teacher, splits()[0], False, reduction, kind="jsd")


def a_rank_that_raises_in_a_divergence():
    rank, sizes = dist.get_rank(), splits()[0]
    told = (ValueError, ".") if rank == 1 else (RuntimeError, "group: rank 1 raises an error")
    student, teacher = both("plain", torch.float32)
    operands, options = arguments_of(student, teacher, False, sizes)

    def call(**more):
        return linear_divergence(*operands, **options, **more)

    assert_raises(lambda: call(memory_budget=1 if rank == 1 else None), *told)
    assert_raises(lambda: call(kind="nothing" if rank == 1 else "jsd"), *told)
    assert_raises(lambda: call(reduction="nothing" if rank == 1 else "mean"), *told)
    assert_raises(lambda: call(backend="native"), ValueError, "backend: 'native' given, it cannot run this: it takes rows from")
    assert_raises(lambda: call(kind="jsd" if rank == 1 else "forward_kl"), ValueError, "^group: calls or options given whose dig")
    mask = torch.arange(9) < (5 if rank == 1 else 6)
    assert_raises(lambda: call(mask=mask), ValueError, "^mask: .* rows that count given")
    hot = torch.full((9,), -1.0 if rank == 1 else 1.0)
    assert_raises(lambda: call(temperature=hot), *told)
    found = call()
    upstream = torch.ones(9)
    upstream[0] = rank  # which must be equal: dH is of the same rows everywhere
    assert_raises(lambda: found.divergence.backward(upstream), ValueError, "^mask: .* rows that count given")
    ids, logprobs = torch.full((9, 2), VOCAB), torch.full((9, 2), -1.0)
    (hidden, weight, *_), _ = arguments_of(student, teacher, True, sizes)
    top = {"teacher_top": (ids, logprobs), "group": dist.group.WORLD}
    assert_raises(lambda: linear_divergence(hidden, weight, **top), ValueError, "teacher_top: id 37 given")


def working_memory_stays_within_the_budget():
    vocab, budget = 2 * 12_000, 4 * 2**20
    sizes = [12_000, 12_000] + [0] * (dist.get_world_size() - 2)
    student, teacher = (random_case(300, vocab, 32, seed=seed) for seed in (0, 1))
    operands, options = arguments_of(student, teacher, True, sizes)

    def divergence():
        found = linear_divergence(operands[0], operands[1], operands[2].detach(), kind="jsd", reduction="mean", **options)
        found.divergence.backward()

    options["memory_budget"] = budget
    divergence()
    operands[0].grad = operands[1].grad = None
    peak = peak_bytes(divergence)
    assert peak <= budget + 4 * 32 * (len(operands[1]) + 300) + 40 * 300 + 2**18, peak
    lens = random_lens([1.0] * 6, (400,), vocab, 32)
    for outputs, top_k in ((("rank", "jsd"), 0), (("pairwise_kl",), 20)):
        found = []
        peak = peak_bytes(lambda: found.append(of_ranks(lens, sizes, outputs, top_k, memory_budget=budget)))  # noqa: B023
        kept = sum(2 * x.nbytes for x in found[0] if x is not None) + mine(lens.weight, sizes).nbytes
        assert peak <= budget + kept + 2**18, peak


def what_explain_says_of_a_divergence():
    student, teacher = both("plain", torch.float32)
    (h, w, u, v), options = arguments_of(student, teacher, False, splits()[0])
    plan = explain(h, w, teacher_hidden=u, teacher_weight=v, **options)
    others, ranks, here = dist.get_world_size() - 1, dist.get_world_size(), splits()[0][dist.get_rank()]
    of_sums, of_hidden = 6 * 4 * others, 2 * 4 * 13 * others / ranks
    assert plan.wire == (of_sums, of_sums + of_hidden)
    assert plan.backend == "torch"
    assert f"columns   {here} of 37 are here, from" in str(plan)
    assert f"wire      {of_sums} bytes a row forward, {of_sums + of_hidden:.0f} backward" in str(plan)
    assert "not native: it takes rows from logits to gradients in one kernel" in str(plan)
    assert explain(h, w, teacher_hidden=u, teacher_weight=v, reduction="sum", **options).wire == (of_sums + of_hidden, 0)
    top = explain(h.detach(), w, teacher_top=(torch.arange(5).expand(9, 5), torch.zeros(9, 5)), **options)
    assert top.wire == (8 * 4 * others, 8 * 4 * others)


def sharded_tensors_by_the_name_of_their_dimension():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))

    def sharded(x: Tensor) -> Tensor:
        return distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()

    lens = random_lens(vocab=VOCAB, options={"bias": True})
    shard = replace(lens, weight=sharded(lens.weight), options={"bias": sharded(lens.options["bias"])})
    assert_agrees(shard.run(top_k=2, group="tp"), lens, top_k=2)
    for shared in (False, True):
        student, teacher = both("bias", torch.float64, shared)
        (h, w, u, *v), options = arguments_of(student, teacher, shared, None)
        alone = linear_divergence(h, w, u, *v, **options, kind="jsd")
        wants = torch.autograd.grad(alone.divergence.sum(), (h, w, options["bias"]))
        w, b, v = sharded(w), sharded(options["bias"]), [sharded(x) for x in v]
        found = linear_divergence(h, w, u, *v, bias=b, kind="jsd", group="tp")
        torch.testing.assert_close(found.divergence, alone.divergence, **EXACT)
        for got, want in zip(torch.autograd.grad(found.divergence.sum(), (h, w, b)), wants, strict=True):
            torch.testing.assert_close(got.full_tensor() if isinstance(got, DTensor) else got, want, rtol=1e-9, atol=1e-11)


def a_layer_that_learns_from_a_model_whose_head_is_sharded():
    results = []
    for group in (None, dist.group.WORLD):
        torch.manual_seed(0)
        (ids, targets), model = token_batch(vocab=VOCAB), apply_fused_head(in_float64(tiny_model(vocab=VOCAB)))
        if group is not None:
            model.lm_head.weight = torch.nn.Parameter(mine(model.lm_head.weight, splits()[0]))
        found = self_distillation_loss(model, ids, targets, torch.linspace(-1, 1, 3).unsqueeze(1), layer=2, group=group)
        found.loss.backward()
        own = model.lm_head.weight.grad
        gradients = [x.grad for x in model.base_model.parameters() if x.grad is not None]
        results.append([found.loss, found.divergence, *gradients, own if group else mine(own, splits()[0])])
        assert_same_on_all_ranks(found.loss, *gradients)
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def within_a_compiled_function():
    student, teacher = both("plain", torch.float32)
    operands, options = arguments_of(student, teacher, False, splits()[0])

    def call(h, w, u, v):
        return linear_divergence(h, w, u, v, kind="jsd", **options).divergence

    want, got = call(*operands), torch.compile(call, backend="aot_eager", fullgraph=True)(*operands)
    assert torch.equal(got, want)
    for one, other in zip(*(torch.autograd.grad(x.sum(), operands) for x in (got, want)), strict=True):
        assert torch.equal(one, other)


CHECKS = [  # and last what is the same on more ranks
    every_output_and_option_of_a_lens,
    an_output_of_a_lens_alone_and_what_any_backend_gives,
    large_and_small_logits_in_slices_of_chunks_that_differ_by_rank,
    ruled_out_columns_of_a_lens,
    ties_across_ranks,
    few_rows_or_none,
    a_rank_that_raises_in_a_lens,
    every_kind_and_option_of_a_divergence,
    a_divergence_from_the_top_of_a_teacher,
    chunks_of_a_divergence_that_differ_by_rank,
    ruled_out_columns_of_a_divergence,
    no_rows_of_a_divergence_and_rows_without_gradient,
    a_frozen_side_of_a_divergence,
    a_rank_that_raises_in_a_divergence,
    working_memory_stays_within_the_budget,
    what_explain_says_of_a_divergence,
    sharded_tensors_by_the_name_of_their_dimension,
    a_layer_that_learns_from_a_model_whose_head_is_sharded,
    within_a_compiled_function,
]


def rank_checks() -> None:
    dist.init_process_group("gloo")
    for check in CHECKS[: None if dist.get_world_size() == 2 else -1]:
        check()
        print(f"{check.__name__} holds", flush=True)


@pytest.fixture(scope="module")
def held() -> Callable[[int], str]:
    """What so many ranks say, of which one launch runs all checks."""

    @functools.cache
    def of(ranks: int) -> str:
        try:
            return on_ranks("test_vocab_parallel_lens:rank_checks", ranks, timeout=300)[0]
        except AssertionError as error:
            return str(error)

    return of


@pytest.mark.parametrize(
    ("ranks", "check"),
    [
        *itertools.product([3], CHECKS[:-1]),
        (2, CHECKS[-1]),
        *(pytest.param(2, check, marks=pytest.mark.broad) for check in CHECKS[:-1]),
    ],
    ids=lambda x: getattr(x, "__name__", f"{x} ranks"),
)
def test_ranks_have_the_results_of_one_process(held, ranks, check):
    assert f"{check.__name__} holds" in held(ranks), held(ranks)
