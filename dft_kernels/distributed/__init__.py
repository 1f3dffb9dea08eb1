"""A vocabulary that lies over several processes: the statistics and gradients of its parts become those of the whole.

shards.py    how the vocabulary is divided over a process group, agreed on by its processes before a call runs
merging.py   row quantities of the whole out of those of the parts
sums.py      dhidden summed over processes, while the next chunk is computed
sharded.py   a backend over the columns of this process, out of any other
sequence.py  rows of one sequence over processes: labels, counts, hidden states
"""

from .sequence import count_labels, gather_rows, shift_labels

__all__ = ["count_labels", "gather_rows", "shift_labels"]
