"""What a trainer is given and cannot honour, refused before anything is loaded. Knows nothing of losses."""

from typing import Any

from peft import PeftConfig
from transformers.utils import logging
from trl import SFTTrainer

from trl_tract.backends.loading import check_seed
from trl_tract.training.adapters import check_adapters
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
