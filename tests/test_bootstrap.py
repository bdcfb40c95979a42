"""Bootstrap: rationales for rows that have only scores; kept are those that come to the score."""

import json
import math

import numpy as np
import pytest
from conftest import make_rows, make_tokenizer, make_trainer
from datasets import Dataset

import trl_tract.distill.bootstrap as bootstrap_module
from trl_tract import CoTBootstrap
from trl_tract.backends import ScriptedBackend
from trl_tract.distill.authors import Candidate, ModelAuthor
from trl_tract.distill.bootstrap_summary import read_bootstrap_summary
from trl_tract.distill.choosing import written_like
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.scale.scale import read_scales

TOKENIZER = make_tokenizer()
TONES = {"awful": 1, "weak": 2, "fair": 3, "good": 4, "great": 5}
"""What the scripted model takes a rationale with this word to come to."""


def comes_to(ids):
    """Probabilities of the scores 1 to 5: all on the one that the last such word says, or even without one."""
    text = TOKENIZER.decode(ids)
    places = {text.rfind(word): score for word, score in TONES.items() if word in text}
    if not places:
        return [0.2] * 5
    return [0.5 * (score == places[max(places)]) for score in range(1, 6)]


def model(script, **settings):
    return ScriptedBackend(script, TOKENIZER, probs=comes_to, **settings)


def rows_of(*scores, **more):
    return Dataset.from_list(
        [{"prompt": f"the reply {number}", "score": score, **more} for number, score in enumerate(scores)]
    )


def quiet(backend, **settings):
    return CoTBootstrap(backend, **{"say": lambda _: None, **settings})


def cycle(*texts):
    """A script that says the texts in turn, whatever the prompt, by the number of the sample."""
    return lambda prompt, seed: texts[seed % len(texts)]


def test_of_the_rationales_that_come_to_the_score_the_closest_is_kept(tmp_path):
    # Expected score 4 for "good", 5 for "great"; the gold score is 3.75.
    words = {"good": 0, "great": 0}

    def script(prompt, seed):
        word = "great" if seed % 2 else "good"
        words[word] += 1
        return f" {word} [RESULT] 1"

    (row,) = quiet(model(script), tolerance=2.0).bootstrap(rows_of(3.75), tmp_path / "out")
    assert (row["completion"], row["rationale_score"]) == (" good [RESULT] 4", 4.0)
    assert (row["rationale_source"], row["attempts"]) == ("blind", 4)
    assert min(words.values()) > 0


def test_a_model_that_has_not_learnt_the_format_is_read_where_its_text_ends(tmp_path):
    (row,) = quiet(model(cycle(" a good reply"))).bootstrap(rows_of(4), tmp_path / "out")
    assert row["completion"] == " a good reply [RESULT] 4"


def test_rationales_off_the_score_are_not_kept_and_the_row_is_given_up(tmp_path):
    backend = model(cycle(" good [RESULT] 1"))
    rows = quiet(backend, show_score=False, on_failure="keep").bootstrap(rows_of(4, 2), tmp_path / "out")
    assert rows["completion"] == [" good [RESULT] 4", None]
    assert rows["rationale_source"] == ["blind", None]
    summary = read_bootstrap_summary(tmp_path / "out")
    assert (summary.blind, summary.given_up, summary.failed["off score"]) == (1, 1, 4)
    assert summary.by_score[""]["2"] == {"blind": 0, "shown": 0, "given up": 1}


def test_rows_that_are_given_up_are_dropped(tmp_path):
    rows = quiet(model(cycle(" good")), show_score=False).bootstrap(rows_of(2, 4, 2), tmp_path / "out")
    assert rows["prompt"] == ["the reply 1"]


def test_a_row_that_is_given_up_can_stop_the_run(tmp_path):
    with pytest.raises(RuntimeError):
        quiet(model(cycle(" good")), show_score=False, on_failure="raise").bootstrap(rows_of(2), tmp_path / "out")


def told(prompt, seed):
    """Writes what the shown score deserves, and knows nothing without it."""
    return " weak reply [RESULT]" if "right score is 2" in prompt else " good [RESULT] 4"


def test_where_none_comes_to_the_score_it_is_shown_and_the_row_says_so(tmp_path):
    rows = quiet(model(told)).bootstrap(rows_of(4, 2), tmp_path / "out")
    assert rows["rationale_source"] == ["blind", "shown"]
    assert rows["completion"] == [" good [RESULT] 4", " weak reply [RESULT] 2"]
    assert rows["attempts"] == [4, 8]


def test_the_score_is_shown_to_no_row_whose_rationale_was_found_blind(tmp_path):
    backend = model(told)
    quiet(backend).bootstrap(rows_of(4, 2), tmp_path / "out")
    blind, shown = backend.generate_calls
    texts = [[TOKENIZER.decode(ids) for ids in call["prompts"]] for call in (blind, shown)]
    assert ["right score" in text for text in texts[0]] == [False, False]
    assert ["right score is 2" in text and "the reply 1" in text for text in texts[1]] == [True]


@pytest.mark.parametrize(
    "leak", [" It deserves a 2 [RESULT]", " The given score is fair [RESULT]", " score: 3 [RESULT]"]
)
def test_a_rationale_that_gives_the_shown_score_away_is_not_kept(tmp_path, leak):
    backend = model(lambda prompt, seed: leak if "right score" in prompt else " good [RESULT] 4")
    rows = quiet(backend, on_failure="keep").bootstrap(rows_of(2), tmp_path / "out")
    assert rows["rationale_source"] == [None]
    assert read_bootstrap_summary(tmp_path / "out").failed["leak"] == 4


def test_rationales_are_written_as_most_rows_write_theirs():
    rows = [{"prompt": "p", "completion": f"Good.{gap}[RESULT] 4"} for gap in ("\r\n", " ", " ")]
    assert written_like(rows, read_scales({}))[0].format.lead == " "


def test_rows_that_have_a_rationale_keep_it_and_their_way_of_writing(tmp_path):
    rows = [
        {"prompt": "the reply", "completion": " old\n[RESULT] 5", "score": 5.0},
        {"prompt": "the reply", "completion": None, "score": 4.0},
        {"prompt": "the reply", "completion": math.nan, "score": 4.0},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    quiet(model(cycle(" good"))).bootstrap_file(tmp_path / "rows.jsonl", tmp_path / "out")
    done = list(read_jsonl(tmp_path / "out" / "rows.jsonl"))
    assert [row["completion"] for row in done] == [" old\n[RESULT] 5", " good\n[RESULT] 4", " good\n[RESULT] 4"]
    assert [row["rationale_source"] for row in done] == ["annotated", "blind", "blind"]


@pytest.mark.parametrize("completion", [" [RESULT] 4", "[RESULT] 4"])
def test_a_score_alone_is_no_rationale(tmp_path, completion):
    (row,) = quiet(model(lambda prompt, seed: "It is good.")).bootstrap(rows_of(4, completion=completion), tmp_path)
    assert (row["completion"], row["rationale_source"]) == (" It is good. [RESULT] 4", "blind")


@pytest.mark.parametrize("completion", [" It is good.", " It is good. Score: 4", " It is good. [RESULT] 9"])
def test_a_completion_that_could_not_be_trained_on_is_named_before_anything_is_written(tmp_path, completion):
    backend = model(lambda prompt, seed: "It is good.")
    with pytest.raises(ValueError, match="row 0"):
        quiet(backend).bootstrap(rows_of(4, completion=completion), tmp_path)
    assert not backend.generate_calls


def test_where_all_rows_have_a_rationale_nothing_is_asked_and_no_table_shown(tmp_path):
    said, backend = [], model(cycle(" good"))
    done = CoTBootstrap(backend, say=said.append).bootstrap(Dataset.from_list(make_rows(2)), tmp_path / "out")
    assert done["rationale_source"] == ["annotated"] * 2
    assert (len(said), backend.generate_calls) == (1, [])


def test_all_rationales_are_written_anew_on_request(tmp_path):
    rows = rows_of(4, completion=" old [RESULT] 4")
    assert quiet(model(cycle(" good")), rewrite=True).bootstrap(rows, tmp_path)["completion"] == [" good [RESULT] 4"]


def test_chat_rows_get_chat_completions_that_can_be_trained_on(tmp_path):
    rows = [{"prompt": row["prompt"], "score": 4.0} for row in make_rows(2, chat=True)]
    done = quiet(model(cycle("good [RESULT] 1"))).bootstrap(Dataset.from_list(rows), tmp_path / "out")
    assert done[0]["completion"] == [{"role": "assistant", "content": "good [RESULT] 4"}]
    (labels, _) = make_trainer(tmp_path / "train", list(done), tokenizer=TOKENIZER).train_dataset["score_labels"]
    assert [label for label in labels if label == label] == [4.0]


def test_a_conversation_without_the_judges_turn_gets_one(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "the reply"}], "score": 4.0}]
    (done,) = quiet(model(cycle("good"))).bootstrap(Dataset.from_list(rows), tmp_path / "out")
    assert [turn["role"] for turn in done["messages"]] == ["user", "assistant"]
    assert done["messages"][1]["content"] == "good [RESULT] 4"


def test_several_people_count_as_their_mean_and_stay_apart(tmp_path):
    rows = [{"prompt": "the reply", "score": [4.0, 4.0, 3.0]}]
    (done,) = quiet(model(cycle(" good")), tolerance=0.4).bootstrap(Dataset.from_list(rows), tmp_path / "out")
    assert (done["completion"], done["score"]) == (" good [RESULT] 4", [4.0, 4.0, 3.0])


def test_several_rationales_of_a_row_are_kept_on_request_the_same_text_once(tmp_path):
    backend = model(cycle(" good a", " good b", " good a", " fair"))
    done = quiet(backend, keep=3).bootstrap(rows_of(4), tmp_path / "out")
    assert sorted(done["completion"]) == [" good a [RESULT] 4", " good b [RESULT] 4"]


ASPECTS = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}}


def test_each_aspect_has_a_rationale_behind_the_gold_score_of_the_one_before(tmp_path):
    backend = model(lambda prompt, seed: " weak [FACTS] 1" if "[TONE] 4" in prompt else " good [TONE] 1")
    rows = Dataset.from_list([{"prompt": "the reply", "scores": {"tone": 4, "facts": 2}}])
    (done,) = quiet(backend, aspects=ASPECTS).bootstrap(rows, tmp_path / "out")
    assert done["completion"] == " good [TONE] 4 weak [FACTS] 2"
    assert done["rationale_score"] == {"tone": 4.0, "facts": 2.0}
    summary = read_bootstrap_summary(tmp_path / "out")
    assert (summary.by_score["tone"]["4"]["blind"], summary.by_score["facts"]["2"]["blind"]) == (1, 1)


def test_a_rationale_that_was_cut_ends_with_its_last_whole_sentence(tmp_path):
    text = " It is good. It is" + " good and" * 60
    (done,) = quiet(model(cycle(text)), max_new_tokens=30).bootstrap(rows_of(4), tmp_path / "out")
    assert done["completion"] == " It is good. [RESULT] 4"


def test_a_rationale_ends_before_it_names_a_score_in_words(tmp_path):
    (done,) = quiet(model(cycle(" It is good. So the score is 4."))).bootstrap(rows_of(4), tmp_path / "out")
    assert done["completion"] == " It is good. [RESULT] 4"


def test_what_it_costs_is_said_first_with_the_money_where_a_price_is_given(tmp_path):
    said = []
    backend = ScriptedBackend(lambda prompt, seed: said.append("asked") or " good", TOKENIZER, probs=comes_to)
    CoTBootstrap(backend, prices=(1.0, 2.0), max_new_tokens=100, say=said.append).bootstrap(rows_of(4, 4), tmp_path)
    # 2 rows, 4 rationales blind and 4 with the score shown, 100 tokens each: 1,600 tokens to write, 0.0032 in money.
    assert "1,600 to write" in said[0]
    assert "at most 0.0" in said[0]
    assert "second" not in said[0]
    assert said[1] == "asked"
    assert said[-1].startswith("2 rows")


def test_what_it_costs_at_most_counts_each_kept_rationale_of_the_first_aspect(tmp_path):
    said = []
    rows = Dataset.from_list([{"prompt": "a", "scores": {"tone": 4, "facts": 4}}])
    given = {"aspects": ASPECTS, "keep": 3, "show_score": False, "max_new_tokens": 10, "say": said.append}
    backend = model(cycle(" good"))
    CoTBootstrap(backend, **given).bootstrap(rows, tmp_path / "out")
    # 4 rationales of the first aspect, and 4 of the second for each of the 3 that are kept: 16, of 10 tokens.
    assert "at most 16 rationales" in said[0]
    assert "160 to write" in said[0]


def test_the_speed_is_measured_on_request_and_changes_nothing(tmp_path):
    said = []
    CoTBootstrap(model(cycle(" good")), probe=True, say=said.append).bootstrap(rows_of(4, 4), tmp_path / "a")
    quiet(model(cycle(" good"))).bootstrap(rows_of(4, 4), tmp_path / "b")
    assert "second" in said[0]
    assert (tmp_path / "a" / "rows.jsonl").read_bytes() == (tmp_path / "b" / "rows.jsonl").read_bytes()


def test_reading_and_writing_are_measured_apart(tmp_path, monkeypatch):
    # 3 seconds for each prompt and 0.5 for each token that is written, whatever their numbers.
    now = [0.0]

    def write(author, drafts, n, seed, *, shown, on_progress):
        tokens = author.sampling.max_new_tokens
        now[0] += 3 * len(drafts) + 0.5 * len(drafts) * n * tokens
        return [[Candidate("fine", 3.0, None, tokens)] * n for _ in drafts]

    monkeypatch.setattr(ModelAuthor, "write", write)
    monkeypatch.setattr(bootstrap_module.time, "monotonic", lambda: now[0])
    writer = quiet(model(cycle(" good")), show_score=False, max_new_tokens=64, probe=True)
    # 10 prompts, and 40 rationales of 64 tokens.
    assert writer._seconds(writer._author(), rows_of(1, 2, 3).to_list(), 10, 40 * 64) == pytest.approx(
        10 * 3 + 40 * 64 * 0.5
    )


def test_rows_count_as_done_while_scores_are_shown_too(monkeypatch):
    done, seen = [], {False: [], True: []}

    def write(author, drafts, n, seed, *, shown, on_progress):
        for _ in drafts:
            on_progress(1)
            seen[shown].append(sum(done))
        good = [shown or draft.number == 0 for draft in drafts]
        return [[Candidate("fine", 4.0 if one else 1.0, None, 3)] * n for one in good]

    monkeypatch.setattr(ModelAuthor, "write", write)
    quiet(model(cycle(" good"))).block(rows_of(4, 4, 4, 4).to_list(), 0, done.append)
    # Half of each row is asking without its score; row 0 is not asked again.
    assert seen == {False: [0, 1, 1, 2], True: [3, 3, 4]}
    assert sum(done) == 4


def test_a_finished_bootstrap_is_taken_up_without_asking_again(tmp_path):
    quiet(model(cycle(" good"))).bootstrap(rows_of(4, 4), tmp_path / "out")
    again = model(cycle(" fair"))
    assert quiet(again).bootstrap(rows_of(4, 4), tmp_path / "out")["completion"] == [" good [RESULT] 4"] * 2
    assert not again.generate_calls


@pytest.mark.parametrize("setting", [{"tolerance": 1.0}, {"show_score": False}, {"keep": 2}, {"seed": 1}])
def test_another_bootstraps_directory_is_refused(tmp_path, setting):
    quiet(model(cycle(" good"))).bootstrap(rows_of(4), tmp_path / "out")
    with pytest.raises(FileExistsError, match=next(iter(setting))):
        quiet(model(cycle(" good")), **setting).bootstrap(rows_of(4), tmp_path / "out")


def test_a_row_without_a_score_is_named_before_anything_is_written(tmp_path):
    backend = model(cycle(" good"))
    with pytest.raises(ValueError, match="row 1 has no gold score"):
        quiet(backend).bootstrap(rows_of(4, None), tmp_path / "out")
    assert not backend.generate_calls


def test_the_table_counts_by_score(tmp_path):
    said = []
    CoTBootstrap(model(told), say=said.append).bootstrap(rows_of(4, 4, 2, 5), tmp_path / "out")
    table = [line.split() for line in said[-1].splitlines()]
    assert ["2", "1", "0", "1", "0", "0"] in table
    assert ["4", "2", "2", "0", "0", "100"] in table
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["by_score"][""]["4"]["blind"] == 2


def test_the_expected_score_is_that_of_the_grid_alone(tmp_path):
    # Half the probability is off the grid: the plain expected score would be 2.
    (done,) = quiet(model(cycle(" good"))).bootstrap(rows_of(4), tmp_path / "out")
    assert done["rationale_score"] == pytest.approx(4.0)
    assert np.isclose(sum(comes_to(TOKENIZER("good")["input_ids"])), 0.5)
