#!/bin/bash
# Judge rows with an array of SLURM jobs, each with one GPU and a share of the blocks. The job that finishes last writes
# judged/judgements.jsonl. A job that is preempted or runs out of time is queued again and continues. You can also submit
# the whole array again to continue.
#
#     sbatch examples/cluster/slurm_array.sh
#     SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=1 bash examples/cluster/slurm_array.sh      # to try it without SLURM
#SBATCH --job-name=judge
#SBATCH --array=0-63
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=judge-%A-%a.log
set -euo pipefail
model=${MODEL:-judge} rows=${ROWS:-rows.parquet} out=${OUT:-judged}

trl-tract judge --model "$model" --data "$rows" --output_dir "$out" --block_size "${BLOCK_SIZE:-1024}" \
    --shard "$((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT"
