"""What draws the texts of an evaluation: transformers' `generate`, and what else may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ..errors import fail
from ..models.heads import output_layer
from .sampling import DRAWN, Sampling, continuations, ends_of, own_settings, roll_out, without_end
from .settings import Settings
from .steps import Likeliest, Watch


@dataclass(frozen=True)
class Written:
    """What was drawn after a prompt. ids: without the end of the text; entropy, kl: means over these and the end, nats,
    of the distribution that was drawn from, and KL(it‖the model's own); None where no steps are in use, or not told."""

    ids: list[int]
    entropy: float | None = None
    kl: float | None = None


class Engine:
    """What draws the tokens of texts: transformers' `generate`, of a model in memory. Another one overrides all of it.

    name, device, versions: what a file of texts says they were drawn by."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def device(self) -> str:
        device = output_layer(self.model).weight.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def check(self, sampling: Sampling, settings: Settings) -> None:
        """ValueError for a way of sampling, or steps, that it has not."""
        if not settings.stepped:
            return
        settings.by(sampling).steps(self.tokenizer)
        own = own_settings(self.model, greedy=sampling.temperature == 0)
        for name in DRAWN:
            if name in own:
                relation = f"set none of {', '.join(DRAWN)} beside steps, which they would follow"
                fail("draw", "generation_config", relation, f"{name} {own[name]}", "Take it out of the model's")

    def start(self, tokens: int, batch: int) -> None:
        """Be ready for so many texts at a time, of so many tokens with their prompts."""

    def draw(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, settings: Settings, seed: int
    ) -> list[Written]:
        """What is drawn after each prompt, the same by the same seed. settings: its steps besides `sampling`."""
        model, tokenizer, length = self.model, self.tokenizer, sampling.length
        if not settings.stepped:
            made = continuations(model, tokenizer, prompts, length, seed, **sampling.keywords())
            return [Written(ids) for ids in made]
        watch, ends = Watch(), ends_of(model, tokenizer)
        steps = settings.by(sampling).steps(tokenizer, ends)
        steps = watch.around([*steps, Likeliest()] if settings.by(sampling).greedy else steps)
        # of the scores that the steps leave, temperature among them
        plain = Sampling(temperature=float(sampling.temperature > 0)).keywords()
        drawn = roll_out(
            model, prompts, length, ends, seed, logits_processor=transformers.LogitsProcessorList(steps), **plain
        ).target
        rows = [[token for token in row if token >= 0] for row in drawn.tolist()]
        entropy, kl = (torch.stack(of, 1).double().cpu() for of in (watch.entropy, watch.kl))  # [B, T]
        return [
            Written(ids, *(float(of[at, : len(row)].mean()) for of in (entropy, kl)))
            for at, (ids, row) in enumerate(zip(without_end(rows, ends), rows, strict=True))
        ]

    def close(self) -> None:
        """Free what `start` took; it may be started again."""
