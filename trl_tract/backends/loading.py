"""Directories and hub ids -> models and tokenizers; an adapter is put on the base model it was trained on.

Knows nothing of generation.
"""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file


def load(
    model_id: str,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    merge_adapter: bool,
    revision: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load `model_id` in evaluation mode, and its tokenizer unless one is given.

    Args:
        model_id: Full model or adapter.
        tokenizer: Used as it is; None: the adapter's own, or else its base model's.
        dtype: None: the checkpoint's own.
        device: None: this process's accelerator, or else the CPU.
        merge_adapter: Add the adapter to the weights.
        revision: Branch, tag or commit of `model_id` on the hub; an adapter's base has the one that the adapter names.

    Raises:
        ValueError: An adapter does not say which base model it belongs to.
    """
    check_model(model_id)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} is unknown: give auto, float32, bfloat16 or float16")
    device = _own_device() if device is None else device
    adapter = adapter_config(model_id, revision)
    base_id = model_id if adapter is None else str(adapter.base_model_name_or_path)
    if tokenizer is None:
        tokenizer = _tokenizer_of(model_id, base_id, adapter, revision)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base_id,
        dtype=dtype or "auto",
        device_map=torch.device(device),
        trust_remote_code=False,
        revision=_base_revision(adapter, revision),
    )
    if adapter is not None:
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            # Tokens added in training: the adapter's embedding rows only fit a base that has them.
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model = PeftModel.from_pretrained(model, model_id, revision=revision)
        if merge_adapter:
            model = model.merge_and_unload()
    model.eval()
    return model, tokenizer


def check_model(model_id: str) -> None:
    """Refuse a path that leads nowhere; what may be a hub id is left to the hub's client.

    Raises:
        FileNotFoundError: It does.
    """
    path = Path(model_id)
    if not path.exists() and (model_id.startswith((".", "~", os.sep)) or model_id.count("/") > 1):
        raise FileNotFoundError(f"{model_id} is not a model directory: there is nothing at {path.absolute()}")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{model_id} is not a model directory: it holds no config.json or adapter_config.json")


def _own_device() -> torch.device:
    """The accelerator of this process, or the CPU where there is none.

    `torchrun` and `accelerate launch` number the processes of a machine in LOCAL_RANK, and each must load its model on
    an accelerator of its own: the current one is the first in all of them.

    Raises:
        RuntimeError: There are several accelerators, but fewer than processes.
    """
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if current is None:
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    count = torch.accelerator.device_count()
    if local_rank is None or count == 1:  # Clusters may show each process its own accelerator alone.
        return torch.device(current.type, torch.accelerator.current_device_index())
    if int(local_rank) >= count:
        raise RuntimeError(
            f"process {local_rank} of this machine (LOCAL_RANK) has no accelerator of its own: there are {count}. "
            f"Start at most {count} processes a machine, or pass device"
        )
    return torch.device(current.type, int(local_rank))


def adapter_config(model_id: str, revision: str | None = None) -> PeftConfig | None:
    """The configuration of an adapter; None for a full model.

    Raises:
        ValueError: The adapter does not say which base model it belongs to.
    """
    if find_adapter_config_file(model_id, revision=revision) is None:
        return None
    config = PeftConfig.from_pretrained(model_id, revision=revision)
    if not config.base_model_name_or_path:
        raise ValueError(f"{model_id}/adapter_config.json names no base model: set base_model_name_or_path in it")
    return config


def tokenizer_id(model_id: str, base_id: str, revision: str | None = None) -> str:
    """Where the tokenizer of a model is: an adapter's own if it has one, else its base's."""
    return model_id if model_id == base_id or _has_tokenizer(model_id, revision) else base_id


def _has_tokenizer(model_id: str, revision: str | None) -> bool:
    found = cached_file(
        model_id,
        "tokenizer_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def load_tokenizer(model_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id.

    Raises:
        FileNotFoundError: There is none; what the hub's client said is in the message.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_id, trust_remote_code=False, revision=revision
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{model_id}: no tokenizer could be loaded from there. Give a model's directory or hub id ({reason})"
        ) from error
    return tokenizer


def _base_revision(adapter: PeftConfig | None, revision: str | None) -> str | None:
    """The revision of the weights: of a full model the one asked for, of an adapter's base the one it names."""
    return revision if adapter is None else adapter.revision


def _tokenizer_of(
    model_id: str, base_id: str, adapter: PeftConfig | None, revision: str | None
) -> PreTrainedTokenizerBase:
    location = tokenizer_id(model_id, base_id, revision)
    return load_tokenizer(location, revision if location == model_id else _base_revision(adapter, revision))
