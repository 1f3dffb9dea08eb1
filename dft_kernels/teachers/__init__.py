"""Teachers: the target distribution of each chunk of rows."""

from .head import TeacherHead
from .logits import TeacherLogits
from .mixture import Labels, Mixture
from .served import ServedTeacher
from .stream import LogitStream
from .top_k import TopK

__all__ = ["Labels", "LogitStream", "Mixture", "ServedTeacher", "TeacherHead", "TeacherLogits", "TopK"]
