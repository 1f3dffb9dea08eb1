"""`capture --served` and `train --teacher URL`: a store and a run of what a server answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stand_in_server import StandIn, TinyModel
from tiny_models import SMALL, WORDS, far, word_tokenizer

from dft_kernels import ServedTeacher, capture
from dft_kernels.commands import main as cli
from dft_kernels.store.reader import Store
from dft_kernels.teachers import served_client
from dft_kernels.teachers.served_client import KEY

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
SECRET = "sk-hush-0123456789"
SEQUENCES = [torch.randint(4, 94, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5, 12, 7, 8, 6)]


def tokenizer() -> Any:
    return word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS])


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_client, "BACKOFF", (0.001, 0.01))
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn(TinyModel(far(), tokenizer())) as one:
        yield one


def served(server: StandIn, k: int = 6, **more: Any) -> ServedTeacher:
    return ServedTeacher(server.url, k, vocab_size=100, **more)


def test_a_store_of_it_is_that_of_the_model(server: StandIn, tmp_path: Path) -> None:
    counts = [torch.arange(len(one)) > 2 for one in SEQUENCES]
    options: dict[str, Any] = {"counts": counts, "batch_tokens": 20, "shard_rows": 20}
    with served(server, api_key=SECRET) as teacher:
        store = capture(teacher, tokenizer(), SEQUENCES, tmp_path / "served", "topk", **options)
        assert len(server.scored) == 1 + len(SEQUENCES)
    held = store.contents
    assert (held.model, held.server, held.model_sha256) == ("tiny", "vllm 0.0", None)
    assert (held.width, held.vocab_size, held.masked) == (6, 100, True)
    assert SECRET not in (tmp_path / "served/manifest.json").read_text()
    store = Store(tmp_path / "served", tokenizer())
    store.check_values()
    live = capture(far(), tokenizer(), SEQUENCES, tmp_path / "live", "topk", k=6, **options)
    for number, ids in enumerate(SEQUENCES):
        one, other = store[number], live[number]
        assert torch.equal(one["input_ids"], ids)
        assert torch.equal(one["counts"], other["counts"])
        with torch.no_grad():
            log_p = far()(input_ids=ids[None]).logits[0].log_softmax(-1)
        exact = log_p.gather(-1, one["indices"])[:-1]
        torch.testing.assert_close(one["log_probs"][:-1].float(), exact, rtol=1e-2, atol=1e-2)  # bf16
        same = one["indices"][:-1, :5] == other["indices"][:-1, :5]
        assert bool(same.all())  # the sixth may be the label
    batch = store.batch([0, 2])
    assert store.teacher(batch).temperature == 1.0  # type: ignore[union-attr]


def test_interrupted_it_goes_on(server: StandIn, tmp_path: Path) -> None:
    done: list[int] = []

    def tick(tokens: int) -> None:
        done.append(tokens)
        if len(done) == 4:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"batch_tokens": 12, "shard_rows": 10}
    with served(server) as teacher:
        with pytest.raises(KeyboardInterrupt):
            capture(teacher, tokenizer(), SEQUENCES, tmp_path / "part", "topk", **options, tick=tick)
        begun = len(Store(tmp_path / "part"))
        assert 0 < begun < len(SEQUENCES)
        for name in ("part", "whole"):
            capture(teacher, tokenizer(), SEQUENCES, tmp_path / name, "topk", **options)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("part", "whole"))
    assert one == other
    newer = TinyModel(far(), tokenizer())
    with (
        StandIn(lambda path, body: (200, {"version": "0.1"}) if path == "/version" else newer(path, body)) as later,
        served(later) as teacher,
        pytest.raises(ValueError, match=r"manifest.json: server must be 'vllm 0.1' as in this capture, got 'vllm 0.0'"),
    ):
        capture(teacher, tokenizer(), SEQUENCES, tmp_path / "part", "topk", **options)


def test_what_a_server_cannot_give_is_refused(server: StandIn, tmp_path: Path) -> None:
    for more, given, said in (
        ({}, {"kind": "hidden"}, "kind must be 'topk' of a served teacher, which gives no hidden states, got 'hidden'"),
        ({}, {"kind": "topk", "temperature": 2.0}, r"temperature must be 1.0, the servers' own, got 2.0"),
        ({"tail": "ignore"}, {"kind": "topk"}, "tail must be 'bucket' of what is stored, got 'ignore'"),
    ):
        with served(server, **more) as teacher, pytest.raises(ValueError, match=said):
            capture(teacher, tokenizer(), SEQUENCES, tmp_path / "s", **given)
    other = word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *reversed(WORDS)])
    with served(server) as teacher, pytest.raises(ValueError, match="must be the student's"):
        capture(teacher, other, SEQUENCES, tmp_path / "s", "topk")
    assert not (tmp_path / "s").exists()


def test_a_store_of_before_is_read(tmp_path: Path) -> None:
    capture(far(), tokenizer(), SEQUENCES, tmp_path / "s", "topk", k=6)
    manifest = tmp_path / "s/manifest.json"
    whole = json.loads(manifest.read_text())
    assert whole.pop("server") is None
    manifest.write_text(json.dumps(whole))
    assert Store(tmp_path / "s").contents.server is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two tokens more than the tokenizer, and a text."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text(" ".join(WORDS[(7 * n + n * n) % 90] for n in range(200)))
    return tmp_path


def test_the_commands(server: StandIn, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store by `capture --served`, and a run by `train --teacher URL`; the key of the environment is in no file."""
    monkeypatch.setenv(KEY, SECRET)
    text, model = str(folder / "a.txt"), str(folder / "model")
    line = ["capture", "--model", model, "--served", server.url, "--text", text, "--out", str(folder / "store")]
    assert cli.main([*line, "--length", "16", "--k", "6", "--vocab-size", "100"]) == 0
    said = capsys.readouterr().out
    assert "topk: the 6 likeliest tokens" in said
    assert "tiny, served by vllm 0.0" in said
    assert {headers.get("Authorization") for _, _, headers in server.requests} == {f"Bearer {SECRET}"}
    train = [
        "train",
        "--model",
        model,
        "--use_cpu",
        "--max_steps",
        "2",
        "--held_out",
        "2",
        "--per_device_train_batch_size",
    ]
    train += ["2", "--logging_steps", "1", "--learning_rate", "1e-3", "--output_dir"]
    assert cli.main([*train, str(folder / "from-store"), "--teacher", str(folder / "store")]) == 0
    run = ["--teacher", server.url, "--served_k", "6", "--text", text, "--length", "16"]
    assert cli.main([*train, str(folder / "from-server"), *run]) == 0
    said = capsys.readouterr().out
    assert "KL(teacher || model)" in said
    for name, about in (("from-store", "served by `vllm 0.0`"), ("from-server", "`tiny` served by `vllm 0.0`, top 6")):
        assert about in (folder / name / "README.md").read_text()
    for path in folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in said


def test_what_is_wrong_is_said_before_anything_is_written(server: StandIn, folder: Path, capsys: Any) -> None:
    text, model = str(folder / "a.txt"), str(folder / "model")
    train = ["train", "--model", model, "--text", text, "--use_cpu", "--held_out", "2", "--length", "16"]
    train += ["--output_dir", str(folder / "new"), "--teacher"]
    grab = ["capture", "--model", model, "--text", text, "--out", str(folder / "new"), "--served", server.url]
    other = word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *reversed(WORDS)])
    with StandIn(TinyModel(far(), other)) as another, warnings.catch_warnings():
        for line, said in (
            ([*train, server.url, "--served_model", "big"], "--teacher: model of http://"),
            ([*train, another.url], "--teacher: the tokenizer of http://"),
            ([*train, server.url, "--served_k", "129"], "greater than max allowed: 128"),
            ([*train, server.url, "--temperature", "2"], "teacher_temperature must be 1.0"),
            ([*train, model, "--served_model", "x"], "--served_model must come with a server's address as teacher"),
            ([*grab, "--kind", "hidden"], "--kind must be 'topk' of a served teacher"),
            ([*grab, "--served-model", "big"], "must be one that it serves, got 'big' of 'tiny'"),
            ([*grab, "--k", "129"], "greater than max allowed: 128"),
        ):
            assert cli.main(line) in (1, 2), line
            err = capsys.readouterr().err
            assert said in err, (line, err)
            assert err.count("\n") == 1, err
    assert not (folder / "new").exists()
