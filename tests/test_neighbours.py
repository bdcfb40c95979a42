"""Libraries installed beside this one are told of in one line each, and changed classes of TRL's are noticed."""

import functools
import logging
import types

import pytest
from conftest import make_rows, make_trainer
from trl import SFTTrainer

from trl_tract.cli import main
from trl_tract.training.neighbours import changed_class, neighbours


def install(tmp_path, monkeypatch, name, *requirements):
    """Metadata as pip leaves it, without the library."""
    info = tmp_path / "site" / f"{name}-2.5.dist-info"
    info.mkdir(parents=True)
    asked = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n{asked}")
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_nothing_is_said_where_nothing_is_installed():
    assert neighbours() == []


@pytest.mark.parametrize(
    ("name", "asked"), [("llamafactory", "trl<=0.24.0,>=0.18.0"), ("axolotl", "trl==1.8.0"), ("unsloth", "trl<=0.24.0")]
)
def test_a_library_that_asks_for_another_trl_will_not_work_here(name, asked, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, name, "numpy", asked)
    (line,) = neighbours()
    assert line.startswith(f"{name} 2.5 is installed here and requires trl")
    assert line.endswith(f"{name} will not work in this environment. Use a separate environment for each")


def test_a_requirement_of_an_extra_is_not_asked_for(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "axolotl", 'trl==1.8.0; extra == "rl"')
    assert neighbours() == []


def test_unsloth_is_told_of_even_where_it_fits(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "unsloth", "trl>=0.18")
    assert neighbours() == [
        "unsloth 2.5 is installed here. It changes TRL's classes when it is imported, so do not import it in a program "
        "that uses TRACTTrainer"
    ]


def test_training_on_the_command_line_says_so_once(tmp_path, monkeypatch, capsys):
    install(tmp_path, monkeypatch, "unsloth", "trl<=0.24.0")
    paths = ["--data", "nowhere.jsonl", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    assert main(["train", "--model_name_or_path", "seed", *paths]) == 1
    assert capsys.readouterr().err.count("unsloth 2.5 is installed here") == 1


def test_trl_s_own_class_is_unchanged():
    assert changed_class(SFTTrainer) is None


def test_a_class_that_was_put_in_trl_s_place_is_noticed():
    other = type("UnslothSFTTrainer", (SFTTrainer,), {"__module__": "unsloth_compiled_cache.UnslothSFTTrainer"})
    assert changed_class(other).startswith("UnslothSFTTrainer is not TRL's own: unsloth_compiled_cache changed it")


def foreign(function):
    """A wrapper as another library writes it, with the name and module of what it wraps."""
    namespace = {"__name__": "unsloth.trainer", "function": function}
    exec("def wrapper(*args, **kwargs):\n    return function(*args, **kwargs)", namespace)
    return functools.wraps(function)(namespace["wrapper"])


def test_a_method_that_was_wrapped_is_noticed_and_training_warns(tmp_path, monkeypatch, caplog):
    assert isinstance(SFTTrainer.compute_loss, types.FunctionType)
    monkeypatch.setattr(SFTTrainer, "compute_loss", foreign(SFTTrainer.compute_loss))
    with caplog.at_level(logging.WARNING, logger="trl_tract"):
        make_trainer(tmp_path, make_rows(3))
    assert "SFTTrainer.compute_loss is not TRL's own: unsloth changed it" in caplog.text
