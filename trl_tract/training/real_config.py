"""REALConfig: the fields that the reinforcement stage adds to GRPOConfig, and what it refuses. Knows nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from trl import GRPOConfig

from trl_tract.rows.template import TemplateSettings
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale, read_scales
from trl_tract.text.options import option
from trl_tract.training.config import KeepsSecrets, TRACTConfig, field_values, greater_is_better

_TRACT = {each.name: each for each in fields(TRACTConfig)}
_SAVED = " None: as the model was trained with TRACT, by its tract_config.json; without one as in TRACTConfig."

# What samples from another distribution than the loss knows of, or leaves parts of the gradient out.
_TRUE_GRADIENT: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, None, -1),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "num_iterations": (1,),
}


def _as_in_tract(name: str) -> dict[str, Any]:
    """What describes a field of TRACTConfig that is left to the model's own where it is not given."""
    return {**_TRACT[name].metadata, "help": _TRACT[name].metadata["help"] + _SAVED}


@dataclass(repr=False)
class REALConfig(KeepsSecrets, GRPOConfig):
    """Configuration of `REALTrainer`: everything in GRPOConfig, and the fields below.

    Source: https://arxiv.org/abs/2603.17145
    """

    score_values: list[float] | None = field(default=None, metadata=_as_in_tract("score_values"))
    score_texts: list[str] | None = field(default=None, metadata=_as_in_tract("score_texts"))
    score_marker: str | None = field(default=None, metadata=_as_in_tract("score_marker"))
    normalize_grid: bool | None = field(default=None, metadata=_as_in_tract("normalize_grid"))
    thinking: str | None = field(default=None, metadata=_as_in_tract("thinking"))
    template_date: str | None = field(default=None, metadata=_as_in_tract("template_date"))
    direct_weight: float = option(
        1.0,
        "Weight of the direct term: the gradient of the squared error through the score itself, beside the "
        "policy term's, through the rationale. 1 is the gradient of the expected squared error; 0 trains the "
        "rationale alone.",
    )
    gold_weight: float = option(
        0.0,
        "Weight of the gold score's log-likelihood in reward and direct term, squared rubric units a nat. "
        "A gold score between two values of the grid counts for both. 0 leaves it out.",
    )
    advantages: str = option(
        "unbiased",
        "How rewards become advantages: `unbiased`, minus the mean of the other rewards of the group, so "
        "that both terms together are the gradient of the expected squared error whatever loss_type is; "
        "`normalised`, minus the group's mean, divided by its standard deviation and kept in [-1, 1], as in REAL. "
        "It stands in for scale_rewards.",
        choices=["unbiased", "normalised"],
    )
    no_score_penalty: float | None = option(
        None,
        "Loss of a rationale behind which there is no score, because it never reached the marker, in "
        "squared rubric units: it stands in for the squared error. Such rationales are counted in "
        "`rationale/no_score`. None: the square of the score range, as for the worst score that there is.",
    )
    share_prompts: bool = option(
        False,
        "Compute the prompt of a group's rationales once in both forward passes: the same update, up to "
        "rounding, for less time and memory where prompts are long. A micro-batch then holds whole groups where "
        "per_device_train_batch_size is a multiple of num_generations. Needs sdpa, eager or, on a GPU, flex "
        "attention.",
    )
    invalid_rows: str = option(
        "raise",
        "What happens to rows whose gold score or prompt is missing, off the range or unreadable: `raise` "
        "stops and names them; `drop` trains without them and says how many there were.",
        choices=["raise", "drop"],
    )
    disable_dropout: bool = option(
        True,
        "Turn dropout off. With dropout, the model that is trained is not the one that wrote the rationale "
        "and gave its reward.",
    )
    hub_private_repo: bool | None = field(default=True, metadata=dict(_TRACT["hub_private_repo"].metadata))

    def __post_init__(self) -> None:
        """Check the fields of REAL, and GRPOConfig's own."""
        if self.greater_is_better is None and self.metric_for_best_model is not None:  # type: ignore[has-type]
            self.greater_is_better = greater_is_better(self.metric_for_best_model)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # see TRACTConfig
        super().__post_init__()
        if self.score_values is not None:
            grid = ScoreGrid.from_values(self.score_values, self.score_texts)
            if isinstance(self.score_values, Mapping):
                self.score_texts = list(grid.texts)
            self.score_values = list(grid.values)
        self._check_template()
        for name in ("direct_weight", "gold_weight", "no_score_penalty"):
            weight = getattr(self, name)
            if weight is not None and (not isinstance(weight, int | float) or not 0 <= weight < float("inf")):
                raise ValueError(f"{name}={weight!r} must be a number that is 0 or greater")
        if self.advantages not in ("unbiased", "normalised"):
            raise ValueError(f"advantages={self.advantages!r} is unknown: choose 'unbiased' or 'normalised'")
        if self.invalid_rows not in ("raise", "drop"):
            raise ValueError(f"invalid_rows={self.invalid_rows!r} is unknown: choose 'raise' or 'drop'")
        # For what GRPOTrainer logs; advantages are formed here.
        self.scale_rewards = "group" if self.advantages == "normalised" else "none"
        self._check_sampling()

    def _check_template(self) -> None:
        given = self._given("thinking", "template_date", "chat_template_kwargs")
        if given:
            settings = self.template_settings
            self.thinking = None if self.thinking is None else settings.thinking
            self.template_date, self.chat_template_kwargs = settings.date, dict(settings.chat_template_kwargs) or None

    def _check_sampling(self) -> None:
        if self.mask_truncated_completions:
            raise ValueError(
                "mask_truncated_completions=True masks whatever does not end its turn, and a rationale ends at its "
                "marker. Leave it out: rationales that never reach the marker earn no_score_penalty"
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching=True does not stop at the marker. Leave it out, or use vLLM "
                "(use_vllm=True)"
            )
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ValueError(
                f"loss_type='cispo' cuts ratios at epsilon_high={self.epsilon_high or self.epsilon}, below the 1 of a "
                "model that has not changed, so that its policy term is too small for the direct term. Set "
                "epsilon_high to 1 or more, 5 in its paper"
            )
        if self.advantages == "normalised":
            return
        for name, allowed in _TRUE_GRADIENT.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"advantages='unbiased' is the gradient of the expected squared error, and with "
                    f"{name}={getattr(self, name)} nothing is: leave {name} at {allowed[0]}, or set "
                    "advantages='normalised'"
                )
        if self.loss_type == "vespo":
            raise ValueError(
                "loss_type='vespo' weighs rationales in a way of its own, and advantages='unbiased' would not be the "
                "gradient of anything: take another loss_type, or advantages='normalised'"
            )
        if self.gradient_accumulation_steps % self.steps_per_generation:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} with gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} trains on rewards of a model before the present one. With "
                "advantages='unbiased' give both the same value; 'normalised' takes any"
            )

    @property
    def objective(self) -> dict[str, Any]:
        """What a checkpoint was trained towards; JSON-serialisable. Going on with another one is refused."""
        return {name: getattr(self, name) for name in _OBJECTIVE}

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The scale as far as it is given; what is left out is as by TRACTConfig's defaults."""
        return read_scales(self._given("score_values", "score_texts", "score_marker"))

    @property
    def template_settings(self) -> TemplateSettings:
        """What chat templates are rendered with, as far as it is given."""
        return TemplateSettings.of_training(self._given("thinking", "template_date", "chat_template_kwargs"))

    @classmethod
    def from_args(cls, args: TrainingArguments | None, model_name: str) -> "REALConfig":
        """Take over what the user passed to the trainer as `args`.

        Args:
            args: A REALConfig (returned as it is), a plain GRPOConfig (field by field), or None.
            model_name: Names the output directory when there are no `args`: `<model_name>-REAL`.
        """
        if args is None:
            return cls(f"{model_name}-REAL")
        if isinstance(args, cls):
            return args
        private = True if args.hub_private_repo is None else args.hub_private_repo
        return cls.from_fields({**field_values(args), "hub_private_repo": private})

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "REALConfig":
        """From all fields of a configuration, of which the host takes one or the other of two that say the same."""
        return cls(**{name: value for name, value in values.items() if name != "generation_batch_size"})

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


_OBJECTIVE = (
    "score_values",
    "score_texts",
    "score_marker",
    "normalize_grid",
    "direct_weight",
    "gold_weight",
    "advantages",
    "no_score_penalty",
    "loss_type",
    "num_generations",
    "temperature",
    "beta",
)
