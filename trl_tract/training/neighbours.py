"""Other training libraries in the same environment: which are there, what they ask of TRL, and whether they changed it.

Nothing of theirs is imported. Knows nothing of training.
"""

import inspect
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement

NAMES = ("unsloth", "llamafactory", "axolotl")
_METHODS = ("__init__", "_prepare_dataset", "compute_loss", "training_step", "log", "save_model")
# Where TRL's and transformers' own methods, and the decorators around them, are written.
_HOSTS = {"trl", "transformers", "accelerate", "huggingface_hub", "torch", "contextlib", "functools"}


def neighbours() -> list[str]:
    """A line for each library that is installed beside this one, if there is something to know of it."""
    lines = []
    for name in NAMES:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        wanted = _wanted_trl(name)
        trl = version("trl")
        if wanted is not None and not wanted.specifier.contains(trl, prereleases=True):
            lines.append(
                f"{name} {found} is installed here and requires trl{wanted.specifier}, but trl-tract requires the "
                f"installed trl {trl}. {name} will not work in this environment. Use a separate environment for each"
            )
        elif name == "unsloth":
            lines.append(
                f"unsloth {found} is installed here. It changes TRL's classes when it is imported, so do not import it "
                "in a program that uses TRACTTrainer"
            )
    return lines


def _wanted_trl(name: str) -> Requirement | None:
    for line in requires(name) or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name == "trl" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            return requirement
    return None


def changed_class(kind: type) -> str | None:
    """Who changed a class of TRL's, in one line, or None: whether it was put in its place, or its methods were.

    Example:
        >>> changed_class(int) is None
        True
    """
    found = _package(kind.__module__)
    what = kind.__name__
    if found in _HOSTS or found == "builtins":
        for method in _METHODS:
            function = inspect.getattr_static(kind, method, None)
            # `functools.wraps` copies a function's __module__, but not where its code was written.
            written = getattr(function, "__globals__", {}).get("__name__", "trl")
            if _package(written) not in _HOSTS:
                found, what = _package(written), f"{kind.__name__}.{method}"
                break
        else:
            return None
    return (
        f"{what} is not TRL's own: {found} changed it in this process, and TRACTTrainer is not tested with that. Train "
        f"in a program that does not import {'unsloth' if 'unsloth' in found.lower() else found}"
    )


def _package(module: str) -> str:
    return module.partition(".")[0]
