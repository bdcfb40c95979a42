"""The page of a served judge in a real browser: what it shows, and that what a model wrote stays text."""

import json

import pytest
from browser import chromium, require_chromium
from conftest import make_tokenizer
from serving import served, wait_until
from test_page_browser import HOSTILE

from trl_tract import CoTRAILJudge
from trl_tract.backends import ScriptedBackend
from trl_tract.sources.rubric import Rubric

pytestmark = [
    pytest.mark.slow,
    # Selenium leaves its sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TOKENIZER = make_tokenizer()
PROBS = [0.1, 0.0, 0.2, 0.6, 0.05]
TEXTS = [text for text in HOSTILE if len(text) < 5000]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    require_chromium()
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def judge(rubric=True, text=" So polite. [RESULT] 4") -> CoTRAILJudge:
    made = CoTRAILJudge(ScriptedBackend(lambda prompt, seed: text, TOKENIZER, probs=PROBS, context_length=20_000))
    made.chat = False
    if rubric:
        made.rubric = Rubric("Polite?", dict.fromkeys("12345", "so"), "{instruction}|{response}|{reference}")
    return made


def send(driver, url: str, **fields: str) -> None:
    driver.get(url)
    for name, text in fields.items():
        # Not typed key by key: control characters have no keys.
        driver.execute_script(f"document.getElementById('{name}').value = arguments[0]", text)
    driver.find_element("id", "send").click()
    wait_until(lambda: driver.find_element("id", "answer").is_displayed())


def text_of(driver, name: str) -> str:
    return driver.find_element("id", name).get_property("textContent")


def test_a_pasted_response_gets_rationale_score_and_distribution(browser):
    own = judge()
    with served(own) as server:
        send(browser, server.url, response="Thanks!", instruction="Say thanks")
    assert text_of(browser, "score") == "3.35"
    assert text_of(browser, "rationale").strip() == "So polite."
    assert "0.950" in text_of(browser, "certainty")
    rows = browser.find_elements("css selector", "#distribution tr")
    bars = [float(row.find_element("css selector", "progress").get_property("value")) for row in rows]
    assert bars == pytest.approx(PROBS)
    assert "Say thanks|Thanks!|" in TOKENIZER.decode(own.backend.generate_calls[0]["prompts"][0])


def test_a_judge_without_a_rubric_is_given_its_whole_prompt(browser):
    with served(judge(rubric=False)) as server:
        send(browser, server.url, prompt="Score this")
        assert not browser.find_element("id", "response").is_displayed()
    assert text_of(browser, "score") == "3.35"


def test_an_item_without_a_score_says_why(browser):
    with served(judge(text=" never")) as server:
        send(browser, server.url, response="a")
    assert "no rationale reached" in text_of(browser, "why")


def test_the_key_is_asked_for_and_sent(browser, monkeypatch):
    monkeypatch.setenv("TRL_TRACT_API_KEY", "right")
    with served(judge()) as server:
        send(browser, server.url, response="a", key="wrong")
        assert "key is missing or wrong" in text_of(browser, "error")
        send(browser, server.url, response="a", key="right")
        assert text_of(browser, "score") == "3.35"


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_what_a_model_wrote_stays_text(browser, number):
    browser.get_log("browser")
    # Half a surrogate pair is written by no tokenizer and taken by no driver.
    text = TEXTS[number].encode(errors="replace").decode()
    with served(judge(text=f" {text} [RESULT] 4")) as server:
        send(browser, server.url, response=text, instruction=text)
        assert browser.execute_script("return window.owned") is None
        assert browser.title == "Judge a response"
        shown = browser.find_elements("css selector", "#rationale, #why")
        assert [each.get_property("textContent").strip() for each in shown] != [""]
        planted = "#answer script, #answer img, #answer iframe, #answer svg, #answer a"
        inside = browser.execute_script("return document.querySelectorAll(arguments[0]).length", planted)
        assert inside == 0
        assert not [entry for entry in browser.get_log("browser") if "favicon" not in json.dumps(entry)]
        assert browser.current_url.rstrip("/") == server.url


def test_invisible_characters_of_a_rationale_are_written_out(browser):
    with served(judge(text=" a\u202eb\x00c [RESULT] 4")) as server:
        send(browser, server.url, response="a")
    assert text_of(browser, "rationale").strip() == "a⟨U+202E⟩b⟨U+0000⟩c"
