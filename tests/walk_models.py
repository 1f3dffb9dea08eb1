"""Every causal LM class of transformers, attached: `python tests/walk_models.py` writes docs/models.md."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dft_kernels.training.attach import attach

LARGEST = 20_000_000  # parameters of a model that is built
TINY = {  # sizes of all configurations and their parts: each takes those that it knows
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64, "rotary_dim": 4},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "n_embd": 16, "n_layer": 2, "n_head": 2, "d_model": 16},
    **{"num_heads": 2, "num_layers": 2, "ffn_dim": 24, "word_embed_proj_dim": 16, "state_size": 4},
    **{"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "n_routed_experts": 2, "n_group": 1, "topk_group": 1},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "vocab_size_per_layer_input": 64},
    **{
        "hidden_size_per_layer_input": 8,
        "hidden_size_global": 16,
        "depth": 2,
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_chunk_size": 4,
    },
}
FAMILIES = {  # sizes of configurations that have a key
    "output_router_logits": {"output_router_logits": True},
    "patch_size": {"image_size": 28, "patch_size": 14},
    "kv_lora_rank": {  # multi-head latent attention
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"num_key_value_heads": 2, "head_dim": 8, "n_shared_experts": 1},
    },
}
ABSENT = object()
BOTH = ("sliding", "full")
EVERY_HEAD = {"num_key_value_heads": 2}
MIXED = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], **EVERY_HEAD}
MORE: dict[str, dict[str, Any]] = {  # what a class needs besides
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "CohereCompassForCausalLM": {
        "layer_types": [f"{kind}_attention" for kind in BOTH],
        "rope_parameters": {f"{kind}_attention": {"rope_type": "default", "rope_theta": 1e4} for kind in BOTH},
    },
    "DbrxForCausalLM": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24},
    },
    "DeepseekV4ForCausalLM": {"mlp_layer_types": ["moe", "moe"]},
    "DiffLlamaForCausalLM": EVERY_HEAD,
    "Dots1ForCausalLM": {**EVERY_HEAD, "n_shared_experts": 1},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "FlintForCausalLM": {"mlp_only_layers": []},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashForCausalLM": {"num_experts_per_tok": 2},
    "Mamba2ForCausalLM": {"num_heads": 4, "n_groups": 1, "chunk_size": 4},
    "Mistral4ForCausalLM": {"head_dim": 16},
    "MoshiForCausalLM": {"audio_vocab_size": 64},
    "ReformerModelWithLMHead": {
        **{"is_decoder": True, "attn_layers": ["local", "lsh"], "attention_head_size": 8, "axial_pos_shape": [8, 8]},
        **{"axial_pos_embds_dim": [8, 8], "local_attn_chunk_length": 2, "lsh_attn_chunk_length": 2, "num_buckets": 2},
    },
    "XLNetLMHeadModel": {"max_position_embeddings": ABSENT},
    "XmodForCausalLM": {"default_language": "en_XX", "is_decoder": True},
    "ZambaForCausalLM": MIXED,
    "Zamba2ForCausalLM": {**MIXED, "n_mamba_heads": 2, "num_mem_blocks": 1},
}


TABLE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Models that `attach` takes

On this page: whether `attach` takes the class of your model, and if not, why.

Every causal LM class of transformers {version} (`MODEL_FOR_CAUSAL_LM_MAPPING` and every exported `*ForCausalLM`), built
with random weights from a tiny configuration. Attached means that loss and all gradients of a padded batch with ignored
labels equal the class's own, its router's loss included (`output_router_logits=True`); refused means a `ValueError` of
`attach` that says this. Other weights and larger models make no difference to the class, settings may.

`python tests/walk_models.py` writes this file, `make test-all` compares it.

| | classes |
|---|---|
{counts}

## Attached

{attached}

With the router's loss: {router}

## Refused or not built

| class | what happened |
|---|---|
{others}
"""


class Found(NamedTuple):
    """What came of one class."""

    status: str  # attached, refused, not built
    reason: str = ""
    router: bool = False  # its router's loss was in the loss


def classes() -> list[str]:
    """The names of all causal LM classes of transformers."""
    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    names = {name for value in listed for name in ([value] if isinstance(value, str) else value)}
    names |= {n for n in dir(transformers) if n.endswith("ForCausalLM") and not n.startswith("AutoModel")}
    return sorted(names, key=str.lower)


def sizes(config: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a configuration class, its parts' included."""
    known = {*dir(config), *inspect.signature(config.__init__).parameters}
    families = [family for key, family in FAMILIES.items() if key in known]
    found = {key: value for given in (TINY, *families) for key, value in given.items()}
    if config.sub_configs:
        default = config()
        for name in config.sub_configs:
            part = type(getattr(default, name, None))
            if hasattr(part, "sub_configs"):
                found[name] = {**sizes(part, {}), "model_type": part.model_type}
    fixed = {key for key in found if isinstance(value := getattr(config, key, None), property) and value.fset is None}
    for key, value in more.items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in found.items() if value is not ABSENT and key not in fixed}


def build(name: str) -> Any:
    """A model of the class with random weights, a few thousand of them."""
    cls = getattr(transformers, name)
    given = sizes(cls.config_class, MORE.get(name, {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(cls.config_class(**given)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    return cls._from_config(cls.config_class(**given)).float().train()


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Two sequences, one padded, with labels that leave out rows."""
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3:6] = -100
    known = inspect.signature(model.forward).parameters
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    return given if "kwargs" in known else {name: value for name, value in given.items() if name in known}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that has one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """1e-5 of the norm of all gradients."""
    assert ours.keys() == theirs.keys()
    whole = sum(float(g.double().square().sum()) for g in theirs.values()) ** 0.5
    apart = sum(float((ours[n] - g).double().square().sum()) for n, g in theirs.items()) ** 0.5
    assert apart < 1e-5 * whole, (apart, whole)


def walk(name: str) -> Found:
    """Build one class, attach, compare loss and gradients with its own. AssertionError: another loss; any error but a
    refusal of `attach` is raised."""
    try:
        model = build(name)
    except Exception as error:
        said = " ".join(str(error).split()).replace("|", "/")
        return Found("not built", f"{type(error).__name__}: {said[:120]}")
    given = batch(model)
    try:
        attach(model)
    except ValueError as error:
        said = str(error)
        assert said.startswith(("attach: ", "head_of: ")), said
        assert re.fullmatch(r"\w+: .+ must .+, got .+\. .+\.", said, re.S), said
        relation, _, got = said.partition(" must ")[2].partition(", got ")
        got = got.partition(". ")[0]
        return Found("refused", f"must {relation}" + ("" if re.search(r"\d\.\d", got) else f", got {got}"))
    attachment = model._dft_kernels
    torch.manual_seed(1)  # both draw the same dropout
    own = attachment.own(model)(**given)
    expected = gradients(model, own.loss)
    torch.manual_seed(1)
    fused = model(**given)
    torch.testing.assert_close(fused.loss, own.loss, rtol=1e-5, atol=1e-5)
    assert fused.logits is None
    assert_same(gradients(model, fused.loss), expected)
    router = fused.aux_loss is not None
    assert router == (own.get("aux_loss") is not None)
    return Found("attached", router=router)


def table(found: dict[str, Found]) -> str:
    """docs/models.md."""
    kinds = ("attached", "refused", "not built")
    names = {kind: [name for name, one in found.items() if one.status == kind] for kind in kinds}
    others = [f"| {name} | {one.status}: {one.reason} |" for name, one in found.items() if one.status != "attached"]
    return HEAD.format(
        version=transformers.__version__,
        counts="\n".join(f"| {kind} | {len(names[kind])} |" for kind in kinds),
        attached=", ".join(names["attached"]),
        router=", ".join(name for name, one in found.items() if one.router),
        others="\n".join(others),
    )


def main() -> None:
    """Walk all classes and write the table."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table({name: walk(name) for name in classes()}))


if __name__ == "__main__":
    main()
