"""TRL's trainers with our kernels in their heads give TRL's own numbers, and call none of its kernels."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import far
from trl_runs import TRAINERS, assert_equal, loaded, make, run

from dft_kernels import attach
from dft_kernels.training import trl as ours

pytestmark = pytest.mark.filterwarnings("ignore")


KEPT = ("SFT completions", "SFT packed", "DPO weighted", "KTO", "GRPO entropy", "RLOO")  # each with what is least plain


class Counted:
    """TRL's chunk function, and how often it was called."""

    def __init__(self, own: Any) -> None:
        self.own, self.calls = own, 0

    def apply(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.own.apply(*arguments)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    import trl.trainer.utils as utils

    counter = Counted(utils._ChunkedLogProbFunction)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", counter)
    return counter


@pytest.mark.kept(where=lambda name: name in KEPT)
@pytest.mark.parametrize("name", list(TRAINERS))
def test_a_trainers_own_numbers(name: str, tmp_path: Path, counted: Counted) -> None:
    theirs = run(make(name, tmp_path))
    calls = counted.calls
    assert calls > 0
    fused = run(ours.fuse(make(name, tmp_path)))
    assert counted.calls == calls
    assert_equal(fused, theirs)


KINDS = {  # models whose logits are scaled, capped, of a head with a bias, of a mixture of experts
    "cohere": {"logit_scale": 0.7},
    "gemma2": {"final_logit_softcapping": 3.0},
    "phi": {},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
}


@pytest.mark.kept(where=lambda kind: kind in ("gemma2", "mixtral"))
@pytest.mark.parametrize("kind", list(KINDS))
def test_heads_of_other_models(kind: str, tmp_path: Path) -> None:
    """DPO asks for the mean logits and has a reference model too."""

    def trainer() -> Any:
        return make("DPO", tmp_path, loaded(tmp_path / "model", kind, **KINDS[kind]))

    assert_equal(run(ours.fuse(trainer())), run(trainer()))


def test_the_head_in_fp32(tmp_path: Path) -> None:
    """cast_lm_head_to_fp32, of a model in bf16: its last hidden states are the same, and no logit is rounded."""
    model = loaded(tmp_path / "model").bfloat16()
    trainer = make("GRPO", tmp_path, model, cast_lm_head_to_fp32=True, model_init_kwargs=None)
    ids = torch.randint(4, 94, (2, 7))
    head = model.lm_head.weight

    def found() -> list[torch.Tensor]:
        out = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
        return [out.log_probs, out.entropy, *torch.autograd.grad(out.loss, head)]

    theirs = found()
    assert head.dtype == torch.float32
    ours.fuse(trainer)
    torch.testing.assert_close(found(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.kept(where=lambda name: name == "DPO")
@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_mixed_precision(name: str, tmp_path: Path, counted: Counted) -> None:
    """accelerate has wrapped the reference model's forward before `fuse`, and wraps the model's after it."""
    theirs, calls = run(make(name, tmp_path, bf16=True)), counted.calls
    trainer = ours.fuse(make(name, tmp_path, bf16=True))
    assert_equal(run(trainer), theirs, 0.03)  # TRL rounds logits to bf16, we do not
    assert counted.calls == calls > 0


def test_adapters(tmp_path: Path) -> None:
    """LoRA, whose reference is the model without it."""
    import peft

    def trainer() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = loaded(tmp_path / "model")
        torch.manual_seed(3)
        return make("DPO", tmp_path, peft.get_peft_model(model, config))

    assert_equal(run(ours.fuse(trainer())), run(trainer()))


def test_prompt_tuning(tmp_path: Path) -> None:
    """Virtual tokens before the text: more hidden states than the trainer has labels."""
    import peft

    def trainer() -> Any:
        model = loaded(tmp_path / "model")
        torch.manual_seed(3)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return make("SFT completions", tmp_path, peft.get_peft_model(model, config))

    assert_equal(run(ours.fuse(trainer())), run(trainer()))


def test_an_adapter_of_the_head() -> None:
    """It is part of what our head computes and trains; TRL's trainers refuse one, its head would leave it out."""
    import peft
    from trl.trainer.utils import add_fused_lm_head

    base = far()
    add_fused_lm_head(base, temperature=0.7)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    ids = torch.randint(4, 94, (2, 7))
    found = ours.fuse(model)(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    dense = (model(input_ids=ids).logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, dense)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    for mine, exact in zip(
        torch.autograd.grad(found.sum(), trained), torch.autograd.grad(dense.sum(), trained), strict=True
    ):
        torch.testing.assert_close(mine, exact)


def test_a_model_alone_and_its_own_forward(tmp_path: Path) -> None:
    """A call that asks for no fused head is the model's own, in generate too; one that does has TRL's fields."""
    from trl.trainer.utils import add_fused_lm_head

    model = far()
    ids = torch.randint(4, 94, (2, 7))
    expected, drawn = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "is_top1"))
    labels = ids.masked_fill(ids % 3 == 0, -100)
    given = {"input_ids": ids, "fused_lm_head": True}
    theirs = [model(**given, labels=labels), model(**given, shift_labels=labels, num_items_in_batch=5)]
    assert ours.fuse(model) is model
    fused = [model(**given, labels=labels), model(**given, shift_labels=labels, num_items_in_batch=5)]
    for mine, own in zip(fused, theirs, strict=True):
        assert type(mine) is type(own)
        assert list(mine) == list(own)
        for name in own:
            torch.testing.assert_close(mine[name], own[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), drawn)
    with pytest.raises(ValueError, match="fuse: labels must be given with fused_lm_head=True, got None"):
        model(**given)
    nothing = model(**given, labels=torch.full_like(ids, -100))
    nothing.loss.backward()
    assert float(nothing.loss) == 0.0
    assert all(float(p.grad.norm()) == 0.0 for p in model.parameters())


def test_others_are_left_as_they_are(tmp_path: Path, counted: Counted) -> None:
    """A trainer that is not fused calls TRL's kernels while one that is does not."""
    ours.fuse(make("SFT", tmp_path))
    run(make("SFT", tmp_path))
    assert counted.calls > 0


def test_liger(tmp_path: Path) -> None:
    """use_liger_kernel changes layers alone in TRL's trainers: the same numbers, from our head."""
    settings = {"use_liger_kernel": True, "liger_kernel_config": dict.fromkeys(("rope", "swiglu", "rms_norm"), False)}
    assert_equal(run(ours.fuse(make("SFT", tmp_path, **settings))), run(make("SFT", tmp_path)))


class TestErrors:
    def test_attach_first(self, tmp_path: Path) -> None:
        trainer = make("SFT", tmp_path, attach(far()))
        with pytest.raises(ValueError, match=r"Call detach\(model\) before the trainer is made, then fuse\(trainer\)"):
            ours.fuse(trainer)
        with pytest.raises(ValueError, match=r"trl\.\S+_fused_forward, which does not\. .*training\.trl\.fuse\(tr"):
            trainer.train()

    def test_twice(self, tmp_path: Path) -> None:
        trainer = ours.fuse(make("SFT", tmp_path))
        with pytest.raises(ValueError, match="fuse: LlamaForCausalLM must be fused once, got one that is fused"):
            ours.fuse(trainer)

    def test_nothing_of_trls(self) -> None:
        with pytest.raises(TypeError, match="fuse: trainer must be a trainer of TRL, or its model, got str"):
            ours.fuse("SFTTrainer")
        with pytest.raises(ValueError, match="fuse: LlamaForCausalLM must have TRL's fused head, got a model without"):
            ours.fuse(far())

    def test_another_version(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import trl.trainer.utils as utils

        trainer = make("SFT", tmp_path)

        @dataclasses.dataclass
        class Other(utils.FusedCausalLMOutput):
            perplexity: Any = None

        monkeypatch.setattr(utils, "FusedCausalLMOutput", Other)
        with pytest.raises(
            ValueError, match=r"of a version that was tried \(1\.15\.0, 1\.16\.0\), got \S+, whose perp"
        ):
            ours.fuse(trainer)
        monkeypatch.delattr(utils, "add_fused_lm_head")
        with pytest.raises(ValueError, match=r"trl must have the fused head of .*, got \S+, whose trainers have none"):
            ours.fuse(far())

    def test_prepared_by_accelerate(self, tmp_path: Path) -> None:
        """Its wrapper rounds for the trainer's precision, which the model alone does not tell."""
        trainer = make("DPO", tmp_path, bf16=True)
        with pytest.raises(ValueError, match="LlamaForCausalLM must be given as part of its trainer, got a model that"):
            ours.fuse(trainer.ref_model)

    def test_all_or_nothing(self, tmp_path: Path) -> None:
        """Where the reference model is refused, the model is as it was."""
        trainer = make("DPO", tmp_path)
        before = trainer.model.forward
        del trainer.ref_model.forward
        with pytest.raises(ValueError, match="must have TRL's fused head, got a model without"):
            ours.fuse(trainer)
        assert trainer.model.forward == before

    def test_a_wrapped_forward(self, tmp_path: Path) -> None:
        trainer = make("SFT", tmp_path)
        trainer.model.forward = functools.wraps(trainer.model.forward)(lambda *a, **b: None)
        with pytest.raises(ValueError, match="must have TRL's forward as its own, got one that"):
            ours.fuse(trainer)
