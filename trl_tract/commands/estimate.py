"""How much memory and time training takes, before it is started: counted where it can be, and said to be an estimate.

Weights are counted on torch's meta device, which holds shapes and no numbers. Time is floating-point operations over
the speed of a matrix product that is measured here. Knows nothing of rows or files.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig, get_peft_config

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FOUR_BIT = 0.5 + 4 / 64  # nf4: half a byte, and a float32 scale for every 64
_SLOWEST = 0.3
"""Training at less than this share of a matrix product's speed is unusual, so it ends the range of times."""


@dataclass(frozen=True)
class ModelSize:
    """A model's parameters, and what its activations depend on.

    Attributes:
        total: Parameters, without an adapter.
        linear: Those of linear layers inside the blocks, which quantisation shrinks.
        active: Those that a token is multiplied with: no embedding table, and of experts the chosen ones.
        trainable: Those that are trained: all, or the adapter's.
        layers: Blocks.
        hidden: Width of the residual stream.
        inner: Width of the feed-forward part, times the experts of a token.
        stored: Bytes of a weight that is not quantised.
    """

    total: int
    linear: int
    active: int
    trainable: int
    layers: int
    hidden: int
    inner: int
    stored: int


def count(model: str, model_args: dict[str, Any]) -> ModelSize:
    """Count a model's parameters from its configuration; its weights are not read.

    Args:
        model: Directory or hub id.
        model_args: Fields of TRL's ModelConfig.

    Raises:
        OSError, ValueError: There is no such configuration, or no model of that kind.
    """
    args = ModelConfig(**{**model_args, "model_name_or_path": model})
    config = AutoConfig.from_pretrained(model, revision=args.model_revision or "main")
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = chosen / experts if chosen and experts else 1.0
    table = network.get_input_embeddings().weight
    active, linear = 0.0, 0
    for name, parameter in network.named_parameters():
        inside = parameter.dim() >= 2 and parameter is not table and ".layers." in f".{name}"
        linear += parameter.numel() if inside else 0
        if inside or (parameter.dim() == 2 and "lm_head" in name):
            active += parameter.numel() * (share if ".experts" in name else 1.0)
    head = network.get_output_embeddings()
    if head is not None and head.weight is table:
        active += table.numel()
    total = sum(parameter.numel() for parameter in network.parameters())
    trainable = total
    adapter = get_peft_config(args)
    if adapter is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            network = get_peft_model(network, adapter)
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    dtype = str(config.dtype).removeprefix("torch.") if args.dtype in (None, "auto") else str(args.dtype)
    inner = int(
        getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 4 * text.hidden_size)
    )
    return ModelSize(
        total=total,
        linear=linear,
        active=round(active),
        trainable=trainable,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        inner=int(inner) * int(chosen or 1),
        stored=_BYTES.get(dtype, 4),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds at its peak, part by part."""

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimiser + self.activations

    def __str__(self) -> str:
        parts = [
            f"{name} {_size(getattr(self, name))}" for name in ("weights", "gradients", "optimiser", "activations")
        ]
        return f"{_size(self.total)} ({', '.join(parts)})"


def training_memory(size: ModelSize, training: dict[str, Any], model_args: dict[str, Any], batch_tokens: int) -> Memory:
    """Memory of training on one device, without what other programs and the allocator's gaps take.

    Args:
        size: Of the model.
        training: Fields of TRACTConfig: `optim`, `bf16`, `fp16`, `gradient_checkpointing`.
        model_args: Fields of TRL's ModelConfig: `load_in_4bit`, `load_in_8bit`.
        batch_tokens: Tokens of the largest batch, padding included.

    The activations of a block, for each token: about 10 vectors of the residual stream's width and 4 of the
    feed-forward part's. With gradient checkpointing only each block's input is kept, and one block at a time is
    computed again.
    """
    quantised = 0.0
    if model_args.get("load_in_4bit"):
        quantised = _FOUR_BIT
    elif model_args.get("load_in_8bit"):
        quantised = 1.0
    linear = size.linear if quantised else 0
    weights = (size.total - linear) * size.stored + linear * quantised
    # What is trained is the model itself, in the type it is stored in, or an adapter: PEFT keeps those in float32.
    adapter = size.trainable < size.total
    trained = 4 if adapter else size.stored
    if adapter:
        weights += size.trainable * trained
    optimiser = str(training.get("optim", "adamw_torch_fused"))
    if "8bit" in optimiser:
        state = 2.0
    elif optimiser.startswith(("sgd", "adafactor")):
        state = 0.0
    else:
        state = 2.0 * trained
    computed = 2 if training.get("bf16") or training.get("fp16") else size.stored
    block = (10 * size.hidden + 4 * size.inner) * computed
    kept = size.hidden * computed if training.get("gradient_checkpointing", True) else block
    activations = batch_tokens * (size.layers * kept + block)
    return Memory(weights, size.trainable * trained, size.trainable * state, activations)


def training_operations(size: ModelSize, tokens: float, mean_length: float, training: dict[str, Any]) -> float:
    """Floating-point operations of training on `tokens` tokens.

    2 a parameter and token forward, 2 for the gradient of what goes in, 2 for that of the weights where they are
    trained, and 2 for computing again with gradient checkpointing; attention, over the mean length, likewise.
    """
    passes = 2.0 + (1.0 if size.trainable == size.total else 0.0)
    passes += 1.0 if training.get("gradient_checkpointing", True) else 0.0
    attention = 2 * size.layers * size.hidden * mean_length  # causal: half of 4
    return tokens * passes * (2 * size.active + attention)


def generation_seconds(
    size: ModelSize, speed: "Speed", *, rows: int, prompt_tokens: float, new_tokens: float, batch: int
) -> float:
    """Least seconds for writing rationales: prompts at the speed of products, then every token reads all weights."""
    prefill = rows * prompt_tokens * 2 * size.active / speed.operations
    steps = math.ceil(rows / batch) * new_tokens
    step = max(size.active * size.stored / speed.bytes, 2 * size.active * batch / speed.operations)
    return prefill + steps * step


@dataclass(frozen=True)
class Speed:
    """What this machine does in a second.

    Attributes:
        operations: Floating-point operations of a large matrix product.
        bytes: Read from memory.
        device: What was measured.
        dtype: In which type.
    """

    operations: float
    bytes: float
    device: str
    dtype: str


def measure_speed(dtype: str, *, seconds: float = 0.3) -> Speed:
    """Measure matrix products and reading on this process's device, for `seconds` each.

    Args:
        dtype: `float32` or `bfloat16`, in which training computes.
        seconds: How long to measure.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    width = 4096 if device.type != "cpu" else 512
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    left, right = (torch.randn(width, width, device=device).to(kind) for _ in range(2))
    operations = 2 * width**3 * _rate(lambda: left @ right, device, seconds)
    large = torch.zeros(2**26, device=device, dtype=torch.uint8).view(torch.int64)
    read = 2**26 * _rate(large.sum, device, seconds)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    )
    return Speed(operations, read, name, dtype)


def _rate(work: Any, device: torch.device, seconds: float) -> float:
    """How often a second `work` can be done."""
    work()
    done, started = 0, _now(device)
    while (elapsed := _now(device) - started) < seconds:
        work()
        done += 1
    return done / elapsed


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def time_range(seconds: float) -> str:
    """From everything at full speed to a third of it.

    Example:
        >>> time_range(60), time_range(5000)
        ('1 min to 3 min', '1.4 h to 4.6 h')
    """
    return f"{_duration(seconds)} to {_duration(seconds / _SLOWEST)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _size(number: float) -> str:
    """Bytes as a person reads them."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
