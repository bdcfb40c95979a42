"""Adapters in training: those that are refused at the start, and which one is the judge. Knows nothing of losses."""

import copy
import functools
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from trl_tract.backends.loading import changed_weight

# Ways of starting LoRA that begin at the seed model, and whose adapters load as they were saved. The base weights that
# `pissa` and `olora` change in memory are changed alike when the adapter is loaded.
_STARTS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "mica")
# False makes an adapter that changes the model before it is trained.
_AT_RANDOM = ("init_lora_weights", "init_weights", "init_ia3_weights")
# With other values than these, an adapter leaves other weights in the model that it was put on, also once PEFT has
# unloaded it: of modules_to_save the trained copy stays.
_CHANGES: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
    "bias": ("none",),
    "modules_to_save": (),
}
# With these, a second adapter would not start anew from a loaded model from which the first was not unloaded.
_LEFT: dict[str, tuple[Any, ...]] = {"target_parameters": (), "trainable_token_indices": ()}
_MARK, _HELD = "_trl_tract_changed_by", "_trl_tract_held"


def check_adapters(model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse adapters that TRACT cannot train, or that would not load as they were trained."""
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    for config in [peft_config, *(model.peft_config[name] for name in active)]:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                "prompt tuning puts virtual tokens before each row, so the score is no longer at its token. Use LoRA"
            )
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in _STARTS:
            raise ValueError(
                f"init_lora_weights={start!r} changes the base model in a way that loading does not repeat, so the "
                f"saved judge would give different scores. Use the default, or one of {', '.join(_STARTS)}"
            )
    if random := next((name for name in _AT_RANDOM if getattr(peft_config, name, True) is False), None):
        raise ValueError(
            f"{random}=False initialises the adapter at random, so training does not start from the seed model. Set it "
            "to True"
        )
    if getattr(peft_config, "layer_replication", None):
        raise ValueError(
            "layer_replication duplicates layers, so training does not start from the seed model. Leave it out"
        )
    if len(active) > 1:
        raise ValueError(
            f"the adapters {', '.join(active)} are active at once, but only one can be saved as the judge. Merge the "
            "others, then activate the one to train with model.set_adapter(name)"
        )
    if active and not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"no trainable weights in the adapter {active[0]} . Load it with is_trainable=True, or activate it with "
            "model.set_adapter(name)"
        )
    if not isinstance(model, PeftModel):
        # PEFT leaves its layers and their configuration in a loaded model, unless they are unloaded.
        left = [_change(config, _CHANGES | _LEFT) for config in getattr(model, "peft_config", {}).values()]
        changed = next((change for change in [getattr(model, _MARK, None), *left] if change), None)
        if changed is not None:
            raise ValueError(
                f"this model was already changed by training with {changed}, so it is no longer the seed model. Load "
                "the seed model again, or give its directory or hub id"
            )
    if not isinstance(model, str):
        _check_loaded(model, peft_config)


def _check_loaded(model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse a model in memory that would not be loaded as it is trained."""
    if isinstance(model, PeftModel):
        peft_config, base = model.active_peft_config, model.get_base_model()
        unknown = _change(peft_config, _CHANGES) is not None
    else:
        base, unknown = model, False
        held = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        # A new adapter takes the place of what it replaces; see `mark_base`.
        setattr(model, _HELD, held)
        if held and (peft_config is None or getattr(model, "_hf_peft_config_loaded", False)):
            raise ValueError(
                "this model holds the layers of an adapter, but is no PeftModel, so it would not be saved as it is "
                "trained. Load the seed model again, or load the adapter with PeftModel.from_pretrained(base, "
                "directory, is_trainable=True)"
            )
    # The adapter alone is saved.
    if (
        peft_config is not None
        and not unknown
        and (name := changed_weight(base, peft_config.revision, _saved_beside(peft_config)))
    ):
        source = base.config._name_or_path
        raise ValueError(
            f"{name} of this model is not what it is in {source}, and the saved adapter would be loaded on {source}. "
            "Save the model with save_pretrained and give that directory, or, for another revision on the hub, set "
            "revision in the adapter's configuration"
        )


def _saved_beside(peft_config: PeftConfig) -> set[str]:
    """Modules whose weights an adapter saves whole, by name."""
    saved = set(getattr(peft_config, "modules_to_save", None) or ())
    if rows := getattr(peft_config, "trainable_token_indices", None):
        saved |= set(rows) if isinstance(rows, Mapping) else {"embed_tokens"}
    return saved


def on_revision(peft_config: PeftConfig | None, init: Mapping[str, Any] | None) -> PeftConfig | None:
    """An adapter's configuration with the revision of the base that it is trained on, so that it is loaded on that one.

    Args:
        init: What the base is loaded with, `model_init_kwargs`.
    """
    revision = (init or {}).get("revision")
    if peft_config is None or peft_config.revision is not None or revision in (None, "main"):
        return peft_config
    named = copy.copy(peft_config)
    named.revision = revision
    return named


def mark_base(model: Any) -> None:
    """Let `check_adapters` recognise a base model whose weights an adapter changed, also when that is unloaded."""
    _check_head(model)
    if isinstance(model, PeftModel):
        held = getattr(model.get_base_model(), _HELD, [])
        if left := set(held) - set(model.base_model.targeted_module_names):
            raise ValueError(
                f"this model still holds layers of an earlier adapter where the new one has none ({min(left)}), so "
                "training would not start from the seed model. Load the seed model again, or give its directory or "
                "hub id"
            )
        changes = [_change(config, _CHANGES) for config in model.peft_config.values()]
        setattr(model.get_base_model(), _MARK, next((change for change in changes if change), None))


def _check_head(model: Any) -> None:
    """Refuse a head that TRL cannot read."""
    head = model.get_base_model().get_output_embeddings() if isinstance(model, PeftModel) else None
    if head is not None and not hasattr(head, "bias"):
        raise ValueError(
            "trainable_token_indices does not work with embeddings that are tied to the output head, because TRL's "
            "loss cannot read such a head. Leave trainable_token_indices out, or put the embeddings into target_modules"
        )


def _change(config: PeftConfig, fields: Mapping[str, tuple[Any, ...]]) -> str | None:
    """The first of the fields that has another value than its harmless ones; None if all are harmless."""
    for name, unchanged in fields.items():
        value = getattr(config, name, None)
        if value and value not in unchanged:
            return f"{name}={value!r}"
    return None


@contextmanager
def only_the_trained_adapter(model: Any, directory: Path) -> Iterator[None]:
    """While it lasts, saving `model` saves its active adapter alone, and where judges and checkpoints look for it."""
    if not isinstance(model, PeftModel):
        yield
        return
    (name,) = model.active_adapters
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[name])
    try:
        yield
    finally:
        del model.save_pretrained
    # PEFT gives every adapter but "default" a directory of its own.
    if name != "default" and (directory / name).is_dir():
        for file in (directory / name).iterdir():
            file.replace(directory / file.name)
        shutil.rmtree(directory / name)
