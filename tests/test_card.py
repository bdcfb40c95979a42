"""The model card: safe with any prompt, and completed by what a run finds out after training."""

import re

import numpy as np
import pytest
from conftest import make_model, make_rows, make_tokenizer, make_trainer
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from peft import LoraConfig

from trl_tract import TRACTConfig, score_report
from trl_tract.saved.cards import _environment, render
from trl_tract.saved.model_card import add_evaluation, add_training_run, write_model_card
from trl_tract.saved.training_rows import TrainingRows
from trl_tract.text.markdown import code_span, fenced, plain_line, python_literal

HOSTILE = (
    "Judge `this`.\n```python\nprint('fence')\n```\n~~~\n</details> <!-- evaluation -->\nx\n<!-- /evaluation -->\n'\"\\"
)


def write(directory, prompt="Judge this.", **more):
    rows = TrainingRows(8, prompt, prompt if isinstance(prompt, str) else "rendered", {"self": 6, "annotated": 2})
    known = {"base_model": "someone/seed", "model_name": "my-judge", "dataset_name": None, "tags": [], "metrics": {}}
    write_model_card(TRACTConfig(str(directory), bf16=False), None, **{**known, "rows": rows, **more})
    return directory / "README.md"


def quick_start(text):
    (found,) = re.findall(r"(`{3,})python\nfrom trl_tract import(.*?)\n\1", text, flags=re.DOTALL)
    return f"from trl_tract import{found[1]}"


def prompt_of(code):
    """What the quick start would judge."""
    namespace = {}
    exec(code[code.index("prompt = ") : code.index("judgement = ")], namespace)
    return namespace["prompt"]


@given(st.text())
def test_a_prompt_of_any_text_is_in_the_quick_start_to_the_letter(text):
    assert eval(python_literal(text)) == text


@given(st.text(alphabet="'\"\\`<!-\n\r\u2028\ud800{}"))
def test_a_prompt_of_quotes_fences_and_line_ends_is_in_the_quick_start_to_the_letter(text):
    literal = python_literal([{"role": "user", "content": text}])
    assert eval(literal) == [{"role": "user", "content": text}]
    assert "<!--" not in literal
    literal.encode()


@given(st.text(alphabet="`a\n"))
def test_no_line_of_a_fenced_text_closes_its_fence(text):
    first, *body, last = fenced(text).split("\n")
    assert set(first) == {"`"}
    assert last == first
    assert all(first not in line for line in body)


@given(st.text(alphabet="`a\n "))
def test_inline_code_is_one_line_and_closes_where_it_should(text):
    span = code_span(text)
    assert "\n" not in span
    fence = re.match("`+", span).group() if text.strip("`") else span[: len(span) - len(span.lstrip("`"))]
    assert fence not in re.sub(f"^{fence}|{fence}$", "", span)


def test_a_prompt_with_fences_and_comments_stays_inside_its_block(tmp_path):
    text = write(tmp_path, HOSTILE).read_text()
    assert prompt_of(quick_start(text)) == HOSTILE
    assert re.search(r"^(`{4,})text\n" + re.escape(HOSTILE) + r"\n\1$", text, re.MULTILINE)


def test_a_prompt_with_a_sections_name_does_not_take_the_evaluation(tmp_path):
    readme = write(tmp_path, HOSTILE)
    add_evaluation(readme, score_report([1, 2, 4], [1, 3, 5], n_bootstrap=20), dataset_name="rows.jsonl")
    text = readme.read_text()
    assert text.index("| pearson |") < text.index("## Training data")
    assert prompt_of(quick_start(text)) == HOSTILE


def test_a_prompt_of_chat_messages_is_given_as_messages(tmp_path):
    prompt = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "One\ntwo"}]
    assert prompt_of(quick_start(write(tmp_path, prompt).read_text())) == prompt


def test_a_prompt_that_nobody_would_read_is_left_out_and_its_length_is_said(tmp_path):
    text = write(tmp_path, "x" * 20_000).read_text()
    assert prompt_of(quick_start(text)) == "..."
    assert "the first 8,000 of 20,000 characters" in text


@pytest.mark.parametrize("part", ["chiang-etal-2025-tract", "vonwerra2020trl"])
def test_the_card_cites(tmp_path, part):
    assert part in write(tmp_path).read_text()


def test_the_card_says_whose_rationales_the_rows_have(tmp_path):
    text = write(tmp_path).read_text()
    assert "- Rows: 8\n" in text
    assert "- Rationales written by the stage-one model: 6 of 8, 75.0%" in text
    assert "- Rationales annotated: 2 of 8, 25.0%" in text


@pytest.fixture
def evaluated(tmp_path):
    readme = write(tmp_path)
    readme.write_text(readme.read_text().replace("## Limits", "## Limits\n\nA person wrote this."))
    report = score_report([1, 2, 4, np.nan, 3, 3, 5, 4, 1], [1, 3, 5, 2, 3, 2, 4, 4, 2], n_bootstrap=200)
    add_evaluation(readme, report, dataset_name="held-out.jsonl", grid_mass=0.91, errors={"no [room]": 1})
    return readme, report


def test_the_evaluation_is_a_table_with_intervals(evaluated):
    text, r = evaluated[0].read_text(), evaluated[1].pearson
    assert f"| pearson | {r.value:.3f} | {r.low:.3f} to {r.high:.3f} | - |" in text
    assert "| metric | value | 95 % interval | the mean |\n| :-- | --: | :-: | --: |\n| pearson |" in text
    assert "Not evaluated yet." not in text
    assert "- Items without a score: 1 (no \\[room\\]: 1)" in text
    assert "- Mean probability on the grid: 0.910" in text


def test_the_evaluation_is_in_the_hubs_metadata(evaluated):
    data = ModelCard.load(evaluated[0]).data
    results = {result.metric_type: result for result in data.eval_results}
    r = evaluated[1].pearson
    assert r.low < r.value < r.high
    assert results["pearsonr"].metric_value == pytest.approx(r.value, abs=1e-4)
    assert results["pearsonr"].metric_args == {"interval_95": [round(r.low, 4), round(r.high, 4)], "n": 8}
    assert results["rmse"].dataset_name == "held-out.jsonl"
    assert data.model_name == "my-judge"


def test_what_a_person_wrote_into_the_card_stays(evaluated):
    assert "A person wrote this." in evaluated[0].read_text()


def test_a_second_evaluation_takes_the_place_of_the_first(evaluated):
    readme, _ = evaluated
    add_evaluation(readme, score_report([1, 2, 5], [1, 2, 5], n_bootstrap=0), dataset_name="other.jsonl")
    text = readme.read_text()
    assert text.count("| pearson |") == 1
    assert "| pearson | 1.000 | - | - |" in text
    assert {result.dataset_name for result in ModelCard.load(readme).data.eval_results} == {"other.jsonl"}


def test_the_evaluation_begins_with_the_verdict(evaluated):
    text, verdict = evaluated[0].read_text(), evaluated[1].verdict
    evaluation = text.split("<!-- evaluation -->\n")[1]
    assert evaluation.startswith(f"**{plain_line(verdict[0].text)}**\n\n- {plain_line(verdict[1].text)}\n")


def test_correlations_of_a_judge_that_says_one_thing_are_no_metadata(tmp_path):
    readme, gold = write(tmp_path), [1, 2, 3, 4, 5, 2, 3]
    add_evaluation(readme, score_report([3 + g / 50 for g in gold], gold, n_bootstrap=20), dataset_name="rows")
    assert {result.metric_type for result in ModelCard.load(readme).data.eval_results} == {"rmse", "mae", "accuracy"}
    assert "nearly the same score" in readme.read_text()


def test_a_judge_that_always_failed_has_no_numbers_in_the_metadata(tmp_path):
    readme = write(tmp_path)
    add_evaluation(readme, score_report([np.nan] * 3, [1, 2, 3]), dataset_name="rows")
    assert ModelCard.load(readme).data.eval_results is None
    assert "| pearson | undefined | - |" in readme.read_text()


def test_a_card_that_lost_its_places_is_named(tmp_path):
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.raises(ValueError, match=r"README\.md .*<!-- evaluation -->"):
        add_evaluation(tmp_path / "README.md", score_report([1, 2], [1, 2], n_bootstrap=0), dataset_name="rows")


def test_a_run_puts_both_stages_into_the_card(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    one.write_text(one.read_text().replace("- `raft_weight`: 1.0", "- `raft_weight`: 0.5"))
    one.write_text(one.read_text().replace("- Rows: 8\n", "- Rows: 9\n"))
    summary = {"resampled": 3}
    add_training_run(two, one, data="someone/rows", summary=summary)
    text = two.read_text()
    add_training_run(two, one, data="someone/rows", summary=summary)
    assert two.read_text() == text  # the second time changes nothing
    assert (
        "- Data: `someone/rows`, with the gold scores of both stages\n- Rationales sampled again for stage two: 3"
        in text
    )
    rows, settings = text.split("### Stage one\n")[1:]
    for part, first, second in ((rows, "- Rows: 9\n", "- Rows: 8\n"), (settings, "weight`: 0.5\n", "weight`: 1.0\n")):
        stage_one, stage_two = part.split("### Stage two")
        assert first in stage_one
        assert second in stage_two
    assert ModelCard.load(two).data.datasets == "someone/rows"


def test_a_path_on_this_disk_stays_out_of_the_card(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    (tmp_path / "rows.jsonl").write_text("{}")
    add_training_run(two, one, data=str(tmp_path / "rows.jsonl"), summary={})
    assert "- Data: `rows.jsonl`" in two.read_text()
    assert str(tmp_path) not in two.read_text()
    assert ModelCard.load(two).data.datasets is None


def test_the_card_of_an_adapter_names_its_settings(tmp_path):
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"])
    make_trainer(tmp_path, make_rows(4), max_steps=1, extra={"peft_config": adapter}).create_model_card()
    text = (tmp_path / "README.md").read_text()
    for line in ("- `peft_type`: LORA\n", "- `r`: 4\n", "- `target_modules`: q\\_proj, v\\_proj\n"):
        assert line in text


def test_a_trainer_whose_first_row_was_dropped_still_writes_its_card(tmp_path):
    rows = [{"prompt": "no score", "completion": " nothing", "score": 2.0}, *make_rows(3, fractions=False)]
    trainer = make_trainer(
        tmp_path, rows, model=make_model(), tokenizer=make_tokenizer(), invalid_rows="drop", max_steps=1
    )
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert prompt_of(quick_start(text)) == rows[1]["prompt"]


def test_the_card_counts_the_rows_that_were_trained_on(tmp_path):
    dropped = {"prompt": "no score", "completion": " nothing", "score": 2.0, "rationale_source": "annotated"}
    rows = [dropped, *({**row, "rationale_source": "blind"} for row in make_rows(3, fractions=False))]
    make_trainer(tmp_path, rows, invalid_rows="drop", max_steps=1).create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "- Rows: 3\n- Rationales written by a model without the gold score: 3 of 3, 100.0%\n<!--" in text


def test_the_card_of_a_judge_without_rationales_speaks_of_none(tmp_path):
    rows = [{**row, "rationale_source": "annotated"} for row in make_rows(3)]
    trainer = make_trainer(tmp_path, rows, eval_dataset=make_rows(3, seed=1), max_steps=1, drop_rationale=True)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "<!-- evaluation -->\n- Held-out score/" in text
    assert "- Rows: 3\n<!--" in text


def test_the_card_shows_the_weight_of_each_aspect(tmp_path):
    aspects = {"tone": {"marker": "[TONE]", "raft_weight": 0.5}, "facts": {"marker": "[FACTS]"}}
    row = {
        "prompt": "judge ->",
        "completion": " rude. [TONE] 1\ntrue. [FACTS] 4",
        "scores": {"tone": 1.0, "facts": 4.0},
    }
    make_trainer(tmp_path, [row], aspects=aspects, raft_weight=2.0, max_steps=1).create_model_card()
    assert "- `raft_weight`: tone 0.5, facts 2.0\n" in (tmp_path / "README.md").read_text()


def test_the_card_says_nothing_of_rationales_whose_source_is_unknown(tmp_path):
    rows = [{**row, "rationale_source": None} for row in make_rows(3)]
    make_trainer(tmp_path, rows, max_steps=1).create_model_card()
    assert "- Rows: 3\n<!--" in (tmp_path / "README.md").read_text()


def test_the_card_has_the_evaluation_of_the_weights_that_are_saved(tmp_path):
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # The error falls, so that the "best" of these, where greater is better, is not the last one.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score/rmse", "greater_is_better": True}
    trainer = make_trainer(
        tmp_path, make_rows(4), eval_dataset=make_rows(6, seed=1), max_steps=4, learning_rate=1e-2, **each_step, **best
    )
    trainer.train()
    trainer.create_model_card()
    last = [entry["eval_score/rmse"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    rmse = trainer.evaluate()["eval_score/rmse"]
    assert f"- Held-out score/rmse: {rmse:.3f}\n" in (tmp_path / "README.md").read_text()
    assert f"{rmse:.3f}" != f"{last:.3f}"


def test_whatever_a_template_puts_in_is_no_markup():
    # A template's author cannot forget to escape: an expression without a filter is a line of plain text.
    shown = _environment().from_string("- {{ text }}\n- {{ text | code }}\n").render(text="a\n# b <i>|*c*")
    assert shown == "- a \\# b \\<i\\>\\|\\*c\\*\n- `a\\n# b <i>|*c*`\n"


@pytest.mark.parametrize("template", ["model_card", "evaluation", "run_rows", "dataset_card"])
def test_a_template_that_names_something_unknown_says_so(template):
    with pytest.raises(UndefinedError):
        render(template)
