"""How text is drawn, as one value: what `dft-kernels sample` and `play` are told, and the steps that it stands for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import LogitsProcessor

from ..errors import fail
from ..targets import target_file
from ..targets.target import Target
from .refiner import TOWARDS, IterativeRefiner, check_towards
from .sampling import Sampling
from .steps import ordered, warpers
from .stream import Stream
from .style import StyleShift
from .temperature import Diversity, EntropyTemperature
from .truncation import TopNSigma

COLDEST = 0.01  # temperature: below it scores overflow


@dataclass(frozen=True)
class Settings:
    """How text is drawn; the defaults leave the model as it is. Targets are files or presets by name.

    temperature: of all tokens; 0: the likeliest token
    top_p, min_p, top_n_sigma: what is left of each distribution; of top_n_sigma None is all
    diversity, entropy_temperature: at most one of them: `Diversity`'s d, `EntropyTemperature`'s theta
    style: a target and gamma; style_base: what it leads from: `StyleShift`
    refine: a target; bound: nats a token; native: the model's own statistics; towards: which ones: `IterativeRefiner`
    beams: of beam search, which draws nothing; 1: none

    `steps` raises ValueError for what does not go together.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_n_sigma: float | None = None
    diversity: float = 0.0
    entropy_temperature: float = 0.0
    style: tuple[str, float] | None = None
    style_base: str = "reference"
    refine: str | None = None
    bound: float = 0.1
    native: str | None = None
    towards: tuple[str, ...] = TOWARDS
    beams: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "towards", tuple(self.towards))  # a list, out of JSON or of flags
        if 0 < self.temperature < COLDEST:
            fail(
                "Settings", "temperature", f"be 0 or at least {COLDEST:g}", self.temperature, "0 is the likeliest token"
            )
        if self.native is not None and self.refine is None:
            fail("Settings", "native", "come with refine", "none", "Name a target to refine towards")
        if self.towards != TOWARDS and self.refine is None:
            fail("Settings", "towards", "come with refine", "none", "Name a target to refine towards")
        check_towards("Settings", self.towards, self.native)
        if self.style is None and self.style_base != Settings.style_base:
            fail("Settings", "style_base", "come with style", "none", "Name a target, as literary=0.5")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: temperature 0."""
        return self.temperature == 0

    @property
    def plain(self) -> Settings:
        """The model as it is, drawn or searched in the same way: what these settings are compared with."""
        return Settings(temperature=0.0 if self.greedy else 1.0, beams=self.beams)

    @property
    def stepped(self) -> bool:
        """Whether there is a step besides temperature, top_p and min_p."""
        given = (self.top_n_sigma, self.style, self.refine)
        return bool(self.diversity or self.entropy_temperature) or any(one is not None for one in given)

    def by(self, sampling: Sampling) -> Settings:
        """These, with the temperature, top_p and min_p of a way of sampling."""
        return replace(self, temperature=sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p)

    def steps(self, tokenizer: Any, ends: Sequence[int] = ()) -> list[LogitsProcessor]:
        """The processors of scores, in their order, new ones; none for the defaults. ends: `sampling.ends_of`, of a
        model that has others than its tokenizer. ValueError for a target of another
        tokenizer, or without what is needed of it, and for what `ordered` refuses: two temperatures, one with beams or
        the likeliest token."""
        made: list[LogitsProcessor] = []
        if self.style is not None:
            target, base = _target("style", self.style[0], tokenizer), _target("style_base", self.style_base, tokenizer)
            made.append(StyleShift(target, base, self.style[1], tokenizer.all_special_ids))
        made += warpers(1.0 if self.greedy else self.temperature, self.top_p, self.min_p)
        if self.top_n_sigma is not None:
            made.append(TopNSigma(self.top_n_sigma))
        if self.entropy_temperature:
            made.append(EntropyTemperature(self.entropy_temperature))
        if self.diversity:
            made.append(Diversity(self.diversity))
        if self.refine is not None:
            target = _target("refine", self.refine, tokenizer)
            native = None if self.native is None else _target("native", self.native, tokenizer)
            made.append(IterativeRefiner(target, tokenizer, native, self.bound, towards=self.towards, ends=ends))
        return list(ordered(made, beams=self.beams, sample=self.beams == 1 and not self.greedy))

    def flags(self) -> list[str]:
        """Those of `dft-kernels sample` that differ from its defaults."""
        made = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "towards":
                made += ["--towards", *value]
                continue
            text = f"{value[0]}={value[1]!r}" if isinstance(value, tuple) else str(value)
            made += _flag(field.name, text)
        return made

    def command_line(self, model: str, prompt: str, *, length: int, seed: int, base: str | None = None) -> str:
        """The line of a shell that draws the same text."""
        words = ["dft-kernels", "sample", model, *(["--base", base] if base is not None else [])]
        words += [*_flag("prompt", prompt), "--length", str(length), "--seed", str(seed)]
        return shlex.join([*words, *self.flags()])


def described(settings: Settings) -> dict[str, Any]:
    """The steps besides temperature, top_p and min_p, as a file says what its texts depend on: a target by its own name
    and the sha256 of its content, wherever its file lies. {} without any. ValueError for a target that cannot be
    read."""
    found: dict[str, Any] = {}
    if settings.style is not None:
        name, gamma = settings.style
        found |= {"style": {**_content(name), "gamma": gamma}, "style_base": _content(settings.style_base)}
    if settings.top_n_sigma is not None:
        found["top_n_sigma"] = settings.top_n_sigma
    for name in ("entropy_temperature", "diversity"):
        if value := getattr(settings, name):
            found[name] = value
    if settings.refine is not None:
        found |= {"refine": _content(settings.refine), "bound": settings.bound, "towards": list(settings.towards)}
        if settings.native is not None:
            found["native"] = _content(settings.native)
    return found


def said(steps: Mapping[str, Any]) -> str:
    """What `described` has found, for a reader; "" of {}."""
    made = []
    if "style" in steps:
        made.append(f"style {steps['style']['name']} {steps['style']['gamma']:g}")
    for name, sign in (("top_n_sigma", ""), ("entropy_temperature", ""), ("diversity", "+")):
        if name in steps:
            made.append(f"{name.replace('_', '-')} {steps[name]:{sign}g}")
    if "refine" in steps:
        towards = steps["towards"]
        of = "" if towards == list(TOWARDS) else f" in {' and '.join(towards)}"
        alone = "" if "native" in steps else ", without native"
        made.append(f"refined to {steps['refine']['name']}{of}, {steps['bound']:g} nats{alone}")
    return ", ".join(made)


def _content(file: str) -> dict[str, str]:
    target = target_file.load(file)
    return {"name": target.about.name, "sha256": target_file.fingerprint(target)}


@dataclass(frozen=True)
class Record:
    """A text and all that it depends on, a line of JSON. tokens: of the text; entropy, kl: means over these and the
    end, nats (`Drawn`); None of beams, which draw none."""

    model: str
    prompt: str
    text: str
    tokens: int
    entropy: float | None
    kl: float | None
    length: int
    seed: int
    settings: dict[str, Any]


def recorded(model: str, prompt: str, settings: Settings, stream: Stream, row: int = 0) -> Record:
    """The record of a stream's text as it is now. model, prompt: as they are to be called."""
    drawn, text, tokens = stream.drawn[row], stream.texts()[row], len(stream.written()[row])
    entropy = sum(one.entropy for one in drawn) / len(drawn) if drawn else None
    kl = sum(one.kl for one in drawn) / len(drawn) if drawn else None
    return Record(model, prompt, text, tokens, entropy, kl, stream.length, stream.seed, asdict(settings))


def _flag(name: str, text: str) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _target(name: str, file: str, tokenizer: Any) -> Target:
    """A target; an error names the setting that gave it."""
    try:
        return target_file.load(file, tokenizer)
    except ValueError as error:
        raise ValueError(f"Settings: {name}: {str(error).removeprefix('target: ')}") from error
