"""The command line as a user meets it: own CSV to judge, exit codes, help, completion."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from command_line import parse
from conftest import CHATML, WORDS, make_model, make_rows, make_tokenizer, save_seed

from trl_tract import CoTRAILJudge
from trl_tract.backends import ScriptedBackend
from trl_tract.cli import main
from trl_tract.commands import entry_points as commands
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.files.journal import read_jsonl, write_json, write_jsonl

RUBRIC = "criterion: is it polite\nscores: {1: wrong, 2: long, 3: short, 4: clear, 5: polite}\n"
COLUMNS = ["--columns", "instruction=question", "response=answer", "rationale=feedback", "score=stars"]
TRAINING = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--bf16", "false", "--save_strategy", "no"]
TRAINING += ["--report_to", "none", "--disable_tqdm", "true", "--gradient_checkpointing", "false"]
MODEL = ("model", "model_name_or_path")
SAMPLING = ["--max_new_tokens", "4", "--max_attempts", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A seed model, a rubric, rows of CSV, and a judge that was trained on them."""
    folder = tmp_path_factory.mktemp("user")
    save_seed(folder / "seed")
    (folder / "rubric.yaml").write_text(RUBRIC)
    lines = [f"{WORDS[i]},{WORDS[-i]},it is {WORDS[i]},{1 + i % 5}" for i in range(12)]
    (folder / "rows.csv").write_text("question,answer,feedback,stars\n" + "\n".join(lines) + "\n")
    assert main(["train", *own(folder), "--output_dir", str(folder / "judge"), *TRAINING]) == 0
    return folder


def own(folder, *, of="seed"):
    paths = ["--data", str(folder / "rows.csv"), "--rubric", str(folder / "rubric.yaml")]
    return ["--model", str(folder / of), *paths, *COLUMNS]


def judge(folder, out, *options):
    return main(["judge", *own(folder, of="judge"), "--output_dir", str(out), *SAMPLING, *options])


def test_rows_of_csv_train_a_judge_by_the_users_rubric(folder):
    config = json.loads((folder / "judge" / "tract_config.json").read_text())
    assert config["score_values"] == [1, 2, 3, 4, 5]
    card = (folder / "judge" / "README.md").read_text()
    assert "###Score rubric: [is it polite]\nScore 1: wrong\nScore 2: long\n" in card


def test_rows_of_csv_are_judged_and_kept_for_the_report(folder, tmp_path):
    assert judge(folder, tmp_path / "out") == 0
    judgements = list(read_jsonl(tmp_path / "out" / "judgements.jsonl"))
    assert [record["reference"] for record in judgements] == [float(1 + i % 5) for i in range(12)]
    rows = list(read_jsonl(tmp_path / "out" / "rows.jsonl"))
    assert rows[0]["prompt"][0]["content"].startswith("Read the response below")  # the tokenizer has a chat template


@pytest.mark.parametrize("command", ["judge", "distill"])
def test_a_judge_of_plain_text_is_asked_in_plain_text(folder, tmp_path, monkeypatch, command):
    shutil.copytree(folder / "judge", tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "tract_config.json").read_text())
    write_json(tmp_path / "judge" / "tract_config.json", {**config, "chat": False})
    asked = []
    step = {"judge": "JudgeStep", "distill": "DistillStep"}[command]
    monkeypatch.setattr(f"trl_tract.runs.steps.{step}.run", lambda self: asked.extend(read_jsonl(Path(self.data))))
    main([command, *own(folder, of="judge"), "--model", str(tmp_path / "judge"), "--output_dir", str(tmp_path / "out")])
    assert {type(row["prompt"]) for row in asked} == {str}


def test_the_agreement_is_printed_where_gold_scores_are_known(folder, tmp_path, capsys):
    assert judge(folder, tmp_path / "out") == 0
    assert f"{folder}/judge (grid mass" in capsys.readouterr().out


def test_judging_csv_again_does_nothing_again(folder, tmp_path):
    assert judge(folder, tmp_path / "out") == 0
    before = (tmp_path / "out" / "judgements.jsonl").stat().st_mtime_ns
    assert judge(folder, tmp_path / "out") == 0
    assert (tmp_path / "out" / "judgements.jsonl").stat().st_mtime_ns == before


def judged_rows(folder, out, file, *options):
    """The rows that are judged of a file, with a judge that knows its own columns and rubric."""
    paths = ["--model", str(folder / "judge"), "--data", str(file), "--output_dir", str(out)]
    assert main(["judge", *paths, *SAMPLING, *options]) == 0
    return list(read_jsonl(out / "rows.jsonl"))


def test_a_judge_knows_the_columns_and_the_rubric_of_its_training(folder, tmp_path):
    assert judge(folder, tmp_path / "named") == 0
    rows = judged_rows(folder, tmp_path / "known", folder / "rows.csv")
    assert rows == list(read_jsonl(tmp_path / "named" / "rows.jsonl"))


def test_known_columns_may_be_missing_and_other_ones_be_named(folder, tmp_path):
    (tmp_path / "new.csv").write_text("question,reply\nis it,polite\n")
    (row,) = judged_rows(folder, tmp_path / "out", tmp_path / "new.csv", "--columns", "response=reply")
    assert row["prompt"][0]["content"].count("polite") == 3  # the rubric has two
    assert "score" not in row


def test_what_came_out_is_said_where_there_are_no_gold_scores(folder, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("question,answer\nwhy,because\nwhen,now\n")
    judged_rows(folder, tmp_path / "out", tmp_path / "new.csv")
    assert "of 2 rows have a score" in capsys.readouterr().out


def test_a_template_that_is_put_on_a_base_model_is_trained_and_judged_with(folder, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer(chat=False).save_pretrained(tmp_path / "base")
    (tmp_path / "own.jinja").write_text(CHATML)
    template = ["--chat_template_path", str(tmp_path / "own.jinja")]
    paths = ["--data", str(folder / "rows.csv"), "--rubric", str(folder / "rubric.yaml"), *COLUMNS]
    assert main(["check", "--model", str(tmp_path / "base"), *paths, *template]) == 0
    assert "chat template: its own" in capsys.readouterr().out
    trained = ["--model", str(tmp_path / "base"), *paths, "--output_dir", str(tmp_path / "judge")]
    assert main(["train", *trained, *template, *TRAINING]) == 0
    assert json.loads((tmp_path / "judge" / "tract_config.json").read_text())["chat"] is True
    (row, *_) = judged_rows(tmp_path, tmp_path / "out", folder / "rows.csv")
    assert row["prompt"][0]["role"] == "user"
    assert "cannot be read" not in (tmp_path / "out" / "judgements.jsonl").read_text()


def test_another_rubric_goes_before_the_known_one(folder, tmp_path):
    (tmp_path / "other.yaml").write_text(RUBRIC.replace("is it polite", "is it short"))
    rows = judged_rows(folder, tmp_path / "out", folder / "rows.csv", "--rubric", str(tmp_path / "other.yaml"))
    assert "[is it short]" in rows[0]["prompt"][0]["content"]


def test_responses_are_judged_in_python_with_the_prompts_of_the_command(folder, tmp_path):
    rows = judged_rows(folder, tmp_path / "out", folder / "rows.csv")
    asked = []

    def write(prompt, seed):
        asked.append(prompt)
        return " fine. [RESULT]"

    backend = ScriptedBackend(write, make_tokenizer(), probs=lambda ids: [0.2] * 5)
    own = CoTRAILJudge.from_pretrained(folder / "judge", backend)
    own.judge(rows)
    pairs = [line.split(",")[:2] for line in (folder / "rows.csv").read_text().splitlines()[1:]]
    several = own.judge_response(instruction=[a for a, _ in pairs], response=[b for _, b in pairs])
    assert asked[: len(rows)] == asked[len(rows) :]
    one = own.judge_response(instruction=pairs[0][0], response=pairs[0][1])
    assert [one.score] == [judgement.score for judgement in several[:1]]


def test_a_training_without_a_rubric_leaves_none_of_an_earlier_one(folder, tmp_path):
    shutil.copytree(folder / "judge", tmp_path / "judge", ignore=shutil.ignore_patterns("checkpoint-*"))
    write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "judge")]
    assert main(["train", "--model", str(folder / "seed"), *paths, *TRAINING]) == 0
    backend = ScriptedBackend(lambda *_: "", make_tokenizer())
    assert CoTRAILJudge.from_pretrained(tmp_path / "judge", backend).rubric is None


def test_rows_of_csv_are_distilled(folder, tmp_path):
    distill = ["distill", *own(folder, of="judge"), "--output_dir", str(tmp_path / "out"), *SAMPLING]
    assert main(distill) == 0
    rows = list(read_jsonl(tmp_path / "out" / "rows.jsonl"))
    assert len(rows) == 12
    assert rows[4]["completion"][0]["content"].endswith("[RESULT] 5")


@pytest.fixture(scope="module")
def run_twice(folder, tmp_path_factory):
    """What a run printed that refused its rows, and the same run with the mistake fixed; and its directory."""
    out, printed = tmp_path_factory.mktemp("run") / "out", []
    run = ["run", *own(folder), "--output_dir", str(out), "--eval_fraction", "0.3", *TRAINING, *SAMPLING]
    for mistake, code in ((["--max_length", "20"], 1), ([], 0)):
        stdout, stderr = io.StringIO(), io.StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr):
            assert main([*run, *mistake]) == code
        printed.append(stdout.getvalue() + stderr.getvalue())
    return printed, out


def test_a_run_takes_the_rubric_too(run_twice):
    (_, printed), out = run_twice
    assert f"The judge is in {out}/tract" in printed
    assert (out / "stage1" / "tract_prompt.json").read_bytes() == (out / "tract" / "tract_prompt.json").read_bytes()
    (row, *_) = read_jsonl(out / "train.jsonl")
    assert "###Score rubric: [is it polite]" in row["prompt"][0]["content"]


def test_a_whole_run_is_reported_on_by_its_folder(run_twice, capsys):
    _, out = run_twice
    assert main(["report", str(out), "--n_bootstrap", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed.index(f"{out}/judged-tract (") < printed.index(f"{out}/judged-stage1 (")
    assert f"a: {out}/judged-tract, b: {out}/judged-stage1" in printed


def test_a_run_that_was_refused_starts_anew_once_the_mistake_is_fixed(run_twice):
    (refused, fixed), _ = run_twice
    assert "lose their score at max_length=20" in refused
    assert "The settings changed before anything was trained: starting over" in fixed


def test_judge_options_reach_the_judge(folder, tmp_path):
    options = ["--pool", "distributions", "--score_temperature", "0.5", "--normalize_grid", "true"]
    assert judge(folder, tmp_path / "out", *options) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    wanted = {"pool": "distributions", "score_temperature": 0.5, "normalize_grid": True}
    assert {name: settings[name] for name in wanted} == wanted


def test_options_without_an_effect_are_refused(folder, tmp_path, capsys):
    assert judge(folder, tmp_path / "out", "--quantile", "0.9") == 1
    assert "--quantile 0.9 needs --decision quantile" in capsys.readouterr().err
    shutil.copytree(folder / "judge", tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "tract_config.json").read_text())
    write_json(tmp_path / "judge" / "tract_config.json", config | {"writes_rationale": False})
    paths = ["--model", str(tmp_path / "judge"), "--data", str(folder / "rows.csv")]
    assert main(["judge", *paths, "--output_dir", str(tmp_path / "out"), "--num_generations", "4"]) == 1
    assert "num_generations=4, but this judge writes no rationales" in capsys.readouterr().err


def test_options_at_their_defaults_leave_older_directories_valid(folder, tmp_path):
    judge(folder, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert not {"pool", "score_temperature", "normalize_grid", "recalibrate"} & settings.keys()


def test_pairs_are_judged_and_compared(folder, tmp_path, capsys):
    pairs = [{"prompt": "is it", "chosen": word, "rejected": "no", "subset": word[0]} for word in WORDS[:6]]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    paths = ["--data", str(tmp_path / "pairs.jsonl"), "--rubric", str(folder / "rubric.yaml")]
    out = ["--output_dir", str(tmp_path / "out"), *SAMPLING]
    assert main(["judge", "--model", str(folder / "judge"), *paths, *out]) == 0
    assert "pairs scored" in capsys.readouterr().out
    records = list(read_jsonl(tmp_path / "out" / "judgements.jsonl"))
    assert [record["side"] for record in records] == ["chosen", "rejected"] * 6
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "chosen scored higher [95 %]" in capsys.readouterr().out


# Recalibration


@pytest.fixture
def judged(folder, tmp_path):
    """A judge, and judgements by it that are all half a point too high."""
    shutil.copytree(folder / "judge", tmp_path / "judge")
    gold = [float(1 + i % 5) for i in range(20)]
    records = [
        {"score": value + 0.5, "reference": value, "grid_mass": 1.0, "error": None, "group": str(i)}
        for i, value in enumerate(gold)
    ]
    (tmp_path / "judged").mkdir()
    write_jsonl(tmp_path / "judged" / "judgements.jsonl", records)
    write_json(
        tmp_path / "judged" / "settings.json", {"model": str(tmp_path / "judge"), "score_values": [1, 2, 3, 4, 5]}
    )
    return tmp_path


def test_a_recalibration_is_fitted_and_saved_with_the_judge(judged, capsys):
    assert main(["recalibrate", str(judged / "judged")]) == 0
    fitted = Recalibration.load(judged / "judge")
    assert (fitted.slope, fitted.intercept, fitted.n) == (pytest.approx(1), pytest.approx(-0.5), 20)
    assert "score -> 1.000 * score - 0.500, kept in 1 to 5" in capsys.readouterr().out


def test_a_recalibration_is_applied_where_it_is_asked_for(judged, folder, tmp_path):
    main(["recalibrate", str(judged / "judged")])
    shutil.copy(folder / "rows.csv", judged)
    shutil.copy(folder / "rubric.yaml", judged)
    assert judge(judged, tmp_path / "raw") == 0
    assert judge(judged, tmp_path / "mended", "--recalibrate") == 0
    assert json.loads((tmp_path / "mended" / "settings.json").read_text())["recalibrate"] is True
    assert "recalibrate" not in json.loads((tmp_path / "raw" / "settings.json").read_text())


def test_judgements_that_are_recalibrated_are_no_ground_for_another(judged, capsys):
    settings = json.loads((judged / "judged" / "settings.json").read_text())
    write_json(judged / "judged" / "settings.json", settings | {"recalibrate": True})
    assert main(["recalibrate", str(judged / "judged")]) == 1
    assert "are already recalibrated. Judge again with --recalibrate false" in capsys.readouterr().err


def test_judgements_without_gold_scores_cannot_recalibrate(judged, capsys):
    records = list(read_jsonl(judged / "judged" / "judgements.jsonl"))
    records[3]["reference"] = None
    write_jsonl(judged / "judged" / "judgements.jsonl", records)
    assert main(["recalibrate", str(judged / "judged")]) == 1
    assert "1 of 20 judgements in" in capsys.readouterr().err


# Exit codes and usage


def usage_error(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["trian"], "unknown command 'trian'"),
        (["trian"], "Did you mean train?"),
        (["judge"], "required: --model/--model_name_or_path, --data, --output_dir"),
        (
            ["report", "a", "--n_bootsrap", "5"],
            "trl-tract report has no option --n_bootsrap. Did you mean --n_bootstrap?",
        ),
        (
            ["report", "a", "--xyzzy"],
            "trl-tract report has no option --xyzzy. trl-tract report --help lists the options",
        ),
        (["report", "a", "--n_bootstrap", "many"], "invalid int value: 'many'"),
        (["report", "a", "--n_bootstrap", "5", "b"], "'b' does not belong to any option"),
        (["judge", "--decision", "best"], "invalid choice: 'best'"),
        (["report", "a", "--config"], "--config needs the path of a YAML file"),
        (["completion", "csh"], "invalid choice: 'csh'"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_meant(arguments, wanted, capsys):
    code, printed = usage_error(arguments, capsys)
    assert code == 2
    assert wanted in printed


def test_rows_that_would_never_be_evaluated_on_are_refused(tmp_path, capsys):
    given = ["--model", "m", "--data", "rows.jsonl", "--eval_data", "eval.jsonl", "--output_dir", str(tmp_path)]
    for dry in ([], ["--dry-run"]):
        assert main(["train", *given, "--bf16", "false", *dry]) == 1
        assert "evaluation is off" in capsys.readouterr().err


def test_an_option_of_a_yaml_file_that_there_is_none_of_is_named(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("judgements: a\nn_bootsrap: 5\n")
    code, printed = usage_error(["report", "--config", str(tmp_path / "run.yaml")], capsys)
    assert code == 2
    assert (
        f"trl-tract report has no option --n_bootsrap (in {tmp_path / 'run.yaml'}). Did you mean --n_bootstrap?"
        in printed
    )


@pytest.mark.parametrize("line", ["html: 010", "judgements: [a, 2026]"])
def test_text_that_yaml_made_a_number_of_is_refused(tmp_path, capsys, line):
    (tmp_path / "report.yaml").write_text(f"judgements: a\n{line}\n" if "html" in line else line)
    assert main(["report", "--config", str(tmp_path / "report.yaml")]) == 1
    assert "must be text, but YAML read it as the number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rl_args", "bootstrap", "engine_args"])
def test_settings_in_a_yaml_file_that_are_a_list_are_refused_in_words(name, tmp_path, capsys):
    given = {"model": "m", "data": "rows.jsonl", "output_dir": str(tmp_path), "bf16": False, "rl": True, name: ["a"]}
    write_json(tmp_path / "run.yaml", given)
    assert main(["run", "--config", str(tmp_path / "run.yaml")]) == 1
    assert f"--{name}=['a'] is not a mapping of names to values" in capsys.readouterr().err


def test_a_yaml_file_is_read_in_either_spelling(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"judgements: {tmp_path}\n")
    for config in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}"]):
        assert main(["report", *config]) == 1
        assert f"{tmp_path} holds no judgements.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "model_name_or_path"])
@pytest.mark.parametrize("command", ["train", "judge", "check"])
def test_a_model_is_named_alike_in_every_command(command, name, tmp_path):
    given = ["--data", "rows.csv", "--output_dir", "out"][: 2 if command == "check" else 4]
    (tmp_path / "run.yaml").write_text(f"{name}: seed\n")
    for where in ([f"--{name}", "seed"], ["--config", str(tmp_path / "run.yaml")]):
        options = parse([command, *given, *where])
        assert "seed" in [value for group in options for key, value in vars(group).items() if key in MODEL]


def test_a_dtype_reaches_what_loads_the_judge(folder, tmp_path):
    assert judge(folder, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["dtype"] == "bfloat16"


def test_a_dtype_for_a_server_is_refused(folder, tmp_path, capsys):
    server = ["--backend", "server", "--base_url", "http://localhost:1/v1", "--dtype", "bfloat16"]
    assert judge(folder, tmp_path / "out", *server) == 1
    assert "--dtype" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--base_url", "http://localhost:1/v1"], ["--served_model", "judge"]])
def test_options_of_a_server_need_a_server(folder, tmp_path, capsys, option):
    assert judge(folder, tmp_path / "out", *option) == 1
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["report", "nowhere"], "nowhere: no such directory"),
        (["report", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["check", "nowhere.csv", "--model", "seed"], "nowhere.csv: no such file"),
        (["train", "--data", "rows.jsonl"], "--model is missing"),
    ],
)
def test_a_failed_command_is_one_line_and_exit_code_1(arguments, wanted, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert re.fullmatch(rf"trl-tract {arguments[0]}: [^\n]*{re.escape(wanted)}[^\n]*\n", printed)


@pytest.mark.parametrize("how", ["--verbose", "TRL_TRACT_DEBUG"])
def test_where_an_error_arose_is_shown_on_demand(how, monkeypatch, capsys):
    monkeypatch.delenv("TRL_TRACT_DEBUG", raising=False)
    if how == "TRL_TRACT_DEBUG":
        monkeypatch.setenv(how, "1")
    assert main(["report", "nowhere", *(["--verbose"] if how == "--verbose" else [])]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unforeseen_error_is_one_line_too_and_names_its_kind(monkeypatch, capsys):
    def broken(arguments):
        raise KeyError("a\nb")

    monkeypatch.setitem(commands.COMMANDS, "report", broken)
    assert main(["report"]) == 1
    assert re.fullmatch(r"trl-tract report: KeyError: [^\n]*Please report it[^\n]*\n", capsys.readouterr().err)


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def stopped(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, "report", stopped)
    assert main(["report"]) == 130
    assert "Run the same command again to continue" in capsys.readouterr().err


# Help and completion


@pytest.mark.process
def test_help_imports_nothing_that_takes_long():
    command = [sys.executable, "-X", "importtime", "-m", "trl_tract.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "start here:" in done.stdout
    heavy = {"torch", "trl", "transformers", "datasets", "numpy", "scipy"}
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not heavy & imported


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_own_options_come_before_trl_s(capsys):
    printed = help_of("run", capsys)
    places = [
        printed.index(text) for text in ("--data", "--rubric", "--raft_weight", "\nTRL: training", "--learning_rate")
    ]
    assert places == sorted(places)
    assert printed.index("--lora_r") > printed.index("TRL: model, LoRA and quantisation (ModelConfig)")


@pytest.mark.parametrize("command", ["run", "judge"])
def test_every_option_is_spelled_once(command, capsys):
    printed = help_of(command, capsys)
    assert "--output_dir" in printed
    assert "--output-dir" not in printed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_their_options(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("recalibrate", "raft_weight", "lora_r", "n_bootstrap"))


def test_completion_in_bash_completes(tmp_path, capsys):
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    assert bash is not None
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = f"""source {tmp_path / "script"}
    complete_line() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${{#COMP_LINE}}
      $(complete -p trl-tract | sed 's/.*-F \\([^ ]*\\) .*/\\1/') trl-tract "${{@: -1}}"; echo "${{COMPREPLY[@]}}"; }}
    complete_line trl-tract rec; complete_line trl-tract report --n_b; complete_line trl-tract judge --decision me"""
    done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["recalibrate", "--n_bootstrap", "mean", "median"]


def test_completion_without_its_library_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert 'pip install "trl-tract[completion]"' in capsys.readouterr().err


def test_the_rows_that_were_judged_lie_beside_the_judgements(folder, tmp_path):
    rows = make_rows(2)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = ["--model", str(folder / "judge"), "--data", str(tmp_path / "rows.jsonl")]
    assert main(["judge", *data, "--output_dir", str(tmp_path / "out"), *SAMPLING]) == 0
    assert [row["prompt"] for row in read_jsonl(tmp_path / "out" / "rows.jsonl")] == [row["prompt"] for row in rows]
