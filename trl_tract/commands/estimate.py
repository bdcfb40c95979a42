"""How much memory and time training takes, before it is started: counted where it can be, and said to be an estimate.

Weights are counted on torch's meta device, which holds shapes and no numbers. Time is floating-point operations over
the speed of a matrix product that is measured here. Knows nothing of rows or files.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig, get_peft_config

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 4 / 64
"""Bytes of a weight in nf4: half a byte, and a float32 scale for every 64."""
NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""The same where the scales are quantised in turn: 8 bits each, and a float32 scale for every 256."""
CONTEXT = 0.6 * GIB
"""What a device holds before anything is trained: its context and libraries."""
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
        query: Width of the queries of all heads.
        key: Width of their keys, which are as wide as the values.
        vocabulary: Tokens that the head scores.
        layer: Parameters of the largest block.
        embeddings: Those of the embedding table and the head; of one matrix if they are tied.
        stored: Bytes of a weight that is not quantised.
    """

    total: int
    linear: int
    active: int
    trainable: int
    layers: int
    hidden: int
    inner: int
    query: int
    key: int
    vocabulary: int
    layer: int
    embeddings: int
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
    return count_config(AutoConfig.from_pretrained(model, revision=args.model_revision or "main"), args)


def count_config(config: Any, args: ModelConfig) -> ModelSize:
    """Like `count`, of a model's configuration."""
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = chosen / experts if chosen and experts else 1.0
    table = network.get_input_embeddings().weight
    active, linear, layers = 0.0, 0, Counter[str]()
    for name, parameter in network.named_parameters():
        inside = parameter.dim() >= 2 and parameter is not table and ".layers." in f".{name}"
        if inside:
            linear += parameter.numel()
            layers[f".{name}".partition(".layers.")[2].partition(".")[0]] += parameter.numel()
        if inside or (parameter.dim() == 2 and "lm_head" in name):
            active += parameter.numel() * (share if ".experts" in name else 1.0)
    head = network.get_output_embeddings()
    if head is not None and head.weight is table:
        active += table.numel()
    tables = {id(weight): weight.numel() for weight in (table, *([] if head is None else [head.weight]))}
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
    heads = int(text.num_attention_heads)
    head_size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return ModelSize(
        total=total,
        linear=linear,
        active=round(active),
        trainable=trainable,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        inner=int(inner) * int(chosen or 1),
        query=heads * head_size,
        key=int(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        vocabulary=int(table.shape[0]),
        layer=max(layers.values(), default=0),
        embeddings=sum(tables.values()),
        stored=_BYTES.get(dtype, 4),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, term by term."""

    terms: Mapping[str, float]

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.terms.values())

    def __str__(self) -> str:
        parts = [f"{name} {_size(size)}" for name, size in self.terms.items() if size >= 0.01 * self.total]
        return f"{_size(self.total)} ({', '.join(parts)})"


@dataclass(frozen=True)
class Batch:
    """The largest batch of one device.

    Attributes:
        rows: How many.
        length: Tokens of each, padding included.
        labelled: Tokens with a label, of all rows together.
        score_rows: Positions whose whole softmax is needed: the scores, and the inner nodes of their tries.
    """

    rows: int
    length: int
    labelled: int
    score_rows: int

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return self.rows * self.length


def training_memory(
    size: ModelSize, training: Mapping[str, Any], model_args: Mapping[str, Any], batch: Batch, devices: int = 1
) -> Memory:
    """Memory of training on one device.

    Args:
        size: Of the model.
        training: Fields of TRACTConfig: `optim`, `bf16`, `fp16`, `gradient_checkpointing`.
        model_args: Fields of TRL's ModelConfig: `load_in_4bit`, `use_bnb_nested_quant`, `load_in_8bit`.
        batch: The largest.
        devices: Over which FSDP2 or ZeRO-3 share out all weights.

    What is counted of the activations stands in `docs/training_options.md`.
    """
    four_bit = bool(model_args.get("load_in_4bit"))
    nf4 = NF4_NESTED if model_args.get("use_bnb_nested_quant") else NF4
    quantised = nf4 if four_bit else 1.0 if model_args.get("load_in_8bit") else 0.0
    linear = size.linear if quantised else 0
    weights = ((size.total - linear) * size.stored + linear * quantised) / devices
    # What is trained is the model, in the type that it is stored in, or in float32 where it is sharded; or an adapter,
    # which PEFT keeps in float32 and TRL makes 16-bit on a 4-bit base.
    adapter = size.trainable < size.total
    trained = (2 if four_bit else 4) if adapter else 4 if devices > 1 else size.stored
    if adapter:
        weights += size.trainable * trained
    optimiser = str(training.get("optim", "adamw_torch_fused"))
    if "8bit" in optimiser:
        state = 2.0
    elif optimiser.startswith(("sgd", "adafactor")):
        state = 0.0
    else:
        state = 2.0 * trained
    # 16-bit weights of the root and two layers, 16-bit gradients of the root and one.
    gathered = 2 * (size.embeddings + 2 * size.layer) + 2 * (size.embeddings + size.layer) if devices > 1 else 0
    wide = 1 if training.get("bf16") or training.get("fp16") else size.stored / 2
    # Outputs in 16 bits, the norms' inputs in float32, the gradients of the feed-forward part.
    layer = batch.tokens * (18 * size.hidden + 8 * size.query + 10 * size.key + 14 * size.inner) * wide
    checkpointed = training.get("gradient_checkpointing", True)
    activations = {
        "layer inputs": 2 * size.layers * batch.tokens * size.hidden * wide if checkpointed else 0.0,
        "one layer" if checkpointed else "layers": layer * (1 if checkpointed else size.layers),
        "dequantised": 4 * size.hidden * max(size.inner, size.query) if quantised else 0,
        "mask": 3 * batch.rows * batch.length**2,
        "fused head": min(size.vocabulary, 32768) * 2 * min(batch.labelled, 4096) + 6 * batch.labelled * size.hidden,
        "score rows": 16 * batch.score_rows * size.vocabulary,
    }
    return Memory(
        {
            "weights": weights,
            "gradients": size.trainable * trained / devices,
            "optimiser": size.trainable * state / devices,
            "gathered": gathered,
            **activations,
            "context": CONTEXT,
            "allocator": 0.1 * sum(activations.values()),
        }
    )


def generation_memory(size: ModelSize, *, batch: int, tokens: int) -> Memory:
    """Memory while the transformers backend writes `batch` rationales, prompt and all of up to `tokens` tokens.

    The base of an adapter is loaded in its own precision, also where it was trained in 4 bits.
    """
    cache = 2 * size.stored * size.layers * size.key * batch * tokens
    return Memory(
        {
            "weights": size.stored * size.total,
            "keys and values": cache,
            "logits": 24 * batch * size.vocabulary,
            "context": CONTEXT,
            "allocator": 0.1 * cache,
        }
    )


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
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"
