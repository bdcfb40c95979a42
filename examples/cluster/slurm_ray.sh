#!/bin/bash
# Judge rows with a Ray cluster on machines allocated by SLURM: one Ray node per machine, one worker per GPU. Submit it
# again to continue. MODEL must have the same path on all machines. Only the first machine needs the rows and the output
# directory.
#
#     sbatch examples/cluster/slurm_ray.sh
#     bash examples/cluster/slurm_ray.sh      # without SLURM: only this machine
#SBATCH --job-name=judge-ray
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail
model=${MODEL:-judge} rows=${ROWS:-rows.parquet} out=${OUT:-judged}
export RAY_USAGE_STATS_ENABLED=0

if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    # Anyone who can reach Ray's ports can run code as you. A token, the same on all machines, prevents this.
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
    RAY_AUTH_TOKEN=$(openssl rand -hex 32)
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export RAY_ADDRESS=$head:6379
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" ray start --head --port=6379 --include-dashboard=false --block &
    sleep 20
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
        srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --overlap --exclude="$head" \
            ray start --address="$RAY_ADDRESS" --block &
    fi
    sleep 20
fi

trl-tract judge --engine ray --model "$model" --data "$rows" --output_dir "$out" --block_size "${BLOCK_SIZE:-1024}" \
    --export "${EXPORT:-$out/judgements.parquet}"
