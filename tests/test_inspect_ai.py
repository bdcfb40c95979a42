"""The scorer of inspect_ai in its own evaluations, where it is installed: `pip install "trl-tract[inspect]"`."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from pages import ROOT
from serving import served

pytest.importorskip("inspect_ai")
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ModelOutput
from inspect_ai.solver import solver

from trl_tract import CoTRAILJudge, TransformersBackend
from trl_tract.backends import ScriptedBackend
from trl_tract.demo.task import make_rows
from trl_tract.integrations.inspect_ai import tract_scorer
from trl_tract.sources.rubric import Rubric

pytestmark = pytest.mark.filterwarnings("default")  # the framework's own
TOKENIZER = make_tokenizer()
PROBS = [0.1, 0.0, 0.2, 0.6, 0.05]


@solver
def answered():
    """Says what a sample's metadata has, so that no model is asked."""

    async def solve(state, generate):
        state.output = ModelOutput.from_content("none", str(state.metadata["answer"]))
        return state

    return solve


def run(scorer, samples, tmp_path):
    (log,) = eval(
        Task(dataset=samples, solver=answered(), scorer=scorer), model=None, log_dir=str(tmp_path), display="none"
    )
    assert log.status == "success", log.error
    return log


def scores(log):
    return [next(iter(sample.scores.values())) for sample in log.samples]


def scripted(script=lambda prompt, seed: " fine [RESULT] 1") -> CoTRAILJudge:
    judge = CoTRAILJudge(ScriptedBackend(script, TOKENIZER, probs=PROBS), max_attempts=1)
    judge.chat, judge.rubric = (
        False,
        Rubric("Polite?", dict.fromkeys("12345", "so"), "{instruction}|{response}|{reference}"),
    )
    return judge


def sample(text="hello", answer="thanks", target=""):
    return Sample(input=text, target=target, metadata={"answer": answer})


def demo_items():
    return [
        Sample(
            input=[
                (ChatMessageSystem if turn["role"] == "system" else ChatMessageUser)(content=turn["content"])
                for turn in row["prompt"]
            ],
            target=str(row["score"]),
            metadata={"answer": ""},
        )
        for row in make_rows("eval", 20)
    ]


@pytest.mark.parametrize("where", ["in process", "behind the server"])
def test_twenty_demo_items_get_the_scores_of_the_judge(tmp_path, where):
    judge = CoTRAILJudge(TransformersBackend(make_model(), make_tokenizer()), append_marker=True, max_new_tokens=4)
    judge.backend.model.config.max_position_embeddings = 4096
    wanted = judge.judge([row["prompt"] for row in make_rows("eval", 20)])
    with served(judge) as server:
        reached = judge if where == "in process" else server.url
        log = run(tract_scorer(reached, prompt="input"), demo_items(), tmp_path)
    assert [each.value for each in scores(log)] == pytest.approx([each.score for each in wanted], abs=1e-5)
    assert [each.explanation for each in scores(log)] == [each.rationales[0].strip() for each in wanted]
    mean = sum(each.score for each in wanted) / 20
    assert log.results.scores[0].metrics["mean"].value == pytest.approx(mean, abs=1e-5)


def test_input_and_output_are_judged_by_the_rubric(tmp_path):
    judge = scripted(lambda prompt, seed: f" {prompt} [RESULT] 1")
    log = run(tract_scorer(judge, reference=True), [sample(target="best")], tmp_path)
    (score,) = scores(log)
    assert score.value == pytest.approx(3.35)
    assert score.explanation == "hello|thanks|best"
    assert score.metadata["grid_mass"] == pytest.approx(0.95)
    assert score.metadata["distribution"]["4"] == pytest.approx(0.6)


def test_a_sample_without_a_score_is_left_out_of_the_metrics(tmp_path):
    judge = scripted(lambda prompt, seed: " never" if "bad" in prompt else " fine [RESULT] 1")
    log = run(tract_scorer(judge), [sample(), sample(answer="bad")], tmp_path)
    good, bad = scores(log)
    assert good.value == pytest.approx(3.35)
    assert math.isnan(bad.value)
    assert "no rationale reached" in bad.explanation
    assert log.results.scores[0].metrics["mean"].value == pytest.approx(3.35)


def test_a_judge_that_cannot_be_asked_is_an_unscored_sample(tmp_path):
    judge = scripted()
    judge.rubric = None
    (score,) = scores(run(tract_scorer(judge), [sample()], tmp_path))
    assert math.isnan(score.value)
    assert "no rubric was saved" in score.explanation


def test_a_function_writes_the_prompt(tmp_path):
    judge = scripted(lambda prompt, seed: f" {prompt} [RESULT] 1")
    scorer = tract_scorer(judge, prompt=lambda state, target: f"{state.output.completion}-{target.text}")
    (score,) = scores(run(scorer, [sample(target="t")], tmp_path))
    assert score.explanation == "thanks-t"


@pytest.mark.process
def test_a_log_is_scored_by_the_registered_name(tmp_path):
    # What pip installs beside the command: an entry point that inspect_ai loads.
    with served(scripted()) as server:
        first = run(tract_scorer(server.url), [sample(), sample(text="again")], tmp_path)
        named = ["--scorer", "trl_tract/tract_scorer", "-S", f"judge={server.url}", "--action", "overwrite"]
        command = [str(Path(sys.executable).with_name("inspect")), "score", first.location, *named, "--overwrite"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    again = read_eval_log(first.location)
    assert [each.value for each in scores(again)] == pytest.approx([3.35, 3.35])


def test_the_example_s_task_scores_what_a_model_answered(tmp_path):
    rows = [{"instruction": "hello", "reference": "best"}, {"instruction": "bye", "reference": "worst"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = scripted(lambda prompt, seed: f" {prompt} [RESULT] 1")
    example = runpy.run_path(str(ROOT / "examples" / "inspect_task.py"))
    with served(judge) as server:
        task = example["judged"](server.url, str(tmp_path / "rows.jsonl"), reference=True)
        task.solver = answered()
        for each in task.dataset:
            each.metadata = {"answer": "thanks"}
        (log,) = eval(task, model=None, log_dir=str(tmp_path), display="none")
    assert [each.explanation for each in scores(log)] == ["hello|thanks|best", "bye|thanks|worst"]
