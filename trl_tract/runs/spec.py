"""What a run is asked for, as `run_tract` and the dry run share it. Knows nothing of how a run is done."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trl_tract.backends.base import settings_that_count
from trl_tract.evaluation.intervals import MIN_UNITS
from trl_tract.files.fingerprint import made_by
from trl_tract.files.seal import contents
from trl_tract.rows.row import Row
from trl_tract.rows.template import TemplateSettings
from trl_tract.scale.scale import Scale, read_scales, scale_arguments
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import Source, held_out
from trl_tract.sources.schemas import Item
from trl_tract.text.options import read_mapping
from trl_tract.text.secrets import without_secrets
from trl_tract.training.recipe import ALIASES, CONSIDERED, OBJECTIVES, calibration_share, overridden

RATIONALES = ("auto", "given", "bootstrap", "none")
# Of training, what the reinforcement stage has alike: the machine and the seed.
_ALIKE = (
    *("seed", "bf16", "fp16", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs", *ALIASES),
    *("report_to", "disable_tqdm", "dataloader_pin_memory", "invalid_rows", "hub_private_repo"),
)
# And how scores are written, where no judge says so.
_OF_A_SEED = (
    *("score_values", "score_texts", "score_marker", "normalize_grid"),
    *("chat_template_kwargs", "thinking", "template_date"),
)
FEWEST_GROUPS, MOST_ASIDE = 5, 1 / 3
"""Of what is kept aside for calibration: the least groups, and the largest part of all of them."""
_ASIDE = {"output_dir", "hub_token", "push_to_hub_token"}  # of training, what changes no result


@dataclass(frozen=True)
class RunSpec:
    """Model, rows and settings of both stages; the attributes are `run_tract`'s arguments.

    Attributes:
        own: The user's rubric and column names.
        given: Fields that the user has set; None: all that are there.
    """

    model: str
    data: str
    eval_data: str | None = None
    eval_fraction: float | None = None
    own: OwnColumns | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    num_generations: int = 1
    on_failure: str = "keep_gold"
    keep_annotated: bool = False
    rationales: str = "auto"
    bootstrap: Mapping[str, Any] = field(default_factory=dict)
    seed_baseline: bool = False
    backend: Mapping[str, Any] = field(default_factory=dict)
    rl: Mapping[str, Any] | None = None
    objective: str = "auto"
    given: frozenset[str] | None = None
    calibrate: float | None = None

    @property
    def set_by_user(self) -> dict[str, Any]:
        """What the user has set, and what to."""
        every = {**self.training, **self.model_args, **self.generation}
        return {name: value for name, value in every.items() if self.given is None or name in self.given}

    def with_recipe(self, recipe: Mapping[str, Any]) -> "RunSpec":
        """The same with the settings that were derived: see `Recipe.to_dict`."""
        training = overridden(self.training, recipe["training"])
        if isinstance(weights := training.get("raft_weight"), Mapping):
            own = {scale.name: scale.to_dict() for scale in self.scales}
            for name, aspect in own.items():
                if aspect["raft_weight"] is None:
                    aspect["raft_weight"] = weights[name]
            training["aspects"] = own
            del training["raft_weight"]
        return replace(
            self,
            training=training,
            model_args={**self.model_args, **recipe["model_args"]},
            generation={**self.generation, **recipe["generation"]},
        )

    def __post_init__(self) -> None:
        """Make one of two ways to say that there are no rationales.

        Raises:
            ValueError: `rationales` or `objective` is unknown, `rationales` contradicts `drop_rationale`, or
                `calibrate` is no part of the rows.
        """
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}")
        if self.calibrate is not None and not 0 <= self.calibrate <= 0.5:
            raise ValueError(f"calibrate={self.calibrate:g} must be a fraction of the rows, from 0 to 0.5")
        if self.rationales not in RATIONALES:
            raise ValueError(f"rationales={self.rationales!r} is unknown: choose one of {', '.join(RATIONALES)}")
        if self.rationales == "bootstrap" and self.training.get("drop_rationale"):
            raise ValueError(
                "rationales='bootstrap' writes rationales, but drop_rationale removes them. Use only one of the two"
            )
        if self.rl is not None and len(self.scales) > 1:
            raise ValueError(
                "rl supports judges with one score only, but aspects names several. Leave rl out, or train a judge for "
                "one aspect"
            )
        if self.rl is not None and self.training.get("drop_rationale"):
            raise ValueError(
                "rl trains rationales, but drop_rationale removes them. To train the seed model with reinforcement "
                "learning only, set rationales='none' and leave drop_rationale out"
            )
        if self.rationales == "none" and self.rl is None:
            object.__setattr__(self, "training", {**self.training, "drop_rationale": True})
        elif self.training.get("drop_rationale"):
            object.__setattr__(self, "rationales", "none")
        for name, idle in (("num_generations", 1), ("keep_annotated", False)):
            if not self.stages and (value := getattr(self, name)) != idle:
                raise ValueError(
                    f"{name}={value} is about the rationales that stage one writes for stage two, but without "
                    f"rationales there are no such stages. Leave {name} out"
                )

    def settled(self, say: Callable[[str], None] = print) -> "RunSpec":
        """With `auto` decided by the rows, and what is decided said."""
        if self.rationales not in ("auto", "bootstrap"):
            return self
        items = [not item.training for _, item in self.source(self.data).found() if isinstance(item, Item)]
        lacking = sum(items)
        if self.rationales == "bootstrap":
            say(f"Rationales: new ones are written for all {len(items):,} rows (rationales='bootstrap')")
            return self
        if not lacking:
            return replace(self, rationales="given")
        kept = "" if lacking == len(items) else "; the other rows keep theirs"
        say(
            f"Rationales: {lacking:,} of {len(items):,} rows have none. {self.author} writes them{kept}. To train "
            "without rationales, set rationales='none'"
        )
        return self

    @property
    def author(self) -> str:
        """Who writes the rationales that rows lack, as a message calls it."""
        model = self.bootstrap.get("model")
        return "The seed model" if model is None else f"The model {model}"

    @property
    def scales(self) -> tuple[Scale, ...]:
        """How the rows write their scores."""
        return read_scales(self.training)

    def source(self, name: str, say: Callable[[str], None] = print) -> Source:
        """The rows of `data` or `eval_data`, as the run reads them."""
        drop = str(self.training.get("invalid_rows", "raise"))
        writes = self.rationales == "auto" and name == self.data
        return Source(name, self.scales, self.own, drop, say, "none" if self.stages else "all", writes)

    def to_write(self, item: Item) -> Sequence[Row]:
        """The rows of an item that the bootstrap reads: without a completion where it is to write one."""
        return [item.reference] if self.rationales == "bootstrap" or not item.training else item.training

    def _trained_on(self, item: Item) -> Sequence[Row]:
        return self.to_write(item) if self.bootstraps else item.training

    def bootstrap_settings(self) -> dict[str, Any]:
        """As arguments of CoTBootstrap."""
        template = TemplateSettings.of_training(self.training)
        names = self.bootstrap.keys() - {"model", "backend"}
        return {**scale_arguments(self.scales), **template.arguments, **{name: self.bootstrap[name] for name in names}}

    def split(self, data: Source) -> Callable[[Item], bool]:
        """Whether an item of `data` is held out."""
        items = (item for _, item in data.items())
        if self.eval_fraction is None:
            return held_out(items, 0.1, self.seed, fewest=MIN_UNITS)
        return held_out(items, self.eval_fraction, self.seed)

    def kept_aside(
        self, data: Source, split: Callable[[Item], bool], evaluated: Source | None
    ) -> Callable[[Item], bool] | str:
        """Whether an item of `data` is kept aside, neither trained nor evaluated on, to calibrate the judges with.

        Such items are to the training rows what the evaluation items are: of other groups; or, where evaluation rows of
        their own are about the same groups, other items of these.

        Args:
            data: Rows to train on.
            split: Whether an item is held out for evaluation, and so not there to be chosen.
            evaluated: Evaluation rows of their own; None: there are none.

        Returns:
            That choice; or why there is none.
        """

        def to_train_on() -> Iterator[Item]:
            return (item for _, item in data.items() if self._trained_on(item) and not split(item))

        rows, groups = 0, set[int]()
        for item in to_train_on():
            rows += len(self._trained_on(item))
            groups.add(hash(item.group))
        share = self.calibrate
        if share is None:
            share = calibration_share(rows) if self.objective == "auto" else 0.0
            if not share:
                return f"{rows:,} rows are too few to set some aside"
        if not share:
            return "calibrate is 0"
        if evaluated is not None:
            known = [hash(item.group) in groups for _, item in evaluated.items()]
            if sum(known) > len(known) / 2:
                return held_out(to_train_on(), share, self.seed + 1, by=_prompt)
        # Fewer groups than that do not show how a fit does on others.
        share = max(share, FEWEST_GROUPS / len(groups))
        if share > MOST_ASIDE:
            return f"{len(groups):,} groups are too few to set some aside"
        return held_out(to_train_on(), share, self.seed + 1)

    @property
    def revision(self) -> str | None:
        """Of the seed model on the hub; None: its main branch."""
        named = self.model_args.get("model_revision")
        return None if named in (None, "main") else str(named)

    def backend_of_seed(self, backend: Mapping[str, Any]) -> dict[str, Any]:
        """A backend's options where it loads the seed model."""
        loads = backend.get("name", "transformers") in ("transformers", "vllm")
        return {**({"revision": self.revision} if loads and self.revision else {}), **backend}

    @property
    def seed(self) -> int:
        """Of the split and of training."""
        return int(self.training.get("seed", 42))

    @property
    def writes_rationales(self) -> bool:
        """Whether judges write rationales; without any there is nothing to self-generate, and one stage alone."""
        return not self.training.get("drop_rationale")

    @property
    def bootstraps(self) -> bool:
        """Whether rationales are written before the training; asked of settled specs."""
        return self.rationales in ("auto", "bootstrap")

    @property
    def stages(self) -> bool:
        """Whether TRACT's two stages are run: not without rationales to learn from."""
        return self.writes_rationales and self.rationales != "none"

    @property
    def rl_training(self) -> dict[str, Any]:
        """Fields of REALConfig: what is as in the other stages, then what was given for this one."""
        alike = _ALIKE if self.stages else (*_ALIKE, *_OF_A_SEED)
        return overridden({name: self.training[name] for name in alike if name in self.training}, self.rl or {})

    @property
    def judged_in_training(self) -> dict[str, Any]:
        """How held-out rows are judged in training, if they are: as the run judges, but for what was given for it."""
        if not self.training.get("judge_eval_items"):
            return {}
        batch = {"batch_size": self.backend["batch_size"]} if "batch_size" in self.backend else {}
        given = read_mapping("judge_eval_settings", self.training.get("judge_eval_settings"))
        generation = self.generation if self.writes_rationales else {}
        return {"judge_eval_settings": {**generation, **batch, **given}}

    @property
    def stage_two_training(self) -> dict[str, Any]:
        """Fields of TRACTConfig for stage two, which shares prompts with several rationales if nothing else is said."""
        training = dict(self.training)
        if training.get("share_prompts") is None:
            several_rows = int(training.get("per_device_train_batch_size", 8)) > 1
            noise = training.get("neftune_noise_alpha") is not None  # refused together
            training["share_prompts"] = self.num_generations > 1 and several_rows and not noise
        return training

    def settings(self) -> dict[str, Any]:
        """Whatever changes the results of the run, by which its directory is recognised."""
        template = self.training.get("chat_template_path")
        files = {"data": self.data, "eval_data": self.eval_data, "chat_template": template}
        settings: dict[str, Any] = {
            "model": self.model,
            "data": without_secrets(self.data),
            "eval_data": without_secrets(self.eval_data),
            "contents": contents(files),
            "eval_fraction": self.eval_fraction,
            "training": without_secrets({name: self.training[name] for name in self.training if name not in _ASIDE}),
            "model_args": without_secrets(self.model_args),
            "generation": dict(self.generation),
            "num_generations": self.num_generations,
            "on_failure": self.on_failure,
            "keep_annotated": self.keep_annotated,
            "backend": self.backend.get("name", "transformers"),
            "engine": settings_that_count(self.backend),
            **made_by(None, self.model),
        }
        if self.bootstraps:
            settings |= {"rationales": self.rationales, "bootstrap": without_secrets(self.bootstrap)}
        if self.rl is not None:
            settings |= {"rl": without_secrets(self.rl), "rationales": self.rationales}
        if self.own is not None:
            settings["own_columns"] = self.own.to_dict()
        # Only where they change something: a run that was begun before there was a choice goes on.
        if self.objective != "paper":
            settings["objective"] = self.objective
            # On the command line, a value that is given looks like the default that it equals.
            given = CONSIDERED & {ALIASES.get(name, name) for name in self.set_by_user if self.given is not None}
            settings |= {"given": sorted(given)} if given else {}
        if self.calibrate is not None:
            settings["calibrate"] = self.calibrate
        return settings


def too_few_groups(held_out: int, others: int) -> str | None:
    """What is said where so few groups are held out that the report can give no verdict; None where they are enough.

    Args:
        held_out: Groups among the held-out items.
        others: The other groups of the same rows; 0 where the held-out items are of their own.
    """
    if held_out >= MIN_UNITS:
        return None
    ways = ["give eval_data with more groups"]
    if held_out + others > MIN_UNITS:
        ways.insert(0, f"set eval_fraction to {math.ceil(100 * MIN_UNITS / (held_out + others)) / 100:g} or more")
    return (
        f"Too few held-out groups to tell how good the judge is: {held_out}. Confidence intervals need {MIN_UNITS}. "
        f"{', or '.join(ways).capitalize()}"
    )


def _prompt(item: Item) -> str:
    return json.dumps(item.reference["prompt"])
