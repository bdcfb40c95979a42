"""TRACTConfig: the fields that TRACT adds to SFTConfig, and what it refuses. Knows nothing else."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from trl_tract.rows.template import TemplateSettings
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import DEFAULT_MARKER, DEFAULT_VALUES, Scale, read_scales
from trl_tract.text.options import option, read_mapping
from trl_tract.text.secrets import without_secrets


class KeepsSecrets:
    """For training arguments: what is secret in them, at any depth, is neither shown nor written."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as they may be shown, logged and written."""
        fields: dict[str, Any] = without_secrets(super().to_dict())  # type: ignore[misc]
        return fields

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    __str__ = __repr__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the host writes it to training_args.bin. Copies in memory, which keep what is secret, come below.
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, state, *rest = reduced
        return (make, arguments, without_secrets(state), *rest)

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = copy.copy(self)
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other


@dataclass(repr=False)
class TRACTConfig(KeepsSecrets, SFTConfig):
    """Configuration of `TRACTTrainer`: all fields of SFTConfig, and the fields below.

    `max_length` defaults to 3000, as in the paper, instead of SFTConfig's 1024: judge prompts are long, and a row that
    is cut loses its score.

    Source of the defaults: Chiang et al. 2025 and its code, https://aclanthology.org/2025.acl-long.147
    """

    max_length: int | None = option(
        3000,
        "Maximum number of tokens in a row, including the prompt. A row whose score would be cut off is refused, never "
        "cut silently (see `invalid_rows`). None: no limit. The paper uses 3000.",
    )
    score_values: list[float] = option(
        list(DEFAULT_VALUES),
        "Score grid: the possible scores in rubric units, in increasing order. Any numbers work, such as 1 to 5, half "
        "points or 0 to 100. A score may take several tokens. Ranges can be abbreviated: 0..100, or 0..10..0.5 for "
        "half points.",
    )
    score_texts: list[str] | None = option(
        None,
        "Text of each score in the completions, in the order of `score_values`, if scores are written as letters or "
        "words. None: numbers.",
    )
    score_marker: str = option(
        DEFAULT_MARKER, "Text that stands before the score in every completion. It counts only where a score follows."
    )
    aspects: dict[str, Any] | str | None = option(
        None,
        "Aspects, if a completion has one score for each of several aspects: a mapping from each name to its `marker`, "
        "`values` (1 to 5 by default), `texts` and `raft_weight`, in the order of the scores in the completion. The "
        "column `scores` then maps names to gold scores. Replaces score_marker, score_values and score_texts. JSON on "
        "the command line. None: one score per completion.",
    )
    raft_weight: float = option(
        1.0,
        "Weight of the squared error of the expected score, relative to the rationale's cross-entropy (lambda of "
        "CoT-RAFT). Unitless. The error is in squared rubric units, so halving the score range quarters it. 0 trains "
        "on the rationale only.",
    )
    rationale_weight: float = option(
        1.0,
        "Weight of the completion's cross-entropy, a mean over tokens in nats. 0 gives RAFT without a rationale: such "
        "a model predicts scores but no longer writes text.",
    )
    score_in_ce: bool = option(
        False,
        "Include the score token in the cross-entropy, as in the paper's formula; the authors' code does not. With "
        "`raft_weight=0`, this is the ordinary cross-entropy judge.",
    )
    drop_rationale: bool = option(
        False,
        "Remove the rationale from every completion, so that the score directly follows the prompt, as in the paper's "
        "baselines without rationales. The judge then writes no rationale either.",
    )
    normalize_grid: bool = option(
        False,
        "Divide the expected score by the probability mass on the grid. The paper and its code do not divide: mass off "
        "the grid then pulls the score towards 0, which trains the model to stay on the grid.",
    )
    annotator_loss: str = option(
        "none",
        "Additional loss if `score` is a list with one score per annotator. `none`: train only on their mean. "
        "`distribution`: add the cross-entropy with their histogram on the grid, weighted by `annotator_weight`.",
        choices=["none", "distribution"],
    )
    annotator_weight: float = option(
        0.0, "Weight of `annotator_loss`, a mean over scores in nats. With 0, the loss is logged but not trained."
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None,
        "Variables for the chat template, in training and whenever the judge is used. A row's own "
        "`chat_template_kwargs` take precedence. JSON on the command line. None: no variables.",
    )
    thinking: str = option(
        "auto",
        "How to use the thinking block of a reasoning model. `off`: no thinking, by the chat template's own switch or "
        "an empty block. `rationale`: the rationale stands inside the thinking block, and the score after it. `auto`: "
        "`rationale` if at least half of the first 1,000 rows contain thinking (`<think>` or `reasoning_content`) and "
        "the template supports it, otherwise `off`.",
        choices=["auto", "off", "rationale"],
    )
    template_date: str | None = option(
        None,
        "Date for chat templates that render one, as YYYY-MM-DD. It is saved, so that the judge sees the same date as "
        "in training. None: the day of training.",
    )
    invalid_rows: str = option(
        "raise",
        "What to do with rows whose score is missing, out of range, cut off by `max_length` or ambiguous. `raise`: "
        "stop and name them. `drop`: train without them and report their number.",
        choices=["raise", "drop"],
    )
    judge_eval_items: int = option(
        0,
        "Number of held-out rows to judge at each evaluation, with rationales that the model writes itself. Logs "
        "`eval_judge/rmse` and other metrics, which can select the best checkpoint. Takes as long as judging that many "
        "rows. `run`, and `train` without --eval_data, take whole groups of the training rows for this. 0: none.",
    )
    judge_eval_settings: dict[str, Any] | str | None = option(
        None,
        "Settings for judging during training: arguments of CoTRAILJudge, and `batch_size`. JSON on the command line, "
        "such as '{\"max_new_tokens\": 256}'. None: the defaults, or in a run, the run's own judge settings.",
    )

    share_prompts: bool | None = option(
        None,
        "Compute a prefix that several rows of a micro-batch share only once. The update is the same up to rounding, "
        "and takes less time and memory if prompts are long and shared. Needs sdpa, eager or, on a GPU, flex "
        "attention; with other kernels, each row is computed separately and a message says so. None: on in a run "
        "whose rows begin alike, and in its stage two with `num_generations` above 1; otherwise off.",
    )
    share_batches: str = option(
        "prompt",
        "With `share_prompts`, which rows form a micro-batch. `prompt`: rows with the same prompt, such as its several "
        "rationales. `question`: also rows whose prompts share a prefix, such as answers to one question after the "
        "same rubric. `none`: rows in the order of `train_sampling_strategy`. Micro-batches are shuffled, so an update "
        "of several of them (accumulation, ranks) mixes prompts.",
        choices=["prompt", "question", "none"],
    )

    hub_private_repo: bool | None = option(
        True,
        "With `push_to_hub`: whether a newly created repository is private. None: the account's default, which may be "
        "public. An existing repository keeps its visibility.",
    )

    def __post_init__(self) -> None:
        """Check the fields of TRACT, then SFTConfig's own."""
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None:  # type: ignore[has-type]
            self.greater_is_better = greater_is_better(metric)
        if not torch.accelerator.is_available():
            # TRL turns bf16 on, and transformers then asks for this flag, which nothing else can stand for here.
            self.use_cpu = True
        super().__post_init__()
        # Raises for what is no grid or marker; YAML and the command line may give integers.
        grid = ScoreGrid.from_values(self.score_values, self.score_texts)
        if isinstance(self.score_values, Mapping):
            self.score_texts = list(grid.texts)
        self.score_values = list(grid.values)
        scales = self.scales
        if self.aspects is not None:
            self.aspects = {scale.name: scale.to_dict() for scale in scales}
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be 1 or more, or None for no limit")
        for name in ("raft_weight", "rationale_weight", "annotator_weight"):
            weight = getattr(self, name)
            if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise ValueError(f"{name}={weight!r} must be a number, 0 or greater")
        if not any([*self.raft_weights, self.rationale_weight, self.annotator_weight]):
            raise ValueError(
                "raft_weight and rationale_weight are both 0, so there is no loss to train on. Set one of them above 0"
            )
        if self.annotator_loss not in ("none", "distribution"):
            raise ValueError(f"annotator_loss={self.annotator_loss!r} is unknown: choose 'none' or 'distribution'")
        if self.annotator_loss == "none" and self.annotator_weight:
            raise ValueError(
                f"annotator_weight={self.annotator_weight:g} has no effect without annotator_loss. Set "
                "annotator_loss='distribution' as well"
            )
        settings = self.template_settings
        self.chat_template_kwargs = dict(settings.chat_template_kwargs) or None
        self.thinking, self.template_date = self.thinking or settings.thinking, settings.date
        self.judge_eval_settings = read_mapping("judge_eval_settings", self.judge_eval_settings) or None
        if self.judge_eval_items < 0:
            raise ValueError(f"judge_eval_items={self.judge_eval_items} must be 0 (none) or more")
        if self.judge_eval_items and self.eval_strategy == "no":
            raise ValueError(
                f"judge_eval_items={self.judge_eval_items} rows are judged at each evaluation, but evaluation is off. "
                "Set eval_strategy='epoch', or eval_strategy='steps' and eval_steps"
            )
        if self.invalid_rows not in ("raise", "drop"):
            raise ValueError(f"invalid_rows={self.invalid_rows!r} is unknown: choose 'raise' or 'drop'")
        if self.assistant_only_loss:
            raise ValueError(
                "assistant_only_loss=True is not supported: TRACT always trains only on the completion (the last "
                "assistant turn). Leave it out"
            )
        if self.truncation_mode != "keep_start":
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} would cut off the rubric. Leave it out, and set max_length "
                "or invalid_rows for rows that are too long"
            )
        if self.share_batches not in ("prompt", "question", "none"):
            raise ValueError(f"share_batches={self.share_batches!r} is unknown: choose 'prompt', 'question' or 'none'")
        if self.share_prompts and self.neftune_noise_alpha is not None:
            raise ValueError(
                "share_prompts and neftune_noise_alpha cannot be combined: the noise depends on the sequence length, "
                "and rows with a shared prefix become one sequence. Use only one of the two"
            )
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError(
                "activation_offloading=True moves activations from an accelerator to main memory, but there is no "
                "accelerator here. Leave it out"
            )
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise ValueError("packing needs max_length, the number of tokens in a pack. Set it, or leave packing out")
        if (self.packing or self.eval_packing) and self.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy={self.packing_strategy!r} may cut a row in two, which separates a score from its "
                "rationale. Use packing_strategy='bfd'"
            )

    @property
    def objective(self) -> dict[str, Any]:
        """What a checkpoint was trained towards; JSON-serialisable. Going on with another one is refused."""
        scales = ("aspects",) if self.aspects else ("score_values", "score_texts", "score_marker")
        return {name: getattr(self, name) for name in (*scales, *_OBJECTIVE)}

    @property
    def scales(self) -> tuple[Scale, ...]:
        """What a completion is scored on: one scale for each aspect, or the only one, whose name is empty."""
        return read_scales(vars(self))

    @property
    def raft_weights(self) -> list[float]:
        """Weight of the squared error of each of `scales`."""
        return [self.raft_weight if scale.raft_weight is None else scale.raft_weight for scale in self.scales]

    @property
    def template_settings(self) -> TemplateSettings:
        """What chat templates are rendered with, as far as it is known before the rows are."""
        return TemplateSettings.of_training(vars(self))

    @classmethod
    def from_args(cls, args: TrainingArguments | None, model_name: str) -> "TRACTConfig":
        """Take over what the user passed to the trainer as `args`.

        Args:
            args: A TRACTConfig (returned as it is), a plain SFTConfig or TrainingArguments (field by field; where they
                leave open whether a new repository on the hub is private, it is), or None.
            model_name: Names the output directory when there are no `args`: `<model_name>-TRACT`.
        """
        if args is None:
            return cls(f"{model_name}-TRACT")
        if isinstance(args, cls):
            return args
        fields = field_values(args)
        if fields.get("hub_private_repo") is None:
            fields["hub_private_repo"] = True
        metric = fields.get("metric_for_best_model")
        if metric is not None and fields["greater_is_better"] == (not metric.endswith("loss")):
            fields["greater_is_better"] = None  # as the host fills it in, which knows nothing of our metrics
        return cls(**fields)


_OBJECTIVE = (
    "raft_weight",
    "rationale_weight",
    "score_in_ce",
    "drop_rationale",
    "normalize_grid",
    "annotator_loss",
    "annotator_weight",
)
# Of any evaluation set, with or without eval_ before it, and of any aspect behind it.
_METRIC = re.compile(r"(?:^|_)(?:(loss)|score|judge)/(\w+)(?:/[^/]+)?$")


def greater_is_better(metric: str) -> bool | None:
    """The direction of a metric of this package; None for another one, whose direction the host decides.

    Example:
        >>> greater_is_better("eval_score/rmse/tone"), greater_is_better("eval_valid_score/pearson")
        (False, True)
    """
    found = _METRIC.search(metric)
    if found is None:
        return None
    return not found[1] and found[2] not in ("mae", "rmse", "failed")


def field_values(args: TrainingArguments) -> dict[str, Any]:
    """The fields of training arguments, JSON-serialisable, from which an equal configuration can be made."""
    fields: dict[str, Any] = super(KeepsSecrets, args).to_dict() if isinstance(args, KeepsSecrets) else args.to_dict()  # type: ignore[misc]
    # The host's to_dict hides what it takes for a secret: every field whose name ends in "_token".
    return {name: getattr(args, name) if name.endswith("_token") else value for name, value in fields.items()}
