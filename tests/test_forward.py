"""Prompts that begin alike share keys and values, and all texts and scores are what they would be one by one."""

import inspect
import logging

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config, MambaConfig, MistralConfig

from trl_tract import CoTRAILJudge
from trl_tract.backends import Stop, TransformersBackend, decoding
from trl_tract.backends.continuation import Continuation
from trl_tract.backends.decoding import Decoding
from trl_tract.backends.forward import why_not_shared
from trl_tract.backends.key_values import KeyValueTree, arranged, roomy_cache, shared_beginnings
from trl_tract.backends.whole import innermost
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

    def watch(backend):
        backend.generate([[5]], max_new_tokens=1)  # tries the model out before it is watched
        model, shapes = backend.model, []
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: shapes.append((*out.shape[:2],)))
        return shapes

    return watch


def one_by_one(backend, prompts, *, n=1, **settings):
    """Texts that `model.generate` writes without any sharing, one at a time."""
    assert backend._shares, "else there was nothing to compare with"
    plain = TransformersBackend(backend.model, backend.tokenizer, batch_size=1)
    plain._shares = False
    return plain.generate(prompts, n=n, **settings)


def tree_of_prompts(generator, *, families=2, members=3, common=24):
    """Prompts whose first tokens are those of others, down to two levels, in no order."""
    draw = lambda length: torch.randint(4, 384, (length,), generator=generator).tolist()  # noqa: E731
    prompts = []
    for _ in range(families):
        beginning = draw(common)
        inner = beginning + draw(common)
        prompts += [inner + draw(1 + member) for member in range(members)]
        prompts += [beginning + draw(3 + member) for member in range(members)]
    order = torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[place] for place in order]


@pytest.fixture
def family():
    return tree_of_prompts(torch.Generator().manual_seed(2))


SETTINGS = {"n": 3, "max_new_tokens": 12, "repetition_penalty": 1.2, "top_p": 0.9}


class TestTexts:
    @pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "mistral"])
    def test_sharing_changes_no_text(self, name, tokenizer, prompts, family):
        backend = TransformersBackend(make(name), tokenizer, batch_size=7)
        texts = backend.generate(prompts + family[:2], **SETTINGS)
        assert texts == one_by_one(backend, prompts + family[:2], **SETTINGS)
        assert len({generation.text for row in texts for generation in row}) == 15

    def test_windows_shorter_than_the_prompt_change_nothing(self, tokenizer, family):
        # Gemma 2 alternates layers with a window and layers without.
        model = make("gemma2")
        model.config.sliding_window = WINDOW
        for layer in model.model.layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window = WINDOW
        backend = TransformersBackend(model, tokenizer, batch_size=5)
        texts = backend.generate(family[:6], **SETTINGS)
        assert texts == one_by_one(backend, family[:6], **SETTINGS)
        assert texts != TransformersBackend(make("gemma2"), tokenizer).generate(family[:6], **SETTINGS)

    def test_an_adapted_model_shares_too(self, tokenizer, family):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        backend = TransformersBackend(get_peft_model(make("llama"), lora).double(), tokenizer, batch_size=5)
        assert backend.generate(family[:4], **SETTINGS) == one_by_one(backend, family[:4], **SETTINGS)

    @pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "qwen2"])
    @settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_tree_of_prompts_in_any_batch_gives_the_texts_of_each_alone(self, name, tokenizer, data):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        shape = {
            "families": data.draw(st.integers(1, 2)),
            "members": data.draw(st.integers(1, 3)),
            "common": data.draw(st.integers(1, 20)),
        }
        prompts = tree_of_prompts(generator, **shape)
        backend = TransformersBackend(
            make(name),
            tokenizer,
            batch_size=data.draw(st.integers(1, 6)),
            batch_tokens=data.draw(st.integers(1, 400)),
        )
        asked = {
            "n": data.draw(st.integers(1, 3)),
            "max_new_tokens": data.draw(st.integers(1, 9)),
            "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
            "top_p": data.draw(st.sampled_from([0.8, 1.0])),
            "seed": data.draw(st.integers(0, 9)),
            # A letter or two, so that texts end after a few tokens, and inside of one.
            "stop": data.draw(st.sampled_from([None, "e", "o r", Stop("a", ["b", "c"])])),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "_AHEAD", data.draw(st.sampled_from([1, 3, 64])))
            assert backend.generate(prompts, **asked) == one_by_one(backend, prompts, **asked)

    @pytest.mark.parametrize("batch_tokens", [1, 40])
    def test_texts_that_outgrow_a_batch_wait_and_go_on(self, tokenizer, prompts, batch_tokens, monkeypatch):
        monkeypatch.setattr(decoding, "_AHEAD", 2)
        waited = []
        keep = Decoding._keep
        monkeypatch.setattr(Decoding, "_keep", lambda self, row: waited.append(row) or keep(self, row))
        asked = {"n": 2, "max_new_tokens": 20}
        backend = TransformersBackend(make("llama"), tokenizer, batch_tokens=batch_tokens)
        assert backend.generate(prompts[1:], **asked) == one_by_one(backend, prompts[1:], **asked)
        assert bool(waited) == (batch_tokens == 40)  # less room never holds two


class TestCost:
    def test_a_prompt_is_computed_once_for_all_its_continuations(self, tokenizer, prompts, embedded):
        backend = TransformersBackend(make("llama"), tokenizer)
        shapes = embedded(backend)
        backend.generate([prompts[0]], n=3, max_new_tokens=4)
        assert shapes == [(1, 19), (3, 1), (3, 1), (3, 1), (3, 1)]

    def test_prompts_that_share_little_are_computed_at_once(self, tokenizer, prompts, embedded):
        backend = TransformersBackend(make("llama"), tokenizer)
        shapes = embedded(backend)
        backend.generate(prompts, max_new_tokens=2)
        assert shapes == [(2, 19), (3, 1), (3, 1)]

    def test_each_beginning_is_computed_once(self, tokenizer, family, embedded):
        backend = TransformersBackend(make("llama"), tokenizer, batch_size=64)
        shapes = embedded(backend)
        backend.generate(family, max_new_tokens=1)
        # Two families of 24 tokens; in each 24 more of three prompts; then what five of each have of their own before
        # the last token; one has nothing.
        assert shapes == [(2, 24), (2, 24), (10, 4), (12, 1)]

    def test_a_place_is_filled_at_once(self, tokenizer, prompts, embedded):
        backend = TransformersBackend(make("llama"), tokenizer, batch_size=2)
        long, _, short = prompts
        lengths = {tuple(long): 12, tuple(short): 3}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "trl_tract.backends.transformers.Continuation",
                lambda number, ids, numbers: Continuation(number, ids, numbers[: lengths.get(tuple(ids), 1)]),
            )
            shapes = embedded(backend)
            backend.generate([long, short, short, short], max_new_tokens=12)
        # While the long text is written, the three short ones take the other place in turn; alone, it has no empty row.
        assert shapes == [(2, 19), *[(2, 1)] * 9, *[(1, 1)] * 3]

    def test_scores_go_on_from_what_was_written(self, tokenizer, family, embedded):
        backend = TransformersBackend(make("llama"), tokenizer, batch_size=64)
        shapes = embedded(backend)
        with backend.reuse():
            texts = backend.generate(family, max_new_tokens=6)
            del shapes[:]
            rows = [[*prompt, *text.token_ids, 7, 8] for prompt, (text,) in zip(family, texts, strict=True)]
            backend.next_token_logprobs(rows, [5])
        assert shapes == [(12, 3)]  # The last token of the text, and two more.

    def test_nothing_is_kept_when_nothing_is_asked_again(self, tokenizer, family, embedded):
        backend = TransformersBackend(make("llama"), tokenizer, batch_size=64)
        shapes = embedded(backend)
        backend.next_token_logprobs(family, [5])
        first = list(shapes)
        backend.next_token_logprobs(family, [5])
        assert shapes == first * 2
        assert backend._tree is None


class TestScores:
    @pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "mistral"])
    def test_shared_beginnings_change_no_log_probability(self, name, tokenizer, family):
        model = make(name)
        backend = TransformersBackend(model, tokenizer, batch_size=5)
        logprobs = backend.next_token_logprobs(family, range(384))
        assert backend._shares
        bound = 1e-3 if name in SINGLE else 1e-9
        np.testing.assert_allclose(logprobs, whole_logprobs(model, family), atol=bound, rtol=0)

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
    @pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "qwen2"])
    def test_behind_what_was_written_they_are_those_of_whole_rows(self, name, tokenizer, family, dtype, bound):
        model = make(name).to(dtype)
        backend = TransformersBackend(model, tokenizer, batch_size=4)
        with backend.reuse():
            texts = backend.generate(family, n=2, max_new_tokens=9)
            rows = [
                [*prompt, *text.token_ids[:-cut], 7]
                for prompt, some in zip(family, texts, strict=True)
                for cut, text in enumerate(some, start=1)
            ]
            probs = np.exp(backend.next_token_logprobs(rows, range(384)))
        assert backend._shares
        np.testing.assert_allclose(probs, np.exp(whole_logprobs(model.double(), rows)), atol=bound, rtol=0)

    @pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "qwen2", "gpt2"])
    def test_scores_of_several_tokens_too(self, name, tokenizer, family):
        trie = TokenTrie.from_paths([(20, 21), (20, 22, 5), (20, 22, 6), (30,), (31, 20)])
        model = make(name)
        backend = TransformersBackend(model, tokenizer, batch_size=5)
        with backend.reuse():
            backend.generate(family, max_new_tokens=2)
            together = backend.trie_logprobs(family, trie)
        assert backend._shares
        paths = [(20, 21), (20, 22, 5), (20, 22, 6), (30,), (31, 20)]
        asked = [[*row, *path[:end]] for row in family for path in paths for end in range(len(path))]
        steps = iter(whole_logprobs(model, asked))
        wanted = [[sum(next(steps)[token] for token in path) for path in paths] for _ in family]
        np.testing.assert_allclose(together, wanted, atol=1e-9, rtol=0)

    def test_a_tree_that_is_full_changes_nothing(self, tokenizer, family):
        model = make("llama")
        backend = TransformersBackend(model, tokenizer, batch_size=2, batch_tokens=20)
        with backend.reuse():
            backend.generate(family, max_new_tokens=3)
            logprobs = backend.next_token_logprobs(family, range(384))
            assert backend._tree.size <= 20
        np.testing.assert_allclose(logprobs, whole_logprobs(model, family), atol=1e-9, rtol=0)


ASPECTS = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]", "values": "0..100"}}


class TestJudging:
    @pytest.mark.parametrize(
        "asked",
        [
            {"num_generations": 3},
            {"score_values": "0..100", "num_generations": 2},
            {"aspects": ASPECTS, "num_generations": 2},
            {"writes_rationale": False},
            {"max_attempts": 3, "append_marker": False, "max_new_tokens": 40},
        ],
        ids=["n", "grid of several tokens", "aspects", "no rationale", "attempts"],
    )
    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_judgements_are_those_of_whole_rows(self, name, tokenizer, asked):
        # A rubric that all items share, a question that some do, and answers of many lengths.
        questions = ("is this polite and clear? " * 3, "is it wrong or long? " * 4)
        words = ["the", "reply", "is", "short", "polite", "clear", "wrong", "and", "long", "it", "says", "why"]
        rows = [
            f"greeting apology no yes {question}{' '.join(words[: 2 + 3 * number])} ->"
            for number in range(3)
            for question in questions
        ]
        model = make(name)
        settings = {"append_marker": True, "max_new_tokens": 8, **asked}
        together, alone = TransformersBackend(model, tokenizer, batch_size=4), TransformersBackend(model, tokenizer)
        alone._shares = False
        shared, whole = (CoTRAILJudge(backend, **settings).judge(rows) for backend in (together, alone))
        assert together._shares
        for one, other in zip(shared, whole, strict=True):
            assert (one.rationales, one.error) == (other.rationales, other.error)
            for mine, its in zip([one, *one.aspects.values()], [other, *other.aspects.values()], strict=True):
                assert mine.scores == pytest.approx(its.scores, abs=1e-9)
                np.testing.assert_allclose(mine.probs, its.probs, atol=1e-9)
        assert settings["append_marker"] is False or not any(one.error for one in shared)


def whole_logprobs(model, rows):
    with torch.no_grad():
        logits = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
    return logits.double().log_softmax(dim=-1).numpy()


class TestModelsThatCannot:
    def unshared(self, model, tokenizer, prompts, caplog):
        backend = TransformersBackend(model, tokenizer)
        with caplog.at_level(logging.WARNING, logger="trl_tract"):
            samples = backend.generate(prompts, n=3, max_new_tokens=4)
            backend.generate(prompts, max_new_tokens=1)
        assert len([record for record in caplog.records if record.name.startswith("trl_tract")]) == 1
        assert [len(row) for row in samples] == [3, 3, 3]
        assert samples == backend.generate(prompts, n=3, max_new_tokens=4)

    @pytest.mark.parametrize("name", ["lfm2", "mamba"])
    def test_a_running_state_is_not_shared(self, name, tokenizer, prompts, caplog):
        self.unshared(make(name), tokenizer, prompts, caplog)

    def test_vectors_before_the_tokens_are_not_shared(self):
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        assert why_not_shared(get_peft_model(make("llama"), prefix).double().eval(), 0) is not None

    def test_a_model_that_answers_differently_behind_a_cache_is_not_shared(self, tokenizer, prompts, caplog):
        class Miscounting(type(make("llama"))):
            def forward(self, input_ids=None, position_ids=None, **kwargs):
                return super().forward(input_ids, position_ids=position_ids - position_ids.min(), **kwargs)

        self.unshared(Miscounting(make("llama").config).double().eval(), tokenizer, prompts, caplog)

    def test_rotations_that_depend_on_the_length_are_not_shared(self, tokenizer, prompts, caplog):
        config = make("llama").config
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        self.unshared(AutoModelForCausalLM.from_config(config).double().eval(), tokenizer, prompts, caplog)

    def test_windows_without_masks_are_not_shared(self):
        model = make("mistral")
        assert why_not_shared(model, 0) is None
        model.config._attn_implementation = "flex_attention"
        assert why_not_shared(model, 0) is not None


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_memory_that_runs_out_halves_the_batch_and_changes_no_text(name, tokenizer, prompts, monkeypatch):
    backend = TransformersBackend(make(name), tokenizer, batch_size=4)
    wanted = backend.generate(prompts, n=4, max_new_tokens=6)
    unlimited, sizes = backend.model.forward, []

    def limited(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2 and len(sizes) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unlimited(*args, **kwargs)

    limited.__signature__ = inspect.signature(unlimited)
    monkeypatch.setattr(backend.model, "forward", limited)
    assert backend.generate(prompts, n=4, max_new_tokens=6) == wanted
    assert sizes[:5] == [1, 4, 4, 4, 1]  # The prompt, two tokens of four texts, no third; the prompt once more.
    assert max(sizes[5:]) == 2


class TestTree:
    """Tokens whose keys are themselves and values their negatives: one layer, one head, one number each."""

    def layers(self, tokens):
        keys = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
        return [(keys, -keys)]

    def read(self, tree, ids):
        cache = roomy_cache(1, 1, len(ids), len(ids))
        tree.fill(cache, 0, len(ids), ids)
        assert torch.equal(cache.layers[0].keys, -cache.layers[0].values)
        return cache.layers[0].keys.flatten().tolist()

    @settings(max_examples=40, deadline=None)
    @given(rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
    def test_it_gives_back_what_it_was_given(self, rows):
        tree = KeyValueTree(most=10_000)
        for row in rows:
            known = tree.length(row)
            tree.add(row, known, self.layers(row[known:]))
        assert [self.read(tree, row) for row in rows] == rows
        # Each beginning is there once.
        assert tree.size == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})

    def test_more_than_it_needs_is_cut_at_what_it_knows(self):
        tree = KeyValueTree(most=100)
        tree.add([1, 2, 3], 0, self.layers([1, 2, 3]))
        tree.add([1, 2, 4, 5], 1, self.layers([2, 4, 5]))
        assert self.read(tree, [1, 2, 4, 5]) == [1, 2, 4, 5]
        assert tree.size == 5

    def test_what_lacks_its_beginning_is_not_taken(self):
        tree = KeyValueTree(most=100)
        tree.add([1, 2, 3], 2, self.layers([3]))
        assert tree.size == 0

    def test_it_forgets_ends_that_were_used_longest_ago(self):
        tree = KeyValueTree(most=4)
        for row in ([1, 2, 3], [1, 2, 4], [9]):
            tree.add(row, tree.length(row), self.layers(row[tree.length(row) :]))
        tree.length([1, 2, 3])
        tree.trim()
        assert [tree.length(row) for row in ([1, 2, 3], [1, 2, 4], [9])] == [3, 2, 1]

    def test_shared_beginnings_are_found_behind_what_is_known(self):
        tree = KeyValueTree(most=100)
        a, b = list(range(10, 20)), list(range(30, 50))
        rows = [[1, 2, *a, 5], [1, 2, *a, 6], [1, 2, *b, 5], [1, 2, *b, 6], [7]]
        assert sorted(shared_beginnings(rows, tree, 10)) == [[1, 2, *a], [1, 2, *b]]  # two tokens are not worth a pass
        assert shared_beginnings(rows, tree, 6) == [[1, 2]]
        tree.add([1, 2, *a], 0, self.layers([1, 2, *a]))
        assert shared_beginnings(rows, tree, 10) == [[1, 2, *b]]

    def test_rows_that_share_half_stand_side_by_side_longest_first(self):
        rows = [[1, 2, 3], [5] * 6, [1, 2, 3, 4], [], [5] * 7]
        assert arranged(rows) == [4, 1, 2, 0, 3]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_behind_16_bits_the_head_is_computed_in_float32(name, tokenizer, family, dtype, at_once):
    model = make(name).to(dtype)
    if name == "llama":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).to(dtype)
    inner = innermost(model)
    backend = TransformersBackend(model, tokenizer, batch_size=1)
    trie = TokenTrie.from_paths([*((token,) for token in range(383)), (383, 0)])
    place = -2 if at_once else -1  # before the branch, or at the end
    backend.trie_logprobs(family[:1], trie)  # tries the model out before it is watched
    seen = []
    with torch.no_grad():
        hook = inner.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output[0][:, place]))
        if at_once:
            logprobs = backend.trie_logprobs(family[:1], trie)
        else:
            logprobs = backend.next_token_logprobs(family[:1], range(384))
        hook.remove()
        weight = inner.get_output_embeddings().weight.double()
        expected = logit_transform(inner)(seen[0].double() @ weight.T).log_softmax(dim=-1)
    np.testing.assert_allclose(logprobs[:, :383], expected.numpy()[:, :383], atol=2e-5)
    assert not inner.get_output_embeddings()._forward_hooks
