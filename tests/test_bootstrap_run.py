"""`run --rationales`: rows with only scores through a whole run, and `trl-tract bootstrap`."""

import json

import pytest
from conftest import make_rows
from test_pipeline import GENERATION, TRAINING

from trl_tract import run_tract
from trl_tract.cli import main
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.runs.spec import RunSpec

pytestmark = pytest.mark.usefixtures("without_matplotlib")
BOOTSTRAP = {"num_generations": 2, "max_new_tokens": 12, "tolerance": 4.0, "block_size": 4}
"""A random model comes to the middle of the grid, whatever it writes."""


def scored(count):
    return [{"prompt": row["prompt"], "score": row["score"]} for row in make_rows(count)]


@pytest.fixture(scope="module")
def mixed(seed_model, tmp_path_factory):
    """A run on rows of which the first three have a rationale."""
    directory = tmp_path_factory.mktemp("run")
    write_jsonl(directory / "rows.jsonl", [*make_rows(3), *scored(12)[3:]])
    said: list[str] = []

    def run(**changes):
        return run_tract(seed_model, str(directory / "rows.jsonl"), directory / "out", eval_fraction=0.34,
                         training=TRAINING, generation=GENERATION, bootstrap=BOOTSTRAP,
                         say=said.append, **changes)  # fmt: skip

    run()
    return directory, said, run


def test_a_run_says_first_which_rows_get_a_rationale(mixed):
    assert mixed[1][0].startswith("Rationales: 9 of 12 rows have none. The seed model writes them; the other rows keep")


def test_rows_with_a_rationale_keep_it_and_the_others_get_one(mixed):
    rows = list(read_jsonl(mixed[0] / "out" / "bootstrapped" / "rows.jsonl"))
    given = [row["completion"] for row in make_rows(3)]
    assert len(rows) == 8
    assert all((row["rationale_source"] == "annotated") == (row["completion"] in given) for row in rows)
    assert {row["rationale_source"] for row in rows} == {"annotated", "blind"}


def test_the_card_calls_no_rationale_annotated_that_the_bootstrap_wrote(mixed):
    sources = [row["rationale_source"] for row in read_jsonl(mixed[0] / "out" / "bootstrapped" / "rows.jsonl")]
    card = (mixed[0] / "out" / "tract" / "README.md").read_text(encoding="utf-8")
    # The random stage-one model wrote none, so both stages had the same rows.
    assert card.count(f"- Rationales annotated: {sources.count('annotated')} of 8, ") == 2
    assert card.count(f"- Rationales written by a model without the gold score: {sources.count('blind')} of 8, ") == 2


def test_a_run_that_bootstrapped_ends_as_any_other(mixed):
    out, said, _ = mixed[0] / "out", mixed[1], mixed[2]
    assert [line[:7] for line in said if line.startswith("[")][-1] == "[11/11]"
    assert len(list(read_jsonl(out / "self-generated" / "rows.jsonl"))) == 8
    assert set(json.loads((out / "report.json").read_text())["judges"]) == {"stage one", "TRACT"}


def test_a_bootstrap_is_a_step_like_the_others(mixed):
    _, said, run = mixed
    before = len(said)
    run()
    again = [line for line in said[before:] if line.startswith("[")]
    assert sum("finished before" in line for line in again) == 9
    assert sum("left out" in line for line in again) == 2  # too few rows to calibrate


def test_other_settings_of_the_bootstrap_are_another_run(mixed):
    directory, _, _ = mixed
    with pytest.raises(FileExistsError, match=r"bootstrap\.tolerance"):
        run_tract(
            json.loads((directory / "out" / "settings.json").read_text())["model"], str(directory / "rows.jsonl"),
            directory / "out", eval_fraction=0.34, training=TRAINING, generation=GENERATION,
            bootstrap={**BOOTSTRAP, "tolerance": 1.0}, say=lambda _: None,
        )  # fmt: skip


def test_where_all_rows_have_a_rationale_auto_is_as_given(seed_model, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    said = []
    spec = RunSpec(seed_model, str(tmp_path / "rows.jsonl")).settled(said.append)
    assert (spec.rationales, said) == ("given", [])
    assert spec.settings() == RunSpec(seed_model, str(tmp_path / "rows.jsonl"), rationales="given").settings()


@pytest.mark.parametrize(("thinks", "lacking"), [(False, 4), (True, 0)])
def test_auto_counts_completions_of_scores_alone_as_rows_without_a_rationale(thinks, lacking, seed_model, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [
        {"prompt": [{"role": "user", "content": "x"}], "completion": [
            {"role": "assistant", "content": "[RESULT] 4"} | ({"reasoning_content": "Good."} if thinks else {})]}
        for _ in range(4)
    ])  # fmt: skip
    said = []
    RunSpec(seed_model, str(tmp_path / "rows.jsonl")).settled(said.append)
    assert [line[:23] for line in said] == [f"Rationales: {lacking} of 4 rows"] * bool(lacking)


def test_a_run_refuses_a_completion_without_a_score_before_rationales_are_written(seed_model, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [*scored(4), {**scored(1)[0], "completion": " It is good."}])
    with pytest.raises(ValueError, match="row 4"):
        run_tract(seed_model, str(tmp_path / "rows.jsonl"), tmp_path / "out", eval_fraction=0.34, say=lambda _: None)
    assert not (tmp_path / "out" / "bootstrapped").exists()


def test_a_dry_run_counts_the_rows_to_write_for(seed_model, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [*make_rows(3), *scored(12)[3:]])
    command = [
        "run",
        "--model",
        seed_model,
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main([*command, "--dry-run", "--eval_data", str(tmp_path / "rows.jsonl"), "--bf16", "false"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Rationales: 9 of 12 rows have none")
    assert "[2/11] Bootstrap: writing rationales for rows that have only scores\n    9 rows" in printed
    assert not (tmp_path / "o").exists()


def test_check_says_what_becomes_of_rows_that_have_only_scores(seed_model, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", scored(5))
    assert main(["check", str(tmp_path / "rows.jsonl"), "--model", seed_model]) == 0
    printed = capsys.readouterr().out
    assert "5 of 5 rows can be used for training" in printed
    assert "5 rows have no rationale" in printed


def test_the_command_writes_the_rows_and_says_the_table(seed_model, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("prompt,score,ann2\n" + "".join(f"the reply {i},{i},3\n" for i in (1, 3, 5)))
    command = ["bootstrap", "--model", seed_model, "--data", str(tmp_path / "rows.csv"), "--output_dir",
               str(tmp_path / "out"), "--columns", "score=score,ann2", "--num_generations", "2", "--max_new_tokens",
               "8", "--tolerance", "4", "--prices", "1", "2"]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("bootstrap: 3 rows without a rationale")
    assert "first try" in printed
    rows = list(read_jsonl(tmp_path / "out" / "rows.jsonl"))
    assert [row["score"] for row in rows] == [[1, 3], [3, 3], [5, 3]]
    assert all(row["completion"].endswith(f"[RESULT] {end}") for row, end in zip(rows, "234", strict=True))
