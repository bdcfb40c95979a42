"""Nothing made by one model, of one set of rows or under one set of settings passes for the result of another."""

import json
import random
import re
import struct
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, save_seed
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tract import CoTSelfDistill, TransformersBackend, run_tract
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.files.checkpoints import checkpoint_made_of, seal_checkpoint
from trl_tract.files.fingerprint import file_digests, made_by, model_fingerprint
from trl_tract.files.journal import differences, read_json, read_jsonl, write_json, write_jsonl
from trl_tract.files.seal import contents
from trl_tract.runs.spec import RunSpec
from trl_tract.runs.steps import DistillStep, JudgeStep
from trl_tract.runs.train_steps import TrainStep
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat

TOKENIZER = make_tokenizer()


def save_judge(directory: Path, values: tuple[int, ...] = (1, 2, 3, 4, 5)) -> None:
    TOKENIZER.save_pretrained(directory)
    grid = ScoreGrid.from_values(values).resolve(TOKENIZER, " the [RESULT] ", "")
    JudgeConfig((Scale("", grid, CompletionFormat("[RESULT]")),)).save(directory)


@pytest.fixture
def judge(tmp_path) -> Path:
    """An adapter with all that a judge is made of; its base is in `base` beside it."""
    save_seed(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained(
        tmp_path / "judge"
    )
    save_judge(tmp_path / "judge")
    return tmp_path / "judge"


def retrain(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


def edit_json(file: Path, **fields: Any) -> None:
    write_json(file, {**json.loads(file.read_text()), **fields})


def another_template(judge: Path) -> None:
    file = judge / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def another_tokenizer(judge: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(judge)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(judge)


CHANGES: dict[str, Callable[[Path], None]] = {
    "adapter weights": lambda judge: retrain(judge / "adapter_model.safetensors"),
    "adapter configuration": lambda judge: edit_json(judge / "adapter_config.json", lora_alpha=3),
    "base model's weights": lambda judge: retrain(judge.parent / "base" / "model.safetensors"),
    "base model's configuration": lambda judge: edit_json(judge.parent / "base" / "config.json", rms_norm_eps=0.1),
    "chat template": another_template,
    "tokenizer": another_tokenizer,
    "judge settings": lambda judge: save_judge(judge, (1, 2, 3, 4, 5, 6)),
}


@pytest.mark.parametrize("part", CHANGES)
def test_what_changed_in_a_model_is_told_by_its_name(judge, part):
    before = model_fingerprint(judge)
    CHANGES[part](judge)
    after = model_fingerprint(judge)
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} == {part}


def test_a_model_that_was_not_touched_is_the_same_wherever_it_lies(judge, tmp_path):
    import shutil

    shutil.copytree(judge, tmp_path / "copy")
    for name in ("README.md", "trainer_state.json", "tract_calibration.json", "checkpoint-2"):
        (tmp_path / "copy" / name).write_text("no part of the model")
    assert model_fingerprint(tmp_path / "copy") == model_fingerprint(judge)


def test_a_base_named_by_a_relative_path_counts_wherever_one_stands(judge, tmp_path, monkeypatch):
    edit_json(judge / "adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    there = model_fingerprint(judge)
    monkeypatch.chdir("/")
    assert model_fingerprint(judge) == there
    assert "base model's weights" in there


def test_the_base_of_an_adapter_is_told_at_the_revision_that_the_adapter_names(judge, monkeypatch):
    asked = []
    monkeypatch.setattr("trl_tract.files.fingerprint._snapshot", lambda *of: asked.append(of))
    edit_json(judge / "adapter_config.json", base_model_name_or_path="some/base", revision="v2")
    model_fingerprint(judge)
    assert asked == [("some/base", "v2")]


def test_a_template_beside_the_default_one_counts(judge):
    named = judge / "additional_chat_templates"
    named.mkdir()
    (named / "tool_use.jinja").write_text("one")
    before = model_fingerprint(judge)
    (named / "tool_use.jinja").write_text("another")
    assert model_fingerprint(judge)["chat template"] != before["chat template"]


def test_a_hub_id_that_nobody_has_is_told_by_nothing(monkeypatch):
    assert made_by(None, "nobody/nothing")["fingerprint"] == {}


def judged(judge: Path, out: Path, rows: list[Any], **settings: Any) -> None:
    write_jsonl(out.parent / "rows.jsonl", rows)
    settings = {"append_marker": True, "max_new_tokens": 2, "num_generations": 1, **settings}
    JudgeStep(str(judge), str(out.parent / "rows.jsonl"), str(out), settings).run()


def distilled(judge: Path, out: Path, rows: list[Any], **settings: Any) -> None:
    write_jsonl(out.parent / "rows.jsonl", rows)
    settings = {"max_new_tokens": 2, "max_attempts": 1, **settings}
    DistillStep(str(judge), str(out.parent / "rows.jsonl"), str(out), settings).run()


@pytest.mark.parametrize("make", [judged, distilled])
@pytest.mark.parametrize("part", CHANGES)
def test_results_of_another_model_are_refused_by_the_part_that_changed(judge, tmp_path, make, part):
    make(judge, tmp_path / "out", make_rows(2))
    CHANGES[part](judge)
    with pytest.raises(FileExistsError, match=rf"{part}: '\w+' there, '\w+' now"):
        make(judge, tmp_path / "out", make_rows(2))


@pytest.mark.parametrize("make", [judged, distilled])
def test_results_under_another_setting_are_refused_by_its_name(judge, tmp_path, make):
    make(judge, tmp_path / "out", make_rows(2))
    with pytest.raises(FileExistsError, match=r"seed: \w+ there, 7 now"):
        make(judge, tmp_path / "out", make_rows(2), seed=7)


def another_tokenizer_in_use(judge: Path) -> TransformersBackend:
    backend = TransformersBackend(str(judge))
    backend.tokenizer.chat_template += " "
    return backend


LOADED: dict[str, Callable[[Path], TransformersBackend]] = {
    "dtype": lambda judge: TransformersBackend(str(judge), dtype="bfloat16"),
    "merge_adapter": lambda judge: TransformersBackend(str(judge), merge_adapter=True),
    "given tokenizer": lambda judge: TransformersBackend(str(judge), make_tokenizer(split_digits=False)),
    "given chat template": another_tokenizer_in_use,
}


@pytest.mark.parametrize("name", LOADED)
def test_rationales_of_a_model_that_was_loaded_otherwise_are_refused_by_the_way(judge, tmp_path, name):
    rows = Dataset.from_list(make_rows(1))
    settings = {"max_new_tokens": 2, "max_attempts": 1}
    CoTSelfDistill(TransformersBackend(str(judge)), **settings).distill(rows, tmp_path / "out")
    with pytest.raises(FileExistsError, match=rf"{name}: .+ there, .+ now"):
        CoTSelfDistill(LOADED[name](judge), **settings).distill(rows, tmp_path / "out")


def test_a_run_knows_how_its_models_are_loaded_to_write_and_judge(judge):
    one, other = (RunSpec(str(judge), "rows", backend={"dtype": dtype}).settings() for dtype in ("float32", "bfloat16"))
    assert differences(one, other) == ["engine.dtype: 'float32' there, 'bfloat16' now"]


@pytest.mark.parametrize(("make", "result"), [(judged, "judgements.jsonl"), (distilled, "rows.jsonl")])
def test_a_row_that_was_corrected_has_its_own_result(judge, tmp_path, make, result):
    rows = make_rows(3)
    make(judge, tmp_path / "out", rows)
    rows[1] = {**rows[1], "prompt": "another prompt ->"}
    make(judge, tmp_path / "out", rows)
    make(judge, tmp_path / "fresh", rows)
    assert (tmp_path / "out" / result).read_bytes() == (tmp_path / "fresh" / result).read_bytes()


def test_scores_under_another_recalibration_are_refused_by_its_name(judge, tmp_path):
    for slope in (0.5, 0.75):
        Recalibration(slope, 1.0, 1.0, 5.0, 30, 0.5, 0.5).save(judge)
        with nullcontext() if slope == 0.5 else pytest.raises(FileExistsError, match=r"slope: 0.5 there, 0.75 now"):
            judged(judge, tmp_path / "out", make_rows(2), recalibrate=True)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_run_knows_the_template_that_a_directory_has(tmp_path, name):
    (tmp_path / name).write_text("before")
    before = contents({"chat_template": str(tmp_path)})
    (tmp_path / name).write_text("after")
    assert before
    assert contents({"chat_template": str(tmp_path)}) != before


def test_a_run_knows_the_template_that_a_file_has(judge, tmp_path):
    template = tmp_path / "own.jinja"
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    spec = RunSpec(str(judge), str(tmp_path / "rows.jsonl"), training={"chat_template_path": str(template)})
    template.write_text("one")
    before = spec.settings()
    template.write_text("another")
    (changed,) = differences(before, spec.settings())
    assert changed.startswith("contents.chat_template: ")


@pytest.mark.parametrize("make", [judged, distilled])
def test_results_that_do_not_say_what_made_them_are_of_an_earlier_version(judge, tmp_path, make):
    make(judge, tmp_path / "out", make_rows(2))
    settings = read_json(tmp_path / "out" / "settings.json")
    del settings["trl_tract"]
    write_json(tmp_path / "out" / "settings.json", settings)
    with pytest.raises(FileExistsError, match="of an earlier version"):
        make(judge, tmp_path / "out", make_rows(2))


def test_results_know_what_they_were_made_by(judge, tmp_path):
    judged(judge, tmp_path / "out", make_rows(2))
    settings = read_json(tmp_path / "out" / "settings.json")
    assert {"adapter weights", "base model's weights", "tokenizer", "judge settings"} <= settings["fingerprint"].keys()
    assert settings["trl_tract"]


def test_how_rationales_are_sampled_is_no_setting_of_a_judge_without_any(judge, tmp_path):
    edit_json(judge / "tract_config.json", writes_rationale=False)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    for temperature in (0.5, 0.7):  # the second time it is the same judging
        settings = {"temperature": temperature, "num_generations": 1, "max_attempts": 3, "seed": 1}
        JudgeStep(str(judge), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), settings).run()
    with pytest.raises(ValueError, match="num_generations=4"):  # also where all is judged already
        JudgeStep(str(judge), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), {"num_generations": 4}).run()
    assert read_json(tmp_path / "out" / "settings.json").keys() & settings.keys() == {"seed"}


def test_a_checkpoint_is_not_gone_on_from_with_another_adapter(judge, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    training = {"max_steps": 1, "save_steps": 1, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-4}

    def train(**settings):
        rows, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "out")
        model_args = {"use_peft": True, **settings}
        TrainStep(str(tmp_path / "base"), rows, out, training=training, model_args=model_args).run()

    train(lora_alpha=8)
    with pytest.raises(FileExistsError, match=r"model_args.lora_alpha: 8 there, 16 now"):
        train(lora_alpha=16)


def trained(tmp_path: Path, **training: Any) -> dict[str, Any]:
    """The state of a training, or of one that goes on from its checkpoint."""
    write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    settings = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-4, **training}
    out = tmp_path / "out"
    TrainStep(str(tmp_path / "base"), str(tmp_path / "rows.jsonl"), str(out), training=settings).run()
    return json.loads((out / "trainer_state.json").read_text())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"learning_rate": 1e-3}, "training.learning_rate: 0.0001 there, 0.001 now"),
        ({"max_steps": 2}, "training.max_steps: 1 there, 2 now"),
        ({"lr_scheduler_type": "constant"}, "training.lr_scheduler_type: 'linear' there, 'constant' now"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps x processes: 8 there, 16 now"),
    ],
)
def test_a_checkpoint_is_not_gone_on_from_with_other_settings_of_training(judge, tmp_path, other, told):
    trained(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(told)):
        trained(tmp_path, **other)


def test_a_checkpoint_is_gone_on_from_with_other_settings_of_what_changes_no_weight(judge, tmp_path):
    first = trained(tmp_path, logging_steps=1)
    again = trained(tmp_path, logging_steps=2, save_steps=7, eval_steps=3, gradient_checkpointing=False, use_cpu=True,
                    per_device_train_batch_size=4, gradient_accumulation_steps=2)  # fmt: skip
    assert again["global_step"] == 1
    assert again["log_history"][0] == first["log_history"][0]  # it was not trained again


def test_a_checkpoint_that_does_not_tell_the_settings_of_its_training_is_gone_on_from(judge, tmp_path):
    trained(tmp_path)
    made_of = checkpoint_made_of(tmp_path / "out" / "checkpoint-1")
    del made_of["training"]
    seal_checkpoint(tmp_path / "out" / "checkpoint-1", made_of)
    assert trained(tmp_path, max_steps=2)["global_step"] == 2


def test_training_starts_from_no_adapter(judge, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    with pytest.raises(ValueError, match="is an adapter"):
        TrainStep(str(judge), str(tmp_path / "rows.jsonl"), str(tmp_path / "out")).run()
    with pytest.raises(ValueError, match="is an adapter"):
        run_tract(str(judge), str(tmp_path / "rows.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gold_score_that_cannot_be_read_is_told_before_anything_is_done(judge, tmp_path):
    with pytest.raises(ValueError, match="row 1: "):
        judged(judge, tmp_path / "out", [make_rows(1)[0], {**make_rows(1)[0], "score": "n/a"}])
    assert not (tmp_path / "out").exists()


def test_the_dtype_is_one_of_the_settings(judge, tmp_path):
    judged(judge, tmp_path / "out", make_rows(1))
    step = JudgeStep(str(judge), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), {"append_marker": True})
    step.settings |= {"max_new_tokens": 2, "num_generations": 1}
    step.backend = {"dtype": "bfloat16"}
    with pytest.raises(FileExistsError, match="dtype: None there, 'bfloat16' now"):
        step.run()


def write_weights(file: Path, tensors: dict[str, int]) -> dict[str, int]:
    """A file of weights as safetensors lays them out, all zero and taking no disk; where each tensor begins."""
    begins, offset = {}, 0
    for name, size in tensors.items():
        begins[name], offset = offset, offset + size
    header = {name: {"dtype": "U8", "shape": [size], "data_offsets": [begins[name], begins[name] + size]}
              for name, size in tensors.items()}  # fmt: skip
    text = json.dumps(header).encode()
    with file.open("wb") as content:
        content.write(struct.pack("<Q", len(text)) + text)
        content.truncate(8 + len(text) + offset)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}


LAYERS = {f"layer.{number}.{part}": size for number in range(24) for part, size in (("norm", 8192), ("weight", 2**25))}


def test_large_weights_are_read_at_the_ends_of_every_tensor_and_in_every_mebibyte(tmp_path):
    file, places = tmp_path / "model.safetensors", random.Random(0)
    begins = write_weights(file, LAYERS)
    before = file_digests([file])
    for name in places.sample(sorted(begins), 12):
        middle = begins[name] + LAYERS[name] // 2
        for place in (begins[name], begins[name] + LAYERS[name] - 1, middle - middle % 2**20):
            with file.open("r+b") as content:
                content.seek(place)
                content.write(b"\x01")
                content.flush()
                assert file_digests([file]) != before, (name, place)
                content.seek(place)
                content.write(b"\x00")
    assert file_digests([file]) == before


@pytest.mark.slow
def test_16_gb_of_weights_take_five_seconds_at_most(tmp_path):
    for shard in range(4):
        write_weights(tmp_path / f"model-{shard}.safetensors", {f"{shard}.{i}": 2**27 for i in range(32)})
    started = time.monotonic()
    model_fingerprint(tmp_path)
    assert time.monotonic() - started < 5


def test_a_loaded_model_that_was_trained_on_is_another_one(tmp_path):
    model = make_model()
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(2))

    def distil() -> None:
        backend = TransformersBackend(model, TOKENIZER)
        CoTSelfDistill(backend, max_new_tokens=2, max_attempts=1).distill_file(data, tmp_path / "out")

    distil()
    distil()
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    with pytest.raises(FileExistsError, match=r"there, .* now"):
        distil()
    assert len(list(read_jsonl(tmp_path / "out" / "rows.jsonl"))) == 2
