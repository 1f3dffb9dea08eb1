"""On a machine without a GPU the GPU backends are emulated on CPU tensors: the Triton kernels by Triton's interpreter
(before anything imports triton), the generic CUDA kernels by a stand-in for CUDA's threads. No test asks a hub."""

import inspect
import os
import tempfile
from pathlib import Path

# Before anything loads OpenMP: threads that wait sleep. The processes of a test run share the cores, and threads that
# spin until a core is free for the others take three times the CPU time of the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Inductor keeps what it compiled between runs, for the processor it saw: kernels for AVX-512 must not serve a run that
# ATEN_CPU_CAPABILITY holds to AVX2.
if "ATEN_CPU_CAPABILITY" in os.environ:
    kept = Path(tempfile.gettempdir()) / f"inductor-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers; its answer is at once, and every time
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import cuda_on_host

    cuda_on_host.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--served", metavar="URL", help="a vLLM with SmolLM2, for tests/teachers/test_real_server.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without a server there is nothing to test it with: `make served` starts one."""
    return True if collection_path.name == "test_real_server.py" and config.getoption("--served") is None else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """`@pytest.mark.kept(where=lambda backend, dtype: ...)`: of a product's cells the others are `full`."""
    for mark in item.iter_markers("kept"):
        where, cell = mark.kwargs["where"], item.callspec.params  # type: ignore[attr-defined]
        if not where(**{name: cell[name] for name in inspect.signature(where).parameters}):
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    torch.manual_seed(0)
