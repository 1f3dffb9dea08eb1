"""Kept texts: a run that was killed equals one that was not, and no file of other settings is touched."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from target_texts import WORDS, documents
from tiny_models import far as tiny
from tiny_models import tokenizer, word_tokenizer  # noqa: F401 - a fixture
from transformers import LogitsProcessorList

from dft_kernels.backends import extension
from dft_kernels.generation import engine, native
from dft_kernels.generation.engine import Engine
from dft_kernels.generation.samples import Samples, draw, read
from dft_kernels.generation.sampling import Sampling, continuations
from dft_kernels.generation.settings import Settings, described
from dft_kernels.targets import corpus, target_file

PROMPTS = ["word1 word2 word3", "word4", "word5 word6", "word7", "word8 word9"]
SAMPLING = Sampling(count=5, length=4, seed=3)


@pytest.fixture
def model() -> Any:
    return tiny()


@pytest.fixture
def drawing(model: Any, tokenizer: Any) -> Any:  # noqa: F811
    def run(file: Path, prompts: list[str] = PROMPTS, sampling: Sampling = SAMPLING, **more: Any) -> Samples:
        return draw(Engine(model, tokenizer), prompts, sampling, file, **{"model_name": "tiny", "batch": 2, **more})

    return run


def timeless(data: bytes) -> list[Any]:
    """The lines of a file but for their seconds, which no two runs share."""
    lines = [json.loads(line) for line in data.decode().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_texts_are_the_models_own(drawing: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    state = torch.get_rng_state()
    model.train()
    ticks: list[int] = []
    found = drawing(tmp_path / "new" / "samples.jsonl", tick=ticks.append)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert ticks == [2, 2, 1]
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = []
    for number, start in enumerate((0, 2, 4)):
        expected += continuations(model, tokenizer, ids[start : start + 2], 4, 3 + number, **SAMPLING.keywords())
    assert [text.split() for text in found.texts] == [
        tokenizer.decode(new, skip_special_tokens=True).split() for new in expected
    ]
    assert found.tokens == sum(map(len, expected))
    assert found.prompts == PROMPTS
    assert found.header.sampling == SAMPLING
    assert found.tokens_per_second == pytest.approx(found.tokens / found.seconds)
    lines = [json.loads(line) for line in (tmp_path / "new" / "samples.jsonl").read_text().splitlines()]
    assert math.isclose(found.seconds, sum(line["seconds"] for line in lines[1:]))
    assert [set(line) for line in lines[1:]] == [{"number", "prompt", "text", "tokens", "seconds"}] * 5
    assert lines[0]["sampling"] == {
        "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "length": 4, "count": 5
    }  # fmt: skip
    assert lines[0]["versions"]["torch"] == torch.__version__


def test_a_finished_file_needs_no_model(drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "samples.jsonl"
    found, kept = drawing(file), file.read_bytes()
    assert read(file) == found
    monkeypatch.setattr("dft_kernels.generation.engine.continuations", pytest.fail)
    monkeypatch.setattr(engine.transformers, "__version__", "9.9")  # who draws nothing may have another
    ticks: list[int] = []
    assert drawing(file, tick=ticks.append) == found
    assert ticks == [5]
    assert file.read_bytes() == kept


class Killed(Exception):  # noqa: N818 - as by a signal
    pass


@pytest.mark.parametrize("batches", [1, 2])
def test_a_run_killed_between_batches_goes_on(drawing: Any, tmp_path: Path, batches: int) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "samples.jsonl"
    drawing(whole)
    left = [batches]

    def kill(_: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    with pytest.raises(Killed):
        drawing(file, tick=kill)
    with pytest.raises(ValueError, match=rf"samples: .*: the file must hold 5 texts, got {2 * batches}\. Run what"):
        read(file)
    ticks: list[int] = []
    drawing(file, tick=ticks.append)
    assert ticks == [2 * batches, *[2, 1][batches - 1 :]]
    assert timeless(file.read_bytes()) == timeless(whole.read_bytes())


def test_a_run_killed_while_it_writes_goes_on(drawing: Any, tmp_path: Path) -> None:
    """At every byte of the last line, and of its batch's other line, and at the first bytes of all."""
    whole, file = tmp_path / "whole.jsonl", tmp_path / "samples.jsonl"
    drawing(whole, PROMPTS[:4], replace(SAMPLING, count=4))
    data = whole.read_bytes()
    starts = [0, *(at + 1 for at, byte in enumerate(data) if byte == ord("\n"))]  # of lines, and the end
    for cut in (0, 1, 60, starts[1] - 1, starts[1], starts[3] - 1, *range(starts[3], len(data))):
        file.write_bytes(data[:cut])
        found = drawing(file, PROMPTS[:4], replace(SAMPLING, count=4))
        assert len(found.texts) == 4
        assert timeless(file.read_bytes()) == timeless(data), cut
        kept = starts[3] if cut >= starts[3] else starts[1] if cut >= starts[1] else 0  # before the last batch
        assert file.read_bytes()[:kept] == data[:kept]


def test_a_file_of_other_settings_is_not_touched(
    drawing: Any,
    model: Any,
    tokenizer: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "samples.jsonl"
    drawing(file)
    kept = file.read_bytes()
    others: dict[str, dict[str, Any]] = {
        r"sampling.temperature must be 1.0, as in the file, got 0.7": {"sampling": replace(SAMPLING, temperature=0.7)},
        r"sampling.seed must be 3, as in the file, got 4": {"sampling": replace(SAMPLING, seed=4)},
        r"batch must be 2, as in the file, got 3": {"batch": 3},
        r'model must be "tiny", as in the file, got "other"': {"model_name": "other"},
        r"prompts_sha256 must be .*, as in the file, got ": {"prompts": PROMPTS[::-1]},
    }
    for said, given in others.items():
        with pytest.raises(ValueError, match=rf"draw: .*samples.jsonl: {said}.*\. Name another folder, or delete"):
            drawing(file, **given)
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match=r"generation.repetition_penalty must be null, as in the file, got 1.5"):
        drawing(file)
    model.generation_config.repetition_penalty = None
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0  # as after a training into the same folder
    with pytest.raises(ValueError, match="model_sha256 must be"):
        drawing(file)
    assert file.read_bytes() == kept
    with torch.no_grad():
        model.lm_head.weight.copy_(tiny().lm_head.weight)
    unfinished = b"".join(kept.splitlines(True)[:3])
    file.write_bytes(unfinished)
    monkeypatch.setattr(engine.transformers, "__version__", "9.9")
    with pytest.raises(ValueError, match=r'versions.transformers must be "[0-9.]+", as in the file, got "9.9"'):
        drawing(file)
    assert file.read_bytes() == unfinished
    assert drawing(tmp_path / "other.jsonl", batch=3).texts[2:] != drawing(tmp_path / "third.jsonl", batch=2).texts[2:]


@pytest.fixture
def stepped(model: Any) -> Any:
    """As `drawing`, by a tokenizer of whose texts there can be targets."""
    own = word_tokenizer(WORDS)

    def run(file: Path, settings: Settings, **more: Any) -> Samples:
        given = {"model_name": "tiny", "batch": 2, **more}
        return draw(Engine(model, own), PROMPTS, given.pop("sampling", SAMPLING), file, settings=settings, **given)

    return run


def target(file: Path, seed: int = 0) -> str:
    made = corpus.build(documents(60, seed), word_tokenizer(WORDS), name="made", tokenizer_name="tiny")
    return str(target_file.save(made, file))


def test_steps_draw_and_stand_in_the_file(stepped: Any, model: Any, tmp_path: Path) -> None:
    refine = target(tmp_path / "target.safetensors")
    settings = Settings(top_n_sigma=2.0, refine=refine, bound=0.05)
    warm = replace(SAMPLING, temperature=0.8)
    found = stepped(tmp_path / "steps.jsonl", settings, sampling=warm)
    own = word_tokenizer(WORDS)
    whole = replace(settings, temperature=0.8).steps(own)
    ids = [own(prompt)["input_ids"] for prompt in PROMPTS]
    for number, start in enumerate((0, 2, 4)):
        expected = continuations(
            model, own, ids[start : start + 2], 4, 3 + number, logits_processor=LogitsProcessorList(whole)
        )
        for text, new in zip(found.texts[start:], expected, strict=False):
            assert text.split() == own.decode(new, skip_special_tokens=True).split()
    assert found.texts != stepped(tmp_path / "plain.jsonl", Settings(), sampling=warm).texts
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    sha256 = json.loads(safe_open(refine, "pt").metadata()["target"])["sha256"]
    assert lines[0]["steps"] == {
        "top_n_sigma": 2.0,
        "refine": {"name": "made", "sha256": sha256},
        "bound": 0.05,
        "towards": ["sentences", "punctuation"],
    }
    assert set(lines[0]["versions"]) == {"torch", "transformers", "dft_kernels", "kernels"}
    draws = [min(line["tokens"] + 1, 4) for line in lines[1:]]
    assert found.kl == pytest.approx(sum(line["kl"] * n for line, n in zip(lines[1:], draws, strict=True)) / sum(draws))
    assert found.kl > 0
    assert 0 < found.entropy < math.log(100)
    assert read(tmp_path / "steps.jsonl") == found


def test_the_kl_is_what_steps_spend(stepped: Any, model: Any, tmp_path: Path) -> None:
    """Of a refiner at its bound, every token's; of the likeliest token, its surprise; of idle steps, none."""
    refine = target(tmp_path / "target.safetensors")
    idle = stepped(tmp_path / "idle.jsonl", Settings(refine=refine, bound=0.0))
    assert idle.texts == stepped(tmp_path / "plain.jsonl", Settings()).texts
    assert idle.kl == 0
    bare = [text.replace(",", "") for text in documents(60)]
    native = target_file.save(
        corpus.build(bare, word_tokenizer(WORDS), name="bare", tokenizer_name="tiny"), tmp_path / "native.safetensors"
    )
    spent = stepped(tmp_path / "some.jsonl", Settings(refine=refine, bound=1e-3, native=str(native))).kl
    assert spent == pytest.approx(1e-3, rel=0.01)
    greedy = stepped(
        tmp_path / "greedy.jsonl", Settings(refine=refine, bound=0.0), sampling=replace(SAMPLING, temperature=0.0)
    )
    assert greedy.entropy == pytest.approx(0, abs=1e-6)
    text = PROMPTS[0].split()
    own = word_tokenizer(WORDS)
    ids = torch.tensor([own(" ".join(text))["input_ids"]])
    with torch.no_grad():
        made = model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=1)
        likely = model(made).logits.log_softmax(-1).amax(-1)[0, ids.shape[1] - 1 : -1]
    (line,) = (json.loads(one) for one in (tmp_path / "greedy.jsonl").read_text().splitlines()[1:2])
    assert line["kl"] == pytest.approx(-float(likely.mean()), rel=1e-4)


def test_a_file_is_gone_on_with_by_the_same_steps_alone(stepped: Any, tmp_path: Path) -> None:
    """By what a target holds, not by where it lies."""
    first, other = (target(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1))
    file, whole = tmp_path / "samples.jsonl", tmp_path / "whole.jsonl"
    kept = stepped(whole, Settings(refine=first, native=other))
    file.write_text("".join(whole.read_text().splitlines(True)[:3]))
    (tmp_path / "elsewhere.safetensors").write_bytes(Path(first).read_bytes())
    assert stepped(file, Settings(refine=str(tmp_path / "elsewhere.safetensors"), native=other)).texts == kept.texts
    assert timeless(file.read_bytes()) == timeless(whole.read_bytes())
    for settings, said in (
        (Settings(refine=other, native=other), r"steps\.refine\.sha256 must be"),
        (Settings(refine=first), r"steps\.native\.name must be \"made\", as in the file, got null"),
        (Settings(refine=first, native=other, bound=0.2), r"steps\.bound must be 0\.1, as in the file, got 0\.2"),
        (Settings(), r"steps\.refine\.name must be \"made\", as in the file, got null"),
    ):
        with pytest.raises(ValueError, match=rf"draw: .*{said}.*Name another folder, or delete"):
            stepped(file, settings)
    plain = tmp_path / "plain.jsonl"
    stepped(plain, Settings())
    assert "steps" not in json.loads(plain.read_text().splitlines()[0])
    with pytest.raises(ValueError, match=r"steps\.diversity must be null, as in the file, got 0\.1"):
        stepped(plain, Settings(diversity=0.1))


@pytest.mark.parametrize(("built", "other"), [(True, "torch"), (False, "AVX512")])
def test_a_file_is_gone_on_with_by_the_same_kernels_alone(
    stepped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool, other: str
) -> None:
    """Which may round a draw to another token; a finished one is read wherever."""
    if not built:
        monkeypatch.setattr(native, "MODULE", None)
    elif native.MODULE is None:
        pytest.skip(str(extension.REASON))
    file = tmp_path / "samples.jsonl"
    kept = stepped(file, Settings(diversity=0.1))
    own = native.MODULE.instruction_set() if built else "torch"
    assert kept.header.versions["kernels"] == own
    stepped(tmp_path / "plain.jsonl", Settings())
    assert "kernels" not in json.loads((tmp_path / "plain.jsonl").read_text().splitlines()[0])["versions"]
    lines = file.read_text().splitlines(True)
    header = json.loads(lines[0])
    header["versions"]["kernels"] = other
    lines[0] = json.dumps(header) + "\n"
    file.write_text("".join(lines))
    assert stepped(file, Settings(diversity=0.1)).texts == kept.texts
    file.write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match=rf'versions\.kernels must be "{other}", as in the file, got "{own}"'):
        stepped(file, Settings(diversity=0.1))
    assert native.instruction_set("H100") == "torch"


def test_steps_that_cannot_be(stepped: Any, model: Any, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    with pytest.raises(ValueError, match=r"hold no temperature with the likeliest token"):
        stepped(file, Settings(diversity=0.1), sampling=replace(SAMPLING, temperature=0.0))
    model.generation_config.typical_p = 0.9
    with pytest.raises(ValueError, match=r"draw: generation_config must set none of .* beside steps, .*got typical_p"):
        stepped(file, Settings(diversity=0.1))
    assert not file.exists()
    stepped(file, Settings(top_n_sigma=2.0), sampling=replace(SAMPLING, temperature=0.0))  # which reads no typical_p


@pytest.mark.filterwarnings("ignore")
def test_a_models_own_beams_are_none_of_the_draws(stepped: Any, model: Any, tmp_path: Path) -> None:
    """A text a row, whose entropy is its own."""
    made = stepped(tmp_path / "plain.jsonl", Settings(diversity=0.1))
    model.generation_config.num_beams = 3
    model.generation_config.min_p = 0.5
    file = tmp_path / "beams.jsonl"
    found = stepped(file, Settings(diversity=0.1))
    assert (found.texts, found.entropy, found.kl) == (made.texts, made.entropy, made.kl)
    assert timeless(file.read_bytes()) == timeless((tmp_path / "plain.jsonl").read_bytes())
    # a file from before they were left out: by what was never applied it is the same, by beams another
    header, *lines = file.read_text().splitlines(True)
    for own, same in (({"min_p": 0.5, "top_k": 20}, True), ({"num_beams": 3}, False)):
        old = json.loads(header)
        old["generation"] |= own
        file.write_text("".join([json.dumps(old) + "\n", *lines]))
        if same:
            assert stepped(file, Settings(diversity=0.1)).texts == made.texts
        else:
            with pytest.raises(ValueError, match=r"generation\.num_beams must be 3, as in the file, got null"):
                stepped(file, Settings(diversity=0.1))


def test_a_target_is_what_it_holds(tmp_path: Path) -> None:
    seeds = {"a": 0, "b": 0, "c": 1}
    one, other, third = (target(tmp_path / f"{name}.safetensors", seed) for name, seed in seeds.items())
    assert described(Settings(refine=one)) == described(Settings(refine=other))
    assert described(Settings(refine=one)) != described(Settings(refine=third))
    assert described(Settings(temperature=0.5, top_p=0.9)) == {}


def test_damage_is_named(drawing: Any, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    drawing(file)
    header, *lines = file.read_text().splitlines(True)
    first = json.loads(lines[0])

    def line(**changed: Any) -> str:
        return json.dumps({**first, **changed}) + "\n"

    cases = {
        "text\n": "line 1 must be readable JSON",
        "text": "the file must begin with a header line, got text",
        '{"format": "other"}\n': "format must be 'dft_kernels samples 1', got other",
        header + line(number=1): r"line 2.number must be 0, got 1",
        header + line(text=None): r"line 2.text must be text, got None",
        header + line(tokens=5): r"line 2.tokens must be an int of at least 0 and at most 4, got 5",
        header + line(seconds=-1.0): r"line 2.seconds must be a finite number of at least 0",
        header + line(more=1): r"line 2.'more' must be one of number, prompt",
        header + "[]\n": "line 2 must be an object",
        header + "".join(lines) + line(number=5): "the file must hold at most sampling.count, 5, texts, got 6",
        header + line(prompt="word9") + "".join(lines[1:]): "prompts must have the header's prompts_sha256",
    }
    for text, said in cases.items():
        file.write_text(text)
        for ask in (read, drawing):
            with pytest.raises(ValueError, match=rf"(draw|samples): .*samples.jsonl: {said}"):
                ask(file)
        assert file.read_text() == text
    file.write_bytes(header.encode() + lines[0].encode().replace(b"word1", b"word\xff"))
    with pytest.raises(ValueError, match=r"line 2.prompt must be text"):
        read(file)
    with pytest.raises(ValueError, match=r"samples: .*none.jsonl: the file must be there, got none. Draw them first"):
        read(tmp_path / "none.jsonl")
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"draw: .*must be a readable regular file, got a folder"):
        drawing(file)
    (tmp_path / "text").write_text("")
    with pytest.raises(
        ValueError, match=r"draw: .*text/a\.jsonl: the file must be writable, got .*Name another folder"
    ):
        drawing(tmp_path / "text" / "a.jsonl")


def test_bad_prompts(drawing: Any, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    with pytest.raises(ValueError, match=r"draw: prompts must be sampling.count, 5, got 4\. Give one for each text"):
        drawing(file, PROMPTS[:4])
    with pytest.raises(ValueError, match=r"draw: prompts\[1\] must hold a token, got ''\. Leave it out"):
        drawing(file, [PROMPTS[0], "", *PROMPTS[2:]])
    with pytest.raises(ValueError, match=r"draw: prompts must have, with sampling.length, at most 64 tokens"):
        drawing(file, sampling=replace(SAMPLING, length=64))
    for given in ({"batch": 0}, {"sampling": replace(SAMPLING, length=0)}):
        with pytest.raises(ValueError, match=r"draw: batch and sampling.length must be at least 1, got \("):
            drawing(file, **given)
    assert not file.exists()


def test_greedy_texts_need_no_seed(drawing: Any, tmp_path: Path) -> None:
    greedy = replace(SAMPLING, temperature=0.0)
    one = drawing(tmp_path / "one.jsonl", sampling=greedy)
    assert one.texts == drawing(tmp_path / "two.jsonl", sampling=replace(greedy, seed=9), batch=5).texts
