"""Tiny random models, small tokenizers, judge rows and trainers, all made in-process.

Tests import them from `conftest`, which imports this file when one is asked for.
"""

import functools
import importlib.metadata
import importlib.resources
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaTokenizer,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.tokenization_utils_base import generate_merges

from trl_tract import ScoreGrid, TRACTConfig, TRACTTrainer
from trl_tract.rows.tokens import resolve_scales
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat

# accelerate asks what is installed dozens of times a training, and reads and parses it each time.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = "the reply is short polite clear wrong and long it says why 2 of 4 points hold greeting apology no yes"
WORDS = TALK.split()
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def wrap_tokenizer(tokenizer: Tokenizer, *, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around `tokenizer`, whose first four tokens are SPECIAL."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    if chat_template:
        fast.chat_template = chat_template
    return fast


def make_tokenizer(*, split_digits: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE: SmolLM2's kind with `split_digits`, GPT-2's kind (merges `" 5"`, `" 10"`) without."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(WORDS) + f" [RESULT] {score}" for score in range(1, 11)] * 4
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return wrap_tokenizer(tokenizer, chat_template=CHATML if chat else None)


def make_merging_tokenizer(
    merges: list[tuple[str, str]], chat_template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """Bytes and the given merges alone, in byte-level letters ("Ċ" is a newline), across any boundary of the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap_tokenizer(tokenizer, chat_template=chat_template)


def mistral_sentencepiece() -> Path:
    """The SentencePiece model of Mistral-7B-Instruct-v0.2, from the data folder of `mistral_common`.

    Of the five SentencePiece models there, `tokenizer.model.v1` is the one with 32,000 pieces and digits 1 to 5 at
    28740 28750 28770 28781 28782; v2, v3 and v7 have 32,768 pieces and the digits at 29508 ... 29550.
    """
    return Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))


def make_mistral_tokenizer() -> LlamaTokenizer:
    """The real Mistral-7B-Instruct-v0.2 vocabulary in transformers' own Llama tokenizer."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(mistral_sentencepiece()))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    # As transformers converts such a file where protobuf is installed.
    merges = generate_merges(vocab, {piece: pieces.get_score(i) for piece, i in vocab.items()})
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, pad_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    return tokenizer


CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt_neox": (GPTNeoXConfig, {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "gemma2": (Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "cohere": (CohereConfig, {"num_key_value_heads": 2, "logit_scale": 0.5}),
    "granite": (GraniteConfig, {"num_key_value_heads": 2, "logits_scaling": 2.0}),
    "mixtral": (MixtralConfig, {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
}


def make_model(
    name: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab: int = 384,
    std: float = 0.4,
    width: int = 32,
) -> Any:
    """A random model of two layers and `width` hidden units; `std` of its weights."""
    config_class, extra = CONFIGS[name]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def save_seed(directory: Path, *, weights: bool = True, **options: Any) -> str:
    """Save a model of `make_model` and its tokenizer in `directory`; without weights its configuration alone."""
    model = make_model(**options)
    (model if weights else model.config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def unresolved(grid: ScoreGrid, marker: str = "[RESULT]") -> Scale:
    """The only scale of a completion, its tokens not looked up."""
    return Scale("", grid, CompletionFormat(marker))


def resolved(tokenizer: Any, row: dict[str, Any], grid: ScoreGrid) -> Scale:
    """The only scale of a completion, with its tokens where `row` writes its score."""
    (scale,) = resolve_scales(tokenizer, row, [unresolved(grid)])
    return scale


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


def sharing(rows: list[dict[str, Any]], each: int = 3) -> list[dict[str, Any]]:
    """The rows with `each` behind the prompt of the first of them, and completions that all begin alike."""
    shared = []
    for i, row in enumerate(rows):
        completion, prompt = row["completion"], rows[i - i % each]["prompt"]
        if isinstance(completion, str):
            completion = f" the reply is{completion}"
        else:
            completion = [{"role": "assistant", "content": f"the reply is {completion[0]['content']}"}]
        shared.append({**row, "prompt": prompt, "completion": completion})
    return shared


ASPECTS = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}}


def make_aspect_rows(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a score for each of ASPECTS, behind its own rationale and marker."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(n):
        written = {name: rng.randint(1, 5) for name in ASPECTS}
        parts = [
            f" {' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))} {ASPECTS[name]['marker']} {score}"
            for name, score in written.items()
        ]
        prompt = f"write [TONE] 5 for each. is this polite? {' '.join(rng.choices(WORDS, k=5))} ->"
        golds = {name: max(1.0, score - 0.25) for name, score in written.items()}
        rows.append({"prompt": prompt, "completion": "".join(parts), "scores": golds})
    return rows


# Exact on a CPU, and quiet: float32 throughout, plain SGD without clipping, nothing written, one process.
PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
}


def make_trainer(
    output_dir: Path | str,
    rows: list[dict[str, Any]] | Dataset | IterableDataset,
    *,
    model: Any = None,
    tokenizer: Any = None,
    trainer_class: type = TRACTTrainer,
    config_class: type = TRACTConfig,
    eval_dataset: Any = None,
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer on a tiny model; `settings` go to the config over PLAIN, `extra` to the trainer."""
    return trainer_class(
        make_model() if model is None else model,
        args=config_class(str(output_dir), **{**PLAIN, **settings}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=Dataset.from_list(eval_dataset) if isinstance(eval_dataset, list) else eval_dataset,
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        **(extra or {}),
    )
