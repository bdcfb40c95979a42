"""Settings for a judge that learns on few rows, derived from what is known of model, rows and device: pure.

Where they come from, and the runs behind them: docs/defaults.md. Knows nothing of files or
of how facts are found.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_tract.scale.scale import read_scales
from trl_tract.text.options import read_mapping

OBJECTIVES = ("auto", "paper")
"""`auto`: what is not set is derived here. `paper`: the objective and the defaults of TRACT's authors and of TRL."""
PARTS = ("training", "model_args", "generation")
FEWEST_TO_CALIBRATE = 15
"""Fewer held-out items than this move a fitted line more than they improve it."""
UPDATES, MOST_EPOCHS = 120, 4
"""Updates that a stage is to have, about, and the most passes over the rows for them."""
BATCH_TOKENS = 8192
"""Of a batch on one device, padding included."""
MOST_DISTINCT = 0.8
"""With more distinct tokens than this part, sharing prompts saves too little to be turned on unasked."""
ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Second names that transformers has for a setting. Where both are set, the first one here counts, silently."""
_BATCH, _ACCUMULATED = "per_device_train_batch_size", "gradient_accumulation_steps"
CONSIDERED = {
    *("raft_weight", "score_in_ce", "annotator_loss", "annotator_weight", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "share_prompts"),
    *("num_train_epochs", "bf16", "gradient_checkpointing", "use_peft", "lora_r", "lora_alpha", "lora_target_modules"),
    *("load_in_4bit", "dtype", "max_new_tokens"),
    *("max_steps", "fp16", "load_in_8bit", "model_init_kwargs"),  # looked at, never derived
}
"""Fields whose being given changes what is derived, even where their values are the defaults."""
_LOADED = {"load_in_4bit", "load_in_8bit"}
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """What trains.

    Attributes:
        memory: Bytes: of the accelerator, or of the machine where there is none.
        bfloat16: Whether it computes faster in bfloat16 than in float32.
    """

    kind: str
    memory: int
    bfloat16: bool
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What settings are derived from.

    Attributes:
        rows: To train on, those kept aside for calibration not among them.
        rationale: Tokens of the longest completion.
        variances: Of the gold scores of each scale by its name, squared rubric units.
        spans: Highest minus lowest score of each scale's grid, rubric units.
        distinct: Part of the tokens that `share_prompts` computes, in micro-batches of four rows by chance.
    """

    parameters: int
    rows: int
    tokens: float
    longest: int
    rationale: int
    variances: Mapping[str, float]
    spans: Mapping[str, float]
    device: Device
    distinct: float = 1.0

    def __str__(self) -> str:
        size = f"{self.parameters / 1e9:.1f}B" if self.parameters >= 1e9 else f"{self.parameters / 1e6:.0f}M"
        return (
            f"{self.rows:,} rows of {self.tokens:,.0f} tokens, a model of {size} parameters, {self.device.kind} with "
            f"{self.device.memory / _GB:.0f} GB"
        )


@dataclass(frozen=True)
class Setting:
    """One derived setting.

    Attributes:
        part: `training`, `model_args` or `generation`: whose field it is.
    """

    part: str
    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Recipe:
    """Derived settings, those that the user has set left out."""

    facts: Facts
    settings: tuple[Setting, ...] = field(default=())

    def part(self, name: str) -> dict[str, Any]:
        """The settings of one part, by field."""
        return {setting.name: setting.value for setting in self.settings if setting.part == name}

    def to_dict(self) -> dict[str, Any]:
        """The content of `recipe.json`."""
        parts = {name: self.part(name) for name in PARTS}
        why = {setting.name: setting.why for setting in self.settings}
        return {"objective": "auto", "derived_from": str(self.facts), **parts, "why": why, "facts": asdict(self.facts)}


def derive(facts: Facts, given: Mapping[str, Any] | None = None) -> Recipe:
    """The settings of a training on few rows.

    Args:
        given: Fields that the user has set, and what to: they are left alone, and others are derived to go with them.

    Raises:
        ValueError: The model does not fit into the device's memory.
    """
    given = {ALIASES.get(name, name): value for name, value in (given or {}).items()}
    given |= read_mapping("model_init_kwargs", given.get("model_init_kwargs"))  # counts before model_args
    settings = [*_score_terms(facts, given), *_adapter(facts, given), *_schedule(facts, given), *_numbers(facts, given)]
    return Recipe(facts, tuple(setting for setting in settings if setting.name not in given))


def overridden(fields: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration with others in their place, by whichever name.

    Example:
        >>> overridden({"activation_checkpointing": True, "seed": 1}, {"gradient_checkpointing": False})
        {'seed': 1, 'gradient_checkpointing': False}
    """
    return {**{name: value for name, value in fields.items() if ALIASES.get(name) not in by}, **by}


def score_weight(variance: float, span: float) -> float:
    """Weight of the squared error in parts of the gold scores' variance: it does not depend on the scale's units.

    Always predicting the mean then costs 1, whatever the scale. Gold scores that hardly differ are taken to vary by a
    tenth of the range, or noise would be all that counts.

    Args:
        variance: Of the gold scores, squared rubric units.
        span: Highest minus lowest score of the grid, rubric units.

    Example:
        >>> score_weight(2.0, 4.0), score_weight(2.0 * 25**2, 4.0 * 25), score_weight(0.0, 4.0)
        (0.5, 0.0008, 6.2)
    """
    return _rounded(1 / max(variance, (span / 10) ** 2))


def calibration_share(rows: int) -> float:
    """Part of the rows that is kept aside for calibration: a tenth, but 30 of few rows, and 200 at most.

    Example:
        >>> calibration_share(60), calibration_share(100), calibration_share(1500), calibration_share(100_000)
        (0.0, 0.2, 0.1, 0.002)
    """
    share = min(max(0.1 * rows, 30), 200, 0.2 * rows) / max(rows, 1)
    return share if share * rows >= FEWEST_TO_CALIBRATE else 0.0


def _score_terms(facts: Facts, given: Mapping[str, Any]) -> list[Setting]:
    own = {scale.name for scale in read_scales(given) if scale.raft_weight is not None}
    weights = {
        name: score_weight(variance, facts.spans[name]) for name, variance in facts.variances.items() if name not in own
    }
    weight = weights.get("", weights)
    squared = [Setting("training", "raft_weight", weight, "1 / variance of the gold scores")] if weights else []
    if given.get("annotator_loss") == "none":
        return [
            *squared,
            Setting("training", "score_in_ce", True, "without it, the squared error can lose its gradient"),
        ]
    return [
        *squared,
        Setting(
            "training", "annotator_loss", "distribution", "cross-entropy of the score, whose gradient does not vanish"
        ),
        Setting("training", "annotator_weight", 1.0, "a mean over scores, nats"),
    ]


def _adapter(facts: Facts, given: Mapping[str, Any]) -> list[Setting]:
    half = 2 * facts.parameters  # bytes of 16-bit weights
    full = _full(given)
    small_enough = half <= facts.device.memory / 2
    # Only CUDA has kernels that make four bits worth it.
    quantised = facts.device.kind == "cuda" and not (small_enough or full) and not given.keys() & _LOADED
    in_float32 = full and "dtype" not in given
    needed = 0.7 * facts.parameters if quantised or given.keys() & _LOADED else 2 * half if in_float32 else half
    if needed > 0.9 * facts.device.memory:
        raise ValueError(
            f"a model of {facts.parameters / 1e9:.1f}B parameters needs {needed / _GB:.0f} GB for its weights alone, "
            f"but {facts.device.kind} has {facts.device.memory / _GB:.0f} GB. Choose a smaller model, or set "
            "objective='paper' and your own settings"
        )
    if full:
        return []
    lora = [
        Setting("model_args", "use_peft", True, "few rows: a low-rank adapter instead of all weights"),
        Setting("model_args", "lora_r", 16, "rank of the adapter"),
        Setting("model_args", "lora_alpha", 2 * int(given.get("lora_r", 16)), "twice the rank"),
        Setting("model_args", "lora_target_modules", "all-linear", "all layers"),
    ]
    if quantised:
        lora.append(
            Setting("model_args", "load_in_4bit", True, "16-bit weights would need more than half of the memory")
        )
    return lora


def _schedule(facts: Facts, given: Mapping[str, Any]) -> list[Setting]:
    # Anchored at 2e-4 for 8B, as is usual for LoRA; the slope is between those that others have fitted to width.
    rate = min(max(2e-4 * (8e9 / facts.parameters) ** 0.4, 1e-4), 1e-3)
    wanted = 4 if facts.rows < 500 else 8 if facts.rows < 5000 else 16
    batch, accumulated = _batch(facts, given, wanted)
    together = batch * accumulated * facts.device.processes
    epochs = min(max(round(UPDATES * together / facts.rows), 1), MOST_EPOCHS)
    full = _full(given)
    found = [
        Setting(
            "training",
            "learning_rate",
            _rounded(rate / 10 if full else rate),
            "for LoRA on a model of this size" if not full else "a tenth of the rate for LoRA",
        ),
        Setting("training", "lr_scheduler_type", "cosine", "decays to 0"),
        Setting("training", "warmup_steps", 0.1, "fraction of the updates in which it rises"),
    ]
    why = f"{together} rows per update" + (": few rows, so small updates" if together == wanted else "")
    found += [
        Setting("training", "per_device_train_batch_size", batch, why),
        Setting("training", "gradient_accumulation_steps", accumulated, "" if _BATCH not in given else why),
    ]
    if batch > 1 and facts.distinct <= MOST_DISTINCT and given.get("neftune_noise_alpha") is None:
        computed = f"rows begin alike: {facts.distinct:.0%} of the tokens are left to compute"
        found.append(Setting("training", "share_prompts", True, computed))
    if not given.keys() & {"num_train_epochs", "max_steps"}:
        found.append(
            Setting(
                "training",
                "num_train_epochs",
                float(epochs),
                f"about {math.ceil(facts.rows / together) * epochs} updates",
            )
        )
    return found


def _batch(facts: Facts, given: Mapping[str, Any], wanted: int) -> tuple[int, int]:
    """The rows of a batch and the batches of an update, on one device, so that all devices' updates have `wanted` rows.

    What is given stays, and the other is what then comes closest without more rows.
    """
    each = wanted // facts.device.processes
    accumulated = int(given.get(_ACCUMULATED, 1))
    batch = max(min(each // accumulated, BATCH_TOKENS // max(facts.longest, 1)), 1)
    batch = int(given.get(_BATCH, 2 ** int(math.log2(batch))))
    return batch, int(given.get(_ACCUMULATED, max(each // batch, 1)))


def _numbers(facts: Facts, given: Mapping[str, Any]) -> list[Setting]:
    fast = given.get("bf16", facts.device.bfloat16)
    small = facts.parameters < 1e9 and facts.longest <= 2 * BATCH_TOKENS
    half = "float16" if given.get("fp16") else "bfloat16" if fast else "float32"
    # Small updates are lost in weights of 16 bits; the computation is in 16 bits all the same.
    dtype = ("float32", "all weights are trained") if _full(given) else (half, "frozen weights")
    kind = [Setting("model_args", "dtype", *dtype)]
    if not given.get("fp16"):
        kind.insert(0, Setting("training", "bf16", fast, "faster here" if fast else "float32 is faster here"))
    return [
        *kind,
        Setting("training", "gradient_checkpointing", not small, "there is enough memory" if small else "saves memory"),
        Setting("generation", "max_new_tokens", min(max(2 * facts.rationale, 64), 1024), "twice the longest rationale"),
    ]


def _full(given: Mapping[str, Any]) -> bool:
    """Whether all weights are trained."""
    return not given.get("use_peft", True)


def _rounded(number: float) -> float:
    return float(f"{number:.2g}")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each:g}" for name, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def tell(recipe: Mapping[str, Any]) -> list[str]:
    """Lines that say what was derived, and why."""
    settings = {name: value for part in PARTS for name, value in recipe[part].items()}
    shown = {name: f"{name} {_shown(value)}" for name, value in settings.items()}
    width = max((len(each) for each in shown.values()), default=0) + 2
    lines = [f"  {each.ljust(width)}{recipe['why'][name]}".rstrip() for name, each in shown.items()]
    return [f"Settings derived for {recipe['derived_from']} (you can set each yourself):", *lines]
