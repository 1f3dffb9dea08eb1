"""What becomes of an attached forward: replaced by another one it is missed, wrapped it is called."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers
from tiny_models import IDS, tiny
from walk_models import assert_same, gradients

from dft_kernels.training.attach import attach, detach

MISSED = (
    r"attach: model\.forward must call the attached forward where a loss is asked for, got {}, which does not\. Use"
)


def own_cross_entropy(self: Any, input_ids: Any = None, labels: Any = None, **more: Any) -> Any:
    """A forward with a loss of its own."""
    logits = type(self).forward(self, input_ids=input_ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss)


def test_a_replaced_forward_is_missed() -> None:
    model = attach(tiny())
    model.forward = types.MethodType(own_cross_entropy, model)
    for asked in ({"labels": IDS}, {"labels": IDS, "teacher": torch.zeros(2, 12, 64)}):
        with pytest.raises(ValueError, match=MISSED.format(r"test_own_forward\.own_cross_entropy")):
            model(input_ids=IDS, **asked)
    model.eval()
    assert model(input_ids=IDS, labels=IDS).loss is not None  # of evaluation nothing of ours is asked
    with pytest.raises(ValueError, match=MISSED.format(".*")):
        model(input_ids=IDS, labels=IDS, teacher=torch.zeros(2, 12, 64))
    detach(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert model.train()(input_ids=IDS, labels=IDS).logits is not None


@pytest.mark.filterwarnings("ignore")
def test_inside_of_peft_it_is_missed() -> None:
    import peft

    model = attach(tiny())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert wrapped(input_ids=IDS, labels=IDS).metrics is not None
    model.forward = types.MethodType(own_cross_entropy, model)
    with pytest.raises(ValueError, match=MISSED.format(".*own_cross_entropy")):
        wrapped(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("how", ["a function", "autocast", "torch.compile", "accelerate", "compiled in place"])
@pytest.mark.filterwarnings("ignore")
def test_a_wrapper_is_not(how: str) -> None:
    """Wrappers of the forward, and of the model: the fused loss, and no complaint."""
    model = attach(tiny())
    expected = gradients(model, model(input_ids=IDS, labels=IDS).loss)
    inner = model.forward
    called: Any = model
    torch.compiler.reset()
    if how == "a function":
        model.forward = lambda *arguments, **named: inner(*arguments, **named)
    elif how == "autocast":
        model.forward = types.MethodType(torch.autocast("cpu", enabled=False)(inner.__func__), model)
    elif how == "torch.compile":
        called = torch.compile(model, backend="eager", fullgraph=True)
    elif how == "compiled in place":
        model.compile(backend="eager")
    else:
        import accelerate

        accelerate.state.AcceleratorState._reset_state(True)  # of a Trainer that ran before
        called = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    out = called(input_ids=IDS, labels=IDS)
    assert out.metrics is not None
    assert out.logits is None
    if how == "accelerate":
        assert called.forward is not inner
        accelerate.state.AcceleratorState._reset_state(True)
    else:
        assert_same(gradients(model, out.loss), expected)


@pytest.mark.filterwarnings("ignore")
def test_liger_is_told() -> None:
    """Trainer's use_liger_kernel=True replaces the forward as training starts; attached after it the loss is ours."""
    liger = pytest.importorskip("liger_kernel.transformers")
    only = {**dict.fromkeys(("rope", "swiglu", "rms_norm"), False), "fused_linear_cross_entropy": True}
    model = attach(tiny())
    liger.apply_liger_kernel_to_llama(model=model, **only)
    with pytest.raises(ValueError, match=MISSED.format(r"liger_kernel\.\S+lce_forward")):
        model(input_ids=IDS, labels=IDS)
    model = tiny()
    expected = gradients(model, model(input_ids=IDS, labels=IDS).loss)
    liger.apply_liger_kernel_to_llama(model=model, **only)
    out = attach(model)(input_ids=IDS, labels=IDS)
    assert out.metrics is not None
    assert_same(gradients(model, out.loss), expected)


class Inline(transformers.LlamaForCausalLM):
    """A forward that calls no loss_function, as many of those outside of transformers."""

    extra = 0.0

    def forward(self, input_ids: Any = None, labels: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), labels[:, 1:].reshape(-1))
            loss = loss + self.extra * hidden.square().mean()
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_forward_without_loss_function() -> None:
    """Its cross-entropy is fused; what it adds to it cannot be known, and is refused."""
    model = Inline(tiny().config)
    own = model(input_ids=IDS, labels=IDS)
    expected = gradients(model, own.loss)
    attach(model.train())
    fused = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(fused.loss, own.loss)
    assert_same(gradients(model, fused.loss), expected)
    detach(model).extra = 0.1
    with pytest.raises(ValueError, match="attach: Inline must have the next token's cross-entropy as its loss"):
        attach(model)


def test_a_head_that_is_not_called_is_refused() -> None:
    model = tiny()
    model.forward = types.MethodType(
        lambda self, input_ids=None, **_: transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.model(input_ids=input_ids).last_hidden_state @ self.lm_head.weight.t()
        ),
        model,
    )
    with pytest.raises(ValueError, match="must have a forward that calls its head once, got 0 calls"):
        attach(model)


def test_modes_of_modules_are_kept() -> None:
    """The checks of attach run in both modes; a module that was in evaluation mode is again."""
    model = tiny()
    model.model.layers[0].eval()
    attach(model)
    assert model.training
    assert model.model.layers[1].training
    assert not any(module.training for module in model.model.layers[0].modules())
    state = torch.random.get_rng_state()
    detach(model) and attach(model)
    assert torch.equal(torch.random.get_rng_state(), state)
