"""Tokens, keys and passwords: in no file that is left, in nothing that is printed, logged or raised."""

import base64
import copy
import json
import logging
import os
import pickle
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import make_rows, make_tokenizer
from fake_server import FakeServer, says

from trl_tract import TRACTConfig, run_tract
from trl_tract.backends.http import JSONServer
from trl_tract.cli import main
from trl_tract.files.journal import write_jsonl
from trl_tract.runs.spec import RunSpec
from trl_tract.runs.steps import _SPEC, DistillStep, run_step
from trl_tract.runs.train_steps import TrainStep
from trl_tract.text.secrets import key_of, without_secrets
from trl_tract.training.config import field_values

HUB, INIT, ENVIRONMENT, KEY, PASSWORD = SECRETS = [f"planted-{number}-7f3a9c51e2" for number in range(5)]
TRAINING = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "hub_token": HUB,
    "model_init_kwargs": {"token": INIT},
}


def told(directory: Path, *shown: str) -> set[str]:
    """The secrets that stand in a file below `directory`, or in what was shown."""
    left = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    assert left
    return {secret for secret in SECRETS if any(secret.encode() in text for text in [*left, "".join(shown).encode()])}


@pytest.fixture
def heard(capfd, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT)
    return lambda: "".join([*capfd.readouterr(), caplog.text])


@pytest.mark.parametrize(("held", "key"), [("right\n", "right"), (" right ", "right"), (" \n", None), ("", None)])
def test_white_space_around_a_key_is_no_part_of_it(held, key, monkeypatch):
    monkeypatch.setenv("K", held)
    assert key_of("K") == key


@pytest.mark.parametrize("held", ["ri\nght", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(held, monkeypatch):
    monkeypatch.setenv("K", held)
    with pytest.raises(ValueError, match=r"^K contains characters that are not allowed in an HTTP header$"):
        key_of("K")


@pytest.mark.parametrize(
    "held",
    [
        {"api-key": PASSWORD, "x-api-key": PASSWORD, "Authorization": PASSWORD},
        {"accessToken": PASSWORD, "access_token": PASSWORD, "apiKey": PASSWORD, "credentials": {"passwd": PASSWORD}},
        f"https://host/rows.jsonl?X-Amz-Credential={PASSWORD}&X-Amz-Signature={PASSWORD}&X-Amz-Security-Token={PASSWORD}",
        f"https://host/rows.jsonl?sig={PASSWORD}&key={PASSWORD}&api_key={PASSWORD}",
        f"HTTP 401: Bearer {PASSWORD}",
    ],
)
def test_secrets_are_known_by_their_names_and_places(held):
    assert PASSWORD not in json.dumps(without_secrets({"held": [held]}))


def test_an_address_of_rows_leaves_none_in_settings_and_messages():
    address = f"https://me:{PASSWORD}@host/rows.jsonl?sig={PASSWORD}"
    spec = RunSpec("model", address, eval_data=address)
    assert PASSWORD not in json.dumps(spec.settings()) + spec.source(address).title


def test_a_run_leaves_and_says_none(seed_model, tmp_path, heard):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(9))
    run_tract(
        seed_model,
        str(tmp_path / "rows.jsonl"),
        tmp_path / "out",
        eval_fraction=0.34,
        training=TRAINING,
        generation={"max_new_tokens": 4, "max_attempts": 1},
        isolate=False,
    )
    assert (tmp_path / "out" / "stage1" / "training_args.bin").is_file()
    assert not told(tmp_path, heard())
    assert {oct((tmp_path / "out" / name).stat().st_mode)[-3:] for name in ("stage1.json", "distill.json")} == {"600"}


@pytest.mark.parametrize("fault", [None, 401, 500])
def test_judging_by_a_server_leaves_and_says_none(seed_model, tmp_path, heard, monkeypatch, fault):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2, chat=True))
    TrainStep(seed_model, str(tmp_path / "rows.jsonl"), str(tmp_path / "judge"), training=TRAINING).run()
    server = FakeServer(make_tokenizer(), max_model_len=256)
    if fault:
        server.always = says(fault, {"error": {"message": f"not with {PASSWORD} or {quote(KEY)}"}})
    monkeypatch.setattr("trl_tract.backends.server._START_SECONDS", 0.2)
    address = f"http://me:{PASSWORD}@127.0.0.1:{server.port}/v1"
    options = ["--backend", "server", "--base_url", address, "--served_model", "judge", "--output_dir"]
    paths = ["--model", str(tmp_path / "judge"), "--data", str(tmp_path / "rows.jsonl")]
    code = main(["judge", *paths, *options, str(tmp_path / "out"), "--max_new_tokens", "8"])
    server.stop()
    assert (code == 0) == (fault is None)
    assert server.headers[-1]["Authorization"].startswith("Basic ")
    assert not told(tmp_path, heard())


def test_a_step_of_its_own_is_told_in_its_environment_what_its_file_hides(tmp_path, monkeypatch):
    given = {}

    def started(command, **options):
        given.update(options, command=command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", started)
    backend = {"name": "server", "base_url": f"http://me:{PASSWORD}@host/v1", "hf_token": HUB}
    run_step(DistillStep("model", "data", "out", backend=backend), tmp_path / "distill.json", isolate=True)
    assert json.loads(given["env"][_SPEC])["backend"] == backend
    assert _SPEC not in os.environ
    assert not told(tmp_path, *given["command"])


def test_a_configuration_keeps_its_token_in_memory_alone(tmp_path):
    config = TRACTConfig(str(tmp_path), hub_token=HUB, model_init_kwargs={"token": INIT})
    for kept in (copy.copy(config), copy.deepcopy(config)):
        assert (kept.hub_token, kept.model_init_kwargs) == (HUB, {"token": INIT})
    assert field_values(config)["hub_token"] == HUB
    shown = f"{config.to_json_string()}{config!r}{config}{config.to_sanitized_dict()}".encode() + pickle.dumps(config)
    assert not [secret for secret in SECRETS if secret.encode() in shown]
    assert type(pickle.loads(pickle.dumps(config)).save_strategy) is type(config.save_strategy)


ESCAPED = {
    "as it is": KEY,
    "as JSON": "".join(f"\\u{ord(letter):04x}" for letter in KEY),
    "as JSON in JSON": json.dumps("".join(f"\\u{ord(letter):04x}" for letter in KEY)),
    "in hexadecimal escapes": "".join(f"\\x{ord(letter):02x}" for letter in KEY),
    "percent-encoded": "".join(f"%{ord(letter):02X}" for letter in KEY),
    "percent-encoded twice": quote("".join(f"%{ord(letter):02X}" for letter in KEY)),
    "as entities": "".join(f"&#{ord(letter)};" for letter in KEY),
    "as entities in hexadecimal": "".join(f"&#x{ord(letter):x};" for letter in KEY),
    "in capitals": KEY.upper(),
    "in base 64": base64.b64encode(KEY.encode()).decode(),
    "in hexadecimal": KEY.encode().hex(),
    "letter by letter": " ".join(KEY),
    "with nothing between": "\u200b".join(KEY),
    "with line breaks": "\n".join(KEY),
    "its first half": KEY[: len(KEY) // 2 + 1],
    "its last half": KEY[len(KEY) // 2 :],
    "behind much else": "x" * 8180 + KEY,
}


@pytest.mark.parametrize("echo", ESCAPED.values(), ids=ESCAPED.keys())
def test_a_key_that_a_server_quotes_is_hidden_however_it_is_written(monkeypatch, echo):
    monkeypatch.setenv("K", KEY)
    shown = JSONServer("http://host", key_variable="K", timeout=1, retry_seconds=1, retry_delay=1).public(
        f"Not with {echo}!"
    )
    hidden = " ".join(echo.split()).strip("x")
    assert hidden[:12] not in shown
    assert hidden[-12:] not in shown


def test_what_is_no_key_is_shown(monkeypatch):
    monkeypatch.setenv("K", KEY)
    server = JSONServer("http://host", key_variable="K", timeout=1, retry_seconds=1, retry_delay=1)
    assert server.public("Not with 5 of 3 tokens: planted") == "Not with 5 of 3 tokens: planted"
