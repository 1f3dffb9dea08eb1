"""A server of a tiny model, or of recorded replies, on 127.0.0.1, that can be made to misbehave."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Answer = Callable[[str, Any], tuple[int, Any]]  # path, body (None of a GET) -> status, reply
SCORES = ("/v1/completions", "/inference/v1/generate", "/generate", "/get_sequence_logprobs/")


class StandIn:
    """Serves `answer` in threads. faults: what happens to requests for log-probabilities, one each, None: nothing; a
    fault is a status with headers, or a function of the handler and its reply, which sends what it likes."""

    def __init__(self, answer: Answer, certificate: Path | None = None) -> None:
        self.answer, self.certificate = answer, certificate
        self.faults: list[Any] = []
        self.requests: list[tuple[str, Any, dict[str, str]]] = []  # path, body, headers
        self.busy = self.most_busy = 0
        self.delay = 0.0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    @property
    def scored(self) -> list[Any]:
        """The bodies of the requests for log-probabilities."""
        return [body for path, body, _ in self.requests if path in SCORES]

    def start(self) -> None:
        """Listen, where it did before if it did."""
        stand_in = self

        class Handler(_Handler):
            owner = stand_in

        class Server(ThreadingHTTPServer):
            daemon_threads, allow_reuse_address = True, True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Of a client, or a kill, that ends a connection."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """As kill -9: all connections break, and nothing listens."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for one in list(self._open):
            drop(one)
        self._open.clear()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


class _Handler(BaseHTTPRequestHandler):
    owner: StandIn
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.owner._open.add(self.connection)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: Any) -> None:
        owner = self.owner
        with owner._lock:
            owner.requests.append((self.path, body, dict(self.headers)))
            fault = owner.faults.pop(0) if self.path in SCORES and owner.faults else None
            owner.busy += 1
            owner.most_busy = max(owner.busy, owner.most_busy)
        try:
            time.sleep(owner.delay)
            if isinstance(fault, tuple):
                self.send(fault[0], {"error": {"message": "later"}}, fault[1])
                return
            status, reply = owner.answer(self.path, body)
            if fault is None or status != 200:
                self.send(status, reply)
            else:
                fault(self, reply)
        finally:
            with owner._lock:
                owner.busy -= 1

    def send(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> None:
        """A reply, as JSON unless it is bytes."""
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def drop(connection: socket.socket) -> None:
    """Break a connection."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def cut(handler: Any, reply: Any) -> None:
    """A reply that ends in its middle."""
    data = json.dumps(reply).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    drop(handler.connection)
    handler.close_connection = True


def changed(change: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """A reply that is changed: a function of it that returns another, or None after changing it."""

    def send(handler: Any, reply: Any) -> None:
        other = change(reply)
        handler.send(200, reply if other is None else other)

    return send


class TinyModel:
    """Answers as vLLM (and its token-in interface), SGLang or TRL's server would, of a tiny model in fp32."""

    def __init__(self, model: Any, tokenizer: Any = None, kind: str = "vllm", most: int = 128) -> None:
        self.model, self.tokenizer, self.kind, self.most = model.eval(), tokenizer, kind, most
        self._lock = threading.Lock()

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        about = {
            "vllm": {"/v1/models": {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "vllm"}]},
                     "/version": {"version": "0.0"}},
            "sglang": {"/v1/models": {"object": "list", "data": [{"id": "tiny", "owned_by": "sglang"}]},
                       "/get_model_info": {"model_path": "tiny", "weight_version": "default"},
                       "/get_server_info": {"version": "0.0"}},
            "trl": {"/health/": {"status": "ok"}},
        }[self.kind]  # fmt: skip
        if body is None:
            return (200, about[path]) if path in about else (404, {"detail": "Not Found"})
        if path == "/tokenize" and self.tokenizer is not None and self.kind != "trl":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return 200, {"count": len(ids), "max_model_len": 512, "tokens": list(ids), "token_strs": None}
        if path == "/v1/completions" and self.kind == "vllm":
            return self._completions(body)
        if path == "/inference/v1/generate" and self.kind == "vllm":
            rows = self._mappings(body["token_ids"], body["sampling_params"]["prompt_logprobs"])
            choice = {"index": 0, "token_ids": [1], "finish_reason": "length"}
            return 200, {"model": "tiny", "prompt_logprobs": rows, "prompt_token_ids": body["token_ids"],
                         "choices": [choice]}  # fmt: skip
        if path == "/generate" and self.kind == "sglang":
            return 200, self._generate(body)
        if path == "/get_sequence_logprobs/" and self.kind == "trl":
            return 200, self._sequences(body)
        return 404, {"detail": "Not Found"}

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """[L, V]"""
        with self._lock, torch.no_grad():
            return self.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def _ranked(self, tokens: list[int], k: int) -> list[tuple[dict[int, float], int]]:
        """The k likeliest of each token after the first, by id, and the token."""
        top = self.log_probs(tokens)[:-1].topk(k)
        pairs = zip(top.indices.tolist(), top.values.tolist(), tokens[1:], strict=True)
        return [(dict(zip(ids, values, strict=True)), own) for ids, values, own in pairs]

    def _own(self, tokens: list[int]) -> list[float]:
        return self.log_probs(tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()

    def _mappings(self, tokens: list[int], k: int) -> list[Any]:
        rows: list[Any] = [None]
        for (likeliest, own), value in zip(self._ranked(tokens, k), self._own(tokens), strict=True):
            both = {own: value, **likeliest}  # vLLM's own token stands first
            rows.append({str(i): {"logprob": p, "rank": 1, "decoded_token": "x"} for i, p in both.items()})
        return rows

    def _completions(self, body: Any) -> tuple[int, Any]:
        def bad(status: int, message: str) -> tuple[int, Any]:
            return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}

        if body["model"] != "tiny":
            return bad(404, f"The model `{body['model']}` does not exist.")
        if body["prompt_logprobs"] > self.most:
            asked = body["prompt_logprobs"]
            return bad(400, f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.most}")
        choice = {"index": 0, "text": "x", "prompt_logprobs": self._mappings(body["prompt"], body["prompt_logprobs"]),
                  "prompt_token_ids": body["prompt"]}  # fmt: skip
        return 200, {"model": "tiny", "choices": [choice], "usage": {}}

    def _generate(self, body: Any) -> Any:
        tokens, k = body["input_ids"], body["top_logprobs_num"]
        own = [[None, tokens[0], None]]
        own += [[p, token, None] for token, p in zip(tokens[1:], self._own(tokens), strict=True)]
        top = [None, *([[p, i, None] for i, p in row.items()] for row, _ in self._ranked(tokens, k))]
        meta = {"prompt_tokens": len(tokens), "input_token_logprobs": own, "input_top_logprobs": top}
        return {"text": "x", "meta_info": meta}

    def _sequences(self, body: Any) -> Any:
        (tokens,), (first,), k = body["sequences"], body["prompt_lengths"], body["top_logprobs"]
        found = [{**row, own: p} for (row, own), p in zip(self._ranked(tokens, k), self._own(tokens), strict=True)]
        rows = found[first - 1 :]
        return {"logprobs": [[list(row.values()) for row in rows]],
                "logprob_token_ids": [[list(row) for row in rows]]}  # fmt: skip
