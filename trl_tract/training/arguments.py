"""What a trainer is given and cannot honour: refused, and before anything is loaded where it can be seen then.

Knows nothing of losses.
"""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig
from transformers.utils import logging
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_tract.backends.branches import keeps_apart
from trl_tract.backends.loading import check_seed
from trl_tract.rows.dataset import check_dataset
from trl_tract.training.adapters import check_adapters
from trl_tract.training.config import TRACTConfig
from trl_tract.training.neighbours import changed_class

logger = logging.get_logger(__name__)


def check_arguments(
    model: Any,
    *,
    peft_config: PeftConfig | None = None,
    compute_loss_func: Any = None,
    formatting_func: Any = None,
    **others: Any,
) -> None:
    """Refuse arguments of SFTTrainer that TRACT cannot honour.

    Raises:
        ValueError: One is given, or the model has adapters that cannot be trained and loaded again.
        FileNotFoundError: The model is a path that leads nowhere.
    """
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func is not supported: TRACTTrainer computes the CoT-RAFT loss itself. Leave it out"
        )
    if formatting_func is not None:
        raise ValueError(
            "formatting_func joins a row into one text, but TRACT needs prompt and completion separately. Leave it "
            "out, and build the columns `prompt` and `completion` with dataset.map(...)"
        )
    check_adapters(model, peft_config)
    if isinstance(model, str):
        check_seed(model)
    changed = changed_class(SFTTrainer)
    if changed is not None:
        logger.warning(changed)


def check_data(args: TRACTConfig, train_dataset: Any, eval_dataset: Any, data_collator: Any) -> None:
    """Refuse datasets that cannot be read, and settings that would not be what they are trained with.

    Raises:
        TypeError: A dataset is something else.
        ValueError: A dataset is empty, or does not go with the settings.
    """
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError(
            "skip_prepare_dataset in dataset_kwargs would skip the step that finds the scores. Leave it out"
        )
    if data_collator is not None and args.eval_packing:
        raise ValueError(
            "eval_packing=True needs the default collator, which keeps packed rows apart. Leave data_collator or "
            "eval_packing out"
        )
    several = isinstance(eval_dataset, Mapping) and not isinstance(eval_dataset, Dataset)
    for name, rows in [("train", train_dataset), *(eval_dataset if several else {"eval": eval_dataset}).items()]:
        if rows is None:
            continue
        check_dataset(rows, name)
        if args.drop_rationale and "input_ids" in get_dataset_column_names(rows):
            raise ValueError(
                f"drop_rationale=True removes the rationale from text, but the {name} dataset is tokenised. Pass rows "
                "with `prompt` and `completion`"
            )


def check_made(trainer: Any) -> None:
    """Refuse what can only be seen once TRL has made the model, the optimizer and the ranks.

    Raises:
        ValueError: They would not train what was asked for.
    """
    if trainer._is_vision_dataset:
        raise ValueError("the rows contain images, but TRACTTrainer trains only on text")
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("context and sequence parallelism separate a rationale from its score. Set both sizes to 1")
    if trainer.optimizer is not None:
        trained = {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
        held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
        if not trained & held:
            raise ValueError(
                "optimizers holds none of the weights that are trained, as when it was made before the adapter. Make "
                "the adapter first, with get_peft_model, or use optimizer_cls_and_kwargs"
            )
    args = trainer.args
    base = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    if not (args.packing or args.padding_free or args.eval_packing):
        return
    with trainer.accelerator.autocast():
        apart = keeps_apart(base, DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    if not apart:
        raise ValueError(
            f"{type(base).__name__} does not keep packed rows apart, so a row would be computed from those before it. "
            "Leave packing, eval_packing and padding_free out"
        )
