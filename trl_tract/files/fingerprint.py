"""What a model is, as named digests: trained again into its directory, with another tokenizer or base, it is another.

Files of more than 512 MiB are sampled: see `docs/large_runs.md`. Knows the files of models by their names.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trl_tract import __version__

PARTS = {
    "adapter weights": r"adapter_model.*",
    "adapter configuration": r"adapter_config\.json",
    "model weights": r".*\.safetensors(\.index\.json)?|pytorch_model.*|.*\.gguf",
    "chat template": r"chat_template.*|.*\.jinja",
    "tokenizer": r".*token.*|vocab\..*|merges\.txt|.*\.model|.*\.tiktoken|tekken\.json",
    "judge settings": r"tract_config\.json",
    "configuration": r"(generation_)?config\.json",
}
"""Part of a model -> the names of its files; the first that fits counts."""

_WHOLE = 2**29  # bytes of a file that are all read
_PAGE, _STRIDE = 2**12, 2**20
_LENGTH = 16


def made_by(backend: Any, model: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What results are made by, as settings: the model's parts, and the version of this package.

    Args:
        backend: What it says of its model counts, or else the files that its `model_id` names; None: not asked.
        model: Directory or hub id whose files count as well.
        revision: Of these.
    """
    # A double of a user's own, made before backends said anything, need not have the method.
    said: dict[str, str] = {} if backend is None else getattr(backend, "fingerprint", dict)()
    files = model or (None if said or backend is None else backend.model_id)
    engine = getattr(backend, "loaded_as", {})
    return {
        "fingerprint": (model_fingerprint(files, revision) if files else {}) | said,
        "trl_tract": __version__,
        **engine,
    }


def model_fingerprint(model: str | Path, revision: str | None = None) -> dict[str, str]:
    """Name of a part -> its digest, for a model or adapter and the base that it stands on."""
    directory = Path(model)
    parts: dict[str, str] = {}
    if directory.is_dir():
        for name, digest in file_digests(model_files(directory)).items():
            part = _part(name)
            parts[part] = hashlib.sha256(f"{parts.get(part, '')}{name.name}{digest}".encode()).hexdigest()[:_LENGTH]
    elif (snapshot := _snapshot(str(model), revision)) is not None:
        directory, parts = snapshot, {"commit": snapshot.name}
    adapter = directory / "adapter_config.json"
    of = json.loads(adapter.read_bytes()) if adapter.is_file() else {}
    base = of.get("base_model_name_or_path")
    if base and Path(base) != Path(model):
        below = model_fingerprint(_base_of(adapter, base), of.get("revision"))
        parts |= {f"base model's {part.removeprefix('model ')}": digest for part, digest in below.items()}
    return parts


def _base_of(adapter: Path, base: str) -> str:
    """Where an adapter's base is, as loading finds it: as named, or as seen from a directory above the adapter."""
    places = () if Path(base).exists() else (above / base for above in adapter.absolute().parents)
    return next((str(place) for place in places if (place / "config.json").is_file()), base)


def model_files(directory: Path) -> list[Path]:
    """The files of a directory that make up a model, in alphabetical order: no checkpoints, logs or cards."""
    named = directory / "additional_chat_templates"  # those beside the default one, such as for tools
    return sorted(path for path in (*directory.iterdir(), *named.glob("*")) if _part(path) and path.is_file())


def drop_links(directory: Path, *, checkpoint: bool) -> None:
    """Delete the symbolic links that stand where a model is about to be saved: nothing is written through them.

    Args:
        directory: Its other links stay, which are nobody's but the user's.
        checkpoint: Nothing else is in the directory, so all of its links go, and it is no link itself.
    """
    if checkpoint and directory.is_symlink():
        directory.unlink()
    for path in directory.iterdir() if directory.is_dir() else ():
        beside = path.name in ("training_args.bin", "trainer_state.json", "README.md")
        if path.is_symlink() and (checkpoint or beside or _part(path)):
            path.unlink()


def _part(path: Path) -> str:
    return next((part for part, names in PARTS.items() if re.fullmatch(names, path.name)), "")


def file_digests(paths: list[Path]) -> dict[Path, str]:
    """A digest of each file; of a large one that is no JSONL, of samples."""
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(paths, threads.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    return _sampled(path) if path.stat().st_size > _WHOLE and path.suffix != ".jsonl" else _whole(path)


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_LENGTH]


def _sampled(path: Path) -> str:
    """Of the size, a page in every MiB, and the first and the last page of every tensor."""
    size = path.stat().st_size
    state = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        pages = {*range(0, size, _STRIDE), max(size - _PAGE, 0)}
        if path.suffix == ".safetensors":
            pages |= set(_tensor_pages(file))
        for page in sorted(pages):
            file.seek(page)
            state.update(file.read(_PAGE))
    return state.hexdigest()[:_LENGTH]


def _tensor_pages(file: IO[bytes]) -> Iterator[int]:
    # The format: length of the header in 8 bytes, the header (JSON), the tensors.
    start = int.from_bytes(file.read(8), "little")
    yield from range(0, min(8 + start, _STRIDE * 100), _PAGE)
    try:
        header = json.loads(file.read(min(start, _STRIDE * 100)))
        places = [each["data_offsets"] for name, each in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # damaged: whoever loads it will say so
    for begin, end in places:
        yield 8 + start + begin
        yield 8 + start + max(begin, end - _PAGE)


def _snapshot(model: str, revision: str | None) -> Path | None:
    """Where the hub's client keeps a model; None for what is not on the hub."""
    from transformers.utils import cached_file

    if "/" not in model:
        return None
    for name in ("adapter_config.json", "config.json"):
        with suppress(OSError, ValueError):
            return Path(str(cached_file(model, name, revision=revision))).parent
    return None
