"""docs/evaluation.md: its code runs, and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer

from trl_tract.judge_config import JudgeConfig
from trl_tract.rendering import resolve_grid
from trl_tract.scores import ScoreGrid

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each code block printed and should have, run in the page's order beside a directory `judge`."""
    pytest.importorskip("evaluate")
    directory = tmp_path_factory.mktemp("docs")
    tokenizer = make_tokenizer()
    example = {"prompt": "a", "completion": " b [RESULT] 3"}
    grid, form = resolve_grid(tokenizer, example, "[RESULT]", ScoreGrid.from_values([1, 2, 3, 4, 5]))
    make_model().save_pretrained(directory / "judge")
    tokenizer.save_pretrained(directory / "judge")
    JudgeConfig(grid, form).save(directory / "judge")
    names: dict[str, object] = {}
    found = []
    with contextlib.chdir(directory):
        for code, wanted in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, str(PAGE), "exec"), names)
            found.append((out.getvalue(), wanted))
    return found, (directory / "judge" / "tract_calibration.json").exists()


def test_the_evaluation_page_prints_what_it_shows(printed):
    blocks, _ = printed
    assert len(blocks) >= 9
    for shown, wanted in blocks:
        assert [line.rstrip() for line in shown.splitlines()] == [line.rstrip() for line in wanted.splitlines()]


def test_the_evaluation_page_leaves_its_recalibration_beside_the_judge(printed):
    _, saved = printed
    assert saved
