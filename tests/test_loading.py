"""Adapters are loaded as they were saved: on a vocabulary that training changed, merged, after their base moved."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from trl_tract import TransformersBackend
from trl_tract.backends.loading import adapter_config

ROWS = [[9, 8, 7, 6, 5], [11, 12, 13]]
CHOSEN = [10, 11, 12, 300]


@pytest.fixture
def place(tmp_path):
    """A directory with a base model in it, by the name of its kind."""

    def place(kind="llama", vocab=384):
        make_model(kind, vocab=vocab).save_pretrained(tmp_path / "seed")
        make_tokenizer().save_pretrained(tmp_path / "seed")
        return tmp_path

    return place


def adapt(directory, vocab=None, base="seed", safe=True, **lora):
    """Save an adapter that changes something, and give the log-probabilities that it has."""
    backend = TransformersBackend(directory / "seed", device="cpu")
    backend.model.name_or_path = backend.model.config._name_or_path = str(base)
    if vocab is not None:
        backend.model.resize_token_embeddings(vocab, mean_resizing=False)
    lora = {"target_modules": ["q_proj"], "init_lora_weights": False, **lora}
    torch.manual_seed(1)
    adapted = get_peft_model(backend.model, LoraConfig(r=4, task_type="CAUSAL_LM", **lora)).eval()
    for weight in adapted.parameters():
        if weight.requires_grad:  # as training would: none is at its start
            weight.data += 0.3 * torch.randn_like(weight)
    adapted.save_pretrained(str(directory / "judge"), save_embedding_layers=vocab is not None, safe_serialization=safe)
    backend.tokenizer.save_pretrained(directory / "judge")
    return TransformersBackend(adapted, backend.tokenizer).next_token_logprobs(ROWS, CHOSEN)


@pytest.mark.parametrize(("kind", "merge"), [("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("vocab", [340, 400, 448])
def test_an_adapter_on_another_vocabulary_loads_as_it_was_saved(place, kind, vocab, merge):
    directory = place(kind)
    saved = adapt(directory, vocab, base=directory / "seed", safe=kind == "llama")
    loaded = TransformersBackend(directory / "judge", device="cpu", merge_adapter=merge)
    np.testing.assert_allclose(loaded.next_token_logprobs(ROWS, CHOSEN), saved, atol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["lm_head"]},
        {"trainable_token_indices": [5, 6, 7]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*tied:UserWarning", "ignore:.*embedding layers:UserWarning")
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_of_tied_embeddings_scores_alike_merged_and_unmerged(place, lora, merge):
    directory = place("qwen2")
    saved = adapt(directory, base=directory / "seed", **lora)
    loaded = TransformersBackend(directory / "judge", device="cpu", merge_adapter=merge)
    np.testing.assert_allclose(loaded.next_token_logprobs(ROWS, CHOSEN), saved, atol=1e-4)


@pytest.mark.parametrize("base", ["seed", "./seed", "models/seed", "../models/seed"])
def test_a_base_is_found_by_its_relative_path_wherever_both_have_moved(place, base, tmp_path, monkeypatch):
    saved = adapt(place(), base=base)
    there = tmp_path / "elsewhere" / "runs"
    there.mkdir(parents=True)
    target = there.parent / ("models/seed" if "models" in base else "seed")
    target.parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "seed", target)
    shutil.move(tmp_path / "judge", there / "judge")
    monkeypatch.chdir("/")
    np.testing.assert_allclose(
        TransformersBackend(there / "judge", device="cpu").next_token_logprobs(ROWS, CHOSEN), saved, atol=1e-6
    )


@pytest.mark.parametrize("base", ["seed", "somebody/seed", "/nowhere/seed"])
def test_a_base_that_is_gone_is_named(place, base, tmp_path):
    adapt(place(), base=base)
    shutil.rmtree(tmp_path / "seed")
    with pytest.raises(FileNotFoundError, match=f"adapter of '{base}'.*base_model_name_or_path"):
        adapter_config(os.fspath(tmp_path / "judge"))
