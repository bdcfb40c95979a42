"""The report page and its pictures, as files; what a browser makes of them is in test_page_browser.py."""

import base64
import hashlib
import json
import re
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from trl_tract.cli import main
from trl_tract.evaluation.report import compare, score_report
from trl_tract.files.journal import KnownRows, write_json, write_jsonl
from trl_tract.files.seal import seal_result
from trl_tract.page import JudgedItems, OtherJudge, page_html, write_page
from trl_tract.page.bins import density, gold_bins, prediction_bins
from trl_tract.page.charts import MAX_POINTS, JudgedScores, score_charts
from trl_tract.page.drawing import DARK, LIGHT, legible
from trl_tract.page.items import PROMPT_CHARACTERS, RATIONALE_CHARACTERS, read_items
from trl_tract.page.learning import learning_charts
from trl_tract.runs.judged import Judged
from trl_tract.runs.results import judged_items
from trl_tract.text.display import excerpt, visible

pytest.importorskip("matplotlib")
GRID = (1.0, 2.0, 3.0, 4.0, 5.0)


def record(score, gold=3.0, **more):
    judged = {"scores": [score], "rationales": ["Because."], "probs": [[0.0, 0.1, 0.6, 0.2, 0.0]], "grid_mass": 0.9}
    return {"reference": gold, "score": score, "std": 0.5, "error": None, **judged, **more}


def failed(reason, gold=3.0):
    nothing = {"scores": [], "rationales": [], "probs": None, "grid_mass": None, "std": None}
    return {"reference": gold, "score": None, "error": reason, **nothing}


def items(records, **more):
    scores = [np.nan if r["score"] is None else r["score"] for r in records]
    report = score_report(scores, [r["reference"] for r in records], n_bootstrap=20)
    return JudgedItems(**{"name": "judge", "records": records, "report": report, "grid": GRID, **more})


def page_of(records, *, worst=12, **more):
    """The page without its pictures, which take seconds to draw."""
    return page_html(items(records, **more), worst=worst)


RECORDS = [record(score, gold) for score, gold in ((1.2, 1.0), (2.9, 2.0), (3.1, 3.0), (4.4, 5.0), (2.0, 5.0))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page with all its pictures, and its files."""
    curves = {"stage one": [{"step": 1, "loss/score": 2.0}]}
    return write_page(
        items(RECORDS, settings={"a": 1}, curves=curves), tmp_path_factory.mktemp("page") / "deep" / "report.html"
    )


class Reader(HTMLParser):
    """What stands where: element -> its attributes, and all text outside the style sheet."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "</style><script>alert(1)</script>",
        '" onmouseover="alert(1)',
        "' onfocus='alert(1)' autofocus='",
        "<a href='javascript:alert(1)'>x</a>",
        "<svg onload=alert(1)>",
        "{{ 7 * 7 }}{% for x in y %}",
    ],
)
def test_text_of_every_origin_is_text_on_the_page(hostile):
    everywhere = record(1.0, 5.0, id=hostile, group=hostile, rationales=[hostile, hostile], scores=[1.0, 1.0])
    more = {
        "name": hostile,
        "prompts": [[{"role": hostile, "content": hostile}]] * 6,
        "settings": {hostile: hostile},
    }
    plain = Reader(page_of([*RECORDS, everywhere][:6], name="judge", prompts=["p"] * 6, settings={"a": "b"}))
    page = Reader(page_of([*RECORDS[:-1], everywhere, failed(hostile)], **more))
    assert page.text.count(hostile) >= 9
    known = {tag for tag, _ in plain.elements} | {"bdi", "tr", "td", "details", "summary"}
    assert {tag for tag, _ in page.elements} <= known
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("autofocus", "style", "srcdoc")}


def test_the_policy_forbids_everything_but_the_pages_own_style_and_script_and_data_images():
    page = page_of(RECORDS)
    (policy,) = [each["content"] for each in Reader(page).all("meta") if "http-equiv" in each]
    own = [re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL).group(1) for tag in ("style", "script")]
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own)
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_the_page_needs_no_other_file(written):
    page = Reader(written[0].read_text(encoding="utf-8"))
    assert len(page.all("img")) == len(page.all("source")) == 8
    assert page.all("script") == [{"type": "application/json", "id": "items-data"}, {}]
    assert not page.all("link") + page.all("iframe")
    assert all(each["src"].startswith("data:image/svg+xml;base64,") for each in page.all("img"))
    assert all(each["srcset"].startswith("data:image/svg+xml;base64,") for each in page.all("source"))


def test_the_page_begins_with_the_verdict():
    judged = items(RECORDS)
    text = " ".join(Reader(page_html(judged)).text.split())
    assert judged.report.verdict[0].text in text.split("Agreement Metric")[0]


def test_the_tiles_of_a_judge_that_says_one_thing_hold_no_correlation():
    def tiles(scores):
        page = page_of([record(score, 1.0 + i) for i, score in enumerate(scores)])
        return re.findall(r'<div class="card tile"><dt>(.*?)</dt>', page)

    assert "Pearson" in tiles([1.0, 2.0, 3.0, 3.5, 5.0])
    assert tiles([3.76, 3.78, 3.8, 3.85, 3.91])[:3] == ["RMSE", "RMSE of the mean", "Spread"]


def test_the_head_names_base_model_rows_date_and_grid():
    text = Reader(page_of(RECORDS, about={"Base model": "someone/seed", "Judged": "2026-11-28"})).text
    head = " ".join(text.split("Skip to the results")[1].split("Agreement\n")[0].split())
    assert "Base modelsomeone/seed Judged2026-11-28 Scores1, 2, 3, 4, 5" in head


def table_of(page):
    """The rows of the table of all items, as the page's script gets them."""
    return json.loads(re.search(r'id="items-data">(.*?)</script>', page, re.DOTALL).group(1))


def test_all_items_are_in_the_table():
    failure = {**failed("no room"), "id": "x", "group": "g"}
    rows = table_of(page_of([*RECORDS, failure, record(1.23456, 5.0, rationales=["Two\n words"])]))
    assert len(rows) == 7
    assert rows[0] == ["0", None, 1.0, 1.2, 0.2, 0.9, "Because."]
    assert rows[5] == ["x", "g", 3.0, None, None, None, "no room"]
    assert rows[6][3:5] + rows[6][6:] == [1.2346, -3.7654, "Two words"]


def test_the_table_of_many_items_keeps_their_texts_short():
    assert len(table_of(page_of([record(1.0, 5.0, rationales=["y" * 1000])]))[0][6]) == 161  # and an ellipsis
    records = [record(1.0, 5.0, rationales=["y" * 1000])] * 20_000
    assert {len(row[6]) for row in read_items(records, GRID).table} == {101}
    assert {row[6] for row in read_items(records * 3, GRID).table} == {""}


def test_invisible_characters_are_written_out():
    assert visible("\0\x1b\x7f\u202e\u200b\ufeff\ud800") == ("⟨U+0000⟩⟨U+001B⟩⟨U+007F⟩⟨U+202E⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+D800⟩")


def test_ordinary_text_of_any_script_stays_as_it_is():
    for text in ("naïve 数学 שלום", "🧑‍🔬\tand\nlines", "می‌خواهم"):
        assert visible(text) == text


def test_a_page_with_a_lone_surrogate_and_nul_can_be_written():
    page = page_of([*RECORDS, record(1.0, 5.0, rationales=["bad \ud800 and \0 here"])])
    assert "bad ⟨U+D800⟩ and ⟨U+0000⟩ here" in page


def test_a_long_rationale_is_cut_and_its_length_is_said():
    page = page_of([*RECORDS, record(1.0, 5.0, rationales=["y" * 1_000_000])])
    assert f"the first {RATIONALE_CHARACTERS:,} of 1,000,000 characters" in page
    assert page.count("y" * RATIONALE_CHARACTERS) == 1
    assert "y" * (RATIONALE_CHARACTERS + 1) not in page


def test_a_long_prompt_is_cut_and_its_length_is_said():
    page = page_of(RECORDS, prompts=["z" * 10_000] * 5)
    assert f"the first {PROMPT_CHARACTERS:,} of 10,000 characters" in page


def test_an_excerpt_counts_the_characters_of_the_text_and_not_of_what_is_written_out():
    assert excerpt("\0" * 10, 4) == excerpt("\0" * 4 + "x" * 6, 4)


def test_a_summary_of_a_prompt_starts_where_prompts_differ():
    prompts = [f"Judge the reply.\nUse the rubric.\nThe reply: number {i}" for i in range(5)]
    summaries = re.findall(r"<summary>Prompt: <bdi>(.*?)</bdi>", page_of(RECORDS, prompts=prompts))
    assert sorted(summaries) == [f"… The reply: number {i}" for i in range(5)]


def test_items_come_by_the_size_of_their_error():
    page = page_of([*RECORDS, failed("no room")], worst=3)
    assert re.findall(r">\d\. (Predicted [\d.]+, gold \d)", page) == [
        "Predicted 2.00, gold 5",
        "Predicted 2.90, gold 2",
        "Predicted 4.40, gold 5",
    ]


def test_bars_show_the_mean_distribution_over_the_rationales():
    two = record(2.0, 5.0, probs=[[0.2, 0.8, 0, 0, 0], [0.4, 0.2, 0.2, 0, 0]])
    page = Reader(page_of([two], worst=1))
    (drawing,) = page.all("svg")
    assert drawing["aria-label"] == ("Score distribution. 1: 0.30, 2: 0.50, 3: 0.10, 4: 0.00, 5: 0.00. Gold score 5.")
    heights = [float(each["height"]) for each in page.all("rect")[1:]]
    assert heights == pytest.approx([33, 55, 11, 0, 0])  # 55 units for the tallest


def test_failures_are_counted_by_reason():
    page = page_of([*RECORDS, failed("no room"), failed("no marker"), failed("no marker")])
    rows = re.findall(r'<td class="number">(\d+)</td><td class="text" dir="auto">(.*?)</td>', page)
    assert rows == [("2", "no marker"), ("1", "no room")]
    assert "5 of 8 items scored, 3 without a score" in page


def test_a_judge_that_always_failed_has_a_page(tmp_path):
    assert write_page(items([failed("no room")] * 3), tmp_path / "report.html") == [tmp_path / "report.html"]
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.all("img") == []
    assert "undefined" in page.text
    assert "No item has a score." in page.text


@pytest.fixture(scope="module")
def of_one_item(tmp_path_factory):
    """A page of one item, written where links stood before, and its files."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "elsewhere").mkdir()
    (folder / "mine.html").write_text("mine")
    (folder / "report.html").symlink_to(folder / "mine.html")
    (folder / "report-plots").symlink_to(folder / "elsewhere")
    return write_page(items([record(2.0)]), folder / "report.html")


def test_a_page_takes_the_place_of_links_and_leaves_what_they_lead_to(of_one_item):
    folder = of_one_item[0].parent
    assert (folder / "mine.html").read_text() == "mine"
    assert not list((folder / "elsewhere").iterdir())
    assert all(file.is_file() and not file.is_symlink() for file in of_one_item)


def test_one_item_has_its_pictures(of_one_item):
    assert len(of_one_item) == 8


def test_metrics_stand_with_their_intervals():
    judged = items(RECORDS)
    text = " ".join(Reader(page_html(judged)).text.split())
    for name in ("pearson", "rmse", "accuracy"):
        assert str(getattr(judged.report, name)) in text


def test_another_judge_stands_beside_with_the_difference():
    scores, gold = [r["score"] for r in RECORDS], [r["reference"] for r in RECORDS]
    worse = [5.0, 2.0, 3.0, 1.0, 1.0]
    difference = compare(scores, worse, gold, n_bootstrap=20)
    other = OtherJudge("stage one", score_report(worse, gold, n_bootstrap=20), difference)
    text = Reader(page_of(RECORDS, others=[other])).text
    assert "stage one" in text
    assert f"{difference.mae.value:+.3f}" in text


def test_prompts_of_other_items_are_refused():
    with pytest.raises(ValueError, match="2 prompts and 5"):
        page_of(RECORDS, prompts=["a", "b"])


def test_every_picture_has_a_description_and_every_table_its_headers(written):
    page = Reader(written[0].read_text(encoding="utf-8"))
    assert all(len(each["alt"]) > 20 for each in page.all("img"))
    assert len(page.all("table")) == 3
    assert all(each["scope"] in ("col", "row") for each in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]


def test_pictures_are_written_as_png_files_too(written):
    assert [path.name for path in written] == [
        "report.html",
        "predicted-against-gold.png",
        "score-histograms.png",
        "error-by-gold.png",
        "reliability.png",
        "reliability-of-probabilities.png",
        "confusion.png",
        "grid-mass.png",
        "learning-loss-score.png",
    ]
    assert {path.read_bytes()[:8] for path in written[1:]} == {b"\x89PNG\r\n\x1a\n"}
    assert {path.parent.name for path in written[1:]} == {"report-plots"}


def test_a_picture_is_the_same_every_time(written):
    (chart,) = learning_charts({"stage one": [{"step": 1, "loss/score": 2.0}, {"step": 2, "loss/score": 1.0}]})
    assert chart.svg(DARK) == chart.svg(DARK)
    assert chart.svg(DARK) != chart.svg(LIGHT)


def test_no_text_from_data_is_in_a_picture():
    # Glyphs are paths; what is left are matplotlib's own comments, which hold the axes' names and numbers.
    scores = JudgedScores(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 5.0]), np.array([1.0, 0.9, 0.8]))
    for chart in (score_charts(scores)[0], *learning_charts({"<b>": [{"step": 1, "loss/score": 2.0}]})):
        svg = chart.svg(LIGHT)
        assert b"<text" not in svg
        assert b"<b>" not in svg


def test_many_items_are_drawn_in_part_and_the_page_says_so():
    rng = np.random.default_rng(0)
    gold = rng.integers(1, 6, 4000).astype(float)
    (chart, *_) = score_charts(JudgedScores(gold + rng.normal(size=4000), gold, np.ones(4000)))
    assert chart.caption.startswith("1,500 of 4,000 items, drawn at random, are shown as points")
    assert "density of all 4,000 items" in chart.caption
    assert chart.svg(LIGHT).count(b"<use ") < MAX_POINTS + 100


def test_confusion_counts_after_rounding_to_the_grid():
    predicted, gold = np.array([1.4, 1.6, 4.9, 7.0]), np.array([1.0, 1.0, 5.0, 5.0])
    charts = {c.name: c for c in score_charts(JudgedScores(predicted, gold, np.ones(4), grid=(1.0, 2.0, 5.0)))}
    assert charts["confusion"].alt == (
        "Confusion matrix: 3 of 4 items on the diagonal. By gold score: 1: 1, 1, 0; 2: 0, 0, 0; 5: 0, 0, 2"
    )


def test_a_scale_of_a_thousand_points_has_no_confusion_matrix():
    scores = JudgedScores(np.array([1.0, 900.0]), np.array([5.0, 1000.0]), np.full(2, np.nan))
    assert "confusion" not in [c.name for c in score_charts(scores)]


def test_histograms_count_every_item_on_both_sides():
    # On the grid 1 to 3 there are five bars: around 1, 1.5, 2, 2.5 and 3.
    predicted, gold = np.array([1.4, 1.5, 1.6, 2.9]), np.array([1.0, 1.0, 1.0, 3.0])
    charts = {c.name: c for c in score_charts(JudgedScores(predicted, gold, np.ones(4), grid=(1.0, 2.0, 3.0)))}
    assert "the fullest bar, around 1, holds 3 items" in charts["score-histograms"].alt
    assert "the fullest bar, around 1.5, holds 3 items" in charts["score-histograms"].alt


def test_probability_reliability_by_hand():
    # Two items on the grid {1, 2}. Stated 0.25: gold once of two (0.5); stated 0.75: once of two.
    probs = np.array([[0.25, 0.75], [0.25, 0.75]])
    gold = np.array([1.0, 2.0])
    charts = {c.name: c for c in score_charts(JudgedScores(gold, gold, np.ones(2), probs, (1.0, 2.0)))}
    assert charts["reliability-of-probabilities"].alt.endswith("0.25: 0.50; 0.75: 0.50")


def test_density_integrates_to_one_and_equals_a_plain_kernel_estimate():
    values = np.random.default_rng(0).normal(3, 0.7, 500)
    places, height = density(values, -2, 8)
    assert height.sum() * (places[1] - places[0]) == pytest.approx(1, abs=1e-3)
    width = 0.9 * min(values.std(), np.ptp(np.percentile(values, [25, 75])) / 1.34) * 500**-0.2
    plain = np.exp(-0.5 * ((places[:, None] - values) / width) ** 2).sum(1) / (500 * width * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(height, plain, atol=0.01 * plain.max())


def test_gold_scores_on_many_levels_are_grouped_in_intervals():
    bins = gold_bins(np.linspace(0, 100, 101))
    assert bins.labels[0] == "0 to 10"
    assert sum(bins.counts) == 101
    assert not bins.exact


def test_predictions_that_are_all_equal_are_one_group():
    assert prediction_bins(np.full(100, 3.0)).counts == [100]


def test_ink_on_a_picture_is_the_one_with_more_contrast():
    assert legible((0, 0, 0, 1), "#000000", "#ffffff") == "#ffffff"
    assert legible((1, 1, 1, 1), "#000000", "#ffffff") == "#000000"


def test_learning_curves_have_a_line_for_each_stage_and_split():
    history = [{"step": 1, "loss/score": 2.0}, {"step": 2, "loss/score": 1.0}, {"step": 2, "eval_loss/score": 1.5}]
    (chart,) = learning_charts({"stage one": history, "stage two": [{"step": 1, "loss/score": float("nan")}]})
    assert chart.alt == "stage one from 2.000 to 1.000; stage one, held out from 1.500 to 1.500"


@pytest.fixture
def run(tmp_path):
    """A run's folder as far as a report reads it."""
    rows = [{"prompt": f"Judge this: reply {i}", "score": r["reference"]} for i, r in enumerate(RECORDS)]
    judged = tmp_path / "judged-tract"
    for folder in ("judged-tract", "stage1", "tract"):
        (tmp_path / folder).mkdir()
    write_jsonl(tmp_path / "eval.jsonl", rows)
    write_jsonl(judged / "judgements.jsonl", RECORDS)
    write_json(judged / "settings.json", {"model": str(tmp_path / "tract"), "top_p": 0.9})
    seal_result(judged, KnownRows(rows), ["judgements.jsonl"])
    history = [{"step": 1, "loss/score": 2.0}, {"step": 2, "loss/score": 1.0}]
    for stage in ("stage1", "tract"):
        write_json(tmp_path / stage / "trainer_state.json", {"log_history": history})
    return tmp_path


def test_a_report_in_a_run_finds_prompts_curves_and_settings(run, capsys):
    assert main(["report", str(run / "judged-tract"), "--n_bootstrap", "20", "--html", str(run / "a.html")]) == 0
    assert f"The HTML report is {run / 'a.html'}. Its 7 charts are in a-plots beside it" in capsys.readouterr().out
    page = (run / "a.html").read_text(encoding="utf-8")
    assert "Judge this: reply 4" in page
    assert "stage two from 2.000 to 1.000" in page
    assert "top_p" in page
    assert date.today().isoformat() in page


def test_prompts_are_shown_only_if_they_are_those_that_were_judged(run):
    write_jsonl(run / "eval.jsonl", [{"prompt": "another", "score": 1.0}] * 5)
    report = items(RECORDS).report
    assert judged_items(Judged(run / "judged-tract").scales[""], report).prompts is None
    with pytest.raises(ValueError, match=r"eval\.jsonl"):
        judged_items(Judged(run / "judged-tract").scales[""], report, data=run / "eval.jsonl")


def test_the_grid_is_read_from_the_judge(run):
    config = {
        "score_values": [0, 5, 10],
        "score_texts": ["0", "5", "10"],
        "score_token_ids": [1, 2, 3],
        "completion_format": {"marker": "[RESULT]"},
        "normalize_grid": False,
    }
    (run / "tract" / "tract_config.json").write_text(json.dumps(config))
    assert judged_items(Judged(run / "judged-tract").scales[""], items(RECORDS).report).grid == (0, 5, 10)


def test_a_folder_of_judgements_alone_has_a_page(run):
    for name in ("settings.json", "finished.json"):
        (run / "judged-tract" / name).unlink()
    judged = judged_items(Judged(run / "judged-tract").scales[""], items(RECORDS).report)
    assert (judged.grid, judged.prompts, judged.settings) == (None, None, {})
    assert page_html(judged)


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    docs = Path(__file__).parent.parent / "docs" / "report.md"
    (code,) = re.findall(r"```python\n(.*?)```", docs.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "Polite, but no remedy." in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_100_000_judgements_make_a_page_of_ordinary_size(tmp_path, capsys):
    rng = np.random.default_rng(0)
    gold = rng.integers(1, 6, 100_000).astype(float)
    scores = np.clip(gold + rng.normal(0, 0.8, 100_000), 1, 5)
    probs = rng.dirichlet(np.ones(5), 100_000).round(6).tolist()
    rationale = "The reply answers the question, but it leaves out what the reader has to do next. " * 5
    rows = ({"prompt": f"Judge reply {i}"} for i in range(100_000))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(
        tmp_path / "judgements.jsonl",
        (
            record(score, gold_score, id=i, group=str(i // 4), probs=[p], rationales=[rationale])
            for i, (score, gold_score, p) in enumerate(zip(scores.tolist(), gold.tolist(), probs, strict=True))
        ),
    )
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "report.html")]) == 0
    assert "100000 of 100000 items scored" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
