"""The installed package: report, build stamp, a machine without a compiler, and what the README promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dft_kernels
from dft_kernels import divergences
from dft_kernels.backends import extension
from dft_kernels.commands import main as cli

ROOT = Path(dft_kernels.__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_info_as_json_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["backends"]["reference"]["cpu"] == "available"
    assert report["default_memory_budget"]["cpu"] > 0
    assert report["extension"]["loaded"] == (report["extension"]["reason"] is None)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch:{'':36} {torch.__version__}"[:40] in text
    assert "backends.reference.cpu:" in text


def test_the_extension_is_built_and_says_of_what() -> None:
    """`make test` has just built it: a machine where this fails has no compiler, and its info says so."""
    assert extension.MODULE is not None, extension.REASON
    assert torch.__version__.startswith(extension.MODULE.build_info()["torch"].split("+")[0])


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inform"]) == 2
    assert (
        "COMMAND must be one of bench, capture, demo, gap, info, sample, store, target, train, got 'inform'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        (None, "never built"),
        ({"built": False, "reason": "no g++"}, r"could not be built \(no g\+\+\)"),
        ({"built": True, "torch": "1.0", "cuda": None}, r"built for torch 1\.0 .* this is torch"),
        ({"built": True, "torch": torch.__version__, "cuda": "9.9"}, r"CUDA 9\.9"),
    ],
)
def test_a_stamp_that_does_not_fit_says_how_to_rebuild(stamp: dict[str, object] | None, text: str) -> None:
    reason = extension.mismatch(stamp)
    assert reason is not None
    assert re.search(text, reason)
    assert "pip install --no-build-isolation -e ." in reason


def test_a_stale_stamp_warns_and_the_package_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "read_stamp", lambda: {"built": True, "torch": "1.0", "cuda": None})
    with pytest.warns(RuntimeWarning, match=r"built for torch 1\.0"):
        module, reason = extension.load()
    assert module is None
    assert reason is not None


def test_without_a_compiler_the_build_succeeds_and_leaves_the_reason(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(
        ROOT / "dft_kernels", tmp_path / "dft_kernels", ignore=shutil.ignore_patterns("*.so", "_build.json")
    )
    environment = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "was not built" in done.stdout
    code = "import dft_kernels.info as i; r = i.collect(); print(r['extension']['reason']); print(r['backends'])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "could not be built" in ran.stdout
    assert "'reference': {'cpu': 'available'}" in ran.stdout


def test_readme_names_everything() -> None:
    for name in divergences.TABLE:
        assert f"| `{name}" in README
    for name in ("TeacherLogits", "TeacherHead", "LogitStream"):
        assert f"{name}(" in README
    tree = README.split("## The tree")[1]
    folders = (ROOT / "dft_kernels", ROOT / "triton_ops")
    rooms = [p for folder in folders for p in folder.iterdir() if not p.name.startswith(("_", "."))]
    missing = [
        p.name for p in rooms if p.name.removesuffix(".so") == p.name and p.name != "py.typed" and p.name not in tree
    ]
    assert not missing


def test_readme_example_runs() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    names = {
        role: transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=size, intermediate_size=size, **shape))
        for role, size in (("model", 16), ("teacher", 24))
    }
    example = re.search(r"```python\n(.*?)```", README, re.S)
    assert example is not None
    scope = {"torch": torch, "ids": torch.randint(0, 64, (2, 9)), **names}
    exec(example[1], scope)
    assert float(scope["loss"].detach()) > 0
    assert names["model"].lm_head.weight.grad.abs().sum() > 0
    assert names["teacher"].lm_head.weight.grad is None
