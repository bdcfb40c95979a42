"""Pairs: both responses are asked about alike, and the share of right preferences is what a hand counts."""

import numpy as np
import pytest

from trl_tract.scale.scale import read_scales
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.preferences import pair_report, pair_rows
from trl_tract.sources.rubric import Rubric
from trl_tract.sources.schemas import read_items

SCALES = read_scales({"score_values": [1, 2]})
RUBRIC = Rubric("Polite?", {"1": "no", "2": "yes"}, "{instruction} | {response}")
OWN = OwnColumns({}, RUBRIC)
PAIR = {"prompt": "ask", "chosen": "please", "rejected": "now", "subset": "chat", "id": 7}


def judged(*scores, groups=None, subsets=None):
    """Judgements of pairs, `(chosen, rejected)` each."""
    return [
        {
            "side": side,
            "score": score,
            "group": str(i) if groups is None else groups[i],
            **({} if subsets is None else {"subset": subsets[i]}),
        }
        for i, pair in enumerate(scores)
        for side, score in zip(("chosen", "rejected"), pair, strict=True)
    ]


def test_a_pair_becomes_two_rows_that_differ_in_the_response_alone():
    rows = pair_rows(PAIR, RUBRIC, "[RESULT]")
    assert [row["prompt"] for row in rows] == ["ask | please", "ask | now"]
    assert [row["side"] for row in rows] == ["chosen", "rejected"]
    assert all((row["group"], row["subset"], row["id"]) == ("ask", "chat", 7) for row in rows)


def test_a_pair_of_chat_messages_may_hold_its_prompt():
    user = {"role": "user", "content": "ask"}
    pair = {
        side: [user, {"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))
    }
    assert [row["prompt"] for row in pair_rows(pair, RUBRIC, "[RESULT]")] == ["ask | yes", "ask | no"]


def test_whole_prompts_need_no_rubric():
    text = "###Task\n###Response to evaluate: {}\n###Feedback: "
    pair = {"chosen_instruction": text.format("a"), "rejected_instruction": text.format("b")}
    rows = pair_rows(pair, None, "[RESULT]")
    assert rows[0]["prompt"].endswith("a\n###Feedback:")
    assert rows[0]["group"] == rows[1]["group"] == "###Task"


def test_own_columns_name_the_two_responses():
    own = OwnColumns({"instruction": "q", "chosen": "good", "rejected": "bad"}, RUBRIC)
    items = read_items({"q": "ask", "good": "please", "bad": "now"}, SCALES, own, judged=True)
    assert [item.reference["prompt"] for item in items] == ["ask | please", "ask | now"]


def test_pairs_without_a_rubric_say_what_is_missing():
    with pytest.raises(ValueError, match="--rubric"):
        read_items(PAIR, SCALES, judged=True)


def test_pairs_are_no_training_rows_and_the_error_says_what_is():
    with pytest.raises(ValueError, match=r"TRACT trains on scores, and a pair has none"):
        read_items(PAIR, SCALES)


def test_the_share_counts_a_tie_as_half():
    # Right, right, wrong, tie: (1 + 1 + 0 + 1/2) / 4.
    report = pair_report(judged((4, 2), (2.1, 2.0), (1, 5), (3, 3)))
    assert report.accuracy.value == 2.5 / 4
    assert (report.n, report.ties, report.failed) == (4, 1, 0)


def test_a_pair_without_one_of_its_scores_is_counted_and_kept_out():
    report = pair_report(judged((4, 2), (None, 2), (3, None)))
    assert (report.n, report.failed, report.accuracy.value) == (1, 2, 1.0)


def test_subsets_have_their_own_shares():
    report = pair_report(judged((4, 2), (1, 2), (4, 2), (4, 2), subsets=["b", "b", "a", "a"]))
    assert {name: share.value for name, share in report.subsets.items()} == {"a": 1.0, "b": 0.5}
    assert report.to_dict()["subsets"]["b"]["n"] == 2


def test_the_interval_of_independent_pairs_is_wilsons():
    # Wilson's interval of 140 of 200 at z = 1.96 is [0.633, 0.759]; the bootstrap gives it to a percentage point.
    report = pair_report(judged(*[(2, 1)] * 140, *[(1, 2)] * 60))
    assert report.accuracy.low == pytest.approx(0.633, abs=0.012)
    assert report.accuracy.high == pytest.approx(0.759, abs=0.012)


def test_pairs_that_share_a_prompt_widen_the_interval():
    scores = [(2, 1)] * 60 + [(1, 2)] * 40
    alone = pair_report(judged(*scores)).accuracy
    shared = pair_report(judged(*scores, groups=[str(i // 10) for i in range(100)])).accuracy
    assert shared.high - shared.low > 2 * (alone.high - alone.low)


def test_no_scored_pair_is_an_undefined_share():
    report = pair_report(judged((None, None)))
    assert np.isnan(report.accuracy.value)
    assert "undefined" in str(report)


def test_judgements_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="chosen and rejected"):
        pair_report(judged((1, 2))[::-1])


def test_parts_of_a_response_are_text():
    rows = [
        read_items({"instruction": "Ask?", "chosen": chosen, "rejected": "No."}, SCALES, OWN, judged=True)[0].reference
        for chosen in ("Yes.", [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}])
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": 5, "rejected": "No."},
        {"chosen": True, "rejected": "No."},
        {"chosen": [{"role": "assistant", "content": None}], "rejected": "No."},
        {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "No."},
        {"chosen_instruction": float("nan"), "rejected_instruction": "Judge no."},
    ],
)
def test_a_pair_that_lacks_a_text_is_refused(record):
    with pytest.raises(ScoreNotFoundError) as refused:
        read_items(
            {"instruction": "Ask?", **record}, SCALES, None if "chosen_instruction" in record else OWN, judged=True
        )
    assert refused.value.kind == "pair"
