"""What servers of language models are asked, and what they answer: the log-probabilities of given tokens.

Each protocol makes the request of a sequence x_1 .. x_L and reads its reply: for each of x_2 .. x_L the ids and
log-probabilities of the k likeliest tokens in its place, and x's own where it is none of them. No server has a row for
x_1, which nothing stands before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import fail
from ..files import shown
from .served_client import Client

Row = tuple[list[int], list[float]]  # ids and log-probabilities, in any order
ENTRY_BYTES = 256  # of a reply's JSON for one log-probability, at most; 65 to 80 are usual


class About(NamedTuple):
    """What a server says of itself. model: None where it names none."""

    model: str | None
    server: str  # its program and version


class WrongReplyError(Exception):
    """A reply that is not one to the request. where: its part, such as a row."""

    def __init__(self, where: str, relation: str, got: object) -> None:
        super().__init__(where, relation, got)
        self.where, self.relation, self.got = where, relation, got


class Protocol(ABC):
    """One server's way to be asked."""

    name: str
    path: str

    @abstractmethod
    def about(self, client: Client, model: str | None) -> About:
        """The server and its model. model: the one that is wanted, None: the only one."""

    @abstractmethod
    def request(self, tokens: Sequence[int], k: int, model: str | None) -> dict[str, Any]:
        """The body of the request."""

    @abstractmethod
    def rows(self, reply: Any, tokens: Sequence[int], model: str | None) -> Iterator[Row]:
        """The reply's rows for tokens[1:]; WrongReplyError for another one's."""

    def tokenized(self, client: Client, text: str, model: str | None) -> list[int] | None:
        """The server's token ids of a text, special tokens in it read as such and none added; None: it does not say."""
        body = {"prompt": text, "add_special_tokens": False, **({} if model is None else {"model": model})}
        reply = client.ask("/tokenize", body, what="the probe text", optional=True)
        found = reply.get("tokens") if isinstance(reply, dict) else None
        return found if isinstance(found, list) else None


class VLLM(Protocol):
    """vLLM's /v1/completions, token ids as the prompt, with prompt_logprobs. Its prompt log-probabilities are the
    model's at temperature 1, whatever temperature is asked for."""

    name, path = "vllm", "/v1/completions"

    def about(self, client: Client, model: str | None) -> About:
        listed = client.ask("/v1/models", what="its models")
        names = [one["id"] for one in listed["data"]] if _has_models(listed) else []
        if model not in (names if model is not None or len(names) != 1 else [None]):
            got = f"{model!r} of {', '.join(map(shown, names))}" if names else "none"
            fail("ServedTeacher", f"model of {client.url}", "be one that it serves", got, "Name one as model")
        version = client.ask("/version", what="its version", optional=True)
        return About(model or names[0], " ".join(["vllm", *_named(version, "version")]))

    def request(self, tokens: Sequence[int], k: int, model: str | None) -> dict[str, Any]:
        """The body of the request: one token is generated, since none is refused."""
        return {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k,
                "return_token_ids": True}  # fmt: skip

    def rows(self, reply: Any, tokens: Sequence[int], model: str | None) -> Iterator[Row]:
        """A mapping of id to log-probability a token, null for the first."""
        _same("model", model, reply["model"])
        choices = reply["choices"]
        _same("choices", 1, len(choices))
        return self.mappings(choices[0], tokens)

    def mappings(self, found: Any, tokens: Sequence[int]) -> Iterator[Row]:
        """The rows of an object with prompt_logprobs."""
        _echoed(found.get("prompt_token_ids") or tokens, tokens)  # servers of before 2026 do not repeat them
        rows = _aligned("prompt_logprobs", found["prompt_logprobs"], tokens)
        return (([int(key) for key in row], [one["logprob"] for one in row.values()]) for row in rows)


class VLLMTokens(VLLM):
    """vLLM's token-in interface, /inference/v1/generate (vllm serve --enable-scale-out): the server makes no text."""

    name, path = "vllm-tokens", "/inference/v1/generate"

    def request(self, tokens: Sequence[int], k: int, model: str | None) -> dict[str, Any]:
        """The body of the request."""
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k, "detokenize": False}
        return {"model": model, "token_ids": tokens, "return_token_ids": True, "sampling_params": sampling}

    def rows(self, reply: Any, tokens: Sequence[int], model: str | None) -> Iterator[Row]:
        """As of /v1/completions, in the reply itself."""
        _same("model", model, reply["model"])
        return self.mappings(reply, tokens)


class SGLang(Protocol):
    """SGLang's /generate with input_ids, return_logprob from the first token on, and top_logprobs_num."""

    name, path = "sglang", "/generate"

    def about(self, client: Client, model: str | None) -> About:
        found = client.ask("/get_model_info", what="its model")
        served = next(iter(_named(found, "model_path")), None)
        if model not in (None, served):
            got = f"{model!r} of {served!r}"
            fail("ServedTeacher", f"model of {client.url}", "be the one that it serves", got, "Name that one")
        info = client.ask("/get_server_info", what="its version", optional=True)
        weights = [f"weights {name}" for name in _named(found, "weight_version")]
        return About(served, ", ".join([" ".join(["sglang", *_named(info, "version")]), *weights]))

    def request(self, tokens: Sequence[int], k: int, model: str | None) -> dict[str, Any]:
        """The body of the request."""
        return {"input_ids": tokens, "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k}  # fmt: skip

    def rows(self, reply: Any, tokens: Sequence[int], model: str | None) -> Iterator[Row]:
        """Triples of log-probability, id and text: of the tokens themselves, and lists of the likeliest."""
        own = reply["meta_info"]["input_token_logprobs"]
        _echoed([one[1] for one in own], tokens)
        top = _aligned("input_top_logprobs", reply["meta_info"]["input_top_logprobs"], tokens)
        return (self._row(row, one) for row, one in zip(top, own[1:], strict=True))

    def _row(self, row: Any, own: Any) -> Row:
        ids, log_probs = [one[1] for one in row], [one[0] for one in row]
        return (ids, log_probs) if own[1] in ids else ([*ids, own[1]], [*log_probs, own[0]])


class TRL(Protocol):
    """/get_sequence_logprobs/ of `trl vllm-serve` before TRL 1.14, whose server is vLLM's own. It says neither model
    nor version, and has no tokenizer to ask."""

    name, path = "trl", "/get_sequence_logprobs/"

    def about(self, client: Client, model: str | None) -> About:
        return About(model, "trl vllm-serve")

    def request(self, tokens: Sequence[int], k: int, model: str | None) -> dict[str, Any]:
        """The body of the request."""
        return {"sequences": [tokens], "prompt_lengths": [1], "top_logprobs": k, "temperature": 1.0,
                "response_format": "json"}  # fmt: skip

    def rows(self, reply: Any, tokens: Sequence[int], model: str | None) -> Iterator[Row]:
        """Lists of ids and of log-probabilities, of the tokens after prompt_lengths."""
        ids, log_probs = reply["logprob_token_ids"], reply["logprobs"]
        _same("sequences", (1, 1), (len(ids), len(log_probs)))
        _same("rows", (len(tokens) - 1,) * 2, (len(ids[0]), len(log_probs[0])))
        return zip(ids[0], log_probs[0], strict=True)

    def tokenized(self, client: Client, text: str, model: str | None) -> list[int] | None:
        """None: nothing can be asked."""
        return None


PROTOCOLS: dict[str, Protocol] = {one.name: one for one in (VLLM(), VLLMTokens(), SGLang(), TRL())}


def protocol_of(client: Client) -> Protocol:
    """The protocol of the server, by what it says of itself."""
    listed = client.ask("/v1/models", what="its models", optional=True)
    if _has_models(listed):
        return PROTOCOLS["sglang" if listed["data"][0].get("owned_by") == "sglang" else "vllm"]
    if listed is not None or client.ask("/health/", what="its state", optional=True) != {"status": "ok"}:
        got, remedy = "neither /v1/models nor TRL's /health/", "Check the address, or name protocol"
        fail("ServedTeacher", "url", "be of vLLM, SGLang or trl vllm-serve", got, remedy)
    return PROTOCOLS["trl"]


def _has_models(listed: Any) -> bool:
    data = listed.get("data") if isinstance(listed, dict) else None
    return isinstance(data, list) and bool(data) and all(_named(one, "id") for one in data)


def _named(said: Any, field: str) -> list[str]:
    """A name that a server gives, if it is one that can be printed."""
    name = said.get(field) if isinstance(said, dict) else None
    return [name] if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 500 else []


def _same(where: str, wanted: object, got: object) -> None:
    if got != wanted:
        raise WrongReplyError(where, f"be {wanted!r}", shown(got))


def _echoed(found: Sequence[int], tokens: Sequence[int]) -> None:
    """Refuse a reply to other tokens."""
    if len(found) != len(tokens):
        raise WrongReplyError("tokens", f"be the {len(tokens)} of the request", f"{len(found)}")
    for at, (one, asked) in enumerate(zip(found, tokens, strict=True)):
        if one != asked:
            raise WrongReplyError(f"token {at}", f"be {asked}, as asked", shown(one))


def _aligned(name: str, rows: Any, tokens: Sequence[int]) -> list[Any]:
    """The rows of tokens[1:]; the first token's must be empty."""
    if len(rows) != len(tokens) or rows[0]:
        got = f"{len(rows)} entries" if len(rows) != len(tokens) else "one that has log-probabilities"
        raise WrongReplyError(name, f"have {len(tokens)} entries, the first empty", got)
    return list(rows[1:])
