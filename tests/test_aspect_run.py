"""A run on rows with several scores: every step, the report, page and card of each aspect, and the command line."""

import json
import math

import pytest
from conftest import save_seed
from test_aspects import ASPECTS, make_rows

from trl_tract import run_tract
from trl_tract.cli import main
from trl_tract.files.journal import read_jsonl, write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import read_aspects
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import Source
from trl_tract.sources.schemas import read_items

TRAINING = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "aspects": ASPECTS,
}
GRID = ScoreGrid.from_values([1, 2, 3, 4, 5])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    save_seed(directory / "seed")
    write_jsonl(directory / "rows.jsonl", make_rows(ASPECTS, 6))
    result = run_tract(
        str(directory / "seed"),
        str(directory / "rows.jsonl"),
        directory / "out",
        eval_fraction=0.5,
        training=TRAINING,
        generation={"max_new_tokens": 4, "max_attempts": 1},
        say=lambda text: None,
    )
    return directory / "out", result


def test_a_run_reports_each_aspect_on_its_own_grid(finished):
    out, result = finished
    names = ["stage one, tone", "stage one, facts", "TRACT, tone", "TRACT, facts"]
    assert list(result.reports) == names
    assert list(json.loads((out / "report.json").read_text())["judges"]) == names
    judged = Judged(out / "judged-tract")
    assert list(judged.scales) == ["tone", "facts"]
    assert judged.scales["facts"].grid == tuple(range(101))
    assert (out / "report-tone.html").is_file()
    assert (out / "report-facts.html").is_file()


def test_judgements_hold_each_aspects_gold_score(finished):
    out, _ = finished
    wanted = [row["scores"] for row in read_jsonl(out / "eval.jsonl")]
    for aspect in ("tone", "facts"):
        read = Judged(out / "judged-tract").scales[aspect]
        assert read.reference.tolist() == [scores[aspect] for scores in wanted]
        # The random model never writes its marker.
        assert all("no rationale reached '[TONE]'" in record["error"] for record in read.records)


def test_the_card_has_both_grids_markers_and_evaluations(finished):
    card = (finished[0] / "tract" / "README.md").read_text(encoding="utf-8")
    assert "- Score grid: tone: 1, 2, 3, 4, 5; facts: 0, 1, 2, 3, 4, ..., 100" in card
    assert "- Marker before the score: `[TONE]`, `[FACTS]`" in card
    assert card.index("### tone") < card.index("### facts")
    assert "judgement.aspects.items()" in card


def judged(name: str, shift: float) -> dict[str, object]:
    """A record of a judge that is off by `shift`."""

    def one(score: float, gold: float) -> dict[str, object]:
        return {"score": score, "scores": [score], "rationales": ["so"], "probs": [], "grid_mass": 0.9, "std": 0.1,
                "error": None, "pruned_mass": 0.0, "error_bound": 0.0, "reference": gold}  # fmt: skip

    number = int(name)
    tone, facts = 1.0 + number % 5, 10.0 * (number % 7)
    aspects = {"tone": one(tone + shift, tone), "facts": one(facts + 10 * shift, facts)}
    return {"reference": None, "id": name, **one(math.nan, math.nan), "score": None, "aspects": aspects}


def test_the_report_command_takes_aspects_one_by_one_and_compares_them(tmp_path, capsys):
    for folder, shift in (("a", 0.5), ("b", 0.25)):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "judgements.jsonl", [judged(str(number), shift) for number in range(20)])
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["report", *folders, "--n_bootstrap", "50"]) == 0
    printed = capsys.readouterr().out
    assert [line.split(" (")[0].split("/")[-1] for line in printed.splitlines() if "grid mass" in line] == [
        "a, tone",
        "b, tone",
        "a, facts",
        "b, facts",
    ]
    # Off by 0.5 of 1 to 5, and by ten times as much on the other aspect's scale.
    mae = [line.split()[1] for line in printed.splitlines() if line.startswith("mae")]
    assert mae[0] == "0.500"
    assert "5.000" in mae
    write_jsonl(tmp_path / "b" / "judgements.jsonl", [{**judged("1", 0), "aspects": {}}])
    assert main(["report", *folders]) == 1
    assert "Give two directories with the same kind of judgements" in capsys.readouterr().err


def test_a_rows_file_is_read_with_a_score_for_each_aspect(tmp_path):
    aspects = read_aspects(ASPECTS)
    rows = make_rows(ASPECTS, 2)
    del rows[1]["scores"]  # then those in the completion count
    write_jsonl(tmp_path / "rows.jsonl", rows)
    items = [item for _, item in Source(str(tmp_path / "rows.jsonl"), aspects).items()]
    assert items[0].reference["scores"] == rows[0]["scores"]
    written = rows[1]["completion"].replace("\n", " ").split()
    assert items[1].reference["scores"] == {
        "tone": float(written[written.index("[TONE]") + 1]),
        "facts": float(written[-1]),
    }
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "scores": {"tone": 1}}])
    ((number, refusal),) = Source(str(tmp_path / "rows.jsonl"), aspects).found()
    assert (number, refusal.kind) == (0, "aspect missing")


def test_columns_of_ones_own_may_hold_aspects(tmp_path):
    rows = make_rows(ASPECTS, 3)
    renamed = [{"ask": row["prompt"], "reply": row["completion"], "scores": row["scores"]} for row in rows]
    write_jsonl(tmp_path / "own.jsonl", renamed)
    own = OwnColumns.parse(["prompt=ask", "completion=reply"], None)
    source = Source(str(tmp_path / "own.jsonl"), read_aspects(ASPECTS), own)
    assert [row for _, row in source.training_rows(chat=False)] == rows


def test_a_rubric_is_for_rows_with_one_score(tmp_path):
    write_jsonl(tmp_path / "own.jsonl", [{"ask": "a", "note": "b", "stars": 3}])
    own = OwnColumns.parse(["prompt=ask", "rationale=note", "score=stars"], None)
    with pytest.raises(ValueError, match="--rubric"):
        next(Source(str(tmp_path / "own.jsonl"), read_aspects(ASPECTS), own).found())


def test_rows_without_gold_scores_are_judged_on_their_aspects(tmp_path):
    aspects = read_aspects(ASPECTS)
    write_jsonl(tmp_path / "own.jsonl", [{"ask": "a"}, {"ask": "b"}])
    source = Source(str(tmp_path / "own.jsonl"), aspects, OwnColumns.parse(["prompt=ask"], None))
    assert [row["prompt"] for _, row in source.judged_rows(chat=False)] == ["a", "b"]
    # As a Parquet or CSV file has them: the columns of another row, empty here.
    (item,) = read_items({"prompt": "a", "completion": None, "scores": None}, aspects, judged=True)
    assert item.reference == {"prompt": "a"}
    (item,) = read_items({"prompt": "a", "scores": {"tone": 2, "facts": 30}}, aspects, judged=True)
    assert item.reference["scores"] == {"tone": 2, "facts": 30}
