"""A loopback server that answers as vLLM's OpenAI-compatible one does, from a real model, and fails when told to."""

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Fault:
    """
    A way to fail.

    Args:
        kind (`str`):
            `"status"` answers with an error; `"truncate"` breaks off in the middle of the right answer, `"garble"`
            sends half of it as if it were whole; `"drop"` breaks the connection before it, `"hang"` keeps it waiting.
        status (`int`, *optional*, defaults to `503`):
            HTTP status of `"status"`.
        headers (`dict[str, str]`, *optional*):
            Headers of `"status"`.
        body (`Any`, *optional*):
            JSON of `"status"`. Defaults to an error in vLLM's form.
    """

    kind: str = "status"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None


class VLLMServer:
    """
    `with VLLMServer(folder) as server:` serves the checkpoint in `folder` at `server.base_url`.

    Attributes to set, until `reset`: `faults`, met by the next completion requests in turn; `fault_of`, a function
    from a prompt to the fault it always meets or `None`; `change`, a function from a right answer and its prompt to
    the answer sent; `models`, the entries of the list of models; `delay`, seconds every completion takes at least.
    Attributes to read: `requests`, one dictionary a request with `path`, `authorization`, `body` and `time`;
    `prompts`, the prompts among them; `max_simultaneous`, the largest number of completions under way at once.

    Args:
        folder (`str`):
            Checkpoint, scored in float64.
        max_model_len (`int`, *optional*):
            Limit on prompt and generated tokens. Defaults to the positions of the model.
        api_key (`str`, *optional*):
            Key without which requests are refused.
    """

    def __init__(self, folder: str, *, max_model_len: int | None = None, api_key: str | None = None):
        self.model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_model_len = max_model_len or self.model.config.max_position_embeddings
        self._folder = folder
        self.reset(api_key)
        self._simultaneous = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._http = _HTTPServer(("127.0.0.1", 0), _Handler)
        self._http.vllm = self
        self.root_url = f"http://127.0.0.1:{self._http.server_port}"
        self.base_url = f"{self.root_url}/v1"

    def __enter__(self) -> "VLLMServer":
        # The interval at which the loop looks whether it is to end
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def reset(self, api_key: str | None = None) -> None:
        """Forgets the requests and whatever was set."""
        card = {"id": self._folder, "object": "model", "owned_by": "vllm", "root": self._folder, "parent": None}
        self.models: Any = [{**card, "max_model_len": self.max_model_len}]
        self.api_key = api_key
        self.faults: deque[Fault] = deque()
        self.fault_of: Callable[[list[int]], Fault | None] = lambda prompt: None
        self.change: Callable[[dict, list[int]], Any] = lambda answer, prompt: answer
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.max_simultaneous = 0

    @property
    def prompts(self) -> list[list[int]]:
        return [request["body"]["prompt"] for request in self.requests if request["path"] == "/v1/completions"]

    def respond(self, path: str, authorization: str | None, body: Any) -> tuple[int, Any, Fault | None]:
        """Status, JSON and fault of the answer to a request."""
        with self._lock:
            self.requests.append(
                {"path": path, "authorization": authorization, "body": body, "time": time.monotonic()}
            )
        if self.api_key is not None and authorization != f"Bearer {self.api_key}":
            return 401, {"error": "Unauthorized"}, None
        if path == "/v1/models" and body is None:
            return 200, {"object": "list", "data": self.models}, None
        if path != "/v1/completions" or body is None:
            return 404, {"detail": "Not Found"}, None
        with self._lock:
            self._simultaneous += 1
            self.max_simultaneous = max(self.max_simultaneous, self._simultaneous)
        try:
            self._closing.wait(self.delay)
            with self._lock:
                fault = self.fault_of(body["prompt"]) or (self.faults.popleft() if self.faults else None)
            return *self._complete(body), fault
        finally:
            with self._lock:
                self._simultaneous -= 1

    def hang(self) -> None:
        self._closing.wait(10.0)

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in [card["id"] for card in self.models]:
            return 404, _error(404, f"The model `{body['model']}` does not exist.")
        prompt = body["prompt"]
        if not all(isinstance(token, int) for token in prompt):
            return 400, _error(400, "This server takes token ids.")
        if len(prompt) + body["max_tokens"] > self.max_model_len:
            return 400, _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        if max(prompt) >= self.model.config.vocab_size:
            return 400, _error(400, f"Token id {max(prompt)} is out of vocabulary")
        ids = torch.tensor([prompt])
        with self._lock, torch.no_grad():
            logits = self.model(input_ids=ids).logits[0]
        logprobs = logits.log_softmax(-1)
        scored = logprobs[:-1].gather(-1, ids[0, 1:, None])
        ranks = (logprobs[:-1] >= scored).sum(-1)
        token_ids, stop_reason = self._generate(ids, body)
        choice = {"index": 0, "text": self.tokenizer.decode(token_ids, skip_special_tokens=True), "logprobs": None}
        choice |= {"finish_reason": "length" if stop_reason is None else "stop", "stop_reason": stop_reason}
        if body.get("prompt_logprobs") is not None:
            entries = zip(prompt[1:], scored[:, 0].tolist(), ranks.tolist(), strict=True)
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": logprob, "rank": rank, "decoded_token": "?"}}
                for token, logprob, rank in entries
            ]
        if body.get("return_token_ids"):
            choice |= {"prompt_token_ids": prompt, "token_ids": token_ids}
        answer = {"id": "cmpl-0", "object": "text_completion", "model": body["model"], "choices": [choice]}
        return 200, self.change(answer, prompt)

    def _generate(self, ids: torch.Tensor, body: dict[str, Any]) -> tuple[list[int], int | None]:
        """Tokens of the answer, and the one at which it stopped."""
        token_ids: list[int] = []
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        while len(token_ids) < body["max_tokens"]:
            with self._lock, torch.no_grad():
                logits = self.model(input_ids=ids).logits[0, -1]
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                token = int((logits / body["temperature"]).softmax(-1).multinomial(1, generator=generator))
            token_ids.append(token)
            if token in body.get("stop_token_ids", ()):
                return token_ids, token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        return token_ids, None


class _HTTPServer(ThreadingHTTPServer):
    # The default of 5 would refuse connections that a real server takes
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are written apart, which costs 40 ms a request where the kernel waits to put them together
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, body: Any) -> None:
        server = self.server.vllm
        status, answer, fault = server.respond(self.path, self.headers.get("Authorization"), body)
        kind, headers = (fault.kind, fault.headers) if fault else (None, {})
        if kind == "hang":
            server.hang()
        if kind in ("hang", "drop"):
            self._break()
            return
        if kind == "status":
            status, answer = fault.status, fault.body or _error(fault.status, "as told")
        data = json.dumps(answer).encode()
        sent = data[: len(data) // 2] if kind in ("truncate", "garble") else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent) if kind == "garble" else len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        if kind == "truncate":
            self._break()

    def _break(self) -> None:
        self.close_connection = True
        # The client may have given up before
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
