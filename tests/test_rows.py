"""Files of every schema that is understood become the same items."""

import json
import math

import pytest
from conftest import make_rows

from trl_tract.scale.scale import read_scales
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.door import Source, held_out
from trl_tract.sources.prompts import from_feedback_collection
from trl_tract.sources.schemas import Item, read_items

SCALES = read_scales({})
PROMETHEUS = {
    "instruction": "Question one\n###Response to evaluate: fine\n###Feedback: ",
    "gpt4_score": [4, 5, 5],
    "gpt4_feedback": ["good", "very good", "great"],
}
FEEDBACK = {
    "orig_instruction": "Say hello.",
    "orig_response": "Hello!",
    "orig_reference_answer": "Good day!",
    "orig_criteria": "Is it polite?",
    **{f"orig_score{i}_description": f"level {i}" for i in range(1, 6)},
    "orig_feedback": "Short but polite.",
    "orig_score": "4",
}


def write(path, rows, *, as_list=False):
    path.write_text(json.dumps(rows) if as_list else "\n".join(json.dumps(row) for row in rows))
    return str(path)


def load_items(source):
    return [item for _, item in Source(source, SCALES).items()]


def test_prometheus_items_give_three_training_rows_and_keep_their_scores_apart(tmp_path):
    (item,) = load_items(write(tmp_path / "v.json", [PROMETHEUS], as_list=True))
    assert [row["completion"] for row in item.training] == [
        "good [RESULT] 4",
        "very good [RESULT] 5",
        "great [RESULT] 5",
    ]
    assert [row["score"] for row in item.training] == [4.0, 5.0, 5.0]
    assert item.reference["score"] == [4.0, 5.0, 5.0]
    assert item.group == "Question one"


def test_feedback_collection_becomes_a_rubric_prompt():
    row = from_feedback_collection(FEEDBACK)
    for part in ("Say hello.", "Hello!", "Good day!", "Is it polite?", "Score 5: level 5", "[RESULT]"):
        assert part in row["prompt"]
    assert row["completion"] == "Short but polite. [RESULT] 4"
    assert row["score"] == 4.0


def test_prompt_completion_rows_pass_through(tmp_path):
    rows = make_rows(3)
    items = load_items(write(tmp_path / "r.jsonl", rows))
    assert [item.training[0] for item in items] == rows
    assert [item.reference["score"] for item in items] == [row["score"] for row in rows]


def test_rows_without_a_completion_are_evaluation_only(tmp_path):
    (item,) = load_items(write(tmp_path / "r.jsonl", [{"prompt": "a", "score": 3}]))
    assert item.training == ()
    assert item.reference["score"] == 3.0


def test_unknown_columns_are_listed_beside_those_that_are_understood(tmp_path):
    file = write(tmp_path / "r.jsonl", [{"question": "a", "rating": 3}])
    with pytest.raises(ValueError, match=r"first: row 0\): the columns question, rating.*orig_instruction"):
        load_items(file)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("r.jsonl", "", "is empty"),
        ("r.jsonl", "\n", "holds no rows"),
        ("r.json", '{"a": 1}', "holds a JSON dict. Write a list of objects"),
        ("r.json", '{"a": 1}\n{"a": 2}', "not JSON.*JSONL"),
        (
            "r.xlsx",
            "a,b",
            "not a supported file. Give one uncompressed file of type .jsonl, .json, .csv, .tsv, .parquet",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "completion": "no score"}',
            r"first: row 0\): the completion does not hold the marker",
        ),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=wanted):
        load_items(str(tmp_path / name))


def items(groups: list[str]) -> list[Item]:
    return [Item(group, (), {}) for group in groups]


def test_a_group_is_never_split():
    every = items([f"q{i // 4}" for i in range(80)])
    is_held_out = held_out(every, 0.25, seed=1)
    assert len({item.group for item in every if is_held_out(item)}) == 5


def test_too_few_groups_to_split_are_an_error():
    with pytest.raises(ValueError, match=r"holding out 0\.1 of 1 group"):
        held_out(items(["q"] * 8), 0.1, seed=1)


def test_a_benchmark_item_without_feedback_can_be_judged_and_not_trained_on():
    (item,) = read_items({"instruction": "Judge. ", "gpt4_score": [4, 5, 5]}, SCALES)
    assert item.training == ()
    assert item.reference["score"] == [4.0, 5.0, 5.0]
    assert item.reference["prompt"] == "Judge."


@pytest.mark.parametrize(
    "changes",
    [
        {"instruction": math.nan},
        {"instruction": 5},
        {"gpt4_score": math.nan},
        {"gpt4_score": 4},
        {"gpt4_feedback": "good"},
        {"gpt4_feedback": ["good", None, "great"]},
    ],
)
def test_a_benchmark_item_that_lacks_something_is_refused(changes):
    with pytest.raises(ScoreNotFoundError) as refused:
        read_items(PROMETHEUS | changes, SCALES)
    assert refused.value.kind in ("empty column", "not text", "not a list")
