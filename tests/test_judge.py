"""CoTRAILJudge: rationale, then expected score; an item without one is an error, never a guess."""

import math

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer

from trl_tract import CoTRAILJudge, TransformersBackend
from trl_tract.backends import ScriptedBackend
from trl_tract.judge_config import JudgeConfig
from trl_tract.prompts import CompletionFormat
from trl_tract.rendering import resolve_grid, with_completion
from trl_tract.scores import ScoreGrid, decide

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


def test_another_tokenizer_than_in_training_is_refused(tmp_path):
    grid, form = resolve_grid(
        make_tokenizer(split_digits=False),
        {"prompt": "a", "completion": " b [RESULT] 3"},
        "[RESULT]",
        ScoreGrid.from_values([1, 2, 3, 4, 5]),
    )
    JudgeConfig(grid, form).save(tmp_path)
    backend = ScriptedBackend(lambda prompt, seed: " fine [RESULT]", TOKENIZER, probs=PROBS)
    with pytest.raises(ValueError, match="not the tokenizer that the judge was trained with"):
        CoTRAILJudge.from_pretrained(tmp_path, backend).judge(["a"])


def test_an_unknown_decision_is_refused():
    with pytest.raises(ValueError, match="decision='average' is unknown: choose one of mean, median, mode, sampled"):
        judge(decision="average")


@pytest.mark.parametrize(("rule", "wanted"), [("mean", 3.35), ("median", 4.0), ("mode", 4.0)])
def test_decision_rules_by_hand(rule, wanted):
    # On the grid (0.95): cumulative .105, .105, .316, .947: the median is at 4, as is the largest.
    assert judge(decision=rule).judge(["a"])[0].score == pytest.approx(wanted)


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

    make_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    backend = TransformersBackend(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert backend.tokenizer.get_vocab() == TOKENIZER.get_vocab()
