"""Every causal LM class of transformers: attached with its own loss and gradients, or refused. One class of each kind
here, all of them under `pytest -m full` (`make test-all`), against docs/models.md."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from tiny_models import IDS, tiny
from walk_models import TABLE, assert_same, classes, gradients, walk

from dft_kernels.models.heads import head_of
from dft_kernels.training.attach import attach

KINDS = {
    "LlamaForCausalLM": "attached",
    "Llama4ForCausalLM": "attached",  # its backbone is not where base_model_prefix says
    "Gemma2ForCausalLM": "attached",  # softcap, tied
    "RecurrentGemmaForCausalLM": "attached",  # a softcap of another name
    "MiniCPM3ForCausalLM": "attached",  # hidden states scaled before the head
    "PhiForCausalLM": "attached",  # a head with a bias
    "GPT2LMHeadModel": "attached",
    "BertLMHeadModel": "attached",  # layers between backbone and head, the head deep inside
    "OPTForCausalLM": "attached",
    "MambaForCausalLM": "attached",  # no attention, an output of its own
    "Gemma3ForConditionalGeneration": "attached",  # of images too
    "MixtralForCausalLM": "attached",  # a router's loss
    "GptOssForCausalLM": "attached",
    "JetMoeForCausalLM": "attached",  # its coefficient has another name
    "BartForCausalLM": "refused",  # labels that are shifted already
    "MusicgenForCausalLM": "refused",  # several heads
    "DoryForCausalLM": "refused",  # a learned scale in the head
    "ReformerModelWithLMHead": "refused",  # random hashes: other logits in every pass
    "GitForCausalLM": "refused",  # no loss of text alone
}


@pytest.mark.parametrize("name", [name for name in KINDS if hasattr(transformers, name)])
@pytest.mark.filterwarnings("ignore")
def test_one_of_each_kind(name: str) -> None:
    assert walk(name).status == KINDS[name]


@pytest.mark.full
@pytest.mark.parametrize("name", classes())
@pytest.mark.filterwarnings("ignore")
def test_every_class(name: str) -> None:
    found, text = walk(name), TABLE.read_text()
    if f"transformers {transformers.__version__} " not in text:
        return  # the table is of another version: loss and gradients were compared all the same
    rows = dict(re.findall(r"^\| (\w+) \| (refused|not built):", text, re.M))
    assert found.status == rows.get(name, "attached")
    assert found.status != "attached" or re.search(rf"\b{name}\b", text.partition("## Attached")[2])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "jetmoe"])
@pytest.mark.parametrize("asked", ["by the configuration", "in the call"])
def test_a_routers_loss_has_the_models_coefficient(kind: str, asked: str) -> None:
    """On top of the cross-entropy, or of whatever a teacher makes the loss; at a coefficient where it is felt."""
    model = tiny(kind, output_router_logits=asked != "in the call")
    name = "aux_loss_coef" if kind == "jetmoe" else "router_aux_loss_coef"
    setattr(model, name, 0.7)
    given = {"input_ids": IDS, "labels": IDS} | ({"output_router_logits": True} if asked == "in the call" else {})
    own = model(**given)
    expected = gradients(model, own.loss)
    attach(model, hard_weight=0.0)
    fused = model(**given)
    torch.testing.assert_close(fused.loss, own.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused.aux_loss, own.aux_loss)
    assert_same(gradients(model, fused.loss), expected)
    if own.aux_loss is None:  # transformers 5.17 does not read it there
        assert (kind, asked) == ("jetmoe", "by the configuration")
        return
    router = 0.7 * float(own.aux_loss.detach())
    assert router > 0.5
    soft = model(**given, teacher=own.logits.detach()).loss  # the model itself: no divergence
    assert float(soft.detach()) == pytest.approx(router, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "more", "scale", "cap"),
    [
        ("granite", {"logits_scaling": 4.0}, 0.25, None),
        ("hyperclovax", {"logits_scaling": 4.0}, 4.0, None),  # multiplies by it
        ("minicpm3", {"dim_model_base": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}, 1.0, None),
        ("gemma2", {"final_logit_softcapping": 0.3}, 1.0, 0.3),
        ("recurrent_gemma", {"logits_soft_cap": 0.3}, 1.0, 0.3),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_scale_and_softcap_are_found(kind: str, more: dict[str, Any], scale: float, cap: float | None) -> None:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    extra = {"q_lora_rank": 8, "kv_lora_rank": 8, "num_key_value_heads": 2} if kind == "minicpm3" else {}
    head = head_of(tiny(kind, **more, **extra))
    assert (head.logit_scale, head.softcap) == (scale, cap)
