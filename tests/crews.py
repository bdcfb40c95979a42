"""Crews for tests of workers elsewhere, which import what they need and no more: a model that takes no loading."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.crew import Crew
from trl_tract.files.journal import KnownRows, write_jsonl
from trl_tract.runs.ray_crew import ray_crew

ROWS, BLOCK = 400, 4


def double(marks: str, seconds: float) -> Crew:
    """A model that needs no loading; its process leaves its number in `marks`."""
    Path(marks, str(os.getpid())).touch()

    def do(rows: list[Any], first: int, report: Report) -> list[Record]:
        time.sleep(seconds)
        return [{"row": first + place, "twice": 2 * row["x"]} for place, row in enumerate(rows)]

    return Crew(do, {"a": 1})


def doubled(out: str, crew: Crew) -> None:
    """A run whose blocks a crew does."""
    log = BlockLog(Path(out), {"a": 1}, "a test run", rows=KnownRows([{"x": x} for x in range(ROWS)]), block_size=BLOCK)
    result = Path(out) / "rows.jsonl"
    log.run(
        crew.do,
        lambda records: write_jsonl(result, records) and None,
        (result.name,),
        max_calls=crew.max_calls,
        cancel=crew.cancel,
    )


def doubled_by_ray(marks: str, seconds: float, out: str) -> None:
    with ray_crew(partial(double, marks, seconds), {"a": 1}, workers=2, backend={}) as crew:
        doubled(out, crew)


def fails(kind: type[Exception]) -> Crew:
    def do(rows: list[Any], first: int, report: Report) -> list[Record]:
        raise kind(f"row {first} is odd")

    return Crew(do, {"a": 1})


def cannot_begin() -> Crew:
    raise FileNotFoundError("no weights here")


def of_another_model() -> Crew:
    return Crew(lambda rows, first, report: [], {"a": 2})
