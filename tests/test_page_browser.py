"""The report page in a real browser, made from rationales that try to break out of it."""

import json
import re
from itertools import product

import numpy as np
import pytest
from browser import chromium, look, require_chromium

from trl_tract.evaluation.report import compare, score_report
from trl_tract.page import JudgedItems, OtherJudge, write_page

pytestmark = [
    pytest.mark.slow,
    # Selenium leaves its sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

RUN = "document.title='owned';window.owned=1;alert(1)"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"</style></title></script><script>{RUN}</script>",
    f'"><img src=x onerror="{RUN}">',
    f"' onmouseover='{RUN}' autofocus onfocus='{RUN}' x='",
    f'<svg onload="{RUN}"><animate onbegin="{RUN}" attributeName=x dur=1s></svg>',
    f'</div></article></main><iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f'<a href="javascript:{RUN}">javascript:{RUN}</a>',
    f"<!--><script>{RUN}</script>--><![CDATA[<script>{RUN}</script>]]>",
    f"{{{{ ''.__class__ }}}} {{% raw %}} ${{{RUN}}}",
    '<meta http-equiv="refresh" content="0;url=http://127.0.0.1:9/"><base href="http://127.0.0.1:9/">',
    '<link rel=stylesheet href="http://127.0.0.1:9/a.css"><style>@import "http://127.0.0.1:9/b.css";*{display:none}</style>',
    "nul \0 escape \x1b[31m bell \a delete \x7f next line \x85 surrogate \ud800 end",
    "right to left \u202e override \u2067 isolate \u200f mark; hidden \U000e0041\u200b",
    "x" * 1_000_000,
    "\u0301" * 3000,
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    records, prompts = [], []
    for number, text in enumerate(HOSTILE):
        probs = [[0.1, 0.5, 0.2, 0.1, 0.1]]
        names = {"id": text[:400], "group": text[:400]}
        record = {"reference": 5.0, "score": 1.0 + 0.1 * number, "scores": [1.0, 2.0], "rationales": [text, text]}
        records.append({**names, **record, "probs": probs, "grid_mass": 0.9, "std": 0.4, "error": None})
        records.append({**names, "reference": 1.0, "score": None, "error": text[:2000]})
        prompts += [[{"role": text[:50], "content": text}], text]
    scores = [np.nan if record["score"] is None else record["score"] for record in records]
    gold = [record["reference"] for record in records]
    report = score_report(scores, gold, n_bootstrap=20)
    other = OtherJudge(HOSTILE[2], report, compare(scores, scores, gold, n_bootstrap=20))
    judged = JudgedItems(
        name=HOSTILE[1],
        records=records,
        report=report,
        grid=(1.0, 2.0, 3.0, 4.0, 5.0),
        prompts=prompts,
        settings={text[:90]: text for text in HOSTILE},
        others=[other],
        curves={HOSTILE[0]: [{"step": 1, "loss/score": 1.0}, {"step": 2, "loss/score": 0.5}]},
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(judged, path, worst=len(HOSTILE))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def opened(browser, page, **how):
    look(browser, page, **how)
    # Everything that a reader could set off: folded parts open, the pointer over and the focus on each element.
    browser.execute_script(
        "document.querySelectorAll('details').forEach(d => { d.open = true });"
        "document.querySelectorAll('main *').forEach(e => {"
        "  for (const kind of ['mouseover', 'focus', 'click']) e.dispatchEvent(new Event(kind, {bubbles: true})) })"
    )


def test_a_missing_browser_fails_in_continuous_integration(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install -y chromium chromium-driver"):
        require_chromium()


def test_a_script_in_a_page_without_escaping_would_be_noticed(browser, tmp_path):
    # The tests below pass only for a reason if the sentinel works.
    unsafe = tmp_path / "unsafe.html"
    unsafe.write_text("<title>safe</title><script>document.title='owned';window.owned=1</script>")
    look(browser, unsafe)
    assert browser.title == "owned"
    assert browser.execute_script("return window.owned") == 1


def test_no_script_of_a_rationale_runs(browser, page):
    opened(browser, page)
    assert browser.title.endswith(": agreement with gold scores")
    assert browser.execute_script("return window.owned") is None
    assert browser.execute_script("return document.scripts.length") == 2  # the page's own, and the table's data


def test_no_element_comes_from_a_rationale(browser, page):
    opened(browser, page)
    strangers = "iframe, object, embed, base, link, form, animate, [onload], [onerror], [onfocus], [style]"
    own = "script:not(#items-data):not(:last-of-type), input:not(.filters input)"
    assert browser.execute_script(f"return document.querySelectorAll('{strangers}, {own}').length") == 0
    hrefs = browser.execute_script("return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert hrefs
    assert all(href.startswith("#") for href in hrefs)


def test_hostile_text_is_shown_to_the_letter(browser, page):
    opened(browser, page)
    shown = browser.execute_script("return [...document.querySelectorAll('.quote')].map(q => q.textContent)")
    for text in HOSTILE[:11]:
        assert text in shown


def test_nothing_is_asked_for_from_a_network(browser, page):
    browser.get_log("performance")
    opened(browser, page)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert {re.match(r"[a-z]+:", url).group() for url in urls} <= {"file:", "data:"}


def test_the_policy_lets_the_pages_own_style_and_pictures_through(browser, page):
    browser.get_log("browser")
    opened(browser, page)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return getComputedStyle(document.querySelector('.tiles')).display") == "grid"
    widths = browser.execute_script("return [...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert widths
    assert min(widths) > 0


def test_the_policy_stops_a_script_that_got_into_the_page(browser, page, tmp_path):
    # The second line of defence, tried by breaking the first.
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.read_text(encoding="utf-8").replace("<main>", f"<script>{RUN}</script><main>"), encoding="utf-8"
    )
    look(browser, broken)
    assert browser.execute_script("return document.scripts.length") == 3
    assert browser.execute_script("return window.owned") is None


@pytest.mark.parametrize(("width", "scheme"), [*product((320, 400, 1600), ("light", "dark"))])
def test_nothing_overflows_sideways(browser, page, width, scheme):
    opened(browser, page, width=width, scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (width, scheme)


def luminance(rgb):
    channels = [int(part) / 255 for part in re.findall(r"\d+", rgb)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_4_5(browser, page, scheme):
    # WCAG 2.2 AA for text of ordinary size, against the nearest ground that is not transparent.
    opened(browser, page, scheme=scheme)
    pairs = browser.execute_script(
        """
        const ground = e => {
          for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (color !== 'rgba(0, 0, 0, 0)') return color;
          }
          return 'none';
        };
        const texts = [...document.querySelectorAll('body *')].filter(
          e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
        return texts.map(e => {
          const style = getComputedStyle(e);
          const ink = e instanceof SVGElement ? style.fill : style.color;
          return [ink, ground(e), e.tagName + '.' + e.getAttribute('class')];
        });
        """
    )
    assert len(pairs) > 100
    for ink, ground, where in {tuple(pair) for pair in pairs}:
        low, high = sorted((luminance(ink), luminance(ground)))
        assert high / low >= 4.5, (where, ink, ground)


def test_the_scheme_changes_ground_and_pictures(browser, page):
    seen = {}
    for scheme in ("light", "dark"):
        look(browser, page, scheme=scheme)
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        picture = browser.execute_script("return document.images[0].currentSrc")
        seen[scheme] = (luminance(ground), picture)
    assert seen["light"][0] > 0.8
    assert seen["dark"][0] < 0.1
    assert seen["light"][1] != seen["dark"][1]


def test_every_part_that_scrolls_or_folds_is_reached_by_the_keyboard(browser, page):
    look(browser, page, width=400)
    reached = browser.execute_script(
        "return [...document.querySelectorAll('.scroll, summary')].every(e => e.tabIndex === 0)"
    )
    assert reached


def rows_of(browser):
    script = (
        "return [...document.querySelectorAll('#items-table tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    return browser.execute_script(script)


def fill(browser, name, value):
    browser.execute_script(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input'))",
        f"items-{name}",
        value,
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """120 items, each tenth without a score, errors growing with the number."""
    gold = [1.0 + i % 5 for i in range(120)]
    records = [
        {"id": f"item {i}", "reference": g, "score": None, "error": "no room"}
        if i % 10 == 9
        else {"id": f"item {i}", "reference": g, "score": g + i / 100, "rationales": [f"Text {i}."]}
        for i, g in enumerate(gold)
    ]
    scores = [np.nan if record["score"] is None else record["score"] for record in records]
    path = tmp_path_factory.mktemp("many") / "report.html"
    write_page(JudgedItems(name="judge", records=records, report=score_report(scores, gold, n_bootstrap=0)), path)
    return path


def test_the_table_shows_a_part_and_turns_pages(browser, many):
    look(browser, many)
    assert [row[0] for row in rows_of(browser)] == [f"item {i}" for i in range(50)]
    later = browser.find_element("id", "items-later")
    for _ in range(2):
        later.click()
    assert [row[0] for row in rows_of(browser)] == [f"item {i}" for i in range(100, 120)]
    assert not later.is_enabled()
    assert browser.find_element("id", "items-count").text == "101 to 120 of 120 items"


def test_the_table_sorts_by_any_column_both_ways(browser, many):
    look(browser, many)
    heads = {head.text: head for head in browser.find_elements("css selector", "#items-table th button")}
    assert "Group" not in heads  # no item has one
    heads["Error"].click()
    assert [row[0] for row in rows_of(browser)][:2] == ["item 0", "item 1"]
    heads["Error"].click()
    assert [row[0] for row in rows_of(browser)][:2] == ["item 118", "item 117"]
    heads["Item"].click()  # by number, not by letter
    assert [row[0] for row in rows_of(browser)][:3] == ["item 0", "item 1", "item 2"]


def test_the_table_filters_by_words_by_kind_and_by_error(browser, many):
    look(browser, many)
    fill(browser, "words", "TEXT 11")
    assert [row[0] for row in rows_of(browser)] == ["item 11", *(f"item {i}" for i in range(110, 119))]
    fill(browser, "words", "")
    fill(browser, "kind", "failed")
    assert [row[0] for row in rows_of(browser)] == [f"item {i}" for i in range(9, 120, 10)]
    fill(browser, "kind", "all")
    fill(browser, "error", "1.155")
    assert [row[0] for row in rows_of(browser)] == ["item 116", "item 117", "item 118"]
    fill(browser, "words", "nowhere")
    assert browser.find_element("id", "items-count").text == "0 to 0 of 0 found among 120 items"


def test_hostile_text_is_text_in_the_table(browser, page):
    opened(browser, page)
    assert browser.execute_script("return document.querySelectorAll('#items-table td *').length") == 0
    shown = [cell for row in rows_of(browser) for cell in row]
    for text in HOSTILE[:6]:
        assert any(cell.startswith(" ".join(text.split())[:60]) for cell in shown)
