"""What does stored work cost by itself: rows a second, memory and files, with a model that takes no time?

Every row's record is made of the row at once, so that what is left is reading rows, their digests, a synced file for
each block, and the result. A process for each size, since a peak never falls.

    python examples/benchmarks/blocks.py --rows 1000              # seconds: does it run?
    python examples/benchmarks/blocks.py --rows 100000 1000000

A markdown table on stdout; the last line is JSON with versions, arguments and results.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl_tract
from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.journal import JsonlRows, KnownRows, write_jsonl

WORDS = ["polite", "rude", "short", "long", "clear", "greets", "explains", "refuses", "thanks", "helps"]
COLUMNS = ["rows", "seconds", "CPU seconds", "rows/s", "peak, MB", "files", "on disk, MB"]


def record(row: Record) -> Record:
    """Something of the size of a judgement."""
    return {
        "reference": row["score"],
        "score": 3.25,
        "rationales": [row["prompt"]],
        "probs": [[0.1, 0.2, 0.3, 0.2, 0.1]],
    }


def measure(rows: int, block_size: int) -> dict[str, Any]:
    """Cost of a run over `rows` rows, in this process."""
    words = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        write_jsonl(
            data, ({"prompt": f"{i}: {' '.join(words.choices(WORDS, k=40))}", "score": i % 5} for i in range(rows))
        )
        start, cpu = time.perf_counter(), time.process_time()
        log = BlockLog(out, {}, "benchmark", rows=KnownRows(JsonlRows(data)), block_size=block_size)

        def work(given: list[Record], first: int, report: Report) -> list[Record]:
            return [record(row) for row in given]

        log.run(work, lambda records: report_count(write_jsonl(out / "rows.jsonl", records)), ("rows.jsonl",))
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": rows, **spent, "peak_bytes": peak, "files": len(sizes), "bytes": sum(sizes)}


def report_count(rows: int) -> None:
    print(f"{rows} rows written", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child, arguments.block_size)))
        return
    results = []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for rows in arguments.rows:
        command = [sys.executable, __file__, "--child", str(rows), "--block-size", str(arguments.block_size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        cells = [
            f"{rows:,}",
            f"{result['seconds']:.1f}",
            f"{result['cpu_seconds']:.1f}",
            f"{rows / result['seconds']:,.0f}",
            f"{result['peak_bytes'] / 1e6:.0f}",
            f"{result['files']:,}",
            f"{result['bytes'] / 1e6:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    told = {"rows": arguments.rows, "block_size": arguments.block_size}
    versions = {"python": platform.python_version(), "trl_tract": trl_tract.__version__}
    print(json.dumps({"benchmark": "blocks", "device": platform.machine(), "versions": versions, "arguments": told,
                      "results": results}))  # fmt: skip


if __name__ == "__main__":
    main()
