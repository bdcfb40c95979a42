"""How much memory does a recipe take? Arithmetic on its settings; nothing is measured here.

    python examples/recipes/estimate.py                           # the recipes in this folder
    python examples/recipes/estimate.py --terms my-recipe.yaml    # one of your own, by term

What is counted is explained in docs/recipes.md, for rows as long as the recipe allows. Weights are counted on torch's
meta device, which holds shapes and no numbers.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from trl import ModelConfig, get_peft_config

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 4 / 64
"""Bytes of a weight in nf4: half a byte, and a float32 scale for every 64."""
NF4_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""The same where the scales are quantised in turn: 8 bits each, and a float32 scale for every 256."""
CONTEXT = 0.6 * GIB
"""What a device holds before anything is trained: its context and libraries."""


@dataclass(frozen=True)
class ModelSize:
    """A model's parameters, and what its activations depend on.

    Attributes:
        total: Parameters, without an adapter.
        linear: Those of linear layers inside the blocks, which quantisation shrinks.
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


def count(config: Any, args: ModelConfig) -> ModelSize:
    """Count a model's parameters from its configuration; its weights are not read."""
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    table = network.get_input_embeddings().weight
    linear, layers = 0, Counter[str]()
    for name, parameter in network.named_parameters():
        inside = parameter.dim() >= 2 and parameter is not table and ".layers." in f".{name}"
        if inside:
            linear += parameter.numel()
            layers[f".{name}".partition(".layers.")[2].partition(".")[0]] += parameter.numel()
    head = network.get_output_embeddings()
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
    # All rationales of a batch, by the backend's own bound; and the beginnings of prompts that it keeps.
    kept = min(batch * tokens, max(BATCH_TOKENS, tokens)) + BATCH_TOKENS // 8
    cache = 2 * size.stored * size.layers * size.key * kept
    return Memory(
        {
            "weights": size.stored * size.total,
            "keys and values": cache,
            "logits": 24 * batch * size.vocabulary,
            "context": CONTEXT,
            "allocator": 0.1 * cache,
        }
    )


RATIONALE = 400  # tokens with a label a row
BATCH_TOKENS = 32768  # TransformersBackend's default
_SEVEN_B = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}

# As their published configurations give them.
CONFIGS: dict[str, PreTrainedConfig] = {
    "mistralai/Mistral-7B-Instruct-v0.2": MistralConfig(**_SEVEN_B, intermediate_size=14336, vocab_size=32000),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(**_SEVEN_B, intermediate_size=14336, vocab_size=128256),
    "Qwen/Qwen3-4B": Qwen3Config(
        num_hidden_layers=36,
        hidden_size=2560,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Estimate:
    """Of one recipe."""

    training: Memory
    generation: Memory | None


def estimate(recipe: Path) -> Estimate:
    """Read a recipe and count.

    Raises:
        ValueError: Its model is not among CONFIGS.
    """
    text = recipe.read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)
    model = settings["model"]
    if model not in CONFIGS:
        raise ValueError(f"{recipe} trains {model}, whose shape is not known here: add it to CONFIGS in estimate.py")
    known = {name: value for name, value in settings.items() if name in ModelConfig.__dataclass_fields__}
    size, gpus = count(CONFIGS[model], ModelConfig(**known)), 2 if "accelerate launch" in text else 1
    length, rows = settings.get("max_length", 3000), settings["per_device_train_batch_size"]
    batch = Batch(rows, length, labelled=rows * RATIONALE, score_rows=rows)
    training = training_memory(size, settings, settings, batch, gpus)
    if "trl-tract run" not in text:
        return Estimate(training, None)
    together, new = settings.get("generation_batch_size", 32), settings.get("max_new_tokens", 1024)
    return Estimate(training, generation_memory(size, batch=together, tokens=length - RATIONALE + new))


def main() -> None:
    """Print a table of the recipes, or of the terms of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="*", type=Path, help="recipe files; by default those for GPUs beside this script"
    )
    parser.add_argument("--terms", action="store_true", help="GiB by term, training in the first column of a recipe")
    args = parser.parse_args()
    recipes = args.recipes or [
        file for file in sorted(Path(__file__).parent.glob("*.yaml")) if file.stem != "cpu-smoke"
    ]
    found = {recipe.stem: estimate(recipe) for recipe in recipes}
    if args.terms:
        for name, each in found.items():
            for title, memory in (("training", each.training), ("rationales", each.generation)):
                if memory is not None:
                    print(f"{name}, {title}: {memory.total / GIB:.2f} GiB")
                    for term, size in memory.terms.items():
                        print(f"    {term:<16}{size / GIB:6.2f}" if size else "", end="\n" if size else "")
        return
    print(f"{'':<24}{'training':>12}{'rationales':>16}")
    for name, each in found.items():
        line = f"{name:<24}{each.training.total / GIB:8.1f} GiB"
        if each.generation is not None:
            line += f"{each.generation.total / GIB:12.1f} GiB"
        print(line)


if __name__ == "__main__":
    main()
