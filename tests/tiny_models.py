"""Models of a few thousand parameters, and a tokenizer of whole words for them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

# one configuration for all: every kind takes what it knows
TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "n_embd": 16, "n_layer": 2, "n_head": 2, "d_model": 16, "num_heads": 2, "num_layers": 2,
    "ffn_dim": 24, "word_embed_proj_dim": 16, "num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "state_size": 4, "n_positions": 64, "rotary_dim": 4,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "residual_dropout", "hidden_dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
}  # fmt: skip
IDS = torch.arange(3, 27).view(2, 12)
WORDS = [f"word{n}" for n in range(90)]


def tiny(kind: str = "llama", **more: Any) -> Any:
    """As it is initialised, in training mode, without dropout."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that one kind or another does not know
        config = transformers.CONFIG_MAPPING[kind](**{**TINY, **more})
        model = transformers.AutoModelForCausalLM.from_config(config).float().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def far(kind: str = "llama", **more: Any) -> Any:
    """Of 100 tokens, with predictions far from uniform."""
    model = tiny(kind.lower(), **{"vocab_size": 100, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def word_tokenizer(words: list[str], pre: Any = None, decoder: Any = None) -> Any:
    """Of these words, the special tokens among them; without `pre` text is split at whitespace and punctuation."""
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre or pre_tokenizers.Whitespace()
    if decoder is not None:
        core.decoder = decoder
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture
def tokenizer() -> Any:
    """Of WORDS, for `far`."""
    return word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS])
