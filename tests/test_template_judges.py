"""On every chat template a judge is asked, distilled and trained with one and the same tokens.

A model that knows four rows by heart stands for a trained one: it goes on as a training row does, and knows nothing
behind any other beginning.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from template_tokenizers import TEMPLATES, template_tokenizer
from test_templates import FAMILIES, modes

from trl_tract import CoTRAILJudge, CoTSelfDistill
from trl_tract.backends import Backend, Generation, ScriptedBackend
from trl_tract.backends.stop_text import Ending
from trl_tract.rows.dataset import find_scales
from trl_tract.rows.encoding import RowEncoder
from trl_tract.rows.rendering import settled
from trl_tract.rows.template import Template, TemplateSettings
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import read_scales

GOLDS = [4, 1, 2, 5]
SAID = ["polite and short", "wrong", "clear but long", "correct, it names a source"]
CASES = [
    pytest.param(name, mode, marks=() if name in FAMILIES else pytest.mark.slow)
    for name in TEMPLATES
    for mode in modes(name)
]


def rows_of(thinking: bool = False) -> list[dict[str, Any]]:
    rows = []
    for gold, said in zip(GOLDS, SAID, strict=True):
        rationale = f"<think>\nThe reply is {said}.\n</think>\n\n" if thinking else f"The reply is {said}. "
        answer = {"role": "assistant", "content": f"{rationale}[RESULT] {gold}"}
        rows.append({"prompt": [{"role": "user", "content": f"Judge: {said[:4]}. [RESULT] 3"}], "completion": [answer]})
    return rows


class ByHeart(Backend):
    """Knows training rows: behind the beginning of one it goes on as that one does, and behind others it is lost."""

    name = model_id = "by heart"
    max_calls = 1

    def __init__(self, tokenizer: Any, rows: list[list[int]]) -> None:
        self.tokenizer, self.rows = tokenizer, rows

    def _rest(self, ids: list[int]) -> list[int]:
        return next((row[len(ids) :] for row in self.rows if row[: len(ids)] == list(ids)), [])

    def generate(self, prompts: Any, *, n: int = 1, stop: Any = None, **_: Any) -> list[list[Generation]]:
        ending = Ending(self.tokenizer, stop)
        return [[ending.finish(self._rest(prompt), at_eos=False)] * n for prompt in prompts]

    def next_token_logprobs(self, token_id_lists: Any, token_ids: Any) -> Any:
        following = [self._rest(ids)[:1] for ids in token_id_lists]
        known = [[math.log(0.96) if [token] == one else math.log(0.01) for token in token_ids] for one in following]
        return np.array(known)


def trained_on(tokenizer: Any, rows: list[dict[str, Any]], mode: str) -> tuple[JudgeConfig, list[list[int]]]:
    """What training makes of rows: what is saved beside the model, and the tokens."""
    settings = settled(tokenizer, TemplateSettings(thinking=mode), rows)  # type: ignore[arg-type]
    scales = find_scales(Template(tokenizer, settings), rows, read_scales({}))
    encoder = RowEncoder(scales, None, tokenizer=tokenizer, settings=settings)
    encoded = [encoder(row) for row in rows]
    assert not any(each["refusal_kind"] for each in encoded)
    return JudgeConfig(scales, template=settings), [each["input_ids"] for each in encoded]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_judge_that_knows_its_rows_by_heart_gives_their_gold_scores(name: str, mode: str, tmp_path: Path) -> None:
    tokenizer = template_tokenizer(name)
    config, ids = trained_on(tokenizer, rows_of(), mode)
    config.save(tmp_path)
    judge = CoTRAILJudge.from_pretrained(tmp_path, ByHeart(tokenizer, ids), temperature=0)
    judged = judge.judge([{"prompt": row["prompt"]} for row in rows_of()])
    assert [each.error for each in judged] == [None] * 4
    # Where a template writes a space before an answer, the judge writes it.
    assert [[text.lstrip(" ") for text in each.rationales] for each in judged] == [
        [f"The reply is {said}."] for said in SAID
    ]
    np.testing.assert_allclose([each.score for each in judged], GOLDS, atol=0.15)
    assert min(each.grid_mass for each in judged) > 0.9


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_self_distilled_rows_train_on_the_tokens_of_the_rows_that_were_taught(
    name: str, mode: str, tmp_path: Path
) -> None:
    check_distilled_rows(template_tokenizer(name), mode, tmp_path)


def check_distilled_rows(tokenizer: Any, mode: str, tmp_path: Path) -> None:
    rows = rows_of(thinking=mode == "rationale")
    config, ids = trained_on(tokenizer, rows, "auto")
    assert config.template.thinking == mode
    config.save(tmp_path)
    distiller = CoTSelfDistill.from_pretrained(tmp_path, ByHeart(tokenizer, ids), temperature=0)
    written = distiller.distill(Dataset.from_list(rows), tmp_path / "written")
    assert written["rationale_source"] == ["self"] * 4
    again = [{key: row[key] for key in ("prompt", "completion")} for row in written]
    assert trained_on(tokenizer, again, "auto") == (config, ids)


def test_a_rows_own_variables_and_tools_count_wherever_it_is_asked(tmp_path: Path) -> None:
    tokenizer = template_tokenizer("qwen3_8")
    rows = [row | {"chat_template_kwargs": None, "tools": None} for row in rows_of(thinking=True)]
    rows[1]["chat_template_kwargs"] = {"reasoning_effort": "low"}
    rows[2]["tools"] = json.dumps([{"type": "function", "function": {"name": "look_up", "parameters": {}}}])
    config, ids = trained_on(tokenizer, rows, "rationale")
    without = trained_on(tokenizer, rows_of(thinking=True), "rationale")[1]
    assert [own != plain for own, plain in zip(ids, without, strict=True)] == [False, True, True, False]
    config.save(tmp_path)
    by_heart = ByHeart(tokenizer, ids)
    items = [{key: value for key, value in row.items() if key != "completion"} for row in rows]
    judged = CoTRAILJudge.from_pretrained(tmp_path, by_heart, temperature=0).judge(items)
    np.testing.assert_allclose([each.score for each in judged], GOLDS, atol=0.15)
    distiller = CoTSelfDistill.from_pretrained(tmp_path, by_heart, temperature=0)
    written = distiller.distill(Dataset.from_list(rows), tmp_path / "written")
    assert written["rationale_source"] == ["self"] * 4
    assert trained_on(tokenizer, list(written), "rationale") == (config, ids)


def test_each_item_is_sampled_again_by_its_own_way_of_thinking() -> None:
    source = (
        "{% set tag = tag or 'think' %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "<{{ tag }}>\n{{ m.reasoning_content }}\n</{{ tag }}>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<{{ tag }}>\n{% endif %}"
    )
    tokenizer = template_tokenizer("qwen3", source)

    def script(asked: str, seed: int) -> str:
        return f"It is polite.</{asked.rpartition('<')[2].strip()[:-1]}> [RESULT] 4"

    backend = ScriptedBackend(script, tokenizer, probs=[0, 0, 0, 1, 0])
    judge = CoTRAILJudge(backend, thinking="rationale")
    prompt = [{"role": "user", "content": "Judge."}]
    tagged = [{"prompt": prompt, "chat_template_kwargs": {"tag": tag}} for tag in ("seed:think", "think")]
    judged = judge.judge(tagged)
    assert [(each.score, each.error, each.rationales) for each in judged] == [(4.0, None, ["It is polite."])] * 2
    assert len(backend.generate_calls) == 1
