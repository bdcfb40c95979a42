"""A server that lies: each lie is noticed, or changes nothing. `test_server_backend.py` has one that fails."""

import copy
import gzip
import json
import math
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import make_tokenizer
from datasets import Dataset
from fake_server import FakeServer, changed, says

from trl_tract import CoTRAILJudge, CoTSelfDistill, ServerBackend
from trl_tract.backends import server as server_module
from trl_tract.files.journal import write_jsonl
from trl_tract.runs.steps import JudgeStep
from trl_tract.scale.trie import GridProbabilities
from trl_tract.text.probes import same_answers

ASKED = [9, 11]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def server(tokenizer, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server = FakeServer(tokenizer)
    yield server
    server.stop()


@pytest.fixture
def backend(server, tokenizer):
    backend = ServerBackend(server.url, "judge", tokenizer=tokenizer, retry_delay=0.001, retry_seconds=0.3, timeout=0.5)
    server.requests.clear()
    yield backend
    backend.close()


def truth(server, request):
    return changed(lambda answer: None)(server, request)


def choice(**fields):
    return changed(lambda answer: answer["choices"][0].update(fields))


def answer(**fields):
    return changed(lambda answer: answer.update(fields))


def shown(**fields):
    return changed(lambda answer: answer["choices"][0]["logprobs"]["top_logprobs"][0].update(fields))


def bomb(pack=bytes, **headers):
    """The truth, with white space behind it that no one has room for."""

    def fault(server, request):
        raw = json.dumps(server.answer(request)).encode() + b" " * 30_000_000
        return 200, headers, pack(raw)

    return fault


def of_another_request(server, request):
    return changed(lambda answer: None)(server, {**request, "prompt": [6]})


OF_ANY = {
    "another model": answer(model="other"),
    "another model's name in other letters": answer(model="Judge"),
    "another prompt of equal length": choice(prompt_token_ids=[6]),
    "the answer to another request": of_another_request,
    "a longer prompt": choice(prompt_token_ids=[5, 5]),
    "no prompt": choice(prompt_token_ids=None),
    "a prompt as text": choice(prompt_token_ids="5"),
    "another count of prompt tokens": answer(usage={"prompt_tokens": 2}),
    "a count that is none": answer(usage={"prompt_tokens": "one"}),
    "no usage": answer(usage=None),
    "a choice that is numbered otherwise": choice(index=1),
    "a choice too many": changed(lambda a: a["choices"].append({**a["choices"][0], "index": 1})),
    "no choice": answer(choices=[]),
    "a bomb": bomb(),
    "a bomb of gzip": bomb(gzip.compress, **{"Content-Encoding": "gzip"}),
    "a bomb of deflate": bomb(zlib.compress, **{"Content-Encoding": "deflate"}),
    "an unknown packing": says(200, b"\x28\xb5\x2f\xfd", Content_Encoding="zstd"),
    "a number of many digits": says(200, b'{"usage": {"prompt_tokens": ' + b"1" * 10_000 + b"}}"),
    "a redirect": says(302, b"", Location="http://127.0.0.1:1/v1/completions"),
    "a page": says(200, b"<html>Sign in</html>"),
}
OF_TEXTS = {
    "an id outside the vocabulary": choice(token_ids=[9, 384]),
    "a large id": choice(token_ids=[2**40]),
    "a negative id": choice(token_ids=[-1]),
    "a truth value as an id": choice(token_ids=[True]),
    "a fraction as an id": choice(token_ids=[9.5]),
    "more tokens than were asked for": choice(token_ids=[9] * 100),
    "no tokens": choice(token_ids=[]),
    "an end for a token that is not there": choice(finish_reason="stop", stop_reason=12, token_ids=[9, 10]),
    "an end of an unknown kind": choice(finish_reason="tool_calls"),
    "no text": choice(text=None),
    "half a character": choice(text="\ud83d"),
}
OF_SCORES = {
    "other ids": changed(
        lambda a: a["choices"][0]["logprobs"].update(top_logprobs=[{"token_id:8": -1, "token_id:11": -2}])
    ),
    "an id missing": changed(lambda a: a["choices"][0]["logprobs"]["top_logprobs"][0].pop("token_id:9")),
    "ids as text": changed(lambda a: a["choices"][0]["logprobs"].update(top_logprobs=[{"9": -1, "11": -2}])),
    "a logit": shown(**{"token_id:9": 4.0}),
    "a probability": shown(**{"token_id:9": 0.4}),
    "not a number": shown(**{"token_id:9": math.nan}),
    "infinity": shown(**{"token_id:9": math.inf}),
    "words": shown(**{"token_id:9": "likely"}),
    "two positions": changed(lambda a: a["choices"][0]["logprobs"]["top_logprobs"].append({"token_id:9": -1})),
    "an empty list, as of a server that speculates": changed(
        lambda a: a["choices"][0]["logprobs"].update(top_logprobs=[])
    ),
}


def named(lies):
    return pytest.mark.parametrize("lie", lies.values(), ids=lies.keys())


@named(OF_ANY | OF_TEXTS)
def test_a_text_that_is_a_lie_is_an_error(backend, server, lie):
    server.always = lie
    with pytest.raises((RuntimeError, ConnectionError)):
        backend.generate([[5]], max_new_tokens=12)


@named(OF_ANY | OF_SCORES)
def test_a_score_that_is_a_lie_is_an_error(backend, server, lie):
    server.always = lie
    with pytest.raises((RuntimeError, ConnectionError)):
        backend.next_token_logprobs([[5]], ASKED)


@named(OF_ANY | OF_SCORES)
def test_the_truth_after_a_lie_counts(backend, server, lie):
    if lie is OF_ANY["a redirect"]:
        pytest.skip("a redirect is refused at once")
    server.faults.append(lie)
    np.testing.assert_array_equal(backend.next_token_logprobs([[5]], ASKED), [[-1, -2]])


def late(server, request):
    time.sleep(0.5)
    return truth(server, request)


def test_truths_that_always_come_too_late_are_an_error(server, tokenizer):
    impatient = {"retry_delay": 0.001, "retry_seconds": 0.05, "timeout": 0.2}
    with ServerBackend(server.url, "judge", tokenizer=tokenizer, **impatient) as backend:
        server.always = late
        with pytest.raises(ConnectionError):
            backend.generate([[5]], max_new_tokens=12)
        with pytest.raises(ConnectionError):
            backend.next_token_logprobs([[5]], ASKED)


def test_the_truth_that_comes_too_late_is_asked_for_again(server, tokenizer):
    with ServerBackend(server.url, "judge", tokenizer=tokenizer, retry_delay=0.001, timeout=0.3) as backend:
        server.requests.clear()
        server.faults.append(late)
        np.testing.assert_array_equal(backend.next_token_logprobs([[5]], ASKED), [[-1, -2]])
        assert len(server.requests) > 1


def test_log_probabilities_that_were_swapped_are_noticed(backend, server):
    def swapped(answer):
        values = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        values["token_id:9"], values["token_id:11"] = values["token_id:11"], values["token_id:9"]

    def likeliest(server, request):  # The first token that was asked for, as vLLM says it.
        logprobs = server.answer(request)["choices"][0]["logprobs"]
        return choice(token_ids=[9], logprobs={**logprobs, "token_logprobs": [-1.0]})(server, request)

    def lie(server, request):
        _, _, raw = likeliest(server, request)
        told = json.loads(raw)
        swapped(told)
        return 200, {}, json.dumps(told).encode()

    server.faults.extend([likeliest, lie, likeliest])
    for _ in range(2):
        np.testing.assert_array_equal(backend.next_token_logprobs([[5]], ASKED), [[-1, -2]])
    assert not server.faults


@pytest.mark.parametrize("name", ["a bomb", "a bomb of gzip", "a bomb of deflate"])
def test_of_a_bomb_no_more_than_the_limit_is_held(backend, server, name):
    status, headers, raw = OF_ANY[name](server, {"prompt": [5], "logprob_token_ids": ASKED})
    server.faults.append(lambda server, request: (status, headers, raw))
    tracemalloc.start()
    try:
        backend.next_token_logprobs([[5]], ASKED)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert not server.faults


def test_a_packed_answer_within_the_limit_is_read(backend, server):
    true = json.dumps(server.answer({"prompt": [5], "logprob_token_ids": ASKED})).encode()
    server.faults.append(says(200, gzip.compress(true), Content_Encoding="gzip"))
    np.testing.assert_array_equal(backend.next_token_logprobs([[5]], ASKED), [[-1, -2]])
    assert len(server.requests) == 1


def other_model(server, request):
    """The same server, after other weights were loaded."""
    answer = copy.deepcopy(server.answer(request))
    for one in answer["choices"]:
        if one["logprobs"]:
            values = one["logprobs"]["top_logprobs"][0]
            one["logprobs"]["top_logprobs"] = [{name: value - 1 for name, value in values.items()}]
    return 200, {}, json.dumps(answer).encode()


def test_a_server_that_comes_back_with_another_model_is_noticed_before_its_answer_counts(
    server, tokenizer, monkeypatch
):
    assert server_module._RESTART <= 1.0
    monkeypatch.setattr(server_module, "_RESTART", 0.2)
    with ServerBackend(server.url, "judge", tokenizer=tokenizer, retry_delay=0.02) as backend:
        backend.next_token_logprobs([[5]], ASKED)
        back = time.monotonic() + 0.4
        server.always = lambda server, request: (says(503) if time.monotonic() < back else other_model)(server, request)
        with pytest.raises(RuntimeError, match="another model under the name 'judge'"):
            backend.next_token_logprobs([[5]], ASKED)


@pytest.mark.parametrize("change", ["weights", "root", "name"])
def test_another_model_is_noticed_now_and_then_without_an_outage(server, tokenizer, monkeypatch, change):
    monkeypatch.setattr(server_module, "_PROBE_EVERY", 0.0)
    with ServerBackend(server.url, "judge", tokenizer=tokenizer) as backend:
        backend.next_token_logprobs([[5]], ASKED)
        if change == "weights":
            server.always = other_model
        else:
            server.cards[0]["id" if change == "name" else "root"] = "other"
        with pytest.raises((RuntimeError, ValueError), match=r"another model|does not serve"):
            backend.next_token_logprobs([[5]], ASKED)


def test_a_fingerprint_is_the_models_whatever_noise_moves_it(server, tokenizer):
    def look():
        with ServerBackend(server.url, "judge", tokenizer=tokenizer) as backend:
            return backend.fingerprint()

    def noisy(answer):
        values = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        values.update({name: value - 0.1 for name, value in values.items()})

    first = look()
    server.always = changed(noisy)
    noise = look()
    server.always = other_model
    other = look()
    assert first.keys() == noise.keys() == other.keys()
    assert same_answers(first["answers"], noise["answers"])
    assert not same_answers(first["answers"], other["answers"])


@pytest.mark.parametrize(
    ("logprob", "mass"),
    [(0.0, 5.0), (math.log(0.2005), 1.0025), (-9999.0, 0.0)],
    ids=["certain", "too much", "nothing"],
)
def test_probabilities_that_are_none_are_that_items_error(server, tokenizer, logprob, mass):
    tokens = [f"token_id:{token}" for token in tokenizer.convert_tokens_to_ids(list("12345"))]

    def lie(server, request):
        if "logprob_token_ids" not in request or "bad" not in tokenizer.decode(request["prompt"]):
            return truth(server, request)
        return shown(**dict.fromkeys(tokens, logprob))(server, request)

    first = tokenizer("a")["input_ids"][0]
    server.texts[first] = " it is short [RESULT] 4"
    with ServerBackend(server.url, "judge", tokenizer=tokenizer, context_length=64) as backend:
        server.always = lie
        good, bad = CoTRAILJudge(backend).judge(["a good one", "a bad one"])
    assert good.error is None
    assert 0 < good.score < 5
    assert bad.error == GridProbabilities.exact(np.array([[mass]])).faults[0]
    assert math.isnan(bad.score)


@pytest.mark.parametrize(
    "answer",
    [OF_SCORES["an empty list, as of a server that speculates"], says(400), says(500)],
    ids=["[]", "400", "500"],
)
def test_a_server_that_speculates_is_refused_in_words(server, tokenizer, answer):
    server.always = answer
    with pytest.raises((ValueError, ConnectionError), match="--speculative-config"):
        ServerBackend(server.url, "judge", tokenizer=tokenizer, retry_seconds=0.05, retry_delay=0.01)


def test_the_probe_at_the_start_is_one_request(server, tokenizer):
    with ServerBackend(server.url, "judge", tokenizer=tokenizer):
        assert len(server.requests) == 1
        assert server.most_running == 1


def test_rationales_of_a_server_know_the_template_that_they_were_asked_with(server, tmp_path):
    tokenizer = make_tokenizer()
    rows = Dataset.from_list([{"prompt": "a", "completion": " old [RESULT] 5"}])

    def distill():
        with ServerBackend(server.url, "judge", tokenizer=tokenizer) as backend:
            CoTSelfDistill(backend, max_new_tokens=4, max_attempts=1).distill(rows, tmp_path / "out")

    distill()
    tokenizer.chat_template += " "
    with pytest.raises(FileExistsError, match=r"chat template: '\w+' there, '\w+' now"):
        distill()


def test_a_judging_that_goes_on_recognises_another_model_behind_the_server(server, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "judge")
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a good one"}, {"prompt": "a bad one"}])

    def judge():
        engine = {"name": "server", "base_url": server.url, "served_model": "judge"}
        paths = [str(tmp_path / name) for name in ("judge", "rows.jsonl", "out")]
        return JudgeStep(*paths, {"max_new_tokens": 4}, engine, untrained=True, block_size=1).run()

    def down(server, request):
        is_bad = "n" in request and "bad" in tokenizer.decode(request["prompt"])
        return (says(400) if is_bad else truth)(server, request)

    server.always = down
    with pytest.raises(RuntimeError, match="HTTP 400"):
        judge()
    server.always = other_model
    with pytest.raises(FileExistsError, match=r"answers: '~ .*' there, '~ .*' now"):
        judge()
    server.always = None
    assert judge() is not None
    server.cards[0]["root"] = "/elsewhere/judge"
    with pytest.raises(FileExistsError, match="root: '/nowhere/judge' there, '/elsewhere/judge' now"):
        judge()
