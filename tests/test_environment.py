"""`trl-tract env`: all that a bug report needs, and nothing of the user's."""

import sys
from importlib.metadata import version

import pytest

from trl_tract.cli import main
from trl_tract.commands.environment import environment


def test_it_prints_versions_and_devices(capsys):
    assert main(["env"]) == 0
    printed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert printed["trl"] == version("trl")
    assert "CPU cores" in printed["devices"]


def test_no_variable_but_those_that_change_how_things_run_is_in_it(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "PATH", "USER"):
        monkeypatch.setenv(name, "planted-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert "planted-secret" not in str(found)
    assert found["OMP_NUM_THREADS"] == "3"


def test_a_broken_torch_does_not_hide_the_rest(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = environment()
    assert "torch cannot be imported" in found["devices"]
    assert found["transformers"] == version("transformers")


def test_an_option_that_is_none_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["env", "--model", "judge"])
    assert ended.value.code == 2
