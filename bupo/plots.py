"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure


def draw_run(metrics: list[dict], accuracies: list[dict], path: Path) -> None:
    """Reward with held-out accuracy, and both entropies, over the steps; the phase boundary is a dashed line."""
    steps = [row["step"] for row in metrics]
    internal = [row["step"] for row in metrics if row["phase"] != "final"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)

    top.plot(steps, [row["reward"] for row in metrics], color="#56B4E9", linewidth=1, label="reward of the samples")
    top.plot(
        [row["step"] for row in accuracies], [row["greedy"] for row in accuracies], "o-", color="#D55E00", label="held-out, greedy"
    )
    rewards = [row["reward"] for row in metrics]
    top.set(ylabel="reward, accuracy", ylim=(min(0, *rewards) - 0.02, max(1, *rewards) + 0.02))
    switch = len(internal)  # two policies, so two lines
    for part, label in ((slice(0, switch), None), (slice(switch, None), "optimised policy")):
        bottom.plot(steps[part], [row["entropy"] for row in metrics[part]], color="#009E73", label=label)
    bottom.plot(steps, [row["entropy_final"] for row in metrics], color="#000000", linestyle=":", label="final policy")
    highest = max(max(row["entropy"], row["entropy_final"]) for row in metrics)
    bottom.set(ylabel="entropy (nats per token)", xlabel="step", ylim=(0, 1.3 * highest or 1))
    for axes in (top, bottom):
        if internal:
            axes.axvspan(0, internal[-1] + 0.5, color="#F0E442", alpha=0.2, linewidth=0, label=f"phase 1: {metrics[0]['phase']}")
            axes.axvline(internal[-1] + 0.5, color="grey", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)
    top.legend(loc="lower right")
    bottom.legend(loc="upper right")
    figure.savefig(path, dpi=150)
