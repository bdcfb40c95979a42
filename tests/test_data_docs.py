"""The page about data does what it says: its files, commands and Python are run, on a model that is made here."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import make_rows, make_tokenizer, make_trainer, save_seed

from trl_tract.backends import ScriptedBackend
from trl_tract.cli import main
from trl_tract.files.journal import write_jsonl
from trl_tract.sources.columns import OwnColumns

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the page, and rows of the known schema."""
    monkeypatch.chdir(tmp_path)
    save_seed(tmp_path / "seed", weights=False)
    (tmp_path / "rows.csv").write_text(blocks("text")[0])
    rubric, config = blocks("yaml")
    (tmp_path / "rubric.yaml").write_text(rubric)
    (tmp_path / "run.yaml").write_text(config.replace(MODEL, "seed") + "eval_fraction: 0.5\n")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(18))
    # A split needs two questions, and the page shows two answers to one.
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("What is 1 + 1?,2,Right.,5\n")
    return tmp_path


COMMANDS = [command for block in blocks("bash") for command in block.replace("\\\n", " ").strip().splitlines()]


@pytest.mark.parametrize("command", [command for command in COMMANDS if " check " in command or "--dry-run" in command])
def test_a_command_of_the_page_runs(command, folder, capsys):
    program, *arguments = shlex.split(command.replace(MODEL, "seed"))
    assert program == "trl-tract"
    assert main(arguments) == 0, capsys.readouterr().err


def test_the_page_has_the_commands_that_are_run():
    assert len(COMMANDS) == 7  # two checks, a dry run, two runs (test_cli.py, test_recipe.py), two judges (test_cli.py)


def test_scores_are_put_beside_the_rows_as_the_page_does(folder):
    (folder / "new.csv").write_text("question,answer\nWhy?,Because.\nWhen?,Now.\n")
    (folder / "judged").mkdir()
    write_jsonl(folder / "judged" / "judgements.jsonl", [{"score": 3.5}, {"score": None}])
    exec(blocks("python")[0], {})
    assert (folder / "scored.csv").read_text() == "question,answer,score\nWhy?,Because.,3.5\nWhen?,Now.,\n"


def test_python_of_the_page_runs(folder, monkeypatch):
    _, code = blocks("python")
    make_trainer(folder / "my-judge" / "tract", make_rows(3, chat=True)).save_model()
    OwnColumns.parse([], "rubric.yaml").save(folder / "my-judge" / "tract")
    backend = ScriptedBackend(lambda *_: " Wrong. [RESULT]", make_tokenizer(), probs=lambda ids: [0.2] * 5)
    monkeypatch.setattr("trl_tract.judge.judge.TransformersBackend", lambda *args, **kwargs: backend)
    names = {}
    exec(code, names)
    assert (names["judgement"].score, names["judgement"].rationales) == (pytest.approx(3.0), [" Wrong."])
