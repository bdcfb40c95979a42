"""What this machine computes fast in, and what weights take: knows models by their configurations alone."""

import timeit

import psutil  # type: ignore[import-untyped]
import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SLOWER = 1.5  # times as slow: far from what processors are, so that the same one never decides otherwise


def fastest_dtype() -> torch.dtype:
    """float32 or bfloat16, whichever multiplies matrices faster on this CPU; bfloat16 on a GPU that has it.

    With AMX or AVX512-BF16 bfloat16 may be several times faster, without them it is several times slower.
    """
    if torch.accelerator.is_available():
        has = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has else torch.float32
    return min((torch.float32, torch.bfloat16), key=_seconds_of_a_product)


def slowdown(dtype: torch.dtype) -> float | None:
    """How many times faster this CPU is in float32; None where the difference is small."""
    times = _seconds_of_a_product(dtype) / _seconds_of_a_product(torch.float32)
    return times if times > _SLOWER else None


def _seconds_of_a_product(dtype: torch.dtype) -> float:
    # As models multiply: of plain products in bfloat16, some processors are a hundred times as slow.
    inputs, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    return min(timeit.repeat(lambda: torch.nn.functional.linear(inputs, weight), number=1))


def count_parameters(model: str, revision: str | None = None) -> int:
    """Parameters of a model, a tied one once, from its configuration alone."""
    config = AutoConfig.from_pretrained(model, revision=revision)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in empty.parameters())


def dtype_to_compute_in(model: str, revision: str | None = None) -> torch.dtype | None:
    """float32 for 16-bit weights that this CPU is slow in, if they fit; None: as they were saved.

    Nothing is lost: each 16-bit number is one of float32.
    """
    config = AutoConfig.from_pretrained(model, revision=revision)
    saved = config.get_text_config().dtype or config.dtype
    if saved not in (torch.bfloat16, torch.float16) or getattr(config, "quantization_config", None) is not None:
        return None
    if slowdown(saved) is None or 4 * count_parameters(model, revision) > psutil.virtual_memory().total / 2:
        return None
    return torch.float32
