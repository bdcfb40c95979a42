"""One configuration of a replication, read from YAML. Knows nothing of what is done with it."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from rows import TABLE, models_for

from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.rubric import Rubric


@dataclass
class Replication:
    """One configuration.

    Attributes:
        model: Directory or hub id of the seed model.
        data: Items with rationales and scores, in any schema that `trl-tract run` reads; `demo:train:160` stands for
            the first 160 of the demo's.
        tests: Name -> items to judge; empty: some questions of `data` are held out.
        columns: Role -> column, where the items have columns of their own.
        rubric: `criterion`, `scores` and `order`, as in a rubric file, where their prompts are made here.
        eval_fraction: Part of the questions that is held out where there are no `tests`.
        max_questions: Take this many questions of `data`, those with the shortest prompts, and of a test with answers
            to them those answers; None: all.
        train_rows: Train on this many items of `data`, chosen by chance; fewer are a part of more. None: all.
        test_items: Judge this many items of each test, chosen by chance; None: all.
        rationales_per_item: How many of an item's annotated rationales are trained on; None: all.
        drop_reference: Leave the reference answer out of prometheus prompts, which makes them a fifth shorter.
        append_marker: Also score rationales that do not reach the marker, as if they had; always so for the seed model.
        rows: Lines of the table, by their keys in `rows.TABLE`.
        seeds: Of training and sampling.
        choice: How settings are chosen on training items: see `choosing.py`. Empty: nothing is chosen.
        several: Model -> rationales of each item that it judges; the table takes the first. Others write one.
        rationales: How many of its own the stage-one model writes for each training prompt, and scores: what
            `decides.py` looks at, and what `nearest` and `weighted` rationales are taken from. 0: none.
        curve: Numbers of training items; the rows `curve_rows` are trained on each of them as well.
        curve_rows: See there.
        training: Fields of TRACTConfig, the same for all models.
        model_args: Fields of TRL's ModelConfig.
        generation: Sampling of rationales.
        bootstrap: Arguments of CoTBootstrap beside those, for rationales in place of the annotated ones.
        reinforcement: Fields of REALConfig.
        backend: What generates.
        isolate: Run each step in a process of its own; None: on a GPU.
    """

    model: str
    data: str | None = None
    tests: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    rubric: dict[str, Any] = field(default_factory=dict)
    eval_fraction: float = 0.2
    max_questions: int | None = None
    train_rows: int | None = None
    test_items: int | None = None
    rationales_per_item: int | None = None
    drop_reference: bool = False
    append_marker: bool = False
    rows: list[str] = field(default_factory=lambda: list(TABLE))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    choice: dict[str, Any] = field(default_factory=dict)
    several: dict[str, int] = field(default_factory=dict)
    rationales: int = 0
    curve: list[int] = field(default_factory=list)
    curve_rows: list[str] = field(default_factory=lambda: ["mean", "ridge", "stage1", "tract"])
    training: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    bootstrap: dict[str, Any] = field(default_factory=dict)
    reinforcement: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    isolate: bool | None = None

    @property
    def grid(self) -> ScoreGrid:
        return ScoreGrid.from_values(self.training.get("score_values", [1, 2, 3, 4, 5]))

    @property
    def marker(self) -> str:
        return str(self.training.get("score_marker", "[RESULT]"))

    @property
    def scales(self) -> tuple[Scale, ...]:
        return (Scale("", self.grid, CompletionFormat(self.marker)),)

    @property
    def own(self) -> OwnColumns | None:
        """What is said of the items' columns; None where they are in a known schema."""
        if not self.columns and not self.rubric:
            return None
        rubric = None
        if self.rubric:
            given = dict(self.rubric)
            rubric = Rubric(given.pop("criterion"), given.pop("scores"), **given)
        return OwnColumns(self.columns, rubric)

    @property
    def sampling(self) -> dict[str, Any]:
        """Of `generation` what says how a text is sampled."""
        names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
        return {name: self.generation[name] for name in names if name in self.generation}

    @property
    def written_scores(self) -> dict[str, Any]:
        """How scores are written, for what is not told by a trained judge."""
        return {"score_values": list(self.grid.values), "score_marker": self.marker}


def read_config(file: Path) -> Replication:
    """Read a configuration. With `base: OTHER.yaml` it is that one, and what is different.

    Raises:
        ValueError: A key is unknown, or a row is.
    """
    settings = _settings(file)
    unknown = sorted(set(settings) - {each.name for each in fields(Replication)})
    if unknown:
        raise ValueError(f"{file}: {', '.join(unknown)} unknown. Known are: {', '.join(Replication.__annotations__)}")
    config = Replication(**settings)
    models_for([*config.rows, *config.curve_rows])
    return config


def _settings(file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "base" not in settings:
        return settings
    base = _settings(file.with_name(settings.pop("base")))
    both = {name: {**base[name], **value} for name, value in settings.items() if isinstance(base.get(name), dict)}
    return {**base, **settings, **both}
