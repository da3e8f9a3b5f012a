"""Invented statistics and heat maps, for tests of what is drawn from them."""

import numpy as np

from bupo.analysis.heatmap import Heatmap
from bupo.analysis.statistics import Curve, Statistics

WORDS = (
    " the",
    " =",
    " 12",
    "\n",
    "\n\n",
    "\t",
    " ",
    " answer",
    "ation",
    " therefore",
    "\\boxed",
    "{",
    "}",
    "é",
    "数",
    "<|im_end|>",
)


def sample_statistics(layers=12, responses=40, vocab=151936, model="Qwen/Qwen3-4B", seed=0) -> Statistics:
    """A policy that explores in its first sixth of layers and converges in its last quarter; one response gives no intervals."""
    rng = np.random.default_rng(seed)

    def curve(numbers, mean, spread: float) -> Curve:
        mean = np.asarray(mean) + 0.1 * spread * rng.standard_normal(len(numbers))
        half = np.full(len(numbers), 0.2 * spread if responses > 1 else np.nan)
        return Curve(np.asarray(numbers), mean, np.full(len(numbers), spread), mean - half, mean + half)

    inner, outer = np.arange(1, layers + 1), np.arange(layers + 1)
    depth = outer / layers
    norm = 0.05 * np.exp(6 * depth)
    entropy = np.log(vocab) * (1 - depth**4) + 0.02
    gain = np.where(inner <= layers / 6, 2.0, np.where(inner <= 0.75 * layers, 0.0, -4.0))
    curves = {
        ("attention_input", "entropy"): curve(inner, 0.5 * entropy[1:], 0.4),
        ("ffn_input", "entropy"): curve(inner, 0.5 * entropy[1:] + 0.5, 0.4),
        ("attention", "entropy"): curve(inner, np.minimum(0.95 * entropy[1:] + 0.4, np.log(vocab)), 0.3),
        ("ffn", "entropy"): curve(inner, 0.85 * entropy[1:], 0.5),
        ("layer", "entropy"): curve(outer, entropy, 0.3),
        ("final", "entropy"): curve([layers], [0.31], 0.2),
        ("attention", "delta_entropy"): curve(inner, 3 + np.sin(inner), 1.0),
        ("ffn", "delta_entropy"): curve(inner, gain, 0.6),
        ("layer", "delta_entropy"): curve(inner, np.diff(entropy), 0.1),
        ("attention", "cosine"): curve(inner, 0.3 * np.cos(inner), 0.1),
        ("ffn", "cosine"): curve(inner, 0.1 * np.sin(inner) - 0.4 * (inner == layers), 0.1),
        ("layer", "cosine"): curve(inner, 0.95 - 0.3 * (inner == layers), 0.05),
        ("layer", "rms"): curve(outer, norm, 0.01),
        ("attention", "rms"): curve(inner, 0.3 * norm[1:], 0.01),
        ("ffn", "rms"): curve(inner, 0.5 * norm[1:], 0.01),
        ("layer", "kl_to_final"): curve(outer, 1 + 11 * (1 - depth), 1.0),
        ("layer", "kl_from_final"): curve(outer, 0.5 + 14 * (1 - depth), 1.0),
        ("layer", "logprob"): curve(outer, -12 + 11 * depth, 1.0),
        ("layer", "max_probability"): curve(outer, depth, 0.1),
        ("final", "logprob"): curve([layers], [-0.4], 0.3),
        ("final", "max_probability"): curve([layers], [0.8], 0.1),
    }
    places = np.append(depth, 1.2)
    distance = np.abs(places[:, None] - places)
    split, last = max(layers // 6, 1), (3 * layers) // 4
    segments = [("exploration", 1, split), ("integration", split + 1, last), ("convergence", last + 1, layers)]
    summary = {
        "model": model,
        "model_type": "qwen3",
        "layers": layers,
        "vocab": vocab,
        "responses": responses,
        "tokens": 12345,
        "final_norm": False,
        "temperature": 1.0,
        "precision": "bfloat16",
        "perplexity": 1.2345678,
        "boundary": {
            "layer": split,
            "confidence": 0.973,
            "note": "",
            "segments": [{"name": name, "first": first, "last": final} for name, first, final in segments],
        },
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    }
    return Statistics(curves, {"kl": 15 * distance**1.5, "cosine": 1 - distance[:-1, :-1]}, summary)


def sample_heatmap(layers=12, positions=24, k=10, title="response 1", words=WORDS, seed=0) -> Heatmap:
    """A policy that finds the target in more and more positions as it gets deeper."""
    rng = np.random.default_rng(seed)
    rows = layers + 2  # the embedding, the layers, the final policy
    depth = np.minimum(np.arange(rows) / layers, 1)[:, None, None]
    logits = rng.standard_normal((rows, positions, k)) * (0.1 + 4 * depth)
    logits += np.linspace(2, 0, k)
    logprobs = -np.sort(-(logits - np.log(np.exp(logits).sum(-1, keepdims=True) + 151936 * np.exp(-2 - 12 * depth))), axis=-1)
    chosen = rng.integers(len(words), size=positions + 1)
    tops = [[[words[i] for i in rng.permutation(len(words))[:k]] for _ in range(positions)] for _ in range(rows)]
    rank = np.floor(151936 ** (rng.random((rows, positions)) * (1 - depth[..., 0]))).astype(np.int64) - 1
    for row, position in zip(*np.nonzero(rank == 0), strict=True):
        target = words[chosen[position + 1]]
        tops[row][position] = [target, *(word for word in tops[row][position] if word != target)][:k]
    return Heatmap(
        title=title,
        prompt="What is 3 × 4?\nThink first.",
        context=[words[i] for i in chosen[:-1]],
        targets=[words[i] for i in chosen[1:]],
        layers=[*map(str, range(layers + 1)), "π"],
        top_tokens=tops,
        top_logprobs=logprobs,
        logprobs=np.where(rank == 0, logprobs[..., 0], -np.log(rank + 2.0) - 1),
        entropy=11.9 * (1 - depth[..., 0]) + rng.random((rows, positions)),
        rank=rank,
        kl=12 * (1 - depth[..., 0]) + 0.3 * rng.random((rows, positions)),
    )
