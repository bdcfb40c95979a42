"""The scorer of MLflow in `mlflow.genai.evaluate`, where it is installed: `pip install "trl-tract[mlflow]"`."""

import numpy as np
import pytest
from conftest import make_model, make_tokenizer
from serving import served

pytest.importorskip("mlflow")
import mlflow

from trl_tract import CoTRAILJudge, TransformersBackend
from trl_tract.backends import ScriptedBackend
from trl_tract.demo.task import make_rows
from trl_tract.integrations.mlflow import tract_scorer
from trl_tract.sources.rubric import Rubric

pytestmark = pytest.mark.filterwarnings("default")  # the framework's own
TOKENIZER = make_tokenizer()
PROBS = [0.1, 0.0, 0.2, 0.6, 0.05]


@pytest.fixture(autouse=True, scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # More threads than SQLite has connections would lose rows.
        patch.setenv("MLFLOW_GENAI_EVAL_MAX_WORKERS", "8")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        mlflow.set_experiment("judged")
        yield


def scripted(script=lambda prompt, seed: " fine [RESULT] 1") -> CoTRAILJudge:
    judge = CoTRAILJudge(ScriptedBackend(script, TOKENIZER, probs=PROBS), max_attempts=1)
    judge.chat = False
    judge.rubric = Rubric("Polite?", dict.fromkeys("12345", "so"), "{instruction}|{response}|{reference}")
    return judge


def row(number=0, **columns):
    return {"inputs": {"question": f"hello {number}"}, "outputs": "thanks", **columns}


def feedback_of(scorer, inputs="hello", outputs="thanks", expectations=None):
    return scorer(inputs=inputs, outputs=outputs, expectations=expectations)


@pytest.mark.parametrize("where", ["in process", "behind the server"])
def test_twenty_demo_items_get_the_scores_of_the_judge(where):
    judge = CoTRAILJudge(TransformersBackend(make_model(), make_tokenizer()), append_marker=True, max_new_tokens=4)
    judge.backend.model.config.max_position_embeddings = 4096
    prompts = [each["prompt"] for each in make_rows("eval", 20)]
    wanted = judge.judge(prompts)
    data = [{"inputs": {"number": number}, "outputs": "-"} for number in range(20)]
    with served(judge) as server:
        reached = judge if where == "in process" else server.url
        scorer = tract_scorer(reached, prompt=lambda inputs, outputs, expectations: prompts[inputs["number"]])
        result = mlflow.genai.evaluate(data=data, scorers=[scorer])
    table = result.result_df
    assert len(table) == 20
    numbers = [request["number"] for request in table["request"]]
    assert table["tract/value"].tolist() == pytest.approx([wanted[number].score for number in numbers], abs=1e-5)
    assert result.metrics["tract/mean"] == pytest.approx(np.mean([each.score for each in wanted]), abs=1e-5)


def test_rows_without_a_score_are_errors_and_the_others_count():
    judge = scripted(lambda prompt, seed: " never" if "hello 1|" in prompt else " fine [RESULT] 1")
    result = mlflow.genai.evaluate(data=[row(number) for number in range(3)], scorers=[tract_scorer(judge)])
    assert result.metrics["tract/mean"] == pytest.approx(3.35)
    assert result.result_df["tract/value"].notna().sum() == 2
    errors = [
        each for trace in result.result_df["assessments"] for each in trace if each.get("feedback", {}).get("error")
    ]
    assert len(errors) == 1


def test_feedback_has_score_rationale_and_grid_mass():
    feedback = feedback_of(tract_scorer(scripted()))
    assert feedback.value == pytest.approx(3.35)
    assert type(feedback.value) is float
    assert feedback.rationale == "fine"
    assert float(feedback.metadata["grid_mass"]) == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("settings", "inputs", "outputs", "expectations", "prompt"),
    [
        ({}, {"question": "i"}, "r", None, "i|r|"),
        ({"instruction": "q"}, {"q": "i", "other": 1}, {"text": "r"}, None, "i|r|"),
        ({"reference": "expected_response"}, "i", "r", {"expected_response": "best"}, "i|r|best"),
        ({"prompt": lambda inputs, outputs, expectations: f"{inputs}-{outputs}"}, 1, 2, None, "1-2"),
    ],
)
def test_columns_become_the_judges_prompt(settings, inputs, outputs, expectations, prompt):
    judge = scripted(lambda asked, seed: f" {asked} [RESULT] 1")
    assert feedback_of(tract_scorer(judge, **settings), inputs, outputs, expectations).rationale == prompt


@pytest.mark.parametrize(
    ("settings", "inputs", "outputs"),
    [
        ({}, {"a": "1", "b": "2"}, "r"),
        ({"instruction": "c"}, {"a": "1"}, "r"),
        ({}, "i", 3),
        ({}, "i", {"a": 1, "b": 2}),
        ({"reference": "best"}, "i", "r"),
    ],
)
def test_a_row_that_cannot_be_read_is_an_error_in_words(settings, inputs, outputs):
    feedback = feedback_of(tract_scorer(scripted(), **settings), inputs, outputs, {})
    assert feedback.value is None
    assert feedback.error.error_code == "UNREADABLE_ROW"
    assert len(feedback.error.error_message.split()) > 4
