"""examples/*.ipynb: committed without outputs, and each runs from its top to its end and shows what it says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import dft_kernels

FOLDER = Path(dft_kernels.__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", 4)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_without_outputs(name: str) -> None:
    found = notebook(name)
    nbformat.validate(found)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert found.cells[0].source.startswith("# ")
    assert set(found.metadata) == {"kernelspec", "language_info"}  # nothing of the machine that it was written on


def said(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that its cells print, run in a folder of its own; the kernel is reached by sockets in that folder."""
    monkeypatch.setenv("PYTHONPATH", os.fspath(FOLDER.parent))
    monkeypatch.chdir(folder)
    found = notebook(name)
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip="kernel")
    NotebookClient(found, km=manager, timeout=200).execute()
    outputs = [output for cell in found.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_the_loss_in_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said("loss_in_five_minutes", tmp_path, monkeypatch)
    usual, fused = re.findall(r"usual ([\d.]+), fused ([\d.]+)", text)[0]
    assert float(usual) == pytest.approx(float(fused), abs=1e-5)
    apart = [float(one) for one in re.findall(r"apart by (\S+) of", text)]
    assert len(apart) == 2
    assert max(apart) < 1e-5
    means = re.findall(r"(\w+_kl): token 1 ([\d.]+), token 3 ([\d.]+), token 6 ([\d.]+)", text)
    assert [one[0] for one in means] == ["forward_kl", "reverse_kl"]
    assert [float(x) for x in means[0][1:]] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert float(means[1][2]) > 0.95
    assert "teacher must have the model's vocabulary of 5000, got a vocabulary of 5008." in text


def test_distil_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said("distil_from_a_store", tmp_path, monkeypatch)
    assert re.search(r"64 sequences, \d+ distributions, \d+ bytes", text)
    losses = [float(one) for one in re.findall(r"epoch \d: loss ([\d.]+)", text)]
    assert len(losses) == 8
    assert losses[-1] < 0.2 * losses[0]


def test_look_at_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said("look_at_a_gap", tmp_path, monkeypatch)
    ratios = {name.strip(): float(ratio) for name, ratio in re.findall(r"own text  (.+?) +([\d.]+)$", text, re.M)}
    assert ratios["sentence_words, W1"] > 1.5
    assert ratios["punctuation_rate, L1"] > 1.5
    assert "own text: nothing to close" not in text
    assert len(re.findall(r"^(?:human prefixes|own text): \d+ of \d+ above", text, re.M)) == 2
