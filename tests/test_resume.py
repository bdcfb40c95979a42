"""A run that is killed, between checkpoints or while it writes one, ends where the run that was not killed ends."""

import json
import shutil
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, make_trainer
from transformers import TrainerCallback

from trl_tract import TRACTConfig
from trl_tract.files.checkpoints import last_complete_checkpoint
from trl_tract.training.resuming import checkpoint_of, training_settings

TOKENIZER = make_tokenizer()
STEPS = 12
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def trainer_of(output_dir: Path, steps: int = STEPS):
    # Dropout would show a random state that was not restored, AdamW one that was not saved.
    model = make_model(std=0.05)
    model.config.attention_dropout = 0.1
    return make_trainer(
        output_dir,
        make_rows(14),
        model=model,
        tokenizer=TOKENIZER,
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        save_strategy="steps",
        save_steps=2,
        logging_strategy="steps",
        logging_steps=1,
    )


def train_to_the_end(output_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and log of a run that goes on from whatever is in the directory."""
    trainer = trainer_of(output_dir)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir) is not None)
    log = [{k: v for k, v in entry.items() if k in ("step", "loss/score", "score/expected", "loss/rationale")}
           for entry in trainer.state.log_history if "loss/score" in entry]  # fmt: skip
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}, log


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train_to_the_end(tmp_path_factory.mktemp("whole"))


def assert_ends_alike(output_dir: Path, uninterrupted) -> None:
    weights, log = train_to_the_end(output_dir)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert log == uninterrupted[1]  # every step's means, counts of scores and tokens included
    for name, weight in uninterrupted[0].items():
        assert torch.equal(weights[name], weight), name


def train_and_leave_a_trace(output_dir: Path) -> None:
    class Trace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (output_dir / f"step-{state.global_step}").touch()

    trainer = trainer_of(output_dir)
    trainer.add_callback(Trace())
    trainer.train()


def killed_when(output_dir: Path, moment) -> None:
    """Start the training in a process of its own and kill it as soon as `moment()` is true."""
    process = processes.start(train_and_leave_a_trace, output_dir)
    deadline = time.monotonic() + 120
    while not moment():
        assert process.exitcode is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("step", "file"), [(4, "model.safetensors"), (8, "optimizer.pt"), (4, "trainer_state.json")])
def test_killed_while_a_checkpoint_is_written(tmp_path, uninterrupted, step, file):
    killed_when(tmp_path, lambda: (tmp_path / f"checkpoint-{step}" / file).exists())
    assert_ends_alike(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("step", [1, 7])
def test_killed_between_checkpoints(tmp_path, uninterrupted, step):
    killed_when(tmp_path, (tmp_path / f"step-{step}").exists)
    assert_ends_alike(tmp_path, uninterrupted)


# The same without processes: every state that a kill can leave, made by hand.


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """The run's directory as it is after 4 of its 12 steps."""
    output = tmp_path_factory.mktemp("halfway")

    class StopAtFour(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = trainer_of(output)
    trainer.add_callback(StopAtFour())
    trainer.train()
    return output


@pytest.mark.parametrize("kept", range(len(FILES) + 1))
def test_a_checkpoint_that_lacks_a_file_is_passed_over(tmp_path, halfway, uninterrupted, kept):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    for file in FILES[kept:]:
        (tmp_path / "checkpoint-4" / file).unlink()
    wanted = "checkpoint-4" if kept == len(FILES) else "checkpoint-2"
    assert last_complete_checkpoint(tmp_path).name == wanted
    assert_ends_alike(tmp_path, uninterrupted)


@pytest.mark.parametrize("state", ["", '{"global_step": 4, "log_hi', "[]"])
def test_a_checkpoint_whose_state_is_cut_is_passed_over(tmp_path, state):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_directory_without_checkpoints_has_none(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None


OTHER: dict[str, dict] = {
    "score_values": {"score_values": [0, 1, 2, 3, 4, 5]},
    "score_marker": {"score_marker": "[SCORE]"},
    "raft_weight": {"raft_weight": 2.0},
    "rationale_weight": {"rationale_weight": 0.5},
    "score_in_ce": {"score_in_ce": True},
    "drop_rationale": {"drop_rationale": True},
    "normalize_grid": {"normalize_grid": True},
    "annotator_loss": {"annotator_loss": "distribution"},
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_that_was_trained_towards_something_else_is_refused_by_name(tmp_path, halfway, name):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    rows = [row | {"completion": row["completion"].replace("[RESULT]", OTHER[name].get("score_marker", "[RESULT]"))}
            for row in make_rows(14)]  # fmt: skip
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, max_steps=STEPS, **OTHER[name])
    then, now = trainer_of(tmp_path).args.objective[name], trainer.args.objective[name]
    for resume in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(ValueError, match=name) as caught:
            trainer.train(resume_from_checkpoint=resume)
        for value in (then, now):
            assert (", ".join(map(str, value)) if isinstance(value, list) else repr(value)) in str(caught.value)


def test_how_the_checkpoint_is_chosen_is_a_setting_of_training_where_one_is():
    def settings(**given):
        return training_settings(TRACTConfig("out", use_cpu=True, bf16=False, eval_strategy="epoch", **given))

    assert settings(judge_eval_settings={"seed": 1}) == settings()
    chosen = {"load_best_model_at_end": True, "save_strategy": "epoch"}
    assert settings(judge_eval_settings={"seed": 1}, **chosen) != settings(**chosen)


@pytest.mark.parametrize("name", ["score_values", "score_marker", "drop_rationale", "normalize_grid"])
def test_an_older_checkpoint_is_refused_by_what_it_says(tmp_path, halfway, name):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / "tract_objective.json").unlink()
    args = TRACTConfig(str(tmp_path), use_cpu=True, bf16=False, **OTHER[name])
    with pytest.raises(ValueError, match=name):
        checkpoint_of(True, args, None)
    assert checkpoint_of(True, trainer_of(tmp_path).args, None) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path, halfway):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    for name in ("tract_objective.json", "tract_config.json"):  # as SFTTrainer leaves it
        (tmp_path / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is not a checkpoint of this trainer.*another output_dir"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path, halfway):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):  # as save_only_model leaves it
        (tmp_path / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no optimizer state.*save_only_model"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("steps", [4, 6])  # at the end of an epoch, and within one
def test_a_run_that_has_its_last_checkpoint_trains_no_further_step(tmp_path, steps):
    trainer = trainer_of(tmp_path, steps)
    trainer.train()
    saved = tmp_path / f"checkpoint-{steps}"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in saved.iterdir()}
    again = trainer_of(tmp_path, steps)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in saved.iterdir()} == before
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize("content", ["", "[", '{"raft_weight": 1.0', "5"])
def test_a_checkpoint_whose_objective_is_damaged_is_refused(tmp_path, halfway, content):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / "tract_objective.json").write_text(content)
    with pytest.raises(ValueError, match=r"tract_objective\.json"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_flipped_digit_in_a_checkpoints_objective_is_noticed(tmp_path, halfway):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint-4" / "tract_objective.json"
    file.write_text(file.read_text().replace('"annotator_weight": 0.0', '"annotator_weight": 1.0'))
    with pytest.raises(ValueError, match=r"tract_objective\.json is damaged \(it does not match its checksum\)"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match="out/checkpoint-7"):
        trainer_of(tmp_path).train(resume_from_checkpoint="out/checkpoint-7")


def dated(output_dir: Path, **settings):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} " + tokenizer.chat_template
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    return make_trainer(output_dir, make_rows(4, chat=True), tokenizer=tokenizer, **settings)


def test_a_run_that_goes_on_another_day_has_the_prompts_of_the_first(tmp_path):
    first = dated(tmp_path, template_date="2020-02-03", max_steps=1)
    first.train()
    again = dated(tmp_path)  # today
    assert again.train_dataset["input_ids"] == first.train_dataset["input_ids"]
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_a_checkpoint_of_another_date_is_refused(tmp_path):
    dated(tmp_path, template_date="2020-02-03").train()
    with pytest.raises(ValueError, match="template_date was '2020-02-03' and is '2021-01-01'"):
        dated(tmp_path, template_date="2021-01-01").train(resume_from_checkpoint=True)
