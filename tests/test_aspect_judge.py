"""Judging and self-distilling completions with several scores: each rationale behind the score before it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer, make_trainer
from datasets import Dataset
from test_aspects import ASPECTS, TWO, make_rows

from trl_tract import CoTRAILJudge, CoTSelfDistill, TransformersBackend, make_reward_func
from trl_tract.backends import ScriptedBackend
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.rows.tokens import prefix_ids, resolve_scales
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import read_aspects

TOKENIZER = make_tokenizer()
# 0.1 * 1 + 0.2 * 3 + 0.6 * 4 + 0.05 * 5 = 3.35: the nearest score is 3, the likeliest 4.
PROBS = [0.1, 0.0, 0.2, 0.6, 0.05]


def scripted(tone: str = " rude [TONE]", facts: str = " true [FACTS]", probs: Any = PROBS) -> ScriptedBackend:
    """Writes `tone` behind a prompt and `facts` behind a prompt that has its first score."""
    return ScriptedBackend(lambda prompt, seed: facts if "[TONE]" in prompt else tone, TOKENIZER, probs=probs)


def asked(backend: ScriptedBackend, call: int) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in backend.generate_calls[call]["prompts"]]


@pytest.mark.parametrize("chat", [False, True])
def test_prefixes_are_the_tokens_of_the_training_row(chat):
    # One row of 0 to 100 behind 1 to 5: up to each score, and up to where each rationale begins.
    aspects = read_aspects(ASPECTS)
    (row,) = make_rows(ASPECTS, 1, chat=chat)
    aspects = resolve_scales(TOKENIZER, row, aspects)
    written = row["completion"][0]["content"] if chat else row["completion"]
    tone, facts = written.split("\n")
    first, text = tone.split(" [TONE] ")
    second = "\n" + facts.split(" [FACTS] ")[0]
    if chat:
        whole = TOKENIZER.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    else:
        whole = row["prompt"] + row["completion"] + "<|end|>"
    ids = TOKENIZER(whole).input_ids
    cases = [
        (prefix_ids(TOKENIZER, row["prompt"], aspects, [], first), "[TONE] "),
        (prefix_ids(TOKENIZER, row["prompt"], aspects, [(first, text)]), f"[TONE] {text}"),
        (prefix_ids(TOKENIZER, row["prompt"], aspects, [(first, text)], second), "[FACTS] "),
    ]
    for found, end in cases:
        assert ids[: len(found)] == found
        assert TOKENIZER.decode(found).endswith(end)


def test_a_later_rationale_is_written_behind_the_score_that_was_decided():
    backend = scripted()
    (judgement,) = CoTRAILJudge(backend, aspects=TWO).judge(["a prompt"])
    assert asked(backend, 0) == ["a prompt"]
    assert asked(backend, 1) == ["a prompt rude [TONE] 3"]
    assert judgement.error is None
    assert {name: its.score for name, its in judgement.aspects.items()} == pytest.approx({"tone": 3.35, "facts": 3.35})
    assert judgement.rationales == [" rude [TONE] 3 true [FACTS] 3"]
    assert judgement.aspects["facts"].rationales == [" true"]
    assert judgement.score != judgement.score  # several scores are not one


def test_the_decision_rule_decides_what_stands_before_a_later_rationale():
    backend = scripted()
    CoTRAILJudge(backend, aspects=TWO, decision="mode").judge(["a prompt"])
    assert asked(backend, 1) == ["a prompt rude [TONE] 4"]


def test_each_sampled_completion_goes_its_own_way():
    # Two rationales; the first is scored 1 and the second 5, in the order in which they are asked for.
    seen: dict[tuple[int, ...], int] = {}

    def probs(ids: list[int]) -> list[float]:
        place = seen.setdefault(tuple(ids), len(seen))
        return [[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0], [0, 1.0, 0, 0, 0], [0, 0, 1.0, 0, 0]][place]

    backend = ScriptedBackend(
        lambda prompt, seed: " so [FACTS]" if "[TONE]" in prompt else f" word {seed % 2} [TONE]", TOKENIZER, probs=probs
    )
    (judgement,) = CoTRAILJudge(backend, aspects=TWO, num_generations=2).judge(["a"])
    ends = [text.split("[TONE]")[1] for text in asked(backend, 1)]
    assert ends == [" 1", " 5"]
    assert judgement.aspects["tone"].scores == [1.0, 5.0]
    assert judgement.aspects["facts"].scores == [2.0, 3.0]
    assert len(judgement.rationales) == 2


def test_an_aspect_that_is_not_reached_is_an_error_on_that_aspect_alone():
    backend = scripted(facts=" I had rather not")
    (judgement,) = CoTRAILJudge(backend, aspects=TWO).judge(["a"])
    assert judgement.aspects["tone"].score == pytest.approx(3.35)
    reason = "no rationale reached '[FACTS]' in 3 attempts: the model ended its turn"
    assert judgement.aspects["facts"].error == reason
    assert judgement.error == f"aspect 'facts': {reason}"
    assert judgement.rationales == []


def test_a_score_of_another_aspect_in_a_rationale_is_sampled_again_and_then_an_error():
    backend = scripted(tone=" [FACTS] 5 rude [TONE]")
    (judgement,) = CoTRAILJudge(backend, aspects=TWO).judge(["a"])
    assert len(backend.generate_calls) == 3
    assert "holds a score of aspect 'facts'" in judgement.aspects["tone"].error
    backend = scripted(tone=" see [FACTS], rude [TONE]")
    (judgement,) = CoTRAILJudge(backend, aspects=TWO).judge(["a"])
    assert judgement.error is None


def test_a_judgement_of_one_score_is_written_as_before():
    (one,) = CoTRAILJudge(ScriptedBackend(lambda *_: " so [RESULT]", TOKENIZER, probs=PROBS)).judge(["a"])
    assert "aspects" not in one.to_dict()
    (several,) = CoTRAILJudge(scripted(), aspects=TWO).judge(["a"])
    assert list(json.loads(json.dumps(several.to_dict()))["aspects"]) == ["tone", "facts"]


def test_what_is_for_one_score_is_refused():
    with pytest.raises(ValueError, match="Use judge"):
        CoTRAILJudge(scripted(), aspects=TWO).score_rationales(["a"], ["b"])


def test_a_trained_judge_scores_as_its_trainer_does(tmp_path):
    # The judge's probabilities behind a training row's rationales, with its written scores, are the trainer's.
    rows = make_rows(ASPECTS, 2)
    for row in rows:
        row["scores"] = None  # the written ones
    rows = [{name: value for name, value in row.items() if name != "scores"} for row in rows]
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, aspects=ASPECTS)
    trainer.save_model(str(tmp_path))
    wanted = trainer.predict(Dataset.from_list(rows)).predictions
    judge = CoTRAILJudge.from_pretrained(tmp_path, TransformersBackend(trainer.model, TOKENIZER))
    assert [aspect.name for aspect in judge.scales] == ["tone", "facts"]
    assert judge.scales == trainer.scales

    from trl_tract.backends.grid_scores import grid_probabilities

    for row, expected in zip(rows, wanted, strict=True):
        tone, facts = row["completion"].split("\n")
        first, text = tone.split(" [TONE] ")
        pieces = [([], first), ([(first, text)], "\n" + facts.split(" [FACTS] ")[0])]
        for aspect, (done, rationale), value in zip(judge.scales, pieces, expected, strict=True):
            prefix = prefix_ids(TOKENIZER, row["prompt"], judge.scales, done, rationale)
            probs = grid_probabilities(judge.backend, aspect.grid, [prefix]).probs[0]
            assert probs @ aspect.grid.values == pytest.approx(value, rel=1e-4)


def test_a_real_model_is_judged_with_whatever_it_writes(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(ASPECTS, 2), tokenizer=TOKENIZER, aspects=ASPECTS)
    trainer.save_model(str(tmp_path))
    backend = TransformersBackend(make_model(), TOKENIZER)
    judge = CoTRAILJudge.from_pretrained(tmp_path, backend, append_marker=True, max_new_tokens=8, max_attempts=1)
    (judgement,) = judge.judge(["a prompt"])
    assert judgement.error is None
    assert judgement.aspects["facts"].probs.shape == (1, 101)
    assert 0 < judgement.aspects["facts"].grid_mass < 1


def test_the_pages_aspects_train_and_judge(tmp_path, monkeypatch, capsys):
    # The page's configuration, its row and its loop over what the judge says.
    page = (Path(__file__).parents[1] / "docs" / "score_scales.md").read_text(encoding="utf-8")
    _, config, judging = re.findall(r"```python\n(.*?)```", page, re.S)
    (row,) = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.S))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(config.replace("TRACTConfig(\n", "args = TRACTConfig(\n"), names)
    trainer = make_trainer("judge", [row], tokenizer=TOKENIZER, aspects=names["args"].aspects)
    assert [score for score in trainer.train_dataset[0]["score_labels"] if score == score] == [2.5, 95.0]
    trainer.save_model("judge")

    class ShortJudge(CoTRAILJudge):
        """Writes little, since a random model finds no end."""

        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **settings: Any) -> Any:
            return CoTRAILJudge.from_pretrained(path, *args, max_new_tokens=4, max_attempts=1, **settings)

    exec(judging.removeprefix("from trl_tract import CoTRAILJudge\n"), {"CoTRAILJudge": ShortJudge, "rows": [row]})
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["tone", "nan"], ["facts", "nan"]]


# 0.1 * 1 + 0.2 * 3 + 0.6 * 4 + 0.05 * 5 = 3.35 of 1 to 5 for the tone; all on 3 for the facts, of 2 and 3.
MIXED = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]", "values": [2, 3]}}


def mixed(**settings: Any) -> CoTRAILJudge:
    def probs(ids: list[int]) -> list[float]:
        return [0.0, 1.0] if "[FACTS]" in TOKENIZER.decode(ids) else PROBS

    return CoTRAILJudge(scripted(probs=probs), aspects=MIXED, **settings)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (2.35 / 4 + 1) / 2),
        ({"scale": "unit"}, (2.35 / 4 + 1) / 2),
        ({"aspect": "tone"}, 3.35),
        ({"aspect": "tone", "scale": "unit"}, 2.35 / 4),
        ({"aspect": "facts"}, 3.0),
    ],
)
def test_a_reward_is_the_mean_of_all_aspects_in_units_or_one_of_them(settings, wanted):
    reward = make_reward_func(mixed(), prompt=lambda row: row["completion"], **settings)
    assert reward(["a"], ["b"]) == [pytest.approx(wanted)]


def test_a_completion_that_lacks_an_aspect_has_no_reward_but_for_another_aspect():
    judge = CoTRAILJudge(scripted(facts=" I had rather not"), aspects=TWO)
    metrics: dict[str, float] = {}
    assert make_reward_func(judge, prompt=lambda row: "x")(["a"], ["b"], log_metric=metrics.__setitem__) == [None]
    assert metrics == {"rewards/tract_judge/failed": 1.0}
    assert make_reward_func(judge, prompt=lambda row: "x", aspect="tone")(["a"], ["b"]) == [pytest.approx(3.35)]


def test_an_unreadable_prompt_is_a_failed_reward_of_every_aspect():
    assert make_reward_func(mixed(), prompt=lambda row: 7, failed=-1.0)(["a"], ["b"]) == [-1.0]


@pytest.mark.parametrize("settings", [{}, {"prompt": str, "aspect": "style"}])
def test_a_reward_of_aspects_that_cannot_be_made_is_refused(settings):
    with pytest.raises(ValueError, match="facts"):
        make_reward_func(mixed(), **settings)


def test_scores_without_a_rationale_stand_behind_each_other():
    backend = scripted()
    (judgement,) = CoTRAILJudge(backend, aspects=TWO, writes_rationale=False).judge(["a prompt ->"])
    assert not backend.generate_calls
    read = [TOKENIZER.decode(ids) for (ids,) in backend.logprob_calls]
    assert read == ["a prompt -> [TONE] ", "a prompt -> [TONE] 3 [FACTS] "]
    assert judgement.rationales == [" [TONE] 3 [FACTS] 3"]


def test_each_aspect_has_its_own_recalibration(tmp_path):
    half = Recalibration(0.5, 0.0, 1.0, 5.0, n=100, rmse=1.0, rmse_cross_validated=0.8)
    same = replace(half, slope=1.0, intercept=0.25)
    backend = scripted()
    (judgement,) = CoTRAILJudge(backend, aspects=TWO, recalibration={"tone": half, "facts": same}).judge(["a"])
    assert judgement.aspects["tone"].score == pytest.approx(3.35 / 2)
    assert judgement.aspects["facts"].score == pytest.approx(3.6)
    # What stands before the second rationale is what the model said, as in a training row.
    assert asked(backend, 1) == ["a rude [TONE] 3"]

    for name, fitted in {"tone": half, "facts": same}.items():
        fitted.save(tmp_path, scale=name)
    JudgeConfig(CoTRAILJudge(backend, aspects=TWO).scales).save(tmp_path)
    (loaded,) = CoTRAILJudge.from_pretrained(tmp_path, backend, recalibrate=True).judge(["a"])
    assert [own.score for own in loaded.aspects.values()] == [own.score for own in judgement.aspects.values()]


@pytest.mark.parametrize("aspects", [TWO, None])
def test_a_recalibration_of_another_score_is_refused(aspects):
    fitted = Recalibration(0.5, 0.0, 1.0, 5.0, n=100, rmse=1.0, rmse_cross_validated=0.8)
    with pytest.raises(ValueError, match="recalibration"):
        CoTRAILJudge(scripted(), aspects=aspects, recalibration=fitted if aspects else {"tone": fitted})


# Self-distillation


def annotated(n: int = 3) -> Dataset:
    rows = [
        {
            "prompt": f"prompt {number} ->",
            "completion": f" old words [TONE] {number + 1}\nold facts [FACTS] {5 - number}",
            "scores": {"tone": number + 1.25, "facts": 5.0 - number},
        }
        for number in range(n)
    ]
    return Dataset.from_list(rows)


def test_a_later_rationale_is_written_behind_the_gold_score(tmp_path):
    backend = scripted(tone=" my tone [TONE] 5", facts="\nmy facts [FACTS] 1")
    rows = CoTSelfDistill(backend, aspects=TWO).distill(annotated(), tmp_path)
    assert asked(backend, 1) == [f"prompt {number} -> my tone [TONE] {number + 1}" for number in range(3)]
    assert rows["completion"] == [f" my tone [TONE] {number + 1}\nmy facts [FACTS] {5 - number}" for number in range(3)]
    assert rows["scores"] == annotated()["scores"]
    assert set(rows["rationale_source"]) == {"self"}
    trainer = make_trainer(tmp_path / "stage2", rows, tokenizer=TOKENIZER, aspects=TWO)
    assert len(trainer.train_dataset) == 3


def test_a_rationale_that_fails_is_sampled_again_alone_and_the_annotated_row_kept(tmp_path):
    def write(prompt: str, seed: int) -> str:
        if "[TONE]" not in prompt:
            return " my tone [TONE]"
        return " no end" if "prompt 1" in prompt else " my facts [FACTS]"

    backend = ScriptedBackend(write, TOKENIZER)
    rows = CoTSelfDistill(backend, aspects=TWO, max_attempts=2).distill(annotated(), tmp_path)
    assert [len(call["prompts"]) for call in backend.generate_calls] == [3, 3, 1]
    assert rows["rationale_source"] == ["self", "annotated", "self"]
    assert rows[1]["completion"] == annotated()[1]["completion"]
    assert (rows[1]["finish_reason"], rows[1]["attempts"]) == ("no marker", 2)


def test_another_aspects_score_in_a_rationale_is_a_leak(tmp_path):
    backend = scripted(tone=" [FACTS] 5 my tone [TONE]")
    rows = CoTSelfDistill(backend, aspects=TWO, allow_leaks=True).distill(annotated(), tmp_path)
    assert set(rows["finish_reason"]) == {"leak"}


def test_several_rationales_a_prompt_each_have_a_row(tmp_path):
    backend = ScriptedBackend(
        lambda prompt, seed: " my facts [FACTS]" if "[TONE]" in prompt else f" tone {seed % 2} of it [TONE]", TOKENIZER
    )
    rows = CoTSelfDistill(backend, aspects=TWO, num_generations=2).distill(annotated(2), tmp_path)
    firsts = [row.split(" [TONE]")[0] for row in rows["completion"]]
    assert len(rows) == 4
    assert firsts[0] != firsts[1]


def test_a_row_without_an_aspects_gold_score_is_named_before_anything_is_written(tmp_path):
    rows = annotated().to_list()
    rows[1]["scores"]["facts"] = None
    backend = scripted()
    with pytest.raises(ValueError, match=r"row 1 .*'facts'"):
        CoTSelfDistill(backend, aspects=TWO).distill(Dataset.from_list(rows), tmp_path)
    assert not backend.generate_calls
