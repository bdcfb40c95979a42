"""How much memory and time does a recipe take? Arithmetic on its settings; nothing is measured here.

    python examples/recipes/estimate.py                           # the recipes in this folder
    python examples/recipes/estimate.py --terms my-recipe.yaml    # one of your own, by term

What is counted is explained in docs/recipes.md; the memory is that of `trl-tract run --dry-run`, for rows as long as
the recipe allows.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from trl import ModelConfig

from trl_tract.commands.estimate import GIB, Batch, Memory, ModelSize, count_config, generation_memory, training_memory

RATIONALE = 400  # tokens with a label a row
ROWS, ROW_TOKENS = 10_000, 1_000  # of the time estimates
FLOPS, BANDWIDTH = 100e12, 1e12  # a second, sustained, of one GPU: scale the hours by what yours does
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


def training_hours(size: ModelSize, *, epochs: float, gpus: int = 1) -> float:
    """Hours of one stage on ROWS rows of ROW_TOKENS tokens, where each GPU sustains FLOPS.

    Two operations a weight of the layers and token in the forward pass, two when it is computed again, two for the
    gradients of the activations, and two for those of the weights where these are trained. Attention's own products, a
    few percent at this length, are left out.
    """
    operations = (8 if size.trainable == size.total else 6) * size.linear
    return ROWS * ROW_TOKENS * epochs * operations / (FLOPS * gpus) / 3600


def generation_hours(size: ModelSize, *, batch: int) -> float:
    """Hours of self-generation for ROWS rows: every step reads all weights once, at BANDWIDTH bytes a second."""
    return ROWS * RATIONALE / batch * size.stored * size.total / BANDWIDTH / 3600


@dataclass(frozen=True)
class Estimate:
    """Of one recipe."""

    training: Memory
    stage_hours: float
    generation: Memory | None
    generation_hours: float | None


def estimate(recipe: Path) -> Estimate:
    """Read a recipe and count.

    Raises:
        ValueError: Its model is not among CONFIGS.
    """
    text = recipe.read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)
    model = settings["model_name_or_path"]
    if model not in CONFIGS:
        raise ValueError(f"{recipe} trains {model}, whose shape is not known here: add it to CONFIGS in estimate.py")
    known = {name: value for name, value in settings.items() if name in ModelConfig.__dataclass_fields__}
    size, gpus = count_config(CONFIGS[model], ModelConfig(**known)), 2 if "accelerate launch" in text else 1
    length, rows = settings.get("max_length", 3000), settings["per_device_train_batch_size"]
    batch = Batch(rows, length, labelled=rows * RATIONALE, score_rows=rows)
    training = training_memory(size, settings, settings, batch, gpus)
    hours = training_hours(size, epochs=settings.get("num_train_epochs", 3), gpus=gpus)
    if "trl-tract run" not in text:
        return Estimate(training, hours, None, None)
    together, new = settings.get("generation_batch_size", 8), settings.get("max_new_tokens", 1024)
    generation = generation_memory(size, batch=together, tokens=length - RATIONALE + new)
    return Estimate(training, hours, generation, generation_hours(size, batch=together))


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
    print(f"{'':<24}{'training':>12}{'a stage':>12}{'rationales':>16}")
    for name, each in found.items():
        line = f"{name:<24}{each.training.total / GIB:8.1f} GiB{each.stage_hours:10.1f} h"
        if each.generation is not None and each.generation_hours is not None:
            line += f"{each.generation.total / GIB:11.1f} GiB{each.generation_hours:9.1f} h"
        print(line)


if __name__ == "__main__":
    main()
