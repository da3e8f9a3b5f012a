#!/bin/bash
# A run of bupo on several nodes of 8 GPUs, which saves itself at the end of its time and goes on in the next job:
#   sbatch --nodes=4 examples/slurm.sh configs/qwen3-8b.yaml [key.path=value ...]
# Add the account and partition of your cluster. The files a configuration names, and output_dir, must lie where every node sees them.

#SBATCH --job-name=bupo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Time to finish the step at hand and write a checkpoint; take more than your longest step.
#SBATCH --signal=B:TERM@900

set -euo pipefail

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))

# Slurm tells this script alone (B:). The trainer's own processes are told from here, and torchrun is not: it would kill them after
# 30 seconds. They are the ones whose command line begins with a Python that runs bupo.
told=no
# shellcheck disable=SC2329 # the trap calls it
tell_the_trainer() {
    told=yes interrupted=yes
    echo "$(date) SIGTERM: finishing the step and writing a checkpoint"
    srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        pkill -TERM -u "$(id -u)" -f '^[^ ]*python[^ ]*( -u)? -m bupo train ' || true
}
trap tell_the_trainer TERM

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" \
    -m bupo train "$@" &
step=$!

# A signal ends `wait` before the step has ended.
status=0
while :; do
    interrupted=no
    wait "$step" && status=0 || status=$?
    [ "$interrupted" = yes ] || break
done

# The same command goes on from the newest checkpoint (checkpoints.resume: auto).
if [ "$told" = yes ]; then
    echo "$(date) ended with $status, back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
