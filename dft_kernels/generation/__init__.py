"""Text drawn by a model, and steps that change what is drawn."""

from .refiner import IterativeRefiner, Refined
from .settings import Record, Settings, recorded
from .steps import Step, Watch, ordered, warpers
from .stream import Drawn, Stream
from .style import StyleShift
from .temperature import Diversity, EntropyTemperature
from .truncation import TopNSigma

__all__ = [
    "Diversity",
    "Drawn",
    "EntropyTemperature",
    "IterativeRefiner",
    "Record",
    "Refined",
    "Settings",
    "Step",
    "Stream",
    "StyleShift",
    "TopNSigma",
    "Watch",
    "ordered",
    "recorded",
    "warpers",
]
