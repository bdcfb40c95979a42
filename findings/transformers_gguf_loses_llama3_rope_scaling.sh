#!/usr/bin/env bash
# transformers: a GGUF file of a Llama 3 model loads without its RoPE scaling, and gives other logits, without a word.
#
# Guess beforehand: `from_pretrained(..., gguf_file=...)` makes of a GGUF file in float32 the model that it was made of. If the
#   reader knew nothing of "llama3" scaling, it would refuse the file, or name the tensor that it does not use.
# What happens: the model loads, its configuration says `rope_type: default`, and its logits are those of the same weights
#   without the scaling, exactly. Without scaling in the original, the file gives the original's logits. No warning, and
#   no unexpected key is reported.
# Why: GGUF has no field for this scaling. Converters write the factors of all frequencies as the tensor `rope_freqs.weight`,
#   which llama.cpp applies, and the reader of transformers has no name for: tensors without a name are left out.
# Instead: set the original's `rope_parameters` in a configuration of one's own and give it as `config=`; or load safetensors.
#
# Versions: Python 3.11, torch 2.13.0, transformers 5.24.0, gguf 0.19.0. CPU, a few seconds once installed.
# Seen (largest difference of the logits from):
#   original default:  loaded as default, from the original 0.0, from the same weights without scaling 0.0
#   original llama3:   loaded as default, from the original 9.1, from the same weights without scaling 0.0
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
ROPES = {"default": {"rope_type": "default"}, "llama3": {"rope_type": "llama3", **SCALING}}
THETA, WIDTH, HEADS, HEAD, VOCABULARY, LENGTH = 10_000.0, 32, 2, 16, 32, 256
TOKENS = torch.arange(VOCABULARY)[None].repeat(1, 4)
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
LAYER |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm"}
LAYER |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NAMES |= {f"model.layers.0.{name}": f"blk.0.{other}" for name, other in LAYER.items()}


def original(rope):
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    sizes |= dict(vocab_size=VOCABULARY, num_hidden_layers=1, head_dim=HEAD, max_position_embeddings=LENGTH)
    parameters = {"rope_theta": THETA, **ROPES[rope]}
    config = LlamaConfig(rope_parameters=parameters, tie_word_embeddings=False, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


def interleaved(weight):
    """Queries and keys as GGUF has them: the two halves of a head's rotation side by side."""
    return weight.reshape(HEADS, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(model, rope, file):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([chr(65 + number) for number in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    weights = model.state_dict()
    for name, other in NAMES.items():
        weight = weights[f"{name}.weight"]
        if other.endswith(("attn_q", "attn_k")):
            weight = interleaved(weight)
        writer.add_tensor(f"{other}.weight", weight.numpy().copy())
    if rope == "llama3":
        unscaled = THETA ** -(torch.arange(0, HEAD, 2) / HEAD)
        writer.add_tensor("rope_freqs.weight", (unscaled / model.model.rotary_emb.inv_freq).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def case(rope):
    model, plain = original(rope), original("default")
    write(model, rope, f"{rope}.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{rope}.gguf", dtype=torch.float32).eval()
    logits = loaded(TOKENS).logits
    first, second = ((logits - each(TOKENS).logits).abs().max().item() for each in (model, plain))
    kind = loaded.config.rope_parameters["rope_type"]
    name = f"original {rope}:"
    print(f"{name:18} loaded as {kind}, from the original {first:.1f}, from the same weights without scaling {second:.1f}")
    return kind, first, second


kind, first, second = case("default")
scaled_kind, lost, same = case("llama3")
holds = kind == scaled_kind == "default" and max(first, second, same) < 1e-4 and lost > 1
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
