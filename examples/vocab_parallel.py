"""Train a head whose vocabulary lies on several ranks: ``torchrun --nproc-per-node 2 examples/vocab_parallel.py``."""

import torch
import torch.distributed as dist

from bupo_kernels import explain, linear_cross_entropy, linear_logprobs

VOCAB, WIDTH, ROWS = 1001, 64, 256  # no multiple of the number of ranks


def main(steps: int = 20) -> list[float]:
    """Return the loss of each step."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)  # the same numbers on every rank
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)  # [N, D]: every rank has all rows
    targets = torch.randint(0, VOCAB, (ROWS,))  # ids in the whole vocabulary
    whole = torch.randn(VOCAB, WIDTH) / WIDTH**0.5
    shard = whole.tensor_split(dist.get_world_size())[rank].clone().requires_grad_()  # [V_r, D]: its columns of the vocabulary

    policy = linear_logprobs(hidden, shard, targets, group=group)
    alone = linear_logprobs(hidden, whole, targets)
    torch.testing.assert_close(policy, alone)

    plan = explain(hidden, shard, targets, group=group)
    optimizer, losses = torch.optim.AdamW([hidden, shard], lr=0.01), []
    for _ in range(steps):
        loss = linear_cross_entropy(hidden, shard, targets, group=group)
        loss.backward()  # hidden.grad is the same on every rank, shard.grad is this rank's
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if rank == 0:
        print(plan)
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
