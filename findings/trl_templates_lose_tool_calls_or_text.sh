#!/usr/bin/env bash
# TRL's chat templates: a turn that says something and calls a tool loses the call in some, and the words in others.
#
# Guess beforehand: a template of a model without tools refuses a turn with `tool_calls`, and one of a model with tools
#   writes both the text of such a turn and its calls.
# What happens: of the 72 templates that TRL ships, 26 write the text and nothing of the call (Gemma 3, Llama 3, Phi 3, Command R,
#   the DeepSeek R1 distillations, ...), and 4, among them Llama 3.1's and 3.2's, write the call and nothing of the text. Nothing is raised, and there is no warning.
# Why it matters: `SFTTrainer` and judges that render such conversations see a turn that never happened so.
# Instead: look for a word of each part in what was rendered, before training on it.
#
# Versions: Python 3.11, trl 1.16.0, transformers 5.24.0, jinja2 3.1.6. CPU, seconds once installed.
# Seen:
#   text alone 26, refused 1, both 41, call alone 4
#   call alone: llama3_1 llama3_2 muse_glimmer muse_glimmer_training
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 jinja2==3.1.6
"$folder/venv/bin/pip" install --quiet --no-deps trl==1.16.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"word": "polite"}}}


def conversation(content):
    turn = {"role": "assistant", "content": content("Considering."), "tool_calls": [CALL]}
    return [{"role": "user", "content": content("Ask.")}, turn, {"role": "user", "content": content("Again.")}]


found = defaultdict(list)
for file in sorted(Path(importlib.util.find_spec("trl").origin).with_name("chat_templates").glob("*.jinja")):
    written = None
    for content in (str, lambda text: [{"type": "text", "text": text}]):  # some read messages in parts alone
        try:
            (text,), _ = render_jinja_template(
                [conversation(content)], chat_template=file.read_text(), bos_token="<s>", eos_token="</s>"
            )
        except Exception:
            continue
        parts = ("Considering." in text, "look_up" in text)
        written = max(parts, written or parts, key=sum)
    name = "refused" if written is None else ["nothing", "text alone", "call alone", "both"][written[0] + 2 * written[1]]
    found[name].append(file.stem)
print({name: len(files) for name, files in found.items()})
print("call alone:", *found["call alone"])
print("text alone:", *found["text alone"])
sys.exit({name: len(files) for name, files in found.items()} != {"text alone": 26, "refused": 1, "both": 41, "call alone": 4})
PYTHON
