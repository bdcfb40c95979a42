"""A folder of judgements: read once, by whoever needs it; whole records only when they are asked for."""

import math
import tracemalloc
from pathlib import Path

import pytest

from trl_tract.files.journal import write_json, write_jsonl
from trl_tract.judge.judgement import Judgement
from trl_tract.runs.judged import Judged, check_same_items
from trl_tract.runs.results import page_file
from trl_tract.runs.steps import _record
from trl_tract.scale.scale import read_scales


def record(score, gold, **more):
    error = "no room" if score is None else None
    return {"reference": gold, "score": score, "grid_mass": None if score is None else 0.5, "error": error, **more}


def folder(path, records, **settings):
    path.mkdir(exist_ok=True)
    write_jsonl(path / "judgements.jsonl", records)
    if settings:
        write_json(path / "settings.json", settings)
    return Judged(path)


def test_one_score_is_a_scale_without_a_name(tmp_path):
    judged = folder(tmp_path, [record(2.0, 1.0), record(None, 3.0)], score_values={"bad": 1, "good": 3})
    (scale,) = judged.scales.values()
    assert (scale.name, scale.called("TRACT"), scale.grid) == ("", "TRACT", (1.0, 3.0))
    assert scale.reference.tolist() == [1.0, 3.0]
    assert math.isnan(scale.score[1])
    assert (scale.errors, scale.mean_grid_mass) == ({"no room": 1}, 0.5)


def test_each_aspect_has_its_own_records_and_grid(tmp_path):
    aspects = {"tone": record(1.0, 2.0, rationales=["Rude."]), "facts": record(None, 70.0)}
    judged = folder(
        tmp_path,
        [{**record(None, None), "id": "a", "aspects": aspects}],
        aspects={"tone": {"values": [1, 2]}, "facts": {"values": [0, 100]}},
    )
    tone, facts = judged.scales.values()
    assert (tone.grid, facts.grid) == ((1.0, 2.0), (0.0, 100.0))
    assert tone.records[0] == {"id": "a", **aspects["tone"]}
    assert (tone.errors, facts.errors) == ({}, {"no room": 1})


def test_items_without_a_gold_score_are_in_no_figure_and_the_records_follow(tmp_path):
    golds = [1.0, None, 3.0, 4.0, None, 2.0]
    judged = folder(tmp_path, [record(2.0 + i, gold, id=i) for i, gold in enumerate(golds)])
    scale = judged.scales[""]
    assert scale.report(n_bootstrap=0).n == 4
    assert [each["id"] for each in scale.records] == [each["id"] for each in scale.records[:]] == [0, 2, 3, 5]
    assert scale.records[-1]["id"] == 5
    with pytest.raises(ValueError, match="gold"):
        folder(tmp_path, [record(1.0, None)]).scales[""].report()


def test_the_report_knows_rationales_and_raters_of_each_scale(tmp_path):
    texts = ["Fine.", "Fine.", "Rude.", ""]
    records = [record(2.0 + i, 1.0 + i, rationales=[text], raters=[i, i + 2]) for i, text in enumerate(texts)]
    records += [record(None, 3.0, rationales=[]), record(3.0, None, raters=None)]
    standing = folder(tmp_path, records).scales[""].report(n_bootstrap=0).standing
    assert (standing.rationales, standing.distinct, standing.raters.n) == (3, 2, 4)


def test_several_raters_of_a_row_reach_the_verdict(tmp_path):
    golds = [[1.0, 2.0, 1.5], [4.0], [5.0, 4.0, 4.5], [2.0, 3.0, 2.5], [3.0, 3.0, 4.0], [1.0, 1.0, 2.0]]
    scales, judged = read_scales({}), [Judgement(score=1.0 + i % 5, grid_mass=1.0) for i in range(len(golds))]
    records = [_record({"id": i}, [gold], judged[i], scales) for i, gold in enumerate(golds)]
    assert records[0]["reference"] == 1.5
    assert "raters" not in records[1]  # of one rater, a line is what it always was
    report = folder(tmp_path, records).scales[""].report(n_bootstrap=20)
    assert report.standing.raters.n == 5
    assert {"at raters", "below raters", "above raters"} & {finding.kind for finding in report.verdict}


def test_rows_that_were_judged_on_different_scales_are_refused_by_number(tmp_path):
    with pytest.raises(ValueError, match="row 1"):
        folder(tmp_path, [record(1.0, 1.0), {**record(1.0, 1.0), "aspects": {"tone": record(1.0, 1.0)}}])


@pytest.mark.parametrize("change", [{"gold": 2.0}, {"gold": None}, {"group": "q"}, {"id": 7}])
def test_judges_of_other_items_are_told_apart(change, tmp_path):
    item = {"gold": 1.0, "id": 1}
    a, b = (
        folder(tmp_path / name, [record(3.0, **each)]).scales[""] for name, each in (("a", item), ("b", item | change))
    )
    check_same_items(a, a, ("a", "a"))
    with pytest.raises(ValueError, match="judgement 0"):
        check_same_items(a, b, ("a", "b"))


def test_groups_are_resampled_where_items_share_them(tmp_path):
    def units(groups):
        records = [record(float(i % 3), float(i % 4), group=group) for i, group in enumerate(groups)]
        return folder(tmp_path, records).scales[""].report(n_bootstrap=10).n_groups

    assert units("aabbccdd") == 4
    assert units("abcdefgh") is None  # each its own: items


def test_memory_does_not_grow_with_rationales(tmp_path):
    records = (record(1.0 + i % 5, 1.0 + i % 4, rationales=["word " * 200]) for i in range(3000))
    folder(tmp_path, records)
    tracemalloc.start()
    judged = Judged(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(judged) == 3000
    assert held < 1_000_000  # the rationales alone are 3 MB


def test_every_aspect_has_a_file_of_its_own():
    names = ["tone", "Tone", "ton", "tön", "ton-e", "ton e", "ton/e?", "ton_e", "clarté", "clart", "é", "è", "?", "!",
             "正確さ", "正确性", "x" * 50, "X" * 50, "x" * 49 + "é", "-", "a-1", "a 1"]  # fmt: skip
    files = [page_file(Path("report.html"), name).name for name in names]
    assert len({name.lower() for name in files}) == len(names)
    assert all(name.isascii() and len(name) < 80 for name in files)
    assert files[0] == "report-tone.html"
    forged = files[1].removeprefix("report-").removesuffix(".html")  # a name like another one's file
    assert page_file(Path("report.html"), forged).name != files[1]
    assert page_file(Path("report.html"), "") == Path("report.html")
