"""Rationales from a chat endpoint that gives text alone: the score that it writes counts."""

import json

import pytest
from conftest import make_tokenizer, make_trainer
from datasets import Dataset
from fake_server import FakeServer, cut, says

from trl_tract import CoTBootstrap
from trl_tract.backends import ChatBackend, Generation, Sampling, make_author
from trl_tract.distill.authors import ChatAuthor, Draft, as_messages
from trl_tract.distill.bootstrap_summary import read_bootstrap_summary
from trl_tract.scale.scale import read_scales


def answering(text, reason="stop"):
    """A chat completion: `text`, or what it says to a request."""

    def reply(server, request):
        said = text(request) if callable(text) else text
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": reason}
        return 200, {}, json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()

    return reply


@pytest.fixture
def server():
    fake = FakeServer(make_tokenizer())
    yield fake
    fake.stop()


def bootstrapped(server, folder, *rows, **settings):
    backend = ChatBackend(server.url, "gpt-x", retry_delay=0.01)
    boot = CoTBootstrap(backend, **{"num_generations": 2, "say": lambda _: None, **settings})
    return boot.bootstrap(Dataset.from_list(list(rows)), folder / "out")


def row(score, prompt="the reply"):
    return {"prompt": prompt, "score": score}


def asked(request):
    return request["messages"][-1]["content"]


def test_a_rationale_is_kept_by_the_score_that_is_written_behind_the_marker(server, tmp_path):
    server.always = answering("Polite and clear. [RESULT] 4")
    done = bootstrapped(server, tmp_path, row(4.5), row(2.0), show_score=False, on_failure="keep")
    assert done["completion"] == [" Polite and clear. [RESULT] 4", None]
    assert done["rationale_score"] == [4.0, None]
    assert read_bootstrap_summary(tmp_path / "out").failed["off score"] == 2


def test_its_rows_can_be_trained_on(server, tmp_path):
    server.always = answering("Polite and clear. [RESULT] 4")
    chat = [{"role": "user", "content": "the reply"}]
    done = bootstrapped(server, tmp_path, row(4.0, chat), row(4.0, chat))
    trainer = make_trainer(tmp_path / "train", list(done), tokenizer=make_tokenizer())
    assert [label for label in trainer.train_dataset["score_labels"][0] if label == label] == [4.0]


@pytest.mark.parametrize(
    "ending", ["[RESULT] 4", "**[RESULT] 4**", "**[RESULT]:** 4", "[RESULT]: **4**", "## [RESULT]\n4"]
)
def test_markup_around_marker_and_score_is_no_part_of_a_rationale(ending):
    author = ChatAuthor(None, read_scales({}), Sampling())
    draft = Draft(0, {"prompt": [{"role": "user", "content": "a"}]}, None, [4.0], ["4"])
    read = author._read(draft, Generation(f"It is **polite**.\n\n{ending}", "eos", 9), False)
    assert (read.rationale, read.score, read.failure) == ("It is **polite**.", 4.0, None)


@pytest.mark.parametrize(
    "calls", [["look_up"], "look_up", [{"function": "look_up"}], [{"name": "f", "arguments": [1]}]]
)
def test_calls_of_a_form_that_no_api_has_are_left_to_the_endpoint(calls):
    (sent,) = as_messages([{"role": "assistant", "content": "", "tool_calls": calls}])
    assert "tool_calls" in sent


def test_a_turn_without_content_is_sent_as_an_empty_one():
    assert as_messages([{"role": "assistant", "tool_calls": []}]) == [{"role": "assistant", "content": ""}]


def test_tools_and_their_calls_are_sent_as_the_api_has_them(server, tmp_path):
    server.always = answering("Nice. [RESULT] 4")
    tools = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}]
    call = {"function": {"name": "look_up", "arguments": {"word": "polite"}}}
    prompt = [
        {"role": "user", "content": "Is it polite?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "look_up", "content": "yes"},
        {"role": "user", "content": "Judge it."},
    ]
    bootstrapped(server, tmp_path, {**row(4.0, prompt), "tools": json.dumps(tools)})
    request = server.requests[0]
    assert (request["tools"], request["tool_choice"]) == (tools, "none")
    _, turn, answer, _ = request["messages"]
    (sent,) = turn["tool_calls"]
    assert sent["function"] == {"name": "look_up", "arguments": '{"word": "polite"}'}
    assert (sent["type"], answer["tool_call_id"]) == ("function", sent["id"])
    assert answer["name"] == "look_up"


def test_an_answer_without_marker_and_score_is_no_rationale(server, tmp_path):
    server.always = answering("I would give it four of five.")
    bootstrapped(server, tmp_path, row(4.0), show_score=False)
    assert read_bootstrap_summary(tmp_path / "out").failed["no marker"] == 2


def test_the_score_is_shown_where_no_answer_came_to_it_and_is_not_given_away(server, tmp_path):
    def text(request):
        return "Rude, and it names no date. [RESULT]" if "right score is 1" in asked(request) else "Nice. [RESULT] 5"

    server.always = answering(text)
    done = bootstrapped(server, tmp_path, row(1.0), row(5.0, "another reply"))
    assert done["rationale_source"] == ["shown", "blind"]
    assert done["completion"][0] == " Rude, and it names no date. [RESULT] 1"
    assert not [request for request in server.requests if "right score is 5" in asked(request)]


def test_each_rationale_is_a_request_of_its_own_without_a_stop(server, tmp_path):
    server.always = answering("Nice. [RESULT] 4")
    bootstrapped(server, tmp_path, row(4.0), temperature=0.5, max_new_tokens=99)
    first, second = server.requests
    assert {name: first[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "gpt-x", "temperature": 0.5, "max_tokens": 99,
    }  # fmt: skip
    assert not {"stop", "n", "prompt", "repetition_penalty"} & first.keys()
    assert first["seed"] != second["seed"]


def test_thinking_in_an_answer_is_left_out(server, tmp_path):
    server.always = answering("<think>[RESULT] 1?</think>\nNice. [RESULT] 4")
    assert bootstrapped(server, tmp_path, row(4.0))["completion"] == [" Nice. [RESULT] 4"]


@pytest.mark.parametrize("fault", [says(429, Retry_After="0"), says(503), cut, says(200, {"odd": 1})])
def test_what_fails_is_asked_again(server, tmp_path, fault):
    server.faults.append(fault)
    server.always = answering("Nice. [RESULT] 4")
    assert bootstrapped(server, tmp_path, row(4.0))["rationale_source"] == ["blind"]


def test_fields_of_the_request_can_be_added_and_taken_out(server):
    server.always = answering("Nice.")
    options = {"max_tokens": None, "max_completion_tokens": 5, "reasoning_effort": "low"}
    backend = ChatBackend(server.url, "gpt-x", options=options)
    (((generation,),)) = backend.write([[{"role": "user", "content": "hi"}]])
    (request,) = server.requests
    assert (generation.text, generation.num_tokens) == ("Nice.", 7)
    assert request["max_completion_tokens"] == 5
    assert "max_tokens" not in request


def test_the_key_is_sent_and_kept_out_of_what_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-secret")
    server.always = answering("Nice. [RESULT] 4")
    bootstrapped(server, tmp_path, row(4.0))
    assert server.headers[-1]["Authorization"] == "Bearer sk-planted-secret"
    texts = [file.read_text(errors="replace") for file in (tmp_path / "out").rglob("*") if file.suffix == ".json"]
    assert "planted" not in "".join(texts)


def test_another_endpoint_is_another_run(server, tmp_path):
    server.always = answering("Nice. [RESULT] 4")
    bootstrapped(server, tmp_path, row(4.0))
    other = FakeServer(make_tokenizer())
    other.always = server.always
    with pytest.raises(FileExistsError, match="endpoint"):
        bootstrapped(other, tmp_path, row(4.0))
    other.stop()


def test_a_chat_is_made_by_its_name(server):
    author = make_author("gpt-x", "chat", base_url=server.url)
    assert (author.name, author.model_id, author.tokenizer) == ("chat", "gpt-x", None)
    with pytest.raises(ValueError, match="base_url"):
        make_author("gpt-x", "chat")


def test_aspects_are_asked_for_one_behind_the_other(server, tmp_path):
    def text(request):
        return "True. [FACTS] 2" if "Rude. [TONE] 1" in asked(request) else "Rude. [TONE] 1"

    server.always = answering(text)
    rows = {"prompt": "the reply", "scores": {"tone": 1, "facts": 2}}
    aspects = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}}
    done = bootstrapped(server, tmp_path, rows, aspects=aspects)
    assert done["completion"] == [" Rude. [TONE] 1 True. [FACTS] 2"]
