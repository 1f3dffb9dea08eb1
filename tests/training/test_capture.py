"""A teacher run over texts, into a store, and training from it: as with the teacher itself."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, far

import dft_kernels
from dft_kernels.commands import main as cli
from dft_kernels.materials.records import Document, Faults
from dft_kernels.models.heads import head_of, hidden_states
from dft_kernels.store.reader import Store
from dft_kernels.testing import relative_error
from dft_kernels.training.capture import capture
from dft_kernels.training.examples import examples_of


def texts(count: int = 9) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, 90, (n,), generator=generator)) for n in lengths]


def sequences_of(texts: list[str], tokenizer: Any, length: int) -> list[torch.Tensor]:
    examples, _ = examples_of([Document("", text) for text in texts], tokenizer, length, Faults())
    return [example.ids for example in examples]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),  # a head with a bias
        ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    ],
)
def test_head_of(name: str, more: dict[str, Any]) -> None:
    model = far(name, **more)
    head, ids = head_of(model), torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        hidden = hidden_states(model, ids)
        teacher = dft_kernels.TeacherHead(hidden, head.weight, head.bias, head.logit_scale, head.softcap)
        loss = dft_kernels.distribution_loss(exact, teacher=teacher)
    assert float(loss) < 1e-9
    assert not model.training


def test_a_head_that_does_more_is_refused() -> None:
    model = far()
    forward = model.forward

    def shifted(*arguments: Any, **named: Any) -> Any:
        out = forward(*arguments, **named)
        out.logits = out.logits + torch.arange(100)
        return out

    model.forward = shifted
    with pytest.raises(ValueError, match="head_of: LlamaForCausalLM must have the logits that its hidden states"):
        head_of(model)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_the_store_is_the_live_teacher(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """The same loss and gradients, for a student trained from the store, as from the running teacher."""
    teacher = far().to(torch.bfloat16)
    sequences = sequences_of(texts(), tokenizer, 12)
    assert max(map(len, sequences)) == 12
    store = capture(teacher, tokenizer, sequences, tmp_path / "s", kind, k=100, batch_tokens=40, shard_rows=50)
    assert len(store.parts) > 2
    head, student = head_of(teacher), torch.randn(100, 8, requires_grad=True)
    for numbers in ([0, 5, 3], [len(store) - 1]):
        batch = store.batch(numbers)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = dft_kernels.shift_labels(batch["labels"])
        hidden = torch.randn(*ids.shape, 8, requires_grad=True)
        with torch.no_grad():
            live = dft_kernels.TeacherHead(hidden_states(teacher, ids, mask), head.weight)
        gradients = []
        for given in (live, store.teacher(batch)):
            loss = dft_kernels.linear_distribution_loss(hidden, student, labels, given)
            gradients.append([loss.detach(), *torch.autograd.grad(loss, (hidden, student))])
        for kept, true in zip(reversed(gradients[1]), reversed(gradients[0]), strict=True):
            # batches of other shapes round otherwise in bf16; log-probabilities are stored in bf16
            assert relative_error(kept, true) < 2e-2


def test_temperature_and_tail(tmp_path: Path, tokenizer: Any) -> None:
    teacher, sequences = far(), sequences_of(texts(), tokenizer, 64)
    store = capture(teacher, tokenizer, sequences, tmp_path / "s", "topk", k=7, temperature=2.5)
    item = store[3]
    with torch.no_grad():
        log_p = (teacher(input_ids=item["input_ids"][None]).logits[0] / 2.5).log_softmax(-1)
    torch.testing.assert_close(item["log_probs"].float(), log_p.gather(1, item["indices"]), rtol=1e-2, atol=1e-2)
    exact = log_p.scatter(1, item["indices"], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(item["tail"], exact, rtol=1e-3, atol=1e-3)
    assert store.teacher(store.batch([0])).temperature == 2.5  # type: ignore[union-attr]


def test_interrupted_it_goes_on(tmp_path: Path, tokenizer: Any) -> None:
    teacher, sequences = far(), sequences_of(texts(), tokenizer, 12)
    options: dict[str, Any] = {"kind": "topk", "k": 3, "batch_tokens": 30, "shard_rows": 30}
    whole = capture(teacher, tokenizer, sequences, tmp_path / "whole", **options)
    done = []

    def tick(tokens: int) -> None:
        done.append(tokens)
        if sum(done) > whole.rows // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(teacher, tokenizer, sequences, tmp_path / "part", **options, tick=tick)
    begun = len(Store(tmp_path / "part"))
    assert 0 < begun < len(sequences)
    ticks: list[int] = []
    capture(teacher, tokenizer, sequences, tmp_path / "part", **options, tick=ticks.append)
    assert ticks[0] == sum(map(len, sequences[:begun]))
    assert sum(ticks) == whole.rows
    assert (tmp_path / "part/manifest.json").read_text() == (tmp_path / "whole/manifest.json").read_text()

    with pytest.raises(ValueError, match=r"tokens must hold .* sequence 0 has"):
        capture(teacher, tokenizer, [ids.flip(0) for ids in sequences], tmp_path / "part", **options)
    with pytest.raises(ValueError, match="differ in length"):
        capture(teacher, tokenizer, [ids[:-1] for ids in sequences], tmp_path / "part", **options)
    with pytest.raises(ValueError, match="must hold the beginning of these 1 sequences"):
        capture(teacher, tokenizer, sequences[:1], tmp_path / "part", **options)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"manifest.json: model_sha256 must be"):
        capture(other, tokenizer, sequences, tmp_path / "part", **options)


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    capture(far(), tokenizer, sequences_of(texts(), tokenizer, 12), tmp_path / "s")
    Store(tmp_path / "s", tokenizer)
    tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"manifest.json: tokenizer_sha256 must be this tokenizer's"):
        Store(tmp_path / "s", tokenizer)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_a_padded_vocabulary_is_sliced_where_it_is_said(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    teacher, sequences = far(), sequences_of(texts(), tokenizer, 64)
    store = capture(teacher, tokenizer, sequences, tmp_path / "s", kind, k=80, vocab_size=94)
    batch = store.batch([2])
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"]).logits[..., :94]
        loss = dft_kernels.distribution_loss(logits.contiguous(), teacher=store.teacher(batch))
    assert float(loss) < 1e-3
    with pytest.raises(ValueError, match=r"vocab_size must lie in 1\.\.100"):
        capture(teacher, tokenizer, sequences, tmp_path / "t", kind, vocab_size=101)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.94"):
        capture(teacher, tokenizer, sequences, tmp_path / "t", "topk", k=95, vocab_size=94)
    assert not (tmp_path / "t").exists()


def command(folder: Path, tokenizer: Any) -> list[str]:
    """A capture of a model and a text that are written into a folder, but for --out."""
    far().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "a.txt").write_text(" ".join(texts()))
    line = ["capture", "--model", str(folder / "model"), "--text", str(folder / "a.txt"), "--max_length", "16"]
    return [*line, "--kind", "topk", "--k", "4", "--dtype", "float32", "--device", "cpu", "--out"]


def test_the_command_on_several_machines(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    line = command(tmp_path, tokenizer)
    more, folders = ["--shard-rows", "32"], [str(tmp_path / f"{index}") for index in range(3)]
    assert cli.main([*line, str(tmp_path / "whole"), *more]) == 0
    rows = len(Store(tmp_path / "whole"))
    found = 0
    for index, folder in enumerate(folders):
        assert cli.main([*line, folder, *more, "--shard", f"{index}/3"]) == 0
        said = re.search(rf"^shard {index}/3: (\d+) rows, \d+ tokens$", capsys.readouterr().out, re.M)
        assert said is not None
        found += int(said[1])
    assert found == rows
    assert cli.main(["store", "join", str(tmp_path / "joined"), *folders]) == 0
    joined, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("joined", "whole")
    )
    assert joined == whole
    assert cli.main([*line, str(tmp_path / "joined"), *more]) == 0
    assert "tokens/s" not in capsys.readouterr().out.splitlines()[-1]
    assert cli.main([*line, str(tmp_path / "new"), *more, "--shard", "0/99"]) == 1
    said = capsys.readouterr().err
    assert "--shard must have a file for each of its n parts, got 99 for " in said
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    out = tmp_path / "store"
    line = [*command(tmp_path, tokenizer), str(out)]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "topk: the 4 likeliest tokens" in said
    assert "tokens/s" in said
    assert len(Store(out)) > 3
    assert cli.main(line) == 0  # done
    assert "tokens/s" not in capsys.readouterr().out
    for wrong, reason in (
        (["--kind", "hidden"], "manifest.json: kind must be 'hidden' as in this capture"),
        (["--vocab-size", "101"], "--vocab-size must lie in 1..100"),
        (["--model", str(tmp_path / "none")], "--model must be a folder with config.json, got"),
    ):
        assert cli.main([*line, *wrong]) == 1
        assert reason in capsys.readouterr().err
