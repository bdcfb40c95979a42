"""CoTRAILJudge: rationale, then expected score; an item without one is an error, never a guess."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, make_trainer, save_seed

from trl_tract import CoTRAILJudge, TransformersBackend
from trl_tract.backends import ScriptedBackend
from trl_tract.backends.base import Generation
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.rows.rendering import with_completion
from trl_tract.rows.tokens import resolve_scales
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.decisions import decide, temper
from trl_tract.scale.scale import read_scales
from trl_tract.scale.text import CompletionFormat

TOKENIZER = make_tokenizer()
PROBS = [0.1, 0.0, 0.2, 0.6, 0.05]


def judge(text: str = " fine [RESULT] 1", probs=PROBS, **settings) -> CoTRAILJudge:
    return CoTRAILJudge(ScriptedBackend(lambda prompt, seed: text, TOKENIZER, probs=probs), **settings)


def test_the_score_is_the_expected_score_and_not_the_written_one():
    # 0.1 * 1 + 0.2 * 3 + 0.6 * 4 + 0.05 * 5 = 3.35, whatever digit the model wrote behind its marker.
    (judgement,) = judge().judge(["a prompt"])
    assert judgement.score == pytest.approx(3.35)
    assert judgement.grid_mass == pytest.approx(0.95)
    assert judgement.rationales == [" fine"]
    assert judgement.error is None


class Plain:
    """A double as users wrote it before backends could score whole tries, be cancelled or tell what they are."""

    name, model_id, max_calls, tokenizer = "plain", "plain", 1, TOKENIZER

    def generate(self, prompts, *, n=1, **settings):
        return [[Generation(" fine ", "stop", 3)] * n for _ in prompts]

    def next_token_logprobs(self, token_id_lists, token_ids):
        return np.full((len(token_id_lists), len(token_ids)), -math.log(10))  # of ten digits each is as likely


def test_a_backend_that_scores_token_by_token_alone_scores_numbers_of_several_digits():
    (judgement,) = CoTRAILJudge(Plain(), score_values="10..19").judge(["a"])
    assert judgement.probs == pytest.approx(np.full((1, 10), 0.01))


def test_what_cannot_have_an_effect_on_a_judge_without_rationales_is_told_of(caplog):
    judge(writes_rationale=False, seed=1, decision="sampled")
    assert not caplog.records
    judge(writes_rationale=False, temperature=0.5, max_attempts=2, append_marker=True)
    assert caplog.messages == [
        "this judge writes no rationales, so temperature, max_attempts, append_marker cannot have an effect"
    ]


def test_normalised_scores_divide_by_the_mass_on_the_grid():
    assert judge(normalize_grid=True).judge(["a"])[0].score == pytest.approx(3.35 / 0.95)


def test_the_spread_is_that_of_the_distribution_on_the_grid():
    # Half on 1, half on 5: the standard deviation is 2.
    assert judge(probs=[0.4, 0, 0, 0, 0.4]).judge(["a"])[0].std == pytest.approx(2.0)


def test_several_rationales_are_averaged():
    seen = {}

    def probs(ids: list[int]) -> list[float]:
        # 1 for the first rationale that comes, 5 for the second.
        place = seen.setdefault(tuple(ids), len(seen))
        return [1.0, 0, 0, 0, 0] if place == 0 else [0, 0, 0, 0, 1.0]

    backend = ScriptedBackend(lambda prompt, seed: f" words {seed % 2} [RESULT]", TOKENIZER, probs=probs)
    (judgement,) = CoTRAILJudge(backend, num_generations=2).judge(["a"])
    assert sorted(judgement.scores) == [1.0, 5.0]
    assert judgement.score == 3.0
    assert judgement.probs.shape == (2, 5)


def test_an_item_that_never_reaches_its_marker_is_an_error_on_that_item_alone():
    texts = {"good": " fine [RESULT]", "bad": " I had rather not"}
    backend = ScriptedBackend(texts, TOKENIZER, probs=PROBS)
    good, bad = CoTRAILJudge(backend).judge(["good", "bad"])
    assert good.error is None
    assert math.isnan(bad.score)
    assert bad.error == "no rationale reached '[RESULT]' in 3 attempts: the model ended its turn"


def test_messages_for_a_judge_of_plain_text_are_an_error_on_that_item_alone():
    instance = judge(" short [RESULT] 4")
    instance.chat = False
    judgements = instance.judge([[{"role": "user", "content": "a"}], "a"])
    assert [judgement.error is None for judgement in judgements] == [False, True]


def test_a_prompt_that_is_too_long_is_an_error_on_that_item_alone():
    backend = ScriptedBackend(lambda prompt, seed: " fine [RESULT]", TOKENIZER, probs=PROBS, context_length=30)
    short, long = CoTRAILJudge(backend).judge(["short", "long " * 40])
    assert short.error is None
    assert "context window" in long.error


def test_a_rationale_that_fills_the_context_is_an_error_and_no_score():
    # Backends report NaN for ids that do not fit the context window.
    (judgement,) = judge(probs=lambda ids: [math.nan] * 5).judge(["a"])
    assert math.isnan(judgement.score)
    assert judgement.error == "prompt and rationale leave no room in the model's context window"


def test_a_prompt_that_the_template_refuses_is_an_error_on_that_item_alone():
    tokenizer = make_tokenizer()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    backend = ScriptedBackend(lambda prompt, seed: "fine [RESULT]", tokenizer, probs=PROBS)
    ask = {"role": "user", "content": "a"}
    progress: list[int] = []
    rows = [{"prompt": [{"role": "system", "content": "b"}, ask]}, {"prompt": [ask]}]
    refused, judged = CoTRAILJudge(backend).judge(rows, on_progress=progress.append)
    assert "no system" in refused.error
    assert judged.score == pytest.approx(3.35)
    assert progress == [1, 1]


MENTION = " i end with [RESULT] and a score. it is short [RESULT] 4"


def test_a_mention_of_the_marker_ends_no_rationale():
    instance = judge(MENTION)
    (judgement,) = instance.judge(["a prompt"])
    assert judgement.rationales == [" i end with [RESULT] and a score. it is short"]
    (asked,) = instance.backend.logprob_calls[-1]
    assert TOKENIZER.decode(asked) == f"a prompt{MENTION[:-1]}"


@pytest.mark.parametrize("text", [" i end with [RESULT] and a score", "<think> so [RESULT] 4 is fine"])
def test_a_marker_that_no_score_follows_or_within_a_thought_is_an_error(text):
    (judgement,) = judge(text).judge(["a"])
    assert math.isnan(judgement.score)
    assert "[RESULT]" in judgement.error


def test_half_a_character_is_an_error_of_its_item():
    class Cut(ScriptedBackend):
        def generate(self, prompts, **settings):
            written = super().generate(prompts, **settings)
            return [[replace(written[0][0], text=" cut \ud83d")], *written[1:]]

    backend = Cut(lambda prompt, seed: " fine [RESULT] 4", TOKENIZER, probs=PROBS)
    assert [judgement.error is None for judgement in CoTRAILJudge(backend).judge(["a", "b"])] == [False, True]


@pytest.mark.parametrize("thought", ["i end with [RESULT].", "so [RESULT] 2"])
def test_a_thought_may_name_the_marker_before_it_ends(thought):
    (judgement,) = judge(f"<think> {thought} </think> so [RESULT] 4").judge(["a"])
    assert judgement.rationales == [f"<think> {thought} </think> so"]


def test_an_engine_that_stops_within_a_thought_gives_no_score():
    class Foreign(ScriptedBackend):
        """Knows a stop text as characters alone."""

        def generate(self, prompts, *, stop=None, **settings):
            return super().generate(prompts, stop=str(stop), **settings)

    backend = Foreign(lambda prompt, seed: "<think> so [RESULT] 4 </think> [RESULT] 5", TOKENIZER, probs=PROBS)
    assert "thinking" in CoTRAILJudge(backend).judge(["a"])[0].error


def test_a_trained_judge_goes_on_past_a_mention(tmp_path):
    # Every row names the marker first; a model that knows the rows by heart is judged on the whole rationale.
    rows = [
        {"prompt": f"{word} ->", "completion": f" i end with [RESULT] and a score. it is {word} [RESULT] {score}"}
        for word, score in (("short", 2), ("long", 4))
    ]
    trainer = make_trainer(
        tmp_path, rows * 4, tokenizer=TOKENIZER, learning_rate=1e-2, optim="adamw_torch", max_steps=60, score_in_ce=True
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "judge"))
    backend = TransformersBackend(trainer.model, TOKENIZER)
    judged = CoTRAILJudge.from_pretrained(tmp_path / "judge", backend, temperature=0.0, max_new_tokens=60).judge(rows)
    assert [one.rationales[0] for one in judged] == [row["completion"].rsplit(" [RESULT]", 1)[0] for row in rows]
    assert min(one.grid_mass for one in judged) > 0.9


def test_progress_counts_an_item_when_it_is_scored():
    seen: list[Any] = []
    backend = ScriptedBackend(
        lambda prompt, seed: " fine [RESULT]", TOKENIZER, probs=lambda ids: (seen.append("score"), PROBS)[1]
    )
    CoTRAILJudge(backend).judge(["a", "b", "c", "d"], on_progress=seen.append)
    # Half of the work is done when all rationales are written.
    assert seen == [1, 1, *["score"] * 4, 2]


def test_a_bar_is_shown_where_someone_watches_and_not_elsewhere(monkeypatch, capsys):
    # Whoever imported ipykernel before.
    monkeypatch.setattr("trl_tract.text.progress.is_watched", lambda: False)
    judge(" fine [RESULT]").judge(["a", "b"])
    assert not capsys.readouterr().err
    monkeypatch.setattr("trl_tract.text.progress.is_watched", lambda: True)
    judge(" fine [RESULT]").judge(["a", "b"])
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("probs", [[0.0] * 5, [0.5] * 5])
def test_probabilities_that_cannot_be_are_no_score(probs):
    class Lying(ScriptedBackend):
        def next_token_logprobs(self, token_id_lists, token_ids):
            with np.errstate(divide="ignore"):
                return np.log(np.array([probs] * len(token_id_lists)))

    (judgement,) = CoTRAILJudge(Lying(lambda prompt, seed: " fine [RESULT]", TOKENIZER)).judge(["a"])
    assert math.isnan(judgement.score)
    assert judgement.error


def test_a_judge_says_what_it_is():
    assert repr(judge(score_values=[0, 1], num_generations=2)) == "CoTRAILJudge('scripted', scores 0, 1, mean of 2)"


def test_append_marker_scores_what_was_written():
    (judgement,) = judge(" no marker", append_marker=True).judge(["a"])
    assert judgement.score == pytest.approx(3.35)


def test_the_judge_is_asked_with_the_ids_of_a_training_row():
    instance = judge()
    for row in make_rows(4, chat=True):
        instance.judge([row])
        form, grid = CompletionFormat("[RESULT]"), instance.grid
        text = TOKENIZER.apply_chat_template(
            row["prompt"] + with_completion([], form.join(" fine", "3"))["completion"], tokenize=False
        )
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        last = max(i for i, token in enumerate(ids) if token == grid.token_ids[2])
        assert instance.backend.logprob_calls[-1] == [ids[:last]]


def test_probabilities_equal_the_models_own_forward():
    model = make_model()
    instance = CoTRAILJudge(TransformersBackend(model, TOKENIZER), append_marker=True, max_new_tokens=8)
    (judgement,) = instance.judge(["is this polite? ->"])
    text = f"is this polite? ->{judgement.rationales[0]} [RESULT] "
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double()
    wanted = logits.softmax(-1)[list(instance.grid.token_ids)].numpy()
    np.testing.assert_allclose(judgement.probs[0], wanted, rtol=1e-4)


def test_the_same_seed_gives_the_same_judgements():
    backend = TransformersBackend(make_model(), TOKENIZER)
    one, two, other = (
        CoTRAILJudge(backend, append_marker=True, max_new_tokens=8, seed=seed).judge(["a b", "c"]) for seed in (1, 1, 2)
    )
    assert [j.rationales for j in one] == [j.rationales for j in two]
    assert [j.rationales for j in one] != [j.rationales for j in other]


@pytest.mark.parametrize("aspects", [None, {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}}])
def test_an_item_is_judged_alike_wherever_it_stands_and_whatever_stands_beside_it(aspects):
    settings = {"append_marker": True, "max_new_tokens": 8, "num_generations": 2, "aspects": aspects}
    rows = ["is this polite? ->", "a b", "why is it wrong and long? ->"]
    alone = [
        CoTRAILJudge(TransformersBackend(make_model(), TOKENIZER, batch_size=1), **settings).judge([row])[0]
        for row in rows
    ]
    together = CoTRAILJudge(TransformersBackend(make_model(), TOKENIZER, batch_size=8), **settings).judge(rows[::-1])
    assert [each.rationales for each in together[::-1]] == [each.rationales for each in alone]
    if aspects is None:
        assert [each.score for each in together[::-1]] == pytest.approx([each.score for each in alone], abs=1e-5)
        assert len({text for each in alone for text in each.rationales}) == 6


def test_each_item_can_have_a_seed_of_its_own():
    backend = TransformersBackend(make_model(), TOKENIZER)
    settings = {"append_marker": True, "max_new_tokens": 8}
    mixed = CoTRAILJudge(backend, **settings).judge(["a b", "a b"], seed=[7, 8])
    alone = [CoTRAILJudge(backend, **settings, seed=seed).judge(["a b"])[0] for seed in (7, 8)]
    assert [each.rationales for each in mixed] == [each.rationales for each in alone]
    assert mixed[0].rationales != mixed[1].rationales
    with pytest.raises(ValueError, match="1 seeds for 2 rows"):
        CoTRAILJudge(backend, **settings).judge(["a", "b"], seed=[1])


def test_another_tokenizer_than_in_training_is_refused(tmp_path):
    row = {"prompt": "a", "completion": " b [RESULT] 3"}
    scales = resolve_scales(make_tokenizer(split_digits=False), row, read_scales({}))
    JudgeConfig(scales).save(tmp_path)
    backend = ScriptedBackend(lambda prompt, seed: " fine [RESULT]", TOKENIZER, probs=PROBS)
    with pytest.raises(ValueError, match="tokenizer"):
        CoTRAILJudge.from_pretrained(tmp_path, backend).judge(["a"])


def test_an_unknown_decision_is_refused():
    with pytest.raises(ValueError, match="decision='average'"):
        judge(decision="average")


@pytest.mark.parametrize(("quantile", "wanted"), [(0.1, 1.0), (0.2, 3.0), (0.5, 4.0), (0.94, 4.0), (0.95, 5.0)])
def test_a_quantile_is_the_lowest_score_that_reaches_its_share(quantile, wanted):
    # On the grid (0.95): cumulative .105, .105, .316, .947, 1.
    assert judge(decision="quantile", quantile=quantile).judge(["a"])[0].score == wanted


def test_a_quantile_has_the_least_pinball_loss_on_a_long_grid():
    # Scoring too low costs q a unit, scoring too high 1 - q: no score of the grid does better than the quantile.
    generator = torch.Generator().manual_seed(0)
    values, probs = torch.arange(101.0), torch.rand(4, 101, generator=generator).double()
    probs /= probs.sum(dim=1, keepdim=True)
    for q in (0.05, 0.3, 0.5, 0.9):
        distance = values[:, None] - values  # (score, true)
        losses = probs @ torch.where(distance < 0, -q * distance, (1 - q) * distance).double().T
        found = decide(probs, values, "quantile", quantile=q)
        torch.testing.assert_close(losses[range(4), found.long()], losses.min(dim=1).values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5, float("nan")])
def test_a_quantile_that_is_none_is_refused_before_anything_is_generated(quantile):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        judge(decision="quantile", quantile=quantile)


@pytest.mark.parametrize(("rule", "wanted"), [("mean", 3.35), ("median", 4.0), ("mode", 4.0)])
def test_decision_rules_by_hand(rule, wanted):
    # On the grid (0.95): cumulative .105, .105, .316, .947: the median is at 4, as is the largest.
    assert judge(decision=rule).judge(["a"])[0].score == pytest.approx(wanted)


def test_a_score_temperature_sharpens_by_hand():
    # Squares of 0.1, 0, 0.2, 0.6, 0.05: 0.01, 0, 0.04, 0.36, 0.0025, in all 0.4125; scaled to the mass of 0.95.
    wanted = (0.01 * 1 + 0.04 * 3 + 0.36 * 4 + 0.0025 * 5) / 0.4125 * 0.95
    assert judge(score_temperature=0.5).judge(["a"])[0].score == pytest.approx(wanted)


def test_a_score_temperature_leaves_the_reported_probabilities_alone():
    (judgement,) = judge(score_temperature=0.5).judge(["a"])
    np.testing.assert_allclose(judgement.probs, [PROBS], rtol=1e-6)


def test_a_score_temperature_moves_the_median_and_not_the_mode():
    # 0.3, 0.3, 0.4: cumulative 0.3, 0.6. Fifth powers: 0.00243 twice and 0.01024, more than the other two together.
    probs, values = torch.tensor([[0.3, 0.3, 0.4]]), torch.tensor([1.0, 2.0, 3.0])
    assert [decide(probs, values, "median", score_temperature=t).item() for t in (1.0, 0.2)] == [2.0, 3.0]
    assert [decide(probs, values, "mode", score_temperature=t).item() for t in (1.0, 0.2)] == [3.0, 3.0]


def test_the_authors_temperature_is_this_one_at_another_value():
    # Theirs: p^(1/T - 1), normalised. With T = 1/4 that is p^3, ours at 1/3 = T / (1 - T).
    probs = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    theirs = probs ** (1 / 0.25 - 1)
    torch.testing.assert_close(temper(probs, 0.25 / (1 - 0.25)), theirs / theirs.sum())


def test_a_score_of_probability_zero_stays_at_zero():
    assert temper(torch.tensor([[0.0, 0.5]]), 3.0).tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_an_unusable_score_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=r"score_temperature=.* must be above 0"):
        judge(score_temperature=temperature)


def two_rationales(first, second, **settings):
    """A judge of two rationales, each with its own probabilities."""
    seen = {}
    backend = ScriptedBackend(
        lambda prompt, seed: f" words {seed % 2} [RESULT]",
        TOKENIZER,
        probs=lambda ids: (first, second)[seen.setdefault(tuple(ids), len(seen))],
    )
    return CoTRAILJudge(backend, num_generations=2, **settings).judge(["a"])[0]


@pytest.mark.parametrize(("pool", "wanted"), [("scores", 3.0), ("distributions", 1.0)])
def test_medians_are_pooled_by_scores_or_by_distributions(pool, wanted):
    # Medians 1 and 5, mean 3. The mean distribution is 0.5 on 1, 0.2 on 2, 0.3 on 5: its lower median is 1.
    judgement = two_rationales([0.9, 0.1, 0, 0, 0], [0.1, 0.3, 0, 0, 0.6], decision="median", pool=pool)
    assert judgement.scores == [1.0, 5.0]
    assert judgement.score == wanted


def test_expected_scores_pool_alike_either_way():
    tables = [0.5, 0.1, 0, 0, 0.1], [0, 0.3, 0.2, 0, 0.4]
    one, other = (
        two_rationales(*tables, pool=pool, score_temperature=0.7).score for pool in ("scores", "distributions")
    )
    assert one == pytest.approx(other)


def test_an_unknown_pool_is_refused():
    with pytest.raises(ValueError, match="pool='mean'"):
        judge(pool="mean")


@pytest.fixture
def saved_judge(tmp_path):
    """A judge's directory, without weights, and the backend that stands for them."""
    scales = resolve_scales(TOKENIZER, {"prompt": "a", "completion": " b [RESULT] 3"}, read_scales({}))
    JudgeConfig(scales).save(tmp_path)
    return tmp_path, ScriptedBackend(lambda prompt, seed: " fine [RESULT]", TOKENIZER, probs=PROBS)


# As version 0.1 wrote them.
SAVED = {
    "score_values": [1.0, 2.0],
    "score_texts": ["1", "2"],
    "score_token_ids": [7, 8],
    "score_paths": [],
    "completion_format": {"marker": "[RESULT]", "lead": " ", "separator": " ", "start": " "},
}
FACTS = {**SAVED, "completion_format": {**SAVED["completion_format"], "marker": "[FACTS]"}, "raft_weight": 0.5}


@pytest.mark.parametrize(
    ("more", "names", "weights"),
    [
        ({}, [""], [None]),
        ({"num_scores": 1, "writes_rationale": True}, [""], [None]),
        (
            {"num_scores": 2, "aspects": {"tone": {**SAVED, "raft_weight": None}, "facts": FACTS}},
            ["tone", "facts"],
            [None, 0.5],
        ),
    ],
)
def test_older_configurations_load(tmp_path, more, names, weights):
    (tmp_path / "tract_config.json").write_text(json.dumps({**SAVED, "normalize_grid": True, **more}))
    config = JudgeConfig.load(tmp_path)
    assert [scale.name for scale in config.scales] == names
    assert [scale.raft_weight for scale in config.scales] == weights
    assert [scale.grid.token_ids for scale in config.scales] == [(7, 8)] * len(names)
    assert (config.normalize_grid, config.writes_rationale) == (True, True)
    config.save(tmp_path)
    assert JudgeConfig.load(tmp_path) == config


def test_a_configuration_of_many_scores_behind_one_marker_is_refused(tmp_path):
    (tmp_path / "tract_config.json").write_text(json.dumps({**SAVED, "normalize_grid": False, "num_scores": 3}))
    with pytest.raises(ValueError, match="aspects"):
        JudgeConfig.load(tmp_path)


def test_a_saved_recalibration_is_applied_when_it_is_asked_for(saved_judge):
    directory, backend = saved_judge
    Recalibration(0.5, 2.0, 1.0, 5.0, n=100, rmse=1.0, rmse_cross_validated=0.8).save(directory)
    (judgement,) = CoTRAILJudge.from_pretrained(directory, backend, recalibrate=True).judge(["a"])
    assert judgement.score == pytest.approx(0.5 * 3.35 + 2)
    assert judgement.scores == pytest.approx([3.35])  # what the model said stays


def test_a_saved_recalibration_is_left_alone_by_default(saved_judge):
    directory, backend = saved_judge
    Recalibration(0.5, 2.0, 1.0, 5.0, n=100, rmse=1.0, rmse_cross_validated=0.8).save(directory)
    assert CoTRAILJudge.from_pretrained(directory, backend).judge(["a"])[0].score == pytest.approx(3.35)


def test_a_missing_recalibration_is_an_error_that_says_how_to_make_one(saved_judge):
    directory, backend = saved_judge
    with pytest.raises(FileNotFoundError, match=r"tract_calibration\.json"):
        CoTRAILJudge.from_pretrained(directory, backend, recalibrate=True)


def test_sampled_scores_follow_the_distribution_on_the_grid():
    probs = torch.tensor([[0.1, 0.0, 0.2, 0.6, 0.05]]).repeat(4000, 1)
    drawn = decide(probs, torch.arange(1.0, 6.0), "sampled", generator=torch.Generator().manual_seed(0))
    shares = [(drawn == value).float().mean().item() for value in range(1, 6)]
    # Standard error of a share at 4,000 draws is at most 0.008.
    np.testing.assert_allclose(shares, np.array(PROBS) / 0.95, atol=0.03)


def test_judgements_serialise_without_nan():
    text = judge(" never").judge(["a"])[0].to_dict()
    assert text["score"] is None
    assert text["error"]


def test_no_items_give_no_judgements():
    assert judge().judge([]) == []


def test_the_start_of_a_completion_is_written_once():
    # Plain-text completions begin with a space, which a model writes itself and a stripped rationale lacks.
    form = CompletionFormat("[RESULT]", start=" ")
    assert form.join(" as written", "4") == form.join("as written", "4") == " as written [RESULT] 4"


def test_a_loaded_model_brings_the_tokenizer_of_where_it_came_from(tmp_path):
    from transformers import AutoModelForCausalLM

    save_seed(tmp_path)
    backend = TransformersBackend(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert backend.tokenizer.get_vocab() == TOKENIZER.get_vocab()
