"""Processes forked after the ops ran, on several threads, in the parent."""

import os
import subprocess
import sys

from problems import CONTRACT

from bupo_kernels.backends import compiled

SCRIPT = """
import multiprocessing, sys
import torch
from torch.utils.data import DataLoader, Dataset
from bupo_kernels import linear_logprobs, linear_policy_loss

torch.set_num_threads(2)
context = multiprocessing.get_context("fork")
generator = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(n, 64, generator=generator) for n in (300, 2000))
targets = torch.randint(0, 2000, (300,), generator=generator)


def values(backend, dtype):
    leaves = [x.to(getattr(torch, dtype)).requires_grad_() for x in (hidden, weight)]
    found = linear_logprobs(*leaves, targets, backend=backend)
    loss, _ = linear_policy_loss(*leaves, targets, torch.ones(300), backend=backend)
    gradients = torch.autograd.grad(found.logprobs.sum() + found.entropy.sum() + loss, leaves)
    return [x.detach() for x in (*found, loss, *gradients)]


def same_again(*case):
    assert all(torch.equal(a, b) for a, b in zip(values(*case), before))
    assert torch.get_num_threads() == 2


class Samples(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        return torch.get_num_threads(), values(*case)[0]


for case in [x.split() for x in sys.argv[2:]]:
    before = values(*case)
    process = context.Process(target=same_again, args=case, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0, (case, process.exitcode)  # None: it waits for ever
    same_again(*case)  # the parent goes on
    for threads, logprobs in DataLoader(Samples(), batch_size=None, num_workers=1, multiprocessing_context=context, timeout=60):
        assert threads == 1, threads
        assert (logprobs - before[0]).abs().max() <= 2 * float(sys.argv[1]) * (1 + (hidden @ weight.T).abs().max())
print("done")
"""


def test_T49_a_forked_process_and_a_dataloader_worker_run_the_ops_on_threads_of_their_own():
    cases = ["torch float32"] if compiled.built is None else ["torch float32", "native float32", "native bfloat16"]
    # In a process of its own, whose threads do not spin while they wait: other tests may need the cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", SCRIPT, str(CONTRACT), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
