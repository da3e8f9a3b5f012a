"""The objectives of the papers, as values."""

from bupo_kernels import PolicyObjective

objectives = {
    "GRPO": PolicyObjective(kl="k3", kl_coefficient=0.04, aggregation="sequence-mean-token-mean"),
    "DAPO": PolicyObjective(clip_low=0.2, clip_high=0.28),
    "Dr. GRPO": PolicyObjective(aggregation="sequence-mean-token-sum-norm", max_length=8192),
    "GSPO": PolicyObjective(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence-mean-token-mean"),
    "CISPO": PolicyObjective(clip="cispo", clip_high=0.28),
    "dual clip": PolicyObjective(dual_clip=3.0),
    "REINFORCE": PolicyObjective(ratio="none", clip=None),
    "truncated importance sampling": PolicyObjective(importance="token", importance_cap=2.0),
}

for name, objective in objectives.items():
    print(f"{name:30} {'two passes' if objective.needs_sequence else 'one pass'}")
