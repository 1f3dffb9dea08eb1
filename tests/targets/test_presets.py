"""The presets that are shipped, and how their texts are read."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch

from dft_kernels.materials import texts as preset_texts
from dft_kernels.targets import target_file
from dft_kernels.targets.blend import at_risk
from dft_kernels.targets.comparison import between
from dft_kernels.targets.punctuation import CLASSES
from dft_kernels.targets.target import STATISTICS

WHERE_SENTENCES_END = 30  # SmolLM2's "."
COMMA, STOP = CLASSES.index("comma"), CLASSES.index("full_stop")


def test_the_presets_are_sane() -> None:
    shipped = [name for name, recipe in preset_texts.RECIPES.items() if recipe.shipped]
    assert target_file.presets() == sorted(shipped)
    paths = [target_file.PRESETS / f"{name}.safetensors" for name in shipped]
    assert max(path.stat().st_size for path in paths) < 1e6
    assert sum(path.stat().st_size for path in paths) < 6e6
    found = {name: target_file.load(name) for name in shipped}
    tokenizers = {target.about.tokenizer_sha256 for target in found.values()}
    assert len(tokenizers) == 1
    for name, target in found.items():
        assert target.about.name == name
        assert preset_texts.RECIPES[name].licence == target.about.licence
        assert "sha256" in target.about.source
        assert set(STATISTICS) == set(target)
        assert target.vocab_size == 49152
        assert (target.about.tokens or 0) > 50_000
        assert len(target.noise) == 17
        assert float(target["unigram"].double().sum()) == pytest.approx(1, abs=1e-5)
        assert 0 <= float(target["hazard"].min()) <= float(target["hazard"].max()) <= 1
        assert 8 < float((target["sentence_words"] * torch.arange(257)).sum()) < 40
        assert 0.6 < float(target["type_token_ratio"]) < 0.95
        assert 1 < float((target["entropy"] * target["entropy_weight"]).sum()) < 8
        # token and text statistics tell the same
        tokens_a_sentence = (target.about.tokens or 0) / target.about.sentences
        assert float(at_risk(target).sum()) == pytest.approx(tokens_a_sentence, rel=0.01)
        assert WHERE_SENTENCES_END in (target["sentence_end"] * target["unigram"]).topk(3).indices
        rate = target["punctuation_rate"] * (target.about.tokens or 0) / target.about.words * 1000
        per_1000 = target["punctuation_per_1000_words"]
        assert float(rate[COMMA]) == pytest.approx(float(per_1000[COMMA]), rel=0.02)
        assert 0.9 < float(rate[STOP] / per_1000[STOP]) < 1.1
    colon, semicolon = CLASSES.index("colon"), CLASSES.index("semicolon")

    def marks_of(name: str, kind: int) -> float:
        return float(found[name]["punctuation_per_1000_words"][kind])

    assert marks_of("scripture", colon) > 2 * marks_of("reference", colon)
    assert marks_of("literary", semicolon) > 2 * marks_of("technical", semicolon)
    distances_of = between(found["literary"], found["technical"])
    floors = found["technical"].noise
    assert all(value > floors[name] for name, value in distances_of.items())


def test_texts_of_presets(tmp_path: Path) -> None:
    assert preset_texts.unwrapped("a b\n c\n\n\n d\n") == "a b c\n\nd\n"
    with pytest.raises(ValueError, match=r"target: presets must be of literary, .* got 'news'"):
        preset_texts.documents_of("news", tmp_path)
    page = preset_texts._Paragraphs()
    page.feed('<p>no</p><div class="para">One <b>two</b><pre>x = 1</pre> three<div class="list">no</div></div>no')
    assert preset_texts.unwrapped("".join(page.parts)) == "One two three\n"
    data = tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    data.parent.mkdir(parents=True)
    lines = [b"Line one", b"", b"caf\xc3\xa9"]
    body = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    body += b"".join(struct.pack(">ii", 262153, len(line)) + line for line in lines)
    data.write_bytes((struct.pack(">i", len(body)) + zlib.compress(body)) * 2)
    assert list(preset_texts._austen(tmp_path)) == ["Line one\n\ncafé\n"] * 2
    text = "<note>no</note><title>T</title><w>In</w> the<l/>beginning &amp; <chapter/>end"
    packed = zlib.compress(text.encode())
    (tmp_path / "nt.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(text)))
    (tmp_path / "nt.bzz").write_bytes(packed)
    assert list(preset_texts._sword(tmp_path)) == ["T\n\nIn the beginning &\n\nend\n"]
