"""A backend by its name, for whoever reads names from a command line or a file."""

from typing import TYPE_CHECKING, Any

from trl_tract.backends.base import Backend
from trl_tract.backends.loading import load_tokenizer
from trl_tract.backends.transformers import TransformersBackend

if TYPE_CHECKING:
    from trl_tract.backends.chat import ChatBackend

BACKENDS = ("transformers", "vllm", "server")


def make_author(model: str, name: str = "transformers", **options: Any) -> "Backend | ChatBackend":
    """Who writes rationales: a backend, or with the name `chat` a model behind a chat endpoint.

    Args:
        model: As in `make_backend`; with `chat`, the model's name there.
        **options: Arguments of the class. With `chat`: `base_url`, and `served_model` if it is not `model`.
    """
    if name != "chat":
        return make_backend(model, name, **options)
    from trl_tract.backends.chat import ChatBackend

    if not options.get("base_url"):
        raise ValueError(
            "the chat backend needs base_url, the address of the endpoint, such as http://localhost:11434/v1"
        )
    return ChatBackend(options.pop("base_url"), options.pop("served_model", None) or model, **options)


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
            raise ValueError(
                "the server backend needs base_url, the address of the server, such as http://localhost:8000/v1"
            )
        served = options.pop("served_model", None) or model
        return ServerBackend(options.pop("base_url"), served, tokenizer=load_tokenizer(model), **options)
    raise ValueError(f"backend {name!r} is unknown: choose one of {', '.join(BACKENDS)}")
