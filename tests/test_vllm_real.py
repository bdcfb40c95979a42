"""A real vLLM on real weights against the transformers backend: in process, with an adapter, and behind its server.

For an environment that has vLLM (docs/generation.md). Without one, `pytest -m vllm` fails: it does not skip.
"""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_tract import CoTRAILJudge, CoTSelfDistill, ServerBackend, TransformersBackend, VLLMBackend
from trl_tract.backends import Generation, Stop
from trl_tract.demo.seed_model import save_seed_model
from trl_tract.files.journal import read_jsonl, write_jsonl

pytestmark = [
    pytest.mark.vllm,
    # vLLM and what it imports warn about each other's deprecations.
    pytest.mark.filterwarnings("ignore"),
]
STOP = "[RESULT]"
CONTEXT = 512
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT, "max_num_seqs": 8}
EXAMPLES = (
    "Reply: Go away.\nFeedback: It is rude. [RESULT] 1\n"
    "Reply: Thanks, happy to help!\nFeedback: It is polite. [RESULT] 5\n"
)
REPLIES = ["Shut up.", "Of course, you are very welcome.", "No.", "We are sorry to hear that. We will call you."]
CHAT = [[{"role": "user", "content": f"Is this reply polite, from 1 to 5? {reply}"}] for reply in REPLIES]
RATIONALES = ["It is rude and short.", "It is warm.", "It says too little.", "It apologises and offers a remedy."]
VALUES = np.arange(1, 6)


@pytest.fixture(scope="module", autouse=True)
def small_cpu_engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("models") / "full"
    save_seed_model(directory, torch.float32)
    return str(directory)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> str:
    """A random adapter of rank 12, far from its base: it moves scores by tenths."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(
        r=12, lora_alpha=12, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight *= 0.1
    directory = tmp_path_factory.mktemp("models") / "adapter"
    adapted.save_pretrained(str(directory))
    return str(directory)


@pytest.fixture(scope="module")
def full_reference(model) -> TransformersBackend:
    return TransformersBackend(model, batch_size=4)


@pytest.fixture(scope="module")
def adapter_reference(adapter) -> TransformersBackend:
    return TransformersBackend(adapter, batch_size=4)


def prompts_of(backend) -> list[list[int]]:
    """Few-shot prompts, which reach the marker, and chat prompts, some of which end with the model's turn."""
    texts = [f"{EXAMPLES}Reply: {reply}\nFeedback:" for reply in REPLIES]
    texts += [backend.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CHAT]
    return [backend.tokenizer(text)["input_ids"] for text in texts]


GREEDY = {"temperature": 0.0, "max_new_tokens": 32, "stop": STOP}


class SameNumbers:
    """Texts, log-probabilities and scores; subclasses bring `backend` and the `reference` it is held against."""

    def test_greedy_texts_are_the_same(self, backend, reference):
        prompts = prompts_of(reference)
        expected = reference.generate(prompts, **GREEDY)
        assert backend.generate(prompts, **GREEDY) == expected
        assert {generation.finish_reason for (generation,) in expected} >= {"length"}

    def test_logprobs_of_chosen_tokens_are_the_same(self, backend, reference):
        prompts = prompts_of(reference)
        tokens = reference.tokenizer.convert_tokens_to_ids(list("12345")) + list(range(500, 700))
        expected = reference.next_token_logprobs(prompts, tokens)
        np.testing.assert_allclose(backend.next_token_logprobs(prompts, tokens), expected, atol=1e-3, rtol=0)

    def test_scores_do_not_feel_what_is_sampled_beside_them(self, backend, reference):
        prompts = prompts_of(reference)
        tokens = reference.tokenizer.convert_tokens_to_ids(list("12345"))
        alone = backend.next_token_logprobs(prompts, tokens)
        sampling = {"temperature": 0.5, "top_p": 0.3, "repetition_penalty": 1.5, "max_new_tokens": 24}
        with ThreadPoolExecutor(1) as threads:
            texts = threads.submit(backend.generate, prompts, n=2, **sampling)
            beside = backend.next_token_logprobs(prompts, tokens)
            texts.result()
        np.testing.assert_allclose(beside, alone, atol=1e-4, rtol=0)


class AsTransformers(SameNumbers):
    """What every way to run vLLM must do."""

    @pytest.mark.parametrize(
        "stop",
        [Stop("e", ["r", "s ", "a", "n"]), Stop(STOP, ["5"]), Stop(" ", ["a"], lambda text: "." in text)],
        ids=str,
    )
    def test_a_stop_text_counts_in_the_same_places(self, backend, reference, stop):
        prompts = prompts_of(reference)
        settings = {**GREEDY, "stop": stop}
        expected = reference.generate(prompts, **settings)
        written = backend.generate(prompts, **settings)
        assert written == expected
        assert [one.token_ids for (one,) in written] == [one.token_ids for (one,) in expected]
        assert "stop" in {one.finish_reason for (one,) in expected}

    def test_expected_scores_are_the_same_to_a_thousandth(self, backend, reference):
        expected = CoTRAILJudge(reference).score_rationales(CHAT, RATIONALES) @ VALUES
        scores = CoTRAILJudge(backend).score_rationales(CHAT, RATIONALES) @ VALUES
        np.testing.assert_allclose(scores, expected, atol=1e-3, rtol=0)
        assert np.ptp(expected) > 0.01  # Else equality would say little.

    @pytest.mark.parametrize("thinking", ["off", "rationale"])
    @pytest.mark.parametrize("name", ["qwen3_5_think", "deepseekv3", "nemotron_3_nano"])
    def test_scores_on_templates_of_thinking_models_are_the_same(self, backend, reference, name, thinking, monkeypatch):
        template = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
        for each in (backend, reference):
            monkeypatch.setattr(each.tokenizer, "chat_template", template)
        expected, scores = (
            CoTRAILJudge(each, thinking=thinking).score_rationales(CHAT, RATIONALES) @ VALUES
            for each in (reference, backend)
        )
        np.testing.assert_allclose(scores, expected, atol=1e-3, rtol=0)
        assert np.ptp(expected) > 0.001

    def test_samples_of_a_prompt_differ_and_have_its_length(self, backend, reference):
        (row,) = backend.generate(prompts_of(reference)[:1], n=4, max_new_tokens=8, stop=STOP)
        assert len(row) == 4
        assert len({generation.text for generation in row}) > 1
        assert all(0 < generation.num_tokens <= 8 for generation in row)

    def test_prompts_at_the_end_of_the_window(self, backend, reference):
        tokens = reference.tokenizer.convert_tokens_to_ids(list("12345"))
        (long,), (last,) = backend.generate([[500] * (CONTEXT - 1), [500] * (CONTEXT - 3)], **GREEDY)
        assert long == Generation("", "prompt_too_long", 0)
        assert last.num_tokens <= 3
        logprobs = backend.next_token_logprobs([[500] * CONTEXT, [500] * (CONTEXT - 1)], tokens)
        assert np.isnan(logprobs[0]).all()
        assert np.isfinite(logprobs[1]).all()


def test_an_engine_argument_that_vllm_lacks_is_refused_with_the_nearest(model):
    with pytest.raises(ValueError, match=r"'gpu_memory_utilisation': did you mean gpu_memory_utilization"):
        VLLMBackend(model, gpu_memory_utilisation=0.5)


class TestWholeModelInProcess(SameNumbers):
    """On the oldest vLLM as well: see `.ci/run`."""

    @pytest.fixture(scope="class")
    def backend(self, model):
        with VLLMBackend(model, **ENGINE) as backend:
            yield backend

    @pytest.fixture
    def reference(self, full_reference):
        return full_reference

    def test_the_stop_text_ends_a_text_and_is_no_part_of_it(self, backend):
        rows = [row[0] for row in backend.generate(prompts_of(backend)[:4], **GREEDY)]
        assert {row.finish_reason for row in rows} == {"stop"}
        assert not any("[RES" in row.text for row in rows)


class TestAdapterInProcess(AsTransformers):
    @pytest.fixture(scope="class")
    def backend(self, adapter):
        with VLLMBackend(adapter, **ENGINE) as backend:
            yield backend

    @pytest.fixture
    def reference(self, adapter_reference):
        return adapter_reference

    def test_the_adapter_is_at_work(self, backend, reference, full_reference):
        tokens = reference.tokenizer.convert_tokens_to_ids(list("12345"))
        prompts = prompts_of(reference)
        difference = backend.next_token_logprobs(prompts, tokens) - full_reference.next_token_logprobs(prompts, tokens)
        assert np.abs(difference).max() > 0.1

    def test_it_is_named_for_the_adapter(self, backend, adapter):
        assert backend.model_id == adapter

    def test_calls_of_several_threads_give_what_they_give_alone(self, backend):
        prompts = prompts_of(backend)
        alone = [backend.generate([prompt], **GREEDY) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as threads:
            assert list(threads.map(lambda prompt: backend.generate([prompt], **GREEDY), prompts)) == alone

    def test_a_call_can_be_cancelled_and_the_engine_goes_on(self, backend):
        prompts = prompts_of(backend)
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(backend.generate, prompts * 4, n=4, max_new_tokens=400)
            time.sleep(0.5)
            backend.cancel()
            with pytest.raises(RuntimeError, match="cancelled"):
                call.result(timeout=5)
        assert backend.generate(prompts[:1], **GREEDY)[0][0].num_tokens > 0

    def test_progress_adds_up(self, backend):
        reports = []
        backend.generate(prompts_of(backend), max_new_tokens=2, on_progress=reports.append)
        assert sum(reports) == 2 * len(REPLIES)


class VLLMServer:
    """`vllm serve` on loopback, with an API key, that can be killed and started again on its port."""

    def __init__(self, model: str, adapter: str, log: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        arguments = {
            "--model": model,
            "--served-model-name": "seed",
            "--lora-modules": f"tuned={adapter}",
            "--max-lora-rank": "16",
            "--dtype": "float32",
            "--max-model-len": str(CONTEXT),
            "--max-num-seqs": "8",
            "--host": "127.0.0.1",
            "--port": str(self.port),
        }
        # `vllm serve` itself, but for the CPU build, whose distribution has another name than that command looks for.
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-lora"]
        self.command += [word for pair in arguments.items() for word in pair]
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # With its engine, whose processes would outlive it.
        self.process.wait()

    def wait(self) -> None:
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, open(self.log).read()[-4000:]  # noqa: SIM115
                time.sleep(0.5)


class TestServer(AsTransformers):
    @pytest.fixture(scope="class")
    def server(self, model, adapter, tmp_path_factory):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_API_KEY", "of-this-test")  # Read by the server and by the backend.
            server = VLLMServer(model, adapter, str(tmp_path_factory.mktemp("server") / "log"))
            try:
                server.wait()
                yield server
            finally:
                server.kill()

    @pytest.fixture(scope="class")
    def backend(self, server):
        with ServerBackend(f"http://127.0.0.1:{server.port}", "seed", max_concurrency=8) as backend:
            yield backend

    @pytest.fixture
    def reference(self, full_reference):
        return full_reference

    def test_the_server_tells_what_it_serves(self, backend, model):
        assert backend.model_id == model
        assert backend.context_length == CONTEXT

    def test_an_adapter_is_served_beside_its_base(self, server, adapter, adapter_reference):
        with ServerBackend(f"http://127.0.0.1:{server.port}", "tuned") as backend:
            assert backend.model_id == adapter
            expected = CoTRAILJudge(adapter_reference).score_rationales(CHAT, RATIONALES) @ VALUES
            scores = CoTRAILJudge(backend).score_rationales(CHAT, RATIONALES) @ VALUES
        np.testing.assert_allclose(scores, expected, atol=1e-3, rtol=0)

    def test_a_missing_key_is_an_error_that_says_where_it_is_read(self, server, monkeypatch):
        monkeypatch.delenv("VLLM_API_KEY")
        with pytest.raises(RuntimeError, match=r"HTTP 401.*VLLM_API_KEY"):
            ServerBackend(f"http://127.0.0.1:{server.port}", "seed")

    def test_a_prompt_that_only_the_server_finds_too_long_is_told_apart(self, server, backend):
        with ServerBackend(f"http://127.0.0.1:{server.port}", "seed", context_length=10 * CONTEXT) as hopeful:
            assert hopeful.generate([[500] * CONTEXT], max_new_tokens=4) == [[Generation("", "prompt_too_long", 0)]]
            assert np.isnan(hopeful.next_token_logprobs([[500] * CONTEXT], [501])).all()

    def test_a_server_that_is_killed_and_started_again_loses_nothing(self, server, backend):
        prompts = prompts_of(backend) * 4
        settings = {**GREEDY, "stop": None, "max_new_tokens": 48}
        expected = backend.generate(prompts, **settings)
        reports = []

        def kill_once(finished):
            reports.append(finished)
            if len(reports) == 3:
                server.kill()
                threading.Timer(1.0, server.start).start()

        assert backend.generate(prompts, on_progress=kill_once, **settings) == expected
        assert sum(reports) == len(prompts)

    def test_self_distillation_killed_at_twenty_instants_has_every_row_once(self, server, model, tmp_path):
        data, out = tmp_path / "rows.jsonl", tmp_path / "out"
        prompts = [f"{EXAMPLES}Reply: {reply} ({number})\nFeedback:" for number in range(12) for reply in REPLIES]
        write_jsonl(data, [{"prompt": prompt, "completion": " Old. [RESULT] 3"} for prompt in prompts])
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["trl_tract.distill.distill", "trl_tract.backends.server"])
        arguments = (f"http://127.0.0.1:{server.port}", model, str(data), str(out))
        instants, killed, seen = random.Random(0), 0, []
        while killed < 20:
            process = processes.Process(target=distil, args=arguments)
            process.start()
            process.join(instants.uniform(0.5, 4))
            if not process.is_alive():
                break  # it is done: what is left of the twenty kills has nothing to hit
            process.kill()
            process.join()
            killed += 1
            seen.append(sum(path.read_bytes().count(b"\n") for path in out.glob("blocks/*.jsonl")))
        distil(*arguments)
        rows = list(read_jsonl(out / "rows.jsonl"))
        assert [row["prompt"] for row in rows] == prompts
        assert killed >= 5
        assert seen == sorted(seen)
        print(f"{killed} kills, blocks on disk at each: {seen}; {rows[0]['rationale_source']}")


def distil(url: str, model: str, data: str, out: str) -> None:
    """Self-distillation through a server, in a process that is killed."""
    with ServerBackend(url, "seed", max_concurrency=8) as backend:
        settings = {"block_size": 2, "max_new_tokens": 24, "max_attempts": 2, "allow_leaks": True}
        CoTSelfDistill(backend, **settings).distill_file(data, out)
