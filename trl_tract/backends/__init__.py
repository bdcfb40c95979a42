"""Generation backends: one protocol, several engines, and a public double for tests."""

from trl_tract.backends.base import Backend, FinishReason, Generation, Sampling, SamplingOptions
from trl_tract.backends.factory import BACKENDS, make_backend
from trl_tract.backends.scripted import ScriptedBackend
from trl_tract.backends.transformers import TransformersBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "FinishReason",
    "Generation",
    "Sampling",
    "SamplingOptions",
    "ScriptedBackend",
    "TransformersBackend",
    "make_backend",
]
