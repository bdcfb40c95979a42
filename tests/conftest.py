"""Tiny random models, small tokenizers and judge rows, all made in-process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the reply is short polite clear wrong and long it says why 2 of 4 points hold greeting apology no yes".split()


def make_tokenizer(*, split_digits: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE: SmolLM2's kind with `split_digits`, GPT-2's kind (merges `" 5"`) without."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(WORDS) + f" [RESULT] {score}" for score in range(1, 11)] * 4
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    if chat:
        fast.chat_template = CHATML
    return fast


CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt_neox": (GPTNeoXConfig, {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "gemma2": (Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0}),
}


def make_model(name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, vocab: int = 384) -> Any:
    """A random model of two layers and 32 hidden units."""
    config_class, extra = CONFIGS[name]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def make_rows(n: int, *, seed: int = 0, chat: bool = False, fractions: bool = True) -> list[dict[str, Any]]:
    """Judge rows of unequal lengths with the marker quoted in the prompt and digits in the rationale."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, 14))]
        written = rng.randint(1, 5)
        prompt = f"write [RESULT] and a score. is this polite? {' '.join(words)} ->"
        completion = f" {' '.join(rng.choice(WORDS) for _ in range(rng.randint(1, 10)))} [RESULT] {written}"
        row: dict[str, Any] = {"prompt": prompt, "completion": completion}
        if chat:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion.strip()}],
            }
        row["score"] = written - 0.5 if fractions and i % 3 == 0 and written > 1 else float(written)
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
