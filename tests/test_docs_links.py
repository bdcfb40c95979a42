"""The pages hold together: no dead link, no page that the site leaves out, no public name without a reference.

And no message in quotation marks that the code does not say.
"""

import ast
import functools
import posixpath
import re
from collections import Counter
from difflib import SequenceMatcher

import architecture
import option_tables
import pytest
import yaml
from pages import PAGES, ROOT, anchors_of, links_of, text_of

import trl_tract
from trl_tract.commands.entry_points import COMMANDS, _option_groups
from trl_tract.sources.schemas import KNOWN

OUTSIDE = ("http://", "https://", "mailto:")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    dead = []
    for link in links_of(page):
        if link.startswith(OUTSIDE):
            continue
        target, _, anchor = link.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
        exists = (ROOT / file).is_file() or (ROOT / file).is_dir()
        if not exists or (anchor and anchor not in anchors_of(file)):
            dead.append(link)
    assert not dead


@functools.cache
def python_files() -> str:
    """All Python files of the repository, each behind a slash and before a newline."""
    folders = ("trl_tract", "tests", "docs", "examples", ".ci")
    return "".join(
        f"/{file.relative_to(ROOT).as_posix()}\n" for name in folders for file in ROOT.glob(f"{name}/**/*.py")
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_python_file_or_module_that_a_page_names_is_there(page):
    named = re.findall(r"`([\w./-]+\.py)`", text_of(page))
    named += [module.replace(".", "/") for module in re.findall(r"\b(trl_tract\.[a-z]\w+)\b", text_of(page))]
    assert not [name for name in named if f"/{name}" not in python_files()]


def test_what_the_walks_name_is_defined_where_they_say():
    walked = re.findall(r"`(\w+/\w+\.py): (\w+)`", text_of("docs/architecture.md"))
    assert len(walked) > 20
    package = ROOT / "trl_tract"
    defined = {
        (file, name)
        for file, name in walked
        if re.search(rf"(class|def) {name}\b", (package / file).read_text("utf-8"))
    }
    assert not set(walked) - defined


def test_the_data_page_has_every_column_that_is_understood():
    in_a_range = {f"orig_score{score}_description" for score in (2, 3, 4)}  # ... stands for them
    assert not {name for name in KNOWN if f"`{name}`" not in text_of("docs/data.md")} - in_a_range


def test_every_page_of_docs_is_in_the_navigation_of_the_site():
    nav = yaml.safe_load((ROOT / ".mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = set()
    waiting = [nav]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, str):
            named.add(entry)
        else:
            waiting += entry.values() if isinstance(entry, dict) else entry
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages <= named
    # And nothing is named that is not there.
    assert named - pages <= {"CHANGELOG.md", *PAGES}


def test_the_api_reference_has_every_public_name():
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = {line.rsplit(".", 1)[-1] for line in reference.splitlines() if line.startswith("::: trl_tract.")}
    assert set(trl_tract.__all__) <= documented


def test_what_pages_say_of_the_sources_is_read_from_the_sources():
    assert not architecture.stale()


def test_the_tables_of_options_are_those_of_the_commands():
    assert option_tables.page() == text_of("docs/options.md")


def test_the_api_page_names_everything_public_without_the_site():
    assert option_tables.names() == text_of("docs/api.md")


@pytest.mark.parametrize("form", ["bug", "data"])
def test_an_issue_form_asks_in_the_ways_that_github_knows(form):
    asked = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))
    assert asked.keys() == {"name", "description", "labels", "body"}
    assert {part["type"] for part in asked["body"]} <= {"input", "textarea", "dropdown"}
    assert all(part["attributes"]["label"] for part in asked["body"])
    assert len({part["id"] for part in asked["body"]}) == len(asked["body"])


# What another library or the system says.
NOT_OURS = ("Your setup doesn't support bf16/gpu", "No space left on device")


def quoted_messages() -> list[str]:
    """What the first column of docs/troubleshooting.md quotes; up to four words are a name, not a message."""
    rows = re.findall(r"^\| (.*?) \| ", text_of("docs/troubleshooting.md"), re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    return [message for message in quoted if message.count(" ") > 3 and not message.startswith(NOT_OURS)]


@functools.cache
def said_by_the_code() -> set[str]:
    """Every text that is written out in the package but docstrings, with nothing where it varies."""
    found = set()
    for file in ROOT.glob("trl_tract/**/*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            parts = node.values if isinstance(node, ast.JoinedStr) else [] if id(node) in docstrings else [node]
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            found.add("\0".join(texts))
    return found


def runs_of(text: str) -> set[str]:
    """All that stands in eight characters next to each other."""
    return {text[i : i + 8] for i in range(len(text) - 7)}


@functools.cache
def texts_by_run() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in sorted(said_by_the_code()):
        for run in runs_of(text):
            found.setdefault(run, []).append(text)
    return found


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_that_troubleshooting_quotes_is_one_of_the_code(message):
    alike = Counter(text for run in sorted(runs_of(message)) for text in texts_by_run().get(run, []))
    nearest = [text for text, _ in alike.most_common(5)]
    blocks = [SequenceMatcher(None, message, text, autojunk=False).get_matching_blocks() for text in nearest]
    assert max(sum(block.size for block in each if block.size > 3) for each in blocks) > 0.5 * len(message)


def test_the_options_page_has_a_row_for_each_command_with_its_groups():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text_of("docs/options.md"), re.MULTILINE))
    assert set(rows) == set(COMMANDS)
    for command in set(COMMANDS) - {"completion"}:
        assert re.findall(r"`(\w+)`", rows[command]) == [group.__name__ for group in _option_groups(command)], command
