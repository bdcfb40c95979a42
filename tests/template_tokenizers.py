"""A small tokenizer for each chat template that TRL ships, with the control tokens and the vocabulary of its family."""

import functools
import json
import re
from pathlib import Path

import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DIRECTORY = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in DIRECTORY.glob("*.jinja"))

# Words as Qwen cuts them, a digit at a time; Llama 3 takes digits by three.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA = _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
# Beginning of a family's name -> vocabulary, beginning and end of sequence.
_FAMILIES = {
    "cohere": ("qwen", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("llama", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("pieces", "<bos>", "<eos>"),
    "gemma": ("pieces", "<bos>", "<eos>"),
    "glm": ("qwen", None, "<|endoftext|>"),
    "gptoss": ("llama", "<|startoftext|>", "<|return|>"),
    "idefics3": ("llama", "<|begin_of_text|>", "<end_of_utterance>"),
    "lfm2": ("llama", "<|startoftext|>", "<|im_end|>"),
    "llama3": ("llama", "<|begin_of_text|>", "<|eot_id|>"),
    "llava": ("pieces with a space before", "<s>", "</s>"),
    "muse": ("llama", "<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("llama", "<s>", "<|im_end|>"),
    "phi3": ("pieces with a space before", "<s>", "<|endoftext|>"),
    "qwen": ("qwen", None, "<|im_end|>"),
    "smolvlm": ("qwen", "<|im_start|>", "<end_of_utterance>"),
}
# What looks like a control token in a template's source, and what of it is an ordinary added token.
_CONTROL = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<[｜][^>]*[｜]>|</?think>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<(?:start|end)_of_[a-z]+>|<image>"
    r"|</?tool_call>|</?tool_response>|</?arg_key>|</?arg_value>|/nothink|<sop>|\[gMASK\]"
)
_NO_TOKENS = {"<|final|>"}
_ORDINARY = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>|/nothink")


def _corpus() -> list[str]:
    words = [
        "the",
        "reply",
        "is",
        "polite",
        "and",
        "correct",
        "short",
        "clear",
        "wrong",
        "names",
        "no",
        "source",
        "a",
        "greeting",
        "apology",
        "remedy",
        "yes",
        "no",
    ]
    lines = [f"The reply {words[i % 17]} {words[i % 13]}: {' '.join(words[i % 9 :])}. Score {i}" for i in range(200)]
    # Line breaks that join each other and what stands before them, as Qwen's, Llama 3's and Gemma's do.
    breaks = ["the\n\nreply>\n\nand>\nno\n\n\nyes: \n\nshort.\nThe\n\n"] * 200
    return [*lines, *breaks, *(f"write the score.\n\n[RESULT] {i % 5 + 1}\n" for i in range(200))]


@functools.cache
def _vocabulary(name: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    if name in ("qwen", "llama"):
        split = pre_tokenizers.Split(Regex(_QWEN if name == "qwen" else _LLAMA), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
        tokenizer.train_from_iterator(_corpus(), trainer)
        return str(tokenizer.to_str())
    # SentencePiece's kind: spaces are letters, unknown characters are bytes.
    before = name.endswith("before")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if before else space
    words = pre_tokenizers.Split(Regex("▁(?=\\S)"), "merged_with_next")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("\n+"), "isolated"), words])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if before else [])
    )
    made = json.loads(tokenizer.to_str())
    made["pre_tokenizer"] = None
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in bytes_]
    return json.dumps(made)


def template_tokenizer(name: str, source: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the template `name`; with another `source` in its place."""
    vocabulary, bos, eos = next(family for start, family in _FAMILIES.items() if name.startswith(start))
    tokenizer = Tokenizer.from_str(_vocabulary(vocabulary))
    source = source or (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")
    names = set(_CONTROL.findall(source)) - _NO_TOKENS | {token for token in (bos, eos, "<pad>") if token}
    for control in sorted(names):
        tokenizer.add_tokens([AddedToken(control, normalized=False, special=not _ORDINARY.fullmatch(control))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = source
    return fast
