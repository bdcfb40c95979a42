"""Steps of a run: done once, and again when what they made is gone, was changed, or was made of something else."""

from pathlib import Path

import pytest

from trl_tract.files.journal import read_json
from trl_tract.runs.run import Run, finished_steps
from trl_tract.runs.train_steps import TrainStep

TITLES = {"rows": "Rows", "model": "Model", "judging": "Judging"}


class Steps:
    """Three steps, each made of the one before, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.done: list[str] = []
        self.said: list[str] = []
        self.row = "a row"

    def rows(self) -> None:
        self.done.append("rows")
        (self.directory / "train.jsonl").write_text(self.row)

    def model(self) -> None:
        self.done.append("model")
        (self.directory / "tract" / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        weights = (self.directory / "train.jsonl").read_text()
        for name in ("model.safetensors", "checkpoint-2/model.safetensors", "README.md", "training_args.bin"):
            (self.directory / "tract" / name).write_text(weights)
        (self.directory / "tract" / "trainer_state.json").write_text(str(len(self.done)))  # as seconds in it would

    def judging(self) -> None:
        self.done.append("judging")
        (self.directory / "judged" / "blocks").mkdir(parents=True, exist_ok=True)
        scores = (self.directory / "tract" / "model.safetensors").read_text()
        for name in ("judgements.jsonl", "settings.json", "finished.json", "blocks/000000.jsonl"):
            (self.directory / "judged" / name).write_text(scores)

    def run(self) -> list[str]:
        """Which steps were done."""
        self.done, self.said = [], []
        run = Run(self.directory, {"a": {"b": 1}}, isolate=False, total=3, say=self.said.append)
        run.step("rows", TITLES["rows"], self.rows, makes=["train.jsonl"])
        run.step("model", TITLES["model"], self.model, makes=["tract"], of=["rows"])
        run.step("judging", TITLES["judging"], self.judging, makes=["judged"], of=["model"])
        return self.done


@pytest.fixture
def steps(tmp_path) -> Steps:
    steps = Steps(tmp_path / "out")
    assert steps.run() == list(TITLES)
    return steps


def test_steps_are_done_once(steps):
    assert steps.run() == []
    assert [line.split(":")[0] for line in steps.said] == ["[1/3] Rows", "[2/3] Model", "[3/3] Judging"]


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("train.jsonl", ["rows"]),
        ("tract/model.safetensors", ["model"]),
        ("tract/trainer_state.json", ["model"]),
        ("judged/judgements.jsonl", ["judging"]),
        ("judged/settings.json", ["judging"]),
        ("judged/finished.json", ["judging"]),
        ("tract/README.md", []),  # its owner may write on
        ("tract/checkpoint-2/model.safetensors", []),
    ],
)
@pytest.mark.parametrize("how", ["deleted", "cut", "changed"])
def test_a_step_is_done_again_when_a_file_of_its_result_is_not_as_it_was(steps, file, again, how):
    path = steps.directory / file
    content = path.read_bytes()
    path.unlink() if how == "deleted" else path.write_bytes(content[:-1] + (b"" if how == "cut" else b"\x00"))
    assert steps.run() == again
    assert any(f"{file}: missing or changed since" in line for line in steps.said) == bool(again)
    assert steps.run() == []


def test_a_step_is_done_again_when_its_folder_was_deleted(steps):
    import shutil

    shutil.rmtree(steps.directory / "tract")
    assert steps.run() == ["model"]  # the same model again, so its judgements stand


def test_what_was_made_of_another_result_is_deleted_and_made_anew(steps):
    (steps.directory / "train.jsonl").unlink()
    steps.row = "another row"
    stale = steps.directory / "judged" / "blocks" / "000001.jsonl"
    stale.write_text("of the model before")
    assert steps.run() == ["rows", "model", "judging"]
    assert not stale.exists()
    assert (steps.directory / "judged" / "judgements.jsonl").read_text() == "another row"


def test_what_was_begun_of_another_result_is_deleted_too(steps):
    def cut() -> None:
        steps.real()
        raise KeyboardInterrupt

    (steps.directory / "train.jsonl").unlink()
    steps.row, steps.real, steps.judging = "another row", steps.judging, cut
    with pytest.raises(KeyboardInterrupt):
        steps.run()
    begun = steps.directory / "judged" / "blocks" / "000001.jsonl"
    begun.write_text("of the model before")
    (steps.directory / "train.jsonl").unlink()
    steps.row, steps.judging = "a third row", steps.real
    steps.run()
    assert not begun.exists()


def test_steps_that_were_cut_are_not_finished(steps):
    (steps.directory / "train.jsonl").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "rows", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steps.run()
    assert finished_steps(steps.directory).keys() == {"model", "judging"}


@pytest.mark.parametrize("name", ["steps.json", "settings.json"])
@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("0", "1", 1), lambda text: ""])
def test_damaged_notes_are_named(steps, name, damage):
    file = steps.directory / name
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=rf"{name} is damaged .*Restore it from a copy"):
        steps.run()


def test_a_setting_inside_another_is_told_by_its_name_with_both_values(steps):
    with pytest.raises(FileExistsError, match=r"holds another run \(a.b: 1 there, 2 now\)"):
        Run(steps.directory, {"a": {"b": 2}}, total=3, say=print)


def test_a_link_in_the_directory_is_refused(steps, tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (steps.directory / "tract" / "model.safetensors").unlink()
    (steps.directory / "tract" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"model.safetensors is a symbolic link"):
        steps.run()
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_link_is_refused_where_nothing_was_trained_yet(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    Run(tmp_path / "out", {"a": 1}, total=3, say=print)
    (tmp_path / "out" / "train.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"train.jsonl is a symbolic link"):
        Run(tmp_path / "out", {"a": 1}, total=3, say=print)


def test_a_training_in_a_directory_with_a_link_is_refused(tmp_path):
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(FileExistsError, match=r"eval.jsonl is a symbolic link"):
        TrainStep(str(tmp_path / "seed"), str(tmp_path / "rows.jsonl"), str(tmp_path / "out")).run()


def test_what_is_written_down_is_whole(steps):
    assert read_json(steps.directory / "steps.json").keys() == set(TITLES)
