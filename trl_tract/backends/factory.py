"""A backend by its name, for whoever reads names from a command line or a file."""

from typing import Any

from trl_tract.backends.base import Backend
from trl_tract.backends.loading import load_tokenizer
from trl_tract.backends.transformers import TransformersBackend

BACKENDS = ("transformers", "vllm", "server")


def make_backend(model: str, name: str = "transformers", **options: Any) -> Backend:
    """The backend `name` for a model.

    Args:
        model: Directory or hub id of a full model or an adapter; with `server`, where its tokenizer is.
        name: One of `BACKENDS`.
        **options: Arguments of the backend's class. With `server`: `base_url`, and `served_model` if the server calls
            the model otherwise than `model`.

    Raises:
        ValueError: An unknown name, or no `base_url` for a server.
        ImportError: The engine is not installed; the message says how to.
    """
    if name == "transformers":
        return TransformersBackend(model, **options)
    if name == "vllm":
        from trl_tract.backends.vllm import VLLMBackend

        return VLLMBackend(model, **options)
    if name == "server":
        from trl_tract.backends.server import ServerBackend

        if not options.get("base_url"):
            raise ValueError("the server backend needs base_url: where the server is, such as http://localhost:8000/v1")
        served = options.pop("served_model", None) or model
        return ServerBackend(options.pop("base_url"), served, tokenizer=load_tokenizer(model), **options)
    raise ValueError(f"backend {name!r} is unknown: choose one of {', '.join(BACKENDS)}")
