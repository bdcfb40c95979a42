"""What goes to the hub, and back from it: over HTTP, to and from a hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_rows, make_tokenizer, make_trainer
from datasets import Dataset
from fake_hub import fake_hub
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from trl_tract import CoTRAILJudge, CoTSelfDistill, TRACTConfig, TransformersBackend
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.saved.dataset_card import rows_card
from trl_tract.saved.hub import JUDGE_FILES
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.rubric import Rubric

# huggingface_hub 2.4 hands a file to its HTTP client's old argument where it uploads LFS objects.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

RUBRIC = Rubric("Is it polite?", {"1": "no", "5": "yes"}, scale="any score from 1 to 5")


@pytest.fixture
def hub(monkeypatch):
    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # weights as LFS objects over plain HTTP
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address that it first saw
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A judge as TRACTTrainer leaves it: weights, card, and what is not for the hub."""
    directory = tmp_path_factory.mktemp("judge")
    trainer = make_trainer(directory, make_rows(4, chat=True), max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    (directory / "checkpoint-1").mkdir()
    (directory / "checkpoint-1" / "model.safetensors").write_bytes(b"old")
    (directory / "notes.txt").write_text("mine")
    OwnColumns({"response": "answer"}, RUBRIC).save(directory)
    return directory


# The judge


def test_a_pushed_judge_is_its_weights_tokenizer_configuration_and_card_and_nothing_else(hub, trained):
    CoTRAILJudge.from_pretrained(trained).push_to_hub("me/judge")
    files = hub.files("me/judge")
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "tract_config.json",
        "tract_prompt.json",
    }
    assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert json.loads(files["tract_config.json"]) == json.loads((trained / "tract_config.json").read_text())


def test_a_repository_that_is_made_for_a_judge_is_private_unless_said_otherwise(hub, trained):
    judge = CoTRAILJudge.from_pretrained(trained)
    judge.push_to_hub("me/secret")
    judge.push_to_hub("me/open", private=False)
    assert hub.repositories["model", "me/secret"].private
    assert not hub.repositories["model", "me/open"].private


def test_a_private_upload_to_a_public_repository_is_refused_before_anything_is_uploaded(hub, trained):
    judge = CoTRAILJudge.from_pretrained(trained)
    judge.push_to_hub("me/open", private=False)
    before = len(hub.requests)
    with pytest.raises(ValueError, match=r"me/open .*private=False"):
        judge.push_to_hub("me/open")
    assert not [path for _, path in hub.requests[before:] if "commit" in path or "preupload" in path]


def test_the_pushed_card_loads_the_judge_from_the_hub_and_keeps_what_people_wrote(hub, trained):
    readme = trained / "README.md"
    before = readme.read_text(encoding="utf-8")
    readme.write_text(before + "\nAsk Anna about the rows.\n", encoding="utf-8")
    CoTRAILJudge.from_pretrained(trained).push_to_hub("me/judge")
    card = hub.files("me/judge")["README.md"].decode()
    assert 'CoTRAILJudge.from_pretrained("me/judge")' in card
    assert "Ask Anna about the rows." in card
    assert 'from_pretrained("me/judge")' not in readme.read_text(encoding="utf-8")
    readme.write_text(before, encoding="utf-8")


def test_a_judge_without_a_card_gets_one_that_claims_nothing_of_its_training(hub):
    model = make_model()
    judge = CoTRAILJudge(TransformersBackend(model, make_tokenizer()), score_values=[1, 2, 3])
    judge.push_to_hub("me/judge")
    card = hub.files("me/judge")["README.md"].decode()
    assert 'CoTRAILJudge.from_pretrained("me/judge")' in card
    assert "- Score grid: 1, 2, 3" in card
    assert "## Training\n\n<!-- settings -->\nUnknown." in card
    assert "learning_rate" not in card


def test_a_judge_whose_model_came_loaded_is_saved_with_its_grids_tokens(hub, tmp_path):
    judge = CoTRAILJudge(TransformersBackend(make_model(), make_tokenizer()), score_values=[1, 2, 3])
    judge.push_to_hub("me/judge")
    for name, content in hub.files("me/judge").items():
        (tmp_path / name).write_bytes(content)
    loaded = CoTRAILJudge.from_pretrained(tmp_path)
    judge.judge([make_rows(1, chat=True)[0]])  # looks the tokens up
    assert loaded.grid.token_ids == judge.grid.token_ids
    assert loaded.grid.values == (1.0, 2.0, 3.0)


def test_a_recalibrated_judge_takes_its_recalibration_along(hub, trained):
    judge = CoTRAILJudge.from_pretrained(trained)
    judge.recalibration = Recalibration(2.0, -1.0, 1.0, 5.0, 50, 1.0, 0.5)
    judge.push_to_hub("me/judge")
    assert json.loads(hub.files("me/judge")["tract_calibration.json"])["slope"] == 2.0


def adapter_judge(directory, base):
    base_model = make_model()
    base_model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    base_model.name_or_path = str(base)
    adapted = get_peft_model(base_model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(directory)
    grid = CoTRAILJudge(TransformersBackend(str(base)))
    grid._find_tokens({"prompt": "x"})
    JudgeConfig((Scale("", grid.grid, CompletionFormat("[RESULT]")),)).save(directory)
    return CoTRAILJudge.from_pretrained(directory)


def test_an_adapter_whose_base_is_a_directory_is_refused_until_the_bases_hub_id_is_given(hub, tmp_path):
    judge = adapter_judge(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ValueError, match=r"base_model=\"user/model\""):
        judge.push_to_hub("me/judge")
    assert not hub.repositories
    judge.push_to_hub("me/judge", base_model="someone/seed")
    files = hub.files("me/judge")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/seed"
    assert ModelCard(files["README.md"].decode()).data.base_model == "someone/seed"
    assert str(tmp_path).encode() not in b"".join(files.values())


def test_a_judge_goes_to_a_branch_when_one_is_named(hub, trained):
    judge = CoTRAILJudge.from_pretrained(trained)
    judge.push_to_hub("me/judge", revision="v2", commit_message="Second try")
    repository = hub.repositories["model", "me/judge"]
    assert "model.safetensors" in repository.revisions["v2"]
    assert "model.safetensors" not in repository.files


def test_a_judge_on_a_server_says_where_to_push_from(hub):
    backend = type("Backend", (), {"model_id": "served", "name": "server", "tokenizer": make_tokenizer()})()
    with pytest.raises(ValueError, match=r"served"):
        CoTRAILJudge(backend).push_to_hub("me/judge")
    assert not hub.repositories


def test_training_arguments_optimizers_and_checkpoints_are_no_files_of_a_judge():
    from fnmatch import fnmatch

    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "x.log"):
        assert not [pattern for pattern in JUDGE_FILES if fnmatch(name, pattern)], name


# The trainer


def test_the_trainer_pushes_its_configuration_and_our_card_into_a_private_repository(hub, tmp_path):
    trainer = make_trainer(tmp_path / "mine", make_rows(4), max_steps=1, push_to_hub=True, hub_model_id="me/trained")
    trainer.train()
    trainer.save_model()
    assert hub.repositories["model", "me/trained"].private
    files = hub.files("me/trained")
    assert {"model.safetensors", "tokenizer.json", "tract_config.json"} <= set(files)
    assert 'CoTRAILJudge.from_pretrained("me/trained")' in files["README.md"].decode()


def test_a_push_in_the_middle_of_training_has_the_configuration_of_a_judge_too(hub, tmp_path):
    trainer = make_trainer(
        tmp_path,
        make_rows(4),
        max_steps=1,
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_strategy="every_save",
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer._finish_current_push()
    assert {"model.safetensors", "tract_config.json", "README.md"} <= set(hub.files("me/trained"))


def test_the_card_names_the_repository_that_the_hub_made_where_none_was_named(hub, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "mine", make_rows(4), max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    assert 'CoTRAILJudge.from_pretrained("me/mine")' in hub.files("me/mine")["README.md"].decode()


def test_nothing_is_sent_anywhere_by_a_training_that_was_not_asked_to(hub, tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not [path for method, path in hub.requests if method not in ("GET", "HEAD")]
    assert not hub.repositories


@pytest.mark.parametrize("given", [None, True, False])
def test_a_plain_configuration_that_leaves_privacy_open_becomes_private(tmp_path, given):
    args = SFTConfig(str(tmp_path), **{"use_cpu": True, "bf16": False}, hub_private_repo=given)
    assert TRACTConfig.from_args(args, "model").hub_private_repo is (given is not False)


def test_a_tract_configuration_is_private_and_none_leaves_it_to_the_account(tmp_path):
    assert TRACTConfig(str(tmp_path)).hub_private_repo is True
    assert TRACTConfig(str(tmp_path), hub_private_repo=None).hub_private_repo is None


# The rows of stage two

SUMMARY = {
    "rows": 10,
    "rationales": 20,
    "self_written": 1700,
    "annotated": 2,
    "dropped": 1,
    "resampled": 5,
    "failed": {"length": 3},
    "attempts_failed": {"length": 9},
}
SETTINGS = {"model": "/home/anna/stage1", "format": {"marker": "[RESULT]"}, "on_failure": "drop", "temperature": 0.7}


def test_the_rows_card_counts_what_became_of_the_rationales():
    text = rows_card(SUMMARY, SETTINGS, repo_id="me/rows")
    assert "| stage-two rows with a self-written rationale | 1,700 |" in text
    assert "| rationales sampled again | 5 |" in text
    assert "| rows dropped because their rationale failed | 1 |" in text
    assert "| length | 3 | 9 |" in text
    assert "If all attempts for a row failed: the row was left out." in text
    assert "- `temperature`: 0.7" in text


def test_the_rows_card_names_a_local_model_without_its_path_and_a_hub_model_whole():
    assert "sampled from `stage1`" in rows_card(SUMMARY, SETTINGS, repo_id="me/rows")
    assert "anna" not in rows_card(SUMMARY, SETTINGS, repo_id="me/rows")
    assert "sampled from `me/stage1`" in rows_card(SUMMARY, SETTINGS, repo_id="me/rows", model="me/stage1")


def test_a_source_on_the_hub_is_metadata_and_words_are_not():
    on_hub = ModelCard(rows_card(SUMMARY, SETTINGS, repo_id="me/rows", source="someone/annotated"))
    assert on_hub.data.to_dict()["source_datasets"] == ["someone/annotated"]
    words = ModelCard(rows_card(SUMMARY, SETTINGS, repo_id="me/rows", source="our own *annotators*"))
    assert "source_datasets" not in words.data.to_dict()
    assert r"annotated rationales: our own \*annotators\*" in words.text
    assert "annotated rationales: not stated" in rows_card(SUMMARY, SETTINGS, repo_id="me/rows")


def test_the_licence_is_the_users_to_state():
    assert "license" not in ModelCard(rows_card(SUMMARY, SETTINGS, repo_id="me/rows")).data.to_dict()
    stated = ModelCard(rows_card(SUMMARY, SETTINGS, repo_id="me/rows", license="cc-by-4.0"))
    assert stated.data.license == "cc-by-4.0"


def test_pushed_rows_are_the_rows_their_summary_and_a_card(hub, trained, tmp_path):
    distiller = CoTSelfDistill.from_pretrained(trained, max_new_tokens=4)
    distiller.distill(Dataset.from_list(make_rows(3, chat=True)), tmp_path / "own")
    distiller.push_to_hub(tmp_path / "own", "me/rows")
    assert hub.repositories["dataset", "me/rows"].private
    files = hub.files("me/rows", "dataset")
    assert set(files) == {"README.md", "rows.jsonl", "summary.json"}
    assert files["rows.jsonl"] == (tmp_path / "own" / "rows.jsonl").read_bytes()
    assert str(trained).encode() not in b"".join(files.values())


def test_rows_that_are_not_finished_are_not_pushed(hub, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"summary.json"):
        CoTSelfDistill.push_to_hub(tmp_path, "me/rows")
    assert not hub.repositories


# There and back


@pytest.mark.slow
@pytest.mark.process
def test_a_judge_and_rows_come_back_from_the_hub_by_id_and_revision(tmp_path):
    """A process of its own, as users have it: the hub's address, its token and its cache from the environment."""
    with fake_hub() as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
        }
        done = subprocess.run(
            [sys.executable, "-c", f"import test_hub; test_hub.there_and_back({str(tmp_path)!r})"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        downloads = [path for method, path in server.requests if method == "GET" and path.endswith("model.safetensors")]
    assert found["first"] == found["first again"]
    assert found["second"] != found["first"]
    assert found["rows"] == 3
    assert len(downloads) == 3, "main, v1 and the adapter; the second load of each comes from the cache"
    assert found["adapter"] == found["adapter again"]


def there_and_back(directory):
    """Push two versions of a judge, an adapter and rows; load all of them by id; print what they say."""
    from datasets import load_dataset

    rows, found = make_rows(3, chat=True), {}

    def probabilities(judge):
        return judge.score_rationales([row["prompt"] for row in rows], ["fine"] * 3).round(6).tolist()

    for seed, revision in ((0, "v1"), (1, None)):
        judge = CoTRAILJudge(TransformersBackend(make_model(seed=seed), make_tokenizer()))
        judge.push_to_hub("me/judge", revision=revision)
        found["second" if seed else "first"] = probabilities(judge)
    loaded = [CoTRAILJudge.from_pretrained("me/judge", revision="v1") for _ in range(2)][-1]
    found["first again"] = probabilities(loaded)
    newest = CoTRAILJudge.from_pretrained("me/judge")
    assert probabilities(newest) == found["second"]

    adapted = get_peft_model(make_model(seed=1), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "me/judge"
    judge = CoTRAILJudge(TransformersBackend(adapted, make_tokenizer()))
    judge.push_to_hub("me/adapter")
    found["adapter"] = probabilities(judge)
    found["adapter again"] = probabilities(CoTRAILJudge.from_pretrained("me/adapter"))

    assert OwnColumns.load("me/judge") is None
    ruled = f"{directory}/ruled"
    make_trainer(Path(ruled), rows).save_model()
    OwnColumns({"response": "answer"}, RUBRIC).save(ruled)
    CoTRAILJudge.from_pretrained(ruled).push_to_hub("me/ruled")
    assert OwnColumns.load("me/ruled") == OwnColumns({"response": "answer"}, RUBRIC)

    distiller = CoTSelfDistill.from_pretrained("me/judge", max_new_tokens=4)
    distiller.distill(Dataset.from_list(rows), f"{directory}/own")
    distiller.push_to_hub(f"{directory}/own", "me/rows", source="someone/annotated")
    found["rows"] = len(load_dataset("me/rows", split="train"))
    print(json.dumps(found))
