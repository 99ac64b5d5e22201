#!/bin/bash
# Pretrains on all GPUs of several machines, as often as it takes: sbatch examples/slurm.sh --data ... --output ...
#SBATCH --job-name=bincomm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# A task is a rank, without torchrun between: so it gets Slurm's signal, and its status comes back.
# shellcheck disable=SC2016  # expanded in each task
srun bash -c 'export WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
exec bincomm pretrain "$@"' bash "$@"
status=$?

# 75: the time was nearly over, and the run was saved; the same job resumes it.
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
