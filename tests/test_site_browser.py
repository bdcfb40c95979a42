"""The built documentation site in a real browser: no page is wider than a phone, no other server is asked for anything.

Needs `site/`: `mkdocs build --strict --config-file .mkdocs.yml`.
"""

import json
import os

import pytest
from browser import chromium, look
from pages import ROOT

SITE = ROOT / "site"
pytestmark = pytest.mark.slow

WIDER = """
const inside = '.md-typeset__scrollwrap, .md-typeset__table, pre, .highlight';
return [...document.querySelectorAll('article *')]
    .filter(each => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(inside))
    .map(each => each.tagName + ' ' + each.textContent.slice(0, 60));
"""


@pytest.fixture(scope="module")
def pages():
    found = sorted(page for page in SITE.rglob("*.html") if page.name != "404.html")
    if not found:
        message = "no site/: mkdocs build --strict --config-file .mkdocs.yml"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def test_no_page_is_wider_than_a_phone(browser, pages):
    too_wide = {}
    for page in pages:
        look(browser, page, width=400)
        scrolls = browser.execute_script("return document.documentElement.scrollWidth") > 400
        wider = browser.execute_script(WIDER)
        if scrolls or wider:
            too_wide[page.relative_to(SITE).as_posix()] = wider[:3]
    assert not too_wide


def test_no_page_asks_another_server_for_anything(browser, pages):
    browser.get_log("performance")
    for page in pages:
        look(browser, page, width=1440, scheme="dark")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own start page is not ours.
    asked = {each["request"]["url"] for each in sent if each["documentURL"].startswith("file:")}
    assert any(url.endswith("/index.html") for url in asked)
    assert not {url for url in asked if not url.startswith(("file:", "data:", "blob:"))}
