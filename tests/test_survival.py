"""Runs with real generation, killed with SIGKILL or SIGINT at random instants, and processes that share one run.

Each run lives in a process of its own, made by a server that has imported everything, so that a start costs little and
the kills fall into the run and not into its imports.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_rows, make_tokenizer

from trl_tract import CoTRAILJudge, CoTSelfDistill, TransformersBackend
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.runs.steps import JudgeStep
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_survival"])
# A random model never writes the marker, so the letter "e" stands in for it.
FORM = CompletionFormat("e", lead="", separator=" ")
DISTIL: dict[str, Any] = {"max_new_tokens": 48, "max_attempts": 2, "allow_leaks": True}


def save_model(directory: Path) -> str:
    """A tiny random stage-one model, as TRACTTrainer saves one."""
    tokenizer = make_tokenizer()
    make_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    grid = ScoreGrid.from_values([1, 2, 3, 4, 5]).resolve(tokenizer, " the e ", "")
    JudgeConfig((Scale("", grid, FORM),)).save(directory)
    return str(directory)


def distil(model: str, data: str, out: str, block_size: int, settings: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    backend = TransformersBackend(model, batch_size=8)
    CoTSelfDistill.from_pretrained(model, backend, block_size=block_size, **settings).distill_file(data, out)


def judge(model: str, data: str, out: str) -> None:
    import torch

    torch.set_num_threads(1)
    settings = {"max_new_tokens": 48, "max_attempts": 2, "num_generations": 2}
    JudgeStep(model, data, out, settings, {"batch_size": 4}, block_size=2).run()


def killed_until_done(target: Any, arguments: tuple[Any, ...], seconds: float, kills: int, number: int) -> int:
    """Start `target` again and again, kill it at a random instant each time, and let it finish in the end."""
    instants = random.Random(number)
    killed = 0
    while killed < kills:
        process = PROCESSES.Process(target=target, args=arguments)
        process.start()
        process.join(instants.uniform(0, seconds))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
    last = PROCESSES.Process(target=target, args=arguments)
    last.start()
    last.join()
    assert last.exitcode == 0
    return killed


def timed(target: Any, arguments: tuple[Any, ...]) -> float:
    started = time.monotonic()
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
def test_self_distillation_killed_at_twenty_instants_ends_with_the_same_bytes(tmp_path):
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(40))
    whole = (model, str(data), str(tmp_path / "whole"), 2, DISTIL)
    seconds = timed(distil, whole)
    rows = list(read_jsonl(tmp_path / "whole" / "rows.jsonl"))
    assert {row["rationale_source"] for row in rows} == {"self", "annotated"}  # both ways out of a block
    killed = run = 0
    while killed < 20:
        out = tmp_path / f"run-{run}"
        killed += killed_until_done(distil, (model, str(data), str(out), 2, DISTIL), seconds, 20 - killed, run)
        assert files(out) == files(tmp_path / "whole")
        run += 1


def test_judging_killed_at_random_instants_ends_with_the_same_bytes(tmp_path):
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(12))
    seconds = timed(judge, (model, str(data), str(tmp_path / "whole")))
    killed_until_done(judge, (model, str(data), str(tmp_path / "killed")), seconds, 6, 0)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_ctrl_c_ends_at_once_and_the_run_goes_on_afterwards(tmp_path):
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(40))
    command = [sys.executable, "-m", "trl_tract.cli", "distill", "--model", model, "--data", str(data)]
    command += ["--output_dir", str(tmp_path / "out"), "--max_new_tokens", "200", "--generation_batch_size", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "blocks").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "start the same command to go on" in stderr
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(read_jsonl(tmp_path / "out" / "rows.jsonl"))) == 40


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 3])
def test_processes_of_a_launcher_give_the_bytes_of_one_process(tmp_path, first):
    # Three processes are killed while at work and the run goes on with two, or the other way round.
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(30))
    settings = {"max_new_tokens": 48, "max_attempts": 2}
    distil(model, str(data), str(tmp_path / "whole"), 3, settings)
    out = tmp_path / "shared"

    def launch(processes: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port"]
        command += [str(random.randrange(20000, 60000)), "-m", "trl_tract.cli", "distill", "--model", model, "--data"]
        command += [str(data), "--output_dir", str(out), "--max_new_tokens", "48", "--max_attempts", "2"]
        command += ["--block_size", "3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)

    process = launch(first)
    while not list(out.glob("blocks/*.jsonl")) and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert launch(5 - first).wait() == 0
    assert (out / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_the_judge_reads_what_survival_runs_use(tmp_path):
    # The stand-in model is a judge like any other: what the runs above rely on.
    model = save_model(tmp_path / "model")
    judgement = CoTRAILJudge.from_pretrained(model, append_marker=True, max_new_tokens=4).judge(["the reply"])[0]
    assert json.dumps(judgement.to_dict())
    assert judgement.error is None
