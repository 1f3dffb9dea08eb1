"""An invented evaluation, as rich as a real one: for tests of the page that shows it, never a result."""

from __future__ import annotations

import math
import random

from dft_kernels.evaluation.results import (
    DIFFERENCE,
    DISTANCE,
    LEVEL,
    About,
    Accuracy,
    Evaluated,
    Evaluation,
    Phrase,
    Score,
    Slice,
    Swept,
    Text,
    Value,
)
from dft_kernels.generation.sampling import Sampling
from dft_kernels.targets.punctuation import CLASSES

TABLE = {  # group: metrics (name, kind, unit, human statistic)
    "tokens": [("token L2, n = 1", DISTANCE, "", 0.0), ("token L2, n = 2", DISTANCE, "", 0.0),
               ("token L2, n = 3", DISTANCE, "", 0.0), ("Jensen-Shannon of tokens", DISTANCE, "nats", 0.0)],
    "embeddings": [("MMD², half bandwidth", DISTANCE, "", 0.0), ("MMD², median bandwidth", DISTANCE, "", 0.0),
                   ("MMD², double bandwidth", DISTANCE, "", 0.0), ("1 − MAUVE", DISTANCE, "", 0.0)],
    "diversity": [("distinct-1", DIFFERENCE, "share", 0.42), ("distinct-2", DIFFERENCE, "share", 0.81),
                  ("distinct-3", DIFFERENCE, "share", 0.95), ("MATTR", DIFFERENCE, "share", 0.78),
                  ("MTLD", DIFFERENCE, "tokens", 84.0), ("self-BLEU", DIFFERENCE, "", 0.21),
                  ("compression ratio", DIFFERENCE, "", 2.31)],
    "sentences": [("sentence length, mean", DIFFERENCE, "words", 18.4),
                  ("sentence length, SD", DIFFERENCE, "words", 11.2),
                  ("sentence length, Wasserstein-1", DISTANCE, "words", 0.0), ("burstiness", DIFFERENCE, "", -0.24),
                  ("three sentences in a row with the same opening", DIFFERENCE, "share of sentences", 0.011),
                  ("paragraph length, mean", DIFFERENCE, "sentences", 4.1)],
    "punctuation": [(f"{name.replace('_', ' ')} rate", DIFFERENCE, "per 1,000 words", 3.0 + 4 * at)
                    for at, name in enumerate(CLASSES)]
    + [("gaps between marks, Wasserstein-1", DISTANCE, "words", 0.0), ("transitions of marks", DISTANCE, "nats", 0.0)],
    "words": [("word length, mean", DIFFERENCE, "letters", 4.31), ("over-used phrases", DIFFERENCE, "share", 0.0)],
    "likelihood": [("entropy gap", DIFFERENCE, "nats", 3.1), ("calibration", DISTANCE, "nats", 0.0),
                   ("perplexity on human text", LEVEL, "", 0.0), ("bits per byte of human text", LEVEL, "bits", 0.0),
                   ("accuracy of the next token", LEVEL, "share", 0.0)],
}  # fmt: skip
NAMES = ["SmolLM2-135M-Instruct", "runs/dft-token-l2", "runs/dft-mixture-rollouts/checkpoint-1500", "runs/sft-baseline"]
WRITING = (
    "The morning came up grey over the harbour, and a testament to the old trade stood rotting at the end of the pier. "
    "She had not slept. It is worth noting that nobody had asked her to wait; still, she waited, as people do when "
    "there is nothing else to be done. In the end the boat was late: an hour, then two. “You might have gone home,” he "
    "said. She might have. A tapestry of small lights trembled on the water — some of them moving.\n\n"
    "They walked up in silence, past the nets, past the shuttered shops, and neither said what both were thinking. "
)
PHRASES = ("testament to", "it is worth noting", "in the end", "tapestry of", "nestled", "a sense of", "not just",
           "delve into", "moreover", "whispered", "shivers down", "barely above a whisper", "the weight of",
           "couldn't help but", "as if", "bustling", "intricate", "vibrant", "ministrations", "unwavering")  # fmt: skip
RARE = ("said", "ain't", "presently", "well", "damn", "o'clock", "sort of", "I suppose", "upon my word", "anyhow")


def _values(draw: random.Random, strength: float) -> list[Value]:
    found = []
    for name, kind, _, human in (metric for group in TABLE.values() for metric in group):
        if kind == LEVEL:
            level = 18.0 + 3 * draw.random() if "perplexity" in name else 0.3 + 0.4 * draw.random()
            found.append(Value(name, level, 0.97 * level, 1.03 * level, None, level, None, None, 200, ""))
            continue
        if name == "paragraph length, mean" or (name == "1 − MAUVE" and strength < 1):
            found.append(Value(name, None, None, None, None, None, human, None, 3, "too few documents: 3 of 20"))
            continue
        floor = (abs(human) or 0.05) * 0.04
        ratio = strength * math.exp(1.3 * draw.gauss(0, 1)) * (1 if kind == DISTANCE else draw.choice((-1, 1)))
        value, half = floor * ratio, floor * (0.35 + 0.12 * abs(ratio))
        low = max(0.0, value - half) if kind == DISTANCE else value - half
        model = None if kind == DISTANCE else human + value
        p = min(1.0, math.exp(-2 * abs(ratio))) if "MMD" in name else None
        found.append(
            Value(name, value, low, value + half, floor, model, None if kind == DISTANCE else human, p, 200, "")
        )
    return found


def _phrases(draw: random.Random, strength: float) -> list[Phrase]:
    found = []
    for at, phrase in enumerate(PHRASES):
        ratio = 1 + strength * 14 / (1 + at) * (0.6 + 0.8 * draw.random())
        found.append(
            Phrase(phrase, ratio, ratio * 0.7 - 0.1, ratio * 1.4, int(40 * ratio / (1 + at)) + 3, 40 // (1 + at))
        )
    for at, phrase in enumerate(RARE):
        ratio = 0.1 + 0.06 * at
        found.append(Phrase(phrase, ratio, ratio * 0.5, ratio * 1.6, 3 + at, int((3 + at) / ratio)))
    return found


def _lengths(mean: float, spread: float) -> list[float]:
    weights = [0.0] + [math.exp(-((math.log(w) - math.log(mean)) ** 2) / (2 * spread**2)) / w for w in range(1, 101)]
    return [one / sum(weights) for one in weights]


def _slices(draw: random.Random) -> list[Slice]:
    found = []
    for first, second in (("he", "she"), ("Emily, Anne", "Lakisha, Aisha"), ("fiction", "news")):
        for at, metric in enumerate(("MATTR", "sentence length, mean", "comma rate", "perplexity on human text")):
            whose = ("model", "target", "", "")[(at + draw.randrange(2)) % 4]
            whose = "model" if whose == "target" and first == "he" else whose
            theirs = {"model": 0.0, "target": 0.6, "": 0.0}[whose] + draw.gauss(0, 0.03)
            mine = theirs + (0.7 if whose == "model" else 0.0) + draw.gauss(0, 0.03)
            human = (None, None, None) if first == "he" else (theirs, theirs - 0.2, theirs + 0.2)
            found.append(Slice(first, second, metric, [96, 104], mine, mine - 0.3, mine + 0.3, *human, whose))
    return found


def model(name: str, strength: float, seed: int, cost: float = 0.0) -> Evaluated:
    """strength: how far from people, in floors."""
    draw = random.Random(seed)
    texts = []
    for at in range(12):
        words = WRITING.split(" ")
        turned = words[7 * at % len(words) :] + words[: 7 * at % len(words)]
        written = " ".join([*turned[: 90 - seed], "Moreover, it is worth\nnoting", *turned[90 - seed :]])
        texts.append(Text(" ".join(WRITING.split()[at : at + 24]), written, " ".join(turned)))
    parts = {
        one: max(0.02, min(1.0, math.exp(-strength * draw.random())))
        for one in (
            "MATTR",
            "distinct-2",
            "sentence length, SD",
            "burstiness",
            "comma rate",
            "dash rate",
            "entropy gap",
        )
    }
    score = 100 * sum(parts.values()) / len(parts)
    skew = [1 + 0.25 * strength * draw.uniform(-1, 1) for _ in CLASSES]
    marks = [max(0.001, one * by) for one, by in zip(HUMAN_MARKS, skew, strict=True)]
    tasks = {"lambada": 0.42, "hellaswag": 0.43, "arc-easy": 0.58, "arc-challenge": 0.29}
    return Evaluated(
        name, Sampling(seed=17), _values(draw, strength), Score(score, score - 5, min(100.0, score + 5), parts),
        [Accuracy(task, 1000, {"lambada": 5153, "hellaswag": 10042}.get(task, 2376), at - cost * (1 + n), 0.0155,
                  None if task == "lambada" else at + 0.02) for n, (task, at) in enumerate(tasks.items())],
        _phrases(draw, strength), texts, _slices(draw),
        [] if seed else [Swept(Sampling(0.7), 2.1, 11), Swept(Sampling(), 3.2, 19), Swept(Sampling(1.2), None, 0)],
        {"sentence words": _lengths(16 + strength, 0.7 - 0.06 * strength),
         "punctuation": [x / sum(marks) for x in marks]},
        {"generation seconds": 412.5 - seed, "tokens per second": 62.1 + seed, "parameters": 134515008.0,
         "peak memory bytes": 1.21e9},
        {"generation": {"repetition_penalty": 1.1}} if seed else {},
    )  # fmt: skip


HUMAN_MARKS = [0.43, 0.03, 0.02, 0.05, 0.27, 0.03, 0.02, 0.09, 0.05, 0.01]


def evaluation(models: int = 4, note: str = "") -> Evaluation:
    """As many models as there are NAMES at most: the first far from people, the others nearer. note: a setting."""
    made = [model(NAMES[at], (4.0, 1.4, 0.5, 3.0)[at], at, (0.0, 0.004, 0.02, 0.012)[at]) for at in range(models)]
    abouts = [
        About(name, group, kind, unit, "|f_model − f_human|₂, f = counts / their sum" if kind == DISTANCE else
              "statistic(model) − statistic(human)", "arXiv:2102.01454" if "MAUVE" in name else "Covington 2010")
        for group, those in TABLE.items() for name, kind, unit, _ in those
    ]  # fmt: skip
    settings = {
        "human": ["fiction.jsonl", "essays.jsonl"], "human_sha256": "9f2c" * 16, "tokenizer": "7ab1" * 16,
        "encoder": "all-MiniLM-L6-v2", "count": 200, "prompt": 32, "length": 128, "seed": 17, "note": note,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.3"}, "permutations": 1000,
    }  # fmt: skip
    return Evaluation(
        "0.1.0", "2026-01-01T12:00:00+00:00", settings, abouts, made, [68.0, 81.0, 92.0],
        {"sentence words": _lengths(15, 0.75), "punctuation": HUMAN_MARKS},
    )  # fmt: skip
