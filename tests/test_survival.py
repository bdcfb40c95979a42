"""Runs with real generation, killed with SIGKILL or SIGINT at random instants, and processes that share one run.

Each run lives in a process of its own that has everything imported, so that the kills fall into the run.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from conftest import make_model, make_rows, make_tokenizer

from trl_tract import CoTBootstrap, CoTRAILJudge, CoTSelfDistill, TransformersBackend
from trl_tract.cli import main
from trl_tract.files.blocks import BlockLog
from trl_tract.files.journal import JsonlRows, KnownRows, read_jsonl, write_jsonl
from trl_tract.files.shards import Shard
from trl_tract.runs.steps import JudgeStep
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat

pytestmark = pytest.mark.process
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


def distil(model: str, data: str, block_size: int, settings: dict[str, Any], out: str) -> None:
    backend = TransformersBackend(model, batch_size=8)
    CoTSelfDistill.from_pretrained(model, backend, block_size=block_size, **settings).distill_file(data, out)


def bootstrap(model: str, data: str, block_size: int, settings: dict[str, Any], out: str) -> None:
    backend = TransformersBackend(model, batch_size=8)
    form = {"completion_format": FORM, "block_size": block_size, "say": lambda line: None}
    CoTBootstrap(backend, **form, **settings).bootstrap_file(data, out)


def judge(model: str, data: str, out: str) -> None:
    settings = {"max_new_tokens": 16, "max_attempts": 2, "num_generations": 2}
    JudgeStep(model, data, out, settings, {"batch_size": 4}, block_size=2).run()


def ends_with_the_same_bytes(tmp_path: Path, kills: int, target: Any, *arguments: Any) -> None:
    """Run `target(*arguments, out)` once in peace, then kill it at `kills` instants of as many runs as it takes."""
    whole, instants, killed, run = tmp_path / "whole", random.Random(0), 0, 0
    timed(target, *arguments, str(tmp_path / "unmeasured"))  # what a process has to load, the system has then read once
    seconds = timed(target, *arguments, str(whole))
    while killed < kills:
        out = tmp_path / f"run-{run}"
        run += 1
        while killed < kills:
            process = processes.start(target, *arguments, str(out))
            process.join(instants.uniform(0, seconds))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            killed += 1
        timed(target, *arguments, str(out))
        assert files(out) == files(whole)


def timed(target: Any, *arguments: Any) -> float:
    """Seconds that it takes."""
    started = time.monotonic()
    process = processes.start(target, *arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def as_rank(rank: int, ranks: int, command: list[str]) -> None:
    """`trl-tract` as a launcher starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    sys.exit(main(command))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
def test_self_distillation_killed_at_twenty_instants_ends_with_the_same_bytes(tmp_path):
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(40))
    ends_with_the_same_bytes(tmp_path, 20, distil, model, str(data), 2, DISTIL)
    rows = list(read_jsonl(tmp_path / "whole" / "rows.jsonl"))
    assert {row["rationale_source"] for row in rows} == {"self", "annotated"}  # both ways out of a block


@pytest.mark.slow
def test_a_bootstrap_killed_at_twenty_instants_ends_with_the_same_bytes(tmp_path):
    # A random model comes to about 3 whatever it writes: the rows with 3 are found blind, the others shown.
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    rows = make_rows(16)
    for row in rows[:5]:
        row["completion"] = row["completion"].replace("e", "a").replace("[RESULT]", "e")  # its only one
    for row in rows[5:]:
        del row["completion"]
    write_jsonl(data, rows)
    settings = {"max_new_tokens": 16, "num_generations": 2, "on_failure": "keep"}
    ends_with_the_same_bytes(tmp_path, 20, bootstrap, model, str(data), 2, settings)
    found = {row["rationale_source"] for row in read_jsonl(tmp_path / "whole" / "rows.jsonl")}
    assert found == {"annotated", "blind", "shown"}  # all ways out of a block


def test_judging_killed_at_random_instants_ends_with_the_same_bytes(tmp_path):
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(12))
    ends_with_the_same_bytes(tmp_path, 6, judge, model, str(data))


def shared(data: str, out: str, index: int, count: int) -> None:
    """One of the workers of a run that takes no time to speak of, so that kills fall into the writing."""
    rows = KnownRows(JsonlRows(Path(data)))
    shard = Shard(index, count, helps=count > 1)
    log = BlockLog(Path(out), {"a": 1}, "a test run", rows=rows, block_size=2, shard=shard)
    result = Path(out) / "rows.jsonl"
    log.run(lambda given, first, report: given, lambda records: write_jsonl(result, records) and None, (result.name,))


def everything(directory: Path) -> dict[str, bytes]:
    """All that a run leaves but its locks, partial files among it."""
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kills", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_workers_in_changing_numbers_killed_at_random_instants_leave_the_same_bytes_and_nothing_else(tmp_path, kills):
    data, chance, killed, run = tmp_path / "rows.jsonl", random.Random(0), 0, 0
    write_jsonl(data, make_rows(60))
    timed(shared, str(data), str(tmp_path / "unmeasured"), 0, 1)
    seconds = timed(shared, str(data), str(tmp_path / "whole"), 0, 1)
    while killed < kills:
        out = tmp_path / f"run-{run}"
        run += 1
        for _ in range(chance.randint(1, 4)):
            count = chance.randint(1, 3)
            workers = [processes.start(shared, str(data), str(out), index, count) for index in range(count)]
            time.sleep(chance.uniform(0, seconds))
            for worker in workers:
                killed += worker.exitcode is None
                worker.kill()
                worker.join()
        timed(shared, str(data), str(out), 0, 1)
        assert everything(out) == everything(tmp_path / "whole")


def test_ctrl_c_ends_at_once_and_the_run_goes_on_afterwards(tmp_path):
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(24))
    command = ["distill", "--model", model, "--data", str(data), "--output_dir", str(tmp_path / "out")]
    command += ["--max_new_tokens", "24", "--max_attempts", "1", "--generation_batch_size", "1"]
    process = processes.start_module("trl_tract.cli", *command)
    while not (tmp_path / "out" / "blocks").exists():
        time.sleep(0.01)
        assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    process = processes.start_module("trl_tract.cli", *command)
    process.join()
    assert process.exitcode == 0
    assert len(list(read_jsonl(tmp_path / "out" / "rows.jsonl"))) == 24


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 3])
def test_processes_of_a_launcher_give_the_bytes_of_one_process(tmp_path, first):
    # Three processes are killed while at work and the run goes on with two, or the other way round.
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(30))
    settings = {"max_new_tokens": 48, "max_attempts": 2}
    distil(model, str(data), 3, settings, str(tmp_path / "whole"))
    out = tmp_path / "shared"

    def launch(ranks: int) -> list[Any]:
        command = ["distill", "--model", model, "--data", str(data), "--output_dir", str(out), "--block_size", "3"]
        command += ["--max_new_tokens", "48", "--max_attempts", "2"]
        return [processes.start(as_rank, rank, ranks, command) for rank in range(ranks)]

    running = launch(first)
    while not list(out.glob("blocks/*.jsonl")):
        time.sleep(0.01)
    for process in running:
        assert process.exitcode is None
        process.kill()
        process.join()
    for process in launch(5 - first):
        process.join()
        assert process.exitcode == 0
    assert (out / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_the_judge_reads_what_survival_runs_use(tmp_path):
    # The stand-in model is a judge like any other: what the runs above rely on.
    model = save_model(tmp_path / "model")
    judgement = CoTRAILJudge.from_pretrained(model, append_marker=True, max_new_tokens=4).judge(["the reply"])[0]
    assert json.dumps(judgement.to_dict())
    assert judgement.error is None
