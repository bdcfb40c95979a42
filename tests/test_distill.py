"""Self-distillation: own rationales, gold scores, nothing lost, nothing twice."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_rows, make_tokenizer, make_trainer
from datasets import Dataset

from trl_tract import CoTSelfDistill
from trl_tract.backends import ScriptedBackend
from trl_tract.distill.distill import read_summary
from trl_tract.files.blocks import Shard
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.rows.rendering import as_prompt_completion

TOKENIZER = make_tokenizer()


def scripted(text: str = " my own words [RESULT] 1", **settings: Any) -> CoTSelfDistill:
    return CoTSelfDistill(ScriptedBackend(lambda prompt, seed: text, TOKENIZER), **settings)


def test_the_gold_score_is_attached_and_the_models_own_is_thrown_away(tmp_path):
    # The model writes score 1 behind every rationale; the gold scores are 4 and 2.5 (written as the nearer 2).
    rows = Dataset.from_list(
        [
            {"prompt": "a", "completion": " old [RESULT] 4", "score": 4.0},
            {"prompt": "b", "completion": " old [RESULT] 3", "score": 2.5},
        ]
    )
    distilled = scripted().distill(rows, tmp_path / "out")
    assert distilled["completion"] == [" my own words [RESULT] 4", " my own words [RESULT] 2"]
    assert distilled["score"] == [4.0, 2.5]


def test_columns_are_the_inputs_and_the_provenance(tmp_path):
    rows = Dataset.from_list([{**row, "id": i} for i, row in enumerate(make_rows(3))])
    distilled = scripted().distill(rows, tmp_path / "out")
    assert distilled.column_names == [*rows.column_names, "rationale_source", "finish_reason", "attempts"]
    assert distilled["id"] == [0, 1, 2]
    assert distilled["rationale_source"] == ["self"] * 3


def test_chat_and_messages_rows_keep_their_type(tmp_path):
    chat = Dataset.from_list(make_rows(2, chat=True))
    distilled = scripted("own [RESULT]").distill(chat, tmp_path / "chat")
    assert distilled[0]["completion"][0]["content"].startswith("own [RESULT] ")
    messages = chat.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"]
    )
    distilled = scripted("own [RESULT]").distill(messages, tmp_path / "messages")
    assert [turn["role"] for turn in distilled[0]["messages"]] == ["user", "assistant"]
    assert distilled[0]["messages"][-1]["content"].startswith("own [RESULT] ")


def test_a_conversation_of_from_and_value_is_read_as_one_of_roles(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "old [RESULT] 4"}]
    row = {"conversations": [dict(turn) for turn in turns], "score": 4.0}
    pair = as_prompt_completion(row)
    assert pair["prompt"] == [{"role": "user", "content": "a"}]
    assert pair["completion"] == [{"role": "assistant", "content": "old [RESULT] 4"}]
    assert row["conversations"] == turns
    (done,) = scripted("own [RESULT]").distill(Dataset.from_list([row]), tmp_path / "out")
    assert [turn["from"] for turn in done["conversations"]] == ["human", "gpt"]
    assert done["conversations"][1]["value"] == "own [RESULT] 4"


def test_without_a_score_column_the_gold_score_is_the_one_in_the_completion(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": " old [RESULT] 5"}])
    assert scripted().distill(rows, tmp_path / "out")["completion"] == [" my own words [RESULT] 5"]


def test_ctrl_c_ends_a_double_that_cannot_be_cancelled(tmp_path):
    class Stopped:
        name, model_id, max_calls, tokenizer = "stopped", "stopped", 1, TOKENIZER

        def generate(self, prompts, **settings):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CoTSelfDistill(Stopped()).distill(Dataset.from_list(make_rows(1)), tmp_path / "out")


@pytest.mark.parametrize("name", ["rows.jsonl", "summary.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("")], ids=["deleted", "emptied"])
def test_a_result_that_is_gone_or_empty_is_made_again_from_the_blocks(tmp_path, name, damage):
    rows, again = Dataset.from_list(make_rows(3)), scripted()
    scripted().distill(rows, tmp_path)
    whole = (tmp_path / name).read_bytes()
    damage(tmp_path / name)
    again.distill(rows, tmp_path)
    assert (tmp_path / name).read_bytes() == whole
    assert not again.backend.generate_calls


def test_several_generations_give_several_rows(tmp_path):
    backend = ScriptedBackend(lambda prompt, seed: f" words {seed % 7} [RESULT]", TOKENIZER)
    rows = Dataset.from_list(make_rows(5))
    distilled = CoTSelfDistill(backend, num_generations=3, block_size=2).distill(rows, tmp_path / "out")
    assert distilled["prompt"] == [prompt for prompt in rows["prompt"] for _ in range(3)]
    assert len(set(distilled["completion"][:3])) == 3


class FailsUntil:
    """A script that never reaches the marker in its first `failures` calls for a prompt."""

    def __init__(self, failures: int, text: str = " no marker here") -> None:
        self.failures, self.text = failures, text
        self.calls: dict[str, int] = {}

    def __call__(self, prompt: str, seed: int) -> str:
        self.calls[prompt] = self.calls.get(prompt, 0) + 1
        return self.text if self.calls[prompt] <= self.failures else " good [RESULT]"


def test_a_rationale_without_its_marker_is_sampled_again(tmp_path):
    backend = ScriptedBackend(FailsUntil(2), TOKENIZER)
    distilled = CoTSelfDistill(backend).distill(Dataset.from_list(make_rows(2)), tmp_path / "out")
    assert distilled["attempts"] == [3, 3]
    assert distilled["rationale_source"] == ["self", "self"]


def test_every_attempt_has_a_seed_of_its_own(tmp_path):
    backend = ScriptedBackend(FailsUntil(2), TOKENIZER)
    CoTSelfDistill(backend).distill(Dataset.from_list(make_rows(1)), tmp_path / "out")
    assert len({call["seed"] for call in backend.generate_calls}) == 3


@pytest.mark.parametrize(
    "text", [" no marker here", "[RESULT] 4", "  \n[RESULT] 4"], ids=["no-marker", "empty", "blank"]
)
def test_keep_gold_keeps_the_annotated_rationale_and_counts_it(tmp_path, text):
    rows = Dataset.from_list(make_rows(2))
    backend = ScriptedBackend(FailsUntil(9, text), TOKENIZER)
    distilled = CoTSelfDistill(backend).distill(rows, tmp_path / "out")
    assert distilled["completion"] == rows["completion"]
    assert distilled["rationale_source"] == ["annotated", "annotated"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["annotated"] == 2


def test_drop_leaves_rows_out_and_counts_them(tmp_path):
    script = {row["prompt"]: " good [RESULT]" for row in make_rows(3)}
    script[make_rows(3)[1]["prompt"]] = " never"
    backend = ScriptedBackend(script, TOKENIZER)
    distilled = CoTSelfDistill(backend, on_failure="drop").distill(Dataset.from_list(make_rows(3)), tmp_path / "out")
    assert len(distilled) == 2
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["dropped"] == 1


def test_raise_names_the_row_and_what_to_do(tmp_path):
    backend = ScriptedBackend(FailsUntil(9), TOKENIZER)
    with pytest.raises(RuntimeError, match=r"row 0: .*3 attempts"):
        CoTSelfDistill(backend, on_failure="raise").distill(Dataset.from_list(make_rows(1)), tmp_path / "out")


def test_a_row_without_a_gold_score_stops_before_anything_is_generated(tmp_path):
    rows = [*make_rows(2), {"prompt": "a", "completion": " no score", "score": float("nan")}]
    distiller = scripted()
    with pytest.raises(ValueError, match="row 2 has no gold score"):
        distiller.distill(Dataset.from_list(rows), tmp_path / "out")
    assert distiller.backend.generate_calls == []


REFUSING = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
)


def with_a_system_turn(n: int = 4) -> Dataset:
    """Chat rows, of which row 2 begins with a system turn, which its template refuses."""
    rows = make_rows(n, chat=True)
    rows[2]["prompt"].insert(0, {"role": "system", "content": "You judge."})
    return Dataset.from_list(rows)


def refusing(**settings: Any) -> CoTSelfDistill:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REFUSING
    return CoTSelfDistill(ScriptedBackend(lambda prompt, seed: "own [RESULT]", tokenizer), **settings)


@pytest.mark.parametrize(
    ("on_failure", "sources"), [("keep_gold", ["self", "self", "annotated", "self"]), ("drop", ["self"] * 3)]
)
def test_a_prompt_that_the_template_refuses_fails_alone(tmp_path, on_failure, sources, caplog):
    distilled = refusing(on_failure=on_failure).distill(with_a_system_turn(), tmp_path / "out")
    assert distilled["rationale_source"] == sources
    assert read_summary(tmp_path / "out").failed["prompt refused"] == 1
    assert "row 2" in caplog.text


@pytest.mark.parametrize("settings", [{"on_failure": "raise"}, {}])
def test_refused_prompts_end_a_run_before_it_generates_where_nothing_else_can_come_of_it(tmp_path, settings):
    rows = with_a_system_turn()
    distiller = refusing(**settings)
    with pytest.raises(ValueError, match=r"row [02]"):
        distiller.distill(rows if settings else rows.select([2]), tmp_path / "out")
    assert distiller.backend.generate_calls == []


def test_a_mention_of_the_marker_stays_in_the_rationale(tmp_path):
    row, _ = distil_one(tmp_path, [" i end with [RESULT] and a score. it is short [RESULT] 1"])
    assert row["completion"] == " i end with [RESULT] and a score. it is short [RESULT] 4"
    (trained,) = make_trainer(tmp_path / "stage2", [row], tokenizer=TOKENIZER).train_dataset["score_labels"]
    assert [label for label in trained if label == label] == [4.0]


@pytest.mark.parametrize("text", [" i end with [RESULT] and a score", "<think> so [RESULT] 4"])
def test_a_marker_that_no_score_follows_or_within_a_thought_is_none(tmp_path, text):
    row, summary = distil_one(tmp_path, [text] * 3)
    assert row["rationale_source"] == "annotated"
    assert summary["attempts_failed"]["no marker"] == 3


def test_a_score_within_a_thought_is_a_part_of_the_thought(tmp_path):
    row, _ = distil_one(tmp_path, ["<think> so [RESULT] 2 </think> fine [RESULT] 1"])
    assert row["completion"] == "<think> so [RESULT] 2 </think> fine [RESULT] 4"
    (trained,) = make_trainer(tmp_path / "stage2", [row], tokenizer=TOKENIZER).train_dataset["score_labels"]
    assert [label for label in trained if label == label] == [4.0]


def test_where_every_row_is_dropped_no_rows_come_back(tmp_path):
    backend = ScriptedBackend(lambda prompt, seed: " never", TOKENIZER)
    distilled = CoTSelfDistill(backend, on_failure="drop").distill(Dataset.from_list(make_rows(2)), tmp_path / "out")
    assert len(distilled) == 0
    assert "attempts" in distilled.column_names


def test_another_runs_directory_is_refused(tmp_path):
    rows = Dataset.from_list(make_rows(2))
    scripted().distill(rows, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"temperature: 1.0 there, 0.5 now"):
        scripted(temperature=0.5).distill(rows, tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds the self-distillation of other rows"):
        scripted().distill(Dataset.from_list(make_rows(2, seed=1)), tmp_path / "out")


def test_a_strangers_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis.tex"):
        scripted().distill(Dataset.from_list(make_rows(1)), tmp_path)


def distil_one(tmp_path: Path, texts: list[str], annotated: str = " old [RESULT] 4", **settings: Any) -> Any:
    """The stage-two row and the summary after the model wrote `texts`, one an attempt."""
    rows = Dataset.from_list([{"prompt": "a", "completion": annotated, "score": 4.0}])
    CoTSelfDistill(ScriptedBackend(texts, TOKENIZER), **settings).distill(rows, tmp_path / "out")
    (row,) = read_jsonl(tmp_path / "out" / "rows.jsonl")
    return row, json.loads((tmp_path / "out" / "summary.json").read_text())


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (" no marker", "no marker"),
        (" " + "much too long " * 8, "length"),
        ("[RESULT] 4", "empty"),
        (" it is polite." * 16 + " [RESULT] 4", "repetition"),
        (" so the score is 4. [RESULT] 4", "leak"),
    ],
    ids=lambda value: value if len(value) < 12 else "text",
)
def test_each_failure_is_sampled_again_and_counted(tmp_path, text, failure):
    limit = 40 if failure == "length" else 1024
    row, summary = distil_one(tmp_path, [text, text, " good [RESULT] 1"], max_new_tokens=limit)
    assert row["completion"] == " good [RESULT] 4"
    assert row["attempts"] == 3
    assert summary["attempts_failed"][failure] == 2
    assert sum(summary["attempts_failed"].values()) == 2
    assert summary["resampled"] == 1


def test_a_stated_score_is_no_leak_where_the_annotated_rationale_states_one(tmp_path):
    text = " so the score is 4. [RESULT] 4"
    row, summary = distil_one(tmp_path, [text], annotated=" hence a score of 2. [RESULT] 2")
    assert row["rationale_source"] == "self"
    assert summary["attempts_failed"]["leak"] == 0


def test_leaks_can_be_allowed(tmp_path):
    row, _ = distil_one(tmp_path, [" so the score is 4. [RESULT] 4"], allow_leaks=True)
    assert row["completion"] == " so the score is 4. [RESULT] 4"


def test_a_greedy_rationale_is_not_sampled_again(tmp_path):
    row, _ = distil_one(tmp_path, [" no marker"], temperature=0.0)
    assert row["attempts"] == 1


def test_a_prompt_without_room_is_asked_once(tmp_path):
    backend = ScriptedBackend(lambda prompt, seed: " good [RESULT]", TOKENIZER, context_length=4)
    rows = Dataset.from_list([{"prompt": "far too long for it", "completion": " old [RESULT] 4"}])
    (row,) = CoTSelfDistill(backend).distill(rows, tmp_path / "out")
    assert (row["finish_reason"], row["attempts"], row["rationale_source"]) == ("prompt too long", 1, "annotated")


def test_the_summary_adds_up_and_prints(tmp_path):
    script = {row["prompt"]: " good [RESULT]" for row in make_rows(3)}
    script[make_rows(3)[1]["prompt"]] = " never"
    distiller = CoTSelfDistill(ScriptedBackend(script, TOKENIZER), on_failure="drop", num_generations=2)
    distiller.distill(Dataset.from_list(make_rows(3)), tmp_path / "out")
    summary = read_summary(tmp_path / "out")
    assert (summary.rationales, summary.self_written, summary.annotated, summary.dropped) == (6, 4, 0, 2)
    assert summary.failed["no marker"] == 2
    assert summary.resampled == 2  # the four good ones took one attempt each
    assert summary.attempts_failed["no marker"] == 6
    assert "no marker                      2         6" in str(summary)


def test_a_file_of_rows_gives_the_rows_of_the_dataset(tmp_path):
    rows = make_rows(5)
    write_jsonl(tmp_path / "in.jsonl", rows)
    wanted = scripted().distill(Dataset.from_list(rows), tmp_path / "dataset")
    written = scripted().distill_file(tmp_path / "in.jsonl", tmp_path / "file")
    assert list(read_jsonl(written)) == wanted.to_list()


def test_shards_give_the_rows_of_one_run(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", make_rows(11))
    distil = scripted(block_size=2).distill_file
    wanted = distil(tmp_path / "in.jsonl", tmp_path / "whole")
    assert distil(tmp_path / "in.jsonl", tmp_path / "parts", shard=Shard.parse("2/2")) is None
    written = distil(tmp_path / "in.jsonl", tmp_path / "parts", shard=Shard.parse("1/2"))
    assert written.read_bytes() == wanted.read_bytes()


def test_several_calls_at_once_keep_the_order_of_the_rows(tmp_path):
    rows = Dataset.from_list(make_rows(20))
    wanted = scripted(block_size=2).distill(rows, tmp_path / "one")
    distiller = scripted(block_size=2)
    distiller.backend.max_calls = 5
    assert distiller.distill(rows, tmp_path / "five").to_list() == wanted.to_list()


def test_hostile_rationales_are_kept_unchanged_and_never_scored(tmp_path):
    hostile = [" \x00 nul", " \u202eright to left", " <script>alert(1)</script>", " \x1b[2Jgone", " 5 [RES ULT] 5"]
    rows = Dataset.from_list([{"prompt": text, "completion": " old [RESULT] 2"} for text in hostile])
    backend = ScriptedBackend(lambda prompt, seed: f"{prompt} [RESULT] 5 [RESULT] 5", TOKENIZER)
    distilled = CoTSelfDistill(backend).distill(rows, tmp_path / "out")
    assert distilled["completion"] == [f"{text} [RESULT] 2" for text in hostile]


@pytest.mark.parametrize("value", [datetime.datetime(2024, 5, 1), datetime.date(2024, 5, 1), Decimal("4.00")])
def test_a_column_of_dates_or_decimals_travels(value, tmp_path):
    rows = Dataset.from_list([row | {"extra": value} for row in make_rows(2)])
    assert scripted().distill(rows, tmp_path)["extra"][0] == value


@pytest.mark.parametrize("value", [b"x", datetime.timedelta(seconds=3)])
def test_a_column_that_cannot_be_written_is_refused_before_anything_is_generated(value, tmp_path):
    distiller = scripted()
    with pytest.raises(ValueError, match="row 0: the column extra"):
        distiller.distill(Dataset.from_list([row | {"extra": value} for row in make_rows(2)]), tmp_path)
    assert not distiller.backend.generate_calls


def test_half_a_character_is_its_rows_fault(tmp_path):
    rows = make_rows(3)
    rows[1]["prompt"] += " \ud83d"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    written = scripted().distill_file(tmp_path / "rows.jsonl", tmp_path / "out")
    assert [row["rationale_source"] for row in read_jsonl(written)] == ["self", "annotated", "self"]
