"""What does a bootstrap cost by itself: rows a second and memory, with a model that takes no time?

A scripted model writes a rationale for each row, and another one with the score shown where it does not come to it. A
process for each size, since a peak never falls.

    python examples/benchmarks/bootstrap_memory.py --rows 1000           # seconds: does it run?
    python examples/benchmarks/bootstrap_memory.py --rows 1000 10000 100000

A markdown table on stdout; the last line is JSON with versions, arguments and results.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trl_tract
from trl_tract import CoTBootstrap
from trl_tract.backends import ScriptedBackend
from trl_tract.distill.bootstrap_summary import read_bootstrap_summary
from trl_tract.files.journal import write_jsonl

WORDS = ["awful", "weak", "fair", "good", "great"]
COLUMNS = ["rows", "seconds", "rows/s", "peak, MB", "blind", "score shown", "given up"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def script(prompt: str, seed: int) -> str:
    """A rationale that calls the reply by one of five words."""
    return f" It is {WORDS[seed % 5]}. [RESULT] 1"


def measure(rows: int) -> dict[str, Any]:
    """Cost of a bootstrap of `rows` rows, in this process."""
    tokenizer = byte_tokenizer()

    def comes_to(ids: list[int]) -> list[float]:
        text = tokenizer.decode(ids[-40:])
        return [float(word in text) for word in WORDS]

    backend = ScriptedBackend(script, tokenizer, probs=comes_to, record_calls=False)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        write_jsonl(data, ({"prompt": f"Judge reply {number}.", "score": 1 + number % 5} for number in range(rows)))
        start = time.perf_counter()
        boot = CoTBootstrap(backend, num_generations=1, tolerance=1.0, say=lambda line: None)
        boot.bootstrap_file(data, out)
        seconds = time.perf_counter() - start
        summary = read_bootstrap_summary(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = {"blind": summary.blind, "shown": summary.shown, "given_up": summary.given_up}
    return {"rows": rows, "seconds": seconds, "peak_bytes": peak, **counts}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child)))
        return
    results = []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for rows in arguments.rows:
        command = [sys.executable, __file__, "--child", str(rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        cells = [f"{rows:,}", f"{result['seconds']:.1f}", f"{rows / result['seconds']:,.0f}"]
        cells += [f"{result['peak_bytes'] / 1e6:.0f}"]
        cells += [f"{result[name]:,}" for name in ("blind", "shown", "given_up")]
        print(f"| {' | '.join(cells)} |", flush=True)
    versions = {"python": platform.python_version(), "trl_tract": trl_tract.__version__}
    print(json.dumps({"benchmark": "bootstrap_memory", "device": platform.machine(), "versions": versions,
                      "arguments": {"rows": arguments.rows}, "results": results}))  # fmt: skip


if __name__ == "__main__":
    main()
