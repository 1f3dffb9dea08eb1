"""Statistics of human writing as a target: counted from texts, blended, compared, kept on disk."""

from .blend import blend, style_vector
from .comparison import between
from .corpus import build, passages
from .target import About, Target
from .target_file import load, presets, save

__all__ = ["About", "Target", "between", "blend", "build", "load", "passages", "presets", "save", "style_vector"]
