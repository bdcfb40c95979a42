"""`trl-tract check` and the token view say of rows what training makes of them."""

import json
import re

import numpy as np
import pytest
from conftest import make_aspect_rows, make_rows, make_tokenizer, make_trainer, resolved, save_seed
from test_aspects import ASPECTS
from test_aspects import make_rows as aspect_rows

from trl_tract.backends.tree import distinct_share
from trl_tract.cli import main
from trl_tract.commands.check import examine, lengths_table, score_histogram
from trl_tract.commands.token_view import around_score, labelled, legend, painted, view_row
from trl_tract.files.journal import write_jsonl
from trl_tract.rows.encoding import RowEncoder
from trl_tract.rows.tokens import resolve_scales
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import read_aspects, read_scales
from trl_tract.sources.door import Source

GRID = ScoreGrid.from_values([1, 2, 3, 4, 5])
TOKENIZER = make_tokenizer()


def encoder_of(row, values="1..5", **settings):
    scale = resolved(TOKENIZER, row, ScoreGrid.from_values(values))
    return RowEncoder((scale,), tokenizer=TOKENIZER, **{"max_length": None, **settings})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tokenizer and a configuration: all that `check` reads."""
    return save_seed(tmp_path_factory.mktemp("model"), weights=False)


def checked(tmp_path, model, rows, capsys, *options):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    code = main(["check", str(tmp_path / "rows.jsonl"), "--model", model, *options])
    return code, capsys.readouterr().out


def test_the_view_covers_the_row_and_names_its_parts():
    row = make_rows(1)[0] | {"completion": " It is polite. [RESULT] 4"}
    tokens = view_row(encoder_of(row), row)
    assert "".join(token.text for token in tokens) == row["prompt"] + row["completion"] + "<|end|>"
    text = {part: "".join(t.text for t in tokens if t.part == part) for part in dict.fromkeys(t.part for t in tokens)}
    assert text == {
        "prompt": row["prompt"],
        "rationale": " It is polite.",
        "marker": " [RESULT]",
        "separator": " ",
        "score": "4",
        "after": "<|end|>",
    }


@pytest.mark.parametrize("settings", [{}, {"score_in_ce": True}, {"drop_rationale": True}, {"max_length": 44}])
def test_the_view_shows_the_columns_that_are_trained_on(settings, tmp_path):
    row = make_rows(1, seed=3)[0] | {"score": 3.5}
    view = [token for token in view_row(encoder_of(row, **settings), row) if token.kept]
    (trained,) = make_trainer(tmp_path, [row], **settings).train_dataset
    assert [token.id for token in view] == trained["input_ids"]
    assert [token.cross_entropy for token in view] == [label != -100 for label in trained["labels"]]
    assert [np.nan if token.gold is None else token.gold for token in view] == pytest.approx(
        trained["score_labels"], nan_ok=True
    )


@pytest.mark.parametrize(
    ("written", "wanted"),
    [("75", ["7", "5"]), ("100", ["1", "0", "0"]), ("7", ["7", "<|end|>"])],  # what follows 7 tells it from 75
)
def test_all_tokens_of_a_score_are_in_its_squared_error(written, wanted):
    row = make_rows(1)[0] | {"completion": f" Fine. [RESULT] {written}", "score": 63.5}
    tokens = view_row(encoder_of(row, values="0..100"), row)
    assert [token.text for token in tokens if "squared error" in token.terms] == wanted
    assert [token.gold for token in tokens if token.gold is not None] == [63.5]


def test_every_score_of_several_is_a_score():
    (row,) = make_aspect_rows(1)
    scales = resolve_scales(TOKENIZER, row, read_aspects(ASPECTS))
    tokens = view_row(RowEncoder(scales, None, tokenizer=TOKENIZER), row)
    assert [token.gold for token in tokens if token.part == "score"] == list(row["scores"].values())
    assert sum(token.part == "marker" and "]" in token.text for token in tokens) == 2


@pytest.mark.parametrize(
    ("training", "terms"),
    [
        ({"raft_weight": 0}, {"cross-entropy", "none"}),
        ({"rationale_weight": 0}, {"squared error", "none"}),
        ({"raft_weight": 0, "score_in_ce": True}, {"cross-entropy", "none"}),
    ],
)
def test_a_term_without_weight_is_not_shown(training, terms):
    row = make_rows(1)[0]
    tokens = view_row(encoder_of(row, score_in_ce=training.get("score_in_ce", False)), row, training)
    assert {token.terms for token in tokens} == terms


def test_an_aspect_without_weight_has_no_squared_error():
    (row,) = make_aspect_rows(1)
    aspects = {name: {**aspect, "raft_weight": number} for number, (name, aspect) in enumerate(ASPECTS.items())}
    encoder = RowEncoder(resolve_scales(TOKENIZER, row, read_aspects(aspects)), None, tokenizer=TOKENIZER)
    tokens = view_row(encoder, row, {"raft_weight": 0})
    assert [token.squared_error for token in tokens if token.gold is not None] == [False, True]


@pytest.mark.parametrize("completion_only_loss", [None, True, False])
@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_prompts_are_shown_in_the_loss_that_has_them(kind, completion_only_loss, tmp_path):
    row = make_rows(1)[0]
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    write_jsonl(tmp_path / "rows.jsonl", [row if kind == "prompt" else {"messages": chat, "score": row["score"]}])
    training = {"completion_only_loss": completion_only_loss}
    found = Source(str(tmp_path / "rows.jsonl"), read_scales({})).found()
    report, encoder = examine(found, "rows.jsonl", TOKENIZER, training)
    ((_, shown),) = report.examples
    labels = make_trainer(tmp_path, [shown], **training).train_dataset[0]["labels"]
    view = view_row(encoder, shown, training)
    assert [token.cross_entropy for token in view] == [label != -100 for label in labels]
    assert report.completion_tokens[0] < report.tokens[0]


def test_tokens_beyond_max_length_are_shown_as_cut_off():
    row = make_rows(1)[0]
    tokens = view_row(encoder_of(row, max_length=10), row)
    assert {token.terms for token in tokens[10:]} == {"cut off"}


def test_text_of_rows_cannot_reach_the_terminal():
    row = make_rows(1)[0] | {"completion": " \x1b[31mred\x07 [RESULT] 4"}
    tokens = view_row(encoder_of(row), row)
    for shown in (labelled(tokens), around_score(tokens, before=99), legend(tokens, colour=False)):
        assert "\x1b" not in shown
    assert "⟨U+001B⟩[31mred⟨U+0007⟩" in labelled(tokens)
    assert "\x1b[31m" not in painted(tokens)


def test_lengths_are_those_of_the_trained_rows(tmp_path):
    rows = make_rows(20)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    report, _ = examine(
        Source(str(tmp_path / "rows.jsonl"), read_scales({})).found(), "rows.jsonl", TOKENIZER, {"max_length": None}
    )
    lengths = sorted(len(row["input_ids"]) for row in make_trainer(tmp_path, rows).train_dataset)
    # Inverted distribution function: the 10th of 20 at one half, the 19th at 95 %.
    wanted = [lengths[0], lengths[9], lengths[18], lengths[19]]
    assert [int(cell) for cell in lengths_table(report)[3].split()[1:]] == wanted
    assert report.longest == lengths[-1]


def test_the_length_that_is_named_is_just_enough(tmp_path, model, capsys):
    rows = make_rows(20)
    longest = max(len(row["input_ids"]) for row in make_trainer(tmp_path, rows).train_dataset)
    assert f"max_length: {longest} is enough for every row" in checked(tmp_path, model, rows, capsys)[1]
    printed = checked(tmp_path, model, rows, capsys, "--max_length", str(longest - 1))[1]
    assert f"max_length: set it to {longest} or more" in printed


def test_the_histogram_counts_gold_scores_at_the_nearest_of_the_grid():
    lines = score_histogram([1, 1.4, 5, 5, 4.6], GRID, mark="#")
    assert [line.split()[-1] for line in lines] == ["2", "0", "0", "0", "3"]
    assert lines[4].count("#") == 40


def test_refusals_are_training_s_own(tmp_path, model, capsys):
    rows = make_rows(6)
    rows[1]["completion"] = " fine. 4"
    rows[2]["score"] = 9.0
    rows[4]["prompt"] = "is this polite? " * 60
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        make_trainer(tmp_path, rows, max_length=200)
    code, printed = checked(tmp_path, model, rows, capsys, "--max_length", "200")
    assert code == 1
    (found,) = (line for line in printed.splitlines() if line.startswith("Refused: "))
    wanted = (
        str(refused.value)
        .replace("train rows", "rows.jsonl rows")
        .removesuffix(" Or set invalid_rows='drop' to continue without them.")
    )
    assert found == f"Refused: {wanted}"


def test_good_rows_end_with_exit_code_0(tmp_path, model, capsys):
    code, printed = checked(tmp_path, model, make_rows(6), capsys)
    assert code == 0
    assert "rows.jsonl: 6 records, 6 of 6 rows can be used for training" in printed
    assert "No row would be refused" in printed


def test_records_that_cannot_be_read_are_counted_with_the_rest(tmp_path, model, capsys):
    rows = [*make_rows(3), {"prompt": "ask"}, {"prompt": "ask"}]
    code, printed = checked(tmp_path, model, rows, capsys)
    assert code == 1
    assert "2 of 5 rows.jsonl rows refused (no score; first: row 3): the row has a prompt, but neither" in printed


def test_rows_without_completions_are_counted_as_rows_to_write_for(tmp_path, model, capsys):
    code, printed = checked(tmp_path, model, [{"prompt": "ask", "score": 4}, *make_rows(1)], capsys)
    assert code == 0
    assert "2 of 2 rows can be used for training" in printed
    assert "1 rows have no rationale" in printed


def test_the_rows_that_are_asked_for_are_shown(tmp_path, model, capsys):
    printed = checked(tmp_path, model, make_rows(4), capsys, "--rows", "2", "9")[1]
    assert "row 2, the tokens around" in printed
    assert "squared error, gold" in printed
    assert "row 9 is not shown: it does not exist" in printed


def test_every_schema_can_be_checked(tmp_path, model, capsys):
    item = {"instruction": "Judge.\n###Response to evaluate: a", "gpt4_score": [4, 5], "gpt4_feedback": ["x", "y"]}
    (tmp_path / "bench.json").write_text(json.dumps([item]))
    assert main(["check", str(tmp_path / "bench.json"), "--model", model]) == 0
    assert "1 records, 2 of 2 rows can be used for training" in capsys.readouterr().out


def test_aspects_are_checked_each_on_its_own_grid(tmp_path, model, capsys):
    rows = aspect_rows(ASPECTS, 6)
    trained = make_trainer(tmp_path, rows, aspects=ASPECTS).train_dataset
    code, printed = checked(tmp_path, model, rows, capsys, "--aspects", json.dumps(ASPECTS))
    assert code == 0
    assert "6 of 6 rows can be used for training" in printed
    assert f"max_length: {max(len(row['input_ids']) for row in trained)} is enough" in printed
    for name in ASPECTS:
        golds = [row["scores"][name] for row in rows]
        between = sum(gold != round(gold) for gold in golds)
        assert f"6 gold scores of {name}" + (f", {between} of them between" if between else "") in printed
    shown = [line.rpartition("gold ")[2] for line in printed.splitlines() if ", gold " in line]
    assert [float(gold) for gold in shown] == pytest.approx(list(rows[0]["scores"].values()), abs=1e-4)
    markers = re.findall(r"^\d+ +\d+ +'(.*)' +marker +cross-entropy", printed, re.MULTILINE)
    assert "".join(markers).split() == ["[TONE]", "[FACTS]"]


def test_an_aspect_without_its_score_is_refused_as_in_training(tmp_path, model, capsys):
    rows = aspect_rows(ASPECTS, 4)
    rows[2]["completion"] = rows[2]["completion"].replace("[FACTS]", "[FICTION]")
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        make_trainer(tmp_path, rows, aspects=ASPECTS)
    code, printed = checked(tmp_path, model, rows, capsys, "--aspects", json.dumps(ASPECTS))
    assert code == 1
    assert "1 of 4 rows.jsonl rows refused (no marker; first: row 2)" in printed
    assert "aspect 'facts'" in str(refused.value)
    assert "aspect 'facts'" in printed


def test_a_model_without_a_tokenizer_is_named(tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(1))
    assert main(["check", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path)]) == 1
    assert "no tokenizer could be loaded from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("golds", "warns"),
    [
        (lambda score: score, False),
        (lambda score: score + 0.4 * (score < 5), False),
        (lambda score: 6 - score, True),
        (lambda score: 1 + score / 10, True),
    ],
)
def test_gold_scores_that_contradict_the_written_ones_are_warned_of(golds, warns, tmp_path, model, capsys):
    rows = [
        {"prompt": f"p{number}", "completion": f" Fine. [RESULT] {score}", "score": golds(score)}
        for number, score in enumerate([1, 2, 3, 4, 5, 5])
    ]
    code, printed = checked(tmp_path, model, rows, capsys)
    assert (code, "\nWarning: " in printed) == (0, warns)
    assert "6 completions also contain a score" in printed


def test_own_completions_that_contradict_their_gold_scores_are_warned_of(tmp_path, model, capsys):
    (tmp_path / "rubric.yaml").write_text("criterion: c\nscores: {1: a, 2: b, 3: c, 4: d, 5: e}\n")
    written = [{"response": f"{n}", "completion": f"Fine. [RESULT] {n % 5 + 1}", "score": 5 - n % 5} for n in range(10)]
    made = [{"response": f"{n}", "rationale": "Fine.", "score": n % 5 + 1} for n in range(10)]
    for rows, warned in ((written, True), (made, False)):
        _, out = checked(tmp_path, model, rows, capsys, "--rubric", str(tmp_path / "rubric.yaml"))
        assert ("Warning" in out) == warned
        assert ("correlation" in out) == warned


def test_scores_of_rows_without_completions_are_compared_with_none(tmp_path, model, capsys):
    rows = [{"prompt": f"p{number}", "score": 1 + number / 2} for number in range(9)]
    _, out = checked(tmp_path, model, rows, capsys)
    assert "9 rows have no rationale" in out
    assert "also contain a score" not in out


def test_the_tokens_that_rows_share_are_counted_in_either_order(tmp_path, model, capsys):
    # Eight answers to one question, which is most of the prompt; a ninth row of another question.
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text("criterion: Is it right?\nscores: {1: no, 2: some, 3: half, 4: most, 5: yes}\n")
    rows = [{"instruction": "why " * 50, "response": f"{i} so", "rationale": "good", "score": 5} for i in range(8)]
    other = {"instruction": "how", "response": "so", "rationale": "bad", "score": 1}
    code, printed = checked(tmp_path, model, [*rows, other], capsys, "--rubric", str(rubric))
    assert code == 0
    first, standard = (int(share) for share in re.findall(r"(\d+)% (?:of the tokens|with `order)", printed))
    # By hand: of eight rows that share all but answer and completion, and one that shares the rubric.
    assert first < 35 < standard < 100


def test_tokens_are_shared_in_files_longer_than_what_is_looked_at(tmp_path, model, capsys, monkeypatch):
    # Rows are read ahead: their number is no measure of what has been counted.
    monkeypatch.setattr("trl_tract.commands.check._LOOKED_AT", 3)
    code, printed = checked(tmp_path, model, make_rows(9), capsys)
    assert code == 0
    assert "of the tokens, in micro-batches" in printed


def test_distinct_tokens_are_counted_by_hand():
    # Sorted: 5 5 5 1, 5 5 5 2 | 7 7, in batches of two: 4 + 1 of 8 tokens, and 2 of 2.
    sequences = [np.stack([ids, range(len(ids))], axis=1) for ids in ([5, 5, 5, 2], [7, 7], [5, 5, 5, 1])]
    assert distinct_share(sequences, 2) == 0.7


def test_the_prompt_is_shown_whole(tmp_path, model, capsys):
    rows = make_rows(3)
    printed = checked(tmp_path, model, rows, capsys, "--rows", "1")[1]
    assert "\n".join(f"    {line}".rstrip() for line in rows[1]["prompt"].split("\n")) in printed


def test_rows_that_several_people_scored_are_counted(tmp_path, model, capsys):
    rows = [row | {"score": score} for row, score in zip(make_rows(3), ([4, 5], [3], 2), strict=True)]
    assert "1 are the mean of several annotators" in checked(tmp_path, model, rows, capsys)[1]
