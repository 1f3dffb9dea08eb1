"""The notebooks of examples/ as pages: text as it is, code in fences. They are committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / "examples"
FILES = sorted(FOLDER.glob("*.ipynb"))


def places() -> dict[str, str]:
    """The pages of the notebooks, by their paths in the repository."""
    return {f"examples/{path.name}": f"notebooks/{path.stem}.md" for path in FILES}


def pages() -> dict[str, str]:
    """Their text, by page."""
    return {f"notebooks/{path.stem}.md": page(path) for path in FILES}


def page(path: Path) -> str:
    """Of one."""
    cells = json.loads(path.read_text())["cells"]
    parts = [
        ("{}" if cell["cell_type"] == "markdown" else "```python\n{}\n```").format("".join(cell["source"]))
        for cell in cells
    ]
    return "\n\n".join(parts) + f"\n\nThe notebook is `examples/{path.name}`; a test runs it.\n"
