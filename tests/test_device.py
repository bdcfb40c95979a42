"""The type that a model computes in on a CPU: float32 where that is faster, and nothing is lost by it."""

import psutil
import pytest
import torch
from tiny import make_model, make_tokenizer

from trl_tract.backends import TransformersBackend, device
from trl_tract.backends.loading import load

PROMPTS = [[3, 4, 5, 6], [7, 8]]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in bfloat16, as most are."""
    folder = tmp_path_factory.mktemp("half")
    make_model().to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def slow(monkeypatch):
    """`slow(dtype, ...)`: types that this processor is slow in."""

    def let(*dtypes):
        monkeypatch.setattr(device, "_seconds_of_a_product", lambda dtype: 3.0 if dtype in dtypes else 1.0)

    let()
    return let


def test_a_cpu_that_is_slow_in_16_bits_computes_in_float32(half, slow):
    slow(torch.bfloat16)
    backend = TransformersBackend(half)
    assert backend.model.dtype == torch.float32
    exact = TransformersBackend(half, dtype="float32")
    assert (backend.next_token_logprobs(PROMPTS, [9, 10]) == exact.next_token_logprobs(PROMPTS, [9, 10])).all()


@pytest.mark.parametrize(
    ("dtypes", "given"),
    [((), None), ((torch.float16,), None), ((torch.bfloat16,), "auto"), ((torch.bfloat16,), "bfloat16")],
)
def test_a_model_stays_as_saved_where_that_is_fast_or_asked_for(half, slow, dtypes, given):
    slow(*dtypes)
    assert TransformersBackend(half, dtype=given).model.dtype == torch.bfloat16


def test_weights_that_would_not_fit_stay_in_16_bits(half, slow, monkeypatch):
    slow(torch.bfloat16)
    needed = 4 * sum(weight.numel() for weight in make_model().parameters())
    for memory, wanted in ((2 * needed, torch.float32), (2 * needed - 1, torch.bfloat16)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: type("Memory", (), {"total": memory}))
        assert TransformersBackend(half).model.dtype == wanted


def test_what_is_trained_on_is_loaded_as_it_was_saved(half, slow):
    slow(torch.bfloat16)
    assert load(half, None, None, "cpu", False, trainable=True)[0].dtype == torch.bfloat16


def test_no_accelerator_is_compared_with_a_cpu(half, slow):
    slow(torch.bfloat16)
    assert load(half, None, None, "meta", False)[0].dtype == torch.bfloat16
