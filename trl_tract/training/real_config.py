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
_SAVED = " None: the setting in the model's tract_config.json, or TRACTConfig's default if there is no such file."

# What samples from another distribution than the loss knows of, or leaves parts of the gradient out.
_TRUE_GRADIENT: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, None, -1),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "num_iterations": (1,),
    "neftune_noise_alpha": (None,),
    "vllm_structured_outputs_regex": (None,),
}
# Of generation_kwargs: what has a field of its own, which the loss knows of, and what changes no sample.
_OWN_FIELD = {"max_new_tokens": "max_completion_length", "max_tokens": "max_completion_length"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
}
_HARMLESS = {
    "cache_config",
    "cache_implementation",
    "use_cache",
    "prefill_chunk_size",
    "seed",
    "stop",
    "stop_token_ids",
}

_ONE_REWARD = "because the only reward is the judge's own error"
# What this stage has no use for: the values that say nothing, and why.
_NO_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "reward_weights": ((None,), _ONE_REWARD),
    "multi_objective_aggregation": (("sum_then_normalize",), _ONE_REWARD),
    "label_smoothing_factor": ((0.0,), "because rationales are sampled and not copied"),
    "train_sampling_strategy": (("random",), "because each row is drawn num_generations times; see shuffle_dataset"),
}


def _as_in_tract(name: str) -> dict[str, Any]:
    """What describes a field of TRACTConfig that is left to the model's own where it is not given."""
    return {**_TRACT[name].metadata, "help": _TRACT[name].metadata["help"] + _SAVED}


@dataclass(repr=False)
class REALConfig(KeepsSecrets, GRPOConfig):
    """Configuration of `REALTrainer`: all fields of GRPOConfig, and the fields below.

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
        "Weight of the direct term, the gradient of the squared error through the score. The policy term is the "
        "gradient through the rationale. 1 gives the gradient of the expected squared error; 0 trains only the "
        "rationale.",
    )
    gold_weight: float = option(
        0.0,
        "Weight of the gold score's log-likelihood in the reward and the direct term, in squared rubric units per nat. "
        "A gold score between two grid values counts for both. 0 leaves it out.",
    )
    advantages: str = option(
        "unbiased",
        "How to compute advantages from rewards. `unbiased`: subtract the mean of the group's other rewards; both "
        "terms together are then the gradient of the expected squared error, whatever the loss_type. `normalised`: "
        "subtract the group's mean, divide by its standard deviation and clip to [-1, 1], as in REAL. Replaces "
        "scale_rewards.",
        choices=["unbiased", "normalised"],
    )
    no_score_penalty: float | None = option(
        None,
        "Loss of a rationale without a score, because it never reached the marker, in squared rubric units. Replaces "
        "the squared error. `rationale/no_score` counts such rationales. None: the square of the score range, the loss "
        "of the worst possible score.",
    )
    share_prompts: bool = option(
        False,
        "Compute the prompt of a group's rationales only once in both forward passes. The update is the same up to "
        "rounding, and takes less time and memory if prompts are long. A micro-batch holds whole groups if "
        "per_device_train_batch_size is a multiple of num_generations. Needs sdpa, eager or, on a GPU, flex attention.",
    )
    invalid_rows: str = option(
        "raise",
        "What to do with rows whose gold score or prompt is missing, out of range or unreadable. `raise`: stop and "
        "name them. `drop`: train without them and report their number.",
        choices=["raise", "drop"],
    )
    disable_dropout: bool = option(
        True,
        "Turn dropout off. With dropout, the trained model differs from the one that wrote the rationale and computed "
        "its reward.",
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
                raise ValueError(f"{name}={weight!r} must be a number, 0 or greater")
        if self.advantages not in ("unbiased", "normalised"):
            raise ValueError(f"advantages={self.advantages!r} is unknown: choose 'unbiased' or 'normalised'")
        if self.invalid_rows not in ("raise", "drop"):
            raise ValueError(f"invalid_rows={self.invalid_rows!r} is unknown: choose 'raise' or 'drop'")
        # For what GRPOTrainer logs; advantages are formed here.
        scale = "group" if self.advantages == "normalised" else "none"
        no_effect = {**_NO_EFFECT, "scale_rewards": (("group", scale), f"with advantages={self.advantages!r}")}
        for name, (allowed, why) in no_effect.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} has no effect, {why}. Leave it out")
        self.scale_rewards = scale
        self._check_sampling()

    def _check_template(self) -> None:
        given = self._given("thinking", "template_date", "chat_template_kwargs")
        if given:
            settings = self.template_settings
            self.thinking = None if self.thinking is None else settings.thinking
            self.template_date, self.chat_template_kwargs = settings.date, dict(settings.chat_template_kwargs) or None

    def _check_sampling(self) -> None:
        if not self.max_completion_length or self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} must be 1 or more")
        if self.mask_truncated_completions:
            raise ValueError(
                "mask_truncated_completions=True would mask every rationale, because a rationale ends at its marker "
                "and not with its turn. Leave it out: rationales that never reach the marker get no_score_penalty"
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching=True does not stop at the marker. Leave it out, or use vLLM "
                "(use_vllm=True)"
            )
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ValueError(
                f"loss_type='cispo' clips ratios at epsilon_high={self.epsilon_high or self.epsilon}, below the ratio "
                "1 of an unchanged model, so the policy term would be too small for the direct term. Set epsilon_high "
                "to 1 or more; its paper uses 5"
            )
        for name, least in (("epsilon", 0), ("epsilon_high", 0), ("delta", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(
                    f"{name}={value} would clip the ratio 1 of an unchanged model, so part of the policy term would "
                    f"have no gradient. Set {name} to {least} or more"
                )
        for name in self.generation_kwargs or {}:
            if own := _OWN_FIELD.get(name):
                raise ValueError(
                    f"generation_kwargs sets {name}, which the loss would not know of. Set {own} in REALConfig instead"
                )
        if self.advantages == "normalised":
            return
        if others := sorted(set(self.generation_kwargs or {}) - _HARMLESS):
            raise ValueError(
                "advantages='unbiased' gives the gradient of the expected squared error, but only if rationales are "
                f"sampled from the model as it is. Leave {others[0]} out of generation_kwargs, or set "
                "advantages='normalised'"
            )
        for name, allowed in _TRUE_GRADIENT.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    "advantages='unbiased' gives the gradient of the expected squared error, but not with "
                    f"{name}={getattr(self, name)}. Leave {name} at {allowed[0]}, or set advantages='normalised'"
                )
        if self.loss_type == "vespo":
            raise ValueError(
                "loss_type='vespo' has its own weights for rationales, so advantages='unbiased' would not give a "
                "gradient. Use another loss_type, or advantages='normalised'"
            )
        if self.gradient_accumulation_steps % self.steps_per_generation:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} with "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} trains on rewards of an older model. "
                "With advantages='unbiased', give both the same value; 'normalised' accepts any values"
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
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}. Pass a REALConfig, or a GRPOConfig")
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
