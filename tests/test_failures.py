"""What is wrong with a rationale: each kind found, and nothing found in ordinary text."""

import pytest

from trl_tract.distill.failures import loops, rationale_failure, stated_score

STATED = stated_score(("1", "2", "3", "4", "5"))
ORDINARY = [
    "The reply greets the customer by name, apologises for the delay and offers a refund within 5 days.",
    "greeting: yes, apology: no, remedy: yes, sign-off: no",
    "Steps 1, 2 and 3 are right; step 4 contradicts the 2 sources, and 3 of 4 claims hold.",
    "----------------------------------------\n| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |",
    "It scores well on tone. Marks 10 years of service. The rating agency was cited, rated AAA.",
    "ha ha ha ha ha ha, very funny",
    "",
]
STATES = [
    "So the overall score is 3.",
    "This earns a score of 4 in the rubric",
    "Score: 5",
    "**Rating:** **4**".replace("**", ""),
    "I would give it 4/5",
    "that is 3 out of 5",
    'its rating should be "2"',
    "SCORES 1",
]
LOOPS = ["It is polite. " * 12, "ha" * 100, "x" * 200, "A good start. " + "and then " * 40 + " the end", "你好吗" * 60]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_neither_loops_nor_states_a_score(text):
    assert not loops(text)
    assert not STATED.search(text)


@pytest.mark.parametrize("text", STATES)
def test_a_stated_score_is_found(text):
    assert STATED.search(text)


@pytest.mark.parametrize("text", ["a score of 7", "score: 45", "4.5/5", "rating of 3.5", "a score of 2nd rank"])
def test_another_number_is_not_one_of_the_scores(text):
    assert not STATED.search(text)


@pytest.mark.parametrize("text", LOOPS)
def test_a_loop_is_found(text):
    assert loops(text)


@pytest.mark.parametrize(
    ("text", "finish_reason", "failure"),
    [
        ("It is polite.", "stop", None),
        ("It is polite.", "eos", "no marker"),
        ("It is polite.", "length", "length"),
        ("", "prompt_too_long", "prompt too long"),
        (" \n", "stop", "empty"),
        ("", "eos", "no marker"),
        (LOOPS[0], "length", "repetition"),
        (LOOPS[0], "stop", "repetition"),
        (STATES[0], "stop", "leak"),
    ],
)
def test_each_failure_has_its_name(text, finish_reason, failure):
    assert rationale_failure(text, finish_reason, STATED) == failure


def test_a_megabyte_of_ordinary_text_is_no_failure():
    text = "".join(chr(33 + i * i * i % 7919 % 89) for i in range(2**20))
    assert rationale_failure(text, "stop", STATED) is None
