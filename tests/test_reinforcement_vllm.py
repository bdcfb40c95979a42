"""REALTrainer with rationales from a real vLLM, in the same process or behind its server: two steps.

For an environment that has vLLM (docs/generation.md). Without one, `pytest -m vllm` fails: it does not skip.
"""

import functools
import math
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from tiny import PLAIN

from trl_tract.demo.seed_model import save_seed_model

pytestmark = [
    pytest.mark.vllm,
    # vLLM and what it imports warn about each other's deprecations.
    pytest.mark.filterwarnings("ignore"),
]
EXAMPLES = (
    "Reply: Go away.\nFeedback: It is rude. [RESULT] 1\n"
    "Reply: Thanks, happy to help!\nFeedback: It is polite. [RESULT] 5\n"
)
ROWS = [
    {"prompt": f"{EXAMPLES}Reply: {reply}\nFeedback:", "score": score}
    for reply, score in [("Shut up.", 1.5), ("Of course, you are very welcome.", 4.5)]
]


@pytest.fixture
def engine_on_a_cpu(monkeypatch):
    """TRL's own engine: without compiling, and with weights that can be replaced, which vLLM packs away on a CPU."""
    import trl.generation.vllm_generation as generation
    import vllm.model_executor.layers.utils as layers

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", plain)  # imported where it is called
    monkeypatch.setattr(generation, "LLM", functools.partial(generation.LLM, enforce_eager=True, dtype="float32"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def seed(tmp_path):
    save_seed_model(tmp_path / "seed", torch.float32)
    return str(tmp_path / "seed")


@pytest.fixture
def server(seed, tmp_path, monkeypatch):
    """Where vLLM's own server is, with the model that is trained."""
    # TRL hands weights over between GPUs alone. Here they stay what they are: see the learning rate.
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient.init_communicator", lambda self, device: None)
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient.update_named_params", lambda self, *given: None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", seed]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    command += ["--logprobs-mode", "processed_logprobs", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)  # with its engine, whose process would outlive it
    process.wait()


def test_vllm_writes_the_rationales_of_two_steps(seed, tmp_path, engine_on_a_cpu):
    two_steps(seed, tmp_path, learning_rate=1e-5, vllm_max_model_length=256)


def test_a_server_of_vllm_writes_the_rationales_of_two_steps(seed, tmp_path, server):
    two_steps(
        seed, tmp_path, learning_rate=0.0, vllm_mode="server", vllm_server_base_url=server, vllm_server_timeout=900
    )


def two_steps(seed, folder, **settings):
    """Train, and look at what vLLM wrote and at its log-probabilities."""
    # Here, where its warnings are let pass: TRL says of a vLLM beside it which versions it knows.
    from trl_tract import REALConfig, REALTrainer

    args = REALConfig(
        str(folder / "out"),
        **{**PLAIN, "logging_strategy": "steps", "logging_steps": 1, **settings},
        num_generations=4,
        max_completion_length=32,
        max_steps=2,
        use_vllm=True,
    )
    trainer = REALTrainer(seed, args, train_dataset=Dataset.from_list(ROWS))
    rollouts, ratios = [], []
    generate, loss = trainer._generate, trainer.compute_loss

    def seen(prompts):
        found = generate(prompts)
        rollouts.extend(trainer._rollouts)
        return found

    def weighed(model, inputs, **kwargs):
        ratios.append(inputs["importance_sampling_ratio"])
        return loss(model, inputs, **kwargs)

    trainer._generate, trainer.compute_loss = seen, weighed
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "score/rmse" in entry]
    assert len(log) == 2
    assert all(math.isfinite(entry["score/rmse"]) for entry in log)
    scored = [each for each in rollouts if each.scored]
    assert scored
    for each in scored:
        text = trainer._tokenizer.decode(each.ids)
        assert text.rstrip().endswith("[RESULT]"), text
        assert text.count("[RESULT]") == 1
        assert len(each.logprobs) == len(each.ids)
    # vLLM's own log-probabilities are those of the model; in process it was given new weights before the second step.
    for each in ratios:
        torch.testing.assert_close(each, torch.ones_like(each), atol=2e-2, rtol=0)
