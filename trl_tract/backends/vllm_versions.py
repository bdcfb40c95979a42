"""Which vLLMs there can be, and what changed between them: no other file asks for vLLM's version.

Knows version numbers; knows nothing of engines.
"""

import importlib.util

from packaging.version import Version

OLDEST = "0.22"
"""The first whose `logprob_token_ids` are log-probabilities from before sampling.

0.20 and 0.21 have the field too, and compute it, with a Triton kernel, from logits that sampling has changed in place.
"""
OLDEST_SERVER = "0.26"
"""The first whose HTTP API takes `logprob_token_ids`."""
INSTALL = 'pip install "trl-tract[vllm]"'


def require_vllm() -> None:
    """Look whether there is a vLLM in this environment that can be used in process."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f"VLLMBackend needs vLLM: {INSTALL}")
    from vllm import __version__

    if Version(__version__) < Version(OLDEST):
        raise ImportError(
            f"vLLM {__version__} is installed here, but VLLMBackend needs {OLDEST} or later for exact "
            f"log-probabilities of chosen tokens: {INSTALL} -U"
        )
