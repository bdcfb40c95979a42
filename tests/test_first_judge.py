"""The benchmark of first judges: it keeps what is finished, and ends with a table and a line of JSON."""

import json
import sys
from pathlib import Path

import pytest
from conftest import save_seed

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.mark.slow  # two whole runs
def test_first_judge_keeps_finished_runs_and_ends_with_a_table_and_json(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import first_judge

    save_seed(tmp_path / "seed", std=0.1, width=64)
    arguments = ["--output_dir", str(tmp_path / "out"), "--model", str(tmp_path / "seed"), "--tasks", "demo"]
    arguments += ["--seeds", "0", "--smoke"]
    first_judge.main(arguments)
    *_, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["benchmark"] == "first_judge"
    assert [(each["objective"], list(each["judges"])) for each in result["results"]] == [
        ("auto", ["stage one", "TRACT"]),
        ("paper", ["stage one", "TRACT"]),
    ]
    first_judge.main([*arguments, "--table"])
    printed = capsys.readouterr().out
    assert "finished before" not in printed
    assert printed.count("| demo |") == 4
    sys.modules.pop("first_judge", None)
