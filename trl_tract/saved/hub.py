"""What goes to the hub when somebody asks for it: which files, into which repository, with which card.

Private unless said otherwise. Knows files and huggingface_hub, and of models that they can be saved; nothing of
generation or training.
"""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from trl_tract.backends import Backend
from trl_tract.evaluation.recalibration import Recalibration, applied_by_default
from trl_tract.files.journal import read_json, write_json
from trl_tract.files.seal import check_result
from trl_tract.saved.dataset_card import rows_card
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.saved.model_card import model_card, with_hub_id

WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
JUDGE_FILES = (
    *WEIGHTS,
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "*.jinja",
    "tract_calibration.json",
    "tract_prompt.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
"""What of a judge's directory is uploaded: never checkpoints, optimizers, logs or pickled training arguments."""
_PLACEHOLDER = "# Model Card for Model ID"
"""The title of the card that PEFT saves beside an adapter. It says nothing, and names the base model's directory."""


def push_judge(
    backend: Backend,
    judge_config: JudgeConfig,
    repo_id: str,
    *,
    recalibrations: Mapping[str, Recalibration] | None = None,
    base_model: str | None = None,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload judge",
) -> str:
    """Upload a judge; see `CoTRAILJudge.push_to_hub`."""
    with TemporaryDirectory() as made:
        directory = Path(str(backend.model_id))
        if not directory.is_dir():
            directory = _saved(backend, Path(made) / "model")
        files = {
            path.name: path
            for path in sorted(directory.iterdir())
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in JUDGE_FILES)
        }
        if not any(fnmatch(name, pattern) for name in files for pattern in WEIGHTS):
            raise FileNotFoundError(f"{directory} holds no weights: none of {', '.join(WEIGHTS)}")
        judge_config.save(made)
        files["tract_config.json"] = Path(made) / "tract_config.json"
        for name, recalibration in (recalibrations or {}).items():
            always = directory.is_dir() and applied_by_default(directory)
            files["tract_calibration.json"] = recalibration.save(made, scale=name, always=always)
        if "adapter_config.json" in files:
            base_model = _base_on_hub(files, Path(made), base_model)
        _write_card(files, Path(made), judge_config, repo_id, base_model)
        return _push(files, repo_id, "model", private, token, revision, commit_message)


def push_rows(
    directory: Path,
    repo_id: str,
    *,
    source: str | None = None,
    model: str | None = None,
    license: str | None = None,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload self-generated rationales",
) -> str:
    """Upload the rows of a finished self-distillation; see `CoTSelfDistill.push_to_hub`."""
    files = {name: directory / name for name in ("rows.jsonl", "summary.json")}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise FileNotFoundError(
            f"{missing[0]} is missing: {directory} holds no finished self-distillation. Run it again with the same "
            "settings to finish it"
        )
    for path in files.values():
        check_result(path)
    with TemporaryDirectory() as made:
        card = rows_card(
            read_json(files["summary.json"]),
            read_json(directory / "settings.json"),
            repo_id=repo_id,
            source=source,
            model=model,
            license=license,
        )
        files["README.md"] = Path(made) / "README.md"
        files["README.md"].write_text(card, encoding="utf-8")
        return _push(files, repo_id, "dataset", private, token, revision, commit_message)


def _saved(backend: Any, directory: Path) -> Path:
    """The backend's model and tokenizer as files."""
    if not hasattr(backend, "model") or not hasattr(backend.model, "save_pretrained"):
        raise ValueError(
            f"the weights of {backend.model_id} are held by the {backend.name} backend's engine and cannot be uploaded "
            "from here. Load the judge from its directory: CoTRAILJudge.from_pretrained(directory).push_to_hub(...)"
        )
    backend.model.save_pretrained(directory)
    backend.tokenizer.save_pretrained(directory)
    return directory


def _base_on_hub(files: dict[str, Path], made: Path, base_model: str | None) -> str:
    """The hub id of an adapter's base, written into the uploaded adapter configuration."""
    settings = read_json(files["adapter_config.json"])
    base = base_model or str(settings["base_model_name_or_path"])
    if Path(base).exists() or base.startswith((".", "/", "~")):
        raise ValueError(
            f"the adapter's base model is {base}, a local directory that others cannot load. Give its hub id: "
            'push_to_hub(..., base_model="user/model")'
        )
    if base != settings["base_model_name_or_path"]:
        files["adapter_config.json"] = made / "adapter_config.json"
        write_json(files["adapter_config.json"], {**settings, "base_model_name_or_path": base})
    return base


def _write_card(
    files: dict[str, Path], made: Path, judge_config: JudgeConfig, repo_id: str, base_model: str | None
) -> None:
    """The directory's own card, loading from `repo_id`; where there is none, one that says what is known."""
    own = files["README.md"].read_text(encoding="utf-8") if "README.md" in files else _PLACEHOLDER
    if _PLACEHOLDER not in own:
        text = with_hub_id(own, repo_id)
    else:
        name = repo_id.split("/")[-1]
        text = model_card(
            None, judge_config, base_model=base_model, model_name=name, hub_id=repo_id, tags=["trl", "tract"]
        )
    card = ModelCard(text)
    if base_model is not None:
        card.data.base_model = base_model  # its metadata leaves a directory out
    files["README.md"] = made / "README.md"
    card.save(files["README.md"])


def _push(
    files: Mapping[str, Path],
    repo_id: str,
    repo_type: str,
    private: bool,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload all files in one commit; the repository's address."""
    api = HfApi(token=token, library_name="trl-tract")
    address = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if private and not api.repo_info(address.repo_id, repo_type=repo_type).private:
        raise ValueError(
            f"{repo_id} exists already and is public, so nothing was uploaded. Pass private=False to upload to the "
            "public repository, or choose another one"
        )
    if revision is not None and revision != "main":
        api.create_branch(address.repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    api.create_commit(
        address.repo_id,
        [CommitOperationAdd(name, path) for name, path in sorted(files.items())],
        commit_message=commit_message,
        repo_type=repo_type,
        revision=revision,
    )
    return str(address)
