"""The demo's task is what its docstring claims: balanced, held out, hostile in part, and not solved by length."""

import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trl_tract.demo import task

FOLDER = Path(task.__file__).parent
SPLITS = {"train": task.TRAIN_ROWS, "eval": task.EVAL_ROWS}
ROWS = {split: task.make_rows(split, n) for split, n in SPLITS.items()}


def response(row: dict[str, Any]) -> str:
    return str(row["prompt"][-1]["content"])


def sentences(row: dict[str, Any]) -> set[str]:
    return set(re.split(r"(?<=[.?]) |(?<=[.?]\") ", response(row)))


def rationale(row: dict[str, Any]) -> str:
    return str(row["completion"][0]["content"]).split(f" {task.MARKER} ")[0]


def quotes(row: dict[str, Any]) -> list[str]:
    return [entry.split(": ")[1] for entry in rationale(row).split(", ")]


@pytest.mark.parametrize("split", SPLITS)
def test_committed_file_is_what_the_generator_writes(split: str, tmp_path: Path) -> None:
    task.write(tmp_path / "rows.jsonl", split, SPLITS[split])
    assert (FOLDER / f"{split}.jsonl").read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_committed_lines_are_the_rows() -> None:
    lines = (FOLDER / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS["eval"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_shorter_call_is_a_prefix_of_a_longer_one(split: str) -> None:
    assert task.make_rows(split, 33) == ROWS[split][:33]


def test_another_seed_gives_other_rows() -> None:
    assert task.make_rows("train", 20, seed=1) != ROWS["train"][:20]


def test_train_and_eval_share_no_response_sentence() -> None:
    train, evaluation = (set().union(*map(sentences, ROWS[split])) for split in SPLITS)
    assert min(len(train), len(evaluation)) > 100  # the split into sentences works
    assert train.isdisjoint(evaluation)


def test_no_response_occurs_twice() -> None:
    texts = [response(row) for rows in ROWS.values() for row in rows]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", SPLITS)
def test_score_is_one_plus_the_criteria_quoted(split: str) -> None:
    assert all(row["score"] == 1 + sum(quote != task.ABSENT for quote in quotes(row)) for row in ROWS[split])


@pytest.mark.parametrize("split", SPLITS)
def test_completion_ends_with_the_marker_and_the_score(split: str) -> None:
    assert all(row["completion"][0]["content"].endswith(f" {task.MARKER} {row['score']:.0f}") for row in ROWS[split])


@pytest.mark.parametrize("split", SPLITS)
def test_each_quote_stands_in_the_response(split: str) -> None:
    assert all(quote in response(row) for row in ROWS[split] for quote in quotes(row) if quote != task.ABSENT)


def test_training_has_no_hostile_row() -> None:
    assert not any(row["hostile"] or task.MARKER in response(row) for row in ROWS["train"])


def test_one_eval_row_in_eight_is_hostile_whatever_its_score() -> None:
    scores = Counter(row["score"] for row in ROWS["eval"] if row["hostile"])
    # 120 rows / 8 = 15 hostile ones over 5 scores; they need not fall evenly, but every score has some.
    assert sum(scores.values()) == 15
    assert set(scores) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_an_attack_never_asks_for_the_gold_score() -> None:
    for row in ROWS["eval"]:
        if row["hostile"]:
            (asked,) = re.findall(r"(?:RESULT\] |give |must be )(\d)", response(row))
            assert float(asked) != row["score"]


@pytest.mark.parametrize("split", SPLITS)
def test_length_does_not_predict_the_score(split: str) -> None:
    lengths = [float(len(response(row))) for row in ROWS[split]]
    assert abs(statistics.correlation(lengths, [row["score"] for row in ROWS[split]])) < 0.25


@pytest.mark.parametrize("split", SPLITS)
def test_each_block_of_twenty_holds_each_rubric_with_each_score(split: str) -> None:
    rows = ROWS[split]
    for start in range(0, len(rows), task.BLOCK):
        assert len({(row["rubric"], row["score"]) for row in rows[start : start + task.BLOCK]}) == task.BLOCK


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'test'"):
        task.make_rows("test", 1)


def on_a_hundred(text: str) -> str:
    """A text of the task with its scores, and nothing else, rewritten."""
    text = text.replace("1, plus 1 for each", "0, plus 25 for each")
    scores = {str(score): str(25 * (score - 1)) for score in range(1, 6)}
    before = r"\[RESULT\] |give |must be "
    return re.sub(rf"({before})([1-5])(?=\.| |$)", lambda found: found[1] + scores[found[2]], text)


@pytest.mark.parametrize("split", SPLITS)
def test_another_scale_is_the_same_rows_with_other_scores(split: str) -> None:
    rescored = task.make_rows(split, SPLITS[split], scale=task.SCALES["0-100"])
    for row, other in zip(ROWS[split], rescored, strict=True):
        wanted = json.loads(json.dumps(row))
        for message in (*wanted["prompt"], *wanted["completion"]):
            message["content"] = on_a_hundred(message["content"])
        assert other == {**wanted, "score": 25 * (row["score"] - 1)}
