"""Several aspects in one completion: found behind their own markers, each on its own grid, trained as the formula says.

The reference writes a row with each score of each aspect, runs the model on it alone in float64, and multiplies the
probabilities of the score's tokens (`test_trie.written_rows`); it knows nothing of tries, branches or grid numbers.
"""

import json
import random
import re
from typing import Any

import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from test_branches import assert_same_gradients, batch_of, gradients, loss_of
from test_trie import written_rows

from trl_tract import ScoreGrid, TRACTConfig
from trl_tract.backends.branches import TreePass
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import locate_scores, read_aspects
from trl_tract.scale.text import ScoreNotFoundError

TOKENIZER = make_tokenizer()
ONE_TO_FIVE = {"marker": "[TONE]"}
HUNDRED = {"marker": "[FACTS]", "values": list(range(101)), "raft_weight": 0.0016}
HALVES = {"marker": "[FACTS]", "values": [i / 2 for i in range(11)], "raft_weight": 0.5}
ASPECTS = {"tone": ONE_TO_FIVE, "facts": HUNDRED}


def some_words(rng: random.Random, most: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def make_rows(aspects: dict[str, Any], n: int = 4, *, seed: int = 0, chat: bool = False) -> list[dict[str, Any]]:
    """Rows of unequal lengths that quote a marker with a score in the prompt; gold scores lie between the grids'."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        parts, scores = [], {}
        for aspect in read_aspects(aspects):
            text = rng.choice(aspect.grid.texts)
            parts.append(f"it {some_words(rng)} {aspect.marker} {text}")
            scores[aspect.name] = (aspect.grid.value_of(text) + rng.choice(aspect.grid.values)) / 2
        prompt, completion = f"judge it. [TONE] 5 {some_words(rng, 9)} ->", " " + "\n".join(parts)
        row: dict[str, Any] = {"prompt": prompt, "completion": completion, "scores": scores}
        if chat:
            row["prompt"] = [{"role": "user", "content": prompt}]
            row["completion"] = [{"role": "assistant", "content": completion.strip()}]
        rows.append(row)
    return rows


def reference_logprobs(model: Any, grid: ScoreGrid, before: str, after: str) -> tuple[int, torch.Tensor]:
    """Where the scores of a grid part between two texts, and the log-probability of each, from a pass for each."""
    start, all_ids, stops = written_rows(TOKENIZER, grid.texts, before, after)
    logprobs = []
    for ids, stop in zip(all_ids, stops, strict=True):
        steps = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        assert steps.dtype == torch.float64
        logprobs.append(sum(steps[t - 1, ids[t]] for t in range(start, stop)))
    return start, torch.stack(logprobs)


def oracle(
    model: Any,
    rows: list[dict[str, Any]],
    aspects: dict[str, Any],
    *,
    rationale_weight: float = 1.0,
    normalize_grid: bool = False,
    score_in_ce: bool = False,
) -> torch.Tensor:
    """The loss of the rows in float64: cross-entropy of the completions, weighted squared errors over all scores."""
    nll, errors = [], []
    for row in rows:
        whole = row["prompt"] + row["completion"]
        ids = TOKENIZER(whole + "<|end|>").input_ids
        is_score = [False] * len(ids)
        for name, aspect in aspects.items():
            grid = ScoreGrid.from_values(aspect.get("values", [1, 2, 3, 4, 5]))
            begin = whole.rindex(aspect["marker"]) + len(aspect["marker"]) + 1
            written = whole[begin:].split("\n")[0]
            after = whole[begin + len(written) :]
            start, logprobs = reference_logprobs(model, grid, whole[:begin], after)
            probs = logprobs.exp()
            expected = (probs * torch.tensor(grid.values, dtype=torch.float64)).sum()
            expected = expected / (probs.sum() if normalize_grid else 1)
            errors.append(aspect.get("raft_weight", 1.0) * (expected - row["scores"][name]) ** 2)
            digits = len(TOKENIZER(written).input_ids)
            is_score[start : start + digits] = [True] * digits
        steps = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for t in range(len(TOKENIZER(row["prompt"]).input_ids), len(ids)):
            if score_in_ce or not is_score[t]:
                nll.append(-steps[t - 1, ids[t]])
    return rationale_weight * torch.stack(nll).mean() + torch.stack(errors).mean()


CASES = {
    "1 to 5 and 0 to 100": (ASPECTS, {}),
    "one token each, grids of unequal length": (
        {"tone": ONE_TO_FIVE, "facts": {"marker": "[FACTS]", "values": [0, 1, 9]}},
        {},
    ),
    "two tries, normalised": (
        {"tone": {"marker": "[TONE]", "values": list(range(1, 11))}, "facts": HALVES},
        {"normalize_grid": True},
    ),
    "three aspects, scores in the cross-entropy": (
        {"tone": ONE_TO_FIVE, "facts": HALVES, "style": {"marker": "Style:", "values": [0, 1]}},
        {"score_in_ce": True, "rationale_weight": 0.5},
    ),
    "the errors alone": ({"tone": ONE_TO_FIVE, "facts": HALVES}, {"rationale_weight": 0.0}),
}


def test_an_aspects_grid_may_be_a_range():
    given = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]", "values": "0..1..0.5"}}
    assert [aspect.grid.texts for aspect in read_aspects(given)] == [("1", "2", "3", "4", "5"), ("0", "0.5", "1")]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_formula(tmp_path, case):
    aspects, settings = CASES[case]
    rows = make_rows(aspects, 2)
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=aspects, **settings)
    loss = loss_of(trainer)
    loss.backward()
    model = make_model().double()
    wanted = oracle(model, rows, aspects, **settings)
    wanted.backward()
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(model))


def test_log_probabilities_and_their_gradients_are_those_of_each_scores_own_grid(tmp_path):
    # The squared error hardly feels an improbable score, and those of several tokens are; logarithms feel it.
    aspects = {"tone": ONE_TO_FIVE, "facts": HALVES}
    rows = make_rows(aspects, 2)
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=aspects, train_sampling_strategy="sequential")
    batch, _ = batch_of(trainer)
    found = trainer.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        score_positions=~batch["score_labels"][:, 1:].isnan(),
        score_aspects=batch["score_aspects"][:, 1:],
    ).score_logprobs
    model = make_model().double()
    wanted = []
    for row in rows:
        whole = row["prompt"] + row["completion"]
        for aspect in read_aspects(aspects):
            begin = whole.rindex(aspect.marker) + len(aspect.marker) + 1
            after = whole[begin + len(whole[begin:].split("\n")[0]) :]
            wanted.append(reference_logprobs(model, aspect.grid, whole[:begin], after)[1])
    padded = torch.nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-torch.inf)
    finite = padded.isfinite()
    assert finite.sum(dim=1).tolist() == [5, 11, 5, 11]
    torch.testing.assert_close(found.detach().double(), padded.detach(), rtol=1e-5, atol=1e-4)
    found[finite].mean().backward()
    padded[finite].mean().backward()
    assert_same_gradients(gradients(trainer.model), gradients(model))


ROW_BY_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
PACKED = {"packing": True, "max_length": 160}
SAME: dict[str, dict[str, Any]] = {
    "row by row": ROW_BY_ROW,
    "packed": PACKED,
    "packed, row by row": {**PACKED, **ROW_BY_ROW},
    "padding-free": {"padding_free": True, "max_length": None},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "tokenised": {},
    "a stream": {},
    "further forward passes": {},
}


def step_gradients(rows: Any, output_dir: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """The gradients of one update of six rows."""
    settings = {"per_device_train_batch_size": 6, "max_steps": 1, **settings}
    trainer = make_trainer(
        output_dir, rows, model=make_model(std=0.1), tokenizer=TOKENIZER, aspects=ASPECTS, **settings
    )
    steps = trainer.args.gradient_accumulation_steps
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), steps, trainer.args.device)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items).backward()
    return gradients(trainer.model)


@pytest.fixture(scope="module")
def six_padded(tmp_path_factory) -> dict[str, torch.Tensor]:
    return step_gradients(make_rows(ASPECTS, 6), tmp_path_factory.mktemp("six"))


@pytest.mark.parametrize("name", SAME)
def test_the_same_rows_give_the_same_update(tmp_path, monkeypatch, six_padded, name):
    rows: Any = Dataset.from_list(make_rows(ASPECTS, 6))
    if name == "tokenised":
        rows = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=ASPECTS).train_dataset
    if name == "a stream":
        rows = rows.to_iterable_dataset()
    if name == "further forward passes":
        monkeypatch.setattr("trl_tract.training.trainer.why_not_one_forward", lambda model: "it was told not to")
    assert_same_gradients(step_gradients(rows, tmp_path, **SAME[name]), six_padded, rtol=1e-5)


def test_only_scores_of_several_tokens_get_branches(tmp_path, monkeypatch):
    seen = []

    class Counted(TreePass):
        def __init__(self, trie: Any, positions: torch.Tensor, config: Any, *, share: bool) -> None:
            seen.append(int(positions.sum()))
            super().__init__(trie, positions, config, share=share)

    monkeypatch.setattr("trl_tract.training.score_head.TreePass", Counted)
    loss_of(make_trainer(tmp_path, make_rows(ASPECTS, 4), tokenizer=TOKENIZER, aspects=ASPECTS))
    assert seen == [4]  # of 8 scores


def test_chat_rows_have_the_scores_of_text_rows(tmp_path):
    trainers = [
        make_trainer(tmp_path, make_rows(ASPECTS, chat=chat), tokenizer=TOKENIZER, aspects=ASPECTS)
        for chat in (False, True)
    ]
    text, chat = (
        [[score for score in row["score_labels"] if score == score] for row in trainer.train_dataset]
        for trainer in trainers
    )
    assert text == chat
    assert all(len(scores) == 2 for scores in chat)


# Rows

TWO = {"tone": ONE_TO_FIVE, "facts": {"marker": "[FACTS]"}}


@pytest.mark.parametrize(
    ("completion", "scores"),
    [
        ("rude. [TONE] 1 true. [FACTS] 4", ["1", "4"]),
        ("the [FACTS] tag is missing. [TONE] 1 true. [FACTS] 4", ["1", "4"]),
        ("rude. [TONE] 1 true, but see [TONE]. [FACTS] 4", ["1", "4"]),
        ("[TONE] 1[FACTS] 4", ["1", "4"]),
        ("a [TONE] mark follows. [TONE] 3\n[FACTS]\n5 because", ["3", "5"]),
    ],
)
def test_each_score_is_found_behind_its_own_marker(completion, scores):
    assert [span.text for span in locate_scores(completion, read_aspects(TWO))] == scores


@pytest.mark.parametrize(
    ("completion", "kind", "message"),
    [
        ("", "empty", "empty"),
        ("rude. [TONE] 1 true.", "no marker", "aspect 'facts': the completion does not hold the marker '[FACTS]'"),
        ("rude. [TONE] 1 true. [FACTS] 7", "not on the grid", "aspect 'facts': '7' follows the marker"),
        ("rude. [TONE] true. [FACTS] 4", "not on the grid", "aspect 'tone'"),
        ("so [FACTS] 5 says. [TONE] 1 true. [FACTS] 4", "two scores", "[FACTS]' with a score twice: '5' and '4'"),
        ("rude. [TONE] 1 true [TONE] 2. [FACTS] 4", "two scores", "[TONE]' with a score twice"),
        ("true. [FACTS] 4 rude. [TONE] 1", "order of aspects", "scores facts, tone, in this order"),
    ],
)
def test_what_leaves_a_score_open_is_refused(completion, kind, message):
    with pytest.raises(ScoreNotFoundError) as error:
        locate_scores(completion, read_aspects(TWO))
    assert error.value.kind == kind
    assert message in str(error.value)


def good_row() -> dict[str, Any]:
    return {
        "prompt": "judge ->",
        "completion": " rude. [TONE] 1 true. [FACTS] 4",
        "scores": {"tone": 1.0, "facts": 4.0},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"tone": 1.0, "facts": None}}, "`scores` has no gold score for aspect 'facts'"),
        (
            {"scores": {"tone": 1.0, "facts": 4.0, "fcats": 2.0}},
            "`scores` names 'fcats', which is not one of the aspects",
        ),
        ({"scores": {"tone": 1.0, "facts": 9.0}}, "aspect 'facts': the score 9 is not between 1 and 5"),
        ({"scores": {"tone": float("nan"), "facts": 4.0}}, "`scores` has no gold score for aspect 'tone'"),
    ],
)
def test_a_row_without_a_usable_score_is_named_or_dropped_and_counted(tmp_path, caplog, change, message):
    rows = [good_row(), {**good_row(), **change}, good_row()]
    with pytest.raises(ValueError, match="1 of 3 train rows refused") as error:
        make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=TWO)
    assert "first: row 1" in str(error.value)
    assert message in str(error.value)
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_tract.training.trainer.logger.warning", lambda text, *rest: warned.append(text))
        trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=TWO, invalid_rows="drop")
    assert len(trainer.train_dataset) == 2
    assert any("1 of 3 train rows refused" in text for text in warned)


@pytest.mark.parametrize("column", [{"score": 3.0, "scores": None}, {"scores": [1.0, 4.0]}])
def test_scores_of_another_kind_are_refused(tmp_path, column):
    with pytest.raises(ValueError, match="mapping"):
        make_trainer(tmp_path, [{**good_row(), **column}], tokenizer=TOKENIZER, aspects=TWO)


@pytest.mark.parametrize("scores", [{"tone": 1.0, "facts": 4.0}, [1.0, 4.0], [4.0]])
def test_several_gold_scores_without_aspects_are_refused(tmp_path, scores):
    with pytest.raises(ValueError, match="`aspects`"):
        make_trainer(tmp_path, [{**good_row(), "scores": scores}], tokenizer=TOKENIZER, score_marker="[FACTS]")


def test_rows_without_scores_have_those_of_their_completions(tmp_path):
    rows = [{name: value for name, value in good_row().items() if name != "scores"}]
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=TWO)
    assert [score for score in trainer.train_dataset[0]["score_labels"] if score == score] == [1.0, 4.0]


def test_several_annotators_of_an_aspect_count_as_their_mean(tmp_path):
    rows = [{**good_row(), "scores": {"tone": [1.0, 2.0], "facts": [4.0]}}]
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=TWO)
    assert [score for score in trainer.train_dataset[0]["score_labels"] if score == score] == [1.5, 4.0]


# Configuration


@pytest.mark.parametrize(
    ("aspects", "message"),
    [
        ({"tone": ONE_TO_FIVE}, "For one score per completion, leave aspects out"),
        ({"tone": ONE_TO_FIVE, "more": {"marker": "[TONE]"}}, "is part of the marker"),
        ({"tone": {"marker": "Score"}, "more": {"marker": "Score 2:"}}, "'Score' of aspect 'tone' is part of"),
        ({"tone": ONE_TO_FIVE, "more": {"values": [1, 2]}}, "aspect 'more' has no marker"),
        ({"tone": ONE_TO_FIVE, "more": {"marker": "[B]", "value": [1, 2]}}, "the unknown field 'value'"),
        ({"tone": ONE_TO_FIVE, "more": {"marker": "[B]", "values": [2, 1]}}, "aspect 'more': score_values"),
        ({"tone": ONE_TO_FIVE, "more": {"marker": "[B]", "raft_weight": -1}}, "raft_weight=-1 must be"),
        ({"tone": ONE_TO_FIVE, "a/b": {"marker": "[B]"}}, "without '/'"),
        (["[TONE]", "[FACTS]"], "is not a mapping"),
        ("{", "aspects is not JSON"),
    ],
)
def test_aspects_that_are_none_are_refused(aspects, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TRACTConfig("out", aspects=aspects)


def test_rationales_of_several_scores_are_left_out_of_the_rows(tmp_path):
    row = {**good_row(), "completion": " rude. [TONE] 1\ntrue, see [TONE]. [FACTS] 4 so"}
    trainer = make_trainer(tmp_path, [row], tokenizer=TOKENIZER, aspects=TWO, drop_rationale=True)
    assert TOKENIZER.decode(trainer.train_dataset[0]["input_ids"]) == "judge -> [TONE] 1\n[FACTS] 4 so<|end|>"
    assert not trainer.judge_config.writes_rationale


def test_the_command_line_and_yaml_give_the_same_aspects(tmp_path):
    from trl import TrlParser

    (tmp_path / "aspects.yaml").write_text("output_dir: out\naspects: " + json.dumps(ASPECTS))
    parsers = [TrlParser([TRACTConfig]) for _ in range(2)]
    (line,) = parsers[0].parse_args_and_config(["--output_dir", "out", "--aspects", json.dumps(ASPECTS)])
    (file,) = parsers[1].parse_args_and_config(["--config", str(tmp_path / "aspects.yaml")])
    assert line.aspects == file.aspects == TRACTConfig("out", aspects=ASPECTS).aspects
    assert line.aspects["facts"]["values"] == list(range(101))


def test_a_configuration_can_be_made_from_its_own_fields():
    once = TRACTConfig("out", aspects={"tone": ONE_TO_FIVE, "facts": {"marker": "[F]", "values": {"no": 0, "yes": 1}}})
    assert TRACTConfig("out", aspects=once.aspects).aspects == once.aspects
    assert once.aspects["facts"]["texts"] == ["no", "yes"]


# What is saved, logged and predicted


def test_the_saved_configuration_is_read_back(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(ASPECTS), tokenizer=TOKENIZER, aspects=ASPECTS)
    trainer.save_model(str(tmp_path))
    config = JudgeConfig.load(tmp_path)
    assert config == trainer.judge_config
    tone, facts = config.scales
    assert (tone.marker, len(tone.grid.token_ids), facts.name, len(facts.grid.paths)) == ("[TONE]", 5, "facts", 101)
    # Behind the first score a newline stands in all rows, and it is what tells 1 from 10 there.
    assert (tone.format.start, facts.format.start, facts.raft_weight) == (" ", "\n", 0.0016)


def test_metrics_come_by_aspect_and_mix_no_units(tmp_path):
    rows = make_rows(ASPECTS, 5, seed=3)
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=ASPECTS, eval_dataset=rows)
    metrics = trainer.evaluate()
    output = trainer.predict(Dataset.from_list(rows))
    assert output.predictions.shape == (5, 2)
    assert output.label_ids.tolist() == [[row["scores"]["tone"], row["scores"]["facts"]] for row in rows]
    alone = trainer.predict(Dataset.from_list(rows[3:4])).predictions[0]
    assert output.predictions[3] == pytest.approx(alone, rel=1e-4)
    errors = abs(output.predictions - output.label_ids).mean(axis=0)
    assert metrics["eval_score/mae/tone"] == pytest.approx(errors[0], rel=1e-5)
    assert metrics["eval_score/mae/facts"] == pytest.approx(errors[1], rel=1e-5)
    assert {"eval_score/pearson/tone", "eval_score/rmse/facts", "eval_score/grid_mass/facts"} <= metrics.keys()
    assert not {"eval_score/mae", "eval_score/pearson", "eval_score/expected"} & metrics.keys()


def test_a_wide_aspect_without_a_weight_of_its_own_is_warned_about(tmp_path):
    heavy = {**ASPECTS, "facts": {"marker": "[FACTS]", "values": list(range(101))}}
    trainer = make_trainer(tmp_path, make_rows(heavy), tokenizer=TOKENIZER, aspects=heavy)
    said = [message for message in trainer._early_warnings.at_start() if "span" in message]
    assert len(said) == 1
    assert said[0].startswith("aspect 'facts': score_values span 100")
    assert said[0].endswith("raft_weight=0.0016 gives it the same weight")


def test_a_micro_batch_without_scores_of_several_tokens_trains(tmp_path):
    # A tokenised row may have no score; its branches are then none.
    grid = [i / 2 for i in range(21)]
    rows = [{"prompt": "judge ->", "completion": " so. [RESULT] 2.5", "score": 2.5}]
    first = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, score_values=grid)
    row = first.train_dataset[0]
    both = Dataset.from_list([row, {**row, "score_labels": [float("nan")] * len(row["score_labels"])}])
    trainer = make_trainer(tmp_path, both, tokenizer=TOKENIZER, score_values=grid, per_device_train_batch_size=1)
    trainer.train_dataset = trainer.train_dataset.select([1])
    batch, num_items = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items).isfinite()
