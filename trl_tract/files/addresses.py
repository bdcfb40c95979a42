"""Files at addresses such as `s3://bucket/rows.jsonl`, read and written by fsspec. Knows no formats."""

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import fsspec

from trl_tract.files.journal import is_address, whole_file
from trl_tract.text.secrets import without_secrets


class Address:
    """A file elsewhere, as far as it is asked like a path."""

    def __init__(self, url: str) -> None:
        self._shown = without_secrets(url)
        protocol = url.split("://")[0]
        try:
            self._system, self._path = fsspec.url_to_fs(url)
        except ImportError as error:
            raise ImportError(f'{self._shown}: {error}: pip install "fsspec[{protocol}]"') from error
        except ValueError as error:
            raise ValueError(
                f"{self._shown}: {error}. Use an address type that fsspec supports, such as s3://"
            ) from error

    def __str__(self) -> str:
        return str(self._shown)

    @property
    def suffix(self) -> str:
        """What its name ends with."""
        return Path(self._path).suffix

    def exists(self) -> bool:
        """Whether there is anything.

        Raises:
            OSError: It cannot be reached; the provider's words are in the message.
        """
        return bool(self._ask("exists"))

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self._ask("isfile"))

    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return bool(self._ask("isdir"))

    def stat(self) -> SimpleNamespace:
        """`st_size`: bytes."""
        return SimpleNamespace(st_size=self._ask("size"))

    def open(self, mode: str = "r", *, encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """The file, open for reading."""
        file = self._ask("open", "rb")
        return file if "b" in mode else io.TextIOWrapper(file, encoding=encoding, newline=newline)

    def put(self, file: Path) -> None:
        """Upload a file.

        Raises:
            OSError: It could not be written, or arrived with another size.
        """
        self._ask("makedirs", exist_ok=True, of=os.path.dirname(self._path))
        self._ask("put_file", of=str(file), to=self._path)
        self._system.invalidate_cache()
        if (arrived := self.stat().st_size) != (size := file.stat().st_size):
            raise OSError(f"{self}: {arrived} of {size} bytes arrived")

    def _ask(self, what: str, *arguments: Any, of: str | None = None, to: str | None = None, **options: Any) -> Any:
        places = [self._path if of is None else of, *([] if to is None else [to])]
        try:
            return getattr(self._system, what)(*places, *arguments, **options)
        except Exception as error:  # each provider has its own kinds
            words = without_secrets(" ".join(str(error).split())) or "not possible there"
            raise OSError(f"{self} cannot be read or written: {type(error).__name__}: {words}") from error


def deliver(file: Path, target: str) -> None:
    """Bring a file to its place, a path or an address, whole or not at all."""
    if is_address(target) and not target.startswith("file://"):
        Address(target).put(file)
        return
    path = Path(target.removeprefix("file://"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as content, whole_file(path) as written:
        shutil.copyfileobj(content, written)
