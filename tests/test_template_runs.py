"""A tiny model is trained on four rows in both stages, from files and in Python: the two agree.

On every chat template that TRL ships, and with vocabularies of real models.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from template_tokenizers import TEMPLATES, template_tokenizer
from test_template_judges import GOLDS, rows_of
from test_templates import modes, template_of
from tiny import PLAIN, make_model

from trl_tract import CoTRAILJudge, CoTSelfDistill, TRACTConfig, TRACTTrainer, TransformersBackend
from trl_tract.cli import main

pytestmark = pytest.mark.usefixtures("without_matplotlib")
# Each costs four trainings: one that thinks by itself and is told not to.
QUICK = [("qwen3_5_think", "off")]
# A `_training` variant that writes the same around a rationale is the same case.
SAME = [name for name in TEMPLATES if name.endswith("_training") and name != "glm4moe_training"]
TRAINING = {**PLAIN, "learning_rate": 0.02, "optim": "adamw_torch_fused", "max_steps": 80, "score_in_ce": True}
SHARED = {"share_prompts": True}  # the preambles of some are long
GREEDY = {"max_new_tokens": 60, "temperature": 0, "repetition_penalty": 1}


def flags(options: dict[str, Any]) -> list[str]:
    return [flag for key, value in options.items() for flag in (f"--{key}", str(value))]


def run_from_files(seed: Path, folder: Path, training: dict[str, Any]) -> list[dict[str, Any]]:
    """What `trl-tract run` judged; `judge` says the same of its model."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    rows = ["--data", str(data)]
    # As in Python, nothing is derived: the low-rank adapter of `auto` teaches a random model nothing.
    options = ["--objective", "paper", *flags(training), *flags(GREEDY)]
    run = [
        "run",
        "--model_name_or_path",
        str(seed),
        *rows,
        "--eval_data",
        str(data),
        "--output_dir",
        str(folder / "run"),
    ]
    assert main([*run, *options]) == 0
    judge = ["judge", "--model", str(folder / "run" / "tract"), *rows, "--output_dir", str(folder / "judged")]
    assert main([*judge, *flags(GREEDY)]) == 0
    places = folder / "run" / "judged-tract", folder / "judged"
    judged = [[json.loads(line) for line in (place / "judgements.jsonl").read_text().splitlines()] for place in places]
    assert [[row["score"], row["rationales"]] for row in judged[0]] == [
        [row["score"], row["rationales"]] for row in judged[1]
    ]
    return judged[0]


def run_in_python(seed: Path, folder: Path, training: dict[str, Any]) -> list[Any]:
    """What a judge says that went through both stages without a file of rows."""

    def train(name: str, rows: Dataset) -> Path:
        trainer = TRACTTrainer(seed, TRACTConfig(str(folder / name), **training), train_dataset=rows)
        trainer.train()
        trainer.save_model()
        return folder / name

    rows = Dataset.from_list(rows_of())
    stage_one = train("one", rows)
    distiller = CoTSelfDistill.from_pretrained(stage_one, TransformersBackend(str(stage_one)), **GREEDY)
    judge = train("two", distiller.distill(rows, folder / "written"))
    return CoTRAILJudge.from_pretrained(judge, **GREEDY).judge(rows_of())


def tiny_seed(tokenizer: Any, folder: Path, std: float = 0.4) -> Path:
    model = make_model(vocab=len(tokenizer), std=std)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check_the_two_agree(from_files: list[dict[str, Any]], in_python: list[Any]) -> None:
    assert [(each["rationales"], each["error"]) for each in from_files] == [
        (each.rationales, each.error) for each in in_python
    ]
    np.testing.assert_allclose(
        np.array([each["score"] for each in from_files], dtype=float), [each.score for each in in_python], rtol=1e-6
    )


def check_it_knows_its_rows(in_python: list[Any]) -> None:
    np.testing.assert_allclose([each.score for each in in_python], GOLDS, atol=0.15)
    assert min(each.grid_mass for each in in_python) > 0.9


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
        for name in TEMPLATES
        if name not in SAME
        for mode in modes(name)
    ],
)
def test_a_run_from_files_gives_what_both_stages_give_in_python(name: str, mode: str, tmp_path: Path) -> None:
    seed, training = tiny_seed(template_tokenizer(name), tmp_path / "seed"), {**TRAINING, **SHARED, "thinking": mode}
    in_python = run_in_python(seed, tmp_path, training)
    check_the_two_agree(run_from_files(seed, tmp_path, training), in_python)
    # That a judge knows its rows on every template is held by test_template_judges.py.
    if (name, mode) in QUICK:
        check_it_knows_its_rows(in_python)


@pytest.mark.parametrize("name", SAME)
def test_the_variant_for_training_writes_the_same(name: str) -> None:
    for mode in modes(name):
        frame = template_of(name, mode).frame()
        assert frame == template_of(name.removesuffix("_training"), mode).frame()
