"""The transformers backend against first principles on a tiny random Llama, and the scripted double."""

import inspect
import json
import logging
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)

from trl_tract.backends import Backend, Generation, ScriptedBackend, TransformersBackend
from trl_tract.backends.base import Sampling
from trl_tract.backends.drawing import DrawEach, Drawing, Nucleus, random_numbers

CONTEXT = 96
EXACT = {"atol": 1e-10, "rtol": 0}  # nats, between two ways of computing the same in float64
STOP = "[RESULT]"
# `]` and a newline in one token, so that a stop string can end inside a token.
CORPUS = ["good bad fair clear polite", "[RESULT] 1", "[RESULT] 5", "]\n", "]\n", "]\n", "0123456789", "RES ULT"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r"\]\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def tiny_llama(tokenizer: PreTrainedTokenizerFast, **config: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,  # A spread next-token distribution: greedy ties and uniform samples hide mistakes.
        **{**sizes, **config},
    )
    return LlamaForCausalLM(settings).eval()


@pytest.fixture
def model(tokenizer):
    # In float64 the order of a sum moves a log-probability by 1e-14 nats on any CPU, and a mistake shows above EXACT.
    return tiny_llama(tokenizer).double()


@pytest.fixture
def backend(model, tokenizer):
    return TransformersBackend(model, tokenizer, batch_size=3)


@pytest.fixture
def prompts(tokenizer):
    texts = ["good", "bad fair clear [RESULT] 5", "clear polite", "polite polite good fair bad good", "fair"]
    return [tokenizer(text)["input_ids"] for text in texts]


class Writer(LlamaForCausalLM):
    """Writes given token ids after any prompt: the next token after a position is `script[position]`."""

    script: list[int]

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        kept = position_ids[:, -output.logits.shape[1] :]
        following = torch.tensor(self.script)[kept.clamp(max=len(self.script) - 1)]
        output.logits = torch.nn.functional.one_hot(following, output.logits.shape[-1]).float() * 1e4
        return output


def writer(tokenizer, text_ids: list[int], prompt_length: int) -> TransformersBackend:
    model = Writer(tiny_llama(tokenizer).config).eval()
    model.script = [0] * (prompt_length - 1) + text_ids
    return TransformersBackend(model, tokenizer)


def next_token_oracle(model, ids: list[int]) -> np.ndarray:
    """The whole distribution after `ids`: one unpadded row, every position, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def test_both_backends_satisfy_the_protocol(backend, tokenizer):
    assert isinstance(backend, Backend)
    assert isinstance(ScriptedBackend([], tokenizer), Backend)


class TestGenerate:
    @pytest.mark.parametrize("repetition_penalty", [1.0, 1.5])
    def test_a_batch_writes_what_each_prompt_writes_alone(self, backend, prompts, repetition_penalty):
        settings = {"temperature": 0, "max_new_tokens": 12, "repetition_penalty": repetition_penalty}
        alone = [backend.generate([prompt], **settings)[0] for prompt in prompts]
        assert backend.generate(prompts, **settings) == alone
        assert len({generation.text for (generation,) in alone}) == len(prompts)  # Else order could not be told.

    def test_the_settings_reach_the_model(self, backend, prompts):
        plain = backend.generate(prompts, max_new_tokens=12)
        for change in ({"temperature": 3.0}, {"top_p": 0.05}, {"repetition_penalty": 5.0}, {"seed": 1}):
            assert backend.generate(prompts, max_new_tokens=12, **change) != plain, change

    def test_n_continuations_of_a_prompt_differ(self, backend, prompts):
        results = backend.generate(prompts, n=4, max_new_tokens=8)
        assert [len(samples) for samples in results] == [4] * len(prompts)
        assert all(len({generation.text for generation in samples}) > 1 for samples in results)

    def test_n_continuations_stay_with_their_prompt(self, tokenizer, model):
        # Near-zero temperature and no top-p: every sample is the greedy one, so each prompt can be recognised.
        backend = TransformersBackend(model, tokenizer, batch_size=2)
        prompts = [tokenizer(text)["input_ids"] for text in ("good", "clear polite bad", "fair")]
        greedy = backend.generate(prompts, temperature=0, max_new_tokens=8)
        assert backend.generate(prompts, n=3, temperature=1e-4, max_new_tokens=8) == [row * 3 for row in greedy]

    def test_the_same_seed_gives_the_same_text(self, backend, prompts):
        torch.manual_seed(1)
        first = backend.generate(prompts, n=2, max_new_tokens=8, seed=7)
        torch.manual_seed(2)
        assert backend.generate(prompts, n=2, max_new_tokens=8, seed=7) == first

    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    def test_a_sampled_text_depends_on_its_prompt_and_seed_alone(self, tokenizer, model, prompts, batch_size):
        settings = {"n": 2, "max_new_tokens": 12, "top_p": 0.9, "repetition_penalty": 1.1}
        alone = [
            TransformersBackend(model, tokenizer, batch_size=2).generate([prompt], seed=[seed], **settings)[0]
            for seed, prompt in enumerate(prompts)
        ]
        together = TransformersBackend(model, tokenizer, batch_size=batch_size)
        backwards = together.generate(prompts[::-1], seed=list(range(len(prompts)))[::-1], **settings)
        assert backwards[::-1] == alone
        assert len({generation.text for own in alone for generation in own}) == 2 * len(prompts)

    def test_seeds_are_one_for_each_prompt(self, backend, prompts):
        with pytest.raises(ValueError, match=f"1 seeds for {len(prompts)} prompts"):
            backend.generate(prompts, seed=[1])

    def test_batches_of_a_call_draw_different_numbers(self, tokenizer, model):
        backend = TransformersBackend(model, tokenizer, batch_size=2)
        prompt = tokenizer("good")["input_ids"]
        results = backend.generate([prompt] * 4, max_new_tokens=12)
        assert results[:2] != results[2:]

    def test_the_callers_random_state_is_left_alone(self, backend, prompts):
        before = torch.get_rng_state()
        backend.generate(prompts, max_new_tokens=8)
        assert torch.equal(torch.get_rng_state(), before)

    def test_top_k_of_the_checkpoint_and_of_the_library_is_off(self, model, tokenizer):
        # At a huge temperature the 300 tokens are equally likely: 200 draws give about 300 (1 - e^(-2/3)) = 146 kinds,
        # with the library's default top-k at most 50, with the checkpoint's at most 2.
        model.generation_config = GenerationConfig(top_k=2, do_sample=True)
        backend = TransformersBackend(model, tokenizer, batch_size=200)
        (texts,) = backend.generate([[5]], n=200, max_new_tokens=1, temperature=1e6)
        assert len({text.token_ids for text in texts}) > 100

    def test_penalties_and_suppressed_tokens_of_the_checkpoint_are_off(self, backend, prompts):
        plain = backend.generate(prompts, temperature=0, max_new_tokens=12)
        backend.model.generation_config.repetition_penalty = 5.0
        backend.model.generation_config.no_repeat_ngram_size = 1
        backend.model.generation_config.min_new_tokens = 11
        backend.model.generation_config.suppress_tokens = list(range(100))
        backend.model.generation_config.num_beams = 2
        assert backend.generate(prompts, temperature=0, max_new_tokens=12) == plain

    def test_progress_adds_up_to_the_prompts(self, backend, prompts):
        reports = []
        backend.generate([*prompts, [0] * CONTEXT], n=2, max_new_tokens=4, on_progress=reports.append)
        assert sum(reports) == len(prompts) + 1
        assert len(reports) > 2

    def test_no_prompts_give_no_results(self, backend):
        assert backend.generate([]) == []

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"n": 0}, "n=0"),
            ({"n": 2, "temperature": 0}, "same text 2 times"),
            ({"temperature": -1}, "temperature=-1"),
            ({"top_p": 0}, "top_p=0"),
            ({"stop": ""}, "stop"),
            ({"max_new_tokens": 0}, "max_new_tokens=0"),
            ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, backend, prompts, settings, message):
        with pytest.raises(ValueError, match=message):
            backend.generate(prompts, **settings)

    @pytest.mark.parametrize("wrong", [[], [3, -1], [3, 10_000]])
    def test_a_bad_prompt_is_named(self, backend, wrong):
        with pytest.raises(ValueError, match=r"prompts\[1\]"):
            backend.generate([[3], wrong])


class TestDraw:
    LOGITS = torch.log(torch.tensor([[0.1, 0.2, 0.0, 0.7]]))

    def draw(self, numbers, logits=LOGITS, **settings):
        rows = len(numbers)
        input_ids = torch.ones(rows, 1, dtype=torch.long)
        return Drawing(Sampling(**settings))(input_ids, logits.expand(rows, -1), numbers).tolist()

    def test_the_token_is_where_the_cumulated_probability_passes_the_number(self):
        # 0.1, 0.3, 0.3, 1.0: token 2 has no probability and is never drawn.
        assert self.draw([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.9999]) == [0, 0, 1, 1, 3, 3]

    def test_a_number_that_rounding_leaves_beyond_the_last_is_the_likeliest_token_s(self):
        assert self.draw([1.0]) == [3]

    def test_no_number_draws_an_impossible_token(self):
        logits = torch.tensor([[-math.inf, 0.0, -math.inf]])
        assert self.draw([0.0, 0.5, 1 - 2**-53], logits) == [1, 1, 1]

    def test_tokens_come_up_as_often_as_their_probabilities_say(self):
        numbers = [float(random_numbers(0, sample, 1)[0]) for sample in range(4000)]
        drawn = torch.tensor(self.draw(numbers, temperature=0.5, top_p=0.95))
        # Squared by the temperature: 0.01, 0.04, 0, 0.49 of 0.54; the first is beyond 95 %.
        counts = torch.bincount(drawn, minlength=4)
        assert counts[[0, 2]].tolist() == [0, 0]
        assert counts[1] / 4000 == pytest.approx(0.04 / 0.53, abs=0.013)  # three standard deviations

    @pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
    @pytest.mark.parametrize("most", [1, 20, 1000])
    def test_the_nucleus_is_the_librarys(self, top_p, most):
        # Rows from all on one token to nearly even; with 20 tokens looked at, some nuclei are larger and some are not.
        logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).double()
        logits = logits * torch.logspace(-1, 1.5, 40).double()[:, None]
        wanted = TopPLogitsWarper(top_p)(None, logits)
        assert torch.equal(Nucleus(top_p, most)(torch.ones(40, 1), logits), wanted)
        assert 40 <= int(wanted.isfinite().sum()) < 40 * 300

    def test_the_repetition_penalty_counts_what_stands_before(self):
        logits = torch.tensor([[0.5, 1.2, 0.7]])
        assert self.draw([0.0], logits, temperature=0) == [1]
        assert self.draw([0.0], logits, temperature=0, repetition_penalty=2.0) == [2]  # token 1 stands before

    def test_in_generate_the_next_step_takes_the_next_number_and_padding_is_no_token(self):
        drawing = Drawing(Sampling(repetition_penalty=1e9))
        draw = DrawEach(drawing, torch.tensor([[True, False]]), lambda step: [[0.3, 0.7][step]])
        # The penalty makes a logit of 1 a 0. Token 1 stands before, 0 is padding: e, 1, e of 2 e + 1 are .42, .16, .42
        first = draw(torch.tensor([[0, 1]]), torch.ones(1, 3))
        assert first.tolist() == [[0.0, -math.inf, -math.inf]]
        # Then token 2 stands before as well: e, 1, 1 of e + 2 are .58, .21, .21.
        assert draw(torch.tensor([[0, 1, 2]]), torch.ones(1, 3)).argmax() == 1

    def test_samples_of_one_seed_draw_different_numbers(self):
        assert not np.isin(random_numbers(3, 0, 50), random_numbers(3, 1, 50)).any()


class TestStop:
    def test_the_text_is_cut_before_a_stop_of_several_tokens(self, tokenizer):
        # One token a character: the stop string spans eight of them.
        ids = [tokenizer.convert_tokens_to_ids(character) for character in "ok[RESULT]5fair"]
        result = writer(tokenizer, ids, prompt_length=2).generate([[5, 6]], stop=STOP, temperature=0)
        assert result == [[Generation("ok", "stop", 10)]]

    def test_the_text_is_cut_when_the_stop_ends_inside_a_token(self, tokenizer):
        glued = tokenizer("]\n")["input_ids"]
        assert len(glued) == 1
        ids = [tokenizer.convert_tokens_to_ids(character) for character in "ok[RESULT"] + glued + glued
        result = writer(tokenizer, ids, prompt_length=2).generate([[5, 6]], stop=STOP, temperature=0)
        assert result == [[Generation("ok", "stop", 10)]]

    def test_a_stop_of_bytes_that_are_not_characters_is_found(self, tokenizer):
        ids = tokenizer("ok→→no")["input_ids"]
        assert len(ids) == 10  # Each arrow is three one-byte tokens.
        result = writer(tokenizer, ids, prompt_length=2).generate([[5, 6]], stop="→", temperature=0)
        assert result == [[Generation("ok", "stop", 5)]]

    def test_the_end_of_the_prompt_is_no_part_of_the_stop(self, tokenizer):
        prompt = [tokenizer.convert_tokens_to_ids(character) for character in "[RESULT"]
        ids = [tokenizer.convert_tokens_to_ids(character) for character in "]ok"] + [tokenizer.eos_token_id]
        result = writer(tokenizer, ids, prompt_length=len(prompt)).generate([prompt], stop=STOP, temperature=0)
        assert result == [[Generation("]ok", "eos", 4)]]

    def test_a_row_that_stopped_does_not_stop_the_others(self, backend, prompts):
        (free,) = zip(*backend.generate(prompts, temperature=0, max_new_tokens=20), strict=True)
        stop = free[0].text[3:5]
        assert len(stop) == 2
        stopped = [row[0] for row in backend.generate(prompts, temperature=0, max_new_tokens=20, stop=stop)]
        assert stopped[0].finish_reason == "stop"
        assert stopped[0].num_tokens < 20
        assert [generation.text for generation in stopped] == [row.text.split(stop)[0] for row in free]
        assert {generation.finish_reason for generation in stopped} > {"stop"}

    def test_an_end_of_sequence_ends_the_text(self, tokenizer):
        ids = [*tokenizer("fair")["input_ids"], tokenizer.eos_token_id, 5, 6]
        result = writer(tokenizer, ids, prompt_length=2).generate([[5, 6]], stop=STOP, temperature=0)
        assert result == [[Generation("fair", "eos", len(ids) - 2)]]

    @pytest.mark.parametrize("eos", [7, [7, 8]])
    def test_ends_of_sequence_of_tokenizer_and_checkpoint_both_count(self, tokenizer, eos):
        for token in (7, tokenizer.eos_token_id):
            backend = writer(tokenizer, [20, token, 21], prompt_length=2)
            backend.model.generation_config.eos_token_id = eos
            ((generation,),) = backend.generate([[5, 6]], temperature=0)
            assert (generation.finish_reason, generation.num_tokens) == ("eos", 2)
            assert generation.text == tokenizer.decode([20])

    def test_padding_behind_an_end_is_no_stop(self, tokenizer, monkeypatch):
        # The longer prompt's row ends at once; "!" pads it while the other row goes on.
        backend = writer(tokenizer, [20, 21, 22, tokenizer.eos_token_id, 23, 24], prompt_length=2)
        monkeypatch.setattr(backend, "_pad_id", lambda: tokenizer.convert_tokens_to_ids("!"))
        (first,), (second,) = backend.generate([[5, 6], [5, 6, 5, 6, 5]], temperature=0, stop="!")
        assert first == Generation(tokenizer.decode([20, 21, 22]), "eos", 4)
        assert second == Generation("", "eos", 1)

    def test_tokens_that_run_out_are_a_length(self, tokenizer):
        ids = tokenizer("fair polite clear")["input_ids"]
        ((generation,),) = writer(tokenizer, ids, 2).generate([[5, 6]], temperature=0, max_new_tokens=1)
        assert generation == Generation(tokenizer.decode(ids[:1]), "length", 1)


class TestContextWindow:
    @pytest.mark.parametrize(("length", "fits"), [(CONTEXT - 2, True), (CONTEXT - 1, False), (CONTEXT + 5, False)])
    def test_a_prompt_that_leaves_no_room_is_told_apart(self, backend, prompts, length, fits):
        settings = {"temperature": 0, "max_new_tokens": 8}
        long, *others = backend.generate([[5] * length, *prompts], **settings)
        if fits:
            assert long[0].num_tokens == 2
        else:
            assert long == [Generation("", "prompt_too_long", 0)]
        assert others == backend.generate(prompts, **settings)  # Its neighbours write all they would have.

    def test_no_row_writes_past_the_window_and_none_is_cut_short(self, backend, prompts):
        backend.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend.tokenizer.backend_tokenizer)
        backend.model.generation_config.eos_token_id = None
        rows = backend.generate(prompts, max_new_tokens=1000)
        assert [row.num_tokens for (row,) in rows] == [CONTEXT - len(prompt) for prompt in prompts]

    def test_a_stop_is_found_across_the_batches_that_share_its_row(self, tokenizer):
        # The longer row leaves room for 6 tokens: the shorter one's "[RESULT]" begins before and ends after that.
        ids = [tokenizer.convert_tokens_to_ids(character) for character in "good[RESULT]5"]
        backend = writer(tokenizer, ids, prompt_length=2)
        rows = backend.generate([[5] * (CONTEXT - 6), [5, 6]], temperature=0, stop=STOP, max_new_tokens=40)
        assert rows[1] == [Generation("good", "stop", 12)]


class TestLogprobs:
    def test_they_are_the_models_own_whatever_the_padding(self, backend, model, prompts):
        token_ids = [3, 50, 7, 7]
        expected = np.stack([next_token_oracle(model, prompt)[token_ids] for prompt in prompts])
        logprobs = backend.next_token_logprobs(prompts, token_ids)
        assert logprobs.dtype == np.float64
        np.testing.assert_allclose(logprobs, expected, **EXACT)

    def test_in_float32_they_are_as_good_as_the_models_own(self, model, tokenizer, prompts):
        # How far float32 is off depends on the CPU: it is judged by what a plain forward is off on the same one.
        exact = np.stack([next_token_oracle(model, prompt) for prompt in prompts])
        single = model.float()
        plain = np.stack([next_token_oracle(single, prompt) for prompt in prompts])
        logprobs = TransformersBackend(single, tokenizer).next_token_logprobs(prompts, range(len(tokenizer)))
        assert 0 < np.abs(plain - exact).max() < 1e-3
        assert np.abs(logprobs - exact).max() < 4 * np.abs(plain - exact).max()

    def test_learned_positions_are_counted_from_the_first_token(self, tokenizer, prompts):
        # Rotary positions are relative and forgive an offset; GPT-2's are not and do not.
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.5}
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval().double()
        expected = np.stack([next_token_oracle(gpt2, prompt)[[3, 50]] for prompt in prompts])
        logprobs = TransformersBackend(gpt2, tokenizer).next_token_logprobs(prompts, [3, 50])
        np.testing.assert_allclose(logprobs, expected, **EXACT)

    def test_sampling_settings_leave_them_alone(self, backend, prompts):
        before = backend.next_token_logprobs(prompts, [3, 4])
        backend.model.generation_config.update(temperature=0.1, top_k=1, repetition_penalty=9.0, do_sample=True)
        backend.generate(prompts, temperature=0.2, top_p=0.1, repetition_penalty=3.0, max_new_tokens=4)
        np.testing.assert_array_equal(backend.next_token_logprobs(prompts, [3, 4]), before)

    def test_a_model_that_takes_a_mask_alone_gives_the_same(self, backend, prompts, tokenizer):
        class Old(LlamaForCausalLM):
            def forward(self, input_ids=None, attention_mask=None, use_cache=None):
                return super().forward(input_ids, attention_mask)

        old = Old(backend.model.config).eval().double()
        old.load_state_dict(backend.model.state_dict())
        expected = backend.next_token_logprobs(prompts, [3, 4])
        logprobs = TransformersBackend(old, tokenizer).next_token_logprobs(prompts, [3, 4])
        # It counts positions from the padding, and rotary angles are float32 in a model of any precision: 4e-6 nats.
        np.testing.assert_allclose(logprobs, expected, atol=1e-5, rtol=0)

    def test_only_the_last_position_is_projected(self, backend, prompts):
        shapes = []
        backend.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
        backend.next_token_logprobs(prompts, [3])
        assert set(shapes) == {1}

    def test_half_precision_logits_are_normalised_in_float32(self, model, tokenizer, prompts):
        logprobs = TransformersBackend(model.bfloat16(), tokenizer).next_token_logprobs(prompts, range(len(tokenizer)))
        np.testing.assert_allclose(np.exp(logprobs).sum(axis=1), 1.0, atol=1e-5)

    def test_a_row_longer_than_the_window_is_nan_and_alone_in_it(self, backend, prompts):
        expected = backend.next_token_logprobs(prompts, [3])
        logprobs = backend.next_token_logprobs([[5] * CONTEXT, *prompts, [5] * (CONTEXT + 1)], [3])
        assert np.isfinite(logprobs[0]).all()
        assert np.isnan(logprobs[-1]).all()
        np.testing.assert_allclose(logprobs[1:-1], expected, **EXACT)

    def test_no_rows_give_an_empty_matrix(self, backend):
        assert backend.next_token_logprobs([], [3, 4]).shape == (0, 2)

    @pytest.mark.parametrize(
        ("rows", "token_ids", "named"),
        [
            ([[3], []], [3], r"token_id_lists\[1\] is empty"),
            ([[3], [10_000]], [3], r"token_id_lists\[1\] holds token id 10000"),
            ([[3]], [3, 10_000], "10000"),
            ([[3]], [-1], "-1"),
        ],
    )
    def test_ids_outside_the_vocabulary_are_refused(self, backend, rows, token_ids, named):
        with pytest.raises(ValueError, match=named):
            backend.next_token_logprobs(rows, token_ids)


class TestBorrowedModel:
    def test_each_module_keeps_its_mode_and_the_model_its_settings(self, backend, prompts):
        backend.model.train()
        backend.model.model.layers[0].eval()
        modes = [module.training for module in backend.model.modules()]
        settings = backend.model.generation_config
        contents, attributes = settings.to_dict(), set(vars(backend.model))
        backend.generate(prompts, max_new_tokens=4, top_p=0.5, stop=STOP)
        backend.next_token_logprobs(prompts, [3])
        assert [module.training for module in backend.model.modules()] == modes
        assert backend.model.generation_config is settings
        assert settings.to_dict() == contents
        assert set(vars(backend.model)) == attributes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in backend.model.modules())

    def test_it_is_given_back_after_an_error(self, backend, prompts):
        backend.model.train()
        settings = backend.model.generation_config

        def interrupt(finished):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            backend.generate(prompts, max_new_tokens=4, on_progress=interrupt)
        assert backend.model.training
        assert backend.model.generation_config is settings

    def test_dropout_is_off_in_training_mode(self, tokenizer, prompts):
        model = LlamaForCausalLM(
            LlamaConfig(**{**tiny_llama(tokenizer).config.to_dict(), "attention_dropout": 0.5})
        ).train()
        backend = TransformersBackend(model, tokenizer)
        first = backend.next_token_logprobs(prompts, [3, 4])
        np.testing.assert_array_equal(backend.next_token_logprobs(prompts, [3, 4]), first)

    def test_no_gradient_is_recorded(self, backend, prompts):
        seen = []
        backend.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.requires_grad))
        backend.next_token_logprobs(prompts, [3])
        backend.generate(prompts, max_new_tokens=2)
        assert set(seen) == {False}

    def test_a_model_that_the_sft_trainer_patched_answers_as_before(self, backend, prompts, tmp_path):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        settings = {"temperature": 0, "max_new_tokens": 8}
        texts, logprobs = backend.generate(prompts, **settings), backend.next_token_logprobs(prompts, [3, 4])
        original = backend.model.forward
        SFTTrainer(
            backend.model,
            args=SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict({"text": ["good", "bad"]}),
            processing_class=backend.tokenizer,
        )
        assert backend.model.forward != original
        assert backend.generate(prompts, **settings) == texts
        np.testing.assert_allclose(backend.next_token_logprobs(prompts, [3, 4]), logprobs, **EXACT)

    def test_options_that_only_loading_has_are_refused(self, model, tokenizer):
        for option in ({"dtype": "float32"}, {"device": "cpu"}, {"merge_adapter": True}):
            with pytest.raises(ValueError, match="already loaded"):
                TransformersBackend(model, tokenizer, **option)

    def test_a_model_from_nowhere_needs_a_tokenizer(self, model):
        with pytest.raises(ValueError, match="Pass its tokenizer"):
            TransformersBackend(model)

    def test_batch_size_is_checked(self, model, tokenizer):
        with pytest.raises(ValueError, match="batch_size=0"):
            TransformersBackend(model, tokenizer, batch_size=0)


class TestLoading:
    @pytest.fixture
    def base_dir(self, model, tokenizer, tmp_path):
        model.bfloat16().save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    @pytest.fixture
    def adapted(self, base_dir):
        """A LoRA far enough from its base to be seen, in memory."""
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        base = LlamaForCausalLM.from_pretrained(base_dir, dtype="auto")
        torch.manual_seed(1)
        return get_peft_model(base, lora).eval()

    def test_a_directory_keeps_its_own_dtype(self, base_dir):
        backend = TransformersBackend(base_dir, device="cpu", dtype="auto")
        assert backend.model.dtype == torch.bfloat16
        assert backend.model_id == str(base_dir)
        assert not backend.model.training
        assert TransformersBackend(str(base_dir), dtype=torch.float32, device="cpu").model.dtype == torch.float32

    @pytest.fixture
    def two_accelerators(self, monkeypatch):
        """A machine with two of them, as far as `torch.accelerator` tells, the first of them current."""
        device = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    # A cluster may show each process one accelerator alone, whatever its number is.
    @pytest.mark.parametrize(
        ("local_rank", "count", "device"),
        [(None, 2, "cuda:0"), ("0", 2, "cuda:0"), ("1", 2, "cuda:1"), ("1", 1, "cuda:0")],
    )
    def test_each_process_loads_on_its_own_accelerator(
        self, base_dir, tokenizer, two_accelerators, monkeypatch, local_rank, count, device
    ):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        placed = []
        monkeypatch.setattr(
            LlamaForCausalLM, "from_pretrained", lambda *args, device_map, **kwargs: placed.append(device_map)
        )
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'eval'"):  # Nothing was loaded.
            TransformersBackend(base_dir, tokenizer)
        assert placed == [torch.device(device)]

    def test_a_process_without_an_accelerator_of_its_own_is_told(self, base_dir, two_accelerators, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(RuntimeError, match=r"process 2 .* only 2.* at most 2 processes"):
            TransformersBackend(base_dir)

    def test_a_rank_without_any_accelerator_loads_on_the_cpu(self, base_dir, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert TransformersBackend(base_dir).model.device == torch.device("cpu")

    @pytest.mark.parametrize("own_tokenizer", [True, False])
    def test_an_adapter_directory_equals_the_adapter_in_memory(
        self, adapted, base_dir, tokenizer, prompts, tmp_path, own_tokenizer
    ):
        adapted.save_pretrained(tmp_path / "adapter")
        if own_tokenizer:
            own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<s>")
            own.save_pretrained(tmp_path / "adapter")
        loaded = TransformersBackend(tmp_path / "adapter", device="cpu", dtype="auto")
        memory = TransformersBackend(adapted, tokenizer)
        logprobs = loaded.next_token_logprobs(prompts, [3, 4])
        np.testing.assert_array_equal(logprobs, memory.next_token_logprobs(prompts, [3, 4]))
        base = TransformersBackend(base_dir, device="cpu", dtype="auto").next_token_logprobs(prompts, [3, 4])
        assert np.abs(logprobs - base).max() > 0.1
        assert loaded.tokenizer.eos_token == ("<s>" if own_tokenizer else "</s>")
        if not own_tokenizer:
            settings = {"temperature": 0, "max_new_tokens": 8}
            assert loaded.generate(prompts, **settings) == memory.generate(prompts, **settings)

    def test_an_adapted_models_settings_are_set_aside_and_put_back(self, adapted, tokenizer, prompts):
        backend = TransformersBackend(adapted, tokenizer)
        plain = backend.generate(prompts, temperature=0, max_new_tokens=8)
        settings = adapted.get_base_model().generation_config
        settings.suppress_tokens = list(range(100))
        settings.repetition_penalty = 5.0
        assert backend.generate(prompts, temperature=0, max_new_tokens=8) == plain
        assert adapted.get_base_model().generation_config is settings
        assert settings.repetition_penalty == 5.0

    def test_a_merged_adapter_differs_by_rounding_only(self, adapted, prompts, tmp_path):
        adapted.save_pretrained(tmp_path / "adapter")
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1.0)):
            apart = TransformersBackend(tmp_path / "adapter", dtype=dtype, device="cpu")
            merged = TransformersBackend(tmp_path / "adapter", dtype=dtype, device="cpu", merge_adapter=True)
            assert not any("lora" in name for name, _ in merged.model.named_parameters())
            difference = merged.next_token_logprobs(prompts, [3, 4]) - apart.next_token_logprobs(prompts, [3, 4])
            assert np.abs(difference).max() < bound

    def test_a_frozen_head_is_not_copied_for_each_row(self, adapted, tokenizer, prompts):
        vocabulary, multiplied = adapted.config.vocab_size, []

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                    multiplied.append(arguments[1].shape)
                return function(*arguments, **(keywords or {}))

        backend = TransformersBackend(adapted, tokenizer)
        with Products():
            backend.generate(prompts, max_new_tokens=2)
        assert {len(shape) for shape in multiplied if shape[-1] == vocabulary} == {2}

    def test_an_adapter_trained_with_added_tokens_loads(self, base_dir, tokenizer, tmp_path):
        longer = PreTrainedTokenizerFast.from_pretrained(base_dir)
        longer.add_tokens(["<new>"])
        base = LlamaForCausalLM.from_pretrained(base_dir, dtype="auto")
        base.resize_token_embeddings(len(longer))
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        longer.save_pretrained(tmp_path / "adapter")
        new = len(longer) - 1
        loaded = TransformersBackend(tmp_path / "adapter", device="cpu", dtype="auto")
        np.testing.assert_array_equal(
            loaded.next_token_logprobs([[5, new]], [new]),
            TransformersBackend(adapted, longer).next_token_logprobs([[5, new]], [new]),
        )

    def test_an_adapter_without_a_base_is_refused(self, adapted, tmp_path):
        adapted.save_pretrained(tmp_path / "adapter")
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
        with pytest.raises(ValueError, match="names no base model"):
            TransformersBackend(tmp_path / "adapter", device="cpu")


class TestOutOfMemory:
    @pytest.fixture
    def small_device(self, backend, monkeypatch):
        """A model that fails on more than one sequence, and the sizes that it was asked for."""
        backend.generate([[5]], max_new_tokens=1)  # tries the model out
        sizes = []
        forward = backend.model.forward

        def limited(*args, **kwargs):
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(*args, **kwargs)

        limited.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(backend.model, "forward", limited)
        return sizes

    def test_smaller_batches_give_the_same_answers(self, backend, prompts, small_device, monkeypatch, caplog):
        with caplog.at_level(logging.WARNING, logger="trl_tract"):
            texts = backend.generate(prompts, temperature=0, max_new_tokens=4)
        assert small_device[0] == 3
        assert sum(size > 1 for size in small_device) == 1  # It stays small: 3, then 1 at a time.
        assert len([record for record in caplog.records if record.name.startswith("trl_tract")]) == 1
        logprobs = backend.next_token_logprobs(prompts, [3])
        monkeypatch.undo()
        assert texts == backend.generate(prompts, temperature=0, max_new_tokens=4)
        np.testing.assert_allclose(logprobs, backend.next_token_logprobs(prompts, [3]), **EXACT)

    def test_a_single_sequence_that_does_not_fit_is_an_error(self, backend, prompts, monkeypatch):
        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(backend.model, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            backend.next_token_logprobs(prompts, [3])


class TestScripted:
    def test_a_function_sees_the_prompt_and_a_seed_for_each_continuation(self, tokenizer):
        backend = ScriptedBackend(lambda prompt, seed: f"{prompt}/{seed}", tokenizer)
        prompt = tokenizer("good")["input_ids"]
        assert [sample.text for sample in backend.generate([prompt], n=2, seed=5)[0]] == ["good/5", "good/6"]

    def test_stop_length_and_end_of_sequence_are_told_apart(self, tokenizer):
        backend = ScriptedBackend(["fair [RESULT] 4", "fair", "fair polite"], tokenizer)
        ids = tokenizer("fair polite")["input_ids"]
        assert tokenizer.tokenize("fair [RESULT] 4") == ["fai", "rĠ", "[RESULT]Ġ", "4"]
        assert backend.generate([[5]], stop=STOP) == [[Generation("fair ", "stop", 3)]]
        assert backend.generate([[5]]) == [[Generation("fair", "eos", len(tokenizer("fair")["input_ids"]) + 1)]]
        cut = backend.generate([[5]], max_new_tokens=len(ids) - 1)
        assert cut == [[Generation(tokenizer.decode(ids[:-1]), "length", len(ids) - 1)]]

    def test_a_stop_after_the_last_token_is_not_reached(self, tokenizer):
        backend = ScriptedBackend({"good": "fair [RESULT] 4"}, tokenizer)
        prompt = tokenizer("good")["input_ids"]
        ((generation,),) = backend.generate([prompt], stop=STOP, max_new_tokens=2)
        assert (generation.finish_reason, generation.num_tokens) == ("length", 2)

    def test_a_prompt_too_long_is_isolated(self, tokenizer):
        backend = ScriptedBackend(["fair"], tokenizer, context_length=10)
        assert [row[0].finish_reason for row in backend.generate([[5] * 9, [5]])] == ["prompt_too_long", "eos"]

    def test_a_script_that_has_no_text_says_so(self, tokenizer):
        with pytest.raises(LookupError, match="no text for the prompt 'good'"):
            ScriptedBackend({}, tokenizer).generate([tokenizer("good")["input_ids"]])
        with pytest.raises(LookupError, match="all 1 texts"):
            ScriptedBackend(["fair"], tokenizer).generate([[5], [5]])

    def test_probabilities_come_back_as_logarithms(self, tokenizer):
        backend = ScriptedBackend([], tokenizer, probs=lambda ids: [0.5, 0.25 * len(ids)])
        logprobs = backend.next_token_logprobs([[5], [5, 6]], [3, 4])
        np.testing.assert_allclose(logprobs, np.log([[0.5, 0.25], [0.5, 0.5]]))
        assert ScriptedBackend([], tokenizer, probs=[0.0]).next_token_logprobs([[5]], [3])[0, 0] == -math.inf

    @pytest.mark.parametrize("probs", [None, [0.5], [0.9, 0.9], [-0.1, 0.2]])
    def test_what_is_no_distribution_is_refused(self, tokenizer, probs):
        with pytest.raises(ValueError, match="probabilities"):
            ScriptedBackend([], tokenizer, probs=probs).next_token_logprobs([[5]], [3, 4])

    @pytest.mark.parametrize("record_calls", [True, False])
    def test_it_fails_on_the_calls_it_is_told_to_and_counts_all(self, tokenizer, record_calls):
        backend = ScriptedBackend(
            ["fair"] * 2,
            tokenizer,
            probs=[0.5],
            generate_errors={1: ConnectionError("gone")},
            logprob_errors={0: OSError("lost")},
            record_calls=record_calls,
        )
        backend.generate([[5]])
        with pytest.raises(ConnectionError, match="gone"):
            backend.generate([[5]], seed=9)
        backend.generate([[5]])
        with pytest.raises(OSError, match="lost"):
            backend.next_token_logprobs([[5]], [3])
        assert [call["seed"] for call in backend.generate_calls] == ([0, 9, 0] if record_calls else [])
        assert backend.logprob_calls == ([[[5]]] if record_calls else [])
