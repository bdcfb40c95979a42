"""No dead link in the README, the changelog, docs/ or the examples' pages; no page that the site leaves out."""

import posixpath

import pytest
import yaml
from pages import PAGES, ROOT, anchors_of, links_of

import trl_tract

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


def test_every_page_of_docs_is_in_the_navigation_of_the_site():
    # The two tags of the configuration that plain YAML does not know are not used in it.
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


def test_the_readme_names_every_page_for_users():
    # The site finds its pages in its navigation; a reader of the repository finds them in the README or on the first page.
    named = {link.partition("#")[0] for link in links_of("README.md")}
    named |= {f"docs/{link.partition('#')[0]}" for link in links_of("docs/index.md")}
    missing = {page for page in PAGES if page.startswith("docs/")} - named - {"docs/index.md"}
    assert not missing
