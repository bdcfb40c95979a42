"""Directories and hub ids -> models and tokenizers; an adapter is put on the base model it was trained on.

Knows nothing of generation.
"""

import hashlib
import json
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from trl_tract.backends.device import dtype_to_compute_in

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_AT_ONCE = 4096  # rows of an embedding that are compared at once: a copy of all of them may be gigabytes
_SAMPLED = 256  # numbers of each parameter that a fingerprint looks at


def load(
    model_id: str,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    merge_adapter: bool,
    revision: str | None = None,
    *,
    trainable: bool = False,
    **init: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load `model_id` in evaluation mode, and its tokenizer unless one is given.

    Args:
        model_id: Full model or adapter.
        tokenizer: Used as it is; None: the adapter's own, or else its base model's.
        dtype: `auto`: the checkpoint's own. None: the same, but float32 in place of 16 bits that this CPU is slow in,
            unless it is to be trained.
        device: None: this process's accelerator, or else the CPU.
        merge_adapter: Add the adapter to the weights.
        revision: Branch, tag or commit of `model_id` on the hub; an adapter's base has the one that the adapter names.
        trainable: Whether an adapter is to be trained on.
        **init: More arguments of `from_pretrained` of the weights.

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
    if dtype is None and not trainable and torch.device(device).type == "cpu":
        dtype = dtype_to_compute_in(base_id, _base_revision(adapter, revision))
    model: Any = AutoModelForCausalLM.from_pretrained(
        base_id,
        **{
            **init,
            "dtype": dtype or "auto",
            "device_map": torch.device(device),
            "trust_remote_code": False,
            "revision": _base_revision(adapter, revision),
        },
    )
    if adapter is not None:
        size = _embedding_rows(model, model_id, revision) or max(len(tokenizer), _rows(model))
        if size != _rows(model):
            # Training changed the vocabulary: what the adapter holds of the embeddings fits such a base alone.
            model.resize_token_embeddings(size, mean_resizing=False)
        model = PeftModel.from_pretrained(model, model_id, is_trainable=trainable, revision=revision)
        if merge_adapter:
            _untie(model.get_base_model())
            model = model.merge_and_unload()
    model.eval()
    return model, tokenizer


def whole_weights(model_id: str, revision: str | None = None) -> dict[str, list[int]]:
    """Names and shapes of the weights that an adapter holds whole, beside its pairs of low rank."""
    shapes: dict[str, list[int]] = {}
    if file := file_of(model_id, "adapter_model.safetensors", revision):
        with safe_open(file, "pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    elif file := file_of(model_id, "adapter_model.bin", revision):
        weights = torch.load(file, map_location="meta", weights_only=True)
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
    return {name: shape for name, shape in shapes.items() if ".lora_" not in name}


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _embedding_rows(model: Any, adapter: str, revision: str | None) -> int | None:
    """Tokens of the embedding that an adapter brings along, as it does where training changed the vocabulary."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    ends = (f".{name}.weight", f".{name}.base_layer.weight")
    return next((shape[0] for key, shape in whole_weights(adapter, revision).items() if key.endswith(ends)), None)


def _untie(model: Any) -> None:
    """Give tied embeddings a weight each if an adapter changes one of them: merged, it would change both."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    if any(isinstance(end, BaseTunerLayer) for end in ends) and bases[0].weight is bases[1].weight:
        bases[1].weight = torch.nn.Parameter(bases[1].weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def changed_weight(model: Any, revision: str | None = None, saved_beside: Set[str] = frozenset()) -> str | None:
    """Name of a weight that is not, in memory, what it is in the files that the model was loaded from; None without.

    Compared, up to the rounding of 16 bits, are the first and the last rows of each, and all rows of the embeddings,
    where single ones are changed by hand. What is quantised, or named otherwise in the files, is passed over, and so
    are files that are not here.

    Args:
        saved_beside: Modules that are saved with the adapter, so that it does not matter what the files have.
    """
    weights = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters()}
    embeddings = [getattr(layer, "weight", None) for layer in (model.get_input_embeddings(), _head_of(model))]
    for file in _weight_files(getattr(model.config, "_name_or_path", ""), revision):
        with safe_open(file, "pt") as saved:
            for name in sorted(weights.keys() & set(saved.keys())):
                weight, slices = weights[name].detach(), saved.get_slice(name)
                if (
                    not saved_beside.isdisjoint(name.split("."))
                    or weight.is_meta
                    or not weight.dim()
                    or list(weight.shape) != slices.get_shape()
                ):
                    continue
                count = len(weight)
                rows = [(0, 4), (max(count - 4, 0), count)]
                if any(weights[name] is each for each in embeddings):
                    rows = [(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE)]
                if not all(_same(weight[start:end], slices[start:end]) for start, end in rows):
                    return str(name)
    return None


def _head_of(model: Any) -> Any:
    head = model.get_output_embeddings()
    return getattr(head, "base_layer", head)


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether both are alike as far as they can be compared."""
    if not {wanted.dtype, found.dtype} <= _FLOATS:
        return True
    return torch.allclose(found.cpu().double(), wanted.double(), rtol=2**-7, atol=1e-6)


def _weight_files(model_id: str, revision: str | None) -> list[str]:
    """The files with the weights of a directory or hub id, as far as they are here."""
    if not model_id:
        return []
    index = file_of(model_id, "model.safetensors.index.json", revision, local=True)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for name in names if (file := file_of(model_id, name, revision, local=True)) is not None]


def loaded_fingerprint(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Name of a part -> its digest, of a model in memory: samples of every parameter, its settings, its tokenizer.

    Training moves nearly every number of what it trains. A change of a few numbers may stand between the samples.
    """
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    used = [
        (name, layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None))
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    weights: dict[str, list[Any]] = {"model weights": [], "adapter weights": []}
    for name, weight in model.named_parameters():
        of_adapter = any(f".{adapter}." in f"{name}." for adapter in adapters)
        # What is kept on disk until it is needed has no numbers here.
        flat = weight.detach().reshape(-1) if not weight.is_meta else torch.zeros(0)
        sample = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].double().tolist()
        weights["adapter weights" if of_adapter else "model weights"].append(
            (name, list(weight.shape), str(weight.dtype), sample)
        )
    settings = model.config.to_dict()
    for unstable in ("_name_or_path", "transformers_version"):
        settings.pop(unstable, None)
    parts = weights | {
        "adapter configuration": adapters and [adapters, used],
        "configuration": [settings, getattr(getattr(model, "generation_config", None), "eos_token_id", None)],
    }
    return {name: _digest(part) for name, part in parts.items() if part} | tokenizer_fingerprint(tokenizer)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The same of a tokenizer in memory."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    pieces = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str())
    for unstable in ("truncation", "padding"):  # of the last call
        pieces.pop(unstable, None)
    parts = {"tokenizer": [pieces, tokenizer.special_tokens_map], "chat template": tokenizer.chat_template}
    return {name: _digest(part) for name, part in parts.items() if part}


def _digest(part: Any) -> str:
    written = json.dumps(part, sort_keys=True, default=lambda one: sorted(one) if isinstance(one, set) else str(one))
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def check_model(model_id: str) -> None:
    """Refuse a path that leads nowhere; what may be a hub id is left to the hub's client."""
    path = Path(model_id)
    if not path.exists() and (model_id.startswith((".", "~", os.sep)) or model_id.count("/") > 1):
        raise FileNotFoundError(f"{model_id} is not a model directory: there is nothing at {path.absolute()}")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{model_id} is not a model directory: it holds no config.json or adapter_config.json")


def check_seed(model_id: str) -> None:
    """Refuse what training cannot start from: a path that leads nowhere, and an adapter."""
    check_model(model_id)
    if (Path(model_id) / "adapter_config.json").is_file():  # a full model of an earlier training may stand beside it
        raise ValueError(
            f"{model_id} is an adapter, but training starts from a full model. Give its base model, or merge the "
            "adapter: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )


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
            f"process {local_rank} of this machine (LOCAL_RANK) has no accelerator of its own, because there are only "
            f"{count}. Start at most {count} processes per machine, or pass device"
        )
    return torch.device(current.type, int(local_rank))


def adapter_config(model_id: str, revision: str | None = None) -> PeftConfig | None:
    """The configuration of an adapter, which names its base where that is now; None for a full model.

    Raises:
        ValueError: The adapter does not say which base model it belongs to.
        FileNotFoundError: It names a directory that is not there.
    """
    if find_adapter_config_file(model_id, revision=revision) is None:
        return None
    config = PeftConfig.from_pretrained(model_id, revision=revision)
    if not config.base_model_name_or_path:
        raise ValueError(f"{model_id}/adapter_config.json names no base model: set base_model_name_or_path in it")
    config.base_model_name_or_path = _base_of(Path(model_id), str(config.base_model_name_or_path))
    return config


def _base_of(adapter: Path, base: str) -> str:
    """Where an adapter's base is: as named, or else as seen from a directory above the adapter.

    A path that was relative to where the training was started is so seen from one of these, wherever they have moved.
    """
    if not adapter.is_dir() or Path(base).exists():
        return base
    if not Path(base).is_absolute():
        for place in adapter.absolute().parents:
            if (place / base / "config.json").is_file():
                return str(place / base)
    try:
        found, reason = file_of(base, "config.json"), ""
    except OSError as error:  # no name that the hub could have, or one that it does not have
        found, reason = None, f" ({' '.join(str(error).split())})"
    if found is None:
        raise FileNotFoundError(
            f"{adapter} is an adapter of {base!r}, which is not a local directory and cannot be loaded from the "
            f"hub{reason}. Put the base model there, or set base_model_name_or_path in adapter_config.json to its "
            "location"
        )
    return base


def tokenizer_id(model_id: str, base_id: str, revision: str | None = None) -> str:
    """Where the tokenizer of a model is: an adapter's own if it has one, else its base's."""
    own = model_id == base_id or file_of(model_id, "tokenizer_config.json", revision) is not None
    return model_id if own else base_id


def file_of(model_id: str, name: str, revision: str | None = None, *, local: bool = False) -> str | None:
    """A file of a directory or hub id; None where there is none, or nothing can be had from the hub.

    Args:
        local: Whether nothing is downloaded.
    """
    found: str | None = cached_file(
        model_id,
        name,
        revision=revision,
        local_files_only=local,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


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
            f"{model_id}: no tokenizer could be loaded from it ({reason}). Give a model's directory or hub id"
        ) from error
    return tokenizer


def tokenizer_to_train(
    model_id: str, chat_template_path: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that a model is trained with: its own, with the chat template that `chat_template_path` names.

    Args:
        chat_template_path: A Jinja file, or a directory or hub id whose tokenizer has the template; None: its own.
        revision: Of `model_id`.

    Raises:
        FileNotFoundError: There is no tokenizer, or no such file.
    """
    tokenizer = load_tokenizer(model_id, revision)
    if chat_template_path is None:
        return tokenizer
    if chat_template_path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        return tokenizer
    source = load_tokenizer(chat_template_path)
    # As TRL clones it, but for the model's embeddings.
    tokenizer.chat_template, tokenizer.eos_token = source.chat_template, source.eos_token
    added = source.added_tokens_decoder.values()
    tokenizer.add_tokens([token for token in added if token.content not in tokenizer.vocab])
    return tokenizer


def _base_revision(adapter: PeftConfig | None, revision: str | None) -> str | None:
    """The revision of the weights: of a full model the one asked for, of an adapter's base the one it names."""
    return revision if adapter is None else adapter.revision


def _tokenizer_of(
    model_id: str, base_id: str, adapter: PeftConfig | None, revision: str | None
) -> PreTrainedTokenizerBase:
    location = tokenizer_id(model_id, base_id, revision)
    return load_tokenizer(location, revision if location == model_id else _base_revision(adapter, revision))
