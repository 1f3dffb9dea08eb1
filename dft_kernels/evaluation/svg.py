"""A canvas that becomes SVG within a page: drawn by matplotlib, coloured by the page's own variables.

Everything is placed in units of the picture, about a pixel of the page, since the page has fonts that matplotlib does
not know: it must measure no text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

TEXT = 12  # of every picture
COLOURS, TURNS = 8, 8
INK, MUTED, RULE, BAND, HUMAN, HUMAN_LINE, PAPER = (f"#fd00{at:02x}" for at in range(7))  # to be replaced
_VARIABLES = {
    **dict(zip((INK, MUTED, RULE, BAND, HUMAN, HUMAN_LINE, PAPER),
               ("ink", "muted", "rule", "band", "human", "human-line", "paper"), strict=True)),
    **{f"#fe00{at:02x}": f"model-{at}" for at in range(COLOURS)},
}  # fmt: skip
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "dft-kernels", "text.parse_math": False, "path.simplify": False}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


def _polygon(sides: int, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
    count = sides * (1 if inner == 1 else 2)
    sizes = [1.0 if inner == 1 or at % 2 == 0 else inner for at in range(count)]
    angles = [2 * math.pi * (at / count + turn) for at in range(count)]
    return [(size * math.sin(angle), size * math.cos(angle)) for size, angle in zip(sizes, angles, strict=True)]


SHAPES = (  # of markers: circle, square, triangle, diamond, triangle downwards, star, pentagon, cross
    _polygon(24, 0), _polygon(4, 1 / 8), _polygon(3, 0), _polygon(4, 0), _polygon(3, 1 / 2), _polygon(5, 0, 0.45),
    _polygon(5, 1 / 10), _polygon(4, 1 / 8, 0.4),
)  # fmt: skip

SIZES = (7.5, 6.8, 9, 9.5, 9, 11, 8.5, 8.5)  # across, so that none looks larger


def style(at: int) -> tuple[int, int]:
    """Colour and shape of a model: no two of the first 64 are alike."""
    return at % COLOURS, (at + at // COLOURS) % TURNS


def tint(at: int) -> str:
    """A model's colour, for `Picture`."""
    return f"#fe00{style(at)[0]:02x}"


def key(at: int) -> tuple[int, str]:
    """For a legend: a model's colour, and its marker as the points of an SVG polygon within -1..1."""
    colour, shape = style(at)
    return colour, " ".join(f"{x:.2f},{-y:.2f}" for x, y in SHAPES[shape])


@dataclass
class Picture:
    """A picture in its making: a canvas [0, width] x [0, height], y downwards."""

    width: float
    height: float
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(self.width / 72, self.height / 72))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, colour: str = INK, anchor: str = "left", **more: Any) -> None:
        """A line of text whose middle is at the height y."""
        self.axes.text(x, y, text, color=colour, fontsize=TEXT, ha=anchor, va="center_baseline", **more)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, **more: Any) -> None:
        """A line through points."""
        self.axes.plot(xs, ys, color=colour, **{"linewidth": 1, "solid_capstyle": "butt", **more})

    def box(self, left: float, top: float, right: float, bottom: float, colour: str, note: str = "") -> None:
        """A filled rectangle."""
        self.axes.fill([left, right, right, left], [top, top, bottom, bottom], color=colour, linewidth=0,
                       gid=self._noted(note))  # fmt: skip

    def mark(self, xs: Sequence[float], y: float, at: int, note: str) -> None:
        """A model's marker at the middle of xs = (low, value, high), or of (value,), with its interval."""
        shape = style(at)[1]
        self.axes.plot(
            xs, [y] * len(xs), color=tint(at), linewidth=1.6, solid_capstyle="butt", gid=self._noted(note),
            marker=SHAPES[shape], markersize=SIZES[shape], markevery=[len(xs) // 2],
            markeredgecolor=PAPER, markeredgewidth=0.6, clip_on=False,
        )  # fmt: skip

    def _noted(self, note: str) -> str | None:
        """The id of a thing that has a note, which a browser shows."""
        if not note:
            return None
        self.notes[f"note{len(self.notes)}"] = note
        return f"note{len(self.notes) - 1}"

    def svg(self, name: str, title: str, description: str, shown: str = "") -> str:
        """As text for a page in which no other picture has this name. shown: a class, such as "wide"."""
        file = io.StringIO()
        with warnings.catch_warnings():  # of characters that matplotlib's font lacks
            warnings.simplefilter("ignore")
            self.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
                                transparent=True)  # fmt: skip
        root = ElementTree.fromstring(file.getvalue())
        for defined in root.iter(f"{_SVG}defs"):  # matplotlib's rules for *, which would be the whole page's
            for sheet in defined.findall(f"{_SVG}style"):
                defined.remove(sheet)
        values = [value for one in root.iter() for value in one.attrib.values()]
        used = {name for value in values for name in re.findall(r"(?:^|url\()#(\w+)", value)}
        for one in root.iter():
            one.tag = one.tag.removeprefix(_SVG)
            note = self.notes.get(one.get("id", ""))
            if one.get("id") not in used:
                one.attrib.pop("id", None)
            if note is not None:
                first = ElementTree.Element("title")
                first.text = note
                one.insert(0, first)
            for attribute, value in [*one.attrib.items()]:
                del one.attrib[attribute]
                one.set("href" if attribute == _LINK else attribute, self._owned(name, attribute, value))
        root.attrib = {
            "viewBox": f"0 0 {self.width:g} {self.height:g}", "role": "img", "class": f"picture {shown}".strip(),
            "aria-labelledby": f"{name}-title {name}-desc",
        }  # fmt: skip
        for at, (tag, text) in enumerate((("title", title), ("desc", description))):
            one = ElementTree.Element(tag, id=f"{name}-{tag}")
            one.text = text
            root.insert(at, one)
        return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)

    @staticmethod
    def _owned(name: str, attribute: str, value: str) -> str:
        """An attribute with ids of this picture's and colours of the page's."""
        if attribute == "id":
            return f"{name}-{value}"
        value = re.sub(r"^#", f"#{name}-", value) if attribute == _LINK else value
        value = re.sub(r"url\(#", f"url(#{name}-", value)
        if attribute == "style":
            value = re.sub(r"font: [^;]*", "", value)  # the page's
            value = re.sub(r"#f[de]00[0-9a-f]{2}", lambda found: f"var(--{_VARIABLES[found[0]]})", value)
        if attribute in ("d", "x", "y", "transform"):
            value = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)
        return value


def plain() -> Any:
    """A context in which matplotlib draws as this module needs it, whatever the user's settings are."""
    import matplotlib

    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS, "backend": "agg"})
