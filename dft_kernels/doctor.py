"""What is wrong with an installation, and the line that mends each: `dft-kernels doctor`.

Nothing here needs torch to be importable or the package to be whole: what an import raises is a finding.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import OLDEST_TORCH, __version__, require_torch

_ROOT = Path(__file__).parent
_NEEDED_FOR = {  # the extras that users choose between
    "finetune": "training, stores, targets and most commands",
    "evaluate": "dft-kernels evaluate and report",
    "play": "dft-kernels play",
    "terms": "EmbeddingTransport",
    "served": "ServedTeacher",
    "completion": "dft-kernels --print-completion",
}
_COMPILERS = {"apt-get": "apt-get install g++", "dnf": "dnf install gcc-c++", "apk": "apk add g++"}
_LITTLE = 1 << 30  # bytes free, below which a download, a build or a cache of compiled kernels is likely to fail


class Finding(NamedTuple):
    """One finding. state: "ok", "note" (nothing is broken) or "fault"; mend: what to run or do."""

    state: str
    said: str
    mend: str | None = None


def examine() -> Iterator[Finding]:
    """Every finding; packages first, for what is missing of them may stop the parts after it."""
    yield Finding("ok", f"dft_kernels {__version__} in {_ROOT}, Python {platform.python_version()}")
    yield from _each(_packages)
    loads = True
    for finding in _each(_torch):
        loads = finding.state == "ok"
        yield finding
    of_torch = (_bound_to, _cpu_kernels, _gpus, _toolkit, _conflicts, _cache) if loads else ()
    for part in (*of_torch, _temporary):
        yield from _each(part)


def _each(part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a part, and what it raises as one more."""
    try:
        yield from part()
    except Exception as error:  # whatever a broken installation raises is what it is asked for
        what = part.__name__.strip("_").replace("_", " ")
        yield Finding("fault", f"{what}: {type(error).__name__}: {_first(error)}", _reinstall(error))


def _reinstall(error: Exception) -> str:
    """A module's package may have another name, and that of the module be a stranger's: installed ones are asked."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    packages = sorted({*importlib.metadata.packages_distributions().get(module, ())} - {"dft-kernels"})
    if packages:
        return f"pip install --force-reinstall {' '.join(packages)}"
    return "mend what is named above, then run this again; if nothing is, report it with what dft-kernels info says"


# ---- torch and compiled kernels


def _torch() -> Iterator[Finding]:
    try:
        require_torch()
        import torch
    except Exception as error:  # a library that is not there or does not fit: OSError, ImportError, whatever it raises
        cause = error.__cause__ or error
        if isinstance(cause, ModuleNotFoundError):
            mend = "pip install torch" if cause.name == "torch" else "pip install --force-reinstall torch"
            yield Finding("fault", f"torch does not load: {cause.name} is not installed", mend)
        elif isinstance(error, ImportError) and cause is error:  # it loads, and is old
            oldest = ".".join(map(str, OLDEST_TORCH))
            import torch

            what = f"torch {torch.__version__} is older than {oldest}"
            yield Finding("fault", what, f"pip install 'torch>={oldest}'")
        else:
            yield Finding("fault", f"torch does not load: {_first(cause)}", "pip install --force-reinstall torch")
        return
    yield Finding(
        "ok", f"torch {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'})"
    )


def _bound_to() -> Iterator[Finding]:
    """The torch of this build. What mends another one is another build: pip would bring back that of before."""
    import torch

    try:
        given = _required()
    except ModuleNotFoundError:  # said of the packages
        return
    for one in _of("", given):
        if one.name == "torch" and not one.specifier.contains(torch.__version__, prereleases=True):
            yield Finding(
                "fault", f"this build requires torch{one.specifier}, there is {torch.__version__}", _rebuild()
            )


def _cpu_kernels() -> Iterator[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an extension is stale is this finding
        from .backends import extension
    if extension.REASON is None:
        yield Finding("ok", f"CPU kernels: {extension.MODULE.instruction_set()}")
        return
    mend = _rebuild()
    why = extension.REASON.removesuffix(extension.rebuild()).rstrip(" .")
    said = f"CPU kernels: {why}. The slow reference runs instead"
    if (
        not (extension.read_stamp() or {}).get("built")
        and shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None
    ):
        tool = next((line for tool, line in _COMPILERS.items() if shutil.which(tool)), "install a C++ compiler")
        mend = f"{tool}; then {mend}"
    yield Finding("fault", said, mend)


def _gpus() -> Iterator[Finding]:
    import torch

    from .backends import BACKENDS, extension

    here = _has_nvidia()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # of a driver that is too old, among others
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    build = _rebuild("DFT_KERNELS_CUDA=1")
    if not count and not here:
        loads = "the CUDA kernels load" if extension.CUDA is not None else "there are no CUDA kernels"
        yield Finding("ok", f"no GPU here; {loads}")
    elif not count and torch.version.cuda is None:
        mend = f"install a CUDA build of torch (see pytorch.org); then {build}"
        yield Finding("fault", f"there is an NVIDIA GPU, and torch {torch.__version__} has no CUDA", mend)
    elif not count:
        why = _first(said[-1].message) if said else "torch.cuda.is_available() is False"
        yield Finding(
            "fault", f"there is an NVIDIA GPU that torch does not reach: {why}", "update its driver: nvidia-smi"
        )
    for number in range(count):
        device = torch.device("cuda", number)
        cuda, triton = (BACKENDS[name].unavailable(device, torch.bfloat16) for name in ("cuda", "triton"))
        name = f"{device}, {torch.cuda.get_device_name(device)}"
        if cuda is None:
            yield Finding("ok", f"{name}: CUDA kernels")
        elif triton is None:
            yield Finding("note", f"{name}: Triton kernels, not those of CUDA: {cuda}", build)
        else:
            yield Finding("fault", f"{name}: no kernels. CUDA: {cuda}; Triton: {triton}", "pip install triton")


def _toolkit() -> Iterator[Finding]:
    """Whether the CUDA kernels, where there are none, could be built for this torch."""
    import torch

    from .backends import extension

    if extension.CUDA is not None or torch.version.cuda is None:
        return
    build, wanted = _rebuild("DFT_KERNELS_CUDA=1"), torch.version.cuda.split(".")[0]
    nvcc = _nvcc()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is not None and found[1] == wanted:
        yield Finding("note", f"no CUDA kernels, and {nvcc} of CUDA {found[1]}.{found[2]}, which builds them", build)
        return
    what = f"{nvcc} is of CUDA {found[1]}.{found[2]}, torch of {torch.version.cuda}" if found else "there is no nvcc"
    mend = f"install the toolkit of CUDA {wanted} and set CUDA_HOME to it; then {build}"
    yield Finding("note", f"no CUDA kernels, which cannot be built here: {what}", mend)


# ---- packages


def _required() -> list[Any]:
    from packaging.requirements import Requirement

    return [Requirement(text) for text in importlib.metadata.requires("dft-kernels") or ()]


def _packages() -> Iterator[Finding]:
    try:
        given = _required()
    except importlib.metadata.PackageNotFoundError:
        said = "dft-kernels is on the path and not installed: its requirements are not known"
        yield Finding("note", said, f"pip install --no-build-isolation -e {shlex.quote(str(_ROOT.parent))}")
        return
    except ModuleNotFoundError:
        yield Finding("fault", "packaging is not installed", "pip install packaging")
        return
    told: set[str] = set()
    for extra in ("", *_NEEDED_FOR):
        asked = {
            wrong: one for one in _of(extra, given) if one.name != "torch" and (wrong := _missing(one)) is not None
        }
        missing = [*asked]
        # by their names, not as an extra, which would build the kernels again
        mend = f"pip install {shlex.join(f'{one.name}{one.specifier}' for one in asked.values())}"
        if extra and missing:
            new = [said for said in missing if said not in told] or ["those above"]
            told |= {*missing}
            yield Finding("note", f"{_NEEDED_FOR[extra]}: without {', '.join(new)}", mend)
        elif missing:
            yield Finding("fault", f"required: {', '.join(missing)}", mend)
        elif extra:
            yield Finding("ok", f"{_NEEDED_FOR[extra]}: extra {extra}")
        else:
            yield Finding("ok", "required packages")


def _of(extra: str, given: list[Any]) -> list[Any]:
    """The requirements of an extra, or of the package itself; those of extras that it names among them."""
    found, known, todo = [], set(), [extra]
    while todo:
        one = todo.pop()
        known.add(one)
        for requirement in given:
            if requirement.marker is None if one else requirement.marker is not None:
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": one}):
                continue
            if requirement.name == "dft-kernels":
                todo += sorted(requirement.extras - known)
            else:
                found.append(requirement)
    return found


def _missing(requirement: Any) -> str | None:
    """What is wrong with an installed package, None where it fits."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return str(requirement.name)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name}{requirement.specifier} (there is {version})"


def _conflicts() -> Iterator[Finding]:
    from .info import collect

    for said, _, mend in (one.rpartition(". ") for one in collect()["conflicts"]):
        yield Finding("note", said, mend)


# ---- folders


def _cache() -> Iterator[Finding]:
    from .materials.models import cache_folder

    mend = "export XDG_CACHE_HOME=/a/folder/with/space"
    try:
        yield _space("models and texts", cache_folder(), mend)
    except RuntimeError as error:
        yield Finding("fault", _first(error), mend)


def _temporary() -> Iterator[Finding]:
    mend = "export TMPDIR=/a/folder/with/space"
    try:
        yield _space("temporary files", Path(tempfile.gettempdir()), mend)
    except OSError as error:  # none can be written to, or is full
        yield Finding("fault", f"temporary files: {error.strerror}", mend)


def _space(what: str, path: Path, mend: str) -> Finding:
    above = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        return Finding("note", f"{what}: {above} cannot be written to", mend)
    free = shutil.disk_usage(above).free
    said = f"{what}: {path}, {free / 1e9:,.1f} GB free"
    return Finding("ok", said) if free >= _LITTLE else Finding("note", said, mend)


# ---- this machine, and words


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    paths = [str(Path(home) / "bin" / "nvcc")] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in paths if path and Path(path).is_file()), None)


def _first(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rebuild(variables: str = "") -> str:
    from .backends import extension

    text = extension.rebuild(variables).removeprefix("Rebuild with: ")
    return text[:1].lower() + text[1:] if " run: " in text else text
