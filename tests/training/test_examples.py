"""Documents as sequences with labels: which tokens count, what is cut, packed, shown; and a training on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, far

from dft_kernels.commands import main as cli
from dft_kernels.materials.records import Document, Faults
from dft_kernels.models.heads import hidden_states
from dft_kernels.store.reader import Store
from dft_kernels.training.examples import Example, PackCollator, Packs, check_packing, examples_of, packed, shown

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
A, B, C = (
    {"role": role, "content": " ".join(WORDS[n : n + 2])} for n, role in ((0, "user"), (4, "assistant"), (8, "user"))
)
D = {"role": "assistant", "content": " ".join(WORDS[12:15])}


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["user", "assistant", "system"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def one(document: Document, tokenizer: Any, only: str | None = None, length: int = 64) -> tuple[list[str], list[str]]:
    """The tokens of its only example, and those that count."""
    (example,), _ = examples_of([document], tokenizer, length, Faults(), only)
    tokens = tokenizer.convert_ids_to_tokens(example.ids.tolist())
    return tokens, [token for token, counts in zip(tokens, example.counts.tolist(), strict=True) if counts]


def test_texts(tokenizer: Any) -> None:
    """An end-of-text token, pieces of at most the length, nothing of one token; the first is not predicted."""
    texts = [" ".join(WORDS[n : n + 5]) for n in range(300)[:85]]
    examples, tally = examples_of([Document("", text) for text in texts], tokenizer, 5, Faults())
    assert (len(examples), tally.cut, tally.empty) == (85, 0, 0)
    assert all(len(e.ids) == 5 and not e.counts[0] and e.counts[1:].all() for e in examples)
    (first, second), _ = examples_of([Document("", texts[0])], tokenizer, 3, Faults())
    assert torch.cat([first.ids, second.ids]).tolist() == [*tokenizer(texts[0])["input_ids"], tokenizer.eos_token_id]


def test_a_prompt_and_its_completion(tokenizer: Any) -> None:
    before, after = " ".join(WORDS[:3]), " " + " ".join(WORDS[3:5])
    document = Document("", after, before)
    assert one(document, tokenizer) == ([*WORDS[:5], "</s>"], [*WORDS[1:5], "</s>"])
    assert one(document, tokenizer, "completion") == ([*WORDS[:5], "</s>"], [*WORDS[3:5], "</s>"])


def test_conversations(chat: Any) -> None:
    said = ["user", *WORDS[0:2], "</s>", "assistant", *WORDS[4:6], "</s>"]
    more = ["user", *WORDS[8:10], "</s>", "assistant", *WORDS[12:15], "</s>"]
    whole = Document("", [A, B, C, D])
    assert one(whole, chat) == ([*said, *more], [*said[1:], *more])
    assert one(whole, chat, "assistant") == ([*said, *more], [*WORDS[4:6], "</s>", *WORDS[12:15], "</s>"])
    prompted = Document("", [D], [A, B, C])
    assert one(prompted, chat, "completion") == ([*said, *more], [*WORDS[12:15], "</s>"])
    assert one(prompted, chat, "assistant") == ([*said, *more], [*WORDS[12:15], "</s>"])
    (example,), _ = examples_of([whole], chat, 64, Faults(), "assistant")
    text = shown(example, chat)
    assert text.startswith("[user ")
    assert text.count("[") == text.count("]") == 2
    assert shown(example, chat, 10).startswith("[user  ... ")
    assert len(shown(example, chat, 2)) <= 24 + len(" ...")


def test_a_template_that_marks_what_the_assistant_writes(chat: Any) -> None:
    """Its own marks go before what can be told from its beginnings, which this one rewrites."""
    chat.chat_template = (
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }} </s> {% endgeneration %}{% else %}{{ m.content }} </s> {% endif %}{% endfor %}"
        "{{ 'word89' if messages | length < 4 }}"
    )
    whole = Document("", [A, B, C, D])
    assert one(whole, chat, "assistant")[1] == [*WORDS[4:6], "</s>", *WORDS[12:15], "</s>"]
    with pytest.raises(ValueError, match="must have a message of the assistant, for assistant_only, got none"):
        examples_of([Document("", [A])], chat, 64, Faults(), "assistant")
    with pytest.raises(ValueError, match="must have a template that adds to what it has shown, for completion_only"):
        examples_of([Document("", [D], [A, B, C])], chat, 64, Faults(), "completion")


def test_what_is_cut_and_what_is_left_out_is_said(chat: Any) -> None:
    faults = Faults(skip=True)
    documents = [
        Document("a, line 1", [A, B]),
        Document("a, line 2", [A, B, C, D]),  # 16 tokens
        Document("a, line 3", [C, A, D]),  # the assistant's come after the cut
        Document("a, line 4", [A]),
        Document("a, line 5", [A, {"role": "system", "content": "x"}, B]),
        Document("a, line 6", "a text"),
    ]
    examples, tally = examples_of(documents, chat, 8, faults, "assistant")
    assert [len(e.ids) for e in examples] == [8, 8]
    assert tally.said(examples, faults) == [
        "2 rows, 16 tokens, 6 of them count",
        "2 rows were too long: 14 tokens are left out",
        "1 rows are left out: none of their tokens counts",
        "1 records are left out: they must have a message of the assistant, for assistant_only",
        "1 records are left out: they must fit the chat template",
        "1 records are left out: they must have a part that counts under assistant_only",
    ]
    with pytest.raises(ValueError, match=r"a, line 5: a record must fit the chat template, got .*system comes first"):
        examples_of(documents[4:], chat, 8, Faults(), "assistant")
    chat.chat_template = None
    with pytest.raises(ValueError, match="must have a chat template for messages, got none"):
        examples_of(documents, chat, 8, Faults())


def test_packs_are_what_their_examples_are_alone() -> None:
    lengths = [9, 7, 12, 5, 6, 20, 3]
    rows = packed([Example(torch.zeros(n), torch.zeros(n)) for n in lengths], 20)
    assert sorted(n for row in rows for n in row) == list(range(7))
    assert all(sum(lengths[n] for n in row) <= 20 for row in rows)
    assert len(rows) == 4  # 62 tokens
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in lengths:
        counts = torch.rand(n, generator=generator) < 0.7
        counts[0] = False
        examples.append(Example(torch.randint(5, 95, (n,), generator=generator), counts))
    packs, model = Packs(examples, 20), far()
    batch = PackCollator(0)([packs[number] for number in range(len(packs))])
    with torch.no_grad():
        together = hidden_states(model, batch["input_ids"], None, position_ids=batch["position_ids"])
        for row, members in enumerate(packs.rows):
            at = 0
            for number in members:
                ids, counts = examples[number]
                alone = hidden_states(model, ids[None])[0]
                torch.testing.assert_close(together[row, at : at + len(ids)], alone, rtol=1e-4, atol=1e-5)
                labels = batch["labels"][row, at : at + len(ids)]
                assert torch.equal(labels, torch.where(counts, ids, -100))
                at += len(ids)
            assert (batch["labels"][row, at:] == -100).all()
    check_packing(model, packs[0])


def test_a_model_that_looks_across_a_pack_is_refused() -> None:
    packs = Packs([Example(torch.arange(5, 15), torch.ones(10, dtype=torch.bool))] * 2, 20)
    model = far("Mamba", state_size=4, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"packing must be of a model whose attention stays within .*MambaForCausalLM"):
        check_packing(model, packs[0])


# ---- the commands


@pytest.fixture
def folder(tmp_path: Path, chat: Any) -> Path:
    for name in ("student", "teacher"):
        far(vocab_size=104).save_pretrained(tmp_path / name)
        chat.save_pretrained(tmp_path / name)
    rows = []
    for n in range(40):
        words = [WORDS[(n + 3 * k) % 90] for k in range(12)]
        asked, answer = (
            {"role": "user", "content": " ".join(words[:4])},
            {"role": "assistant", "content": " ".join(words[4:])},
        )
        rows.append({"messages": [asked, answer]})
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def train(folder: Path, *more: str) -> int:
    return cli.main([
        "train", "--model", str(folder / "student"), "--output_dir", str(folder / "out"), "--max_length", "32",
        "--use_cpu", "--max_steps", "4", "--learning_rate", "3e-2", "--logging_steps", "2", "--held_out", "4", *more,
    ])  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--packing",)])
def test_training_on_conversations(more: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(folder / "chat.jsonl"), "--assistant_only"]
    if more:
        text += ["--held_out", "2", "--per_device_train_batch_size", "2"]
    assert train(folder, *text, "--teacher", str(folder / "teacher"), *more) == 0
    said = capsys.readouterr().out
    assert "40 rows, 640 tokens, 360 of them count" in said
    assert said.count("[user ") == 3
    assert ("packed into 20 rows of up to 32 tokens" in said) == bool(more)


def test_a_masked_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels come out of the store as they went in, and it trains."""
    store, text = folder / "store", ["--text", str(folder / "chat.jsonl")]
    capture = ["capture", "--model", str(folder / "teacher"), *text, "--out", str(store)]
    assert cli.main([*capture, "--assistant-only", "--limit", "30"]) == 0
    assert "30 rows, 480 tokens, 270 of them count" in capsys.readouterr().out
    assert cli.main(["store", "verify", str(store)]) == 0
    found = Store(store)
    batch = found.collate([found[number] for number in range(30)])
    assert int((batch["labels"] != -100).sum()) == 270
    assert "counts" not in batch
    assert train(folder, "--teacher", str(store)) == 0
    said = capsys.readouterr().out
    assert "30 rows, 480 tokens, of the store" in said
    assert "the first ones; what is in [brackets] is read and not learned:" in said
    assert "1. [user word0 word3 word6 word9 </s> assistant]word12 word15" in said
    assert cli.main(capture) == 1
    assert "masked must be False as in this capture, got True" in capsys.readouterr().err
    assert train(folder, "--teacher", str(store), "--assistant_only") == 2
    assert "assistant_only must come with texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--assistant_only", "--completion_only"), "completion_only must come without assistant_only"),
        (("--completion_only",), "must have a prompt and a completion for completion_only"),
        (("--limit", "0"), "limit must be at least 1"),
    ],
)
def test_mistakes(more: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "--text", str(folder / "chat.jsonl"), *more) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_bad_records_of_those_who_count_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "chat.jsonl").open("a") as file:
        file.write('\n{"story": "x"}\n')
    text, student, target = str(folder / "chat.jsonl"), str(folder / "student"), str(folder / "t.safetensors")
    why = "1 records are left out: they must have messages, prompt and completion, or text"
    for line in (
        ["target", "build", "--tokenizer", student, "--out", target],
        ["gap", student, "--target", target, "--count", "8", "--prompt", "2", "--length", "3"],
    ):
        assert cli.main([*line, "--text", text]) == 1
        assert "line 41: a record must have messages, prompt and completion, or text" in capsys.readouterr().err
        assert cli.main([*line, "--text", text, "--skip_bad"]) == 0
        assert why in capsys.readouterr().out
    build = ["target", "build", "--tokenizer", student, "--out", target, "--text", text]
    assert cli.main([*build, "--limit", "7"]) == 0  # passages before the bad one
    assert "40 words, 7 sentences" in capsys.readouterr().out


def test_why_nothing_is_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "none.jsonl").write_text('{"story": "x"}\n' * 3)
    why = "got %s; 3 records are left out: they must have messages, prompt and completion, or text. "
    assert train(folder, "--text", str(folder / "none.jsonl"), "--skip_bad") == 1
    assert why % 0 in capsys.readouterr().err
    line = ["capture", "--model", str(folder / "teacher"), "--out", str(folder / "store"), "--skip_bad"]
    assert cli.main([*line, "--text", str(folder / "none.jsonl")]) == 1
    assert why % "none" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert not (folder / "store").exists()


def test_sequences_longer_than_the_models_positions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far(vocab_size=104, max_position_embeddings=12).save_pretrained(folder / "student")
    assert train(folder, "--text", str(folder / "chat.jsonl")) == 1
    said = "max_length must be at most 12 tokens, the model's positions, got a sequence of 16. Lower it"
    assert said in capsys.readouterr().err
    line = ["capture", "--text", str(folder / "chat.jsonl"), "--out", str(folder / "store")]
    assert cli.main([*line, "--model", str(folder / "student")]) == 1
    said = "sequences must have at most 12 tokens, the model's positions, got a sequence of 16. Cut them"
    assert said in capsys.readouterr().err
    assert not (folder / "store").exists()
    assert cli.main([*line, "--model", str(folder / "teacher")]) == 0
    assert train(folder, "--teacher", str(folder / "store")) == 1
    said = "--teacher must hold sequences of at most 12 tokens, the model's positions, got a sequence of 16. Capture"
    assert said in capsys.readouterr().err
    assert train(folder, "--text", str(folder / "chat.jsonl"), "--model", str(folder / "teacher"), "--teacher",
                 str(folder / "student")) == 1  # fmt: skip
    assert "--teacher must take at most 12 tokens, the model's positions, got a sequence" in capsys.readouterr().err
    assert not (folder / "out").exists()
