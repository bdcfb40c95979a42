"""Settings that a run derives: from facts, pure; what the user sets stays; and what a run does with them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_model, make_rows, make_tokenizer

from trl_tract import CoTRAILJudge, REALConfig, TRACTConfig, run_tract
from trl_tract.backends import ScriptedBackend
from trl_tract.backends.device import count_parameters
from trl_tract.cli import main
from trl_tract.commands.dry_run import Plan
from trl_tract.commands.entry_points import _option_groups
from trl_tract.commands.parsing import names_given, parse
from trl_tract.evaluation.recalibration import Recalibration, applied_by_default
from trl_tract.files.journal import differences, read_json, read_jsonl, write_jsonl
from trl_tract.runs.facts import facts_of
from trl_tract.runs.judged import Judged
from trl_tract.runs.results import calibrate_judge, recalibrate
from trl_tract.runs.spec import RunSpec
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import read_scales
from trl_tract.sources.door import Source
from trl_tract.training.config import field_values
from trl_tract.training.recipe import CONSIDERED, Device, Facts, calibration_share, derive, score_weight

GPU = Device(kind="cuda", memory=24 * 10**9, bfloat16=True)
FACTS = Facts(
    parameters=135 * 10**6,
    rows=150,
    tokens=485.0,
    longest=900,
    rationale=60,
    variances={"": 0.137},
    spans={"": 1.0},
    device=Device(kind="cpu", memory=24 * 10**9, bfloat16=False),
)
TINY = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False}


def derived(**changes):
    """All derived settings by name, of the facts above with some changed; `given` is what the user has set."""
    given = changes.pop("given", {})
    recipe = derive(replace(FACTS, **changes), given).to_dict()
    return recipe["training"] | recipe["model_args"] | recipe["generation"]


@pytest.mark.parametrize("unit", [0.25, 1.0, 25.0])
def test_the_weight_of_the_squared_error_does_not_depend_on_the_units(unit):
    # Always predicting the mean costs variance * weight, whatever the scores are counted in.
    assert score_weight(2.0 * unit**2, 4.0 * unit) * 2.0 * unit**2 == pytest.approx(1, rel=0.05)


def test_gold_scores_that_are_all_the_same_have_a_finite_weight():
    assert score_weight(0.0, 1.0) == 100


@pytest.mark.parametrize("size", [135e6, 0.5e9, 1.7e9, 4e9, 8e9])
def test_the_learning_rate_falls_with_size_within_its_bounds(size):
    here, larger = (derived(parameters=int(each), device=GPU)["learning_rate"] for each in (size, 2 * size))
    assert 1e-4 <= larger < here <= 1e-3 or larger == here == 1e-3


@pytest.mark.parametrize("rows", [100, 150, 300, 499, 500, 1500])
def test_every_number_of_rows_gets_updates_enough_to_learn(rows):
    settings = derived(rows=rows)
    together = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert 100 <= settings["num_train_epochs"] * rows / together <= 400


@pytest.mark.parametrize(
    ("given", "batch", "accumulated", "epochs", "updates"),
    [
        # 150 rows; 4 in an update, and about 120 updates, unless more is given.
        ({}, 4, 1, 3, 114),
        ({"per_device_train_batch_size": 1}, 1, 4, 3, 114),
        ({"gradient_accumulation_steps": 2}, 2, 2, 3, 114),
        ({"gradient_accumulation_steps": 8}, 1, 8, 4, 76),
        ({"per_device_train_batch_size": 32}, 32, 1, 4, 20),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, 1, 1, 1, 150),
    ],
)
def test_epochs_go_with_the_rows_of_an_update_that_are_given(given, batch, accumulated, epochs, updates):
    recipe = derive(FACTS, given).to_dict()
    settings = given | recipe["training"]
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (batch, accumulated)
    assert settings["num_train_epochs"] == epochs
    assert recipe["why"]["num_train_epochs"] == f"about {updates} updates"
    assert Plan.of([485] * 150, settings, 1).updates == updates


def test_a_given_accumulation_leaves_the_batch_within_its_tokens():
    # 16 rows in an update of 5,000 rows and more; 8,192 tokens hold two of 3,000.
    settings = derived(rows=5000, longest=3000, given={"gradient_accumulation_steps": 2})
    assert settings["per_device_train_batch_size"] == 2


@pytest.mark.parametrize(("longest", "processes"), [(200, 1), (3000, 1), (9000, 1), (200, 4), (3000, 8)])
def test_the_rows_of_an_update_do_not_depend_on_how_they_are_spread(longest, processes):
    settings = derived(rows=1500, longest=longest, device=replace(GPU, processes=processes))
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes == 8


@pytest.mark.parametrize(
    ("size", "gigabytes", "quantised"), [(8, 80, False), (8, 24, True), (4, 12, True), (1.7, 12, False), (8, 16, True)]
)
def test_four_bits_are_for_models_that_fill_the_memory(size, gigabytes, quantised):
    settings = derived(parameters=int(size * 1e9), device=replace(GPU, memory=gigabytes * 10**9))
    assert settings.get("load_in_4bit", False) is quantised
    assert settings["use_peft"] is True


def test_a_model_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="needs 49 GB"):
        derived(parameters=70 * 10**9, device=GPU)


def test_what_the_user_sets_is_not_derived():
    settings = derived(given={"learning_rate": 3e-4, "lora_r": 4, "max_steps": 7, "max_new_tokens": 9})
    assert not {"learning_rate", "lora_r", "max_new_tokens", "num_train_epochs"} & settings.keys()
    assert settings["lora_alpha"] == 8


def test_full_training_has_a_smaller_rate_and_no_adapter():
    settings = derived(given={"use_peft": False})
    assert settings["learning_rate"] == pytest.approx(derived()["learning_rate"] / 10)
    assert not {"use_peft", "lora_r", "lora_target_modules"} & settings.keys()


def test_without_a_loss_of_its_own_the_score_is_in_the_cross_entropy():
    settings = derived(given={"annotator_loss": "none"})
    assert settings["score_in_ce"] is True
    assert "annotator_weight" not in settings


def test_derived_settings_are_fields_of_the_configuration(tmp_path):
    training = derive(FACTS).to_dict()["training"]
    config = TRACTConfig(str(tmp_path), **{**training, "bf16": False})
    assert config.annotator_loss == "distribution"


@pytest.mark.parametrize("given", [[], ["--gradient_checkpointing", "true"], ["--activation_checkpointing", "true"]])
def test_the_command_line_trains_with_what_was_derived_or_given(given, tmp_path):
    # It sets every field, by each of its names: a derived value has to replace them all, a given one none.
    name = given[0].strip("-") if given else ""
    if name and name not in TRACTConfig.__dataclass_fields__:
        pytest.skip("this transformers has one name for it")
    recipe = derive(FACTS, dict.fromkeys([name], True) if name else {}).to_dict()
    *_, training, _ = parse("run", _option_groups("run"), ["--data", "rows", "--output_dir", str(tmp_path), *given])
    spec = RunSpec("seed", "rows", training=field_values(training)).with_recipe(recipe)
    trained, wanted = (
        TRACTConfig(**{**settings, "output_dir": str(tmp_path)}).to_dict()
        for settings in (spec.training, {**recipe["training"], **dict.fromkeys([name][: len(given)], True)})
    )
    assert {field for field in trained if trained[field] != wanted[field]} <= {"logging_dir"}
    assert trained["gradient_checkpointing"] is bool(given)


def test_a_given_default_makes_another_run(tmp_path):
    # With learning_rate=2e-5, TRL's default, nothing but its being given tells these runs apart.
    def settings(*given):
        arguments = ["--data", "rows", "--output_dir", str(tmp_path), *given]
        *_, training, _ = parse("run", _option_groups("run"), arguments)
        names = frozenset(names_given("run", _option_groups("run"), arguments))
        return RunSpec("seed", "rows", training=field_values(training), given=names).settings()

    assert differences(settings(), settings("--learning_rate", "2e-5"))
    assert not differences(settings(), settings("--logging_steps", "10"))


@pytest.mark.parametrize("device", [FACTS.device, GPU, replace(GPU, memory=10**9)])
def test_all_that_a_derivation_sets_counts_as_considered(device):
    recipe = derive(replace(FACTS, parameters=600 * 10**6, device=device, distinct=0.5)).to_dict()
    assert {name for part in ("training", "model_args", "generation") for name in recipe[part]} <= CONSIDERED


def test_what_is_given_for_the_reinforcement_replaces_what_the_other_stages_have(tmp_path):
    training = field_values(TRACTConfig(str(tmp_path), bf16=False, gradient_checkpointing=True))
    chosen = RunSpec("seed", "rows", training=training, rl={"gradient_checkpointing": False}).rl_training
    assert REALConfig(**{**chosen, "output_dir": str(tmp_path)}).to_dict()["gradient_checkpointing"] is False


@pytest.mark.parametrize(
    ("device", "given", "bf16", "dtype"),
    [
        (GPU, {}, True, "bfloat16"),
        (FACTS.device, {}, False, "float32"),
        # Weights that are trained stay in float32; autocast computes in 16 bits.
        (GPU, {"use_peft": False}, True, "float32"),
        (GPU, {"use_peft": False, "fp16": True}, None, "float32"),
        (GPU, {"bf16": False}, None, "float32"),
        (FACTS.device, {"bf16": True}, None, "bfloat16"),
        (GPU, {"model_init_kwargs": {"dtype": "float32"}}, True, None),
        (GPU, {"model_init_kwargs": '{"dtype": "float32"}'}, True, None),
    ],
)
def test_weights_are_loaded_as_they_are_trained_unless_it_is_given(device, given, bf16, dtype):
    settings = derived(device=device, given=given)
    assert (settings.get("bf16"), settings.get("dtype")) == (bf16, dtype)


def test_full_training_has_room_for_float32_weights():
    # 7B: 14 GB in 16 bits, 28 GB in float32; four bits would be for frozen weights.
    with pytest.raises(ValueError, match="needs 28 GB"):
        derived(parameters=7 * 10**9, device=GPU, given={"use_peft": False})
    assert "dtype" not in derived(parameters=7 * 10**9, device=GPU, given={"use_peft": False, "dtype": "bfloat16"})


def test_half_precision_asked_for_by_name_is_not_given_another():
    settings = derived(given={"fp16": True}, device=GPU)
    assert "bf16" not in settings
    assert settings["dtype"] == "float16"


def test_the_configuration_by_itself_keeps_the_papers_objective(tmp_path):
    config = TRACTConfig(str(tmp_path), bf16=False)
    assert (config.raft_weight, config.score_in_ce, config.annotator_loss) == (1.0, False, "none")


@pytest.mark.parametrize(("rows", "kept"), [(40, 0), (100, 20), (150, 30), (300, 30), (1476, 148), (10**5, 200)])
def test_a_tenth_is_kept_aside_but_not_of_very_few_rows(rows, kept):
    assert round(calibration_share(rows) * rows) == kept


ASPECTS = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]", "values": [0, 50, 100], "raft_weight": 3.0}}


@pytest.mark.parametrize("aspects", [ASPECTS, json.dumps(ASPECTS)])
def test_each_aspect_is_weighted_by_its_own_gold_scores_unless_its_weight_is_given(aspects):
    facts = replace(FACTS, variances={"tone": 1.0, "facts": 900.0}, spans={"tone": 4.0, "facts": 100.0})
    spec = RunSpec("seed", "rows", training={"aspects": aspects})
    recipe = derive(facts, spec.set_by_user).to_dict()
    assert recipe["training"]["raft_weight"] == {"tone": 1.0}
    assert [scale.raft_weight for scale in spec.with_recipe(recipe).scales] == [1.0, 3.0]


def test_no_weight_is_derived_where_every_aspect_has_one():
    aspects = {name: {**aspect, "raft_weight": 2.0} for name, aspect in ASPECTS.items()}
    facts = replace(FACTS, variances={"tone": 1.0, "facts": 900.0}, spans={"tone": 4.0, "facts": 100.0})
    assert "raft_weight" not in derive(facts, {"aspects": aspects}).to_dict()["training"]


def items(prompts_of_groups):
    return [
        {"prompt": f"{group} {number}", "completion": "a [RESULT] 3", "group": group}
        for group, count in prompts_of_groups.items()
        for number in range(count)
    ]


def kept(tmp_path, rows, evaluated=None):
    """The groups and prompts that a run of these rows keeps aside, or why none."""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    source, other = Source(str(tmp_path / "rows.jsonl"), read_scales({})), None
    if evaluated is not None:
        write_jsonl(tmp_path / "eval.jsonl", evaluated)
        other = Source(str(tmp_path / "eval.jsonl"), read_scales({}))
    aside = RunSpec("seed", "rows").kept_aside(source, lambda item: item.group == "0", other)
    if isinstance(aside, str):
        return aside
    return [item for _, item in source.items() if aside(item) and item.group != "0"]


def test_whole_groups_are_kept_aside_and_none_that_is_held_out(tmp_path):
    found = kept(tmp_path, items({str(group): 4 for group in range(30)}))
    groups = {item.group for item in found}
    assert len(groups) >= 5
    assert len(found) == 4 * len(groups)
    assert "0" not in groups


def test_other_items_of_the_groups_are_kept_aside_where_evaluation_has_them_too(tmp_path):
    rows = items({str(group): 30 for group in range(1, 5)})
    found = kept(tmp_path, rows, [{"prompt": f"{group} new", "score": 3, "group": str(group)} for group in (1, 2)])
    assert len(found) == 24
    assert len({item.group for item in found}) == 4


@pytest.mark.parametrize("groups", [{"a": 50, "b": 50, "c": 50}, {str(group): 1 for group in range(20)}])
def test_too_few_groups_or_rows_leave_all_to_train_on(groups, tmp_path):
    assert "too few" in kept(tmp_path, items(groups))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--learning_rate", "1e-4", "--data", "a"], {"learning_rate", "data"}),
        (["--learning-rate=1e-4", "--use_peft"], {"learning_rate", "use_peft"}),
        (["--model", "a"], {"model_name_or_path"}),
        (["--config", "run.yaml"], {"raft_weight", "model"}),
        (["--config=run.yaml", "--lora_r", "2"], {"raft_weight", "model", "lora_r"}),
    ],
)
def test_what_was_given_on_the_line_or_in_the_file_is_known(arguments, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("raft_weight: 1.0\nmodel: a\n", encoding="utf-8")
    assert names_given("run", _option_groups("run"), arguments) == names


def test_parameters_are_counted_without_weights(seed_model):
    assert count_parameters(seed_model) == sum(weight.numel() for weight in make_model().parameters())


@pytest.mark.parametrize(
    ("distinct", "given", "shared"),
    [
        (0.8, {}, True),
        (0.81, {}, None),
        (0.5, {"per_device_train_batch_size": 1}, None),
        (0.5, {"neftune_noise_alpha": 5.0}, None),
        (0.5, {"share_prompts": False}, None),
    ],
)
def test_prompts_are_shared_where_rows_begin_alike(distinct, given, shared):
    assert derived(distinct=distinct, given=given).get("share_prompts") is shared


def test_how_much_rows_have_in_common_does_not_depend_on_their_order(seed_model):
    def distinct(rows):
        return facts_of(seed_model, rows, {}).distinct

    alike = [{**row, "prompt": "judge this reply by its tone " * 9 + row["prompt"]} for row in make_rows(30)]
    by_question = [{**row, "prompt": f"{number} " * 60 + row["prompt"]} for number in range(5) for row in make_rows(30)]
    assert distinct(alike) < 0.5
    assert distinct(by_question) > 0.75
    assert distinct([{**row, "prompt": row["completion"][:9] + row["prompt"]} for row in make_rows(30)]) > 0.9


def test_rows_that_cannot_be_used_are_no_sample_of_what_others_have_in_common(seed_model):
    bad = {"prompt": "a", "completion": " no score", "score": 1.0}
    mixed = [each for row in make_rows(400) for each in (bad, row)]
    assert facts_of(seed_model, mixed, {}).distinct < 0.9


def test_the_facts_are_those_of_the_rows(seed_model):
    rows = make_rows(30)
    facts = facts_of(seed_model, rows, {})
    assert facts.rows == 30
    assert facts.variances[""] == pytest.approx(np.var([row["score"] for row in rows]))
    assert facts.spans == {"": 4.0}
    assert 0 < facts.rationale < facts.longest
    assert facts.tokens < facts.longest


@pytest.fixture(scope="module")
def finished(seed_model, tmp_path_factory, without_matplotlib):
    """A run by the defaults, on a random model without rationales, which always has scores: what it said, and where."""
    directory = tmp_path_factory.mktemp("run")
    write_jsonl(directory / "rows.jsonl", make_rows(100))
    said = []

    def start():
        return run_tract(seed_model, str(directory / "rows.jsonl"), directory / "out", eval_fraction=0.2, training=TINY,
                         rationales="none", say=said.append)  # fmt: skip

    start()
    return directory / "out", said, start


def test_a_run_says_and_writes_down_its_settings(finished):
    out, said, _ = finished
    recipe = read_json(out / "recipe.json")
    assert recipe["facts"]["rows"] == 64
    assert f"raft_weight {recipe['training']['raft_weight']:g}" in "\n".join(said)
    assert json.loads((out / "tract" / "tract_recipe.json").read_text()) == recipe


def test_a_run_trains_with_its_settings(finished):
    step = read_json(finished[0] / "stage2.json")
    recipe = read_json(finished[0] / "recipe.json")
    assert {**step["training"], **recipe["training"]} == step["training"]
    assert step["training"]["bf16"] is False  # as it was told to
    assert step["model_args"]["lora_target_modules"] == "all-linear"


def test_items_are_trained_on_calibrated_on_or_evaluated_on(finished):
    parts = [list(read_jsonl(finished[0] / f"{name}.jsonl")) for name in ("train", "calibration", "eval")]
    assert [len(part) for part in parts] == [64, 16, 20]
    prompts = [json.dumps(row["prompt"]) for part in parts for row in part]
    assert len(set(prompts)) == 100


def test_held_out_items_are_judged_with_the_calibration(finished):
    out = finished[0]
    fitted = Recalibration.load(out / "tract")
    raw, judged = Judged(out / "calibration-tract"), Judged(out / "judged-tract")
    assert (raw.settings["recalibrate"], judged.settings["recalibrate"]) == (False, True)
    records = list(read_jsonl(out / "judged-tract" / "judgements.jsonl"))
    assert [record["score"] for record in records] == pytest.approx(
        [float(fitted(record["scores"][0])) for record in records]
    )


def test_a_finished_run_with_a_calibration_does_nothing_again(finished):
    _, said, start = finished
    before = len(said)
    start()
    assert sum("finished before" in line for line in said[before:]) == 6


def test_a_judge_applies_what_its_run_fitted_unless_told_otherwise(finished):
    directory, backend = finished[0] / "tract", ScriptedBackend(lambda *_: "", make_tokenizer())
    given = [CoTRAILJudge.from_pretrained(directory, backend, **options).recalibration for options in (
        {}, {"recalibrate": False})]  # fmt: skip
    assert given == [{"": Recalibration.load(directory)}, None]


def judgements(directory, scores, golds):
    directory.mkdir()
    JudgeConfig(read_scales({})).save(directory)
    rows = [{"score": score, "reference": gold, "error": None} for score, gold in zip(scores, golds, strict=True)]
    write_jsonl(directory / "judgements.jsonl", rows)
    return directory


GOLDS = np.tile([1.0, 2.0, 3.0, 4.0, 5.0], 8)


@pytest.mark.parametrize(
    ("scores", "applied"), [(GOLDS, False), (np.where(GOLDS > 3, 5.0, 1.0), True), (np.full(40, 4.9), True)]
)
def test_a_calibration_is_kept_where_it_lowers_the_error(scores, applied, tmp_path):
    judged = judgements(tmp_path / "judged", scores, GOLDS)
    calibrate_judge(judged, judged)
    assert (judged / "tract_calibration.json").is_file() is applied


def test_aspects_are_calibrated_each_by_itself(tmp_path):
    aspects = {"tone": {"marker": "[TONE]"}, "facts": {"marker": "[FACTS]"}}
    JudgeConfig(read_scales({"aspects": aspects})).save(tmp_path)
    scores = {"tone": np.where(GOLDS > 3, 5.0, 1.0), "facts": GOLDS}
    rows = [
        {"aspects": {name: {"score": each[number], "reference": gold, "error": None} for name, each in scores.items()}}
        for number, gold in enumerate(GOLDS)
    ]
    write_jsonl(tmp_path / "judgements.jsonl", rows)
    said = calibrate_judge(tmp_path, tmp_path)
    fitted = {name: Recalibration.load(tmp_path, scale=name) for name in scores}
    assert fitted["facts"](GOLDS).tolist() == GOLDS.tolist()
    assert fitted["tone"].slope < 0.9
    calibrated, _, left = said.partition("Not applied")
    assert ("tone" in calibrated, "facts" in calibrated, "facts" in left) == (True, False, True)


def test_a_calibration_of_the_users_stays(tmp_path):
    judged = judgements(tmp_path / "judged", np.where(GOLDS > 3, 5.0, 1.0), GOLDS)
    calibrate_judge(judged, judged)
    own = replace(Recalibration.load(judged), slope=0.5)
    own.save(judged)
    assert "kept" in calibrate_judge(judged, judged)
    assert Recalibration.load(judged).slope == 0.5


@pytest.mark.parametrize("always", [True, False])
def test_a_new_calibration_is_applied_like_the_one_that_it_replaces(always, tmp_path):
    judged = judgements(tmp_path / "judged", np.where(GOLDS > 3, 5.0, 1.0), GOLDS)
    recalibrate(judged, always=always, model=str(judged))
    recalibrate(judged, model=str(judged))
    assert applied_by_default(judged) is always


def test_a_calibration_keeps_the_order_of_a_judge_that_ranks_by_chance(tmp_path):
    scores = np.random.default_rng(0).permutation(GOLDS)
    fitted = Recalibration.fit(scores, GOLDS, [1, 5], least_spread=0.15)
    assert np.std(fitted(scores)) >= 0.15 * np.std(GOLDS) - 1e-9
    assert Recalibration.fit(np.full(40, 4.9) + 0.001 * scores, GOLDS, [1, 5], least_spread=0.15).slope <= 1


def test_too_few_scores_leave_a_judge_as_it_is(tmp_path):
    judged = judgements(tmp_path / "judged", GOLDS[:6], GOLDS[:6])
    assert "not calibrated" in calibrate_judge(judged, judged)


def test_a_dry_run_says_what_would_be_derived(seed_model, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(100))
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert main(["run", "--model", seed_model, *paths, "--dry-run", "--lora_r", "4", "--bf16", "false"]) == 0
    printed = capsys.readouterr().out
    assert "lora_alpha 8" in printed
    assert "lora_r" not in printed
    assert "72 rows to train on, 10 held-out items in 10 groups, 18 items set aside" in printed
    assert not (tmp_path / "out").exists()
