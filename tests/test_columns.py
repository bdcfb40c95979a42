"""A user's own rubric and columns become the rows that are understood, and a mistake in them is named."""

import itertools
import json
from dataclasses import replace

import pytest
from conftest import make_tokenizer

from trl_tract import CoTRAILJudge
from trl_tract.backends import ScriptedBackend
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import read_scales
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import Source
from trl_tract.sources.rubric import Rubric
from trl_tract.sources.schemas import read_items

SCALES = read_scales({})
RUBRIC = """\
criterion: Does the answer solve the question?
scores:
  1: It is wrong.
  2: It is mostly wrong.
  3: It is half right.
  4: It is mostly right.
  5: It is right.
"""
RECORD = {"question": "1 + 1?", "answer": "2", "feedback": "That is right.", "stars": "5"}
COLUMNS = ["instruction=question", "response=answer", "rationale=feedback", "score=stars"]


def read_item(record, scales, own):
    own.check(scales)
    (item,) = read_items(record, scales, own)
    return item


@pytest.fixture
def rubric(tmp_path):
    (tmp_path / "rubric.yaml").write_text(RUBRIC)
    return tmp_path / "rubric.yaml"


def test_a_csv_record_becomes_a_training_row(rubric):
    item = read_item(RECORD, SCALES, OwnColumns.parse(COLUMNS, rubric))
    (row,) = item.training
    assert row["completion"] == "That is right. [RESULT] 5"
    assert row["score"] == 5.0
    assert item.group == "1 + 1?"
    for part in ("1 + 1?", "###Response to evaluate:\n2\n", "Score 4: It is mostly right.", "write [RESULT]"):
        assert part in row["prompt"]


def test_prompts_of_a_rubric_may_become_chat_messages_and_own_prompts_may_not(rubric):
    assert read_item(RECORD, SCALES, OwnColumns.parse(COLUMNS, rubric)).converted
    own = OwnColumns.parse(["prompt=question", "rationale=feedback", "score=stars"], None)
    assert not read_item(RECORD, SCALES, own).converted


def test_a_mean_over_annotators_is_kept_and_its_nearest_score_is_written(rubric):
    own = OwnColumns.parse(COLUMNS, rubric)
    (row,) = read_item(RECORD | {"stars": "3.67"}, SCALES, own).training
    assert (row["score"], row["completion"]) == (3.67, "That is right. [RESULT] 4")


def test_columns_that_bear_the_roles_names_need_not_be_named(rubric):
    record = {"instruction": "ask", "response": "answer", "rationale": "Fine.", "score": 4, "other": "left out"}
    (row,) = read_item(record, SCALES, OwnColumns.parse(None, rubric)).training
    assert row.keys() == {"prompt", "completion", "score", "group"}


def test_a_record_without_a_rationale_can_be_judged_but_not_trained_on(rubric):
    item = read_item(RECORD | {"feedback": None}, SCALES, OwnColumns.parse(COLUMNS, rubric))
    assert (item.training, item.reference["score"]) == ((), 5.0)


def test_an_own_template_is_filled_once(tmp_path):
    (tmp_path / "r.yaml").write_text(
        RUBRIC + "template: '{criterion} Q: {instruction} A: {response} {scores} {marker}'\n"
    )
    prompt = Rubric.load(tmp_path / "r.yaml").prompt("{response}", "{marker}", None, "[RESULT]")
    assert prompt == "Does the answer solve the question? Q: {response} A: {marker} 1, 2, 3, 4, 5 [RESULT]"


def test_a_mapping_from_yaml_does_as_well(rubric):
    assert OwnColumns.parse({"response": "answer"}, rubric) == OwnColumns.parse(["response=answer"], rubric)
    assert OwnColumns.parse({"score": ["anna", "ben"]}, None) == OwnColumns.parse(["score=anna,ben"], None)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (["answer"], "--columns answer: write role=column"),
        (["anwser=answer"], "The roles are instruction, response"),
        (["response=a", "response=b"], "names response twice: a and b"),
    ],
)
def test_a_mistake_in_columns_is_named(columns, wanted):
    with pytest.raises(ValueError, match=wanted):
        OwnColumns.parse(columns, None)


@pytest.mark.parametrize(
    ("columns", "record", "wanted"),
    [
        (["score=stars"], RECORD, r"no column is given for the response .*Add --columns response=COLUMN"),
        (COLUMNS, RECORD | {"answer": None}, r"the column answer \(the response to judge\) is empty"),
        (COLUMNS, RECORD | {"stars": None}, r"the column stars \(the gold score\) is empty"),
        (COLUMNS, RECORD | {"stars": "five"}, "the score is 'five', not a number"),
        (COLUMNS, RECORD | {"stars": "9"}, "the score 9 is not between 1 and 5"),
    ],
)
def test_a_record_that_does_not_fit_its_columns_is_named(columns, record, wanted, rubric):
    with pytest.raises(ValueError, match=wanted):
        read_item(record, SCALES, OwnColumns.parse(columns, rubric))


@pytest.mark.parametrize("role", ["instruction", "response", "reference"])
def test_a_column_that_only_a_rubric_reads_is_not_left_out_unseen(role):
    own = OwnColumns.parse(["prompt=question", f"{role}=answer", "score=stars"], None)
    with pytest.raises(ValueError, match=rf"the column answer \({role}\)"):
        read_item(RECORD, SCALES, own)


def test_a_rubric_says_what_stands_in_it_whatever_yaml_makes_of_it(tmp_path):
    (tmp_path / "rubric.yaml").write_text("criterion: no\nscale: on\nscores:\n  1: yes\n  2: 2.50\n")
    rubric = Rubric.load(tmp_path / "rubric.yaml")
    assert (rubric.criterion, rubric.scale, rubric.descriptions) == ("no", "on", {"1": "yes", "2": "2.50"})


def test_a_response_that_is_true_or_nan_is_no_text(rubric):
    own = OwnColumns.parse(None, rubric)
    for response in (True, float("nan"), "nan"):
        with pytest.raises(ScoreNotFoundError):
            own.convert({"response": response, "score": 1}, SCALES)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("- a\n", "a rubric is a YAML file with `criterion: text` and `scores:`"),
        ("criterion: a\nscores: {1: a}\n", "must describe at least two scores"),
        (RUBRIC + "critrion: b\n", "critrion is not a known field"),
        ("a: [", "cannot be read as YAML"),
        ("criterion: c\nscores: {1: a, 1: b, 2: c}", "a key appears twice"),
        ("criterion: c\nscores: {2024-01-01: a, 2: b}", "Put it in quotes"),
        ("criterion: c\nscores: {1: , 2: b}", "1 has no text"),
        ("criterion:\nscores: {1: a, 2: b}", "criterion has no text"),
        ("criterion: c\nscores: {1: [a], 2: b}", "1 has no text"),
        (
            RUBRIC + "template: '{answer}'\n",
            r"in `template`, \{answer\} is not understood. Placeholders are: \{",
        ),
        (RUBRIC + "template: 'judge'\n", r"no placeholder for the \{response\}"),
        (RUBRIC + "order: reversed\n", "order 'reversed' is unknown; it is standard or shared-first"),
        (RUBRIC + "template: '{response}'\norder: standard\n", "`template` sets its own order"),
    ],
)
def test_a_mistake_in_a_rubric_is_named(text, wanted, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=wanted):
        Rubric.load(tmp_path / "r.yaml")


def test_a_rubric_of_other_scores_says_which_option_to_set(rubric):
    with pytest.raises(ValueError, match=r"describes the scores 1, 2, 3, 4, 5, but the grid is 1, 2, 3: give "):
        read_item(RECORD, read_scales({"score_values": [1, 2, 3]}), OwnColumns.parse(COLUMNS, rubric))


@pytest.mark.parametrize(
    ("trained_with", "given", "asked"),
    [
        ("shared-first", "", "shared-first"),
        ("standard", "", "standard"),
        (None, "", "standard"),  # by rows such as those of Feedback Collection
        ("standard", "order: shared-first\n", "shared-first"),
    ],
)
def test_a_judge_is_asked_by_another_rubric_in_the_order_that_it_knows(tmp_path, rubric, trained_with, given, asked):
    (tmp_path / "other.yaml").write_text(RUBRIC + given)
    other = OwnColumns.parse(COLUMNS, tmp_path / "other.yaml")
    saved = OwnColumns.parse(COLUMNS, rubric)
    saved = None if trained_with is None else replace(saved, rubric=replace(saved.rubric, order=trained_with))
    assert OwnColumns.beside(other, saved).rubric.order == asked
    judge = CoTRAILJudge(ScriptedBackend({}, make_tokenizer()))
    judge.rubric = None if saved is None else saved.rubric
    judge.rubric = other.rubric
    assert judge.rubric.order == asked


def test_a_rubric_that_was_saved_before_there_was_an_order_keeps_the_one_it_had(rubric):
    own = OwnColumns.to_train_on(COLUMNS, rubric)
    assert own.rubric.order == "shared-first"
    saved = own.to_dict()
    del saved["rubric"]["order"]
    made = [OwnColumns.from_dict(saved).rubric, replace(own.rubric, order="standard"), own.rubric]
    before, standard, first = (each.prompt("a", "b", "c", "[RESULT]") for each in made)
    assert before == standard != first


def test_the_response_stands_behind_all_that_others_share_unless_the_order_is_standard(rubric, tmp_path):
    (tmp_path / "standard.yaml").write_text(RUBRIC + "order: standard\n")
    prompts = []
    for file in (tmp_path / "standard.yaml", rubric):
        own = OwnColumns.to_train_on([*COLUMNS, "reference=right"], file)
        for answer in ("2", "three"):
            item = read_item(RECORD | {"answer": answer, "right": "two"}, SCALES, OwnColumns.from_dict(own.to_dict()))
            prompts.append(item.training[0]["prompt"])
    standard, _, first, other = prompts
    assert sorted(standard.split()) == sorted(first.split())
    begin = "".join(
        one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, other, strict=False))
    )
    assert begin.endswith("###Response to evaluate:\n")
    for part in ("Score 5: It is right.", "###Instruction:\n1 + 1?", "###Reference answer:\ntwo"):
        assert part in begin


SOME = """\
criterion: Does the answer solve the question?
scores: {SCORES}
scale: any whole number from 0 to 100
"""
HUNDRED = read_scales({"score_values": "0..100"})


@pytest.mark.parametrize(
    "scores",
    ["0: wrong, 50: half right, 100: right", "0-20: wrong, 21 to 79: half right, 80–100: right", "0-50: a, 50-100: b"],
)
def test_a_rubric_may_describe_some_scores_of_a_scale(tmp_path, scores):
    (tmp_path / "r.yaml").write_text(SOME.replace("SCORES", scores))
    own = OwnColumns.parse(COLUMNS, tmp_path / "r.yaml")
    (row,) = read_item(RECORD | {"stars": "37"}, HUNDRED, own).training
    assert row["completion"] == "That is right. [RESULT] 37"
    assert "Then write [RESULT] and one score: any whole number from 0 to 100. Treat" in row["prompt"]
    assert "Score rubric: [Does the answer solve the question?]\nScore 0" in row["prompt"]


def test_a_scale_stands_in_an_own_template(tmp_path):
    (tmp_path / "r.yaml").write_text(SOME.replace("SCORES", "0: a, 100: b") + "template: '{response} {scores}'\n")
    assert Rubric.load(tmp_path / "r.yaml").prompt("", "2", None, "") == "2 any whole number from 0 to 100"


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        (
            "0: a, 101: b",
            r"describes '101': that is neither a score of the grid \(0, 1, 2, 3, 4, ..., 100\) nor a",
        ),
        ("0-20: a, 21-120: b", "describes '21-120': that is neither"),
        ("50: a, 0: b", "describes '0' after a higher score. Put the lowest score first"),
        ("0-20: a, 10-30: b", "describes '10-30' after a higher score"),
        ("20-0: a, 30: b", "describes '20-0' after a higher score"),
    ],
)
def test_a_scale_describes_scores_of_the_grid_in_its_order(tmp_path, scores, wanted):
    (tmp_path / "r.yaml").write_text(SOME.replace("SCORES", scores))
    with pytest.raises(ValueError, match=wanted):
        read_item(RECORD, HUNDRED, OwnColumns.parse(COLUMNS, tmp_path / "r.yaml"))


def test_a_rubric_of_some_scores_without_a_scale_is_told_of_it(tmp_path):
    (tmp_path / "r.yaml").write_text(SOME.replace("SCORES", "0: a, 100: b").rsplit("scale", 1)[0])
    with pytest.raises(ValueError, match=r"but the grid is 0, 1, .*`scale: any score from 0 to 100` to it"):
        read_item(RECORD, HUNDRED, OwnColumns.parse(COLUMNS, tmp_path / "r.yaml"))


def test_ranges_of_negative_numbers_and_words_are_read():
    Rubric("c", {"-10--1": "a", "0": "b", "1-10": "c"}, scale="any").check(ScoreGrid.from_values("-10..10"))
    Rubric("c", {"poor-fair": "a", "good": "b"}, scale="any").check(
        ScoreGrid.from_values({"poor": 1, "fair": 2, "good": 3})
    )


def test_a_file_of_own_columns_is_read_to_its_end(tmp_path, rubric):
    lines = ["question,answer,feedback,stars", *(f"q{i // 2},a{i},Fine.,{1 + i % 5}" for i in range(50))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    items = [item for _, item in Source(str(tmp_path / "rows.csv"), SCALES, OwnColumns.parse(COLUMNS, rubric)).items()]
    assert (len(items), len({item.group for item in items})) == (50, 25)


def test_a_column_that_no_record_has_is_named(tmp_path, rubric):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b", "score": 4}\n{"question": "a"}\n')
    own = OwnColumns.parse(["instruction=question", "response=answer", "reference=ideal"], rubric)
    with pytest.raises(ValueError, match=r"there is no column ideal. The columns are answer, question, score"):
        list(Source(str(tmp_path / "rows.jsonl"), SCALES, own).found())


def test_a_column_that_some_records_lack_is_missing_there(tmp_path, rubric):
    records = [{"instruction": "a", "response": "b", "score": 4}, {"instruction": "a", "response": "b", "score": 2}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [records[0], records[1] | {"ideal": "c"}])))
    own = OwnColumns.parse(["reference=ideal"], rubric)
    first, second = (item for _, item in Source(str(tmp_path / "rows.jsonl"), SCALES, own).items())
    assert ["Reference answer" in item.reference["prompt"] for item in (first, second)] == [False, True]


@pytest.mark.parametrize(
    ("cells", "golds"),
    [({"a": "4", "b": "3", "c": "3"}, [4.0, 3.0, 3.0]), ({"a": "4", "b": None, "c": "nan"}, [4.0])],
)
def test_several_annotators_have_a_column_each(cells, golds):
    own = OwnColumns.parse(["prompt=ask", "score=a,b,c"], None)
    row = own.convert({"ask": "?", **cells}, SCALES)
    assert row["score"] == (golds if len(golds) > 1 else golds[0])


@pytest.mark.parametrize("scores", ["no: a\n  yes: b", "01: a\n  02: b", "~: a\n  5: b", "010: a\n  8: b"])
def test_scores_that_yaml_reads_as_something_else_are_to_be_quoted(tmp_path, scores):
    (tmp_path / "r.yaml").write_text(f"criterion: c\nscores:\n  {scores}\n")
    with pytest.raises(ValueError, match="quotes"):
        Rubric.load(tmp_path / "r.yaml")
