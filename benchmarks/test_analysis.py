"""Time and peak memory of ``bupo.analysis.analyze`` on a model of real width. Linux, many minutes on two cores:
``python -m pytest benchmarks/test_analysis.py --benchmark-only -m slow``.

One response of 2,048 tokens; 24 layers, V = 151,936, fp32. Materialised, its lens of the layers alone would be 31 GB. Memory is the
highest resident size during the call, less what was resident before it (the weights).
"""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo.analysis import analyze
from bupo.rollout import Sample

LAYERS, TOKENS, VOCAB, PROMPT = 24, 2048, 151936, 64
LIMIT = 1e9  # bytes above the weights


def resident(highest: bool) -> int:
    """Return the bytes held now, or at most since the last call with ``highest``, which starts anew."""
    name = "VmHWM" if highest else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    if highest:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
def test_peak_memory(benchmark, dtype):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    ids = torch.randint(VOCAB, (TOKENS + 1,)).tolist()
    sample = Sample(ids[:PROMPT], ids[PROMPT:], None, finished=True)
    before = resident(highest=False)
    resident(highest=True)
    benchmark.pedantic(analyze, (model, [sample]), rounds=1)
    above = resident(highest=True) - before
    benchmark.extra_info["bytes above the weights"] = above
    print(f"\n{dtype}: {above / 1e9:.2f} GB above the weights ({before / 1e9:.2f} GB resident before)")
    assert above < LIMIT
