"""Which backend a call would use, in which tiles, at what cost, and why not the others."""

import torch

from bupo_kernels import PolicyObjective, explain

hidden = torch.empty(4096, 1024, dtype=torch.bfloat16)  # only shapes, dtypes and what requires a gradient are looked at
weight = torch.empty(32000, 1024, dtype=torch.bfloat16, requires_grad=True)

print(explain(hidden, weight))
print(explain(hidden, weight, objective=PolicyObjective()))  # the same in one pass

plan = explain(hidden, weight, backend="torch")
assert plan.flops_forward == 2 * 4096 * 32000 * 1024
