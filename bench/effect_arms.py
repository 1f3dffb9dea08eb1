"""What the study of docs/effect.md has registered: its sizes, its texts, its metrics, its arms and its bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS, BATCH, LENGTH, WARMUP = 300, 4, 128, 10
HELD_OUT = 64  # sequences
PROMPT, COUNT = 32, 200  # tokens; texts of an arm
RATES, PILOT = ("5e-5", "1e-4", "2e-4", "4e-4"), 40
RATE = "2e-4"  # by the pilot: 3.578, 3.530, 3.515, 3.589
NOVELS = {  # of Debian's r-cran-janeaustenr, in its order
    "emma": "train", "mansfield": "test", "northanger": "train", "persuasion": "train", "pride": "train",
    "sense": "validation",
}  # fmt: skip
NAMED = (
    "token L2, 1-grams", "token L2, 2-grams", "token L2, 3-grams", "MMD², embeddings", "sentence length, W1",
    "punctuation rates, L1", "distinct-2", "burstiness",
)  # fmt: skip
TERMS = ("token_l2", "sentence_length", "punctuation_rate", "punctuation_gap", "ngrams")
TASKS, QUESTIONS = ("lambada", "arc_easy", "arc_challenge"), 500
SFT, BEST = "SFT", "SFT, best sampling"


def _terms(weight: str, target: str = "{folder}/target.safetensors") -> tuple[str, ...]:
    return ("--target", target, "--terms", *(f"{name}={weight}" for name in TERMS))


_TOWARDS = _terms("0.5x")
_ROLLOUTS = (
    *_TOWARDS, "--rollout_terms", *(f"{name}=0.5x" for name in TERMS[:-1]), "reference_kl=0.02",
    "--rollout_every", "4", "--rollout_samples", "4",
)  # fmt: skip
_WHOLE_TEXTS = (
    "--target", "{folder}/target.safetensors", "--rollout_terms", "text_mmd=0.5x", "reference_kl=0.02",
    "--rollout_every", "4", "--rollout_samples", "4",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """flags: of dft-kernels train, beside those of all; None: not trained. text: what on; model: from what start.
    of: the arm whose models it takes; sampled: as validation found best; refined: towards the target, at inference;
    tested: False of what only others need. beside: the arm that it is compared with; tried: whether the comparison is
    one of the study's family, and not of a start or a control. witness: the arm against whose texts those that it is
    trained on are chosen."""

    name: str
    flags: tuple[str, ...] | None = ()
    seeds: int = 1
    steps: int = STEPS
    text: str = "train"
    model: str = "smollm2"
    of: str | None = None
    sampled: bool = False
    refined: bool = False
    tested: bool = True
    beside: str = BEST
    tried: bool = True
    witness: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What is asked of its models: nothing that they were trained on."""
        return tuple(task for task in TASKS if task != self.text) if self.of is None else ()

    @property
    def takes(self) -> tuple[str, ...]:
        """Arms whose models it draws from, or is taught by."""
        words = " ".join(self.flags or ())
        return tuple(name for name in BY_NAME if name in (self.of, self.witness) or f"/models/{name}-" in words)


ARMS = (
    Arm("start", None, tried=False),
    Arm(SFT, seeds=3, tried=False),
    Arm(BEST, None, seeds=3, of=SFT, sampled=True, tried=False),
    Arm("terms", _TOWARDS, seeds=3),
    Arm("LAMBADA: SFT", text="lambada", beside="LAMBADA: SFT", tried=False),
    Arm("LAMBADA: terms", _TOWARDS, text="lambada", beside="LAMBADA: SFT"),
    Arm("rollouts", _ROLLOUTS, seeds=3),
    Arm("LAMBADA: rollouts", _ROLLOUTS, text="lambada", beside="LAMBADA: SFT"),
    Arm("constraint", _terms("floor")),
    Arm("beyond", _terms("0.5x", "{folder}/beyond.safetensors")),
    Arm("SFT, longer", steps=2 * STEPS, tested=False, tried=False),
    Arm("distilled", ("--teacher", "{folder}/models/SFT, longer-0")),
    Arm("refined", None, of=SFT, refined=True),
    Arm("terms, refined", None, of="terms", refined=True),
    Arm("Gemma: start", None, model="gemma3", beside="Gemma: SFT", tried=False),
    Arm("Gemma: SFT", model="gemma3", beside="Gemma: SFT", tried=False),
    Arm("Gemma: terms", _terms("0.5x", "{folder}/target-gemma3.safetensors"), model="gemma3", beside="Gemma: SFT"),
    # mendings, a family of their own
    Arm("mended: witness", text="witness", witness=SFT, beside=SFT),
    Arm("mended: longer means", (*_ROLLOUTS, "--terms_decay", "0.97"), beside=SFT),
    Arm("mended: whole texts", _WHOLE_TEXTS, beside=SFT),
    Arm("mended: constraint", _terms("floor"), beside=SFT),  # by an AtMost that does not wind up
)
BY_NAME = {arm.name: arm for arm in ARMS}


def bar(rows: list[dict[str, Any]], costs: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Of every arm of the same kind: metrics halved, points of retention and time of a step over SFT's, both of the
    models that it takes, and whether all three parts of the bar are met; None where a part was not measured."""
    out = {}
    for arm in dict.fromkeys(row["arm"] for row in rows if row["beside"] == BEST and row["tried"]):
        its = [row for row in rows if row["arm"] == arm]
        source = BY_NAME[arm].of or arm
        halved = sum(row["halved"] for row in its)
        kept = {row["arm"]: row["retention"] for row in rows}.get(source, "")
        kept = None if kept == "" else kept
        time = 1.0 if source == SFT else costs.get(source)
        parts = (halved >= 5, None if kept is None else kept >= -1, None if time is None else time <= 1.05)
        met = False if False in parts else None if None in parts else True
        out[arm] = {"halved": halved, "retention": kept, "time": time, "met": met}
    return out
