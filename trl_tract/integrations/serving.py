"""A judge behind HTTP, until the process is told to stop. Knows sockets and signals; knows nothing of requests."""

import importlib.util
import ipaddress
import socket
import time
from typing import Any

from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.text.secrets import key_of

KEY_VARIABLE = "TRL_TRACT_API_KEY"
_QUIET_SECONDS = 0.5
"""How long nothing has to be under way before a server that was told to stop ends: requests on their way arrive."""


def check_installed() -> None:
    """Say what is missing before a model is loaded."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'trl-tract serve needs {", ".join(missing)}: pip install "trl-tract[serve]"')


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free.

    Raises:
        OSError: The address is not this machine's, or is taken.
    """
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: {error}. Choose another port, or 0 for any free port") from error


def make_server(judge: CoTRAILJudge, name: str, *, host: str, **limits: Any) -> Any:
    """A uvicorn server around a judge; `run(sockets=[open_socket(host, port)])` answers until SIGTERM or Ctrl-C.

    Then it answers what it has taken, refuses what is new, and returns. A second signal ends it at once. The key is
    that of the environment variable TRL_TRACT_API_KEY.
    """
    check_installed()
    import uvicorn

    from trl_tract.integrations.app import make_app

    hosts = ["localhost", "127.0.0.1", "::1"] if is_loopback(host) else None
    gate = make_app(judge, name, key=key_of(KEY_VARIABLE), hosts=hosts, **limits)

    class Server(uvicorn.Server):
        quiet_since: float | None = None

        def handle_exit(self, sig: int, frame: Any) -> None:
            # uvicorn would close idle connections at once, with requests on their way, and raise the signal again.
            self.force_exit = self.should_exit = gate.draining
            gate.draining = True

        async def on_tick(self, counter: int) -> bool:
            if gate.draining:
                now = time.monotonic()
                self.quiet_since = None if gate.open else self.quiet_since or now
                self.should_exit |= self.quiet_since is not None and now - self.quiet_since > _QUIET_SECONDS
            return await super().on_tick(counter)

    return Server(
        uvicorn.Config(
            gate, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30, ws="none"
        )
    )
