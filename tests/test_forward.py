"""Continuations of one prompt share its prefill, and are what they would be if each had computed it."""

import inspect

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config, MambaConfig, MistralConfig

from trl_tract.backends import TransformersBackend, forward, transformers
from trl_tract.scale.trie import TokenTrie
from trl_tract.training.score_head import logit_transform

WINDOW = 5  # tokens: shorter than the prompts
SIZES = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SINGLE = {"gemma2", "mixtral", "qwen3_moe"}  # whose attention or experts do not compute in float64
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.4}


def make(name: str):
    """A random model: a family of `conftest`, or one whose cache or positions are of another kind.

    In float64 two ways of computing a logit differ by 1e-14, and no draw turns on that.
    """
    if name in CONFIGS:
        model = make_model(name, dtype=torch.float32 if name in SINGLE else torch.float64)
    else:
        torch.manual_seed(0)
        configs = {
            "gpt2": lambda: GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4),
            "mistral": lambda: MistralConfig(**SIZES, **HEADS, sliding_window=WINDOW),
            "lfm2": lambda: Lfm2Config(**SIZES, **HEADS, layer_types=["conv", "full_attention"], bos_token_id=None),
            "mamba": lambda: MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=4),
        }
        model = AutoModelForCausalLM.from_config(configs[name]()).double()
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture
def prompts():
    """Of 20, 1 and 9 tokens: the shortest has nothing before its last token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 384, (length,), generator=generator).tolist() for length in (20, 1, 9)]


@pytest.fixture
def embedded(monkeypatch):
    """Watch a model: the `(rows, tokens)` of each forward pass."""

    def watch(model):
        shapes = []
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: shapes.append((*out.shape[:2],)))
        return shapes

    return watch


@pytest.fixture
def unshared(monkeypatch):
    """Generate with every row computing its own prompt, as for a model whose cache cannot be shared."""

    def generate(backend, prompts, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(transformers, "shared_cache", lambda *arguments: {})
            return backend.generate(prompts, **settings)

    return generate


def test_a_prompt_is_computed_once_for_all_its_continuations(tokenizer, prompts, embedded):
    backend = TransformersBackend(make("llama"), tokenizer, batch_size=8)
    shapes = embedded(backend.model)
    backend.generate([prompts[0]], n=3, max_new_tokens=4)
    assert shapes == [(1, 19), (3, 1), (3, 1), (3, 1), (3, 1)]


def test_prompts_that_differ_are_computed_as_they_always_were(tokenizer, prompts, embedded):
    backend = TransformersBackend(make("llama"), tokenizer, batch_size=8)
    shapes = embedded(backend.model)
    backend.generate(prompts, max_new_tokens=2)
    assert shapes == [(3, 20), (3, 1)]


# Batches of 4 hold 3 + 1, 2 + 2 and 1 of the three prompts' continuations.
SETTINGS = {"n": 3, "max_new_tokens": 12, "repetition_penalty": 1.2, "top_p": 0.9}


@pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "mistral"])
def test_sharing_changes_no_text(name, tokenizer, prompts, embedded, unshared):
    backend = TransformersBackend(make(name), tokenizer, batch_size=4)
    shapes = embedded(backend.model)
    texts = backend.generate(prompts, **SETTINGS)
    assert shapes[:2] == [(2, 19), (4, 1)]
    assert texts == unshared(backend, prompts, **SETTINGS)
    assert len({generation.text for row in texts for generation in row}) == 9


def test_a_window_shorter_than_the_prompt_is_shared(tokenizer, prompts, embedded, unshared):
    # Gemma 2 alternates layers with a window and layers without.
    model = make("gemma2")
    model.config.sliding_window = WINDOW
    for layer in model.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = WINDOW
    backend = TransformersBackend(model, tokenizer, batch_size=4)
    shapes = embedded(model)
    texts = backend.generate(prompts, **SETTINGS)
    assert shapes[:2] == [(2, 19), (4, 1)]
    assert texts == unshared(backend, prompts, **SETTINGS)
    assert texts != TransformersBackend(make("gemma2"), tokenizer, batch_size=4).generate(prompts, **SETTINGS)


def test_an_adapted_model_shares_too(tokenizer, prompts, embedded, unshared):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    backend = TransformersBackend(get_peft_model(make("llama"), lora).double(), tokenizer, batch_size=4)
    shapes = embedded(backend.model)
    texts = backend.generate(prompts, **SETTINGS)
    assert shapes[:2] == [(2, 19), (4, 1)]
    assert texts == unshared(backend, prompts, **SETTINGS)


@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_a_running_state_is_not_shared(name, tokenizer, prompts):
    model = make(name)
    assert forward.shared_cache(model, [prompts[0]] * 2, pad=0) == {}
    samples = TransformersBackend(model, tokenizer).generate(prompts, n=3, max_new_tokens=4)
    assert [len(row) for row in samples] == [3, 3, 3]


def test_vectors_before_the_tokens_are_not_shared(tokenizer, prompts):
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make("llama"), prefix).double().eval()
    assert forward.shared_cache(model, [prompts[0]] * 2, pad=0) == {}


def test_a_model_without_a_cache_is_not_shared(prompts):
    class Forgetful(type(make("llama"))):
        def forward(self, input_ids=None, attention_mask=None):
            return super().forward(input_ids, attention_mask)

    assert forward.shared_cache(Forgetful(make("llama").config), [prompts[0]] * 2, pad=0) == {}


def test_a_prompt_of_one_token_has_nothing_to_share():
    assert forward.shared_cache(make("llama"), [[], []], pad=0) == {}


def test_memory_that_runs_out_behind_the_shared_prompt_halves_the_batch(tokenizer, prompts, monkeypatch):
    backend = TransformersBackend(make("llama"), tokenizer, batch_size=4)
    unlimited, sizes = backend.model.forward, []

    def limited(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unlimited(*args, **kwargs)

    limited.__signature__ = inspect.signature(unlimited)
    monkeypatch.setattr(backend.model, "forward", limited)
    samples = backend.generate([prompts[0]], n=4, max_new_tokens=3)
    assert sizes == [1, 4, 1, 2, 2, 2, 1, 2, 2, 2]  # The prompt once, all four; then twice the prompt and two of them.
    assert len({generation.text for generation in samples[0]}) == 4


@pytest.fixture
def rationales(prompts):
    """Three rows that go on from the first prompt, one that stands alone, two that go on from the last prompt."""
    generator = torch.Generator().manual_seed(1)
    long, _, short = prompts
    tails = [torch.randint(4, 384, (length,), generator=generator).tolist() for length in (7, 2, 5, 6, 3, 1)]
    starts = [long, long, long, [], short, short]
    return [start + tail for start, tail in zip(starts, tails, strict=True)]


def test_rows_that_follow_each_other_and_share_half_are_of_one_group(rationales):
    assert forward.common_prefixes(rationales) == [(0, 20)] * 3 + [(1, 5)] + [(2, 9)] * 2
    assert forward.common_prefixes([[1, 2, 3], [1, 2, 3], [1, 2, 4, 5, 6]]) == [(0, 2), (0, 2), (1, 4)]
    assert forward.common_prefixes([]) == []


def whole_rows(model, rows):
    with torch.no_grad():
        logits = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
    return logits.double().log_softmax(dim=-1).numpy()


@pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "mistral"])
def test_shared_beginnings_change_no_log_probability(name, tokenizer, rationales):
    model = make(name)
    logprobs = TransformersBackend(model, tokenizer, batch_size=4).next_token_logprobs(rationales, range(384))
    bound = 1e-3 if name in SINGLE else 1e-10
    np.testing.assert_allclose(logprobs, whole_rows(model, rationales), atol=bound, rtol=0)


def test_a_beginning_is_computed_once_for_all_rows_that_have_it(tokenizer, rationales, embedded):
    backend = TransformersBackend(make("llama"), tokenizer, batch_size=3)
    shapes = embedded(backend.model)
    backend.next_token_logprobs(rationales, [5])
    # Of the row that stands alone, only the last token is left to the second pass.
    assert shapes == [(1, 20), (3, 7), (2, 9), (3, 3)]


def test_a_window_is_not_shared_behind_padding(tokenizer, rationales, embedded):
    backend = TransformersBackend(make("mistral"), tokenizer, batch_size=3)
    shapes = embedded(backend.model)
    backend.next_token_logprobs(rationales, [5])
    assert shapes == [(3, 27), (3, 12)]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_behind_16_bits_the_head_is_computed_in_float32(name, tokenizer, rationales, dtype, at_once):
    model = make(name).to(dtype)
    if name == "llama":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).to(dtype)
    inner = forward.innermost(model)
    backend = TransformersBackend(model, tokenizer, batch_size=1)
    trie = TokenTrie.from_paths([*((token,) for token in range(383)), (383, 0)])
    place = -2 if at_once else -1  # before the branch, or at the end
    backend.trie_logprobs(rationales[:1], trie)  # tries the model out before it is watched
    seen = []
    with torch.no_grad():
        hook = inner.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0][:, place]))
        if at_once:
            logprobs = backend.trie_logprobs(rationales[:1], trie)
        else:
            logprobs = backend.next_token_logprobs(rationales[:1], range(384))
        hook.remove()
        weight = inner.get_output_embeddings().weight.double()
        expected = logit_transform(inner)(seen[0].double() @ weight.T).log_softmax(dim=-1)
    np.testing.assert_allclose(logprobs[:, :383], expected.numpy()[:, :383], atol=2e-5)
    assert not inner.get_output_embeddings()._forward_hooks
