"""A judge behind HTTP: the answers of `judge()`, whatever else is asked; what cannot be answered is said in words."""

import json
import socket
import threading
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from conftest import make_model, make_tokenizer
from serving import Served, served, wait_until

from trl_tract import CoTRAILJudge, TransformersBackend
from trl_tract.backends import ScriptedBackend
from trl_tract.cli import main
from trl_tract.integrations.batcher import Batcher, Closed, QueueFull
from trl_tract.integrations.serving import is_loopback, open_socket
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import read_scales
from trl_tract.sources.rubric import Rubric

TOKENIZER = make_tokenizer()
PROBS = [0.1, 0.0, 0.2, 0.6, 0.05]  # expected score 3.35, mass 0.95
TALK = "say: <b>nice</b>"


class Gated(ScriptedBackend):
    """Waits in each `generate` call until it is let go."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.gate = threading.Event()

    def generate(self, prompts, **settings):
        assert self.gate.wait(30)
        return super().generate(prompts, **settings)


def scripted(kind=ScriptedBackend, script=lambda prompt, seed: f" {TALK} [RESULT] 1", **settings) -> CoTRAILJudge:
    judge = CoTRAILJudge(kind(script, TOKENIZER, probs=PROBS), **settings)
    judge.chat = False
    return judge


@pytest.fixture(scope="module")
def server():
    judge = scripted()
    judge.rubric = Rubric("Polite?", dict.fromkeys("12345", "so"), "{instruction}|{response}|{reference}")
    with served(judge, max_bytes=10_000, max_items=8) as started:
        yield started


def test_one_item_is_answered_with_its_judgement(server):
    status, told, _ = server.ask({"prompt": "a"})
    assert status == 200
    assert told == {
        "score": pytest.approx(3.35),
        "scores": [pytest.approx(3.35)],
        "rationale": f" {TALK}",
        "rationales": [f" {TALK}"],
        "distribution": {str(score): pytest.approx(probability) for score, probability in enumerate(PROBS, 1)},
        "spread": pytest.approx(0.9931, abs=1e-4),  # on the grid: sqrt(12.75 / 0.95 - (3.35 / 0.95)^2)
        "grid_mass": pytest.approx(0.95),
        "error": None,
        "aspects": None,
    }


@pytest.fixture(scope="module")
def echo():
    """A server whose judge repeats the prompt."""
    with served(scripted(script=lambda prompt, seed: f" {prompt} [RESULT] 1")) as started:
        yield started


def test_a_list_is_answered_in_its_order(echo):
    _, told, _ = echo.ask([{"prompt": text} for text in "abc"])
    assert [each["rationale"].strip() for each in told] == ["a", "b", "c"]


def test_fields_become_the_prompt_of_the_judges_rubric():
    judge = scripted(script=lambda prompt, seed: f" {prompt} [RESULT] 1")
    judge.rubric = Rubric("Polite?", dict.fromkeys("12345", "so"), "{instruction}|{response}|{reference}")
    with served(judge) as own:
        _, told, _ = own.ask({"response": "r", "instruction": "i", "reference": "best"})
    assert told["rationale"].strip() == "i|r|best"


def test_an_item_that_cannot_be_judged_is_an_error_of_its_own():
    backend = ScriptedBackend(lambda prompt, seed: " well [RESULT] 1", TOKENIZER, probs=PROBS, context_length=40)
    with served(CoTRAILJudge(backend)) as server:
        status, told, _ = server.ask([{"prompt": "a"}, {"prompt": "long " * 50}, {"prompt": [{"role": "user"}]}])
    assert status == 200
    assert told[0]["error"] is None
    assert [each["score"] for each in told[1:]] == [None, None]
    assert "context window" in told[1]["error"]
    assert "content" in told[2]["error"]


def test_every_client_gets_the_judgement_of_its_own_item_and_seed():
    judge = CoTRAILJudge(TransformersBackend(make_model(), TOKENIZER), append_marker=True, max_new_tokens=6)
    items = [(f"is {word} polite? ->", seed) for word in "abcdefgh" for seed in (1, 2)]
    wanted = [judge.judge([prompt], seed=seed)[0] for prompt, seed in items]
    with served(judge) as server, ThreadPoolExecutor(8) as clients:
        told = list(clients.map(lambda item: server.ask({"prompt": item[0], "seed": item[1]})[1], items))
    assert [each["rationale"] for each in told] == [each.rationales[0] for each in wanted]
    assert [each["score"] for each in told] == pytest.approx([each.score for each in wanted], abs=1e-5)


def test_what_arrives_while_the_judge_is_at_work_is_judged_together():
    judge = scripted(Gated)
    with served(judge, max_batch=4) as server, ThreadPoolExecutor(10) as clients:
        first = clients.submit(server.ask, {"prompt": "a"})
        wait_until(lambda: "trl_tract_batch_items_count 1.0" in server.metrics())
        rest = [clients.submit(server.ask, {"prompt": text}) for text in "bcdefg"]
        wait_until(lambda: "trl_tract_waiting_items 6.0" in server.metrics())
        judge.backend.gate.set()
        assert [each.result()[0] for each in (first, *rest)] == [200] * 7
    assert [len(call["prompts"]) for call in judge.backend.generate_calls] == [1, 4, 2]


def test_an_item_on_which_the_judge_fails_spoils_no_other():
    def script(prompt, seed):
        if prompt == "b":
            raise RuntimeError("the secret path")
        return " fine [RESULT] 1"

    with served(scripted(script=script)) as server:
        status, told, _ = server.ask([{"prompt": text} for text in "abc"])
        alone, refused, _ = server.ask({"prompt": "b"})
    assert (status, alone) == (200, 500)
    assert [each["score"] is None for each in told] == [False, True, False]
    assert "RuntimeError" in told[1]["error"]
    assert "secret" not in json.dumps([told, refused])


# Limits


def test_more_than_may_wait_is_refused_with_when_to_come_back():
    judge = scripted(Gated)
    with served(judge, max_queue=2, max_batch=1) as server, ThreadPoolExecutor(3) as clients:
        first = clients.submit(server.ask, {"prompt": "a"})
        wait_until(lambda: "trl_tract_batch_items_count 1.0" in server.metrics())
        waiting = clients.submit(server.ask, [{"prompt": "b"}, {"prompt": "c"}])
        wait_until(lambda: "trl_tract_waiting_items 2.0" in server.metrics())
        status, _, headers = server.ask({"prompt": "d"})
        judge.backend.gate.set()
        assert first.result()[0] == waiting.result()[0] == 200
    assert (status, headers["Retry-After"]) == (429, "1")


def test_what_takes_too_long_leaves_the_queue():
    judge = scripted(Gated)
    with served(judge, answer_seconds=0.1, max_batch=1) as server:
        assert server.ask([{"prompt": "a"}, {"prompt": "b"}])[0] == 504
        judge.backend.gate.set()
    assert len(judge.backend.generate_calls) == 1  # b had not begun


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"\xff\xfe{", 400),
        (b'{"prompt": "a', 422),
        (b"[" * 5000, 400),
        (b"null", 422),
        (b"3", 422),
        ({}, 422),
        ({"prompt": None}, 422),
        ({"prompt": 3}, 422),
        ({"prompt": ["a"]}, 422),
        ({"prompt": "a", "response": "b"}, 422),
        ({"prompt": "a", "reference": "b"}, 422),
        ({"prompt": "a", "seed": -1}, 422),
        ({"prompt": "a", "seed": 2**32}, 422),
        ({"prompt": "a", "seed": 1.5}, 422),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "a", "seed": NaN}', 422),
        ({"prompt": "a", "temperature": 0}, 422),
        ([{"prompt": "a"}, {"prompt": 1}], 422),
        ([{"prompt": "a"}] * 9, 413),
        ({"prompt": "a" * 10_001}, 413),
    ],
)
def test_a_body_that_is_no_request_is_refused_in_words(server, body, status):
    answered, told, _ = server.ask(body)
    assert answered == status
    assert len(told["error"]["message"].split()) > 3


def test_a_field_that_an_item_has_not_is_answered_with_those_it_has(server):
    message = server.ask({"question": "Why?", "student_answer": "Because."})[1]["error"]["message"]
    assert "prompt, response, instruction, reference, seed" in message


def test_a_refusal_does_not_repeat_what_was_sent(server):
    status, told, _ = server.ask({"prompt": {"x": "secret"}, "y" * 3000: 1})
    assert status == 422
    assert "secret" not in json.dumps(told)
    assert len(json.dumps(told)) < 1000


def test_a_prompt_without_messages_is_an_error_of_its_item(server):
    status, told, _ = server.ask({"prompt": []})
    assert status == 200
    assert told["score"] is None
    assert "messages" in told["error"]


@pytest.mark.parametrize("text", ["\ud800", "a\x00b", "<|im_end|>", "\u0301" * 500, "\u202e"])
def test_odd_texts_are_judged_or_an_error_and_come_back_as_json(echo, text):
    status, told, _ = echo.ask({"prompt": text})
    assert status == 200
    assert (told["score"] is None) == (told["error"] is not None)


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_a_client_that_sends_more_than_is_taken_reads_why(server, size):
    # Cut off while it still sends, it would see a connection that was reset.
    status, told, _ = server.ask({"prompt": "a" * size})
    assert status == 413
    assert "10,000 bytes" in told["error"]["message"]


def test_a_body_larger_than_said_is_cut_off(server):
    raw = b"a" * 200_000
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = b"POST /judge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(raw), raw))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Content_Type": "text/plain"}, 415), ({"Content_Encoding": "gzip"}, 415), ({"Host": "evil.example"}, 421)],
)
def test_a_page_of_somebody_elses_cannot_send_requests(server, headers, status):
    assert server.ask({"prompt": "a"}, **headers)[0] == status


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8123"])
def test_names_of_this_machine_are_taken(server, host):
    assert server.ask({"prompt": "a"}, Host=host)[0] == 200


def test_a_path_that_is_not_there_is_told_which_ones_are(server):
    status, told, _ = server.ask(b"", "/scores", "GET")
    assert status == 404
    assert "/judge" in told["error"]["message"]
    assert server.ask(b"", "/judge", "GET")[0] == 405


@pytest.fixture(scope="module")
def locked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_TRACT_API_KEY", "right\n")  # as files of keys end
        started = Served(scripted())
    yield started
    started.stop()


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \xff"}])
def test_without_the_key_of_the_environment_nothing_is_judged(locked, header):
    for path, method in (("/judge", "POST"), ("/v1/models", "GET"), ("/metrics", "GET"), ("/openapi.json", "GET")):
        assert locked.ask({"prompt": "a"}, path, method, **header)[0] == 401
    assert locked.ask({"prompt": "a"}, Authorization="Bearer right")[0] == 200
    assert locked.ask(b"", "/health", "GET", **header)[0] == 200


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback_is_known_by_its_address(host, loopback):
    assert is_loopback(host) is loopback


def test_a_port_that_is_taken_is_named():
    with open_socket("127.0.0.1", 0) as taken, pytest.raises(OSError, match=str(taken.getsockname()[1])):
        open_socket("127.0.0.1", taken.getsockname()[1])


# The end


def test_a_server_that_is_told_to_stop_answers_what_it_took_and_refuses_the_rest():
    judge = scripted(Gated)
    with served(judge, max_batch=1) as server, ThreadPoolExecutor(4) as clients:
        taken = [clients.submit(server.ask, {"prompt": text}) for text in "abcd"]
        wait_until(lambda: "trl_tract_batch_items_count 1.0" in server.metrics())
        wait_until(lambda: "trl_tract_waiting_items 3.0" in server.metrics())
        server.told_to_stop()
        late = server.ask({"prompt": "late"})
        health = server.ask(b"", "/health", "GET")
        judge.backend.gate.set()
        assert [each.result()[0] for each in taken] == [200] * 4
        server.thread.join(30)
        assert not server.thread.is_alive()
    assert (late[0], health[0]) == (503, 503)
    assert late[2]["Connection"] == "close"


# OpenAI's form

CHAT = "/v1/chat/completions"


def message(**fields):
    return {"model": "judge", "messages": [{"role": "user", "content": "a"}], **fields}


def test_a_chat_completion_is_rationale_marker_and_nearest_score(server):
    status, told, _ = server.ask(message(temperature=0, top_p=0.5), CHAT)
    assert status == 200
    assert told["choices"][0]["message"]["content"] == f"{TALK} [RESULT] 3"
    assert told["judgement"]["score"] == pytest.approx(3.35)
    assert told["ignored"] == ["temperature", "top_p"]


def test_a_client_that_wants_json_gets_the_answer_of_judge(server):
    _, told, _ = server.ask(message(response_format={"type": "json_object"}), CHAT)
    assert json.loads(told["choices"][0]["message"]["content"])["score"] == pytest.approx(3.35)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"stream": True}, 422),
        ({"n": 2}, 422),
        ({"tools": [{}]}, 422),
        ({"messages": []}, 422),
        ({"messages": [{"role": "system", "content": "a"}]}, 422),
        ({"response_format": {"type": "json_schema"}}, 422),
        ({"model": "gpt"}, 404),
    ],
)
def test_what_a_judge_cannot_do_is_refused(server, fields, status):
    answered, told, _ = server.ask(message(**fields), CHAT)
    assert answered == status
    assert len(told["error"]["message"].split()) > 3


def test_a_chat_completion_without_a_score_is_an_error():
    with served(scripted(script=lambda prompt, seed: " never", max_attempts=1)) as server:
        status, told, _ = server.ask(message(), CHAT)
    assert status == 422
    assert "no rationale reached" in told["error"]["message"]


def test_the_openai_client_speaks_to_it(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        (model,) = client.models.list().data
        told = client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": "a"}], seed=1)
        assert told.choices[0].message.content == f"{TALK} [RESULT] 3"
        assert told.judgement["score"] == pytest.approx(3.35)
        with pytest.raises(openai.NotFoundError, match="judge"):
            client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])


# Counting


def test_answers_items_and_grid_mass_are_counted():
    with served(scripted()) as server:
        server.ask([{"prompt": "a"}, {"prompt": "b"}, {"prompt": [{"role": "user"}]}])
        for number in range(3):
            server.ask(b"", f"/{number}", "GET")
        told = server.metrics()
    counted = dict(line.rsplit(" ", 1) for line in told.splitlines() if not line.startswith("#"))
    assert float(counted['trl_tract_items_total{outcome="score"}']) == 2
    assert float(counted['trl_tract_items_total{outcome="error"}']) == 1
    assert float(counted["trl_tract_grid_mass_sum"]) == pytest.approx(1.9)
    assert float(counted['trl_tract_answers_total{path="/judge",status="200"}']) == 1
    # Anything can be asked for: the paths that are not there are one.
    assert float(counted['trl_tract_answers_total{path="other",status="404"}']) == 3


def test_the_schema_describes_what_is_sent_and_answered(server):
    _, told, _ = server.ask(b"", "/openapi.json", "GET")
    assert {"/judge", "/v1/chat/completions", "/health", "/metrics"} <= told["paths"].keys()
    assert "grid_mass" in told["components"]["schemas"]["Answer"]["properties"]


def test_the_page_may_run_its_own_script_alone(server):
    status, page, headers = server.ask(b"", "/", "GET")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert 'data-rubric="1"' in page


# The queue


def test_an_item_whose_caller_went_away_is_not_judged():
    judge = scripted(Gated)
    batcher = Batcher(judge, max_batch=1)
    kept, dropped = batcher.submit(["a", "b"], [None, None])
    assert dropped.cancel()
    judge.backend.gate.set()
    batcher.close()
    assert kept.result().score == pytest.approx(3.35)
    with pytest.raises(CancelledError):
        dropped.result()
    assert len(judge.backend.generate_calls) == 1


def test_a_queue_takes_all_items_of_a_call_or_none():
    judge = scripted(Gated)
    batcher = Batcher(judge, max_queue=3, max_batch=1)
    running = batcher.submit(["a"], [None])
    wait_until(lambda: batcher.waiting == 0)
    batcher.submit(["b", "c"], [None] * 2)
    with pytest.raises(QueueFull):
        batcher.submit(["d", "e"], [None] * 2)
    batcher.submit(["f"], [None])
    judge.backend.gate.set()
    batcher.close()
    assert running[0].done()
    assert len(judge.backend.generate_calls) == 4


def test_a_closed_queue_takes_nothing():
    batcher = Batcher(scripted())
    batcher.close()
    with pytest.raises(Closed):
        batcher.submit(["a"], [None])
    assert not batcher.alive


def test_none_of_many_items_is_lost_or_judged_twice():
    judge = scripted(script=lambda prompt, seed: f" {prompt} [RESULT] 1")
    batcher = Batcher(judge, max_batch=7, max_queue=10_000)
    with ThreadPoolExecutor(8) as callers:
        told = list(callers.map(lambda number: batcher.submit([str(number)], [None])[0].result(), range(300)))
    batcher.close()
    assert [each.rationales[0].strip() for each in told] == [str(number) for number in range(300)]
    asked = Counter(TOKENIZER.decode(ids) for call in judge.backend.generate_calls for ids in call["prompts"])
    assert set(asked.values()) == {1}


def test_an_idle_judge_waits_while_callers_come_one_after_the_other(monkeypatch):
    judge = scripted()
    judge.backend.max_calls = 0  # nobody is at work: the test takes the batch
    batcher = Batcher(judge, max_batch=8)
    later = list("bcd")
    comes = lambda timeout=None: batcher.submit([later.pop()], [None]) if later else []  # noqa: E731
    monkeypatch.setattr(batcher._changed, "wait", comes)
    batcher.submit(["a"], [None])
    assert len(batcher._next_batch()) == 4


def test_options_without_an_effect_are_refused_before_weights_are_loaded(tmp_path, capsys):
    JudgeConfig(read_scales({}), writes_rationale=False).save(tmp_path)  # and there are no weights
    assert main(["serve", "--model", str(tmp_path), "--port", "0", "--num_generations", "4"]) == 1
    assert "num_generations=4, but this judge writes no rationales" in capsys.readouterr().err
