"""Grids of several tokens: how they are found, and that the walk's probabilities are those of one forward per score.

The reference knows nothing of tries. It writes a row with each score, tokenises it, runs the model on it alone, and
multiplies the probabilities of the tokens that the score's characters are in.
"""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_merging_tokenizer, make_model, make_tokenizer, resolved, unresolved
from test_score_location import locate
from trl import TrlParser

from trl_tract import CoTRAILJudge, ScoreGrid, TRACTConfig, TransformersBackend
from trl_tract.backends import ScriptedBackend
from trl_tract.commands.parsing import parse
from trl_tract.rows.encoding import RowEncoder, TokenisedRowEncoder
from trl_tract.rows.tokens import prefix_ids, resolve_from_ids
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.decisions import decide
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.scale.trie import TokenTrie, walk_trie
from trl_tract.training.early_warnings import EarlyWarnings

MARKER = "[RESULT]"
PROMPT, RATIONALE = "is this polite? ->", " it is short"
HALVES = [i / 2 for i in range(21)]
WORDS = {"poor": 1.0, "fair": 2.0, "good": 3.0, "very good": 4.0, "excellent": 6.5}
GRIDS: dict[str, ScoreGrid] = {
    "1 to 10": ScoreGrid.from_values(range(1, 11)),
    "0 to 100": ScoreGrid.from_values(range(101)),
    "half points to 10": ScoreGrid.from_values(HALVES),
    "below and above zero": ScoreGrid.from_values([-1, -0.5, 0, 0.5, 1]),
    "letters": ScoreGrid.from_values({"A": 4, "A-": 3.7, "B+": 3.3, "B": 3, "F": 0}),
    "words": ScoreGrid.from_values(WORDS),
}
VOCABULARIES = ["splitting", "merging", "mistral"]


def row_with(text: str) -> dict[str, str]:
    return {"prompt": PROMPT, "completion": f"{RATIONALE} {MARKER} {text}"}


BEFORE = f"{PROMPT}{RATIONALE} {MARKER} "


def written_rows(
    tokenizer: Any, texts: tuple[str, ...], before: str = BEFORE, after: str = ""
) -> tuple[int, list[list[int]], list[int]]:
    """Where the rows of all scores part, the token ids of each, and one past the last token that tells each score."""
    after += tokenizer.eos_token
    whole = [tokenizer(before + text + after, return_offsets_mapping=True) for text in texts]
    ids = [encoded["input_ids"] for encoded in whole]
    spans = [
        [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < len(before + text) and b > len(before)]
        for encoded, text in zip(whole, texts, strict=True)
    ]
    start = min(
        sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*ids, strict=False))),
        *(span[0] for span in spans),
    )
    stops = [span[-1] + 1 for span in spans]
    for k, stop in enumerate(stops):
        written = ids[k][start:stop]
        if any(j != k and ids[j][start : stops[j]][: len(written)] == written for j in range(len(texts))):
            stops[k] += 1  # the score is the beginning of another: the end of the text tells them apart
    return start, ids, stops


def reference(model: Any, tokenizer: Any, texts: tuple[str, ...]) -> np.ndarray:
    """Probability of each score, `(K,)`, from one forward pass a score."""
    start, ids, stops = written_rows(tokenizer, texts)
    probs = []
    for row, stop in zip(ids, stops, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        probs.append(sum(logprobs[t - 1, row[t]] for t in range(start, stop)).exp().item())
    return np.array(probs)


def off_grid_mass(model: Any, prefix: list[int], trie: TokenTrie) -> float:
    """Probability of leaving the trie anywhere, from the whole vocabulary behind each of its nodes."""
    lost = 0.0
    for number, node in enumerate(trie.nodes):
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prefix, *node]])).logits[0].double().log_softmax(-1)
        reached = sum(float(logprobs[len(prefix) - 1 + at, token]) for at, token in enumerate(node))
        inside = [trie.edges[edge][1] for edge in trie.edges_of[number]]
        lost += math.exp(reached) * (1 - float(logprobs[-1].exp()[inside].sum()))
    return lost


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_walked_probabilities_are_those_of_one_forward_per_score(vocabularies, vocabulary, name):
    tokenizer, texts = vocabularies[vocabulary], GRIDS[name].texts
    model = make_model(vocab=len(tokenizer))
    scale = resolved(tokenizer, row_with(texts[-1]), GRIDS[name])
    grid = scale.grid
    if not grid.paths:  # every score is one token for this vocabulary, which is another test's concern
        assert (vocabulary, name) in {("merging", "1 to 10"), ("mistral", "words")}
        return
    prefix = prefix_ids(tokenizer, PROMPT, [scale], [], RATIONALE)
    asks = TransformersBackend(model, tokenizer).next_token_logprobs
    found = walk_trie(grid.trie, [prefix], asks, grid.values, least_share=0)
    wanted = reference(model, tokenizer, texts)
    np.testing.assert_allclose(found.probs[0], wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.log(found.probs[0]), np.log(wanted), atol=1e-4)  # what shows in an improbable score
    assert found.probs.sum() + off_grid_mass(model, prefix, grid.trie) == pytest.approx(1, abs=1e-6)
    assert found.error_bound[0] == found.pruned_mass[0] == 0


def test_what_is_pruned_is_within_the_bound(vocabularies):
    tokenizer = vocabularies["splitting"]
    scale = resolved(tokenizer, row_with("7"), GRIDS["0 to 100"])
    grid = scale.grid
    prefix = prefix_ids(tokenizer, PROMPT, [scale], [], RATIONALE)
    asks = TransformersBackend(make_model(std=0.8), tokenizer).next_token_logprobs
    whole, pruned = (walk_trie(grid.trie, [prefix], asks, grid.values, least_share=share) for share in (0, 0.05))
    missing = float((whole.probs[0] - pruned.probs[0]) @ np.array(grid.values))
    assert 0 < missing <= pruned.error_bound[0] <= 100 * pruned.pruned_mass[0]
    kept = pruned.probs > 0
    np.testing.assert_allclose(pruned.probs[kept], whole.probs[kept], rtol=1e-4)


def test_a_judge_reports_what_it_did_not_follow(vocabularies):
    # Every token has probability 1e-8, but for "1" at the root and the end behind it.
    tokenizer = vocabularies["splitting"]
    one, end = tokenizer.convert_tokens_to_ids(["1", "<|end|>"])

    class Asked(ScriptedBackend):
        def next_token_logprobs(self, token_id_lists, token_ids):
            likely = [end if row[-1] == one else one for row in token_id_lists]
            return np.log([[0.9 if token == wanted else 1e-8 for token in token_ids] for wanted in likely])

    backend = Asked(lambda prompt, seed: " fine [RESULT]", tokenizer)
    (judgement,) = CoTRAILJudge(backend, score_values=range(101)).judge(["a prompt"])
    # Followed: "1", its end, and 11 to 19. Not: "2" to "9" with 1e-8 each, and "10" with 0.9e-8. "0" is a leaf.
    pruned = 8 * 1e-8 + 0.9e-8
    bound = sum(1e-8 * (10 * tens + 9) for tens in range(2, 10)) + 0.9e-8 * 100
    assert judgement.score == pytest.approx(0.9 * 0.9 + 0.9e-8 * sum(range(11, 20)), rel=1e-9)
    assert judgement.pruned_mass == pytest.approx(pruned)
    assert judgement.error_bound == pytest.approx(bound)


def test_a_judge_of_several_tokens_gives_the_references_expected_score(vocabularies):
    tokenizer, model = vocabularies["splitting"], make_model()
    judge = CoTRAILJudge(TransformersBackend(model, tokenizer), score_values=range(1, 11))
    probs = judge.score_rationales([PROMPT], [RATIONALE])
    np.testing.assert_allclose(probs[0], reference(model, tokenizer, judge.grid.texts), rtol=1e-4)


@pytest.mark.parametrize("name", ["0 to 100", "half points to 10", "words"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_a_transformers_backend_asks_for_whole_scores_at_once(vocabularies, family, name):
    # Rows of unequal lengths, padded on the left, against the walk.
    tokenizer = vocabularies["splitting"]
    backend = TransformersBackend(make_model(family), tokenizer)
    scale = resolved(tokenizer, row_with(GRIDS[name].texts[-1]), GRIDS[name])
    grid = scale.grid
    rationales = [RATIONALE, " short", " it says why 2 of 4 points hold and it is wrong"]
    prefixes = [prefix_ids(tokenizer, PROMPT, [scale], [], rationale) for rationale in rationales]
    found = np.exp(backend.trie_logprobs(prefixes, grid.trie))
    wanted = walk_trie(grid.trie, prefixes, backend.next_token_logprobs, grid.values, least_share=0).probs
    np.testing.assert_allclose(np.log(found), np.log(wanted), atol=1e-4)


def test_a_model_without_branches_is_walked(vocabularies):
    tokenizer, model = vocabularies["splitting"], make_model()
    backend = TransformersBackend(model, tokenizer)
    backend._takes_branches = False
    judge = CoTRAILJudge(backend, score_values=range(1, 11))
    probs = judge.score_rationales([PROMPT], [RATIONALE])
    np.testing.assert_allclose(probs[0], reference(model, tokenizer, judge.grid.texts), rtol=1e-4)


def test_a_prefix_without_room_has_no_probabilities(vocabularies):
    tokenizer = vocabularies["splitting"]
    judge = CoTRAILJudge(TransformersBackend(make_model(), tokenizer), score_values=range(1, 11))
    probs = judge.score_rationales([PROMPT, PROMPT], ["word " * 600, RATIONALE])
    assert np.isnan(probs).any(axis=1).tolist() == [True, False]


def test_single_tokens_are_asked_for_in_one_call(vocabularies):
    backend = ScriptedBackend(lambda prompt, seed: " fine [RESULT]", vocabularies["splitting"], probs=[0.2] * 5)
    (judgement,) = CoTRAILJudge(backend).judge(["a"])
    assert len(backend.logprob_calls) == 1
    assert judgement.error_bound == judgement.pruned_mass == 0


@pytest.mark.parametrize(("rule", "wanted"), [("median", 50.0), ("mode", 100.0), ("mean", 58.0)])
def test_decisions_hold_on_any_grid(rule, wanted):
    # 0.4 on 20, 0.1 on 50, 0.45 * 100 = 45, 0.05 * 0: mean 8 + 5 + 45 = 58.
    probs = torch.zeros(101)
    probs[[0, 20, 50, 100]] = torch.tensor([0.05, 0.4, 0.1, 0.45])
    assert decide(probs, torch.arange(101.0), rule).item() == pytest.approx(wanted)


# The trie itself


def test_a_score_that_begins_another_one_is_told_by_its_end(vocabularies):
    tokenizer = vocabularies["splitting"]
    grid = resolved(tokenizer, row_with("10"), GRIDS["1 to 10"]).grid
    tokens = [tokenizer.convert_ids_to_tokens(list(path.token_ids)) for path in grid.paths]
    assert tokens == [["1", "<|end|>"], *([str(digit)] for digit in range(2, 10)), ["1", "0"]]
    assert [path.end for path in grid.paths] == [1, *[0] * 9]


def test_a_space_that_is_glued_to_some_scores_belongs_to_all(vocabularies):
    # " -1" is "Ġ-" and "1"; " 1" is "Ġ" and "1": the scores part at the space.
    tokenizer = vocabularies["splitting"]
    grid = resolved(tokenizer, row_with("1"), ScoreGrid.from_values([-1, 0, 1])).grid
    tokens = [tokenizer.convert_ids_to_tokens(list(path.token_ids)) for path in grid.paths]
    assert tokens in (
        [["Ġ", "-", "1"], ["Ġ", "0"], ["Ġ", "1"]],
        [["-", "1"], ["0"], ["1"]],
        [["Ġ-", "1"], ["Ġ", "0"], ["Ġ", "1"]],
    )


def test_a_score_without_an_end_is_an_error():
    grid = ScoreGrid.from_values([1, 10])
    with pytest.raises(ValueError, match="score '1'"):
        grid.resolve(make_tokenizer(), "fine [RESULT] ", "")


def test_paths_that_are_beginnings_of_others_are_no_trie():
    with pytest.raises(ValueError, match="not prefix-free"):
        TokenTrie.from_paths([(1,), (1, 2)])


def test_many_tokens_behind_many_nodes_are_asked_for_in_calls_of_at_most_128():
    trie = TokenTrie.from_paths([(a, 1000 + 100 * a + b) for a in range(4) for b in range(60)])
    calls = []

    def asks(rows, tokens):
        calls.append((len(rows), len(tokens)))
        return np.log(np.full((len(rows), len(tokens)), 1e-3))

    walk_trie(trie, [[5], [6]], asks, range(240))
    assert calls == [(2, 4), (4, 120), (4, 120)]


# Rows


def encoded(tokenizer: Any, grid: ScoreGrid, row: dict[str, Any], **settings: Any) -> dict[str, Any]:
    scale = resolved(tokenizer, row_with(grid.texts[0]), grid)
    return RowEncoder((scale,), tokenizer=tokenizer, **{"max_length": None, **settings})(row)


@pytest.mark.parametrize("score_in_ce", [False, True])
def test_all_tokens_of_a_score_are_in_the_cross_entropy_or_none(vocabularies, score_in_ce):
    tokenizer = vocabularies["splitting"]
    found = encoded(tokenizer, GRIDS["half points to 10"], row_with("2.5"), score_in_ce=score_in_ce)
    ids, labels = found["input_ids"], found["labels"]
    assert tokenizer.convert_ids_to_tokens(ids[-4:]) == ["2", ".", "5", "<|end|>"]
    assert labels[-4:] == (ids[-4:] if score_in_ce else [-100, -100, -100, ids[-1]])
    assert [i for i, score in enumerate(found["score_labels"]) if score == score] == [len(ids) - 4]


@pytest.mark.parametrize("given", [{}, {"score": "good"}, {"score": ["fair", 4]}, {"score": 3.0}])
def test_words_are_gold_scores_by_their_values(vocabularies, given):
    found = encoded(vocabularies["splitting"], GRIDS["words"], row_with("good") | given)
    assert [score for score in found["score_labels"] if score == score] == [3.0]


def test_a_gold_score_between_the_grids_values_stays_as_it_is(vocabularies):
    found = encoded(vocabularies["splitting"], GRIDS["0 to 100"], row_with("67") | {"score": 66.7})
    assert [score for score in found["score_labels"] if score == score] == [66.7]


def test_a_score_that_is_cut_in_two_is_cut_off(vocabularies):
    row = row_with("100")
    length = len(encoded(vocabularies["splitting"], GRIDS["0 to 100"], row)["input_ids"])
    kinds = [
        encoded(vocabularies["splitting"], GRIDS["0 to 100"], row, max_length=length - cut)["refusal_kind"]
        for cut in (1, 2)
    ]
    assert kinds == ["", "cut off"]


def test_a_score_that_begins_another_has_the_same_end_in_all_rows(vocabularies):
    found = encoded(vocabularies["splitting"], GRIDS["1 to 10"], row_with("1, and that is all."))
    assert found["refusal_kind"] == "other end"
    assert "Write the same text after every score" in found["refusal"]
    assert not encoded(vocabularies["splitting"], GRIDS["1 to 10"], row_with("2, and that is all."))["refusal_kind"]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_tokenised_row_tells_the_paths_that_its_text_tells(vocabularies, vocabulary, name):
    tokenizer = vocabularies[vocabulary]
    for text in GRIDS[name].texts[-2:]:
        scale = resolved(tokenizer, row_with(text), GRIDS[name])
        grid = scale.grid
        form = scale.format
        row = encoded(tokenizer, GRIDS[name], row_with(text))
        (at,) = [i for i, score in enumerate(row["score_labels"]) if score == score]
        told = resolve_from_ids(tokenizer, row["input_ids"], at, unresolved(GRIDS[name]))
        found, found_form = told.grid, told.format
        assert (found.token_ids, found.paths) == (grid.token_ids, grid.paths)
        assert (found_form.lead, found_form.separator) == (form.lead, form.separator)
        assert not TokenisedRowEncoder((told,), None, tokenizer=tokenizer)(row)["refusal_kind"]


def test_a_tokenised_row_in_another_spelling_is_refused(vocabularies):
    # " 10" is one token for this vocabulary; "Ġ" "1" "0" reads the same.
    tokenizer = vocabularies["merging"]
    ids = [*tokenizer(f"{RATIONALE} {MARKER}").input_ids, *tokenizer.convert_tokens_to_ids(["Ġ", "1", "0"]), 0]
    with pytest.raises(ScoreNotFoundError, match="does not write the score '10' as 'Ġ'"):
        resolve_from_ids(tokenizer, ids, len(ids) - 4, unresolved(GRIDS["half points to 10"]))


@pytest.mark.parametrize(
    ("completion", "texts", "wanted"),
    [
        ("fine [RESULT] 10", ["1", "10"], "10"),
        ("fine [RESULT] 1", ["1", "10"], "1"),
        ("fine [RESULT] 2.5", ["2", "2.5"], "2.5"),
        ("fine [RESULT] 2.", ["2", "2.5"], "2"),
        ("fine [RESULT] very good", ["good", "very good", "very"], "very good"),
        ("fine [RESULT] A-", ["A", "A-"], "A-"),
        ("fine [RESULT] A.", ["A", "A-"], "A"),
    ],
)
def test_the_longest_score_that_stands_there_is_found(completion, texts, wanted):
    assert locate(completion, ScoreGrid.from_values(range(len(texts)), texts)).text == wanted


@pytest.mark.parametrize(
    ("completion", "texts", "kind"),
    [
        ("fine [RESULT] poorly", ["poor", "good"], "not on the grid"),
        ("fine [RESULT] A+", ["A", "B"], "not on the grid"),
        ("fine [RESULT] poor-ish", ["poor", "good"], "not on the grid"),
        ("fine [RESULT] 85/100", ["85", "100"], "not on the grid"),
        ("fine [RESULT] good or poor", ["poor", "good"], "two scores"),
        ("fine [RESULT] 10 or 1", ["1", "10"], "two scores"),
        ("fine [RESULT] good. [RESULT] poor", ["poor", "good"], "two scores"),
    ],
)
def test_what_only_looks_like_a_score_is_refused(completion, texts, kind):
    with pytest.raises(ScoreNotFoundError) as caught:
        locate(completion, ScoreGrid.from_values(range(len(texts)), texts))
    assert caught.value.kind == kind


# Settings


def test_texts_come_as_a_mapping_or_beside_the_values(tmp_path):
    one = TRACTConfig(str(tmp_path), score_values=dict(reversed(WORDS.items())))
    two = TRACTConfig(str(tmp_path), score_values=list(WORDS.values()), score_texts=list(WORDS))
    assert (one.score_values, one.score_texts) == (two.score_values, two.score_texts) == ([*WORDS.values()], [*WORDS])


def test_yaml_and_the_command_line_give_texts(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path}\nscore_values: {{excellent: 5, poor: 1}}\n")
    (args,) = TrlParser(TRACTConfig).parse_args_and_config(["--config", str(config)])
    assert (args.score_values, args.score_texts) == ([1.0, 5.0], ["poor", "excellent"])
    flags = ["--output_dir", str(tmp_path), "--score_values", "1", "2.5", "--score_texts", "no", "very much"]
    (args,) = TrlParser(TRACTConfig).parse_args_and_config(flags)
    assert (args.score_values, args.score_texts) == ([1.0, 2.5], ["no", "very much"])


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        ("0..100", [str(number) for number in range(101)]),
        (["0..10"], [str(number) for number in range(11)]),
        ([0, "2..4", 10], ["0", "2", "3", "4", "10"]),
        ("-1..1..0.5", ["-1", "-0.5", "0", "0.5", "1"]),
        ("0..1..0.1", ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        (" 1.5..3.5 ", ["1.5", "2.5", "3.5"]),
    ],
)
def test_a_range_has_both_its_ends(written, texts):
    assert ScoreGrid.from_values(written).texts == tuple(texts)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("0..10..0.3", r"score_values=0\.\.10\.\.0\.3: steps of 0.3 do not lead from 0 to 10"),
        ("5..1", "steps of 1 do not lead from 5 to 1"),
        ("0..10..0", "steps of 0 do not lead from 0 to 10"),
        ("0..1000000", "do not lead from 0 to 1000000 in 10,001 scores or fewer"),
    ],
)
def test_steps_that_miss_the_end_of_a_range_are_named(written, wanted):
    with pytest.raises(ValueError, match=wanted):
        ScoreGrid.from_values(written)


@pytest.mark.parametrize("written", ["0..10..-1", "..5", "0...5", "a..b", "5"])
def test_what_is_no_range_is_refused(written):
    with pytest.raises(ValueError, match=r"0\.\.100"):
        ScoreGrid.from_values(written)


def test_a_range_of_one_score_is_no_grid():
    with pytest.raises(ValueError, match=r"score_values=3\.\.3"):
        ScoreGrid.from_values("3..3")


def test_a_range_on_the_command_line_may_begin_below_zero(tmp_path):
    (args,) = parse("train", [TRACTConfig], ["--output_dir", str(tmp_path), "--score_values", "-2..2"])
    assert args.score_values == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize("in_yaml", ["0..10..0.5", "[0..10..0.5]", None])
def test_yaml_and_the_command_line_give_ranges(tmp_path, in_yaml):
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path}\n" + (f"score_values: {in_yaml}\n" if in_yaml else ""))
    flags = [] if in_yaml else ["--score_values", "0..10..0.5"]
    (args,) = parse("train", [TRACTConfig], ["--config", str(config), *flags])
    assert args.score_values == [number / 2 for number in range(21)]


@pytest.mark.parametrize(
    ("values", "texts", "message"),
    [
        ([1, 2, 3], ["a", "b"], "score_texts has 2 entries, but score_values has 3"),
        ([1, 2], ["a", "a"], "must be distinct"),
        ([1, 2], ["a", " b"], "must be distinct and not empty"),
        ({"a": 1, "b": 2}, ["a", "b"], "the score texts are given twice"),
        ({"a": 1, "b": 1}, None, "must increase"),
    ],
)
def test_texts_that_do_not_fit_the_values_are_refused(values, texts, message):
    with pytest.raises(ValueError, match=message):
        ScoreGrid.from_values(values, texts)


def test_a_judge_is_loaded_with_the_paths_it_was_trained_with(tmp_path, vocabularies):
    tokenizer = vocabularies["splitting"]
    row = row_with("10") | {"completion": f"{RATIONALE} {MARKER} 10\n"}
    scale = resolved(tokenizer, row, GRIDS["1 to 10"])
    grid = scale.grid
    JudgeConfig((scale,)).save(tmp_path)
    judge = CoTRAILJudge.from_pretrained(tmp_path, TransformersBackend(make_model(), tokenizer))
    assert judge.grid == grid
    judge.score_rationales([PROMPT], [RATIONALE])
    assert judge.grid.paths[0].token_ids[1:] == tuple(tokenizer("\n").input_ids)  # the end that was trained on


def test_another_tokenizer_than_in_training_is_refused(tmp_path, vocabularies):
    scale = resolved(vocabularies["splitting"], row_with("10"), GRIDS["0 to 100"])
    JudgeConfig((scale,)).save(tmp_path)
    other = TransformersBackend(make_model(), make_merging_tokenizer([("1", "0")]))
    with pytest.raises(ValueError, match="tokenizer"):
        CoTRAILJudge.from_pretrained(tmp_path, other).score_rationales([PROMPT], [RATIONALE])


# The page

PAGE = (Path(__file__).parents[1] / "docs" / "score_scales.md").read_text(encoding="utf-8")


def test_the_pages_code_prints_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code, *_), (printed, *_) = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S) for kind in ("python", "text"))
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_a_wide_range_is_warned_about_with_the_weight_that_is_right(tmp_path):
    # (100 / 4)^2 = 625, 1 / 625 = 0.0016.
    wide = TRACTConfig(str(tmp_path), score_values=list(range(101)))
    (message,) = EarlyWarnings(wide).at_start()
    assert message.endswith("relative to the rationale. raft_weight=0.0016 gives it the same weight")
    assert "weighs 625 times" in message
    right = TRACTConfig(str(tmp_path), score_values=list(range(101)), raft_weight=0.0016)
    assert EarlyWarnings(right).at_start() == []
