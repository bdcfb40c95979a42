"""What a chat template does around a judge's rationale, in words. Knows nothing of files or training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trl

from trl_tract.rows.template import Template
from trl_tract.text.display import visible

_SHOWN = 160  # characters of what a template writes before the first message


def template_name(template: Template) -> str:
    """The name of a tokenizer's chat template among those that TRL ships; `its own` for another one."""
    source = template.tokenizer.get_chat_template()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        if path.read_text(encoding="utf-8").strip() == source.strip():
            return f"{path.stem} (as in TRL {trl.__version__})"
    return "its own"


def template_words(template: Template, row: Mapping[str, Any]) -> list[str]:
    """What the chat template of a row of messages is, what it writes by itself, and where the rationale stands."""
    asked = template.ask(row)
    frame = asked.frame
    words = [f"chat template: {template_name(template)}"]
    if frame.variables:
        words.append("rendered with " + ", ".join(f"{name}={value!r}" for name, value in frame.variables.items()))
    before = template.before(row)
    if before.strip():
        shown = before if len(before) <= _SHOWN else f"{before[: _SHOWN // 2]} […] {before[-_SHOWN // 2 :]}"
        words.append(f"text that it adds before the first message: {_quoted(shown)}")
    if template.writes_date:
        words.append(
            f"date in that text, the same for all later use: {template.settings.date or 'the day of training'}"
        )
    if frame.closing:
        words.append(
            f"thinking: the rationale is the thinking; it follows {_quoted(frame.opening or asked.text[-20:])}, and "
            f"{_quoted(frame.closing)} stands between it and the marker"
        )
    else:
        between = _quoted(frame.opening) if frame.opening else "nothing"
        can = "; the template supports it (thinking='rationale')" if template.thinks else ""
        words.append(f"thinking: off; text between the header and the rationale: {between}{can}")
    words.append(f"after the score: {_quoted(frame.ending) if frame.ending else 'nothing, the turn stays open'}")
    return words


def _quoted(text: str) -> str:
    return visible(repr(text))
