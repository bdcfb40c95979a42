"""A double of vLLM's completions server, on loopback, that fails as it is told: a real one fails too rarely."""

import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import PreTrainedTokenizerBase

# What to answer instead of the truth: status, headers, body; or None, when the connection is to be cut.
Reply = tuple[int, dict[str, str], bytes] | None
Fault = Callable[["FakeServer", dict[str, Any]], Reply]
CONTEXT = 64


def says(status: int, body: Any = None, **headers: str) -> Fault:
    """An answer that is always the same; a body of bytes is sent as it is."""
    raw = body if isinstance(body, bytes) else json.dumps(body or {"error": {"message": "no luck"}}).encode()
    return lambda server, request: (status, {name.replace("_", "-"): text for name, text in headers.items()}, raw)


def changed(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """The true answer after `change`, which edits it in place or returns another."""

    def fault(server: "FakeServer", request: dict[str, Any]) -> Reply:
        answer = server.answer(request)
        return 200, {}, json.dumps(change(answer) or answer).encode()

    return fault


def cut(server: "FakeServer", request: dict[str, Any]) -> Reply:
    """The connection is reset."""
    return None


class FakeServer:
    """Continues a prompt with `texts[its first token]`, and reports -1, -2, ... for the tokens asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_model_len: int | None = CONTEXT) -> None:
        self.tokenizer = tokenizer
        self.cards = [{"id": "judge", "root": "/nowhere/judge", "max_model_len": max_model_len}]
        self.texts: dict[int, str] = {}
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # or the body waits until the head has been acknowledged

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                owner.headers.append(dict(self.headers))
                self.reply(200, {}, json.dumps({"data": owner.cards}).encode())

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.headers.append(dict(self.headers))
                    owner.requests.append(request)
                    owner.running += 1
                    owner.most_running = max(owner.running, owner.most_running)
                    fault = owner.faults.popleft() if owner.faults else owner.always
                try:
                    time.sleep(owner.delay)
                    if fault is None and len(request.get("stop", ())) > 4:  # as vLLM 0.32
                        reply: Reply = (400, {}, b'{"message": "List should have at most 4 items after validation"}')
                    elif fault is None:
                        reply = (200, {}, json.dumps(owner.answer(request)).encode())
                    else:
                        reply = fault(owner, request)
                finally:
                    with owner.lock:
                        owner.running -= 1
                if reply is None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.wfile = open("/dev/null", "wb")  # noqa: SIM115  # What the base class flushes at the end.
                    self.close_connection = True
                else:
                    self.reply(*reply)

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                try:
                    self.send_response(status)
                    for name, text in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, text)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # The client has gone.

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # of more connections at once than that, some come a second later

        self.httpd = Server(("127.0.0.1", self.port), Handler)
        self.httpd.daemon_threads = True
        self.port = self.httpd.server_address[1]
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.socket.close()
        self.thread.join()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = request["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if "logprob_token_ids" in request:
            asked = request["logprob_token_ids"]
            shown = {f"token_id:{token}": -1.0 - place for place, token in enumerate(asked)}
            choices = [self.choice(0, prompt, [7], "length", {"token_logprobs": [-0.5], "top_logprobs": [shown]})]
        else:
            choices = [self.write(index, prompt, request) for index in range(request["n"])]
        return {"choices": choices, "usage": {"prompt_tokens": len(prompt)}}

    def write(self, index: int, prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
        """As vLLM does it: the ids go on to the token that completes the stop text, the text ends before it.

        A prompt that holds the beginning of the text already is answered with the rest.
        """
        text = self.texts.get(prompt[0], f"good {prompt[0]} {index}")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        held = next((n for n in range(min(len(ids), len(prompt) - 1), 0, -1) if prompt[-n:] == ids[:n]), 0)
        ids = ids[held:]
        for end in range(1, min(len(ids), request["max_tokens"]) + 1):
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=request.get("skip_special_tokens", True))
            for stop in request.get("stop", ()):
                if stop in text:
                    told = {"text": text[: text.index(stop)], "stop_reason": stop}
                    return self.choice(index, prompt, ids[:end], "stop", **told)
        text, ids = self.tokenizer.decode(ids), [*ids, self.tokenizer.eos_token_id]
        if len(ids) > request["max_tokens"]:
            return self.choice(index, prompt, ids[: request["max_tokens"]], "length")
        return self.choice(index, prompt, ids, "stop", text=text)

    def choice(
        self,
        index: int,
        prompt: list[int],
        ids: list[int],
        reason: str,
        logprobs: Any = None,
        text: str = "",
        stop_reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "token_ids": ids,
            "prompt_token_ids": prompt,
            "finish_reason": reason,
            "stop_reason": stop_reason,
            "logprobs": logprobs,
        }
