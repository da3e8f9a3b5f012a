"""A vocabulary on two and three gloo ranks against one process that has all of it."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from problems import OPTIONS, Case, assert_same_gradients, assert_values, case_with, leaves, random_case
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bupo_kernels import (
    FusedLMHead,
    PolicyObjective,
    engine,
    explain,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    vocab_parallel,
)
from bupo_kernels.backends.tile_loop import TileLoop

# ---- on the ranks


@contextlib.contextmanager
def world() -> Iterator[tuple[int, int]]:
    """Yield rank and ranks of a group of all of them."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def splits(vocab: int, ranks: int) -> list[list[int]]:
    """Return sizes of shards: as even as can be, as uneven, and with empty ones first and last."""
    some = vocab // ranks + 1
    return [
        [len(columns) for columns in torch.arange(vocab).tensor_split(ranks)],
        [1] * (ranks - 1) + [vocab - ranks + 1],
        [0] * (ranks - 1) + [vocab],
        [vocab - some, some, 0] if ranks == 3 else [vocab, 0],
    ]


def part(whole: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """Return what this rank has of a parameter, as a leaf of its own."""
    start = sum(sizes[:rank])
    return whole.detach()[start : start + sizes[rank]].clone().requires_grad_(whole.requires_grad)


def sharded(case: Case, sizes: Sequence[int], rank: int) -> Case:
    """Return what this rank gives of the case."""
    options = case.options | {"group": dist.group.WORLD}
    if "bias" in options:
        options["bias"] = part(options["bias"], sizes, rank)
    return Case(case.hidden.detach().clone().requires_grad_(), part(case.weight, sizes, rank), case.targets, options)


def whole(shard: Tensor) -> Tensor:
    """Return the shards of all ranks, side by side."""
    shards: list = [None] * dist.get_world_size()
    dist.all_gather_object(shards, shard.detach())
    return torch.cat(shards)


def bits(*tensors: Tensor | None) -> list[list]:
    return [x.detach().reshape(-1).view(torch.uint8).tolist() for x in tensors if x is not None]


def assert_equal_on_all_ranks(*tensors: Tensor | None) -> None:
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, bits(*tensors))
    assert all(x == everywhere[0] for x in everywhere)


def assert_gradients(of_shard: Tensor, shard: Case, of_whole: Tensor, case: Case) -> None:
    """Hold the gradients of a loss on shards against those of the same loss on the whole."""
    hidden, *others = torch.autograd.grad(of_shard, leaves(shard), retain_graph=True)
    assert_equal_on_all_ranks(hidden)
    got, want = [hidden, *map(whole, others)], torch.autograd.grad(of_whole, leaves(case))
    if case.hidden.dtype.itemsize == 2:
        assert_same_gradients(got, want, case)
        return
    relative = 1e-12 if case.hidden.dtype == torch.float64 else 1e-6
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).norm() <= relative * b.norm()


def weighted_sum(results: Sequence[Tensor | None]) -> Tensor:
    """Return a sum of statistics in which each number has a weight of its own, and some rows have none."""
    generator, total = torch.Generator().manual_seed(1), torch.zeros(())
    for x in results:
        if x is not None:
            weights = torch.randn(x.shape, generator=generator).to(x.dtype)
            weights[..., ::3] = 0
            total = total + (weights * x).sum()
    return total


def statistics(case: Case, **options) -> tuple[Tensor | None, ...]:
    return linear_logprobs(case.hidden, case.weight, case.targets, **case.options, **options)


BACKENDS = [
    *(("torch", torch.float64), ("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float16)),
    *(("native", torch.float32), ("native", torch.bfloat16)),
    *(("triton", torch.float32), ("triton", torch.bfloat16), ("triton:cached", torch.bfloat16)),
]


def rank_logprobs(every: str) -> None:
    with world() as (rank, ranks):
        kinds = itertools.cycle(splits(37, ranks))
        cases = list(itertools.product(BACKENDS, OPTIONS.items()))
        for (backend, dtype), (name, options) in cases[:: int(every)]:
            interpreted = backend.startswith("triton")
            if interpreted and name not in ("bias", "everything"):
                continue
            if backend == "triton:cached" and "softcap" in options:
                continue
            case, sizes = case_with(options, rows=4 if interpreted else 7, dtype=dtype), next(kinds)
            case.targets[1] = -100
            case.options["backend"] = backend
            shard = sharded(case, sizes, rank)
            with_entropy = name != "logit scale"
            got, want = (statistics(x, return_entropy=with_entropy) for x in (shard, case))
            assert_equal_on_all_ranks(*got)
            assert bits(*got) == bits(*statistics(shard, return_entropy=with_entropy))
            if dtype == torch.float64:
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            elif with_entropy:
                assert_values(got, case)
            assert_gradients(weighted_sum(got), shard, weighted_sum(want), case)


OBJECTIVES = [
    PolicyObjective(),
    PolicyObjective(
        entropy_coefficient=0.1, kl="k3", kl_coefficient=0.2, importance="token", aggregation="sequence-mean-token-mean"
    ),
    PolicyObjective(clip="cispo", clip_high=2.0),
    PolicyObjective(ratio="sequence"),
    PolicyObjective(top_entropy_quantile=0.3),
]


def losses(case: Case, objective: PolicyObjective) -> tuple[Tensor, object]:
    generator = torch.Generator().manual_seed(2)
    advantages, *others = (torch.randn(case.targets.shape, generator=generator) for _ in range(4))
    advantages[0] = 0
    old, reference, sampler = (0.3 * x - 3.5 for x in others)
    return linear_policy_loss(
        *(case.hidden, case.weight, case.targets, advantages),
        **{"old_logprobs": old, "reference_logprobs": reference, "sampler_logprobs": sampler},
        objective=objective,
        **case.options,
    )


def least_budget(case: Case, objective: PolicyObjective) -> int:
    """Return a memory budget of which nine tenths are refused."""
    budget = 2**20
    while True:
        less = budget * 9 // 10
        try:
            explain(case.hidden, case.weight, case.targets, **case.options, memory_budget=less, objective=objective)
        except ValueError:
            return budget
        budget = less


def rank_policy_losses(every: str) -> None:
    with world() as (rank, ranks):
        kinds = itertools.cycle(splits(37, ranks))
        cases = list(itertools.product(OBJECTIVES, BACKENDS, ("bias", "everything")))
        for objective, (backend, dtype), name in cases[:: int(every)]:
            interpreted = backend.startswith("triton")
            if interpreted and (objective is not OBJECTIVES[1] or name != "bias"):
                continue
            case, sizes = case_with(OPTIONS[name], rows=12, dtype=dtype), next(kinds)
            case.hidden, case.targets = case.hidden.detach().view(3, 4, -1).requires_grad_(), case.targets.view(3, 4)
            case.options |= {key: x.view(3, 4) for key, x in case.options.items() if key in ("temperature", "mask")}
            case.targets[1, 2] = -100
            case.options["backend"] = backend
            if case.hidden.dtype != torch.bfloat16 and not interpreted:
                case.options["memory_budget"] = least_budget(case, objective)
            shard = sharded(case, sizes, rank)
            (loss, _), (expected, _) = losses(shard, objective), losses(case, objective)
            assert_equal_on_all_ranks(loss)
            assert bits(loss) == bits(losses(shard, objective)[0])
            rel = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(loss, expected, rtol=rel, atol=rel)
            assert_gradients(loss, shard, expected, case)


# Ranks, and of the product of options every how-manyth case they take.
@pytest.mark.parametrize(("ranks", "every"), [(2, 5), (3, 8), *(pytest.param(n, 1, marks=pytest.mark.broad) for n in (2, 3))])
@pytest.mark.parametrize("what", ["logprobs", "policy_losses"])
def test_shards_of_any_size_give_what_the_whole_does(ranks, every, what):
    on_ranks(f"test_vocab_parallel:rank_{what}", ranks, str(every))


def losses_of(case: Case, **options) -> Tensor:
    return linear_policy_loss(case.hidden, case.weight, case.targets, torch.ones(6), **case.options, **options)[0]


def rank_errors() -> None:
    with world() as (rank, ranks):
        case = random_case(6, 10 * ranks, 8)
        shard = sharded(case, [10] * ranks, rank)

        last = rank == ranks - 1

        def raised(kind: type[Exception], call: Callable[[], object], match: str) -> None:
            """Have a call raise on the last rank alone: there what it is, on the others that it is."""
            with pytest.raises(
                kind if last else RuntimeError, match=match if last else f"^group: rank {ranks - 1} raises an error"
            ):
                call()

        def differ(match: str, call: Callable[[], object]) -> None:
            with pytest.raises(ValueError, match=match):
                call()

        wrong = -1.0 if last else 1.0
        raised(ValueError, lambda: statistics(shard, temperature=wrong), "^temperature: -1.0 given")
        raised(ValueError, lambda: losses_of(shard, temperature=wrong), "^temperature: -1.0 given")
        raised(ValueError, lambda: statistics(shard, temperature=torch.full((6,), wrong)), "^temperature: -1.0 given")
        raised(ValueError, lambda: losses_of(shard, temperature=torch.full((6,), wrong)), "^temperature: -1.0 given")
        raised(
            ValueError,
            lambda: losses_of(shard, denominator=torch.ones((), requires_grad=last)),
            "^denominator: requires a gradient",
        )
        raised(TypeError, lambda: losses_of(shard, objective="ppo" if last else PolicyObjective()), "^objective: str given")
        raised(ValueError, lambda: statistics(shard, memory_budget=1 if last else None, backend="torch"), "^memory_budget: 1 bytes")
        raised(ValueError, lambda: losses_of(shard, memory_budget=1 if last else None, backend="torch"), "^memory_budget: 1 bytes")
        raised(
            ValueError,
            lambda: explain(shard.hidden, shard.weight, **shard.options, memory_budget=1 if last else None, backend="torch"),
            "^memory_budget: 1",
        )
        with torch.no_grad():
            nan = shard.weight.clone()
        nan[0, 0] = torch.nan if last else 0
        of_nan = Case(shard.hidden, nan, shard.targets, shard.options)
        raised(ValueError, lambda: statistics(of_nan, check=True), "^weight: nan at index")
        differ(
            "^hidden: 6, .*5 rows given",
            lambda: statistics(Case(shard.hidden[last:], shard.weight, shard.targets[last:], shard.options)),
        )
        differ(
            "^targets: ids given whose sums",
            lambda: statistics(
                Case(shard.hidden, shard.weight, shard.targets if last else shard.targets.flip(0) // 2, shard.options)
            ),
        )
        differ("^group: calls or options", lambda: statistics(shard, softcap=2.0 if last else 3.0))
        differ("^group: calls or options", lambda: losses_of(shard) if last else statistics(shard))
        differ("^targets: 20", lambda: statistics(Case(shard.hidden, shard.weight, torch.full((6,), 10 * ranks), shard.options)))

        # Where statistics are streamed, and where gradients are taken.
        for name, call in itertools.product(
            ("row_statistics", "gradient_tiles"),
            (lambda: weighted_sum(statistics(shard, backend="torch")).backward(), lambda: losses_of(shard, backend="torch")),
        ):

            def failing(*_, **__):
                raise MemoryError("no memory is left")

            with pytest.MonkeyPatch.context() as patch:
                if last:
                    patch.setattr(TileLoop, name, failing)
                raised(MemoryError, call, "^no memory")
        assert_equal_on_all_ranks(*statistics(shard))  # nobody is a call behind


def test_a_rank_that_raises_is_named_by_the_others_and_so_is_what_ranks_differ_in():
    on_ranks("test_vocab_parallel:rank_errors", 2, timeout=60)


def rank_others() -> None:
    with world() as (rank, ranks):
        sizes = [10, 27, 0][:ranks]
        case = case_with(OPTIONS["bias"], rows=6, dtype=torch.float32)

        # Columns that are ruled out, on one rank all of them; and a NaN on one.
        with torch.no_grad():
            case.options["bias"][:10] = -torch.inf
        shard = sharded(case, sizes, rank)
        for backend in ("torch", "native"):
            got, want = statistics(shard, backend=backend), statistics(case, backend=backend)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
            allowed = (case.targets >= 10).nonzero().squeeze(1)
            assert len(allowed) > 1
            assert_gradients(got[0][allowed].sum(), shard, want[0][allowed].sum(), case)
            nowhere = torch.full_like(shard.options["bias"], -torch.inf)
            options = shard.options | {"bias": nowhere, "backend": backend}
            assert all(x.isnan().all() for x in linear_logprobs(shard.hidden, shard.weight, case.targets, **options))
        with torch.no_grad():
            case.options["bias"].fill_(0)
            case.weight[36, 0] = torch.nan
        shard = sharded(case, sizes, rank)
        got = statistics(shard)
        assert all(x.isnan().all() for x in got)
        assert torch.autograd.grad(got[0].sum(), shard.hidden)[0].isnan().all()

        # No row that counts, and no row.
        case = case_with(OPTIONS["bias"], rows=6, dtype=torch.float32)
        shard = sharded(case, sizes, rank)
        for objective, rows in itertools.product((PolicyObjective(), PolicyObjective(top_entropy_quantile=0.5)), (0, 6)):
            hidden, targets = shard.hidden[:rows], torch.full((rows,), -100)
            loss, _ = linear_policy_loss(hidden, shard.weight, targets, torch.ones(rows), objective=objective, **shard.options)
            found = linear_logprobs(hidden, shard.weight, targets, **shard.options)
            assert loss.item() == 0
            for gradient in torch.autograd.grad(loss + weighted_sum(found), leaves(shard)):
                assert (gradient == 0).all()

        # Several chunks of rows, of which the narrowest plan decides.
        for dtype in (torch.float32, torch.bfloat16):
            case = case_with(OPTIONS["everything"], rows=100, vocab=200, dtype=dtype)
            case.options["backend"] = "torch"
            case.options["memory_budget"] = least_budget(case, PolicyObjective())
            shard = sharded(case, [50, 150, 0][:ranks], rank)
            plan = explain(shard.hidden, shard.weight, shard.targets, **shard.options, objective=PolicyObjective())
            assert plan.tile_plan.chunk_rows < plan.problem.active_rows // 3
            assert_equal_on_all_ranks(torch.tensor(plan.tile_plan.chunk_rows))
            (loss, _), (expected, _) = losses(shard, PolicyObjective()), losses(case, PolicyObjective())
            torch.testing.assert_close(loss, expected)
            assert_gradients(loss, shard, expected, case)

        # Cross entropy; frozen operands; a head as a module; a group of one rank.
        case = case_with(OPTIONS["bias"], rows=6, dtype=torch.float32)
        shard = sharded(case, sizes, rank)
        for reduction in ("mean", "sum", "none"):
            got, want = (
                linear_cross_entropy(x.hidden, x.weight, x.targets, reduction=reduction, **x.options) for x in (shard, case)
            )
            torch.testing.assert_close(got, want)
            assert_gradients(got.sum(), shard, want.sum(), case)
        for name in ("hidden", "weight"):
            both = [random_case(6, 37, 5) for _ in range(2)]
            both[0] = sharded(both[0], sizes, rank)
            for x in both:
                getattr(x, name).requires_grad_(False)
            ((got,), (want,)) = (torch.autograd.grad(weighted_sum(statistics(x)), leaves(x)) for x in both)
            torch.testing.assert_close(got, part(want, sizes, rank) if name == "hidden" else want)
        head = FusedLMHead(5, sizes[rank])
        head.load_state_dict({"weight": shard.weight, "bias": shard.options["bias"]})
        torch.testing.assert_close(head(shard.hidden, case.targets, group=dist.group.WORLD), statistics(case))
        alone = dist.new_group([0])
        if rank == 0:
            got = linear_logprobs(case.hidden, case.weight, case.targets, group=alone, **case.options)
            assert bits(*got) == bits(*statistics(case))
        else:
            with pytest.raises(TypeError, match=r"^group: .* given, accepted is a ProcessGroup that this rank is in"):
                linear_logprobs(case.hidden, case.weight, case.targets, group=alone, **case.options)

        # vmap, autocast, and what is refused.
        many, frozen = torch.stack([case.hidden, -case.hidden]).detach(), shard.weight.detach()
        got = torch.func.vmap(lambda h: linear_logprobs(h, frozen, case.targets, group=dist.group.WORLD).logprobs)(many)
        torch.testing.assert_close(got, torch.stack([linear_logprobs(h, case.weight, case.targets).logprobs for h in many]))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(statistics(shard), statistics(case))
        for options, match in (
            ({"support": (torch.arange(6), torch.arange(7))}, "^support: given with a group"),
            ({"group": "tp"}, "^group: 'tp' given, accepted is a ProcessGroup"),
        ):
            with pytest.raises(ValueError, match=match):
                linear_logprobs(shard.hidden, shard.weight, case.targets, **{"group": dist.group.WORLD} | options)

        # Where nothing may wait for a device.
        expected = bits(*statistics(shard)), bits(losses_of(shard))
        with pytest.MonkeyPatch.context() as patch:
            for module in (engine, vocab_parallel):
                patch.setattr(module, "is_at_hand", lambda _: False)
            assert (bits(*statistics(shard)), bits(losses_of(shard))) == expected
            with pytest.raises(RuntimeError, match=r"^group: a rank raises, or the ranks differ"):
                statistics(shard, softcap=2.0 + rank)
            with pytest.raises(RuntimeError, match=r"^targets: accepted are ids in \[0, V\)"):
                linear_logprobs(shard.hidden, shard.weight, torch.full((6,), 37), **shard.options)

        plan = explain(shard.hidden, shard.weight, group=dist.group.WORLD, backend="torch")
        assert plan.columns == (sum(sizes[:rank]), sizes[rank], 37, ranks)
        assert plan.wire == (16 * (ranks - 1), 8 * 5 * (ranks - 1) / ranks)
        assert f"{sizes[rank]} of 37 are here, from {sum(sizes[:rank])} on, and all on {ranks} ranks" in str(plan)
        plan = explain(shard.hidden, shard.weight, group=dist.group.WORLD, objective=PolicyObjective())
        assert plan.wire == (16 * (ranks - 1) + 8 * 5 * (ranks - 1) / ranks, 0)


def rank_tensors() -> None:
    with world() as (_, ranks):
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
        for vocab in (37, 2):  # of which the second leaves the last of three ranks none
            case = case_with(OPTIONS["bias"], rows=6, vocab=vocab, dtype=torch.float32)
            parameters = case.weight, case.options["bias"]
            weight, bias = (distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in parameters)
            hidden = case.hidden.detach().clone().requires_grad_()
            expected = statistics(case)
            want = torch.autograd.grad(weighted_sum(expected), leaves(case))
            for group in ("tp", mesh.get_group()):
                got = linear_logprobs(hidden, weight, case.targets, bias=bias, group=group)
                torch.testing.assert_close(got, expected)
                of_hidden, *of_shards = torch.autograd.grad(weighted_sum(got), (hidden, weight, bias))
                torch.testing.assert_close(of_hidden, want[0])
                for a, b in zip(of_shards, want[1:], strict=True):
                    assert isinstance(a, DTensor)
                    assert a.placements == (Shard(0),)
                    torch.testing.assert_close(a.full_tensor(), b)
        for placement, called in ((Shard(1), r"S\(1\)|Shard\(dim=1\)"), (Replicate(), r"R|Replicate\(\)")):
            with pytest.raises(TypeError, match=f"^weight: a DTensor of ({called}) given, accepted with this group is Shard"):
                linear_logprobs(hidden, distribute_tensor(case.weight.detach(), mesh, [placement]), case.targets, group="tp")


def rank_compiles() -> None:
    with world() as (rank, ranks):
        case = case_with(OPTIONS["everything"], rows=6, dtype=torch.float32)
        shard, advantages, group = sharded(case, [10, 27, 0][:ranks], rank), torch.randn(6), dist.group.WORLD
        weights = torch.randn(3, 6)

        def both(hidden: Tensor, weight: Tensor, bias: Tensor, temperature: Tensor) -> Tensor:
            options = {"bias": bias, "temperature": temperature, "group": group}
            found = linear_logprobs(hidden, weight, case.targets, **options)
            loss, _ = linear_policy_loss(hidden, weight, case.targets, advantages, **options)
            return loss + (weights * torch.stack(found)).sum()

        arguments = *leaves(shard), case.options["temperature"]
        got, want = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments), both(*arguments)
        assert bits(got) == bits(want)
        assert bits(*torch.autograd.grad(got, leaves(shard))) == bits(*torch.autograd.grad(want, leaves(shard)))


@pytest.mark.parametrize(("ranks", "what"), [(2, "others"), (3, "others"), (3, "tensors")])
def test_so_they_do_of_extremes_of_modules_and_of_sharded_tensors(ranks, what):
    on_ranks(f"test_vocab_parallel:rank_{what}", ranks)


def test_a_compiled_call_is_one_graph_and_gives_the_same_bits():
    on_ranks("test_vocab_parallel:rank_compiles", 2)
