"""Does a served judge give every client the answer of `trl-tract judge`, as fast, and does it lose none?

A judge of short texts (`--model`, or SmolLM2-135M-Instruct, shown an example in each prompt) does the same rows twice:
by `trl-tract judge`, and by `trl-tract serve` for `--clients` clients, who send one item a request. Then

- every answer is compared with the judgement of its item (same seed, so the same rationale; scores to 1e-3);
- hostile bodies are sent between requests: each has to be refused in words, or answered with an error;
- the server's resident memory is read along the way;
- a second load is interrupted by SIGTERM: what was taken has to be answered, and the server has to exit with 0.

Rates are those between the first and the last finished rows, so that loading does not count, by the clock and by the
processor time of the process that judges: on a shared machine the latter says more.

    python examples/benchmarks/serve_load.py --output_dir load --requests 2000
    python examples/benchmarks/serve_load.py --output_dir load --model JUDGE --requests 64 --clients 4 --hostile 20

The last line is JSON with device, versions, arguments and results.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import torch

from trl_tract.files.journal import read_jsonl, write_jsonl

WORDS = ["please", "thanks", "sorry", "now", "never", "order", "today", "no", "wrong", "kind"]
TOLERANCE = 1e-3  # rubric units
Answer = tuple[int, dict[str, Any]]


def make_prompt(number: int) -> str:
    """A short prompt with an example to go by, which the untrained model follows every other time."""
    words = random.Random(number).sample(WORDS, 4)
    return f"{' '.join(words[:2])} -> It is fine. [RESULT] 3\n{number} {' '.join(words)} ->"


def make_judge(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in float32, and what a trained judge would have saved beside it."""
    from trl_tract.backends.loading import load_tokenizer
    from trl_tract.demo.seed_model import save_seed_model
    from trl_tract.rows.tokens import resolve_scales
    from trl_tract.saved.judge_config import JudgeConfig
    from trl_tract.scale.scale import read_scales

    judge = folder / "judge"
    if not (judge / "tract_config.json").exists():
        save_seed_model(judge, torch.float32)
        row = {"prompt": make_prompt(0), "completion": " It is fine. [RESULT] 3"}
        scales = resolve_scales(load_tokenizer(str(judge)), row, read_scales({}))
        JudgeConfig(scales, chat=False).save(judge)
    return judge


def arguments(name: str, options: dict[str, Any]) -> list[str]:
    given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    return [sys.executable, "-m", "trl_tract.cli", name, *given]


def used(pid: int) -> tuple[float, float]:
    """Processor seconds, and resident MiB, of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), resident / 2**20


def judge_rows(model: Path, data: Path, folder: Path, sampling: dict[str, Any]) -> dict[str, float]:
    """`trl-tract judge`, and how fast it was between its first and its last block."""
    options = {"model": model, "data": data, "output_dir": folder, **sampling}
    seen: list[tuple[int, float, float]] = []
    with subprocess.Popen(arguments("judge", options), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            blocks = len(list(folder.glob("blocks/*.jsonl")))
            if blocks and (not seen or blocks > seen[-1][0]):
                seen.append((blocks, time.perf_counter(), used(process.pid)[0]))
            time.sleep(0.05)
    assert process.returncode == 0, "trl-tract judge failed; its message is above"
    (first, began, cpu), (last, ended, cpu_ended) = seen[0], seen[-1]
    if first == last:
        return {}  # it was finished before
    rows = 64 * (last - first)
    return {"rows_per_second": rows / (ended - began), "rows_per_cpu_second": rows / (cpu_ended - cpu)}


class Server:
    """`trl-tract serve` in a process of its own."""

    def __init__(self, model: Path, sampling: dict[str, Any]) -> None:
        options = {"model": model, "port": 0, **sampling}
        self.process = subprocess.Popen(arguments("serve", options), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " answers at " in line, "trl-tract serve did not start; its message is above"
        self.url = line.split()[-1]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=600)


def hostile_bodies(count: int) -> list[bytes]:
    """Bodies that no client of good will sends."""
    rng = random.Random(0)
    kinds = [
        lambda: b"",
        lambda: rng.randbytes(rng.randint(1, 2000)),
        lambda: b'{"prompt": "' + b"a" * rng.randint(1, 100),
        lambda: b"[" * rng.randint(1000, 200_000),
        lambda: b'{"a":' * rng.randint(1000, 50_000) + b"1" + b"}" * 1000,
        lambda: b"null",
        lambda: b'"text"',
        lambda: json.dumps({"prompt": rng.choice([None, 3, True, [], [1], [{}], {"role": "user"}])}).encode(),
        lambda: json.dumps({"prompt": [{"role": "user", "content": rng.choice([None, 3, {}, [1]])}]}).encode(),
        lambda: json.dumps({"prompt": [{"role": rng.choice(["", "nobody", 3]), "content": "a"}]}).encode(),
        lambda: json.dumps({"prompt": "a", "response": "b"}).encode(),
        lambda: json.dumps({"prompt": "a", "seed": rng.choice([-1, 2**64, 1.5, "1", None, True])}).encode(),
        lambda: b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        lambda: b'{"prompt": "a", "seed": NaN}',
        lambda: json.dumps({"prompt": "a", "unknown": {"$ref": "#"}}).encode(),
        lambda: json.dumps([{"prompt": "a"}] * rng.randint(65, 3000)).encode(),
        lambda: json.dumps({"prompt": "a" * (2**20 + 1)}).encode(),
        lambda: json.dumps({"prompt": rng.choice(["\ud800", "a\x00b", "<|im_end|>", "word " * 100_000])}).encode(),
        lambda: json.dumps({"prompt": "\u0301" * 100_000}).encode(),
    ]
    return [kinds[number % len(kinds)]() for number in range(count)]


async def ask(session: aiohttp.ClientSession, url: str, body: Any) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    while True:
        async with session.post(url, data=raw, headers={"Content-Type": "application/json"}) as answer:
            if answer.status != 429:
                return answer.status, await answer.json()
            await asyncio.sleep(float(answer.headers["Retry-After"]))


async def load(
    server: Server,
    rows: list[dict[str, Any]],
    clients: int,
    hostile: Sequence[bytes] = (),
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Send every row once, from many clients; tell what came back for each."""
    answers: dict[int, Answer] = {}
    refusals: list[Answer] = []
    errors: Counter[str] = Counter()
    resident: list[float] = []
    began, cpu, counted = 0.0, 0.0, 0
    left = iter(range(len(rows)))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            nonlocal began, cpu, counted
            for number in left:
                try:
                    outcome = await ask(session, f"{server.url}/judge", {"prompt": rows[number]["prompt"]})
                except aiohttp.ClientError as error:
                    errors[type(error).__name__] += 1
                    return
                assert number not in answers
                answers[number] = outcome
                if len(answers) == 64:  # as behind the first block of the command
                    began, (cpu, _), counted = time.perf_counter(), used(server.process.pid), len(answers)
                if len(answers) % 100 == 0:
                    resident.append(used(server.process.pid)[1])
                if len(answers) == stop_after:
                    server.process.send_signal(signal.SIGTERM)

        async def enemy() -> None:
            for body in hostile:
                refusals.append(await ask(session, f"{server.url}/judge", body))

        await asyncio.gather(*(client() for _ in range(clients)), *([enemy()] if hostile else []))
        ended, finished = time.perf_counter(), len(answers)
        rates = {}
        if stop_after is None and not hostile:
            spent = used(server.process.pid)[0] - cpu
            rates = {
                "rows_per_second": (finished - counted) / (ended - began),
                "rows_per_cpu_second": (finished - counted) / spent,
            }
    return {"answers": answers, "refusals": refusals, "errors": errors, "resident": resident, **rates}


def differences(answers: dict[int, Answer], judgements: list[dict[str, Any]]) -> list[float]:
    """Of each answer to its judgement, rubric units; of one that has none or another error: infinite."""
    found = []
    for number, (status, told) in answers.items():
        wanted = judgements[number]
        if status != 200 or told["error"] != wanted["error"]:
            found.append(float("inf"))
        else:
            found.append(0.0 if wanted["score"] is None else abs(told["score"] - wanted["score"]))
    return found


def is_refused(refusal: Answer) -> bool:
    """In words, by a status of the client's, or item by item."""
    status, told = refusal
    if status == 200:
        items = told if isinstance(told, list) else [told]
        return all(item["error"] or item["score"] is not None for item in items)
    return 400 <= status < 500 and len(told["error"]["message"].split()) > 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where rows, judge and judgements go.")
    parser.add_argument("--model", type=Path, help="A judge of plain text. By default SmolLM2.")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--hostile", type=int, default=200)
    parser.add_argument("--max_new_tokens", type=int, default=10)
    args = parser.parse_args()
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    model = args.model or make_judge(folder)
    rows = [{"prompt": make_prompt(number)} for number in range(args.requests)]
    write_jsonl(folder / "rows.jsonl", rows)
    sampling = {"max_new_tokens": args.max_new_tokens, "max_attempts": 1}

    by_command = judge_rows(model, folder / "rows.jsonl", folder / "judged", sampling)
    judgements = list(read_jsonl(folder / "judged" / "judgements.jsonl"))

    server = Server(model, sampling)
    served = asyncio.run(load(server, rows, args.clients))
    # Apart from what is timed: to refuse a megabyte takes time as well.
    attacked = asyncio.run(load(server, rows[: args.requests // 10], args.clients, hostile_bodies(args.hostile)))
    exit_code = server.stop()
    off = differences(served["answers"], judgements)
    off_attacked = differences(attacked["answers"], judgements)

    server = Server(model, sampling)
    stopped = asyncio.run(load(server, rows, args.clients, stop_after=min(200, args.requests // 4)))
    taken = {number: each for number, each in stopped["answers"].items() if each[0] != 503}
    after = differences(taken, judgements)
    stopped_code = server.process.wait(timeout=600)

    resident = served["resident"]
    result = {
        "judged_by_command": by_command,
        "served": {name: served[name] for name in ("rows_per_second", "rows_per_cpu_second")},
        "served / command": {name: served[name] / by_command[name] for name in by_command},
        "answers": len(served["answers"]),
        "scores": sum(told["score"] is not None for _, told in served["answers"].values()),
        "largest difference": max(off),
        "connection errors": dict(served["errors"]),
        "hostile bodies": len(attacked["refusals"]),
        "hostile bodies refused in words": sum(map(is_refused, attacked["refusals"])),
        "statuses of hostile bodies": dict(Counter(status for status, _ in attacked["refusals"])),
        "largest difference beside hostile bodies": max(off_attacked),
        "resident MiB after each 100 answers": [round(each) for each in resident],
        "exit code": exit_code,
        "stopped by SIGTERM": {
            "answered": len(taken),
            "refused as stopping": len(stopped["answers"]) - len(taken),
            "largest difference": max(after),
            "connection errors": dict(stopped["errors"]),
            "exit code": stopped_code,
        },
    }
    well = (
        max(off + off_attacked) <= TOLERANCE
        and len(off) == args.requests
        and all(map(is_refused, attacked["refusals"]))
        and max(after) <= TOLERANCE
        and exit_code == stopped_code == 0
    )
    about = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "fastapi", "uvicorn", "starlette")},
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    print(json.dumps({"well": well, **result, **about}))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
