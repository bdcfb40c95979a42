"""Random numbers of one call, apart from those of the process. Knows devices; knows nothing of models."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def seeded(device: torch.device, key: str) -> Iterator[None]:
    """Random numbers that depend on `key` alone; the caller's random state is put back."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=None if device.type == "cpu" else device.type):
        # Not torch.manual_seed: it seeds every device of the process, and only this one is put back.
        torch.default_generator.manual_seed(seed)
        if devices:
            module: Any = torch.get_device_module(device)
            with module.device(device) if hasattr(module, "device") else nullcontext():
                module.manual_seed(seed)
        yield
