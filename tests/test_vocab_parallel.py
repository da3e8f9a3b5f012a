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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bupo_kernels import FusedLMHead, PolicyObjective, explain, linear_cross_entropy, linear_logprobs, linear_policy_loss
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


def rank_logprobs() -> None:
    with world() as (rank, ranks):
        kinds = itertools.cycle(splits(37, ranks))
        for (backend, dtype), (name, options) in itertools.product(BACKENDS, OPTIONS.items()):
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


def rank_policy_losses() -> None:
    with world() as (rank, ranks):
        kinds = itertools.cycle(splits(37, ranks))
        for objective, (backend, dtype), name in itertools.product(OBJECTIVES, BACKENDS, ("bias", "everything")):
            interpreted = backend.startswith("triton")
            if interpreted and (objective is not OBJECTIVES[1] or name != "bias"):
                continue
            case, sizes = case_with(OPTIONS[name], rows=12, dtype=dtype), next(kinds)
            case.hidden, case.targets = case.hidden.detach().view(3, 4, -1).requires_grad_(), case.targets.view(3, 4)
            case.options |= {key: x.view(3, 4) for key, x in case.options.items() if key in ("temperature", "mask")}
            case.targets[1, 2] = -100
            case.options["backend"] = backend
            if backend == "torch":
                least = explain(case.hidden, case.weight, case.targets, **case.options, objective=objective).tile_plan
                case.options["memory_budget"] = least.memory.working
            shard = sharded(case, sizes, rank)
            (loss, metrics), (expected, wanted) = losses(shard, objective), losses(case, objective)
            assert_equal_on_all_ranks(loss)
            assert bits(loss) == bits(losses(shard, objective)[0])
            rel = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(loss, expected, rtol=rel, atol=rel)
            assert_gradients(loss, shard, expected, case)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("what", ["logprobs", "policy_losses"])
def test_shards_of_any_size_give_what_the_whole_does(ranks, what):
    on_ranks(f"test_vocab_parallel:rank_{what}", ranks)


def rank_errors() -> None:
    with world() as (rank, ranks):
        case = random_case(6, 10 * ranks, 8)
        shard = sharded(case, [10] * ranks, rank)

        def losses_of(**options) -> Tensor:
            advantages = torch.ones(6)
            return linear_policy_loss(shard.hidden, shard.weight, shard.targets, advantages, **shard.options, **options)[0]

        last = rank == ranks - 1
        alone = {"match": "^group: rank 2 raises an error"} if not last else {}

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
        raised(ValueError, lambda: losses_of(temperature=wrong), "^temperature: -1.0 given")
        raised(ValueError, lambda: statistics(shard, temperature=torch.full((6,), wrong)), "^temperature: -1.0 given")
        raised(ValueError, lambda: losses_of(temperature=torch.full((6,), wrong)), "^temperature: -1.0 given")
        raised(ValueError, lambda: losses_of(denominator=torch.ones((), requires_grad=last)), "^denominator: requires a gradient")
        raised(TypeError, lambda: losses_of(objective="ppo" if last else PolicyObjective()), "^objective: str given")
        raised(ValueError, lambda: statistics(shard, memory_budget=1 if last else None, backend="torch"), "^memory_budget: 1 bytes")
        raised(ValueError, lambda: losses_of(memory_budget=1 if last else None, backend="torch"), "^memory_budget: 1 bytes")
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
        differ("^group: calls or options", lambda: losses_of() if last else statistics(shard))
        differ("^targets: 20", lambda: statistics(Case(shard.hidden, shard.weight, torch.full((6,), 10 * ranks), shard.options)))

        # Where it is streamed, and where gradients are taken.
        def failing(name: str):
            def fail(*_, **__):
                raise MemoryError("no memory")

            return pytest.MonkeyPatch.context(), name, fail

        for name, call in itertools.product(
            ("row_statistics", "gradient_tiles"),
            (lambda: weighted_sum(statistics(shard, backend="torch")).backward(), lambda: losses_of(backend="torch")),
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
