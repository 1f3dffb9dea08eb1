"""examples/: each script trains a tiny model, and stays short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, far, tiny, word_tokenizer

import dft_kernels
from dft_kernels import linear_cross_entropy, shift_labels
from dft_kernels.models.heads import hidden_states

FOLDER = Path(dft_kernels.__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
pytestmark = pytest.mark.filterwarnings("ignore")


def script(name: str) -> Any:
    """A module of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The folder of a model of 100 tokens, as it is initialised."""
    return saved(tiny(vocab_size=100), tmp_path / "model")


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """The folder of one whose distributions are far from uniform, and from those of its every second layer."""
    model = far()
    with torch.no_grad():
        model.lm_head.weight *= 10
    return saved(model, tmp_path / "teacher")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Files of a few words that come again and again, of 8 to 23 words."""
    files = [tmp_path / f"{number}.txt" for number in range(16)]
    for number, file in enumerate(files):
        file.write_text(" ".join(WORDS[(number + 3 * k * k) % 7] for k in range(8 + number)))
    return [str(file) for file in files]


def falls(losses: list[float]) -> bool:
    """The last loss lies well below the first."""
    return losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name: str) -> None:
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert len(lines) < 80
    assert f"    python examples/{name}.py" in "\n".join(lines)


@pytest.mark.parametrize("name", NAMES)
def test_its_flags_have_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    with pytest.raises(SystemExit) as ended:
        script(name).main(["--help"])
    assert not ended.value.code
    assert "--text" in capsys.readouterr().out


def test_plain_loop(model: str, texts: list[str]) -> None:
    flags = ["--length", "16", "--steps", "8", "--learning-rate", "0.02"]
    losses = script("plain_loop").main(["--model", model, "--text", *texts, *flags])
    assert len(losses) == 8
    assert falls(losses)


def test_accelerate_loop(model: str, texts: list[str]) -> None:
    """Four batches of two sequences, of different lengths, are the steps of one batch of eight."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # another test's mixed precision would be this one's
    main, flags = script("accelerate_loop").main, ["--steps", "5", "--learning-rate", "0.02"]
    losses = []
    for batch, accumulate in ((2, 4), (8, 1)):
        torch.manual_seed(3)  # the same order
        shape = ["--batch", str(batch), "--accumulate", str(accumulate)]
        losses.append(main(["--model", model, "--text", *texts, *flags, *shape]))
    assert falls(losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_torchtitan_loss(model: str, texts: list[str]) -> None:
    """The loss is F.cross_entropy's sum, of flat and of batched rows, over the count. torchtitan is not there."""
    module = script("torchtitan_loss")
    causal, ids = far(), torch.randint(4, 94, (2, 9))
    labels, hidden = shift_labels(ids), hidden_states(causal, ids)
    loss_fn = module.FusedLoss()
    loss_fn.set_lm_head(causal.lm_head)
    whole = torch.nn.functional.cross_entropy(causal.lm_head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    for pred, expected in ((hidden, labels), (hidden.flatten(0, 1), labels.flatten())):
        torch.testing.assert_close(loss_fn(pred, expected), (whole, {}), rtol=1e-5, atol=1e-4)
        found = loss_fn(pred, expected, torch.tensor(16), positions=None)
        torch.testing.assert_close(found, (whole / 16, {}), rtol=1e-5, atol=1e-4)
    flags = ["--length", "8", "--steps", "6", "--learning-rate", "0.02"]
    assert falls(module.main(["--model", model, "--text", *texts, *flags]))


def test_lightning_module(model: str, texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = script("lightning_module")
    flags = ["--length", "12", "--steps", "8", "--learning-rate", "0.02"]
    assert falls(list(module.main(["--model", model, "--text", *texts, *flags])))
    causal, ids = far(), torch.randint(4, 94, (2, 9))
    loss = module.LanguageModel(causal, 0.1).loss(ids)
    expected = linear_cross_entropy(hidden_states(causal, ids), causal.lm_head.weight, shift_labels(ids))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))


def test_trl_sft(teacher: str, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    flags = ["--out", str(tmp_path / "out"), "--steps", "5", "--learning-rate", "0.02"]
    assert falls(script("trl_sft").main(["--teacher", teacher, "--text", *texts, *flags]))


def test_trl_grpo(model: str, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import transformers

    module = script("trl_grpo")
    assert module.reward(["a bc", "", "abcd"]) == [-1.5, 0.0, -4.0]
    flags = ["--out", str(tmp_path / "out"), "--steps", "2", "--completion", "6", "--learning-rate", "0.02"]
    trainer = module.main(["--model", model, "--text", *texts, *flags])
    assert len([line for line in trainer.state.log_history if "reward" in line]) == 2
    before = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = trainer.model.state_dict()
    assert any(float((after[name].cpu() - before[name]).abs().max()) > 1e-3 for name in before)


def test_distil_from_store(teacher: str, texts: list[str], tmp_path: Path) -> None:
    """Run again it takes the store that is there."""
    flags = ["--length", "8", "--k", "20", "--epochs", "3", "--learning-rate", "0.02"]
    store, main = tmp_path / "store", script("distil_from_store").main
    losses = main(["--teacher", teacher, "--text", *texts, "--store", str(store), *flags])
    assert falls(losses)
    written = {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")}
    main(["--teacher", teacher, "--text", *texts, "--store", str(store), *flags])
    assert written == {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")}
