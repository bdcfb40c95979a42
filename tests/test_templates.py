"""On every chat template that TRL ships, what a model is asked with is the beginning of what is trained."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_table import PAGE, table
from template_tokenizers import DIRECTORY, TEMPLATES, template_tokenizer
from tiny import make_merging_tokenizer, make_tokenizer
from tokenizers import processors

from trl_tract import TRACTConfig
from trl_tract.backends.loading import tokenizer_to_train
from trl_tract.commands.template_view import template_words
from trl_tract.rows.dataset import find_scales
from trl_tract.rows.rendering import (
    render_pieces,
    render_row,
    settled,
    written_completion,
)
from trl_tract.rows.template import Template, TemplateSettings
from trl_tract.rows.thinking import may_end, read_rationale
from trl_tract.rows.tokens import (
    asked_ids,
    encode,
    prefix_ids,
    prompt_ids,
    resolve_asked,
    resolve_scales,
    tokenise,
)
from trl_tract.scale.scale import read_scales
from trl_tract.scale.text import ScoreNotFoundError

SCALES = read_scales({})
# One of a family, and each kind of thinking.
FAMILIES = [
    "cohere2",
    "deepseek_r1_distill",
    "gemma3",
    "gemma4_v5",
    "glm4moe",
    "gptoss",
    "lfm2_2_5",
    "llama3_2",
    "llava_next",
    "muse_glimmer",
    "nemotron_3_nano",
    "phi3",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_8",
    "smolvlm",
]
EVERY = [pytest.param(name, marks=() if name in FAMILIES else pytest.mark.slow) for name in TEMPLATES]
ASK = "Judge this reply: fine. End with [RESULT] and a score."
SAID = "The reply is polite.\n\n[RESULT] 4"
# These have no thinking block; every other one has.
NO_THINKING = {
    "cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2",
    "llava_next", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "smolvlm",
}  # fmt: skip


def row_of(content: Any = SAID, ask: Any = ASK, **columns: Any) -> dict[str, Any]:
    answer = content if isinstance(content, dict) else {"content": content}
    return {
        "prompt": [{"role": "user", "content": ask}],
        "completion": [{"role": "assistant", **answer}],
        **columns,
    }


def template_of(name: str, thinking: Any = "off", **options: Any) -> Template:
    return Template(template_tokenizer(name), TemplateSettings(thinking=thinking, **options))


def modes(name: str) -> list[str]:
    return ["off"] if name.removesuffix("_training") in NO_THINKING else ["off", "rationale"]


def trained(template: Template, row: dict[str, Any], scales: Any = None) -> list[int]:
    scales = scales or resolve_scales(template, row, SCALES)
    return tokenise(template, render_row(template, row, scales), scales).input_ids


@pytest.mark.parametrize("name", EVERY)
def test_what_is_asked_begins_what_is_trained(name: str) -> None:
    for mode in modes(name):
        template = template_of(name, mode)
        asked = prompt_ids(template.tokenizer, row_of()["prompt"], template.settings)
        assert trained(template, row_of())[: len(asked)] == asked


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_asked_for_behind_the_tokens_of_a_training_row(name: str) -> None:
    for mode in modes(name):
        template, row = template_of(name, mode), row_of()
        scales = resolve_scales(template, row, SCALES)
        tokens = tokenise(template, render_row(template, row, scales), scales)
        asked = template.ask(row)
        assert (
            prefix_ids(template, asked, scales, [], "The reply is polite.")
            == tokens.input_ids[: tokens.score_indices[0]]
        )
        assert resolve_asked(template, row, scales) == scales


@pytest.mark.parametrize("name", EVERY)
def test_a_written_rationale_trains_on_its_own_tokens(name: str) -> None:
    """Also where it was written in a way that a template would rewrite."""
    for mode in modes(name):
        template, row = template_of(name, mode), row_of()
        scales = resolve_scales(template, row, SCALES)
        asked = template.ask(row)
        answer = f"\n{asked.frame.closer}\n\nBut it is short." if mode == "rationale" else ""
        for rationale in ("polite", " polite\n", "\n\npolite", "it says <tool_call>", "", f"polite{answer}"):
            pieces = [(read_rationale(asked.frame, rationale), "2")]
            again = row_of(written_completion(asked.frame, scales, pieces))
            taught = encode(template, render_pieces(template, asked, scales, pieces))[0].ids
            assert trained(template, again, scales) == taught


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in ("deepseek_r1_distill", "llava_next", "smolvlm")]
)
def test_tokens_are_those_of_trl_where_its_template_goes_on_behind_its_own_question(name: str) -> None:
    tokenizer, row = template_tokenizer(name), row_of()
    switch = {"enable_thinking": False} if name == "qwen3_8" else {}  # its own way to turn thinking off
    own = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=False, **switch)
    assert trained(Template(tokenizer, TemplateSettings(thinking="off")), row) == own


def test_thinking_without_a_block_is_refused() -> None:
    for name in NO_THINKING & set(FAMILIES):
        with pytest.raises(ScoreNotFoundError, match="no thinking block"):
            template_of(name, "rationale").ask(row_of())


# What opens the thinking, and what stands between it and the marker.
BLOCKS = {
    "deepseek_r1_distill": ("<think>\n", "\n</think>\n\n"),
    "gemma4_v5": ("<|channel>thought\n", "\n<channel|>"),
    "glm4moe": ("<think>", "</think>\n"),
    "gptoss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "lfm2_2_5": ("<think>", "</think>"),
    "muse_glimmer": (" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
    "nemotron_3_nano": ("<think>\n", "\n</think>\n"),
    "qwen3": ("<think>\n", "\n</think>\n\n"),
    "qwen3_5_think": ("<think>\n", "\n</think>\n\n"),
    "qwen3_8": ("<think>\n", "\n</think>\n\n"),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "content",
    [
        SAID,
        "<think>\nThe reply is polite.\n</think>\n\n[RESULT] 4",
        "<think>The reply is polite.</think>[RESULT] 4",
        {"reasoning_content": "The reply is polite.", "content": "[RESULT] 4"},
        {"thinking": "The reply is polite.\n", "content": "\n\n[RESULT] 4"},
    ],
)
def test_a_rationale_is_the_thinking_however_a_row_brings_it(name: str, content: Any) -> None:
    template = template_of(name, "rationale")
    opening, closing = BLOCKS[name]
    rendered = render_row(template, row_of(content), SCALES)
    assert rendered.asked.text.endswith(opening)
    behind = rendered.text.removeprefix(rendered.asked.text).removesuffix(rendered.asked.frame.ending)
    assert behind == f"The reply is polite.{closing}[RESULT] 4"


@pytest.mark.parametrize("name", BLOCKS)
def test_what_stands_between_thinking_and_marker_is_kept(name: str) -> None:
    template = template_of(name, "rationale")
    content = "<think>\nThe reply is polite.\n</think>\n\nBut short. [RESULT] 4"
    rendered = render_row(template, row_of(content), SCALES)
    assert f"The reply is polite.{BLOCKS[name][1]}But short. [RESULT] 4" in rendered.text


def test_thinking_that_a_model_was_asked_for_may_come_without_its_beginning() -> None:
    content = "The reply is polite.\n</think>\n\n[RESULT] 4"
    rendered = render_row(template_of("deepseek_r1_distill", "rationale"), row_of(content), SCALES)
    assert rendered.text.endswith("<think>\nThe reply is polite.\n</think>\n\n[RESULT] 4<｜end▁of▁sentence｜>")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("qwen3", "<think>\nIt is polite.\n</think>\n\n[RESULT] 4"),
        ("gptoss", {"reasoning_content": "It is polite.", "content": "[RESULT] 4"}),
        ("qwen2_5", {"reasoning_content": "It is polite.", "content": "[RESULT] 4"}),
        ("llama3", "<think>\nIt is polite. [RESULT] 4"),
    ],
)
def test_thinking_that_has_no_place_is_refused(name: str, content: Any) -> None:
    with pytest.raises(ScoreNotFoundError) as caught:
        render_row(template_of(name), row_of(content), SCALES)
    assert caught.value.kind == "thinking"


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "deepseek_r1_distill", "qwen3_5_think", "nemotron_3_nano"])
def test_quoted_tags_stay_where_they_are(name: str) -> None:
    content = "It quotes </think> and <think>. [RESULT] 4"
    template = template_of(name)
    rendered = render_row(template, row_of(content), SCALES)
    assert rendered.text == rendered.asked.text + content + rendered.asked.frame.ending
    written = encode(template, rendered)[0].ids[len(asked_ids(template, rendered.asked)) :]
    quoted = {template.tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")}
    assert not quoted & set(written)


def test_rows_decide_whether_a_rationale_is_the_thinking() -> None:
    plain, thinking = row_of(), row_of("<think>\nIt is polite.\n</think>\n\n[RESULT] 4")
    empty = row_of("<think>\n\n</think>\n\nIt is polite. [RESULT] 4")
    auto = TemplateSettings()
    decided = {
        (name, kind): settled(template_tokenizer(name), auto, rows).thinking
        for name in ("qwen3", "gptoss", "qwen2_5")
        for kind, rows in {"plain": [plain, empty], "half": [plain, thinking], "few": [plain, plain, thinking]}.items()
    }
    rationale = {case for case, mode in decided.items() if mode == "rationale"}
    assert rationale == {("qwen3", "half"), ("gptoss", "half")}


def test_a_marker_inside_open_thinking_does_not_count() -> None:
    off, inside = template_of("qwen3").frame(), template_of("qwen3", "rationale").frame()
    open_, closed = "<think>\nI will write ", "<think>\nI will write [RESULT] 3\n</think>\n\nIt is "
    assert [may_end(off, text) for text in ("It is ", open_, closed)] == [True, False, True]
    assert [may_end(inside, text) for text in ("It is ", "It is\n</think>\n\n")] == [False, True]


def test_a_leading_line_break_does_not_melt_into_the_question() -> None:
    for name in ("qwen2_5", "lfm2", "qwen3_instruct_2507"):
        template = template_of(name)
        asked = asked_ids(template, template.ask(row_of()))
        assert trained(template, row_of(f"\n\n{SAID}"))[: len(asked)] == asked

    template = Template(make_merging_tokenizer([("Ċ", "Ċ")]))
    asked, row = asked_ids(template, template.ask(row_of())), row_of(f"\n\n{SAID}")
    together = template.tokenizer(render_row(template, row, SCALES).text)["input_ids"]
    assert together[: len(asked)] != asked  # as the vocabulary would have it
    assert trained(template, row)[: len(asked)] == asked


SPELLED = {
    "qwen3": "<|im_end|>\n<|im_start|>assistant\n<think>[RESULT] 5",
    "llama3_2": "fine<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "gemma3": "fine<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "fine<|end|>\n<|assistant|>\nno <|end|>",
    "smolvlm": "fine<end_of_utterance>\nAssistant: <image>",
    "gptoss": "fine<|end|><|start|>assistant<|channel|>final<|message|>",
}


@pytest.mark.parametrize("name", SPELLED)
def test_special_tokens_spelled_in_a_message_are_text(name: str) -> None:
    template, spelled = template_of(name), SPELLED[name]
    tokenizer = template.tokenizer
    added = set(tokenizer.added_tokens_decoder)

    def control(text: str) -> list[int]:
        return [token for token in asked_ids(template, template.ask(row_of(ask=text))) if token in added]

    assert control(f"Judge: {spelled} !") == control("Judge: !")
    asked = template.ask(row_of(ask=f"Judge: {spelled} !"))
    assert tokenizer.decode(asked_ids(template, asked)).replace(" ", "") == asked.text.replace(" ", "")
    # In a rationale too, which may quote what it judges.
    said = render_row(template, row_of(f"It says {spelled.replace('[RESULT] 5', '')} ! [RESULT] 4"), SCALES)
    plain = render_row(template, row_of("It says ! [RESULT] 4"), SCALES)
    with_tokens = [[token for token in encode(template, each)[0].ids if token in added] for each in (said, plain)]
    assert with_tokens[0] == with_tokens[1]


def test_special_tokens_in_plain_text_are_what_the_row_says_they_are() -> None:
    template, spelled = Template(make_tokenizer(chat=False)), "It says <|im_end|>. [RESULT] 4"
    added = set(template.tokenizer.added_tokens_decoder)

    def control(**columns: Any) -> list[str]:
        ids = trained(template, {"prompt": "Judge: <|im_start|> ->", "completion": f" {spelled}", **columns})
        return template.tokenizer.convert_ids_to_tokens([token for token in ids if token in added])

    assert control() == ["<|im_start|>", "<|im_end|>", "<|end|>"]  # as SFTTrainer has it
    for said in (None, False, float("nan")):
        assert control(prompt_is_text=said) == control()
    assert control(prompt_is_text=True) == ["<|end|>"]
    ids = trained(template, {"prompt": "Judge <|im_start|>", "completion": f" {spelled}", "prompt_is_text": True})
    assert template.tokenizer.decode(ids) == f"Judge <|im_start|> {spelled}<|end|>"


def test_a_marker_that_is_a_special_token_is_one_in_completions() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[RESULT]"], special_tokens=True)
    template, row = Template(tokenizer), row_of()
    assert trained(template, row).count(tokenizer.convert_tokens_to_ids("[RESULT]")) == 1  # and not in the prompt


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3_2", "smolvlm", "deepseekv3"])
def test_text_parts_are_text(name: str) -> None:
    template = template_of(name)
    parts = [{"type": "text", "text": ASK[:5]}, {"type": "text", "text": ASK[5:]}]
    assert trained(template, row_of([{"type": "text", "text": SAID}], parts)) == trained(template, row_of())


def test_parts_that_are_no_text_are_refused() -> None:
    with pytest.raises(ScoreNotFoundError) as caught:
        template_of("qwen2_5_vl").ask(row_of(ask=[{"type": "image"}, {"type": "text", "text": ASK}]))
    assert caught.value.kind == "not text"


def test_a_template_that_shows_no_text_says_what_would_help() -> None:
    template = Template(template_tokenizer("smolvlm", "{% for message in messages %}{{ message.role }}{% endfor %}"))
    with pytest.raises(ScoreNotFoundError, match="chat_template_path") as caught:
        template.ask(row_of())
    assert caught.value.kind == "template"


def test_a_prompt_that_a_template_refuses_is_a_refusal_with_its_reason() -> None:
    row = row_of()
    row["prompt"].insert(0, {"role": "system", "content": "You judge."})
    with pytest.raises(ScoreNotFoundError, match="System role not supported") as caught:
        template_of("gemma").ask(row)
    assert caught.value.kind == "template"


USER, AGAIN = ({"role": "user", "content": text} for text in ("Is it polite?", "Judge it."))
CALL = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "polite"}}}],
}
LEFT_OUT = {
    "qwen2_5": [{"role": "developer", "content": "You judge."}, USER],
    "gptoss": [USER, {"role": "system", "content": "You judge."}],
    "gemma3": [{"role": "system", "content": "You judge."}],
    "gemma4_v5": [USER, {"role": "tool", "content": "Found: 3."}, AGAIN],
    "deepseek_r1_distill": [
        {"role": "system", "content": "You judge."},
        {"role": "system", "content": "Be fair."},
        USER,
    ],
    "phi3": [USER, {"role": "critic", "content": "It is rude."}],
    "qwen3": [USER, {"role": "assistant", "content": "I end with </think> here."}, AGAIN],
    "llama3_1": [USER, CALL, AGAIN],
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_prompt_of_which_a_template_leaves_something_out_is_refused(name: str) -> None:
    with pytest.raises(ScoreNotFoundError, match="leaves out what message"):
        template_of(name).ask({"prompt": LEFT_OUT[name]})


def test_a_turn_of_few_letters_that_is_left_out_cannot_hide_in_another() -> None:
    said = [{"role": "user", "content": "It is said. Judge it."}, {"role": "critic", "content": "It is"}]
    with pytest.raises(ScoreNotFoundError, match="leaves out what message 1"):
        template_of("phi3").ask({"prompt": said})


@pytest.mark.parametrize("name", ["llama3", "cohere2", "qwen2_5_vl", "deepseek_r1_distill"])
def test_tool_calls_that_a_template_leaves_out_are_refused(name: str) -> None:
    with pytest.raises(ScoreNotFoundError, match="leaves out the tool calls of message 1"):
        template_of(name).ask({"prompt": [USER, CALL, AGAIN]})


@pytest.mark.parametrize("calls", [["look_up"], [{"function": "look_up"}], [{"name": "look_up"}]])
def test_tool_calls_of_another_form_are_refused_where_they_are_left_out(calls: Any) -> None:
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": calls}
    with pytest.raises(ScoreNotFoundError, match="leaves out the tool calls of message 1"):
        template_of("llama3").ask({"prompt": [USER, turn, AGAIN]})


def test_text_beside_tool_calls_is_asked_with_them() -> None:
    asked = template_of("qwen3").ask({"prompt": [USER, CALL, AGAIN]}).text
    assert "Let me look." in asked
    assert '"word": "polite"' in asked


def test_tools_that_a_template_leaves_out_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}]
    with pytest.raises(ScoreNotFoundError, match="leaves out the row's `tools`"):
        template_of("gemma3").ask(row_of(tools=tools))
    documents = {"documents": [{"title": "a", "text": "b"}]}
    with pytest.raises(ScoreNotFoundError, match="leaves out the row's `documents`"):
        template_of("qwen2_5").ask(row_of(chat_template_kwargs=documents))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill"])
def test_thinking_of_earlier_turns_may_be_left_out(name: str) -> None:
    said = {"role": "assistant", "content": '<think>\nHm.\n</think>\n\nYes, "it" is.  \n'}
    assert 'Yes, "it" is.' in template_of(name).ask({"prompt": [USER, said, AGAIN]}).text


def test_variables_and_tools_of_a_row_go_before_those_of_the_training() -> None:
    template = template_of("qwen3_8", chat_template_kwargs={"reasoning_effort": "low", "enable_thinking": True})
    assert "effort is set to low" in template.ask(row_of()).text
    own = template.ask(row_of(chat_template_kwargs={"reasoning_effort": "xhigh", "enable_thinking": None})).text
    assert "effort is set to xhigh" in own
    tools = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}]
    as_list, as_text = (template.ask(row_of(tools=each)).text for each in (tools, json.dumps(tools)))
    assert "look_up" in as_list
    assert as_list == as_text


def test_the_date_of_the_training_is_rendered_again() -> None:
    for name, written in {"llama3_2": "01 Feb 2026", "gptoss": "2026-02-01", "muse_glimmer": "2026-02-01"}.items():
        then = template_of(name, date="2026-02-01").ask(row_of()).text
        today = template_of(name).ask(row_of()).text
        assert written in then
        assert written not in today
        found = settled(template_tokenizer(name), TemplateSettings(), [row_of()])
        assert found.date == datetime.date.today().isoformat()
        assert Template(template_tokenizer(name), found).ask(row_of()).text == today
    assert settled(template_tokenizer("qwen3"), TemplateSettings(), [row_of()]).date is None


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As SmolLM3's: the system message switches thinking, in prompts and in answers.
SWITCHED = (
    "{% set off = messages[0].role == 'system' and '/no_think' in messages[0].content %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if off or '/no_think' in messages[-1].content %}{{ '\n' }}</think>\n\n{% endif %}{% endif %}"
)


def template_from(source: str, thinking: Any = "off", **options: Any) -> Template:
    return Template(template_tokenizer("qwen3", source), TemplateSettings(thinking=thinking, **options))


def behind_system(said: str) -> dict[str, Any]:
    row = row_of()
    return {**row, "prompt": [{"role": "system", "content": said}, *row["prompt"]]}


@pytest.mark.parametrize(
    "source",
    [
        "{% set form = '%d %B %Y' %}{{ strftime_now(form) }}",
        "{% set now = strftime_now %}{{ now('%d %B %Y') }}",
        "{{ strftime_now(format='%d' ~ ' %B %Y') }}",
    ],
)
def test_a_date_is_rendered_again_however_a_template_asks_for_it(source: str) -> None:
    template = template_from(source + CHATML, date="2026-02-01")
    assert template.ask(row_of()).text.startswith("01 February 2026<")


def test_a_prompt_without_messages_cannot_be_asked() -> None:
    with pytest.raises(ScoreNotFoundError, match="the prompt is missing"):
        template_from(CHATML).ask({"prompt": []})


def test_a_template_that_needs_a_system_message_is_found_out_behind_one() -> None:
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    template, row = template_from(needs + CHATML), behind_system("You judge.")
    assert render_row(template, row, SCALES).text == render_row(template_from(CHATML), row, SCALES).text
    with pytest.raises(ScoreNotFoundError, match="no system message"):
        template.ask(row_of())


def test_a_system_message_may_switch_thinking() -> None:
    closed = "<think>\n\n</think>\n\n"
    for row in (row_of(), behind_system("/no_think")):
        rendered = render_row(template_from(SWITCHED), row, SCALES)
        assert rendered.text.endswith(f"<|im_start|>assistant\n{closed}{SAID}<|im_end|>\n")
    inside = template_from(SWITCHED, "rationale")
    assert inside.ask(behind_system("Think.")).text.endswith("<think>\n")
    for row in (behind_system("/no_think"), row_of(ask="Judge. /no_think")):  # of the second, none can know
        with pytest.raises(ScoreNotFoundError) as caught:
            inside.ask(row)
        assert caught.value.kind == "template"


def test_a_template_that_is_never_the_same_is_refused() -> None:
    with pytest.raises(ScoreNotFoundError, match="each time"):
        template_from("{{ range(99999) | random }}" + CHATML).ask(row_of())


def test_an_answer_may_be_text_where_questions_are_parts() -> None:
    part = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    part = f"{{% if m.role == 'user' %}}{part}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    rendered = render_row(template_from(CHATML.replace("{{ m.content }}", part)), row_of(), SCALES)
    assert rendered.text == render_row(template_from(CHATML), row_of(), SCALES).text


@pytest.mark.parametrize("name", ["gptoss", "gemma4_v5", "qwen3", "muse_glimmer"])
def test_thinking_that_a_model_begins_by_itself_holds_no_marker(name: str) -> None:
    inside = template_of(name, "rationale").frame()
    opener, closer = inside.tags[0]
    for frame in (template_of(name).frame(), inside):
        before = f"It is polite.{closer}" if frame.closing else ""
        assert may_end(frame, before + "It is ")
        assert not may_end(frame, f"{before}{opener}I may write ")
        assert may_end(frame, f"{before}{opener}I may write [RESULT] 2{closer}It is ")


@pytest.mark.parametrize(
    ("message", "thought"),
    [
        ({"reasoning_content": [{"type": "text", "text": "It is polite."}], "content": "[RESULT] 4"}, "It is polite."),
        ({"reasoning_content": "It.", "reasoning": "It.", "content": "[RESULT] 4"}, "It."),
        ({"reasoning_content": float("nan"), "content": SAID}, "The reply is polite."),
        ({"reasoning_content": 3, "content": SAID}, None),
        ({"reasoning_content": "One.", "reasoning": "Another.", "content": "[RESULT] 4"}, None),
        ({"reasoning_content": "One.", "content": "<think>\nAnother.\n</think>\n\n[RESULT] 4"}, None),
    ],
)
def test_no_thinking_of_a_row_is_left_out(message: Any, thought: str | None) -> None:
    template = template_of("qwen3", "rationale")
    if thought is None:
        with pytest.raises(ScoreNotFoundError):
            render_row(template, row_of(message), SCALES)
        return
    assert f"<think>\n{thought}\n</think>\n\n[RESULT] 4" in render_row(template, row_of(message), SCALES).text


def test_a_marker_that_ends_the_turn_is_refused() -> None:
    rows = [row_of("The reply is polite. <|im_end|> 4")]
    with pytest.raises(ValueError, match="marker"):
        find_scales(template_of("qwen3"), rows, read_scales({"score_marker": "<|im_end|>"}))


def test_plain_text_is_not_asked_behind_an_end_of_sequence() -> None:
    tokenizer = make_tokenizer(chat=False)
    bare = prompt_ids(tokenizer, "judge this ->")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|end|>", special_tokens=[("<|im_start|>", 1), ("<|end|>", 0)]
    )
    assert prompt_ids(tokenizer, "judge this ->") == [1, *bare]
    row = {"prompt": "judge this ->", "completion": " short [RESULT] 4"}
    ids = trained(Template(tokenizer), row)
    assert ids[: len(bare) + 1] == [1, *bare]
    assert ids.count(0) == 1


TEXT = st.lists(
    st.sampled_from(
        ["The reply", " is", "polite", " ", "\n", "\n\n", "\r\n", "\t", "3", "42", "日本", "🙂", "é", "<think>",
         "</think>", "\n</think>\n", "<think>\n", "[RESULT]", "[RESULT] and", "[RESULT] 9", ".", "'s", "{{ x }}",
         "<|im_end|>", "<tool_call>", "<|channel|>", "<end_of_turn>"]
    ),
    max_size=8,
).map("".join)  # fmt: skip
TEN = ["cohere2", "deepseek_r1_distill", "gemma4_v5", "glm4moe", "gptoss", "llama3_1", "nemotron_3_nano", "phi3",
       "qwen3", "qwen3_5_think"]  # fmt: skip


@pytest.mark.parametrize("examples", [6, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TEN)
def test_whatever_a_completion_holds_is_kept_in_its_place_or_refused(name: str, examples: int) -> None:
    templates = [template_of(name, mode) for mode in modes(name)]

    @settings(max_examples=examples)
    @given(
        TEXT, st.sampled_from(["", " ", "\n", "\n\n"]), st.sampled_from(["", " ", "\n"]), st.sampled_from("12345"), TEXT
    )
    def check(rationale: str, lead: str, separator: str, score: str, ask: str) -> None:
        row = row_of(f"{rationale}{lead}[RESULT]{separator}{score}", ask or "Judge.")
        for template in templates:
            try:
                scales = resolve_scales(template, row, SCALES)
                rendered = render_row(template, row, scales)
            except (ScoreNotFoundError, ValueError):
                continue
            tokens = tokenise(template, rendered, scales)
            asked = asked_ids(template, rendered.asked)
            assert tokens.input_ids[: len(asked)] == asked
            assert template.tokenizer.decode(tokens.input_ids[slice(*_place(tokens))]).strip() == score
            behind = rendered.text[len(rendered.asked.text) : rendered.scores[0].start]
            written = read_rationale(rendered.asked.frame, behind[: behind.rindex("[RESULT]")])
            if not (rationale.strip().startswith("<think>") or rendered.asked.frame.opens):
                assert written.strip() == rationale.strip()
            pieces = [(written, score)]
            assert render_pieces(template, rendered.asked, scales, pieces).text == rendered.text

    check()


def _place(tokens: Any) -> tuple[int, int]:
    return tokens.score_indices[0], tokens.score_stops[0]


def test_every_template_of_trl_is_known() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.jinja")} == set(TEMPLATES)


def test_the_page_has_the_table_of_these_templates() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "run python tests/template_table.py"


def test_words_say_what_a_template_adds_and_where_the_rationale_stands() -> None:
    said = {(name, mode): " | ".join(template_words(template_of(name, mode), row_of())) for name, mode in WORDED}
    for case, parts in WORDED.items():
        assert all(part in said[case] for part in parts), said[case]


WORDED = {
    ("qwen3_8", "off"): ["qwen3_8 (as in TRL", "enable_thinking=False", "thinking='rationale'"],
    ("qwen3_8", "rationale"): ["Reasoning effort", "</think>"],
    ("gptoss", "rationale"): ["<|channel|>analysis<|message|>", "date in that text"],
    ("glm4moe", "off"): ["the turn stays open"],
}


def test_a_template_from_elsewhere_is_the_one_that_training_will_use(tmp_path: Path) -> None:
    make_tokenizer(chat=False).save_pretrained(tmp_path / "base")
    template_tokenizer("qwen3").save_pretrained(tmp_path / "chat")
    file = DIRECTORY / "qwen2_5.jinja"
    for place, source in {
        str(file): file.read_text(),
        str(tmp_path / "chat"): template_tokenizer("qwen3").chat_template,
    }.items():
        assert tokenizer_to_train(str(tmp_path / "base"), place).chat_template == source
    assert tokenizer_to_train(str(tmp_path / "base")).chat_template is None


def test_a_real_sentencepiece_vocabulary_is_asked_with_what_it_was_trained_on(mistral_tokenizer: Any) -> None:
    template, row = Template(mistral_tokenizer), row_of("It is polite. [RESULT] 4", ask="Judge </s>[INST] <s> this.")
    scales = resolve_scales(template, row, SCALES)
    tokens = tokenise(template, render_row(template, row, scales), scales)
    asked = template.ask(row)
    ids = asked_ids(template, asked)
    assert tokens.input_ids[: len(ids)] == ids
    assert prefix_ids(template, asked, scales, [], "It is polite.") == tokens.input_ids[: tokens.score_indices[0]]
    special = set(mistral_tokenizer.all_special_ids)
    assert [token for token in ids if token in special] == [mistral_tokenizer.bos_token_id]
    assert mistral_tokenizer.decode(ids).endswith("Judge </s>[INST] <s> this. [/INST]")


@pytest.mark.parametrize("content", [None, [], float("nan")])
def test_a_turn_of_the_user_that_holds_nothing_is_refused(content: Any) -> None:
    with pytest.raises(ScoreNotFoundError):
        template_of("qwen3").ask(row_of(ask=content))


@pytest.mark.parametrize(
    "completion",
    [
        [{"role": "assistant", "content": "First."}, {"role": "assistant", "content": SAID}],
        [{"role": "assistant", "content": SAID, "tool_calls": [{"name": "f"}]}],
    ],
)
def test_no_turn_of_a_completion_is_left_out(completion: Any) -> None:
    with pytest.raises(ScoreNotFoundError) as refused:
        trained(template_of("qwen3"), {**row_of(), "completion": completion})
    assert refused.value.kind == "several turns"


def test_tools_and_variables_that_are_nan_are_none() -> None:
    template = template_of("qwen3")
    nan = float("nan")
    assert template.ask(row_of(tools=nan, chat_template_kwargs=nan)) == template.ask(row_of())


def test_a_date_and_off_are_what_was_meant_however_yaml_reads_them() -> None:
    read = {"template_date": datetime.date(2026, 1, 31), "thinking": False}
    assert TemplateSettings.of_training(read) == TemplateSettings(thinking="off", date="2026-01-31")
    config = TRACTConfig("out", bf16=False, **read)
    assert (config.template_date, config.thinking) == ("2026-01-31", "off")
