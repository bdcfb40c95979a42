"""How much memory and time does a recipe take? Arithmetic on its settings; nothing is measured here.

    python examples/recipes/estimate.py                           # the recipes in this folder
    python examples/recipes/estimate.py --terms my-recipe.yaml    # one of your own, by term

What is counted is explained in docs/recipes.md. Imports neither torch nor the package.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GIB = 2**30
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # a weight, with double quantisation
CONTEXT = 0.6 * GIB  # CUDA context and libraries
RATIONALE = 400  # tokens with a label a row
ROWS, ROW_TOKENS = 10_000, 1_000  # of the time estimates
FLOPS, BANDWIDTH = 100e12, 1e12  # a second, sustained, of one GPU: scale the hours by what yours does


@dataclass(frozen=True)
class Shape:
    """An architecture, as its published configuration gives it; query and key are heads x head size."""

    layers: int
    hidden: int
    query: int
    key: int
    width: int
    vocabulary: int
    tied: bool

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The linear layers of one decoder layer, inputs x outputs."""
        hidden, query, key, width = self.hidden, self.query, self.key, self.width
        attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        return [*attention, (hidden, width), (hidden, width), (width, hidden)]

    @property
    def layer(self) -> int:
        """Weights of one decoder layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings and the head; one matrix if they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


SHAPES = {
    "mistralai/Mistral-7B-Instruct-v0.2": Shape(32, 4096, 32 * 128, 8 * 128, 14336, 32000, False),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 32 * 128, 8 * 128, 14336, 128256, False),
    "Qwen/Qwen3-4B": Shape(36, 2560, 32 * 128, 8 * 128, 9728, 151936, True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(30, 576, 9 * 64, 3 * 64, 1536, 49152, True),
}


def training_memory(
    shape: Shape, *, batch: int, length: int, rank: int | None, four_bit: bool, weight_bytes: int, gpus: int = 1
) -> dict[str, float]:
    """Bytes on each GPU at the peak of a step, by term.

    Args:
        shape: The model's.
        batch: Rows of a micro-batch, on each GPU.
        length: Tokens of the longest row.
        rank: Of LoRA on all linear layers; None: every weight is trained, sharded over the GPUs.
        four_bit: The linear layers are nf4.
        weight_bytes: Bytes of a weight that is not nf4: 2 or 4.
        gpus: GPUs that the weights are sharded over.
    """
    linear, tokens, labelled = shape.layers * shape.layer, batch * length, batch * RATIONALE
    activations = {
        "layer inputs": 2 * shape.layers * tokens * shape.hidden,
        "one layer": tokens * (18 * shape.hidden + 8 * shape.query + 10 * shape.key + 14 * shape.width),
        "dequantised": 4 * shape.hidden * max(shape.width, shape.query) if four_bit else 0,
        "mask": 3 * batch * length**2,
        "fused head": 2 * 32768 * min(labelled, 4096) + 6 * labelled * shape.hidden,
        "score rows": 16 * batch * shape.vocabulary,
    }
    if rank is None:
        everything = linear + shape.embeddings
        state = {
            "weights": weight_bytes * everything / gpus,
            # Float32 gradients and the two states of AdamW.
            "trained": 12 * everything / gpus,
            # 16-bit weights of the root and two layers, 16-bit gradients of the root and one.
            "gathered": (2 * (shape.embeddings + 2 * shape.layer) + 2 * (shape.embeddings + shape.layer)) * (gpus > 1),
        }
    else:
        adapters = shape.layers * sum(rank * (inputs + outputs) for inputs, outputs in shape.matrices)
        state = {
            "weights": linear * (NF4_BYTES if four_bit else weight_bytes) + weight_bytes * shape.embeddings,
            # Weight, gradient and two states; TRL makes adapters 16-bit on a 4-bit base, and leaves them 32-bit else.
            "trained": adapters * (8 if four_bit else 16),
            "gathered": 0,
        }
    return {**state, **activations, "context": CONTEXT, "allocator": 0.1 * sum(activations.values())}


def generation_memory(shape: Shape, *, batch: int, tokens: int, weight_bytes: int) -> dict[str, float]:
    """Bytes while rationales are written by the transformers backend: `batch` sequences of up to `tokens` tokens.

    The base of an adapter is loaded in its own precision, also where it was trained in 4 bits.
    """
    cache = 2 * 2 * shape.layers * shape.key * batch * tokens
    return {
        "weights": weight_bytes * (shape.layers * shape.layer + shape.embeddings),
        "keys and values": cache,
        "logits": 24 * batch * shape.vocabulary,
        "context": CONTEXT,
        "allocator": 0.1 * cache,
    }


def training_hours(shape: Shape, *, epochs: float, adapters: bool, gpus: int = 1) -> float:
    """Hours of one stage on ROWS rows of ROW_TOKENS tokens, where each GPU sustains FLOPS.

    Two operations a weight and token in the forward pass, two when it is computed again, two for the gradients of the
    activations, and two for those of the weights where these are trained. Attention's own products, a few percent at
    this length, are left out.
    """
    operations = (6 if adapters else 8) * shape.layers * shape.layer
    return ROWS * ROW_TOKENS * epochs * operations / (FLOPS * gpus) / 3600


def generation_hours(shape: Shape, *, batch: int, weight_bytes: int) -> float:
    """Hours of self-generation for ROWS rows: every step reads all weights once, at BANDWIDTH bytes a second."""
    steps = ROWS * RATIONALE / batch
    return steps * weight_bytes * (shape.layers * shape.layer + shape.embeddings) / BANDWIDTH / 3600


@dataclass(frozen=True)
class Estimate:
    """Of one recipe; bytes by term, and hours."""

    training: dict[str, float]
    stage_hours: float
    generation: dict[str, float] | None
    generation_hours: float | None


def estimate(recipe: Path) -> Estimate:
    """Read a recipe and count.

    Raises:
        ValueError: Its model is not among SHAPES.
    """
    text = recipe.read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)
    model = settings["model_name_or_path"]
    if model not in SHAPES:
        raise ValueError(f"{recipe} trains {model}, whose shape is not known here: add it to SHAPES in estimate.py")
    shape, gpus = SHAPES[model], 2 if "accelerate launch" in text else 1
    weight_bytes = 4 if settings.get("dtype") == "float32" else 2
    length, rank = settings.get("max_length", 3000), settings.get("lora_r", 16) if settings.get("use_peft") else None
    training = training_memory(
        shape,
        batch=settings["per_device_train_batch_size"],
        length=length,
        rank=rank,
        four_bit=bool(settings.get("load_in_4bit")),
        weight_bytes=weight_bytes,
        gpus=gpus,
    )
    hours = training_hours(shape, epochs=settings.get("num_train_epochs", 3), adapters=rank is not None, gpus=gpus)
    if "trl-tract run" not in text:
        return Estimate(training, hours, None, None)
    batch, new = settings.get("generation_batch_size", 8), settings.get("max_new_tokens", 1024)
    return Estimate(
        training,
        hours,
        generation_memory(shape, batch=batch, tokens=length - RATIONALE + new, weight_bytes=weight_bytes),
        generation_hours(shape, batch=batch, weight_bytes=weight_bytes),
    )


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
        columns = {f"{name}, training": each.training for name, each in found.items()}
        columns |= {f"{name}, rationales": each.generation for name, each in found.items() if each.generation}
        for title, terms in columns.items():
            print(f"{title}: {sum(terms.values()) / GIB:.2f} GiB")
            print("".join(f"    {name:<16}{value / GIB:6.2f}\n" for name, value in terms.items() if value), end="")
        return
    print(f"{'':<24}{'training':>12}{'a stage':>12}{'rationales':>16}")
    for name, each in found.items():
        line = f"{name:<24}{sum(each.training.values()) / GIB:8.1f} GiB{each.stage_hours:10.1f} h"
        if each.generation is not None and each.generation_hours is not None:
            line += f"{sum(each.generation.values()) / GIB:11.1f} GiB{each.generation_hours:9.1f} h"
        print(line)


if __name__ == "__main__":
    main()
