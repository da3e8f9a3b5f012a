"""Bottom-up Policy Optimization with TRL, on a CPU in under a minute: pip install 'trl>=1.16', then python examples/trl_bupo.py

The model is small and of random weights, and learns to write even digits. To train one of yours, give its name or folder as
``model``, a data set with a "prompt" column and your reward, and leave out what is marked as the toy's.
"""

import tempfile

from datasets import Dataset

from bupo.demo import character_tokenizer, small_model
from bupo_kernels.integrations.trl import BuPOConfig, BuPOTrainer, patch_trl


def even_digits(completions: list[str], **_) -> list[float]:
    """The share of even digits in what the model wrote: 0.38 at first."""
    return [sum(character in "02468" for character in text) / max(len(text), 1) for text in completions]


patch_trl()  # this alone makes every trainer of TRL use the library's head: GRPO, RLOO, KTO, DPO, SFT

config = BuPOConfig(
    # What BuPO adds: the first 10 optimizer steps optimise the policy of layer 2 (of 4: at half the cost), the others the model's.
    layer=2,
    internal_steps=10,
    # As for GRPO.
    output_dir=tempfile.mkdtemp(),
    max_steps=20,
    per_device_train_batch_size=64,
    num_generations=8,
    max_completion_length=6,
    learning_rate=1e-3,
    logging_steps=1,
    # Of the toy's only.
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    report_to="none",
    save_strategy="no",
)
tokenizer = character_tokenizer("0123456789+=")
trainer = BuPOTrainer(
    model=small_model(tokenizer, seed=0),
    reward_funcs=even_digits,
    args=config,
    train_dataset=Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(10) for b in range(10)]}),
    processing_class=tokenizer,
)
trainer.train()

for step, entry in enumerate(trainer.state.log_history[:-1], 1):
    policy = f"layer {config.layer}" if entry["internal"] else "model"
    print(f"step {step:2}  policy {policy:7}  reward {entry['reward']:.2f}  entropy {entry['entropy']:.2f}")
