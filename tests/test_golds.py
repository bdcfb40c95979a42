"""The reader of gold scores: what a cell may hold, what is missing, and what is refused."""

import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from trl_tract.backends import Stop
from trl_tract.rows.golds import mean_golds, read_golds
from trl_tract.scale.scale import locate_scores, read_aspects, read_scales, scored_within
from trl_tract.scale.text import ScoreNotFoundError

ONE = read_scales({})
WORDS = read_scales({"score_values": {"poor": 1, "good": 4}})
ASPECTS = read_aspects({"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}})
WRITTEN = {"completion": "Good. [RESULT] 5"}


@pytest.mark.parametrize(
    ("cell", "scores"),
    [
        (4, [4.0]),
        (3.4, [3.4]),
        ("4", [4.0]),
        (" 4.5 ", [4.5]),
        (Decimal("3.5"), [3.5]),
        (np.float32(2.5), [2.5]),
        (np.array([3, 4]), [3.0, 4.0]),
        ([4, 3, 3], [4.0, 3.0, 3.0]),
        ("[4, 3, 3]", [4.0, 3.0, 3.0]),
        (["4", None, 5.0], [4.0, 5.0]),
        ([4, float("nan")], [4.0]),
        ("[4.0, nan, None]", [4.0]),
        ("[4, <NA>]", [4.0]),
    ],
)
def test_a_cell_holds_a_number_or_one_for_each_annotator(cell, scores):
    assert read_golds({"score": cell, **WRITTEN}, ONE) == [scores]


@pytest.mark.parametrize("end", [0.7, 4.3])
def test_an_end_of_the_range_in_32_bits_is_that_end(end):
    scales = read_scales({"score_values": [0.7, 2, 4.3]})
    assert read_golds({"score": float(np.float32(end))}, scales) == [[end]]


@pytest.mark.parametrize("cell", [None, "", " ", "nan", "NaN", "<NA>", float("nan"), np.datetime64("NaT")])
def test_a_missing_score_is_read_off_the_completion(cell):
    assert read_golds({"score": cell, **WRITTEN}, ONE) == [[5.0]]


@pytest.mark.parametrize("row", [{}, {"prompt": "p"}, {"score": float("nan"), "completion": None}])
def test_a_row_without_score_and_completion_has_no_golds(row):
    assert read_golds(row, ONE) is None


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (True, "not a number"),
        ([True, 5], "not a number"),
        (np.bool_(True), "not a number"),
        ("4,5", "not a number"),
        ("n/a", "not a number"),
        ("1_0", "not a number"),
        (b"4", "not a number"),
        (datetime.date(2024, 1, 4), "not a number"),
        ({"a": 4}, "not a number"),
        (10**400, "not a number"),
        pytest.param(10**5000, "not a number", id="5000-digits"),
        ("4" * 400, "not a number"),
        (float("inf"), "not a number"),
        ("[4,", "not a number"),
        ([[3, 4], 4], "not a number"),
        ([], "no score"),
        ([None], "no score"),
        (0, "off the range"),
        ([4, 6], "off the range"),
    ],
)
def test_a_cell_that_holds_no_score_is_refused(cell: Any, kind: str):
    with pytest.raises(ScoreNotFoundError) as refused:
        read_golds({"score": cell, **WRITTEN}, ONE)
    assert refused.value.kind == kind


def test_words_of_the_grid_are_scores_wherever_they_stand():
    rows = [{"score": "good"}, {"score": ["poor", "good"]}, {"score": '["poor", 4]'}, {"completion": "[RESULT] poor"}]
    assert [read_golds(row, WORDS) for row in rows] == [[[4.0]], [[1.0, 4.0]], [[1.0, 4.0]], [[1.0]]]


def test_each_aspect_has_its_annotators():
    rows = [
        {"scores": {"tone": [1, 2], "facts": "5"}},
        {"scores": '{"tone": [1, 2], "facts": 5}'},
        {"scores": {"tone": None, "facts": float("nan")}, "completion": "Rude. [TONE] 1 True. [FACTS] 5"},
    ]
    assert [read_golds(row, ASPECTS) for row in rows] == [[[1.0, 2.0], [5.0]], [[1.0, 2.0], [5.0]], [[1.0], [5.0]]]
    assert mean_golds(rows[0], ASPECTS) == [1.5, 5.0]


@pytest.mark.parametrize(
    ("row", "scales", "kind"),
    [
        ({"scores": [4, 5]}, ONE, "several scores"),
        ({"scores": {"tone": 4, "facts": 5}}, ONE, "several scores"),
        ({"score": 4}, ASPECTS, "score and aspects"),
        ({"scores": [4, 5]}, ASPECTS, "not a mapping"),
        ({"scores": {"tone": 4, "facts": None}}, ASPECTS, "aspect missing"),
        ({"scores": {"tone": 4, "facts": 5, "style": 1}}, ASPECTS, "unknown aspect"),
        ({"scores": {"tone": 4, "facts": True}}, ASPECTS, "not a number"),
        ({"scores": {"tone": 4, "facts": 9}}, ASPECTS, "off the range"),
        ({"completion": "Rude. [TONE] 1"}, ASPECTS, "no marker"),
        ({"completion": "no score"}, ONE, "no marker"),
    ],
)
def test_scores_that_do_not_fit_the_scales_are_refused(row, scales, kind):
    with pytest.raises(ScoreNotFoundError) as refused:
        read_golds(row, scales)
    assert refused.value.kind == kind


FRACTIONS = [
    "/10",
    " / 10",
    "／10",
    " ⁄ 10",
    " of 10",
    " out of 10",
    " von 10",
    " sur 10",
    " из 10",
    " ud af 10",
    " points out of 10",
    " Punkte von 10",
    " out of ten",
    " / ten",
    " of a possible 10",
    " out of a maximum of 10",
    " in 10",
    " : 10",
    " ★ / 10",
    " on a scale of 10",
    " on a ten-point scale",
    " sur une échelle de dix",
    ", max. 10",
    " with 10 being the best",
]
BRACKETS = [" (out of ten)", " (max. 10)", " (out of 10)", " (10 max)", "（满分10）", " [of 10]"]


@pytest.mark.parametrize(
    "behind", [*FRACTIONS, *BRACKETS, ".5", ",5", "·7", "٫7", "’7", "-5", " %", "％", " percent", "4", "+", "-"]
)
def test_a_number_right_behind_a_score_makes_it_another_score(behind):
    with pytest.raises(ScoreNotFoundError) as refused:
        read_golds({"completion": f"Fine. [RESULT] 4{behind}"}, ONE)
    assert refused.value.kind == "not on the grid"


SECOND_THOUGHTS = [
    " to 6",
    "–6",
    "~5",
    " or 6",
    " bis 6",
    " - 6",
    ", 6.",
    " 4.5",
    " ½",
    " 1/2",
    " and a half",
    " and a quarter",
]
SECOND_THOUGHTS += [" og en halv", " e meio", " en een half", " с половиной", " et demi"]
SECOND_THOUGHTS += [" 000 words", " through 6", " up to 6", " ~ 6", " 至 6", " x 10", " point seven", " 10ths"]


@pytest.mark.parametrize("behind", SECOND_THOUGHTS)
@pytest.mark.parametrize(
    ("completion", "scales"), [("Fine. [RESULT] 4{}", ONE), ("Rude. [TONE] 4{}\nTrue. [FACTS] 5", ASPECTS)]
)
def test_a_second_thought_behind_a_score_makes_it_no_score(completion, scales, behind):
    with pytest.raises(ScoreNotFoundError):
        read_golds({"completion": completion.format(behind)}, scales)


@pytest.mark.parametrize("behind", [" or poor", "/poor", " to poor"])
def test_a_second_word_behind_a_score_makes_it_no_score(behind):
    words = {"values": {"poor": 1, "good": 2}}
    scales = read_scales({"aspects": {"tone": {"marker": "[TONE]", **words}, "facts": {"marker": "[FACTS]", **words}}})
    with pytest.raises(ScoreNotFoundError):
        read_golds({"completion": f"Rude. [TONE] good{behind}. True. [FACTS] good"}, scales)


@pytest.mark.parametrize(
    "behind",
    ["", ".", " (good)", " - 6 of the facts hold.", "\n- 6 errors", ". It meets 7 points.", "\n", "!", " - good"],
)
def test_words_behind_a_score_leave_it_as_it_is(behind):
    assert read_golds({"completion": f"Fine. [RESULT] 4{behind}"}, ONE) == [[4.0]]


@pytest.mark.parametrize(
    "behind",
    ["\nIn all 7 of them", ". A scale of 10 would be finer", " (good)\n10 is the maximum", " in all", " of course"],
)
def test_numbers_of_a_sentence_behind_a_score_are_no_part_of_it(behind):
    assert read_golds({"completion": f"Fine. [RESULT] 4{behind}"}, ONE) == [[4.0]]


@pytest.mark.parametrize(
    "mention", ["3 of 5 hold", "4/10", "4.5", "3-4", "42", "3rd", "good or poor", "good-ish", "poor's"]
)
def test_a_mention_behind_which_a_judge_would_be_read_is_refused(mention):
    scales = WORDS if mention[0] in "gp" else ONE
    last = scales[0].grid.texts[-1]
    completion = f"I write [RESULT] {mention}, say. Fine. [RESULT] {last}"
    assert Stop.at(scales[0]).place_in(completion) != completion.rindex("[RESULT]")
    with pytest.raises(ScoreNotFoundError):
        read_golds({"completion": completion}, scales)
    assert scored_within(completion.rpartition("[RESULT]")[0], scales) is not None


@pytest.mark.parametrize("mention", ["9 of 10 hold", "and a score", "", "goods"])
def test_a_mention_that_a_judge_goes_past_is_a_part_of_the_rationale(mention):
    completion = f"I write [RESULT] {mention}. Fine. [RESULT] 4"
    assert Stop.at(ONE[0]).place_in(completion) == locate_scores(completion, ONE)[0].marker_start


@pytest.mark.parametrize("values", [[False, True], [0, True], [True, "2..5"]])
def test_values_of_scores_that_yaml_made_booleans_of_are_no_numbers(values):
    with pytest.raises(ValueError, match="score_values"):
        read_scales({"score_values": values})


@pytest.mark.parametrize("texts", [[False, True], ["no", True], [1, 2]])
def test_texts_of_scores_that_yaml_made_something_else_of_are_to_be_quoted(texts):
    with pytest.raises(ValueError, match="quotes"):
        read_scales({"score_values": [0, 1], "score_texts": texts})


OF_WORDS = read_scales({"score_values": {"None": 0, "good": 1}})


@pytest.mark.parametrize("cell", ['["None", "good"]', "['None', 'good']", "['None', None, 'good', nan]"])
def test_a_list_of_words_is_read_as_pandas_writes_it_and_a_word_in_quotes_is_one(cell):
    assert read_golds({"score": cell}, OF_WORDS) == [[0.0, 1.0]]


def test_a_comma_may_part_thousands():
    with pytest.raises(ScoreNotFoundError, match="1000"):
        read_golds({"score": "1,000"}, read_scales({"score_values": "0..1000"}))
