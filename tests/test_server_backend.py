"""ServerBackend against a double that fails on command; `test_vllm_real.py` has the real server."""

import base64
import logging
import math
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_server import CONTEXT, FakeServer, changed, cut, says

from trl_tract import ServerBackend
from trl_tract.backends import Backend, Generation
from trl_tract.backends.http import JSONServer

STOP = "[RESULT]"
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server(tokenizer, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server = FakeServer(tokenizer)
    yield server
    server.stop()


@pytest.fixture
def connect(server, tokenizer):
    """Makes backends on the double that try again quickly, and closes them."""
    made = []

    def connect(url=None, **settings):
        settings = {"tokenizer": tokenizer, "retry_delay": 0.002, "retry_seconds": 20.0, **settings}
        made.append(ServerBackend(url or server.url, settings.pop("model", "judge"), **settings))
        server.requests.clear()
        return made[-1]

    yield connect
    for backend in made:
        backend.close()


@pytest.fixture
def backend(connect):
    return connect()


def text_of(first: int, index: int = 0) -> str:
    return f"good {first} {index}"


class TestGenerate:
    def test_it_is_a_backend(self, backend):
        assert isinstance(backend, Backend)
        assert (backend.name, backend.model_id) == ("server", "/nowhere/judge")

    def test_answers_keep_the_order_of_the_prompts(self, backend, server):
        def later(server, request):  # The first prompts are answered last.
            time.sleep(0.2 - 0.02 * request["prompt"][0])
            return changed(lambda answer: None)(server, request)

        server.always = later
        results = backend.generate([[first] for first in range(4, 10)], n=2)
        assert [[one.text for one in row] for row in results] == [
            [text_of(first), text_of(first, 1)] for first in range(4, 10)
        ]

    def test_the_text_is_cut_before_the_stop(self, backend, server, tokenizer):
        server.texts[5] = "it is fair. [RESULT] 4"
        ((generation,),) = backend.generate([[5]], stop=STOP)
        spelled = tokenizer("it is fair. [RESULT]")["input_ids"]
        assert generation == Generation("it is fair. ", "stop", len(spelled))

    def test_a_stop_that_the_ids_do_not_spell_is_cut_where_the_server_cut_it(self, backend, server):
        server.always = edit_choice(token_ids=[9, 10], text="cut here", finish_reason="stop", stop_reason=STOP)
        assert backend.generate([[5]], stop=STOP) == [[Generation("cut here", "stop", 2)]]

    def test_the_end_of_the_models_turn_is_told_from_the_stop(self, backend, server, tokenizer):
        server.texts[5] = "it is fair."
        ((generation,),) = backend.generate([[5]], stop=STOP)
        assert generation == Generation("it is fair.", "eos", len(tokenizer("it is fair.")["input_ids"]) + 1)

    def test_tokens_that_run_out_are_a_length(self, backend, server, tokenizer):
        ids = tokenizer("polite and long")["input_ids"]
        server.texts[5] = "polite and long"
        ((generation,),) = backend.generate([[5]], max_new_tokens=2)
        assert generation == Generation(tokenizer.decode(ids[:2]), "length", 2)

    def test_the_server_is_left_no_setting_to_fill_in_from_the_checkpoint(self, backend, server):
        backend.generate([[5]], n=2, stop=STOP, temperature=0.7, top_p=0.9, repetition_penalty=1.1, max_new_tokens=9)
        (request,) = server.requests
        del request["return_token_ids"]
        assert request == {
            "model": "judge",
            "prompt": [5],
            "n": 2,
            "stop": [STOP],
            "max_tokens": 9,
            "temperature": 0.7,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def test_seeds_are_sent_only_when_asked_for(self, connect, server):
        connect().generate([[5]], seed=3)
        assert "seed" not in server.requests[0]
        backend = connect(request_seeds=True)
        for seed in (3, 3, 4):
            backend.generate([[5], [6]], seed=seed)
        seeds = [{tuple(r["prompt"]): r["seed"] for r in server.requests[i : i + 2]} for i in (0, 2, 4)]
        assert seeds[0] == seeds[1] != seeds[2]
        assert seeds[0][5,] != seeds[0][6,]

    def test_a_continuation_may_fill_the_window_and_no_more(self, backend, server):
        backend.generate([[5] * (CONTEXT - 3)], max_new_tokens=1000)
        assert server.requests[0]["max_tokens"] == 3

    def test_a_prompt_that_leaves_no_room_is_not_sent(self, backend, server):
        reports = []
        results = backend.generate([[5] * (CONTEXT - 1), [6]], n=2, on_progress=reports.append)
        assert results[0] == [Generation("", "prompt_too_long", 0)] * 2
        assert [one.text for one in results[1]] == [text_of(6), text_of(6, 1)]
        assert [request["prompt"] for request in server.requests] == [[6]]
        assert sum(reports) == 2

    @pytest.mark.parametrize(
        "message",
        [
            "This model's maximum context length is 32 tokens. However, your prompt contains 40 input tokens.",
            "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
        ],
    )
    def test_a_prompt_that_the_server_finds_too_long_is_told_apart(self, backend, server, message):
        server.faults.append(says(400, {"error": {"message": message}}))
        assert backend.generate([[5]]) == [[Generation("", "prompt_too_long", 0)]]

    @pytest.mark.parametrize("wrong", [[], [3, -1], [3, 10_000]])
    def test_a_bad_prompt_is_named_and_nothing_is_sent(self, backend, server, wrong):
        with pytest.raises(ValueError, match=r"prompts\[1\]"):
            backend.generate([[3], wrong])
        assert not server.requests


class TestLogprobs:
    def test_each_token_gets_its_own(self, backend):
        logprobs = backend.next_token_logprobs([[5, 6], [7]], [9, 11, 9])
        assert logprobs.dtype == np.float64
        np.testing.assert_array_equal(logprobs, [[-1, -2, -1], [-1, -2, -1]])

    def test_more_tokens_than_one_request_takes_are_split(self, backend, server):
        logprobs = backend.next_token_logprobs([[5]], list(range(300)))
        assert sorted(len(request["logprob_token_ids"]) for request in server.requests) == [44, 128, 128]
        expected = [-1.0 - place % 128 for place in range(300)]
        np.testing.assert_array_equal(logprobs, [expected])

    def test_a_row_that_does_not_fit_is_nan(self, backend, server):
        too_long = {"error": {"message": "exceeds max_model_len of 64"}}
        logprobs = backend.next_token_logprobs([[5] * CONTEXT, [6] * (CONTEXT - 1)], [9])
        assert math.isnan(logprobs[0, 0])
        assert logprobs[1, 0] == -1
        server.always = says(400, too_long)
        assert np.isnan(backend.next_token_logprobs([[5]], [9, 11])).all()

    def test_what_json_cannot_hold_is_minus_infinity(self, backend, server):
        server.always = changed(
            lambda a: a["choices"][0]["logprobs"]["top_logprobs"][0].update({"token_id:9": -9999.0})
        )
        np.testing.assert_array_equal(backend.next_token_logprobs([[5]], [9, 11]), [[-math.inf, -2]])


def edit_choice(**fields):
    return changed(lambda answer: answer["choices"][0].update(fields))


def edit_shown(**fields):
    return changed(lambda answer: answer["choices"][0]["logprobs"]["top_logprobs"][0].update(fields))


AWAY = {
    "reset": cut,
    "500": says(500),
    "502 with HTML": says(502, b"<html>Bad gateway</html>"),
    "503": says(503),
    "429": says(429, Retry_After="0.01"),
    "408": says(408),
}
NONSENSE = {
    "nothing": says(200, b""),
    "HTML": says(200, b"<html>Welcome</html>"),
    "half of it": says(200, b'{"choices": [{"index": 0, "te'),
    "no choices": says(200, {"usage": {"prompt_tokens": 1}}),
    "a list": changed(lambda answer: [answer]),
    "deep": says(200, b"[" * 100_000),
    "no choice": changed(lambda answer: answer["choices"].clear()),
    "two choices": changed(lambda answer: answer["choices"].append({**answer["choices"][0], "index": 1})),
    "another prompt's": changed(lambda answer: answer["usage"].update(prompt_tokens=2)),
}
NO_TEXT = {
    "no token ids": edit_choice(token_ids=None),
    "token ids as text": edit_choice(token_ids=["5"]),
    "negative token ids": edit_choice(token_ids=[-5]),
    "no token": edit_choice(token_ids=[]),
    "too many tokens": edit_choice(token_ids=[5] * 2000),
    "aborted": edit_choice(finish_reason="abort"),
    "unfinished": edit_choice(finish_reason=None),
}
NO_SCORES = {
    "no log-probabilities": edit_choice(logprobs=None),
    "other tokens": changed(lambda a: a["choices"][0]["logprobs"].update(top_logprobs=[{"token_id:1": -1.0}])),
    "NaN": edit_shown(**{"token_id:9": math.nan}),
    "null": edit_shown(**{"token_id:9": None}),
    "a logit": edit_shown(**{"token_id:9": 3.5}),
    "two positions": changed(lambda a: a["choices"][0]["logprobs"]["top_logprobs"].append({})),
}


def named(faults):
    return pytest.mark.parametrize("fault", faults.values(), ids=faults.keys())


class TestFaults:
    @named(AWAY | NONSENSE | NO_TEXT)
    def test_a_text_is_asked_for_again(self, backend, server, fault):
        server.faults.extend([fault] * 2)
        assert backend.generate([[5]])[0][0].text == text_of(5)
        assert len(server.requests) == 3

    @named(AWAY | NONSENSE | NO_SCORES)
    def test_scores_are_asked_for_again(self, backend, server, fault):
        server.faults.extend([fault] * 2)
        np.testing.assert_array_equal(backend.next_token_logprobs([[5]], [9, 11]), [[-1, -2]])
        assert len(server.requests) == 3

    @named(NONSENSE | NO_SCORES)
    def test_a_server_that_never_makes_sense_is_an_error(self, backend, server, fault):
        server.always = fault
        with pytest.raises(RuntimeError, match=rf"POST {server.url}/completions: 4 times an unusable answer"):
            backend.next_token_logprobs([[5]], [9])
        assert len(server.requests) == 4

    @named(AWAY)
    def test_a_server_that_stays_away_is_an_error_when_time_is_up(self, connect, server, fault):
        backend = connect(retry_seconds=0.1)
        server.always = fault
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=rf"POST {server.url}/completions: no answer in \d+ attempts"):
            backend.generate([[5]])
        assert 0.1 <= time.monotonic() - started < 5

    def test_no_patience_means_one_attempt(self, connect, server):
        backend = connect(retry_seconds=0)
        server.always = says(500)
        with pytest.raises(ConnectionError, match="1 attempts, the last: HTTP 500: no luck"):
            backend.generate([[5]])
        assert len(server.requests) == 1

    def test_a_server_that_goes_down_and_comes_back_costs_nothing_but_time(self, connect, server):
        backend = connect(max_concurrency=4)
        server.delay = 0.02
        reports = []

        def progress(finished):
            reports.append(finished)
            if len(reports) == 5:
                server.stop()
                threading.Timer(0.2, server.start).start()

        results = backend.generate([[first] for first in range(4, 44)], on_progress=progress)
        assert [row[0].text for row in results] == [text_of(first) for first in range(4, 44)]
        assert sum(reports) == 40

    def test_a_storm_of_429_is_sat_out(self, connect, server):
        backend = connect(max_concurrency=8)
        allowed = time.monotonic() + 0.2

        def busy(server, request):
            if time.monotonic() < allowed:
                return says(429)(server, request)
            return changed(lambda answer: None)(server, request)

        server.always = busy
        results = backend.generate([[first] for first in range(4, 36)])
        assert [row[0].text for row in results] == [text_of(first) for first in range(4, 36)]

    def test_the_server_decides_when_to_come_back(self, backend, server):
        server.faults.append(says(503, Retry_After="0.3"))
        started = time.monotonic()
        backend.generate([[5]])
        assert 0.3 <= time.monotonic() - started < 5

    @pytest.mark.parametrize("nonsense", ["Wed, 21 Oct 2126 07:28:00 GMT", "soon", "-5", "nan"])
    def test_another_date_to_come_back_is_passed_over(self, connect, server, nonsense):
        backend = connect(retry_seconds=60.0)
        server.faults.append(says(503, Retry_After=nonsense))
        started = time.monotonic()
        assert backend.generate([[5]])[0][0].text == text_of(5)
        assert time.monotonic() - started < 5

    def test_an_answer_that_never_comes_is_asked_for_again(self, connect, server):
        backend = connect(timeout=0.3)
        never = threading.Event()
        server.faults.append(lambda *_: never.wait(20) and None)
        assert backend.generate([[5]])[0][0].text == text_of(5)
        never.set()

    @pytest.mark.parametrize(
        ("status", "says_more"), [(400, "no luck"), (404, "no luck"), (401, "VLLM_API_KEY"), (307, "")]
    )
    def test_a_refusal_is_an_error_at_once(self, backend, server, status, says_more):
        server.always = says(status, Location="http://127.0.0.1:1/")
        with pytest.raises(RuntimeError, match=rf"POST {server.url}/completions: HTTP {status}.*{says_more}"):
            backend.generate([[5]])
        assert len(server.requests) == 1

    def test_an_item_that_always_fails_does_not_hide_which_server_and_why(self, connect, server):
        backend = connect(retry_seconds=0.2)
        server.always = lambda server, request: (
            says(500, {"detail": "item is cursed"}) if request["prompt"] == [9] else changed(lambda answer: None)
        )(server, request)
        with pytest.raises(ConnectionError, match=r"HTTP 500: .*item is cursed"):
            backend.generate([[8], [9]])

    def test_an_outage_is_told_once_whoever_meets_it(self, connect, server, caplog):
        backend = connect(max_concurrency=16)
        server.faults.extend([says(503)] * 16)
        backend.generate([[first] for first in range(4, 36)])
        (warning,) = caplog.records
        assert warning.message == f"POST {server.url}/completions: HTTP 503: no luck; trying again for up to 20 s"

    def test_control_characters_of_a_server_do_not_reach_the_terminal(self, backend, server):
        server.always = says(400, {"error": {"message": "bad\x1b[2J\x00thing\nnext line"}})
        with pytest.raises(RuntimeError, match="bad \\[2J thing next line"):
            backend.generate([[5]])


class TestManyCallers:
    def test_no_more_requests_at_once_than_allowed_and_no_fewer(self, connect, server):
        backend = connect(max_concurrency=3)
        server.delay = 0.05
        server.most_running = 0
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda first: backend.generate([[first]] * 6), (5, 6)))
        assert server.most_running == 3

    def test_calls_of_several_threads_are_under_way_together(self, backend, server):
        together = threading.Barrier(3, timeout=10)

        def wait(server, request):
            together.wait()  # Broken, and so a lost connection, unless all three calls get here.
            return changed(lambda answer: None)(server, request)

        server.always = wait
        assert backend.max_calls >= 3
        with ThreadPoolExecutor(3) as threads:
            results = list(threads.map(lambda first: backend.generate([[first]]), (5, 6, 7)))
        assert [row[0].text for (row,) in results] == [text_of(5), text_of(6), text_of(7)]

    def test_a_failure_in_one_call_leaves_the_others_alone(self, backend, server):
        server.delay = 0.1
        server.always = lambda server, request: (
            says(400) if request["prompt"] == [9] else changed(lambda answer: None)
        )(server, request)
        with ThreadPoolExecutor(2) as threads:
            bad, good = threads.submit(backend.generate, [[9]]), threads.submit(backend.generate, [[8]])
            assert good.result()[0][0].text == text_of(8)
            with pytest.raises(RuntimeError, match="HTTP 400"):
                bad.result()

    def test_ctrl_c_ends_a_call_at_once_and_cancels_its_requests(self, connect, server):
        backend = connect(max_concurrency=2)
        server.delay = 3.0
        started = time.monotonic()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            backend.generate([[5]] * 10)
        assert time.monotonic() - started < 2
        server.delay = 0.0
        assert backend.generate([[6]])[0][0].text == text_of(6)
        assert time.monotonic() - started < 2  # It did not wait for the two under way,
        assert len(server.requests) == 3  # and the other eight were never sent.

    @pytest.mark.parametrize("end", ["cancel", "close"])
    def test_calls_of_other_threads_can_be_ended(self, backend, server, end):
        server.delay = 3.0
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(backend.generate, [[5]])
            while not server.requests:
                time.sleep(0.01)
            started = time.monotonic()
            getattr(backend, end)()
            with pytest.raises(RuntimeError, match="cancelled"):
                call.result()
            assert time.monotonic() - started < 2

    def test_a_closed_backend_says_so(self, backend):
        with backend:
            pass
        backend.close()
        with pytest.raises(RuntimeError, match="closed"):
            backend.generate([[5]])


class TestStart:
    def test_a_model_that_is_not_served_is_refused_with_those_that_are(self, connect):
        with pytest.raises(ValueError, match="does not serve 'jugde', but 'judge'"):
            connect(model="jugde")

    def test_a_refused_start_leaves_no_thread_behind(self, connect):
        with pytest.raises(ValueError, match="does not serve") as failure:
            connect(model="jugde")
        assert failure.traceback  # Keeps the half-made backend alive: it must have closed itself.
        assert not [thread for thread in threading.enumerate() if thread.name == "trl-tract requests"]

    def test_an_address_where_nothing_listens_is_an_error_that_names_it(self, connect):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"GET http://127.0.0.1:{port}/v1/models: no answer"):
            connect(f"http://127.0.0.1:{port}", retry_seconds=0.1)

    @pytest.mark.parametrize(
        "fault",
        [
            says(400, {"error": {"message": "Unrecognized request argument: logprob_token_ids"}}),
            changed(lambda a: a["choices"][0]["logprobs"].update(top_logprobs=[{" the": -1.0, " a": -2.0}])),
            edit_choice(logprobs=None),
            edit_choice(token_ids=None),
            edit_choice(prompt_token_ids=None),
        ],
        ids=["refuses it", "top two", "no log-probabilities", "no token ids", "no prompt ids"],
    )
    def test_a_server_without_exact_logprobs_is_refused_with_what_to_upgrade(self, connect, server, fault):
        server.always = fault
        with pytest.raises(ValueError, match=r"logprob_token_ids"):
            connect()

    @pytest.mark.parametrize("best", [12.25, -30.0])
    def test_logits_are_not_taken_for_logprobs(self, connect, server, best):
        # 384 tokens: the likeliest has at least 1 / 384, whose logarithm is -5.95.
        server.always = changed(lambda a: a["choices"][0]["logprobs"].update(token_logprobs=[best]))
        with pytest.raises(ValueError, match="--logprobs-mode raw_logprobs"):
            connect()

    def test_another_tokenizer_than_the_servers_is_refused(self, connect, server):
        def other_tokens(answer):
            answer["choices"][0]["prompt_token_ids"] = [1, 2, 3]
            answer["usage"]["prompt_tokens"] = 3

        server.always = changed(other_tokens)
        with pytest.raises(ValueError, match=r"Pass tokenizer="):
            connect()

    def test_an_adapter_has_the_context_of_its_base(self, connect, server):
        server.cards += [{"id": "adapter", "root": "/nowhere/adapter", "parent": "judge", "max_model_len": None}]
        assert connect(model="adapter").context_length == CONTEXT

    def test_a_context_that_nobody_knows_has_to_be_given(self, connect, server):
        server.cards[0]["max_model_len"] = None
        with pytest.raises(ValueError, match="Pass context_length="):
            connect()
        assert connect(context_length=32).context_length == 32

    def test_a_tokenizer_that_cannot_be_found_has_to_be_given(self, connect):
        with pytest.raises(ValueError, match="Pass the tokenizer of"):
            connect(tokenizer=None)

    def test_the_tokenizer_comes_from_where_the_server_found_the_model(self, connect, server, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        server.cards[0]["root"] = str(tmp_path)
        assert connect(tokenizer=None).tokenizer.get_vocab() == tokenizer.get_vocab()

    @pytest.mark.parametrize(
        ("setting", "value"), [("max_concurrency", 0), ("timeout", 0), ("retry_seconds", -1), ("retry_delay", 0)]
    )
    def test_settings_out_of_range_are_refused(self, connect, setting, value):
        with pytest.raises(ValueError, match=f"{setting}={value}"):
            connect(**{setting: value})

    def test_v1_is_added_to_an_address_without_it(self, connect, server):
        assert connect(f"http://127.0.0.1:{server.port}/").generate([[5]])[0][0].text == text_of(5)


class TestSecrets:
    def test_a_key_is_sent_and_stays_out_of_logs_errors_and_names(self, connect, server, monkeypatch, caplog):
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        caplog.set_level(logging.DEBUG)
        backend = connect(retry_seconds=0.2)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        server.faults.extend([says(503, {"error": {"message": f"no room for {KEY}"}}), cut])
        backend.generate([[5]])
        messages = []
        for fault in (
            says(401, {"error": {"message": f"Incorrect API key: {KEY}"}}),
            says(500, KEY.encode()),
            says(200, KEY.encode() * 9),
        ):
            server.always = fault
            with pytest.raises((RuntimeError, ConnectionError)) as failure:
                backend.generate([[5]])
            messages.append(f"{failure.value!r} {failure.getrepr(style='short')}")
        assert "***" in messages[0]
        assert "no room for ***" in caplog.text
        shown = " ".join([caplog.text, repr(backend), backend.model_id, repr(vars(backend)), *messages])
        assert "very-secret" not in shown

    def test_credentials_in_the_address_are_sent_and_stay_out_of_logs_errors_and_names(self, connect, server, caplog):
        caplog.set_level(logging.DEBUG)
        backend = connect(f"http://me:{KEY}@127.0.0.1:{server.port}/v1", retry_seconds=0.1)
        basic = base64.b64encode(f"me:{KEY}".encode()).decode()
        assert {headers["Authorization"] for headers in server.headers} == {f"Basic {basic}"}
        server.always = says(500, f"{KEY} {basic}".encode())
        with pytest.raises(ConnectionError) as failure:
            backend.generate([[5]])
        shown = " ".join([caplog.text, str(failure.value), backend.model_id, repr(vars(backend))])
        assert server.url in shown
        assert "very-secret" not in shown
        assert basic not in shown

    @pytest.mark.parametrize(
        "address", [f"https://host/v1?key={KEY}", f"{KEY}", f"ftp://{KEY}@host", f"http://h:{KEY}/"]
    )
    def test_an_address_that_is_refused_is_not_quoted(self, address):
        with pytest.raises(ValueError, match="base_url must look like") as failure:
            ServerBackend(address, "judge")
        assert "very-secret" not in str(failure.value)

    def test_two_secrets_for_one_server_are_refused(self, monkeypatch):
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        with pytest.raises(ValueError, match="Use only one of the two"):
            ServerBackend("http://me:too@host/v1", "judge")

    def test_another_variable_can_hold_the_key(self, connect, server, monkeypatch):
        monkeypatch.setenv("MY_KEY", "other")
        connect(api_key_env="MY_KEY")
        assert server.headers[-1]["Authorization"] == "Bearer other"

    def test_a_secret_cut_in_two_by_a_limit_on_length_is_still_hidden(self, monkeypatch):
        monkeypatch.setenv("K", KEY)
        shown = JSONServer("http://host", key_variable="K", timeout=1, retry_seconds=1, retry_delay=1).public(
            "x" * 490 + KEY
        )
        assert "sk-very" not in shown
