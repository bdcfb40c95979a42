"""Does the memory of reading rows grow with their number?

    python examples/benchmarks/rows_memory.py --model MODEL                       # 1,000 and 300,000 rows
    python examples/benchmarks/rows_memory.py --model MODEL --rows 100 200        # does it run?

Each measurement is a process of its own, whose peak of resident memory the kernel counts: `trl-tract check` of a JSONL
file of short rows, and what `trl-tract train` does with it before the first step (a training that is stopped there).
MODEL is a directory with a model and a tokenizer; its weights take part in the second. A markdown table grows on
stdout; the last line is JSON.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORK = {
    "check": "from trl_tract.cli import main\nmain(['check', {data!r}, '--model', {model!r}, '--rows', '0'])",
    "prepare": (
        "from trl_tract import TRACTTrainer\n"
        "from trl_tract.cli import main\n"
        "TRACTTrainer.train = lambda self, **options: None\n"
        "TRACTTrainer.save_model = TRACTTrainer.save_state = TRACTTrainer.create_model_card = lambda self: None\n"
        "main(['train', '--model_name_or_path', {model!r}, '--data', {data!r}, '--output_dir', {out!r},"
        " '--bf16', 'false', '--report_to', 'none'])"
    ),
}


def write(path: Path, count: int) -> None:
    """`count` rows of about 40 tokens."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            score = 1 + number % 5
            row = {
                "prompt": f"Is reply {number} polite? It says hello and names the hour.",
                "completion": f" It greets, and it answers what was asked. [RESULT] {score}",
                "score": score,
                "group": str(number // 4),
            }
            file.write(json.dumps(row) + "\n")


def measure(work: str, model: str, data: Path) -> dict[str, Any]:
    """Peak of resident memory, bytes, and seconds of one process."""
    with tempfile.TemporaryDirectory() as out:
        code = WORK[work].format(data=str(data), model=model, out=out)
        code += "\nimport resource; print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    peak = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if done.returncode or not peak:
        raise RuntimeError(done.stderr[-2000:])
    return {"peak_bytes": int(peak[0]) * 1024, "seconds": time.perf_counter() - started}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000, 300_000])
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    args = parser.parse_args(arguments)
    rows = []
    print("| | rows | peak, MB | above the fewest, MB | seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for work in args.work:
            for count in args.rows:
                data = Path(folder) / f"{count}.jsonl"
                write(data, count)
                found = {"work": work, "rows": count, **measure(work, args.model, data)}
                rows.append(found)
                least = min(each["peak_bytes"] for each in rows if each["work"] == work)
                peak, seconds = found["peak_bytes"] / 1e6, found["seconds"]
                print(f"| {work} | {count:,} | {peak:,.0f} | {peak - least / 1e6:,.0f} | {seconds:.0f} |", flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "datasets", "trl_tract")}
    print(
        json.dumps(
            {
                "benchmark": "rows_memory",
                "device": platform.processor() or platform.machine(),
                "versions": {**versions, "python": platform.python_version()},
                "page_size": resource.getpagesize(),
                "arguments": vars(args) | {"threads": os.environ.get("OMP_NUM_THREADS")},
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
