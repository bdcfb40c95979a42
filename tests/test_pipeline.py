"""Both stages from one call, on disk, resumable, each from the seed model."""

import itertools
import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from conftest import make_model, make_rows
from safetensors.torch import load_file

from trl_tract import CoTRAILJudge, TransformersBackend, run_tract, score_report
from trl_tract.cli import COMMANDS, main
from trl_tract.files.journal import digest, read_json, read_jsonl, write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.runs.results import JUDGED, write_run_page
from trl_tract.runs.run import Run
from trl_tract.runs.spec import RunSpec
from trl_tract.runs.step_names import STEPS
from trl_tract.saved.judge_config import JudgeConfig

TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
GENERATION = {"max_new_tokens": 6, "max_attempts": 1}


@pytest.fixture(scope="module")
def finished(seed_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_jsonl(directory / "rows.jsonl", make_rows(12))
    said = []
    result = run_tract(
        Path(seed_model),  # paths may be Path
        directory / "rows.jsonl",
        directory / "out",
        eval_fraction=0.34,
        training=TRAINING,
        generation=GENERATION,
        objective="paper",
        say=said.append,
    )
    return directory, result, said


def test_every_step_leaves_its_result(finished):
    directory, result, _ = finished
    out = directory / "out"
    for name in ("stage1/tract_config.json", "self-generated/rows.jsonl", "tract/tract_config.json", "report.json"):
        assert (out / name).is_file(), name
    assert set(result.reports) == {"stage one", "TRACT"}
    assert len(list(read_jsonl(out / "judged-tract" / "judgements.jsonl"))) == 4


def test_the_report_says_why_items_have_no_score(finished):
    # The random model never writes its marker.
    errors = finished[1].errors["TRACT"]
    assert sum(errors.values()) == 4
    assert all(reason.startswith("no rationale reached '[RESULT]' in 1 attempts") for reason in errors)
    report = json.loads((finished[0] / "out" / "report.json").read_text())
    assert report["judges"]["TRACT"]["errors"] == errors


def test_a_run_ends_with_a_page_and_its_pictures(finished):
    out = finished[0] / "out"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "0 of 4 items scored, 4 without a score" in page
    assert "Learning curves" in page
    assert "stage one" in page
    assert (out / "report-plots" / "learning-loss-score.png").is_file()


def test_a_run_ends_with_a_card_that_tells_of_both_stages_and_the_evaluation(finished):
    card = (finished[0] / "out" / "tract" / "README.md").read_text(encoding="utf-8")
    assert "### Stage one" in card
    assert "- Data: `rows.jsonl`, with the gold scores of both stages" in card
    assert "### Stage one\n\n- Rows: 8\n\n### Stage two\n\n- Rows: 8\n" in card
    # The random model never writes its marker, so each row kept its annotated rationale.
    assert "- Rationales annotated: 8 of 8, 100.0%\n" in card
    assert "- Items without a score: 4 (no rationale reached" in card
    assert str(finished[0]) not in card


def test_a_run_without_matplotlib_ends_with_everything_but_the_page(finished, monkeypatch):
    out, result, _ = finished[0] / "out", *finished[1:]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    judges = {name: Judged(out / JUDGED[name]).scales[""] for name in ("stage one", "TRACT")}
    write_run_page(out, judges, result.reports, said.append)
    assert said == ['    no HTML report: The HTML report needs matplotlib: pip install "trl-tract[report]"']


def test_stage_two_starts_from_the_seed_model(finished):
    # This random model never writes its marker, so stage two is given stage one's rows again. Started from the seed
    # model, with the same rows and seed, it has to end with the very weights of stage one.
    out = finished[0] / "out"
    assert json.loads((out / "self-generated" / "summary.json").read_text())["annotated"] == 8
    one, two = (load_file(out / stage / "model.safetensors") for stage in ("stage1", "tract"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stage_two_trains_on_the_self_generated_rows(finished):
    out = finished[0] / "out"
    assert json.loads((out / "stage2.json").read_text())["train_data"].endswith("self-generated/rows.jsonl")


def test_a_finished_run_does_nothing_again(finished, seed_model):
    directory, first, _ = finished
    said = []
    again = run_tract(
        seed_model,
        str(directory / "rows.jsonl"),
        directory / "out",
        eval_fraction=0.34,
        training=TRAINING,
        generation=GENERATION,
        objective="paper",
        say=said.append,
    )
    assert sum("finished before" in line for line in said) == 7
    assert str(again.reports["TRACT"]) == str(first.reports["TRACT"])


def test_a_run_goes_on_at_the_first_unfinished_step(tmp_path):
    done = []

    def fail() -> None:
        raise RuntimeError("power cut")

    run = Run(tmp_path, {"a": 1}, total=2, say=lambda line: None)
    run.step("one", "one", lambda: done.append("one"), makes=[])
    with pytest.raises(RuntimeError):
        run.step("two", "two", fail, makes=[])
    run = Run(tmp_path, {"a": 1}, total=2, say=lambda line: None)
    run.step("one", "one", lambda: done.append("one"), makes=[])
    run.step("two", "two", lambda: done.append("two"), makes=[])
    assert done == ["one", "two"]


def test_two_processes_do_not_work_in_one_directory(tmp_path):
    def work() -> None:
        # What a second process would find while this step is being done.
        same = Run(tmp_path, {"a": 1}, total=2, say=lambda line: None)
        with pytest.raises(RuntimeError, match="another process is working in"):
            same.step("one", "one", lambda: done.append("twice"), makes=[])
        with pytest.raises(RuntimeError, match="another process is working in"):
            Run(tmp_path, {"a": 2}, total=2, say=lambda line: None)  # nothing is trained yet, so it would start anew
        done.append("once")

    done: list[str] = []
    Run(tmp_path, {"a": 1}, total=2, say=lambda line: None).step("one", "one", work, makes=[])
    assert done == ["once"]
    assert read_json(tmp_path / "settings.json") == {"a": 1}


def test_what_another_process_finished_meanwhile_is_not_done_again(tmp_path):
    done: list[str] = []
    first, second = (Run(tmp_path, {"a": 1}, total=2, say=lambda line: None) for _ in range(2))
    first.step("one", "one", lambda: done.append("one"), makes=[])
    second.step("one", "one", lambda: done.append("again"), makes=[])
    second.step("two", "two", lambda: done.append("two"), makes=[])
    assert done == ["one", "two"]
    assert read_json(tmp_path / "steps.json").keys() == {"one", "two"}


def test_another_runs_directory_is_refused(finished, seed_model):
    directory, _, _ = finished
    with pytest.raises(FileExistsError, match=r"on_failure: 'keep_gold' there, 'drop' now"):
        run_tract(
            seed_model,
            str(directory / "rows.jsonl"),
            directory / "out",
            eval_fraction=0.34,
            training=TRAINING,
            generation=GENERATION,
            objective="paper",
            on_failure="drop",
        )


@pytest.fixture
def again(finished, seed_model, tmp_path):
    """A copy of the finished run, and a function that starts it again and gives what it says."""
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "out", out)

    def start(model: str = seed_model, data: Path = finished[0] / "rows.jsonl", **settings: Any) -> list[str]:
        said: list[str] = []
        given = {"training": TRAINING, "generation": GENERATION, "eval_fraction": 0.34, "objective": "paper"}
        run_tract(model, str(data), out, **{**given, **settings}, say=said.append)
        return said

    return out, start


def results(out: Path) -> dict[str, Any]:
    """What a run comes to: its judgements, stage-two rows and figures."""
    files = ("judged-stage1/judgements.jsonl", "judged-tract/judgements.jsonl", "self-generated/rows.jsonl")
    figures = json.loads((out / "report.json").read_text())
    return {name: (out / name).read_bytes() for name in files} | {"judges": figures["judges"]}


def test_a_run_whose_model_was_deleted_makes_it_again(again):
    out, start = again
    weights = load_file(out / "tract" / "model.safetensors")
    shutil.rmtree(out / "tract")
    said = start()
    assert sum("finished before" in line for line in said) == 6
    assert all(
        torch.equal(weight, weights[name]) for name, weight in load_file(out / "tract/model.safetensors").items()
    )


def test_the_seed_model_can_be_judged_too_also_when_the_rest_is_finished(again, seed_model):
    out, start = again
    said = start(seed_baseline=True)
    assert sum("finished before" in line for line in said) == 6  # all but the new step and the report
    config = JudgeConfig.load(out / "tract")
    judge = CoTRAILJudge.from_config(
        config, TransformersBackend(seed_model), **GENERATION, append_marker=True, normalize_grid=True
    )
    items = list(read_jsonl(out / "eval.jsonl"))
    rmse = score_report([each.score for each in judge.judge(items)], [item["score"] for item in items]).rmse.value
    judges = json.loads((out / "report.json").read_text())["judges"]
    assert list(judges) == ["seed model", "stage one", "TRACT"]
    assert judges["seed model"]["rmse"]["value"] == pytest.approx(rmse)
    card = (out / "tract" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| metric \| value \| 95 % interval \|( [\w ]+ \|)? seed model \|", card)
    assert re.search(rf"\| rmse \|.*\| {rmse:.3f} \|$", card, re.MULTILINE)
    assert "<bdi>seed model</bdi>" in (out / "report.html").read_text(encoding="utf-8")


def files_that_count(out: Path) -> list[Path]:
    """Every file that a run leaves but locks, cards, the specs of steps, and blocks of a finished result."""
    names = {"README.md", "training_args.bin"}
    specs = {f"{step}.json" for step in STEPS}
    return [
        path
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and path.suffix != ".lock"
        and path.name not in names | specs | {".lock"}
        and path.parent.name != "blocks"
    ]


def damages(out: Path) -> list[tuple[Path, int, int | None]]:
    """Of each file that counts: a place to cut it at, and a bit to flip at its ends and in each of its thirds."""
    chance, found = random.Random(0), []
    for path in files_that_count(out):
        size = path.stat().st_size
        found.append((path, chance.randrange(size), None))
        thirds = [size * third // 3 for third in range(4)]
        inside = [chance.randrange(first, max(end, first + 1)) for first, end in itertools.pairwise(thirds)]
        found += [(path, place, 1 << chance.randrange(8)) for place in (0, *inside, size - 1)]
    return found


@pytest.mark.parametrize("count", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_no_cut_and_no_flipped_bit_in_any_file_of_a_run_changes_its_results(again, count):
    out, start = again
    expected, every = results(out), damages(out)
    for path, place, bit in random.Random(0).sample(every, count or len(every)):
        whole = path.read_bytes()
        damaged, place = bytearray(whole), min(place, len(whole) - 1)  # made again, some are shorter
        damaged[place] ^= bit or 0
        path.write_bytes(damaged[:place] if bit is None else damaged)
        try:
            said = start()
        except (ValueError, FileExistsError) as error:
            if path.name not in ("settings.json", "steps.json") or path.parent != out:
                raise AssertionError(path) from error
            path.write_bytes(whole)
            continue
        assert results(out) == expected, path
        assert any(f"{path.relative_to(out)}: missing or changed since" in line for line in said), path


@pytest.mark.parametrize("touched", ["seed model", "rows"])
def test_a_run_goes_on_with_its_own_seed_model_and_rows_alone(again, finished, seed_model, tmp_path, touched):
    _, start = again
    model, data = tmp_path / "seed", tmp_path / "rows.jsonl"
    shutil.copytree(seed_model, model)
    shutil.copy(finished[0] / "rows.jsonl", data)
    assert sum("finished before" in line for line in start(str(model), data)) == 7
    if touched == "seed model":
        make_model(seed=1).save_pretrained(model)
    else:
        write_jsonl(data, make_rows(12, seed=1))
    name = {"seed model": "model weights", "rows": "contents.data"}[touched]
    with pytest.raises(FileExistsError, match=rf"holds another run \({name}: '\w+' there, '\w+' now\)"):
        start(str(model), data)


def test_an_option_of_training_is_told_by_its_name_with_both_values(again):
    _, start = again
    with pytest.raises(FileExistsError, match=r"\(training.learning_rate: 0.001 there, 0.002 now\)"):
        start(training={**TRAINING, "learning_rate": 2e-3})


def test_secrets_among_the_options_are_not_written_down(seed_model, tmp_path):
    spec = RunSpec(seed_model, "rows.jsonl", training={"hub_token": "hf_planted"})
    assert "hf_planted" not in json.dumps(spec.settings())


def test_a_run_without_rationales_has_one_stage_and_writes_none(seed_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no pictures
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    # Of two people's scores, and no completions at all.
    rows = [{"prompt": row["prompt"], "score": [row["score"], 3.0]} for row in make_rows(9)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    said: list[str] = []
    out = tmp_path / "out"
    result = run_tract(seed_model, str(tmp_path / "rows.jsonl"), out, eval_fraction=0.34, training=TRAINING,
                       rationales="none", objective="paper", say=said.append)  # fmt: skip
    assert [line[:5] for line in said if line.startswith("[")] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert set(result.reports) == {"TRACT"}
    assert {record["error"] for record in read_jsonl(out / "judged-tract" / "judgements.jsonl")} == {None}
    assert not (out / "stage1").exists()
    assert not (out / "self-generated").exists()
    assert " The judge scored without rationales. " in (out / "tract" / "README.md").read_text(encoding="utf-8")
    (standing,) = (judge["standing"] for judge in json.loads((out / "report.json").read_text())["judges"].values())
    assert standing["raters"]["n"] == 3


def test_figures_know_what_they_were_made_of(finished):
    made_of = json.loads((finished[0] / "out" / "report.json").read_text())["made_of"]["TRACT"]
    assert "model weights" in made_of["fingerprint"]
    assert made_of["rows_digest"] == digest(read_jsonl(finished[0] / "out" / "eval.jsonl"))


def test_the_judge_of_a_run_loads_and_judges(finished):
    judge = CoTRAILJudge.from_pretrained(finished[1].model, append_marker=True, max_new_tokens=4)
    (judgement,) = judge.judge([make_rows(1)[0]])
    assert judgement.error is None
    assert 0 <= judgement.score <= 5


@pytest.mark.process
def test_a_step_in_a_process_of_its_own_gives_the_same_judgements(finished, tmp_path):
    out = finished[0] / "out"
    spec = {**json.loads((out / "judge-tract.json").read_text()), "output_dir": str(tmp_path / "again")}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    process = processes.start_module("trl_tract.runs.steps", str(tmp_path / "spec.json"))
    process.join()
    assert process.exitcode == 0
    assert list(read_jsonl(tmp_path / "again" / "judgements.jsonl")) == list(
        read_jsonl(out / "judged-tract" / "judgements.jsonl")
    )


def test_help_of_the_command_line(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"trl-tract {command}" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    assert main(["trian"]) == 2
    assert "unknown command 'trian'. Choose one of demo, check, run" in capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert main(["report", "--judgements", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("trl-tract report: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("command", ["judge", "distill"])
def test_a_model_that_is_not_there_is_said_before_anything_is_loaded(command, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert main([command, "--model", str(tmp_path / "nowhere"), *paths]) == 1
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'nowhere'} is not a model directory" in printed
    assert "saved by TRACTTrainer.save_model()" in printed
    assert not (tmp_path / "out").exists()  # the directory is still free for the right model


def write_judgements(directory, scores, **columns):
    """A directory as `trl-tract judge` leaves it: eight items of four questions."""
    directory.mkdir()
    records = [
        {"reference": float(1 + i % 4), "group": f"q{i // 2}", "score": score, "grid_mass": 0.75, "error": None}
        for i, score in enumerate(scores)
    ]
    write_jsonl(directory / "judgements.jsonl", [{**record, **columns} for record in records])
    return str(directory)


def test_two_judges_are_reported_on_and_compared(tmp_path, capsys):
    a = write_judgements(tmp_path / "a", [1, 2, 3, 4, 1, 2, 3, 4.2])
    b = write_judgements(tmp_path / "b", [2, 2, 3, 3, 2, 2, 4, 3])
    assert main(["report", a, b, "--n_bootstrap", "20"]) == 0
    printed = capsys.readouterr().out
    assert f"{a} (grid mass 0.750)" in printed
    assert f"a: {a}, b: {b}" in printed
    # Absolute errors: 0.2 of a, 1 + 1 + 1 + 1 + 1 of b, over 8 items.
    difference = printed.split(f"a: {a}")[1]
    assert difference.split("mae")[1].split()[0] == "-0.600"
    assert "no intervals: 4 groups, but 5 are needed" in difference


@pytest.mark.parametrize(
    ("scores", "columns", "message"),
    [
        ([1, 2], {}, r"has 8 judgements and .*b has 2"),
        ([1] * 8, {"reference": 2.0}, r"judgement 0 has reference 1.0 in .*a and 2.0 in .*b"),
        ([1] * 8, {"group": "q0"}, r"judgement 2 has group 'q1'"),
    ],
)
def test_judges_of_different_items_are_not_compared(scores, columns, message, tmp_path, capsys):
    a, b = write_judgements(tmp_path / "a", [1] * 8), write_judgements(tmp_path / "b", scores, **columns)
    assert main(["report", a, b]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("grid", [["1", "2.1", "4.1"], ["1", "2.1..4.1..2"]])
def test_a_report_rounds_to_the_grid_that_it_is_given(grid, tmp_path, capsys):
    folder = write_judgements(tmp_path / "a", [1, 2, 3, 4, 1, 2, 3, 3.4])
    assert main(["report", folder, "--n_bootstrap", "0", "--score_values", *grid]) == 0
    # The last score, 3.4, and its gold score of 4 are both nearest 4.1: all eight agree. Of the integers it is a 3.
    assert "accuracy 1.000" in " ".join(capsys.readouterr().out.split())


def test_three_judges_are_one_too_many(tmp_path, capsys):
    assert main(["report", "a", "b", "c"]) == 1
    assert "3 directories were given" in capsys.readouterr().err


def test_the_steps_of_the_command_line_make_a_judge(seed_model, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(6))
    data, sampling = str(tmp_path / "rows.jsonl"), ["--max_new_tokens", "6", "--max_attempts", "1"]
    training = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    out = {name: str(tmp_path / name) for name in ("stage1", "own", "judge", "judged")}
    start = ["--model_name_or_path", seed_model]
    assert main(["train", *start, "--data", data, "--output_dir", out["stage1"], *training]) == 0
    assert main(["distill", "--model", out["stage1"], "--data", data, "--output_dir", out["own"], *sampling]) == 0
    own = f"{out['own']}/rows.jsonl"
    assert main(["train", *start, "--data", own, "--output_dir", out["judge"], *training]) == 0
    assert main(["judge", "--model", out["judge"], "--data", data, "--output_dir", out["judged"], *sampling]) == 0
    capsys.readouterr()
    assert main(["report", "--judgements", out["judged"], "--n_bootstrap", "10"]) == 0
    printed = capsys.readouterr().out
    assert "pearson" in printed
    assert f"{out['judged']} (grid mass unknown)" in printed
    assert "item(s): no rationale reached '[RESULT]' in 1 attempts" in printed


def test_judgements_say_on_which_grid_they_were_made(finished):
    assert Judged(finished[0] / "out" / "judged-tract").scales[""].grid == (1.0, 2.0, 3.0, 4.0, 5.0)


def test_a_report_rounds_to_the_judges_own_grid(tmp_path, capsys):
    # 2.4 and 2.5 are the same half point, and 2 and 3 among the integers.
    (tmp_path / "settings.json").write_text(json.dumps({"score_values": [2, 2.5, 3]}))
    rows = [{"score": score, "reference": 2.5, "grid_mass": 1.0, "error": None} for score in (2.4, 2.6, 2.5)]
    write_jsonl(tmp_path / "judgements.jsonl", rows)
    assert main(["report", str(tmp_path), "--n_bootstrap", "0"]) == 0
    assert "accuracy  1.000" in " ".join(capsys.readouterr().out.split()).replace("accuracy ", "accuracy  ")
