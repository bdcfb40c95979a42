"""Do two workers of Ray judge as fast as two `--shard` jobs, to the same bytes, and through kills?

The same rows are judged by two jobs with half of the blocks each, and by `--engine ray` with two workers; the two ways
take turns. With `--scripted` the model takes no time and rows come by the thousand: what is left is tokens, text, rows
and files. Without, `--model` writes for real.

    python examples/benchmarks/ray_shards.py --model MODEL --scripted --rows 20000
    python examples/benchmarks/ray_shards.py --model MODEL --rows 24 --block-size 2 --rounds 1
    python examples/benchmarks/ray_shards.py --model MODEL --scripted --rows 20000 --kill    # no timing: bytes alone

Rates are those between the first and the last block on disk, since Ray takes seconds to start; the whole time stands
beside them. `--kill` kills workers five times and the driver twice. The last line is JSON with versions, arguments and
results.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_tract.backends import Backend, ScriptedBackend
from trl_tract.backends.loading import load_tokenizer
from trl_tract.files.journal import write_jsonl
from trl_tract.runs.steps import JudgeStep

WORDS = ["polite", "rude", "short", "long", "clear", "greets", "explains", "refuses", "thanks", "helps"]


def script(prompt: str, seed: int) -> str:
    """A rationale of forty words, and a score."""
    words = random.Random(f"{prompt}{seed}")
    return f"{' '.join(words.choices(WORDS, k=40))}. [RESULT] {words.randint(1, 5)}"


def probabilities(token_ids: list[int]) -> list[float]:
    """Of five scores, drawn from the row's tokens."""
    draws = random.Random(hash(tuple(token_ids)))
    weights = [draws.random() for _ in range(5)]
    return [weight / sum(weights) for weight in weights]


@dataclass
class MarkedStep(JudgeStep):
    """A judging whose processes leave their numbers in a folder.

    Attributes:
        marks: The folder.
        scripted: Whether a script takes the model's place.
    """

    marks: str = ""
    scripted: bool = False

    def make_backend(self) -> Backend:
        Path(self.marks, str(os.getpid())).touch()
        if not self.scripted:
            return super().make_backend()
        return ScriptedBackend(script, load_tokenizer(self.model), probs=probabilities, record_calls=False)


def make_step(args: argparse.Namespace, out: Path, **how: Any) -> MarkedStep:
    settings = {"score_values": [1, 2, 3, 4, 5], "append_marker": True, "max_new_tokens": args.new_tokens}
    return MarkedStep(
        args.model,
        str(args.folder / "rows.jsonl"),
        str(out),
        {**settings, "max_attempts": 1},
        {"dtype": "float32"},
        untrained=True,
        block_size=args.block_size,
        marks=str(args.folder / "marks"),
        scripted=args.scripted,
        **how,
    )


def start(args: argparse.Namespace, out: Path, child: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, *args.given, "--child", child, "--out", str(out)]
    log = (args.folder / "log.txt").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def measure(args: argparse.Namespace, out: Path, children: Sequence[str]) -> dict[str, float]:
    """Seconds of a whole judging, and rows a second between its first and its last block."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    jobs = [start(args, out, child) for child in children]
    if any(job.wait() for job in jobs):
        raise SystemExit(f"a job failed: see {args.folder / 'log.txt'}")
    seconds = time.perf_counter() - began
    ends = sorted(path.stat().st_mtime for path in (out / "blocks").glob("*.jsonl"))
    return {"seconds": seconds, "rows_per_second": (len(ends) - 1) * args.block_size / (ends[-1] - ends[0])}


def digest(out: Path) -> str:
    return hashlib.sha256((out / "judgements.jsonl").read_bytes()).hexdigest()[:16]


def kill(args: argparse.Namespace, out: Path) -> dict[str, int]:
    """Judge with Ray, its workers killed five times and its driver twice."""
    shutil.rmtree(out, ignore_errors=True)
    marks, chance, workers, drivers = args.folder / "marks", random.Random(0), 0, 0
    for kills in (2, 1, 2):
        seen = {path.name for path in marks.iterdir()}
        driver = start(args, out, "ray")
        for _ in range(kills):
            before = len(list((out / "blocks").glob("*.jsonl")))
            # A worker that is at work, when a few more blocks are there.
            while len(list((out / "blocks").glob("*.jsonl"))) < before + 2 and driver.poll() is None:
                time.sleep(0.05)
            begun = [name for name in sorted(path.name for path in marks.iterdir()) if name not in seen]
            alive = [name for name in begun if Path("/proc", name).exists()]
            if driver.poll() is None and alive:
                os.kill(int(chance.choice(alive)), signal.SIGKILL)
                workers += 1
        if drivers < 2 and driver.poll() is None:
            time.sleep(chance.uniform(0.2, 1))
            driver.kill()
            drivers += 1
        if driver.wait() not in (0, -signal.SIGKILL):
            raise SystemExit(f"a job failed: see {args.folder / 'log.txt'}")
    return {"workers_killed": workers, "drivers_killed": drivers}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model's directory")
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("ray-shards"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else list(argv)
    if args.child:
        how: dict[str, Any] = {"engine": "ray", "workers": 2} if args.child == "ray" else {"shard": args.child}
        make_step(args, args.out, **how).run()
        return
    (args.folder / "marks").mkdir(parents=True, exist_ok=True)
    prompts = random.Random(0)
    rows = ({"prompt": f"{i}: {' '.join(prompts.choices(WORDS, k=40))}", "score": 1 + i % 5} for i in range(args.rows))
    write_jsonl(args.folder / "rows.jsonl", rows)
    ways = {"shards": ["1/2", "2/2"], "ray": ["ray"]}
    results: dict[str, Any] = {}
    if args.kill:
        measure(args, args.folder / "whole", ["1/1"])
        results |= kill(args, args.folder / "killed")
        results["same_bytes"] = digest(args.folder / "whole") == digest(args.folder / "killed")
        print(f"| {' | '.join(results)} |\n|{'---|' * len(results)}\n| {' | '.join(map(str, results.values()))} |")
    else:
        rounds = []
        print(
            "| round | shards, rows/s | ray, rows/s | ray / shards | shards, s | ray, s | same bytes |\n|" + "---|" * 7
        )
        for number in range(args.rounds):
            order = list(ways)[:: -1 if number % 2 else 1]
            one = {way: measure(args, args.folder / way, ways[way]) for way in order}
            same = digest(args.folder / "shards") == digest(args.folder / "ray")
            shards, ray = one["shards"], one["ray"]
            ratio = ray["rows_per_second"] / shards["rows_per_second"]
            rounds.append({**one, "ratio": ratio, "same_bytes": same})
            rates = f"{shards['rows_per_second']:.1f} | {ray['rows_per_second']:.1f} | {ratio:.2f}"
            print(f"| {number + 1} | {rates} | {shards['seconds']:.1f} | {ray['seconds']:.1f} | {same} |", flush=True)
        results = {"rounds": rounds, "median_ratio": statistics.median(one["ratio"] for one in rounds)}
    told = {name: value for name, value in vars(args).items() if name not in ("given", "child", "out", "folder")}
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("trl-tract", "torch", "ray")}
    device = platform.processor() or platform.machine()
    print(json.dumps({"benchmark": "ray_shards", "device": device, "cores": os.cpu_count(), "versions": versions,
                      "arguments": told, "results": results}))  # fmt: skip


if __name__ == "__main__":
    main()
