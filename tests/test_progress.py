"""In a log file progress is whole lines, few of them, that say how much, how fast and how long."""

import io
import re
import sys

import pytest
from conftest import make_rows, make_trainer

from trl_tract.text.progress import ProgressLines, is_watched, progress
from trl_tract.training.log_lines import write_lines_in_logs


def test_a_log_file_gets_lines_without_carriage_returns():
    log = io.StringIO()
    with ProgressLines(total=4, desc="judging", unit="row", file=log, mininterval=0) as lines:
        for _ in range(4):
            lines.update()
    *_, last = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert re.fullmatch(r"judging: 4 of 4 rows \(100%\), .*row/s, \d\d:\d\d so far, \d\d:\d\d left", last)


def test_lines_are_few():
    log = io.StringIO()
    with ProgressLines(total=1000, desc="judging", unit="row", file=log) as lines:
        for _ in range(1000):
            lines.update()
            lines.refresh()
    # The first, and the last: the rest came within the 30 seconds.
    assert len(log.getvalue().splitlines()) == 2


def test_work_that_goes_on_says_so_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr("trl_tract.text.progress.is_watched", lambda: False)  # whoever imported ipykernel before
    with progress(total=3, desc="judging", unit="row") as lines:
        lines.update(3)
    first, *_, last = (line for line in capsys.readouterr().err.splitlines() if line.startswith("judging: "))
    assert "0 of 3 rows (0%)" in first
    assert "3 of 3 rows (100%)" in last


def test_the_last_line_is_written_once():
    log = io.StringIO()
    with ProgressLines(total=2, desc="judging", unit="row", file=log, mininterval=0) as lines:
        lines.update(2)
    assert log.getvalue().count("2 of 2 rows") == 1


def test_short_work_of_a_patient_one_leaves_no_line():
    log = io.StringIO()
    with ProgressLines(total=2, desc="judging", unit="item", file=log, patient=True) as lines:
        lines.update(2)
    assert log.getvalue() == ""


def test_long_work_of_a_patient_one_is_told_to_its_end():
    log = io.StringIO()
    with ProgressLines(total=4, desc="judging", unit="item", file=log, patient=True) as lines:
        lines.update()
        lines._written_at -= 31  # as if half a minute had gone by
        lines.update()
        lines.update(2)
    assert [line[:18] for line in log.getvalue().splitlines()] == ["judging: 2 of 4 it", "judging: 4 of 4 it"]


def test_a_hidden_one_writes_nothing(capsys):
    with progress(total=3, desc="judging", unit="row", hidden=True) as lines:
        lines.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert is_watched()
    assert not isinstance(progress(total=3, desc="judging", unit="row", hidden=True), ProgressLines)


@pytest.mark.parametrize("watched", [True, False])
def test_training_writes_lines_where_nobody_watches(watched, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_tract.training.log_lines.is_watched", lambda: watched)
    settings = {"disable_tqdm": False, "logging_strategy": "steps", "logging_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, make_rows(8), **settings)
    write_lines_in_logs(trainer)
    capsys.readouterr()
    trainer.train()
    written = capsys.readouterr().err
    assert ("training: 2 of 2 steps (100%)" in written) != watched
    assert (re.search(r"^step 2: loss [\d.]+, ", written, re.MULTILINE) is not None) != watched
    assert ("\r" in written) == watched
