"""A served teacher beside the model itself: a tiny one behind every protocol, and recorded replies of a real vLLM."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_server import StandIn, TinyModel
from tiny_models import WORDS, far, word_tokenizer

from dft_kernels import Mixture, ServedTeacher, TopK, linear_distribution_loss
from dft_kernels.teachers.served_protocols import WrongReplyError
from dft_kernels.teachers.served_rows import ROUNDING, distributions

RECORDED = json.loads((Path(__file__).parent / "recorded" / "vllm.json").read_text())
KINDS = (("vllm", None), ("vllm", "vllm-tokens"), ("sglang", None), ("trl", None))


def replayed(path: str, body: Any) -> tuple[int, Any]:
    """The recorded server."""
    for one in RECORDED["exchanges"]:
        if one["path"] == path and one["body"] == body:
            return one["status"], one["reply"]
    return 500, {"error": {"message": f"not recorded: {path} {body}"}}


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    whole = [torch.tensor(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(one) for one in whole], batch_first=True, padding_side=side)
    return {"input_ids": pad(whole, batch_first=True, padding_side=side), "attention_mask": mask}


def tail_is_right(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within the rounding of 1 - sum."""
    return bool(((found.double().exp() - exact.double().exp()).abs() <= 2 * ROUNDING).all())


# ---- a real vLLM's replies


@pytest.mark.parametrize("side", ["right", "left"])
def test_recorded_replies_are_the_models_log_probabilities(side: str) -> None:
    """vLLM 0.32 in fp32, SmolLM2, beside transformers in fp32: row t is over token t + 1, wherever padding stands."""
    references = RECORDED["reference"]
    batch = padded([one["tokens"] for one in references], side)
    with StandIn(replayed) as server, ServedTeacher(server.url, 8) as teacher:
        assert teacher.about == ("smollm2", "vllm 0.32.0")
        top = teacher(batch)
        assert len(server.scored) == 3
    for row, one in enumerate(references):
        at = batch["attention_mask"][row].nonzero()[:-1, 0]
        assert top.tail_log_prob is not None
        order, wanted = (ids.sort(-1) for ids in (top.indices[row, at], torch.tensor(one["indices"])))
        assert torch.equal(order.values, wanted.values)
        found = top.log_probs[row, at].gather(-1, order.indices)
        torch.testing.assert_close(found, torch.tensor(one["log_probs"]).gather(-1, wanted.indices), rtol=0, atol=2e-4)
        assert tail_is_right(top.tail_log_prob[row, at], torch.tensor(one["tail"]))
        own = torch.tensor(one["tokens"][1:])
        assert bool((top.indices[row, at] == own[:, None]).any(-1).all())
    assert teacher.rows == sum(len(one["tokens"]) - 1 for one in references)


def test_the_token_in_interface_gives_the_same() -> None:
    ids = torch.tensor([RECORDED["reference"][-1]["tokens"]])
    with StandIn(replayed) as server:
        both = []
        for protocol in ("vllm", "vllm-tokens"):
            with ServedTeacher(server.url, 8, protocol=protocol) as teacher:
                both.append(teacher({"input_ids": ids}))
    assert torch.equal(both[0].indices, both[1].indices)
    assert torch.equal(both[0].log_probs, both[1].log_probs)


REFUSED = {
    "Requested prompt logprobs of 129, which is greater than max allowed: 128": (129, "smollm2", None),
    "model of http://.* must be one that it serves, got 'other' of 'smollm2'. Name one as model.": (8, "other", None),
    "Token id 49152 is out of vocabulary": (8, None, [49152, 1]),
    "This model's maximum context length is 1024 tokens": (8, None, [1] * 1100),
}


@pytest.mark.parametrize("said", list(REFUSED))
def test_a_real_servers_refusals_are_passed_on(said: str) -> None:
    k, model, ids = REFUSED[said]
    tokens = ids or RECORDED["reference"][1]["tokens"]
    with (
        StandIn(replayed) as server,
        ServedTeacher(server.url, k, model=model) as teacher,
        pytest.raises(ValueError, match=said) as error,
    ):
        teacher({"input_ids": torch.tensor([tokens])})
    if model != "other":
        assert f"POST {server.url}/v1/completions for {len(tokens)} tokens ({tokens[0]}, " in str(error.value)


class RecordedTokenizer:
    """SmolLM2's, on the recorded text alone."""

    all_special_tokens = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

    def __init__(self) -> None:
        (found,) = [one for one in RECORDED["exchanges"] if one["path"] == "/tokenize"]
        self.text, self.ids = found["body"]["prompt"], list(found["reply"]["tokens"])

    def __len__(self) -> int:
        return 49152

    def decode(self, ids: list[int]) -> str:
        return " "

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert (text, add_special_tokens) == (self.text, False)
        return {"input_ids": self.ids}


def test_the_recorded_tokenizer_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServedTeacher, "_score", lambda *_: None)
    same, other, shorter = RecordedTokenizer(), RecordedTokenizer(), RecordedTokenizer()
    other.ids[9] += 1
    shorter.ids.pop()
    with StandIn(replayed) as server, ServedTeacher(server.url, 8) as teacher:
        teacher.check(same)
        assert teacher.vocab_size == 49152
        with pytest.raises(
            ValueError, match=r"tokenizer of http://\S+ must be the student's, got id \d+ for \d+, .* at 9"
        ):
            teacher.check(other)
        with pytest.raises(ValueError, match="must be the student's, got 164 ids for 163"):
            teacher.check(shorter)


# ---- every protocol


def tokenizer() -> Any:
    return word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS])


PACK = {"input_ids": torch.randint(4, 94, (1, 13)), "position_ids": torch.tensor([[*range(6), *range(1), *range(6)]])}
BATCHES: dict[str, dict[str, torch.Tensor]] = {
    "right": padded([list(range(10, 21)), [5, 6], list(range(30, 37))], "right"),
    "left": padded([list(range(10, 21)), [5, 6], list(range(30, 37))], "left"),
    "pack": PACK,
    "bare": {"input_ids": torch.arange(20, 36).view(2, 8)},
}


@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize(("kind", "protocol"), KINDS)
@pytest.mark.filterwarnings("ignore:ServedTeacher.*has no tokenizer:RuntimeWarning")
def test_rows_are_those_of_the_model(kind: str, protocol: str | None, name: str) -> None:
    model, batch = far(), BATCHES[name]
    with torch.no_grad():
        log_p = model(**batch, use_cache=False).logits.log_softmax(-1)
    with StandIn(TinyModel(model, tokenizer(), kind)) as server, ServedTeacher(server.url, 7, protocol=protocol) as one:
        one.check(tokenizer(), 100)
        assert one.about.model == (None if kind == "trl" else "tiny")
        assert one.about.server.startswith("trl" if kind == "trl" else kind)
        top = one(batch)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
    begins = batch.get("position_ids", torch.ones_like(batch["input_ids"])) == 0
    real = mask[:, :-1] & mask[:, 1:] & ~begins[:, 1:]  # rows whose next token is their sequence's
    assert int(real.sum()) == one.rows
    assert top.tail_log_prob is not None
    label = (top.indices[:, :-1] == batch["input_ids"][:, 1:, None]).any(-1)
    assert bool(label[real].all())
    found, exact = top.log_probs[:, :-1][real], log_p.gather(-1, top.indices)[:, :-1][real]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    outside = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)[:, :-1][real]
    assert tail_is_right(top.tail_log_prob[:, :-1][real], outside)
    # the likeliest k, but for the last, which gives way to the label
    likeliest = log_p.topk(6).indices[:, :-1][real]
    assert bool((likeliest[:, :, None] == top.indices[:, :-1][real][:, None]).any(-1).all())


def test_the_loss_takes_it() -> None:
    """The bucket's KL of the model against itself is 0, and the loss's own checks find no fault, in padding either."""
    model, batch = far(), BATCHES["left"]
    ids = batch["input_ids"]
    own = ids.masked_fill(batch["attention_mask"] == 0, -100)
    labels = torch.nn.functional.pad(own[:, 1:], (0, 1), value=-100).masked_fill(batch["attention_mask"] == 0, -100)
    hidden, weight = model.model(**batch).last_hidden_state.detach(), model.lm_head.weight.detach()
    with StandIn(TinyModel(model)) as server, ServedTeacher(server.url, 7, tail="renormalise") as single:
        with ServedTeacher(server.url, 7) as teacher:
            for compact in (True, False):
                top = teacher(batch)
                loss = linear_distribution_loss(hidden, weight, labels, top, compact=compact)
                assert float(loss) < 1e-4
            for wrong in ({"labels": own}, {"shift_labels": labels.index_fill(1, torch.tensor(8), 5)}):
                with pytest.raises(ValueError, match=r"labels must be -100 for the first token .*, got 5 at \[1, 9\]"):
                    teacher({**batch, **wrong})
            teacher({**batch, "shift_labels": labels})
        mixed = Mixture([single(batch)], [1.0])
        assert math.isfinite(float(linear_distribution_loss(hidden, weight, labels, mixed)))


def test_what_begins_a_sequence_and_is_alone_is_not_asked_for() -> None:
    with StandIn(TinyModel(far())) as server, ServedTeacher(server.url, 3) as teacher:
        batch = padded([[7], [8, 9]], "right")
        top = teacher(batch)
        assert [body["prompt"] for body in server.scored] == [[8, 9]]
        assert bool(top.log_probs.isfinite().all())
        uniform = torch.tensor(0.25).log()
        assert torch.equal(top.log_probs[0], uniform.expand(2, 3))
        assert teacher.rows == 1


# ---- the tail


def scored(log_p: torch.Tensor, own: int, k: int) -> tuple[list[int], list[float]]:
    """What a server gives: k likeliest and the token's own."""
    ids = log_p.topk(k).indices.tolist()
    ids = ids if own in ids else [*ids, own]
    return ids, log_p[ids].tolist()


@pytest.mark.parametrize("own", [0, 5, 7, 39])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_the_tail_is_exact_where_it_keeps_digits(sharpness: float, own: int) -> None:
    log_p = (-sharpness * torch.arange(40.0, dtype=torch.float64)).log_softmax(-1)
    found = distributions([scored(log_p.float(), own, 6)], [1, own], 6, 40)
    kept = found.indices[0]
    exact = log_p.clone().index_fill_(0, kept, -torch.inf).logsumexp(-1).exp()
    assert own in kept.tolist()
    assert kept.unique().numel() == 6
    assert abs(float(found.tail[0].double().exp()) - float(exact)) <= 1.1 * ROUNDING
    assert found.flagged == int(exact < 10 * ROUNDING)
    if not found.flagged:
        assert abs(float(found.tail[0].double().exp() / exact) - 1) < 0.1
    total = found.log_probs.double().exp().sum() + found.tail.double().exp()[0]
    assert abs(float(total) - 1) < 1e-6


@pytest.mark.parametrize("excess", [0.0, 1e-5, 2e-4])
def test_a_tail_that_rounding_hides_is_small_and_flagged(excess: float) -> None:
    """Never 0, negative or NaN, also where the probabilities sum to more than 1."""
    values = [math.log(0.7 + excess), math.log(0.2), math.log(0.1)]
    found = distributions([([4, 2, 9], values)], [1, 2], 3, 10)
    assert found.flagged == 1
    assert float(found.tail[0]) == pytest.approx(math.log(ROUNDING), abs=1e-3)
    assert abs(float(found.log_probs.exp().sum() + found.tail.exp()) - 1) < 1e-6


def test_rows_of_any_number() -> None:
    """More than are worked on at a time."""
    log_p = torch.randn(700, 90, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    tokens = torch.randint(0, 90, (701,), generator=torch.Generator().manual_seed(4)).tolist()
    rows = [scored(one, own, 64) for one, own in zip(log_p, tokens[1:], strict=True)]
    found = distributions(rows, tokens, 64, 90)
    torch.testing.assert_close(found.log_probs, log_p.gather(1, found.indices), rtol=0, atol=1e-4)
    assert bool((found.indices == torch.tensor(tokens[1:])[:, None]).any(-1).all())
    rows[600] = ([*rows[600][0][:-1], 90], rows[600][1])
    with pytest.raises(WrongReplyError) as error:
        distributions(rows, tokens, 64, 90)
    assert error.value.where == "row 600"


# ---- ahead of training


def until(holds: Any) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_batches_are_asked_for_ahead_and_bounded() -> None:
    batches = [padded([[n, n + 1, n + 2], [n + 30, n + 31]], "right") for n in range(4, 12)]
    model = far()
    with StandIn(TinyModel(model)) as server, ServedTeacher(server.url, 5, prefetch=2, connections=3) as teacher:
        server.delay = 0.01
        for number, batch in enumerate(teacher.ahead(batches)):
            assert batch is batches[number]
            begun = min(number + 3, 8) * 2  # this one and two more
            until(lambda begun=begun: len(server.scored) == begun)
            top = teacher(batch)
            assert len(server.scored) == begun
            with torch.no_grad():
                log_p = model(batch["input_ids"][:1]).logits.log_softmax(-1)
            torch.testing.assert_close(
                top.log_probs[0, :-1], log_p.gather(-1, top.indices[:1])[0, :-1], rtol=0, atol=1e-4
            )
        assert server.most_busy <= 3
        assert len(server.scored) == 16
        teacher(batches[0])  # not kept
        assert len(server.scored) == 18


def test_what_will_not_be_asked_is_not_asked_for() -> None:
    batches = [{"input_ids": torch.tensor([[n, n + 1]])} for n in range(4, 10)]
    with StandIn(TinyModel(far())) as server, ServedTeacher(server.url, 5, prefetch=3) as teacher:
        ahead = teacher.ahead(batches, lambda number, batch: batch if number % 2 else None)
        assert [batch["input_ids"][0, 0].item() for batch in ahead] == list(range(4, 10))
        assert {body["prompt"][0] for body in server.scored} <= {5, 7, 9}
        ahead = teacher.ahead(iter(batches * 50))
        next(ahead)
        ahead.close()  # type: ignore[attr-defined]
        assert not teacher._pending
        teacher.close()
        for late in (lambda: teacher(batches[0]), lambda: teacher._client.ask("/v1/models")):
            with pytest.raises(ValueError, match=r"must be asked before close\(\), got a request after it"):
                late()


def test_the_same_sequence_twice_is_asked_for_once() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 7]])}
    with StandIn(TinyModel(far())) as server, ServedTeacher(server.url, 5, prefetch=1) as teacher:
        for each in teacher.ahead([batch, batch]):
            top = teacher(each)
            assert torch.equal(top.log_probs[0], top.log_probs[1])
        assert len(server.scored) == 1
    assert isinstance(top, TopK)
