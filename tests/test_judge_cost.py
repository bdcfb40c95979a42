"""`examples/benchmarks/judge_cost.py` runs and reports what it says."""

import json
import sys
from pathlib import Path

import pytest
from conftest import make_model

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def judge_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import judge_cost

    yield judge_cost
    sys.modules.pop("judge_cost", None)  # A folder of scripts: its names should not stay importable.


@pytest.fixture
def model(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_smoke_ends_with_a_table_and_json(judge_cost, model, capsys):
    judge_cost.main(["--model", model, "--smoke"])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result["benchmark"] == "judge_cost"
    assert [line.split(" | ")[1] for line in printed[2:-1]] == ["1", "2"]
    for row in result["rows"]:
        assert row["backend"] == "transformers"
        for part in ("generate", "score"):
            assert 0 < row["seconds"][part]["min"] <= row["seconds"][part]["median"] <= row["seconds"][part]["max"]
        # 2 prompts, n rationales each.
        generate = row["seconds"]["generate"]["median"]
        assert row["rationales_per_second"] == pytest.approx(2 * row["n"] / generate)


def test_the_address_of_a_server_stays_out_of_the_output(judge_cost, model, capsys):
    judge_cost.main(["--model", model, "--smoke", "--url", "http://me:secret@host"])
    assert "secret" not in capsys.readouterr().out


def test_prompts_of_a_round_share_no_beginning(judge_cost, tokenizer):
    class Holder:
        pass

    backend = Holder()
    backend.tokenizer = tokenizer
    prompts = [tuple(prompt) for seed in range(3) for prompt in judge_cost.make_prompts(backend, 4, 12, seed)]
    assert len({prompt[:4] for prompt in prompts}) == len(prompts)
