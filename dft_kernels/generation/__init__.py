"""Text drawn by a model, and steps that change what is drawn."""

from .refiner import IterativeRefiner, Refined
from .steps import Step, Watch, ordered, warpers
from .style import StyleShift
from .temperature import Diversity, EntropyTemperature
from .truncation import TopNSigma

__all__ = [
    "Diversity",
    "EntropyTemperature",
    "IterativeRefiner",
    "Refined",
    "Step",
    "StyleShift",
    "TopNSigma",
    "Watch",
    "ordered",
    "warpers",
]
