"""Models of a few thousand parameters, and a tokenizer of whole words for them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from walk_models import TINY

from dft_kernels.materials.encoders import Encoder

SMALL = {**TINY, "vocab_size": 100}
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "residual_dropout", "hidden_dropout")
DROPOUTS += ("resid_pdrop", "attn_pdrop", "embd_pdrop")
IDS = torch.arange(3, 27).view(2, 12)
WORDS = [f"word{n}" for n in range(90)]


def tiny(kind: str = "llama", **more: Any) -> Any:
    """As it is initialised, in training mode, without dropout."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that one kind or another does not know
        config = transformers.CONFIG_MAPPING[kind](**{**TINY, **dict.fromkeys(DROPOUTS, 0.0), **more})
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


def word_tokenizer(words: list[str], pre: Any = None, decoder: Any = None) -> Any:
    """Of these words, the special tokens among them; without `pre` text is split at whitespace and punctuation."""
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre or pre_tokenizers.Whitespace()
    if decoder is not None:
        core.decoder = decoder
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def tiny_encoder(tokenizer: Any) -> Encoder:
    """Of sentences of this tokenizer's tokens, 16 of them at most."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **size)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_()
    return Encoder("tiny", model, tokenizer, 16, "mean", True, False)


@pytest.fixture
def tokenizer() -> Any:
    """Of WORDS, for `far`."""
    return word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS])
