#!/bin/bash
# Trains under SLURM and resumes after every time limit or preemption:
#
#     sbatch --nodes 2 --gpus-per-node 8 tools/slurm_train.sh --cfg configs/X.yaml --data-path DIR --batch-size 128
#
# Two minutes before the end SLURM sends USR1 to this script. It makes every process finish its update, save and stop, and
# requeues the job, which then resumes from the checkpoint.
#SBATCH --job-name=strip-mlp
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

stop() {
    stopping=1
    scancel --signal=TERM "$SLURM_JOB_ID.0" # torchrun passes it on to its processes and gives them 30 seconds
}
trap stop USR1 TERM

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Since Slurm 22.05 a step does not inherit the job's CPUs per task.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head_node:$((20000 + SLURM_JOB_ID % 20000))" main.py "$@" &
step=$!

# A signal interrupts wait, so wait until the step is really over.
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done
if [ -n "$stopping" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
