"""What a reinforcement stage starts from: the policy, the judge that it is, its rows. Knows nothing of losses."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names

from trl_tract.backends.loading import adapter_config, check_model, load, load_tokenizer, tokenizer_id
from trl_tract.rows.dataset import check_dataset, find_scales
from trl_tract.rows.golds import is_missing, mean_golds
from trl_tract.rows.refusals import Refusal, kept_of_stream, refuse
from trl_tract.rows.rendering import asks_in_chat, settled
from trl_tract.rows.row import ROW_NUMBER
from trl_tract.rows.template import Template
from trl_tract.rows.tokens import asked_ids, resolve_asked
from trl_tract.saved.judge_config import FILE_NAME, JudgeConfig
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.training.adapters import check_adapters
from trl_tract.training.real_config import REALConfig
from trl_tract.training.resuming import settings_of

logger = logging.get_logger(__name__)

_LOOKED_AT = 1000  # rows that show how scores are written
_Rows: TypeAlias = Dataset | IterableDataset


def check_start(model: Any, name: str, args: REALConfig, peft_config: PeftConfig | None) -> None:
    """Refuse adapters that cannot be trained, and a reference model that cannot be loaded.

    Args:
        name: Directory or hub id that it came from; empty for one that was made in memory.
    """
    check_adapters(model, peft_config)
    # Of an adapter, the reference is its base, or a copy of it.
    if args.beta and not name and peft_config is None and not isinstance(model, PeftModel):
        raise ValueError(
            f"beta={args.beta:g} needs a reference model, which is loaded from the model's directory, but this model "
            "exists only in memory. Save it and give its directory, or leave beta out"
        )


def policy_tokenizer(model_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id: an adapter's own if it has one, else its base's."""
    check_model(model_id)
    adapter = adapter_config(model_id, revision)
    base = model_id if adapter is None else str(adapter.base_model_name_or_path)
    return load_tokenizer(tokenizer_id(model_id, base, revision))


def load_policy(
    model_id: str, tokenizer: PreTrainedTokenizerBase, args: REALConfig, quantization_config: Any = None
) -> Any:
    """An adapter on its base, to be trained on; of a full model its name, which TRL loads."""
    check_model(model_id)
    init: dict[str, Any] = {**(args.model_init_kwargs or {})}
    if adapter_config(model_id, init.get("revision")) is None:
        return model_id
    if quantization_config is not None:
        init["quantization_config"] = quantization_config
    # TRL's own default: what is trained is trained in 32 bits, and bf16 by autocast.
    dtype, revision = init.pop("dtype", None) or "float32", init.pop("revision", None)
    model, _ = load(model_id, tokenizer, dtype, args.device, False, revision, trainable=True, **init)
    return model


def find_judge(
    model_id: str, args: REALConfig, tokenizer: PreTrainedTokenizerBase, rows: _Rows
) -> tuple[Template, JudgeConfig]:
    """How prompts are asked and scores are written: as the model was trained with TRACT, else as `args` have it.

    Raises:
        ValueError: `args` contradict what the model was trained with, or the judge is of a kind that this stage
            cannot train.
    """
    _check_columns(rows, "train")
    saved = _saved(model_id, (args.model_init_kwargs or {}).get("revision"))
    if saved is not None:
        if len(saved.scales) > 1:
            names = ", ".join(scale.name for scale in saved.scales)
            raise ValueError(
                f"{model_id} scores the aspects {names}, each with its own rationale, but REALTrainer supports judges "
                "with one score only. Train a judge for one aspect"
            )
        if not saved.writes_rationale:
            raise ValueError(
                f"{model_id} gives scores without rationales (drop_rationale), so there are no rationales to train"
            )
        _check_same(model_id, args, saved)
        return Template(tokenizer, saved.template), saved
    settings = settled(tokenizer, settings_of(args), rows)
    template = Template(tokenizer, settings)
    written = any(row.get("completion") for row in itertools.islice(rows, _LOOKED_AT))
    scales = find_scales(template, rows, args.scales) if written else _resolved(template, rows, args.scales)
    return template, JudgeConfig(scales, bool(args.normalize_grid), True, settings, asks_in_chat(rows))


def _saved(model_id: str, revision: str | None) -> JudgeConfig | None:
    if not model_id:  # made in memory
        return None
    try:
        return JudgeConfig.load(model_id, revision)
    except FileNotFoundError:
        if not Path(model_id).is_dir():
            logger.warning(
                f"no {FILE_NAME} was found at {model_id}. Grid, marker and template settings are taken from REALConfig"
            )
        return None


def _check_same(model_id: str, args: REALConfig, saved: JudgeConfig) -> None:
    scale = saved.scales[0]
    trained = {
        "score_values": list(scale.grid.values),
        "score_texts": list(scale.grid.texts),
        "score_marker": scale.marker,
        "normalize_grid": saved.normalize_grid,
        "thinking": saved.template.thinking,
        "template_date": saved.template.date,
        "chat_template_kwargs": dict(saved.template.chat_template_kwargs),
    }
    for name, value in trained.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise ValueError(
                f"{name}={given!r}, but {model_id} was trained with {value!r}. Leave it out; it is read from "
                f"{FILE_NAME}"
            )


def _resolved(template: Template, rows: _Rows, scales: tuple[Scale, ...]) -> tuple[Scale, ...]:
    """The scales with their tokens behind the first prompt that can be asked."""
    problem: Exception = ValueError("the dataset is empty")
    for row in itertools.islice(rows, _LOOKED_AT):
        try:
            return resolve_asked(template, row, scales)
        except (ScoreNotFoundError, KeyError, TypeError) as error:
            problem = error
    raise ValueError(f"none of the first rows has a usable prompt: {problem}")


def checked_rows(
    template: Template, judge: JudgeConfig, args: REALConfig, room: int | None, rows: _Rows, dataset_name: str
) -> _Rows:
    """Refuse or drop, and name, rows that cannot be asked or have no gold score.

    Args:
        room: Tokens of the model's context window; None: no limit.

    Raises:
        ValueError: There are such rows and `invalid_rows` is `raise`, or too few others.
    """
    _check_columns(rows, dataset_name)
    longest = None if room is None else room - int(args.max_completion_length or 0)

    def refusal(row: Mapping[str, Any], number: int) -> Refusal | None:
        found = problem_of(template, judge, longest, row)
        return None if found is None else Refusal(row.get(ROW_NUMBER, number), *found)

    told: dict[str, Any] = {"invalid_rows": args.invalid_rows, "say": logger.warning}
    if isinstance(rows, IterableDataset):
        return rows.filter(kept_of_stream(refusal, dataset_name, **told), with_indices=True)
    found = [refusal(row, number) for number, row in enumerate(rows)]
    kept = [number for number, problem in enumerate(found) if problem is None]
    # The host draws whole updates, and would end without any.
    together = args.generation_batch_size // args.num_generations if dataset_name == "train" else 0
    if kept and len(kept) < together:
        raise ValueError(
            f"{len(kept)} training rows are left, but an update takes {together}. Lower per_device_train_batch_size, "
            "gradient_accumulation_steps or steps_per_generation, or raise num_generations"
        )
    refuse([problem for problem in found if problem], len(found), dataset_name, **told)
    if together and (rest := len(kept) % together):
        logger.warning(
            f"each epoch leaves {rest} of the {len(kept)} training rows out"
            f"{', others each time' if args.shuffle_dataset else ', the last ones'}: rationales are written for "
            f"{together} rows at once"
        )
    return rows if len(kept) == len(found) else rows.select(kept)


def _check_columns(rows: _Rows, dataset_name: str) -> None:
    check_dataset(rows, dataset_name)
    columns = get_dataset_column_names(rows) or []
    if images := {"image", "images"} & set(columns):
        raise ValueError(
            f"the {dataset_name} dataset has the column {min(images)}, but REALTrainer trains only on text. Remove the "
            "column if the prompts are complete without it"
        )
    if columns and not ({"prompt"} <= set(columns) and {"score", "completion"} & set(columns)):
        raise ValueError(
            f"the {dataset_name} dataset has the columns {', '.join(sorted(columns))}. Pass rows with `prompt` and "
            "`score`"
        )


def problem_of(
    template: Template, judge: JudgeConfig, longest: int | None, row: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Kind of what is wrong with a row, and the message; None where nothing is."""
    try:
        if is_missing(row.get("prompt")):
            raise ScoreNotFoundError("no prompt", "the prompt is missing")
        if judge.chat is not None and judge.chat is isinstance(row["prompt"], str):
            trained, given = ("chat messages", "plain text")[:: 1 if judge.chat else -1]
            raise ScoreNotFoundError("mixed types", f"the prompt is {given}, and the judge was trained on {trained}")
        if mean_golds(row, judge.scales) is None:
            raise ScoreNotFoundError("no score", "the score is missing")
        asked = template.ask(row)
        length = len(asked_ids(template, asked)) if longest is not None else 0
    except ScoreNotFoundError as error:
        return error.kind, str(error)
    if longest is not None and length > longest:
        return "too long", (
            f"the prompt has {length:,} tokens, but the model's context window has room for only {max(longest, 0):,} "
            "besides max_completion_length"
        )
    return None
