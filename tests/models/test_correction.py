"""`CorrectionHead`: trained alone through the low-rank path, and kept in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IDS, tiny
from walk_models import gradients

from dft_kernels.models.correction import add_correction, load_correction, remove_correction, save_correction
from dft_kernels.training.attach import attach
from dft_kernels.training.trainer import DFTConfig, DFTTrainer


def corrected(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(kind).to(dtype)
    correction = add_correction(model, rank=3, bias=True)
    with torch.no_grad():
        for parameter in (correction.up.weight, correction.up.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2"])
def test_it_is_the_models_own_loss(kind: str) -> None:
    """With softcap, scale and tied heads; nothing but the correction has a gradient."""
    model = corrected(kind)
    plain = model(input_ids=IDS, labels=IDS)
    expected = gradients(model, plain.loss)
    assert {name.split("correction.")[-1] for name in expected} == {"down.weight", "up.weight", "up.bias"}
    fused = attach(model)(input_ids=IDS, labels=IDS, return_logits=True)
    torch.testing.assert_close(fused.loss, plain.loss)
    torch.testing.assert_close(fused.logits, plain.logits)
    for name, value in gradients(model, fused.loss).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_at_first_it_changes_nothing_and_taken_away_nothing_is_left() -> None:
    model = tiny()
    before = model(input_ids=IDS).logits
    names = set(model.state_dict())
    add_correction(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 * (16 + 64)
    remove_correction(model)
    assert set(model.state_dict()) == names
    assert not model.lm_head._forward_hooks


def test_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = attach(corrected(dtype=torch.bfloat16))
    assert model.lm_head.correction.up.weight.dtype == torch.float32
    ids = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    file = tmp_path / "correction.safetensors"
    save_correction(model, file)
    assert set(load_file(file)) == {"down.weight", "up.weight", "up.bias"}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    loaded = tiny().bfloat16()
    load_correction(loaded, file)
    model.eval(), loaded.eval()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    said = model.generate(ids[:1], max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids[:1]))
    again = loaded.generate(ids[:1], max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids[:1]))
    assert torch.equal(said, again)


@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_trainers_checkpoints_hold_it(tmp_path: Path) -> None:
    rows = [{"input_ids": IDS[n % 2].roll(n), "labels": IDS[n % 2].roll(n)} for n in range(16)]
    options = DFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        use_cpu=True, save_steps=2, disable_tqdm=True, seed=0, learning_rate=0.1,
    )  # fmt: skip
    curves = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = DFTTrainer(corrected(), options, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1][2:] == pytest.approx(curves[0][2:], rel=1e-6)
    assert curves[0][3] < curves[0][0]


def test_mistakes(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="save_correction: model must have a correction, got none"):
        save_correction(model, tmp_path / "x")
    with pytest.raises(ValueError, match="rank must be an int of at least 1, got 0"):
        add_correction(model, rank=0)
    assert all(p.requires_grad for p in model.parameters())
    add_correction(model)
    with pytest.raises(ValueError, match=r"model must have a plain lm_head, got one with an adapter"):
        add_correction(model)
    file = tmp_path / "c.safetensors"
    save_correction(model, file)
    other = tiny(vocab_size=48)
    with pytest.raises(ValueError, match="must fit the head's V 48, H 16, got V 64, H 16"):
        load_correction(other, file)
    assert all(p.requires_grad for p in other.parameters())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_correction(other, file)
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="must hold a correction"):
        load_correction(other, file)
