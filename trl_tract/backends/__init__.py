"""Generation backends: one protocol, several engines, and a public double for tests."""

import importlib
from typing import TYPE_CHECKING, Any

from trl_tract.backends.base import Backend, FinishReason, Generation, Sampling, SamplingOptions, Stop
from trl_tract.backends.factory import BACKENDS, make_author, make_backend
from trl_tract.backends.scripted import ScriptedBackend
from trl_tract.backends.transformers import TransformersBackend

if TYPE_CHECKING:
    from trl_tract.backends.chat import ChatBackend
    from trl_tract.backends.server import ServerBackend
    from trl_tract.backends.vllm import VLLMBackend

# Imported at first use: most runs need neither an HTTP client nor vLLM.
_FILES = {"ChatBackend": "chat", "ServerBackend": "server", "VLLMBackend": "vllm"}

__all__ = [
    "BACKENDS",
    "Backend",
    "ChatBackend",
    "FinishReason",
    "Generation",
    "Sampling",
    "SamplingOptions",
    "ScriptedBackend",
    "ServerBackend",
    "Stop",
    "TransformersBackend",
    "VLLMBackend",
    "make_author",
    "make_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'trl_tract.backends' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_tract.backends.{_FILES[name]}"), name)
