"""Statistics of human writing as a target: counted, blended, kept on disk."""

from .target import About, Target
from .target_file import load, presets, save

__all__ = ["About", "Target", "load", "presets", "save"]
