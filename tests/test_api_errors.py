"""Everything but training data mistyped once: each message says what is wrong and what to do."""

import datetime

import numpy as np
import pandas
import pytest
from conftest import ASPECTS, make_model, make_rows, make_tokenizer, make_trainer, save_seed
from datasets import Dataset

from trl_tract import (
    CoTBootstrap,
    CoTRAILJudge,
    CoTSelfDistill,
    JudgeEvalCallback,
    REALConfig,
    REALTrainer,
    ScoreGrid,
    TRACTConfig,
    TRACTTrainer,
    TransformersBackend,
    from_prometheus_eval,
    make_reward_func,
    rubric_prompt,
    run_tract,
)
from trl_tract.backends import ChatBackend, ScriptedBackend, make_author
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.files.journal import write_jsonl
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import read_scales
from trl_tract.scale.text import CompletionFormat
from trl_tract.sources.door import group_of, held_out_rows
from trl_tract.sources.rubric import Rubric


def scripted():
    return ScriptedBackend(lambda *_: "fine. [RESULT]", make_tokenizer())


class Short(ScriptedBackend):
    """Gives the probabilities of three tokens, whatever was asked for."""

    def next_token_logprobs(self, token_id_lists, token_ids):
        return np.zeros((len(token_id_lists), 3))


def judge(**settings):
    return CoTRAILJudge(scripted(), **settings)


def with_rubric(template=None):
    made = judge()
    made.rubric = Rubric("Is it polite?", {str(score): "so" for score in range(1, 6)}, template)
    return made


def configured(folder):
    JudgeConfig(read_scales({})).save(folder)
    return folder


def run(folder, **settings):
    write_jsonl(folder / "rows.jsonl", make_rows(6))
    training = {"bf16": False}
    arguments = {"model": seed(folder), "data": str(folder / "rows.jsonl"), "output_dir": folder / "out"}
    return run_tract(**{**arguments, "eval_fraction": 0.34, "training": training, **settings})


# name: (what is called with a folder, kind of error, what the message holds)
MISTAKES = {
    "one row instead of a list": (
        lambda _: judge().judge("Judge this."),
        TypeError,
        "rows is a single str. Put it into a list",
    ),
    "one dict instead of a list": (lambda _: judge().judge({"prompt": "a"}), TypeError, "as in judge.judge([row])[0]"),
    "a response for a judge without a rubric": (
        lambda _: judge().judge_response(response="a"),
        ValueError,
        "no rubric was saved with this judge. Build the prompts as in training and use judge()",
    ),
    "fewer instructions than responses": (
        lambda _: with_rubric().judge_response(response=["a", "b"], instruction=["c"]),
        ValueError,
        "1 instructions for 2 responses. Pass one for each",
    ),
    "a table instead of rows": (
        lambda _: judge().judge(pandas.DataFrame([{"prompt": "a"}])),
        TypeError,
        "judge.judge(table.to_dict('records'))",
    ),
    "an iterator instead of rows": (lambda _: judge().judge(iter(["a"])), TypeError, "judge.judge(list(rows))"),
    "no rows to distill": (
        lambda folder: CoTSelfDistill(scripted()).distill(Dataset.from_list([]), folder),
        ValueError,
        "the dataset is empty",
    ),
    "times of day to distill": (
        lambda folder: CoTSelfDistill(scripted()).distill(
            Dataset.from_list([row | {"at": datetime.time(3)} for row in make_rows(2)]), folder
        ),
        ValueError,
        "the column at holds times of day",
    ),
    "a backend that returns too few probabilities": (
        lambda _: CoTRAILJudge(Short(lambda *_: "fine. [RESULT]", make_tokenizer())).judge(["a", "b"]),
        ValueError,
        "next_token_logprobs of the backend 'scripted' returned an array of shape (2, 3) but must return (2, 5)",
    ),
    "no rationale": (lambda _: judge(num_generations=0), ValueError, "num_generations=0 must be 1 or more"),
    "no attempt": (lambda _: judge(max_attempts=0), ValueError, "max_attempts=0 must be 1 or more"),
    "several rationales of a judge that writes none": (
        lambda _: judge(writes_rationale=False, num_generations=4),
        ValueError,
        "num_generations=4, but this judge writes no rationales, so it has one score for each item",
    ),
    "several rationales for a stage that is not there": (
        lambda folder: run(folder, rationales="none", num_generations=4),
        ValueError,
        "without rationales there are no such stages. Leave num_generations out",
    ),
    "a quantile of another decision": (
        lambda _: judge(quantile=0.9),
        ValueError,
        "quantile=0.9 has no effect with decision='mean'. Set decision='quantile'",
    ),
    "a marker beside a format": (
        lambda _: judge(score_marker="#", completion_format=CompletionFormat("[RESULT]")),
        ValueError,
        "score_marker='#', but completion_format has the marker '[RESULT]'",
    ),
    "a grid beside aspects": (
        lambda _: judge(score_values=[1, 2], aspects=ASPECTS),
        ValueError,
        "aspects replaces score_values, score_texts, score_marker and completion_format",
    ),
    "a grid beside aspects in training": (
        lambda _: TRACTConfig("out", score_values=[1, 2], aspects=ASPECTS),
        ValueError,
        "Leave them out, and give each aspect its own `marker`",
    ),
    "another marker than in training": (
        lambda folder: CoTRAILJudge.from_pretrained(configured(folder), scripted(), score_marker="#"),
        ValueError,
        "score_marker is read from tract_config.json, as in training. Leave it out",
    ),
    "other aspects than in training": (
        lambda folder: CoTSelfDistill.from_pretrained(configured(folder), scripted(), aspects=ASPECTS),
        ValueError,
        "aspects is read from tract_config.json",
    ),
    "two recalibrations": (
        lambda folder: CoTRAILJudge.from_pretrained(
            configured(folder), scripted(), recalibrate=True, recalibration=Recalibration(1, 0, 1, 5, 9, 1, 1)
        ),
        ValueError,
        "recalibrate=True would replace the given recalibration",
    ),
    "a response that is none": (
        lambda _: with_rubric().judge_response(response=["a", None]),
        TypeError,
        "response 1 is None, not text",
    ),
    "a reference without a place": (
        lambda _: with_rubric("{criterion} {descriptions} {response}").judge_response(response="a", reference="b"),
        ValueError,
        "the rubric's template has no {reference}",
    ),
    "a rubric of another grid": (
        lambda _: setattr(judge(), "rubric", Rubric("Is it polite?", {"1": "no", "2": "yes"})),
        ValueError,
        "the rubric describes the scores 1, 2, but the grid is 1, 2, 3, 4, 5",
    ),
    "descriptions without a place": (
        lambda _: make_reward_func(with_rubric("{criterion} {response}"))(
            ["a"], ["b"], criterion=["Is it polite?"], descriptions=[{str(score): "so" for score in range(1, 6)}]
        ),
        ValueError,
        "the column descriptions would have no effect, because the template of the judge's rubric has no",
    ),
    "an unknown decision": (lambda _: judge(decision="meen"), ValueError, "choose one of mean, median, mode, sampled"),
    "an unknown pool": (lambda _: judge(pool="both"), ValueError, "choose one of scores, distributions"),
    "a grid as text": (
        lambda _: judge(score_values="12345"),
        ValueError,
        "score_values='12345' is not a list of numbers",
    ),
    "a grid of words": (
        lambda _: ScoreGrid.from_values(["poor", "good"]),
        ValueError,
        "put the words into score_texts",
    ),
    "a grid of one number": (lambda _: TRACTConfig("out", score_values=5), ValueError, "Give the scores as numbers"),
    "sampling that the gradient does not know of": (
        lambda _: REALConfig("out", top_p=0.9),
        ValueError,
        "Leave top_p at 1.0, or set advantages='normalised'",
    ),
    "ratios that are cut below an unchanged model's": (
        lambda _: REALConfig("out", loss_type="cispo"),
        ValueError,
        "Set epsilon_high to 1 or more",
    ),
    "a sampling setting that the loss does not see": (
        lambda _: REALConfig("out", generation_kwargs={"top_p": 0.9}),
        ValueError,
        "generation_kwargs sets top_p, which the loss would not know of. Set top_p in REALConfig instead",
    ),
    "another distribution than the model's": (
        lambda _: REALConfig("out", generation_kwargs={"typical_p": 0.9}),
        ValueError,
        "Leave typical_p out of generation_kwargs, or set advantages='normalised'",
    ),
    "a ratio that is cut below an unchanged model's": (
        lambda _: REALConfig("out", delta=0.5),
        ValueError,
        "delta=0.5 would clip the ratio 1 of an unchanged model",
    ),
    "weights of a single reward": (
        lambda _: REALConfig("out", reward_weights=[2.0]),
        ValueError,
        "reward_weights=[2.0] has no effect, because the only reward is the judge's own error. Leave it out",
    ),
    "scaling of advantages by a batch": (
        lambda _: REALConfig("out", scale_rewards="batch"),
        ValueError,
        "scale_rewards='batch' has no effect, with advantages='unbiased'. Leave it out",
    ),
    "images for a trainer of text": (
        lambda folder: REALTrainer(
            seed(folder), REALConfig("out"), Dataset.from_list([{"prompt": "a", "score": 1, "image": "a.png"}])
        ),
        ValueError,
        "the train dataset has the column image, but REALTrainer trains only on text",
    ),
    "the configuration of another trainer": (
        lambda folder: REALTrainer(seed(folder), TRACTConfig("out"), Dataset.from_list(make_rows(2))),
        TypeError,
        "args is a TRACTConfig. Pass a REALConfig, or a GRPOConfig",
    ),
    "whole turns for rationales that end none": (
        lambda _: REALConfig("out", mask_truncated_completions=True),
        ValueError,
        "rationales that never reach the marker get no_score_penalty",
    ),
    "a reward beside the judge's own error": (
        lambda folder: REALTrainer(seed(folder), REALConfig("out"), reward_funcs=[len]),
        ValueError,
        "reward_funcs is not supported: REALTrainer's reward is the judge's own error",
    ),
    "reinforcement of several aspects": (
        lambda folder: run(folder, rl={}, training={"aspects": {"a": {"marker": "[A]"}, "b": {"marker": "[B]"}}}),
        ValueError,
        "rl supports judges with one score only",
    ),
    "reinforcement without rationales": (
        lambda folder: run(folder, rl={}, training={"drop_rationale": True}),
        ValueError,
        "set rationales='none' and leave drop_rationale out",
    ),
    "a weight as text": (lambda _: TRACTConfig("out", raft_weight="1"), ValueError, "raft_weight='1' must be a number"),
    "no length at all": (
        lambda _: TRACTConfig("out", max_length=0),
        ValueError,
        "max_length=0 must be 1 or more, or None",
    ),
    "a judge that is nowhere": (
        lambda folder: CoTRAILJudge.from_pretrained(folder / "no"),
        FileNotFoundError,
        "no is not a model directory. It is saved by TRACTTrainer.save_model()",
    ),
    "a backend by a name that needs more": (
        lambda folder: CoTRAILJudge.from_pretrained(trained(folder), backend="vllm"),
        ValueError,
        "Pass 'transformers', or a backend object such as VLLMBackend(path)",
    ),
    "a recalibration that nobody fitted": (
        lambda folder: CoTRAILJudge.from_pretrained(trained(folder), scripted(), recalibrate=True),
        FileNotFoundError,
        "Fit one on held-out judgements and save it there",
    ),
    "a model that is nowhere": (
        lambda folder: TransformersBackend(str(folder / "no")),
        FileNotFoundError,
        "is not a model directory: there is nothing at /",
    ),
    "a directory that holds no model": (
        lambda folder: TransformersBackend(str(folder)),
        FileNotFoundError,
        "it holds no config.json or adapter_config.json",
    ),
    "a seed model that is nowhere": (
        lambda folder: TRACTTrainer(str(folder / "no"), train_dataset=Dataset.from_list(make_rows(2))),
        FileNotFoundError,
        "is not a model directory",
    ),
    "an unknown dtype": (
        lambda folder: TransformersBackend(seed(folder), dtype="float33"),
        ValueError,
        "dtype='float33' is unknown: give auto, float32, bfloat16 or float16",
    ),
    "a list to distil": (
        lambda folder: CoTSelfDistill(scripted()).distill(make_rows(2), folder / "out"),
        TypeError,
        "dataset is a list. Make it a Dataset, as in Dataset.from_list(rows)",
    ),
    "a tolerance below zero": (
        lambda _: CoTBootstrap(scripted(), tolerance=-1),
        ValueError,
        "tolerance=-1 must be 0 or more",
    ),
    "a penalty that a chat endpoint does not know": (
        lambda _: CoTBootstrap(ChatBackend("http://localhost:1/v1", "model"), repetition_penalty=1.2),
        ValueError,
        "repetition_penalty=1.2 has no effect on a chat endpoint",
    ),
    "one price": (lambda _: CoTBootstrap(scripted(), prices=[1.0]), ValueError, "prices per million input"),
    "no rationale to keep": (lambda _: CoTBootstrap(scripted(), keep=0), ValueError, "keep=0 must be 1 or more"),
    "keep_gold for rows that have none": (
        lambda _: CoTBootstrap(scripted(), on_failure="keep_gold"),
        ValueError,
        "on_failure='keep_gold' is unknown: choose one of drop, keep, raise",
    ),
    "a chat endpoint that is nowhere named": (
        lambda _: make_author("gpt-x", "chat"),
        ValueError,
        "the chat backend needs base_url",
    ),
    "a table to run on": (
        lambda folder: run_tract("seed", pandas.DataFrame(make_rows(6)), folder),
        TypeError,
        "data is a DataFrame. A run continues from what is on disk: save it and give the path",
    ),
    "a loaded model to run on": (
        lambda folder: run_tract(make_model(), "rows.jsonl", folder),
        TypeError,
        "model is a LlamaForCausalLM",
    ),
    "rationales of an unknown kind": (
        lambda folder: run_tract("seed", "rows.jsonl", folder, rationales="some"),
        ValueError,
        "rationales='some' is unknown: choose one of auto, given, bootstrap, none",
    ),
    "rationales written and left out": (
        lambda folder: run_tract(
            "seed", "rows.jsonl", folder, rationales="bootstrap", training={"drop_rationale": True}
        ),
        ValueError,
        "Use only one of the two",
    ),
    "no rationale to distil": (
        lambda _: CoTSelfDistill(scripted(), num_generations=0),
        ValueError,
        "num_generations=0",
    ),
    "a run of a model that is nowhere": (
        lambda folder: run(folder, model=str(folder / "no")),
        FileNotFoundError,
        "is not a model directory",
    ),
    "a run into a file": (
        lambda folder: run(folder, output_dir=folder / "rows.jsonl"),
        FileExistsError,
        "rows.jsonl is a file. Give a directory for the run",
    ),
    "too large a share held out": (lambda folder: run(folder, eval_fraction=2), ValueError, "leaves one side empty"),
    "descriptions without scores": (
        lambda _: rubric_prompt("a", "b", "c", ["bad", "good"]),
        TypeError,
        'descriptions is a list. Give a mapping from each score to its description, as in {"1": "wrong", "2": "right"}',
    ),
    "an order of prompts that is none": (
        lambda _: rubric_prompt("a", "b", "c", {"1": "bad", "2": "good"}, order="response first"),
        ValueError,
        "order='response first' is unknown: choose 'standard' or 'shared-first'",
    ),
    "more scores than rationales": (
        lambda _: from_prometheus_eval({"instruction": "a", "gpt4_score": [1, 2], "gpt4_feedback": ["b"]}),
        ValueError,
        "gpt4_score has 2 entries and gpt4_feedback has 1",
    ),
    "judging in training without evaluations": (
        lambda _: TRACTConfig("out", judge_eval_items=8),
        ValueError,
        "Set eval_strategy='epoch', or eval_strategy='steps' and eval_steps",
    ),
    "fewer than no items to judge in training": (
        lambda _: TRACTConfig("out", judge_eval_items=-1),
        ValueError,
        "judge_eval_items=-1 must be 0 (none) or more",
    ),
    "no item to judge in training": (lambda _: JudgeEvalCallback(num_items=0), ValueError, "num_items=0 must be 1"),
    "settings of judging in training that are no JSON": (
        lambda _: TRACTConfig("out", judge_eval_settings="{max_new_tokens: 5}"),
        ValueError,
        "judge_eval_settings is not JSON",
    ),
    "settings of judging in training that are a list": (
        lambda _: TRACTConfig("out", judge_eval_settings="[5]"),
        ValueError,
        "judge_eval_settings='[5]' is not a mapping of names to values",
    ),
    "an unknown setting of judging in training": (
        lambda _: JudgeEvalCallback(max_tokens=5),
        ValueError,
        "'max_tokens' is not a judge setting. Settings: append_marker, chat_template_kwargs",
    ),
    "nothing to judge in training": (
        lambda folder: judged_in_training(folder, None),
        ValueError,
        "Give an eval_dataset, or items",
    ),
    "items and several evaluation sets": (
        lambda folder: judged_in_training(folder, {"a": Dataset.from_list(make_rows(2))}, items=make_rows(2)),
        ValueError,
        "both items and several evaluation sets were given. Use only one of the two",
    ),
    "items without gold scores": (
        lambda folder: judged_in_training(folder, None, items=[{"prompt": "a"}]),
        ValueError,
        "items, row 0 cannot be judged during training: it has no gold score",
    ),
    "tokenised rows to judge in training": (
        lambda folder: judged_in_training(folder, tokenised(folder)),
        ValueError,
        "it is tokenised, but a judge needs its prompt. Give items to JudgeEvalCallback",
    ),
    "more rows to judge in training than there are": (
        lambda folder: held_out_rows(map(group_of, make_rows(3)), 9, 0),
        ValueError,
        "leaves no training rows. Lower judge_eval_items, or give eval_data",
    ),
    "a path as a reward's judge": (
        lambda _: make_reward_func("judge"),
        TypeError,
        "CoTRAILJudge.from_pretrained(path)",
    ),
}


def judged_in_training(folder, held_out, items=None):
    callbacks = [JudgeEvalCallback(items)]
    return make_trainer(folder / "out", make_rows(3), eval_dataset=held_out, extra={"callbacks": callbacks})


def tokenised(folder):
    return make_trainer(folder / "rows", make_rows(3)).train_dataset


def seed(folder):
    return save_seed(folder / "seed")


def trained(folder):
    make_trainer(folder / "judge", make_rows(3)).save_model()
    return str(folder / "judge")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_that_says_what_to_do(name, tmp_path):
    call, kind, wanted = MISTAKES[name]
    with pytest.raises(kind) as caught:
        call(tmp_path)
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "a"}, "the row has no `prompt`; its columns are text"),
        (3, "it is int, not text or a list of chat messages"),
        ({"prompt": None}, "the prompt cannot be read: it is missing"),
        ("", "the prompt cannot be read: it is missing"),
        ({"prompt": [{"rol": "user", "content": "a"}]}, "a chat message needs `role` and `content`"),
    ],
)
def test_a_row_that_cannot_be_judged_is_that_item_s_error(row, wanted):
    (judgement,) = judge().judge([row])
    assert judgement.error is not None
    assert wanted in judgement.error


def test_plain_text_for_a_judge_of_chat_messages_is_that_item_s_error(tmp_path):
    make_trainer(tmp_path / "judge", make_rows(3, chat=True)).save_model()
    (judgement,) = CoTRAILJudge.from_pretrained(tmp_path / "judge", scripted()).judge(["Judge this."])
    assert judgement.error is not None
    assert "it is plain text, but the judge was trained on chat messages" in judgement.error
