"""Draws docs/figures/divergences.svg: what each divergence makes of a model that cannot have both modes of its target.

    python docs/figures/divergences.py

The vocabulary is a line of 60 tokens. The target has two modes, of 0.6 and 0.4 of the mass. The model is a discrete
normal distribution, z_v = -(v - centre)^2 / (2 width^2), whose centre and width are fitted by `distribution_loss`, from
several starts, of which the one with the smallest loss is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dft_kernels import distribution_loss, divergences
from dft_kernels.divergences import Divergence

TOKENS = torch.arange(60, dtype=torch.float64)
SHOWN = (
    divergences.forward_kl(), divergences.reverse_kl(), divergences.total_variation(),
    divergences.jensen_shannon(0.1), divergences.jensen_shannon(0.5), divergences.jensen_shannon(0.9),
    divergences.alpha_divergence(2.0), divergences.alpha_divergence(0.5), divergences.alpha_divergence(-1.0),
    divergences.skew_kl(0.1), divergences.skew_reverse_kl(0.1), divergences.squared_hellinger(),
)  # fmt: skip


class Fit(NamedTuple):
    """A fitted model: its distribution q [V], the loss, and mean and standard deviation of q."""

    q: Tensor
    loss: float
    mean: float
    sd: float


def logits(centre: Tensor | float, width: Tensor | float) -> Tensor:
    """Of a discrete normal distribution, [V]."""
    return -((TOKENS - centre) ** 2) / (2 * width**2)


def target() -> Tensor:
    """The logits of the target, [V]: log p."""
    modes = torch.stack([logits(18.0, 3.0), logits(42.0, 3.0)]).log_softmax(-1)
    return torch.logsumexp(modes + torch.tensor([0.6, 0.4], dtype=torch.float64).log()[:, None], 0)


def moments(q: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a distribution over the tokens."""
    mean = (q * TOKENS).sum()
    return float(mean), float((q * (TOKENS - mean) ** 2).sum().sqrt())


def fit(divergence: Divergence) -> Fit:
    """The best of several starts: over one mode, over the other, over both."""
    found = [fit_from(start, divergence) for start in ((18.0, 3.0), (42.0, 3.0), (28.0, 12.0))]
    return min(found, key=lambda one: one.loss)


def fit_from(start: tuple[float, float], divergence: Divergence) -> Fit:
    """From one start, by L-BFGS over log centre and log width."""
    parameters = torch.tensor(start, dtype=torch.float64).log().requires_grad_()
    optimiser = torch.optim.LBFGS([parameters], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = distribution_loss(logits(*parameters.exp())[None], teacher=target()[None], divergence=divergence)
        loss.backward()
        return loss

    optimiser.step(closure)
    q = logits(*parameters.detach().exp()).softmax(-1)
    return Fit(q, float(closure().detach()), *moments(q))


def title(divergence: Divergence, found: Fit) -> str:
    """What a panel says."""
    entry = divergences.TABLE[divergence.name]
    with_parameter = f"({entry.parameter}={divergence.parameter:g})" if entry.parameter else ""
    return f"{divergence.name}{with_parameter}\nmean {found.mean:.1f}, sd {found.sd:.1f}, D {found.loss:.3f}"


def draw(file: Path) -> None:
    """All panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "divergences", "font.size": 8})
    figure, panels = plt.subplots(4, 3, figsize=(7.2, 6.4), sharex=True, sharey=True)
    p = target().softmax(-1)
    for panel, divergence in zip(panels.flat, SHOWN, strict=True):
        found = fit(divergence)
        panel.fill_between(TOKENS, p, color="0.78", linewidth=0, label="target p")
        panel.plot(TOKENS, found.q, color="#00796b", linewidth=1.5, label="model q")
        panel.set_title(title(divergence, found), fontsize=7)
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize=7, loc="upper right")
    for panel in panels[-1]:
        panel.set_xlabel("token")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
