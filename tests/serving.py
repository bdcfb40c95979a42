"""A served judge in a thread of the test's process, and requests to it."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

from trl_tract.integrations.serving import make_server, open_socket


class Served:
    """A server that has started: `url`, `port`, `ask`, `stop`."""

    def __init__(self, judge: Any, **limits: Any) -> None:
        self.listening = open_socket("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(judge, "judge", host="127.0.0.1", **limits)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]})
        self.thread.start()

    def ask(self, body: Any, path: str = "/judge", method: str = "POST", **headers: str) -> tuple[int, Any, Any]:
        """Status, what the body's JSON says, and the headers; a body of bytes is sent as it is."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            sent = {"Content-Type": "application/json"} | {
                name.replace("_", "-"): text for name, text in headers.items()
            }
            connection.request(method, path, raw if method == "POST" else None, sent)
            answer = connection.getresponse()
            text = answer.read().decode()
            told = json.loads(text) if answer.headers["Content-Type"] == "application/json" else text
            return answer.status, told, answer.headers
        finally:
            connection.close()

    def told_to_stop(self) -> None:
        """What SIGTERM does in a process of its own."""
        self.server.handle_exit(signal.SIGTERM, None)

    def metrics(self) -> str:
        """Its counters."""
        return str(self.ask(b"", "/metrics", "GET")[1])

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        self.listening.close()


@contextlib.contextmanager
def served(judge: Any, **limits: Any) -> Iterator[Served]:
    server = Served(judge, **limits)
    try:
        yield server
    finally:
        if server.thread.is_alive():
            server.stop()


def wait_until(condition: Any) -> None:
    """Poll for what another thread is about to do."""
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
