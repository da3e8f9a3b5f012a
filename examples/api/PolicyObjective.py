"""The objectives of the papers, as values."""

from bupo_kernels import PolicyObjective

objectives = {
    "GRPO": PolicyObjective(kl="k3", kl_coefficient=0.04, aggregation="sequence-mean-token-mean"),
    "DAPO": PolicyObjective(clip_low=0.2, clip_high=0.28),
    "Dr. GRPO": PolicyObjective(aggregation="sequence-mean-token-sum-norm", max_length=8192),
    "GSPO": PolicyObjective(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence-mean-token-mean"),
    "LUSPO": PolicyObjective(ratio="sequence", clip_low=2e-3, clip_high=2.5e-3, aggregation="sequence-mean-token-sum"),
    "GMPO": PolicyObjective(ratio="sequence", clip="gmpo", clip_low=0.4, clip_high=0.4, aggregation="sequence-mean-token-mean"),
    "VESPO": PolicyObjective(ratio="sequence", clip="vespo"),
    "SAPO": PolicyObjective(clip="sapo", aggregation="sequence-mean-token-mean"),
    "CISPO": PolicyObjective(clip="cispo", clip_high=0.28),
    "beyond the 80/20 rule": PolicyObjective(clip_high=0.28, top_entropy_quantile=0.2),
    "dual clip": PolicyObjective(dual_clip=3.0),
    "REINFORCE": PolicyObjective(ratio="none", clip=None),
    "truncated importance sampling": PolicyObjective(importance="token", importance_cap=2.0),
}

for name, objective in objectives.items():
    print(f"{name:30} {'two passes' if objective.needs_sequence or objective.needs_batch else 'one pass'}")
