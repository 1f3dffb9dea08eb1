"""A server that misbehaves: what passes is tried again, all else is one clear error, and the key is told to no one."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_server import StandIn, TinyModel, changed, cut, drop
from tiny_models import far

from dft_kernels import ServedTeacher
from dft_kernels.teachers import served_client
from dft_kernels.teachers.served_client import KEY

TOKENS = [5, 6, 7, 8, 9, 10]
BATCH = {"input_ids": torch.tensor([TOKENS])}
SECRET = "sk-hush-0123456789"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds between tries, and no key of the machine's own."""
    monkeypatch.setattr(served_client, "BACKOFF", (0.001, 0.01))
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn(TinyModel(far())) as one:
        yield one


def dropped(handler: Any, reply: Any) -> None:
    """No answer at all."""
    drop(handler.connection)
    handler.close_connection = True


def packed(handler: Any, reply: Any) -> None:
    """A reply that says it is compressed, and is not."""
    handler.send(200, b"plain", {"Content-Encoding": "gzip"})


PASSING = {
    "429": [(429, {})],
    "429 with a time": [(429, {"Retry-After": "0"})],
    "408": [(408, {})],
    "500, 502, 503": [(500, {}), (502, {}), (503, {})],
    "cut off": [cut, cut],
    "no answer": [dropped],
    "not what it says": [packed],
    "all": [(503, {}), cut, dropped, (429, {})],
}


@pytest.mark.parametrize("name", list(PASSING))
def test_what_passes_is_tried_again(name: str, server: StandIn) -> None:
    with ServedTeacher(server.url, 4) as teacher:
        whole = teacher(BATCH)
        server.faults = list(PASSING[name])
        again = teacher(BATCH)
        assert not server.faults
        assert len(server.scored) == 2 + len(PASSING[name])
    assert torch.equal(whole.log_probs, again.log_probs)


def of_rows(change: Callable[[list[Any]], Any]) -> Callable[[Any, Any], None]:
    """The rows of a reply, changed: in place, or another list in their place."""

    def rows(reply: Any) -> None:
        choice = reply["choices"][0]
        other = change(choice["prompt_logprobs"])
        choice["prompt_logprobs"] = choice["prompt_logprobs"] if other is None else other

    return changed(rows)


def value(row: int, what: Any) -> Callable[[Any, Any], None]:
    """Another log-probability of a row's first token."""

    def change(rows: list[Any]) -> None:
        next(iter(rows[row].values()))["logprob"] = what

    return of_rows(change)


def renamed(row: int, name: str) -> Callable[[Any, Any], None]:
    """Another id in place of the row's last."""

    def change(rows: list[Any]) -> None:
        rows[row][name] = rows[row].pop(list(rows[row])[-1])

    return of_rows(change)


def of_reply(**fields: Any) -> Callable[[Any, Any], None]:
    return changed(lambda reply: {**reply, **fields})


def of_choice(**fields: Any) -> Callable[[Any, Any], None]:
    return changed(lambda reply: {**reply, "choices": [{**reply["choices"][0], **fields}]})


def others(handler: Any, reply: Any) -> None:
    """The reply to another request."""
    handler.send(200, handler.owner.answer(handler.path, {"model": "tiny", "prompt": [9, 8, 7, 6, 5, 4],
                                                          "prompt_logprobs": 4})[1])  # fmt: skip


def unsaid(handler: Any, reply: Any) -> None:
    """The same by a server that does not repeat the tokens."""
    wrong = handler.owner.answer(handler.path, {"model": "tiny", "prompt": [5, 6, 9, 8, 7, 10], "prompt_logprobs": 4})
    del wrong[1]["choices"][0]["prompt_token_ids"]
    handler.send(200, wrong[1])


REFUSED: dict[str, tuple[Any, str]] = {
    "NaN": (value(3, float("nan")), "row 2 of the reply .* must hold finite log-probabilities of at most 0, got nan"),
    "infinite": (value(1, float("-inf")), "row 0 of the reply .* must hold finite log-probabilities .*, got -inf"),
    "logits": (value(1, 4.5), "row 0 of the reply .* must hold finite log-probabilities of at most 0, got 4.5"),
    "null": (value(4, None), "row 3 of the reply .* must hold ids and numbers, got None"),
    "text": (value(4, "-1"), "row 3 of the reply .* must hold ids and numbers, got '-1'"),
    "no distribution": (value(2, -1e-4), "row 1 of the reply .* must sum to at most 1 in probability, got 1.0757"),
    "wrong order": (of_rows(lambda rows: [rows[0], *rows[:0:-1]]), "row 0 of the reply .* must hold the row's own token"),
    "shifted": (of_rows(lambda rows: [None, *rows[2:], rows[1]]), "row 0 of the reply .* must hold the row's own token"),
    "other tokens": (others, r"token 0 of the reply .* must be 5, as asked, got 9"),
    "other tokens, unsaid": (unsaid, r"row 1 of the reply .* must hold the row's own token, .* got others than 7"),
    "fewer tokens": (of_choice(prompt_token_ids=[5, 6]), "tokens of the reply .* must be the 6 of the request, got 2"),
    "too few rows": (of_rows(lambda rows: rows[:-1]), "prompt_logprobs of the reply .* must have 6 entries, .* got 5"),
    "a first row": (of_rows(lambda rows: [rows[1], *rows[1:]]), "prompt_logprobs of the reply .* the first empty, got one"),
    "too few likeliest": (of_rows(lambda rows: [None, *({"5": {"logprob": -1.0}} for _ in rows[1:])]),
                          "row 0 of the reply .* must hold the 4 likeliest tokens and its own, got 1 ids"),
    "outside": (renamed(2, "100"), r"row 1 of the reply .* must hold ids of at least 0 and below 100 \(vocab_size\), got 100"),
    "negative": (renamed(2, "-1"), "row 1 of the reply .* must hold ids of at least 0 .*, got -1"),
    "no id": (renamed(2, "many"), "all of the reply .* must be what vllm answers, got ValueError: invalid literal for int"),
    "huge id": (renamed(2, "9" * 30), "row 1 of the reply .* must hold ids and numbers, got 9999"),
    "wrong model": (of_reply(model="another"), "model of the reply .* must be 'tiny', got 'another'"),
    "no choices": (of_reply(choices=[]), "choices of the reply .* must be 1, got 0"),
    "two choices": (changed(lambda r: {**r, "choices": r["choices"] * 2}), "choices of the reply .* must be 1, got 2"),
    "no rows": (of_choice(prompt_logprobs=None), "all of the reply .* must be what vllm answers, got TypeError"),
    "a list": (changed(lambda reply: [reply]), "all of the reply .* must be what vllm answers, got TypeError"),
    "garbage": (changed(lambda _: b"\xff\xfe<html>" + b"x" * 99), "POST .* must be answered by JSON, got .*: .*<html>xxx"),
    "10 MB": (changed(lambda _: b"\x00garbage" * (10 << 20)), "POST .* must be answered in 1,05.,... bytes at most, got more"),
    "nested": (changed(lambda _: b"[" * 200_000), "POST .* must be answered by JSON, got .*"),
    "redirect": ((307, {"Location": "/elsewhere"}), "POST .* must be answered by this host, got 307, a redirect"),
    "401": ((401, {}), "POST .* must have the server's leave, got 401 for no key. Give api_key, or set DFT_KERNELS_API_KEY"),
    "400": ((400, {}), r"POST .* must be answered by 200, got 400 \(\{.*later.*\}\)"),
    "404": ((404, {}), "POST .* must be answered by 200, got 404"),
    "202": ((202, {}), "POST .* must be answered by 200, got 202"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_wrong_is_refused_at_once(name: str, server: StandIn) -> None:
    fault, said = REFUSED[name]
    with ServedTeacher(server.url, 4, vocab_size=100) as teacher:
        server.faults = [fault]
        with pytest.raises(ValueError, match=f"^ServedTeacher: {said}") as error:
            teacher(BATCH)
        assert "for 6 tokens (5, 6, 7, 8, ...)" in str(error.value)
        assert len(server.scored) == 1
        assert len(str(error.value)) < 600
        assert teacher.rows == 0
        teacher(BATCH)  # and the next request is answered


@pytest.mark.parametrize("kind", ["sglang", "trl"])
def test_other_protocols_are_checked_too(kind: str) -> None:
    with StandIn(TinyModel(far(), kind=kind)) as server, ServedTeacher(server.url, 4) as teacher:
        teacher(BATCH)

        def wrong(reply: Any) -> None:
            if kind == "sglang":
                reply["meta_info"]["input_token_logprobs"][3][1] = 77
            else:
                reply["logprobs"][0].pop()

        said = {"sglang": "token 3 of the reply .* must be 8, as asked, got 77",
                "trl": r"rows of the reply .* must be \(5, 5\), got \(5, 4\)"}[kind]  # fmt: skip
        server.faults = [changed(wrong), of_reply(meta_info={}, logprobs=None)]
        with pytest.raises(ValueError, match=said):
            teacher(BATCH)
        with pytest.raises(ValueError, match=f"must be what {kind} answers"):
            teacher(BATCH)


# ---- the deadline


def test_a_slow_server_is_given_up_at_the_deadline(server: StandIn) -> None:
    with ServedTeacher(server.url, 4, deadline=0.4) as teacher:
        assert teacher.about.model == "tiny"
        server.faults = [lambda handler, reply: time.sleep(0.6)]
        said = r"POST http://\S+ for 6 tokens \(5, 6, 7, 8, ...\) must be answered within 0.4 s, got ReadTimeout"
        with pytest.raises(ConnectionError, match=said):
            teacher(BATCH)
        server.faults = []
        teacher(BATCH)


def test_a_reply_that_drips_ends_at_the_deadline(server: StandIn) -> None:
    def drip(handler: Any, reply: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.01)

    with ServedTeacher(server.url, 4, deadline=0.3) as teacher:
        teacher(BATCH)
        server.faults = [drip]
        said = r"must be answered within 0\.3 s.*start the server, or raise deadline"
        with pytest.raises(ConnectionError, match=said):
            teacher(BATCH)


def test_one_that_is_not_there_is_named(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not waited for as long as one that was."""
    server.kill()
    monkeypatch.setattr(served_client, "FIRST", 0.1)
    with ServedTeacher(server.url, 4) as teacher:
        said = r"GET http://127.0.0.1:\d+/v1/models for its models must be answered within 0.1 s, got ConnectError"
        with pytest.raises(ConnectionError, match=said) as error:
            teacher(BATCH)
        assert "Check the address, and that the server is up" in str(error.value)


def test_a_server_that_comes_back_goes_on(server: StandIn) -> None:
    with ServedTeacher(server.url, 4) as teacher:
        whole = teacher(BATCH)

        def dies(handler: Any, reply: Any) -> None:
            def again() -> None:
                server.kill()
                time.sleep(0.05)
                server.start()

            threading.Thread(target=again).start()
            time.sleep(0.02)
            dropped(handler, reply)

        server.faults = [dies]
        assert torch.equal(teacher(BATCH).log_probs, whole.log_probs)


def test_a_request_that_failed_ahead_is_asked_again(server: StandIn) -> None:
    with ServedTeacher(server.url, 4) as teacher:
        server.faults = [(400, {})]
        for batch in teacher.ahead([BATCH]):
            with pytest.raises(ValueError, match="got 400"):
                teacher(batch)
            assert teacher(batch).log_probs.shape == (1, 6, 4)


# ---- the key


def everywhere(caplog: pytest.LogCaptureFixture, *objects: object) -> str:
    """All that was logged, by any library, and what objects look like."""
    logged = [f"{one.getMessage()} {one.__dict__}" for one in caplog.records]
    return "\n".join([*logged, *(f"{one} {one!r}" for one in objects)])


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_the_key_is_sent_and_told_to_no_one(
    given: str, server: StandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    if given == "environment":
        monkeypatch.setenv(KEY, SECRET)
    echo = {"error": {"message": f"the key {SECRET} is not known"}}
    with ServedTeacher(server.url, 4, api_key=SECRET if given == "argument" else None) as teacher:
        teacher(BATCH)
        sent = [headers["Authorization"] for _, _, headers in server.requests]
        assert sent == [f"Bearer {SECRET}"] * len(server.requests)
        errors = []
        for fault in (
            (401, {}),
            (400, {"X-Key": SECRET}),
            lambda h, _: h.send(400, echo),
            lambda h, _: h.send(200, f"garbage {SECRET}".encode()),
            (307, {"Location": f"/?{SECRET}"}),
        ):
            server.faults = [fault]
            with pytest.raises(ValueError, match="ServedTeacher") as error:
                teacher(BATCH)
            errors += [error.value, error.value.__cause__, error.value.__context__]
        assert "the key *** is not known" in str(errors[6])
        seen = everywhere(caplog, teacher, teacher._client, teacher._client._http.headers, teacher.about, *errors)
    assert "127.0.0.1" in seen
    assert SECRET not in re.sub(r"\(b'(location|x-key)', b'[^']*'\)", "", seen.lower())  # the server's own words


def test_a_redirect_does_not_take_the_key_elsewhere(server: StandIn) -> None:
    with StandIn(TinyModel(far())) as other, ServedTeacher(server.url, 4, api_key=SECRET) as teacher:
        teacher(BATCH)
        server.faults = [(307, {"Location": f"{other.url}/v1/completions"})]
        with pytest.raises(ValueError, match=r"got 307, a redirect\. Give the address that it leads to"):
            teacher(BATCH)
        assert not other.requests


def test_the_key_of_a_plain_address_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="the API key goes to http://teacher.invalid unencrypted. Use https."):
        ServedTeacher("http://teacher.invalid", api_key=SECRET).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ServedTeacher("https://teacher.invalid", api_key=SECRET).close()
        ServedTeacher("http://teacher.invalid").close()


def test_a_certificate_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no authority has signed is refused at once, without the key, unless SSL_CERT_FILE says that it is one."""
    certificate = Path(__file__).parent / "recorded" / "loopback.pem"  # of 127.0.0.1, by itself
    with StandIn(TinyModel(far()), certificate) as server:
        with ServedTeacher(server.url, 4, api_key=SECRET) as teacher:
            with pytest.raises(
                ValueError, match=r"GET https://\S+ .* must have a certificate that verifies, got .*self"
            ):
                teacher(BATCH)
            assert not server.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with ServedTeacher(server.url, 4, api_key=SECRET) as teacher:
            assert teacher(BATCH).log_probs.shape == (1, 6, 4)


# ---- arguments


WRONG: dict[str, dict[str, Any]] = {
    "url must be http://HOST[:PORT] or https://HOST[:PORT], got 'host:8000'": {"url": "host:8000"},
    "url must be http://HOST[:PORT] or https://HOST[:PORT], got 'ftp://host'": {"url": "ftp://host"},
    "url must be http://HOST[:PORT] or https://HOST[:PORT], got 'http://host:99999'": {"url": "http://host:99999"},
    "url must hold no user, query or fragment, got one with a user. Give the key": {"url": f"http://me:{SECRET}@host"},
    "url must hold no user, query or fragment, got one with a query": {"url": f"http://host?key={SECRET}"},
    "top_k must be an int of at least 1, got 0": {"top_k": 0},
    "prefetch must be an int of at least 0, got -1": {"prefetch": -1},
    "connections must be an int of at least 1, got 1.5": {"connections": 1.5},
    "deadline must be a number of seconds above 0, got 0": {"deadline": 0},
    "protocol must be one of None, vllm, vllm-tokens, sglang, trl, got 'http'": {"protocol": "http"},
    "tail must be one of bucket, renormalise, ignore, got 'none'": {"tail": "none"},
    "api_key must be printable ASCII, got another text": {"api_key": f"{SECRET}\n"},
}


@pytest.mark.parametrize("said", list(WRONG))
def test_wrong_arguments(said: str) -> None:
    with pytest.raises(ValueError, match=f"^ServedTeacher: {re.escape(said)}") as error:
        ServedTeacher(**{"url": "http://host", **WRONG[said]})
    assert SECRET not in str(error.value)


def test_wrong_batches(server: StandIn) -> None:
    with ServedTeacher(server.url, 4) as teacher:
        for batch, said in (
            ({"input_ids": torch.tensor(TOKENS)}, r"input_ids must have shape \[B, T\], got \[6\]"),
            ({**BATCH, "attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask must have the shape of input_ids"),
            ({**BATCH, "position_ids": torch.arange(5)[None]}, "position_ids must have the shape of input_ids"),
        ):
            with pytest.raises(ValueError, match=said):
                teacher(batch)
        assert not server.requests


def test_another_server_is_named() -> None:
    for answer, said in (
        (lambda path, body: (200, {"hello": "there"}), "url must be of vLLM, SGLang or trl vllm-serve, got neither"),
        (TinyModel(far(), kind="sglang"), r"model of http://\S+ must be the one that it serves, got 'other' of 'tiny'"),
    ):
        with (
            StandIn(answer) as server,
            ServedTeacher(server.url, 4, model="other") as teacher,
            pytest.raises(ValueError, match=said),
        ):
            teacher(BATCH)


def test_without_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ValueError, match=r"httpx must be installed, got none. Run pip install 'dft-kernels\[served\]'"):
        ServedTeacher("http://host")


def test_a_model_without_a_tokenizer_is_warned_of(server: StandIn) -> None:
    with ServedTeacher(server.url, 4) as teacher:
        with pytest.warns(RuntimeWarning, match=r"no tokenizer is there to compare with http://\S+'s"):
            teacher.check(None, 100)
        teacher.check(None, 100)  # said once
        assert (teacher.vocab_size, len(server.scored)) == (100, 1)
