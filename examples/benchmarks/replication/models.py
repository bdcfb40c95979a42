"""The models of the table in one directory: trained, given their rationales, judging. Knows no table and no choice."""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from math import exp, isnan
from pathlib import Path
from typing import Any

import numpy as np
from config import Replication
from rivals import features_of, predict, read_golds_of
from rows import BOOTSTRAPPED, MODELS, SEED
from transformers import AutoTokenizer

from trl_tract.evaluation.pairs import Floats
from trl_tract.files.journal import read_json, read_jsonl, write_json, write_jsonl
from trl_tract.runs.run import Run
from trl_tract.runs.steps import BootstrapStep, DistillStep, JudgeStep
from trl_tract.runs.train_steps import RLStep, TrainStep


class Models:
    """Models and rivals of one seed, each made once.

    Args:
        config: The configuration.
        seed_model: Where the seed model lies.
        train_file: Training rows, with the annotated rationales.
        directory: Receives a folder for each model, for the rationales that it wrote, and for what it judged.
        seed: Of training and sampling.
        total: Steps there will be, for the headings.
        features: File of the seed model's hidden states, which directories share.

    Attributes:
        folders: Model -> the folder of it that others start and learn from; its own name if it is not in here.
    """

    def __init__(
        self,
        config: Replication,
        seed_model: str,
        train_file: Path,
        directory: Path,
        seed: int,
        total: int,
        features: Path | None = None,
    ) -> None:
        self.features = features
        self.config, self.seed_model, self.train_file, self.seed = config, seed_model, train_file, seed
        self.directory = directory
        self.run = Run(directory, {"seed": seed}, isolate=config.isolate, total=total)
        self.folders: dict[str, str] = {}

    def train(self, name: str, settings: Mapping[str, Any], folder: str | None = None) -> float:
        """Train a model, with what it takes to do so; the seconds that its training took.

        Args:
            name: Of the model, in `rows.MODELS`.
            settings: Fields of TRACTConfig or, for a reinforced one, of REALConfig, on top of the configuration's.
            folder: Where to; by default its name.
        """
        model, folder = MODELS[name], folder or name
        source, of = self._rows(name)
        start = self.seed_model
        if model.start is not None:
            started = self.folders.get(model.start, model.start)
            of.append(started)
            start = str(self.directory / started)
            if not model.reinforced:
                merged = self.directory / f"{started}-merged"
                work = partial(merge, self.directory / started, merged)
                self.run.step(merged.name, f"merging {started}", work, makes=[merged.name], of=[started])
                start, of = str(merged), [*of[:-1], merged.name]
        rows, out, fields = str(source), str(self.directory / folder), {"seed": self.seed, **settings}
        if model.reinforced:
            step: TrainStep = RLStep(
                start, rows, out, None, {**self.config.reinforcement, **fields}, self.config.model_args
            )
        else:
            objective = {**self.config.training, **model.objective, **fields}
            step = TrainStep(start, rows, out, None, objective, self.config.model_args)
        self.run.step(folder, f"seed {self.seed}: training {folder}", step, makes=[folder], of=of)
        return self.run.seconds[folder]

    def judge(self, name: str, test: str, items: Path, samples: int = 1, folder: str | None = None) -> Path:
        """Let a model judge items.

        Args:
            name: Of the model; `seed` for the seed model.
            test: Names the items.
            items: JSONL of them.
            samples: Rationales of each.
            folder: Where the model is; by default its name.

        Returns:
            The folder of its judgements.
        """
        folder, untrained = folder or name, name == SEED
        out = self.directory / f"judged-{folder}-{test}"
        settings = {**self._generation, "num_generations": samples}
        if untrained:
            settings |= self.config.written_scores
        if untrained or self.config.append_marker:
            settings["append_marker"] = True
        model = self.seed_model if untrained else str(self.directory / folder)
        step = JudgeStep(model, str(items), str(out), settings, self.config.backend, untrained=untrained, block_size=16)
        title = f"seed {self.seed}: {folder} judges {test}"
        self.run.step(out.name, title, step, makes=[out.name], of=[] if untrained else [folder])
        return out

    def scores(self, rival: str, test: str, items: Path, alpha: float, label: str | None = None) -> Floats:
        """A rival's scores of items, `(n,)`, rubric units; also in `scored-RIVAL-TEST.json`."""
        out = self.directory / f"scored-{label or rival}-{test}.json"

        def work() -> None:
            gold = read_golds_of(self.train_file, self.config.scales)
            if rival == "mean":
                known, wanted = np.zeros((len(gold), 1)), np.zeros((sum(1 for _ in read_jsonl(items)), 1))
            else:
                known, wanted = map(np.load, files)
            ends = (self.config.grid.values[0], self.config.grid.values[-1])
            scores = predict(rival, known, gold, wanted, alpha=alpha, ends=ends)
            rows = list(read_jsonl(items))
            groups = [str(row.get("group", number)) for number, row in enumerate(rows)]
            golds = read_golds_of(items, self.config.scales).tolist()
            write_json(out, {"alpha": alpha, "scores": scores.tolist(), "gold": golds, "groups": groups})

        files = [] if rival == "mean" else [self._features(file) for file in (self.train_file, items)]
        self.run.step(out.stem, f"{rival} scores {test}", work, makes=[out.name], of=[file.stem for file in files])
        return np.array(read_json(out)["scores"])

    def rationales(self, count: int) -> Path:
        """The stage-one model's own rationales of the training rows, with what each comes to, the nearest first."""
        return self._bootstrap("stage1", {"num_generations": count, "keep": count, "show_score": False})

    def _rows(self, name: str) -> tuple[Path, list[str]]:
        """The rows that a model is trained on, and the steps that made them."""
        model = MODELS[name]
        if model.writer is None:
            return self.train_file, []
        if model.writer == BOOTSTRAPPED:
            return self._bootstrap(SEED, self.config.bootstrap), ["written-by-seed"]
        writer = self.folders.get(model.writer, model.writer)
        if model.keep != "all":
            every = self.rationales(self.config.rationales)
            kept = self.directory / f"{model.keep}.jsonl"

            def work() -> None:
                write_jsonl(kept, kept_rows(list(read_jsonl(every)), model.keep, self.seed))

            self.run.step(kept.stem, f"{model.keep} rationales", work, makes=[kept.name], of=[every.parent.name])
            return kept, [kept.stem]
        settings = {**self._generation, "num_generations": model.samples, "keep_annotated": model.keep_annotated}
        suffix = f"-{model.samples}" * (model.samples > 1) + "-mixed" * model.keep_annotated
        out = self.directory / f"written-by-{writer}{suffix}"
        # Of the rows that the writer was trained on: those without a bootstrapped rationale stay without one.
        rows = str(self._rows(model.writer)[0])
        step = DistillStep(str(self.directory / writer), rows, str(out), settings, self.config.backend)
        title = f"seed {self.seed}: {writer} writes its own rationales"
        self.run.step(out.name, title, step, makes=[out.name], of=[writer])
        return out / "rows.jsonl", [out.name]

    def _bootstrap(self, writer: str, settings: Mapping[str, Any]) -> Path:
        """Rationales for prompts and scores alone, by a model of this directory or the seed model."""
        folder = self.folders.get(writer, writer)
        model, of = (self.seed_model, []) if writer == SEED else (str(self.directory / folder), [folder])
        ends = self.config.grid.values
        out = self.directory / (f"written-by-{folder}" if writer == SEED else f"scored-by-{folder}")
        common = {"rewrite": True, "on_failure": "drop", "probe": False, "seed": self.seed, "block_size": 16}
        nearest = {} if writer == SEED else {"tolerance": ends[-1] - ends[0]}
        settings = {**self.config.sampling, **self.config.written_scores, **common, **nearest, **settings}
        step = BootstrapStep(model, str(self.train_file), str(out), settings, self.config.backend)
        title = f"seed {self.seed}: {folder} writes rationales for the scores"
        self.run.step(out.name, title, step, makes=[out.name], of=of)
        return out / "rows.jsonl"

    def _features(self, file: Path) -> Path:
        out = self.directory / f"features-{file.stem}.npy"

        def work() -> None:
            np.save(out, features_of(self.seed_model, file, self.config.scales, self.features))

        self.run.step(out.stem, f"hidden states of the seed model for {file.stem}", work, makes=[out.name])
        return out

    @property
    def _generation(self) -> dict[str, Any]:
        return {**self.config.generation, "seed": self.seed}


def steps_for(models: Sequence[str], judges: Sequence[str], rivals: Sequence[str], tests: int, tried: int = 1) -> int:
    """About how many steps it takes to train models and to judge with others."""
    each = [bool(MODELS[name].writer) + (MODELS[name].start is not None) for name in models]
    return sum(each) + tried * (len(models) + (len(judges) + len(rivals)) * tests) + 2 * ("ridge" in rivals)


def kept_rows(rows: Sequence[dict[str, Any]], keep: str, seed: int) -> list[dict[str, Any]]:
    """Of several rationales a prompt, the nearest first: the nearest, or as many drawn by weight as there are prompts.

    A weight is exp(-d^2 / (2 s^2)) for a rationale whose expected score is d from the gold score, with s half the
    gold scores' standard deviation. What has no expected score is neither.
    """
    scored = [row for row in rows if row["rationale_score"] is not None and not isnan(row["rationale_score"])]
    prompts: dict[str, dict[str, Any]] = {}
    for row in scored:
        prompts.setdefault(str(row["prompt"]), row)
    if keep == "nearest":
        return list(prompts.values())
    scale = float(np.std([row["score"] for row in prompts.values()])) / 2 or 1.0
    weights = [exp(-(((row["rationale_score"] - row["score"]) / scale) ** 2) / 2) for row in scored]
    return random.Random(seed).choices(scored, weights, k=len(prompts))


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
