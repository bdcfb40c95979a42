"""What the site shows beyond the pages in docs/: the files of the repository that pages link to, and the notebooks.

Links in docs/ are written for readers of the repository (`../CHANGELOG.md`). Here each linked file becomes a page and
the link is turned to it; a link to a file that does not exist is an error of the strict build. Knows nothing of the
package.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LINK = re.compile(r"(?P<open>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(`{3,}).*?^\1", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml"}
log = logging.getLogger("mkdocs.hooks")


def repository_path(page: str) -> str:
    """Where the source of a page of the site is in the repository."""
    return page if page in _BROUGHT else f"docs/{page}"


def site_path(file: str) -> str:
    """The page of the site for a file of the repository."""
    if file == "README.md":
        return "index.md"
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return file if file.endswith(".md") else f"{file}.md"


def links(markdown: str) -> list[str]:
    """Relative targets of the links in a page, code left out, without their anchors."""
    return [match["target"] for match in LINK.finditer(FENCE.sub("", markdown))]


def resolve(target: str, source: str) -> str:
    """A link's target as a path in the repository; `source` is the file that it stands in."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


_BROUGHT: dict[str, str] = {}
"""Pages of the site that come from elsewhere in the repository -> the file that they come from."""


def content_of(file: str) -> str:
    """A file of the repository as a page."""
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return notebook(path)
    return f"# {path.name}\n\n`{file}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"


def notebook(path: Path) -> str:
    """A notebook with its outputs; pictures are written into the page."""
    import base64

    from nbconvert import MarkdownExporter

    body, resources = MarkdownExporter().from_filename(str(path))
    for name, data in resources["outputs"].items():
        kind = Path(name).suffix.lstrip(".").replace("svg", "svg+xml")
        body = body.replace(f"({name})", f"(data:image/{kind};base64,{base64.b64encode(data).decode()})")
    where = path.relative_to(ROOT).as_posix()
    return f"{body}\n\n---\n\nThis page is the notebook `{where}`, with the outputs that it was committed with.\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the notebooks' place in the navigation with what there is."""
    found = [*sorted(EXAMPLES.glob("notebooks/*.ipynb")), *sorted(EXAMPLES.glob("*.py"))]
    pages = [site_path(file.relative_to(ROOT).as_posix()) for file in found]
    config.nav = [
        {title: pages} if title == "Notebooks and scripts" else entry
        for entry in config.nav or []
        for title in (entry if isinstance(entry, dict) else [None])
        if title != "Notebooks and scripts" or pages
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring in the files that pages and the navigation name, and those that these link to in turn."""
    _BROUGHT.clear()
    texts = {f"docs/{file.src_uri}": Path(str(file.abs_src_path)) for file in files if file.src_uri.endswith(".md")}
    waiting = [(source, target) for source, path in texts.items() for target in links(path.read_text(encoding="utf-8"))]
    waiting += [(".mkdocs.yml", file) for file in _named_in(config.nav) if file.startswith(("examples/", "CHANGELOG"))]
    while waiting:
        source, target = waiting.pop()
        file = resolve(target, source)
        if file.startswith("docs/") or file == "README.md":
            continue
        file = file if (ROOT / file).exists() else file.removesuffix(".md")
        if not (ROOT / file).is_file():
            log.warning("%s links to %s, and there is no file %s", source, target, file)
            continue
        page = site_path(file)
        if page not in _BROUGHT:
            _BROUGHT[page] = file
            content = content_of(file)
            files.append(File.generated(config, page, content=content))
            if file.endswith(".md"):
                waiting += [(file, each) for each in links(content)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    source = _BROUGHT.get(here) or f"docs/{here}"

    def turn(match: re.Match[str]) -> str:
        target = site_path(resolve(match["target"], source))
        if files.get_file_from_path(target) is None:
            # A picture or another file that MkDocs copies, or a dead link, which it reports.
            target = target.removesuffix(".md")
        return f"{match['open']}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{match['anchor'] or ''}"

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(turn, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(turn, markdown[end:])])


def _named_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [name for entry in (nav.values() if isinstance(nav, dict) else nav or []) for name in _named_in(entry)]
