"""Self-distillation: own rationales, gold scores, nothing lost, nothing twice."""

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_rows, make_tokenizer
from datasets import Dataset

from trl_tract import CoTSelfDistill, TransformersBackend
from trl_tract.backends import ScriptedBackend
from trl_tract.journal import Journal, read_jsonl
from trl_tract.prompts import CompletionFormat

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


def test_without_a_score_column_the_gold_score_is_the_one_in_the_completion(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": " old [RESULT] 5"}])
    assert scripted().distill(rows, tmp_path / "out")["completion"] == [" my own words [RESULT] 5"]


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
    with pytest.raises(RuntimeError, match=r"row 0: no rationale reached '\[RESULT\]' in 3 attempts.*max_new_tokens"):
        CoTSelfDistill(backend, on_failure="raise").distill(Dataset.from_list(make_rows(1)), tmp_path / "out")


def test_a_row_without_a_gold_score_stops_before_anything_is_generated(tmp_path):
    rows = [*make_rows(2), {**make_rows(1)[0], "score": float("nan")}]
    distiller = scripted()
    with pytest.raises(ValueError, match="row 2 has no gold score: the score is nan"):
        distiller.distill(Dataset.from_list(rows), tmp_path / "out")
    assert distiller.backend.generate_calls == []


def test_another_runs_directory_is_refused(tmp_path):
    rows = Dataset.from_list(make_rows(2))
    scripted().distill(rows, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"another self-distillation \(temperature: 1.0 there, 0.5 now\)"):
        scripted(temperature=0.5).distill(rows, tmp_path / "out")
    with pytest.raises(FileExistsError, match="rows_digest"):
        scripted().distill(Dataset.from_list(make_rows(2, seed=1)), tmp_path / "out")


def test_a_strangers_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"already holds thesis.tex.*empty output directory"):
        scripted().distill(Dataset.from_list(make_rows(1)), tmp_path)


def test_a_full_disk_keeps_what_was_written_and_says_how_to_go_on(tmp_path, monkeypatch):
    rows = Dataset.from_list(make_rows(6))
    wanted = scripted(block_size=2).distill(rows, tmp_path / "whole")
    real = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device after 4 records.*start the same command again"):
        scripted(block_size=2).distill(rows, tmp_path / "out")
    monkeypatch.undo()
    assert scripted(block_size=2).distill(rows, tmp_path / "out")["completion"] == wanted["completion"]


def real_distiller() -> CoTSelfDistill:
    # A random model never writes the marker, so the letter "e" stands in for it.
    backend = TransformersBackend(make_model(), TOKENIZER, batch_size=4)
    form = CompletionFormat("e", lead="", separator=" ")
    return CoTSelfDistill(
        backend, completion_format=form, max_new_tokens=24, block_size=4, max_attempts=2, on_failure="keep_gold"
    )


def test_a_run_killed_anywhere_ends_with_the_same_bytes(tmp_path):
    rows = Dataset.from_list(make_rows(11))
    real_distiller().distill(rows, tmp_path / "whole")
    whole = (tmp_path / "whole" / "rationales.jsonl").read_bytes()
    sources = {row["rationale_source"] for row in read_jsonl(tmp_path / "whole" / "rows.jsonl")}
    assert sources == {"self", "annotated"}  # both ways out of a block are passed through
    for cut in random.Random(0).sample(range(len(whole)), 6):
        out = tmp_path / f"cut-{cut}"
        out.mkdir()
        for name in ("settings.json",):
            (out / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        (out / "rationales.jsonl").write_bytes(whole[:cut])
        real_distiller().distill(rows, out)
        assert (out / "rationales.jsonl").read_bytes() == whole, cut


def test_a_journal_takes_an_unfinished_block_back(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", block=2)
    journal.append([{"i": 0}, {"i": 1}])
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"i": 2}\n{"i": 3')
    assert [record["i"] for record in Journal(tmp_path / "j.jsonl", block=2)] == [0, 1]


HOSTILE = [
    "\x00nul",
    "line\nbreak\r\n",
    "\u2028separator\u2029",
    "\u202eright to left",
    "<script>",
    "\U0001f600",
    "\x1b[2J",
]


def test_hostile_text_is_stored_and_read_back_unchanged(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", block=1)
    journal.append([{"text": text} for text in HOSTILE])
    assert [record["text"] for record in Journal(tmp_path / "j.jsonl", block=1)] == HOSTILE


def test_a_broken_line_is_named(tmp_path):
    file = Path(tmp_path / "rows.jsonl")
    file.write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not JSON"):
        list(read_jsonl(file))
