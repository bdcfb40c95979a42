"""Blocks of a run that workers of Ray do, on this machine; and what is refused before Ray is looked for."""

import os
import random
import signal
import sys
import time
from functools import partial
from typing import Any

import processes
import pytest
from conftest import make_rows
from crews import cannot_begin, double, doubled, doubled_by_ray, fails, of_another_model
from test_survival import everything, save_model

from trl_tract.files.journal import write_jsonl
from trl_tract.runs.ray_crew import _shares, ray_crew
from trl_tract.runs.steps import DistillStep, JudgeStep

pytestmark = pytest.mark.process
ONE_GPU, CPUS = {"num_gpus": 1, "num_cpus": 1}, {"Resources": {"CPU": 8.0}}


@pytest.fixture(scope="module")
def cluster():
    """Ray, started once for all tests that only use it."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # none is then left in the home
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=2, **quiet, object_store_memory=2**27, _system_config={"worker_niceness": 0})
        yield ray
        ray.shutdown()


@pytest.mark.parametrize("step", [JudgeStep, DistillStep])
def test_workers_of_ray_make_the_bytes_of_one_process(cluster, tmp_path, step):
    model = save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, make_rows(8))
    settings: dict[str, Any] = {"max_new_tokens": 24, "max_attempts": 2}
    settings |= {} if step is JudgeStep else {"block_size": 2, "allow_leaks": True}
    block = {"block_size": 2} if step is JudgeStep else {}
    made = {}
    for engine in ("local", "ray"):
        out = tmp_path / engine
        step(model, str(data), str(out), settings, {"batch_size": 4}, engine=engine, workers=2, **block).run()
        made[engine] = everything(out)
    assert made["ray"] == made["local"]


def test_an_error_of_a_block_keeps_its_kind(cluster, tmp_path):
    with (
        ray_crew(partial(fails, LookupError), {"a": 1}, workers=1, backend={}) as crew,
        pytest.raises(LookupError, match=r"row \d+ is odd"),
    ):
        doubled(str(tmp_path / "out"), crew)


@pytest.mark.parametrize(("load", "said"), [(cannot_begin, "no weights here"), (of_another_model, "a: 1 there, 2 now")])
def test_a_worker_that_cannot_begin_or_has_another_model_ends_the_run(cluster, load, said):
    with pytest.raises(RuntimeError, match=said), ray_crew(load, {"a": 1}, workers=1, backend={}):
        pytest.fail("it began")


@pytest.mark.slow
def test_five_killed_workers_and_two_killed_drivers_leave_the_bytes_of_a_run_in_peace(tmp_path):
    pytest.importorskip("ray")
    marks, chance, killed = tmp_path / "marks", random.Random(0), 0
    marks.mkdir()
    doubled(str(tmp_path / "whole"), double(str(marks), 0))
    out = tmp_path / "out"
    for kills in (1, 1, 3):
        seen = {path.name for path in marks.iterdir()}
        driver = processes.start(doubled_by_ray, str(marks), 0.15, str(out))
        for _ in range(kills):
            while not (begun := {path.name for path in marks.iterdir()} - seen):
                assert driver.exitcode is None
                time.sleep(0.01)
            seen |= begun
            time.sleep(chance.uniform(0.1, 0.3))
            os.kill(int(sorted(begun)[0]), signal.SIGKILL)
            killed += 1
        if kills == 1:
            time.sleep(chance.uniform(0.5, 1))
            driver.kill()
            assert not (out / "rows.jsonl").exists()
        driver.join()
    assert killed == 5
    assert driver.exitcode == 0
    assert everything(out) == everything(tmp_path / "whole")


@pytest.mark.parametrize(
    ("nodes", "workers", "cards", "each", "count"),
    [
        ([CPUS], None, 1, {"num_cpus": 8}, 1),
        ([CPUS], 3, 1, {"num_cpus": 2}, 3),
        ([CPUS, CPUS, {"Resources": {}}], None, 1, {"num_cpus": 8}, 2),
        ([CPUS, {"Resources": {"CPU": 4.0}}], 2, 1, {"num_cpus": 4}, 2),
        ([{"Resources": {"CPU": 8.0, "GPU": 4.0}}, CPUS], None, 1, ONE_GPU, 4),
        ([{"Resources": {"CPU": 8.0, "GPU": 4.0}}] * 2, None, 4, {"num_gpus": 4, "num_cpus": 1}, 2),
        ([{"Resources": {"CPU": 8.0, "GPU": 4.0}}], 6, 1, ONE_GPU, 6),  # a cluster that grows
    ],
)
def test_there_is_a_worker_for_each_gpu_or_machine_and_none_spans_machines(nodes, workers, cards, each, count):
    assert _shares(nodes, workers, cards, False) == (each, count)


@pytest.mark.parametrize("workers", [0, 9])
def test_workers_that_cannot_be_had_on_this_machine_are_refused(workers):
    with pytest.raises(ValueError, match=f"--num_processes {workers}"):
        _shares([CPUS], workers, 1, True)


def test_a_server_is_not_asked_by_workers():
    with pytest.raises(ValueError, match="--backend server"), ray_crew(cannot_begin, {}, backend={"name": "server"}):
        pytest.fail("it began")


def test_processes_of_a_launcher_do_not_each_start_ray(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="without a launcher"), ray_crew(cannot_begin, {}, backend={}):
        pytest.fail("it began")


def test_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "trl-tract\[ray\]"'), ray_crew(cannot_begin, {}, backend={}):
        pytest.fail("it began")
