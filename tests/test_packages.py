"""What is published beside the code, and what is put into packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import dft_kernels
from dft_kernels import targets
from dft_kernels.commands.main import COMMANDS

ROOT = Path(dft_kernels.__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
INSTALL = (ROOT / "docs" / "install.md").read_text()
SETUP = (ROOT / "setup.py").read_text()


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_there_is_one_version() -> None:
    citation = read("CITATION.cff")
    assert re.findall(r'^version = "(.*)"$', PROJECT, re.M) == [dft_kernels.__version__] == [citation["version"]]
    assert re.fullmatch(r"\d+\.\d+\.\d+", dft_kernels.__version__)


def test_the_oldest_python_that_is_promised_runs_the_tests() -> None:
    jobs = read(".github/workflows/test.yml")["jobs"]
    (oldest,) = {jobs[name]["strategy"]["matrix"]["python"][0] for name in ("test", "wheel")}
    assert re.findall(r'^requires-python = ">=(.*)"$', PROJECT, re.M) == [oldest]
    assert re.findall(r'^target-version = "py(.)(.*)"$', PROJECT, re.M) == [tuple(oldest.split("."))]
    assert re.findall(r'^python_version = "(.*)"$', PROJECT, re.M) == [oldest]
    assert f"needs Python {oldest} " in INSTALL


def test_the_install_page_has_every_extra() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", INSTALL.split("## Optional packages")[1].split("\n## ")[0], re.M)
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)\n\n", PROJECT, re.M | re.S)
    assert extras is not None
    assert sorted(listed) == sorted(re.findall(r"^(\w+) = ", extras[1], re.M))
    others = [name for name, one in COMMANDS.items() if not one.needs or one.extra == "bench"]
    said = re.search(r"all commands but (.*) \|$", INSTALL, re.M)
    assert said is not None
    assert sorted(re.findall(r"`(\w+)`", said[1])) == sorted(others)


def test_there_is_one_licence() -> None:
    assert 'license = "Apache-2.0"' in PROJECT  # an SPDX expression
    assert read("CITATION.cff")["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_every_preset_has_the_licence_of_its_text() -> None:
    text = (ROOT / "dft_kernels" / "targets" / "presets" / "LICENSES.txt").read_text()
    listed = dict(re.findall(r"^\| `(.*?)` \|.*\| (.*) \|$", text, re.M))
    assert listed == {name: targets.load(name).about.licence for name in targets.presets()}


def test_the_build_asks_for_the_torch_that_the_package_does() -> None:
    assert f"OLDEST_TORCH = {dft_kernels.OLDEST_TORCH}" in SETUP


def test_the_workflow_runs_what_ci_does() -> None:
    workflow = read(".github/workflows/test.yml")
    assert [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step] == ["bash .ci/run"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    (made,) = [step["run"] for step in workflow["jobs"]["wheel"]["steps"] if "run" in step]
    goals = made.split(" TORCH")[0].split()[1:]
    assert all(re.search(rf"^{goal}:", (ROOT / "Makefile").read_text(), re.M) for goal in goals)


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_an_issue_template_has_fields(name: str) -> None:
    template = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert template["name"]
    assert template["description"]
    assert len({field["id"] for field in template["body"]}) == len(template["body"]) >= 2


def test_the_source_distribution_has_what_a_build_and_a_reader_read_and_nothing_built(tmp_path: Path) -> None:
    """Without torch: whoever makes one may have none."""
    names = {
        *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md"),
        *("SECURITY.md", "CHANGELOG.md", "mkdocs.yml"),
    }
    folders = ("csrc", "dft_kernels", "triton_ops", "docs", "examples", "bench")
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dft_kernels" / "_build.json").write_text("{}")
    (tmp_path / "dft_kernels" / "_C.so").touch()
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['-q', 'sdist']; runpy.run_path('setup.py')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with tarfile.open(tmp_path / "dist" / f"dft_kernels-{dft_kernels.__version__}.tar.gz") as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
        described = packed.extractfile(f"dft_kernels-{dft_kernels.__version__}/PKG-INFO")
        assert described is not None
        assert b"Requires-Dist: torch>=2.11\n" in described.read()
    whole = (path for folder in folders[:-1] for path in (ROOT / folder).rglob("*") if path.is_file())
    needed = {path.relative_to(ROOT).as_posix() for path in whole} | names
    assert {name for name in needed if not re.search(r"__pycache__|\.so$|_build\.json$", name)} <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc", "_build.json")) or name.startswith("tests")]
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).resolve().relative_to(ROOT).as_posix() in inside, f"{page.name}: {link}"
