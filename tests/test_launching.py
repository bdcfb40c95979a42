"""How many processes a command is done by, and that they make what one process makes."""

import json
import os
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from command_line import PROGRAMS, commands_of
from conftest import make_rows, save_seed
from pages import ROOT
from safetensors.torch import load_file
from tiny import unresolved

from trl_tract.cli import main
from trl_tract.commands import entry_points
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.runs.launching import Launch, rows_of_an_update
from trl_tract.runs.steps import DistillStep, JudgeStep, shared_out
from trl_tract.runs.train_steps import TrainStep
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.grid import ScoreGrid


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: a machine that seems to have n accelerators."""

    def make(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)  # which the Trainer counts too

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return make


@pytest.mark.parametrize(
    ("seen", "asked", "processes"), [(0, None, 1), (0, 2, 2), (1, None, 1), (8, None, 8), (4, 2, 2), (4, 1, 1)]
)
def test_there_are_as_many_processes_as_accelerators_or_as_asked_for(gpus, seen, asked, processes):
    gpus(seen)
    assert Launch.planned(asked).processes == processes


def test_accelerators_of_other_makers_count_too(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert Launch.planned(None).processes == 3


@pytest.mark.parametrize("asked", [0, 5])
def test_what_cannot_be_had_is_refused(gpus, asked):
    gpus(4)
    with pytest.raises(ValueError, match=f"--num_processes {asked}"):
        Launch.planned(asked)


def test_under_a_launcher_there_is_nothing_to_start(gpus, monkeypatch):
    gpus(4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not Launch.planned(None).starts


@pytest.mark.parametrize(
    ("training", "processes", "trains", "batch", "steps"),
    [
        ({}, 2, 2, 4, 1),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 4, 4, 8, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, 4, 4, 2, 2),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, 3, 3, 4, 1),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}, 2, 2, 1, 3),
        ({}, 6, 4, 2, 1),  # of 6 processes, the most that share 8 rows evenly
        ({"per_device_train_batch_size": 4}, 8, 4, 1, 1),  # what the defaults take for fewer than 500 rows
        ({"per_device_train_batch_size": 1}, 8, 1, 1, 1),
    ],
)
def test_an_update_keeps_its_rows_and_no_batch_grows(training, processes, trains, batch, steps):
    launch, each = Launch(processes).shared(training)
    assert (launch.processes, *each.values()) == (trains, batch, steps)
    assert trains * batch * steps == rows_of_an_update(training)


@pytest.mark.parametrize(("asked", "processes"), [(None, 3), (2, 2)])
def test_a_configuration_says_how_many_processes_there_are(gpus, tmp_path, asked, processes):
    gpus(8)
    config = tmp_path / "own.yaml"
    config.write_text("distributed_type: FSDP\nnum_processes: 3\n")
    assert Launch.planned(asked, str(config)) == Launch(processes, str(config))


def test_a_configuration_of_several_machines_is_refused(gpus, tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 16\nnum_machines: 2\n")
    with pytest.raises(ValueError, match="2 machines"):
        Launch.planned(None, str(config))


def test_accelerators_are_trained_on_with_accelerate_and_a_configuration_of_the_user_s(gpus):
    gpus(2)
    command = Launch(2).command("a.module", ["--x"])
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert {"--num_processes=2", "--multi_gpu"} <= set(command)
    assert command[-3:] == ["-m", "a.module", "--x"]
    own = Launch(2, "fsdp2.yaml").command("a.module", [])
    assert "--config_file=fsdp2.yaml" in own
    assert "--multi_gpu" not in own


def test_a_processor_is_shared_by_torchrun(gpus):
    gpus(0)
    assert Launch(2).command("a.module", [])[1:5] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
    ]


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("5,3", "5")])
def test_one_process_of_a_machine_with_several_sees_the_first_it_was_shown(gpus, monkeypatch, visible, first):
    # The trainer would take all it sees for itself, and TRL's refuse that.
    gpus(2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = {}
    monkeypatch.setattr("subprocess.run", lambda command, env, check: seen.update(env) or Done())
    assert Launch.planned(1).starts
    Launch.planned(1).run("a.module", [])
    assert seen["CUDA_VISIBLE_DEVICES"] == first


class Done:
    returncode = 0


def test_an_engine_that_spreads_itself_is_one_process(gpus):
    gpus(4)
    step = JudgeStep("m", "d", "o", backend={"name": "vllm"})
    spread, launch = shared_out(step, Launch(4))
    assert launch.processes == 1
    assert spread.backend["data_parallel_size"] == 4
    own = JudgeStep("m", "d", "o", backend={"name": "vllm", "tensor_parallel_size": 4})
    assert "data_parallel_size" not in shared_out(own, Launch(4))[0].backend
    assert not launch.starts  # it sees all accelerators


@pytest.mark.parametrize("command", ["distill", "judge"])
def test_vllm_is_one_process_with_an_engine_for_each_accelerator(gpus, monkeypatch, tmp_path, command):
    gpus(4)
    save_seed(tmp_path)
    JudgeConfig((unresolved(ScoreGrid([1.0, 5.0], ["1", "5"])),)).save(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    options = {}
    monkeypatch.setattr("trl_tract.runs.steps.make_backend", lambda model, **given: options.update(given) or 1 / 0)
    given = ["--model", str(tmp_path), "--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ZeroDivisionError):
        entry_points.COMMANDS[command]([*given, "--backend", "vllm"])
    assert options == {"name": "vllm", "data_parallel_size": 4}


def test_training_takes_the_user_s_configuration_and_generation_does_not(gpus):
    gpus(2)
    launch = Launch(2, "fsdp2.yaml")
    assert shared_out(TrainStep("m", "d", "o"), launch)[1] == launch
    assert shared_out(DistillStep("m", "d", "o"), launch)[1] == Launch(2)


@pytest.mark.parametrize("command", ["train", "distill", "judge"])
def test_two_accelerators_and_no_option_start_two_processes(gpus, monkeypatch, tmp_path, command, capsys):
    gpus(2)
    started = []
    monkeypatch.setattr("subprocess.run", lambda command, env, check: started.append(command) or Done())
    given = ["--model", "seed", "--data", "rows.jsonl", "--output_dir", str(tmp_path / "out")]
    given += ["--bf16", "false"] if command == "train" else []
    assert entry_points.COMMANDS[command](given) == 0
    (words,) = started
    assert "--num_processes=2" in words
    begins = words.index("trl_tract.cli") + 1
    assert words[begins : begins + 1 + len(given)] == [command, *given]
    assert "2 of 2 accelerators" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_three_accelerators_no_option_and_few_rows_goes_through(gpus, monkeypatch, tmp_path, capsys):
    # They are seen by this process alone: those that it starts are on the processor. 60 rows come to updates of 4,
    # which 3 processes do not share evenly; and TRL's trainers refuse several accelerators in one process.
    gpus(3)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    save_seed(tmp_path / "seed")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(60))
    given = {
        "model": tmp_path / "seed",
        "data": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "rationales": "none",
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
    }
    assert main(["run", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 0
    told = capsys.readouterr().out
    assert "3 processes on 3 of 3 accelerators" in told
    assert "each update has 2 x 2 x 1 rows" in told
    assert len(list(read_jsonl(tmp_path / "out" / "judged-tract" / "judgements.jsonl"))) == 6


@pytest.mark.slow
def test_a_run_by_two_processes_makes_the_files_and_the_update_of_one(tmp_path, monkeypatch):
    # 16 training rows and two updates of 8: nothing is left over that two processes would share out otherwise.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    save_seed(tmp_path / "seed")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(16))
    write_jsonl(tmp_path / "eval.jsonl", make_rows(4, seed=1))
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        given = {
            "model": tmp_path / "seed",
            "data": tmp_path / "rows.jsonl",
            "eval_data": tmp_path / "eval.jsonl",
            "output_dir": folder,
            "num_processes": processes,
            "objective": "paper",  # full weights: LoRA's dropout is drawn anew in each process
            "num_train_epochs": 1,
            "learning_rate": 0.01,
            "optim": "sgd",
            "bf16": "false",
            "save_strategy": "no",
            "report_to": "none",
            "max_new_tokens": 4,
            "max_attempts": 1,
        }
        assert main(["run", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 0
        made[processes] = folder
    one, two = (load_file(made[count] / "stage1" / "model.safetensors") for count in (1, 2))
    start = load_file(tmp_path / "seed" / "model.safetensors")
    assert any(not torch.equal(one[name], start[name]) for name in start)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    # A lock is named for its worker.
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
        for folder in made.values()
    ]
    assert files[0] == files[1]
    rows = [(folder / "self-generated" / "rows.jsonl").read_text() for folder in made.values()]
    assert rows[0] == rows[1]
    judged = [(folder / "judged-tract" / "judgements.jsonl").read_text().splitlines() for folder in made.values()]
    scores = [[json.loads(line)["score"] for line in lines] for lines in judged]
    assert scores[0] == scores[1]  # none: a random model does not come to its marker


@pytest.mark.parametrize("script", ["slurm_array", "slurm_ray"])
def test_a_cluster_s_script_runs_a_command_that_its_parser_takes(script, tmp_path):
    code = (ROOT / "examples" / "cluster" / f"{script}.sh").read_text()
    (command,) = commands_of(f"SLURM_ARRAY_TASK_COUNT=8\n{code}", tmp_path)
    assert command[:2] == ["trl-tract", "judge"]
    PROGRAMS["trl-tract"](command[1:])


def test_the_example_for_two_machines_is_one_that_accelerate_reads():
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / "two-machines.yaml"))
    assert (config.num_machines, config.num_processes, config.machine_rank) == (2, 16, 0)
