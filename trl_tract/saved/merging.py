"""A judge's adapter and its base -> one model of 16 bits, for whatever serves whole models alone.

Knows files and adapters; knows nothing of scores.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from trl_tract.backends.loading import adapter_config, file_of, load, tokenizer_id
from trl_tract.saved.judge_config import JudgeConfig

_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt")
"""What converters such as llama.cpp's read beside or in place of `tokenizer.json`, and transformers may leave out."""
_JUDGES = ("tract_calibration.json", "tract_prompt.json", "LICENSE", "NOTICE")
_LARGEST = {torch.float16: 65504.0, torch.bfloat16: 3.38e38}


def merge_judge(model: str, output_dir: str | Path, dtype: str | None = None) -> Path:
    """Add a judge's adapter to its base and save the sum, with all that makes it a judge.

    The sum is made in float32 and rounded once.

    Args:
        model: Directory or hub id of the adapter.
        output_dir: A directory that is empty or not there.
        dtype: `bfloat16` or `float16`; None: the base's own if it is one of them, else bfloat16.

    Returns:
        The directory: weights, configuration, tokenizer, `tract_config.json`, and what else the judge has.

    Raises:
        ValueError: It is no adapter, its base is quantised, or its weights do not fit `dtype`.
        FileExistsError: There is something in `output_dir`.
    """
    judge = JudgeConfig.load(model)
    adapter = adapter_config(model)
    if adapter is None:
        raise ValueError(f"{model} is already a full model, so there is no adapter to merge")
    directory = Path(output_dir)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty. Choose another --output_dir")
    base_id = str(adapter.base_model_name_or_path)
    base = AutoConfig.from_pretrained(base_id, revision=adapter.revision, trust_remote_code=False)
    if getattr(base, "quantization_config", None):
        raise ValueError(
            f"{base_id} has quantised weights, so the merged weights would be rounded a second time. Set "
            "base_model_name_or_path in adapter_config.json to its 16-bit original"
        )
    own = getattr(torch, dtype) if dtype else base.dtype if base.dtype in _LARGEST else torch.bfloat16
    merged, tokenizer = load(model, None, torch.float32, None, merge_adapter=True)
    for name, weight in merged.named_parameters():
        if not float(weight.detach().abs().max()) <= _LARGEST[own]:
            raise ValueError(f"{name} has values that {own} cannot represent. Use --dtype bfloat16")
    merged.to(own)
    _save(merged, directory)
    tokenizer.save_pretrained(directory)
    source = tokenizer_id(model, base_id)
    for name in _TOKENIZERS:
        found = file_of(source, name) or file_of(base_id, name)
        if found and not (directory / name).exists():
            shutil.copyfile(found, directory / name)
    judge.save(directory)
    for name in _JUDGES:
        if found := file_of(model, name):
            shutil.copyfile(found, directory / name)
    return directory


def _save(model: Any, directory: Path) -> None:
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            # Checkpoints name a temperature and leave sampling off; such a configuration is loaded and not saved.
            settings.do_sample = True
    model.save_pretrained(directory, safe_serialization=True)
