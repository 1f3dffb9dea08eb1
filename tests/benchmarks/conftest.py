"""No test measures a time: workers may all be forked, which is sooner."""

import pytest

from dft_kernels.benchmarks import runs


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SPAWN_TIMED", False)
