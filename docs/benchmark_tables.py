"""The tables of pages that come from the results of benchmarks, made from the JSON that the benchmarks ended with.

python docs/benchmark_tables.py          # writes them anew
python docs/benchmark_tables.py --check  # ends with 1 if they are not up to date

Results lie in `examples/benchmarks/results`: `NAME.json` fills what stands between `<!-- NAME -->` and `<!-- /NAME -->`
in a page. Without it that says that it was not run.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS / "replication"))

import table  # noqa: E402

PAGES = [DOCS / "replication.md", DOCS / "benchmarks.md"]
NOT_RUN = "Not run yet."


def replication(result: dict[str, Any]) -> str:
    """What one replication came to: where and how long it ran, its tables, and where its settings come from."""
    minutes = sum(sum(steps.values()) for steps in result["seconds"].values()) / 60
    blocks = [f"{_machine(result)}. {minutes:.0f} minutes of finished steps, without what chose settings."]
    for test, found in result["tests"].items():
        seeds = ", ".join(map(str, result["seeds"]))
        blocks += [f"**{found['n']} items of {found['questions']} questions, seeds {seeds}: agreement**"]
        blocks += [table.agreement_table(found["rows"]), "**Differences**", table.difference_table(found["rows"])]
        if found["several"]:
            blocks += ["**Several rationales**", table.several_table(found["several"])]
        if result["curve"]:
            blocks += ["**Learning curve**", table.curve_table(result, test, result["settings"]["curve_rows"])]
    if result["own_rationales"]:
        blocks += ["**The stage-one model's own rationales on training rows**"]
        blocks += [table.own_rationales_table(result["own_rationales"])]
    if result["choice"] and result["choice"]["log"]:
        line = result["choice"]["log"][-1]
        blocks += [f"**Every setting's origin**: {line['rows']} training items tried on, {line['items']} others judged"]
        blocks += [table.choice_table(result["choice"])]
    return "\n\n".join(blocks)


def gpu(result: dict[str, Any]) -> str:
    """What `gpu.sh` came to on one machine."""
    blocks, parts = [f"{_machine(result)}."], result["parts"]
    unfinished = [name for name, part in parts.items() if "unfinished" in part]
    if unfinished:
        blocks.append(f"Did not finish: {', '.join(unfinished)}.")
    for name, part in parts.items():
        rows = part.get("rows")
        if name in ("exactness", "qlora") and rows:
            blocks += [f"**{name}**", _rows(rows)]
        elif name == "replication" and part.get("tests"):
            blocks += [f"**replication**: {len(part['seeds'])} seeds finished", replication(part)]
        elif name == "step_cost" and rows:
            columns = ("vocab", "length", "batch")
            shown = [
                {
                    **{column: row[column] for column in columns},
                    "TRACT / SFT, time": row["tract_over_sft"]["median"],
                    **{f"{own}, GiB": row["peak_bytes"][own] / 2**30 for own in ("sft", "tract")},
                }
                for row in rows
            ]
            blocks += ["**a step**", _rows(shown)]
        elif "unfinished" not in part:
            blocks += [f"**{name}**", f"```json\n{json.dumps(part.get('rows', part))}\n```"]
    return "\n\n".join(blocks)


def _rows(rows: list[dict[str, Any]]) -> str:
    shown = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if name != "trl-tract")
    return f"{result['device']}; {versions}"


MADE_BY: dict[str, Callable[[dict[str, Any]], str]] = {
    "rivals_saf": replication,
    "smollm2_saf_small": replication,
    "smollm2_saf": replication,
    "demo": replication,
    "gpu": gpu,
}


def written(page: Path) -> str:
    """A page with its tables as they should be."""
    text = page.read_text(encoding="utf-8")
    for name, make in MADE_BY.items():
        file = BENCHMARKS / "results" / f"{name}.json"
        shown = make(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else NOT_RUN
        between = re.compile(rf"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- /{name} -->)", re.DOTALL)
        text = between.sub(lambda _, shown=shown: shown, text)
    return text


if __name__ == "__main__":
    texts = {page: written(page) for page in PAGES}
    if "--check" in sys.argv:
        old = [page.name for page, text in texts.items() if page.read_text(encoding="utf-8") != text]
        sys.exit(f"{', '.join(old)}: run python docs/benchmark_tables.py" if old else 0)
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
