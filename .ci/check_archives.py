"""Do the wheel and the sdist hold what the repository tracks for them, and nothing else?

python .ci/check_archives.py dist
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

TOP = {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "pyproject.toml", ".gitignore", ".mkdocs.yml"}
FOLDERS = ("trl_tract/", "tests/", "docs/", "examples/", ".github/")
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def tracked() -> set[str]:
    """The files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    return set(listed.split("\0")) - {""}


def in_wheel(wheel: Path) -> set[str]:
    """Its files, those of the metadata directory without its name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name.split(".dist-info/")[-1] for name in archive.namelist() if not name.endswith("/")}


def in_sdist(sdist: Path) -> set[str]:
    """Its files, without the directory that all of them are in."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def main() -> None:
    """Compare, and end with an error that names what is too much and what is missing."""
    (wheel,), (sdist,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    files = tracked()
    wanted_wheel = {file for file in files if file.startswith("trl_tract/")} | METADATA
    wanted_sdist = {file for file in files if file.startswith(FOLDERS)} | TOP | {"PKG-INFO"}
    problems = []
    for archive, found, wanted in (
        (wheel, in_wheel(wheel), wanted_wheel),
        (sdist, in_sdist(sdist), wanted_sdist),
    ):
        problems += [f"{archive.name} should not hold {file}" for file in sorted(found - wanted)]
        problems += [f"{archive.name} lacks {file}" for file in sorted(wanted - found)]
        print(f"{archive.name}: {len(found)} files, {archive.stat().st_size / 1024:.0f} KiB")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
