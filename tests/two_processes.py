"""Processes for a test, over gloo on the CPU: `on_two(__file__, folder, *names)` runs the file's functions
`name(folder)` in two, one after the other: to import transformers takes longer than any of them. `on` has any number,
and may keep the emulated GPU backends."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 900  # a hang is a failure; a machine with other work is none


def on_two(file: str, folder: Path, *names: str) -> None:
    """Two of them, without emulated backends."""
    on(2, file, folder, *names)


def on(count: int, file: str, folder: Path, *names: str, emulated: bool = False) -> None:
    """Run the functions to all ends. What the processes have said is the message of a failure."""
    dropped = ("PYTEST_", "ACCELER") if emulated else ("PYTEST_", "ACCELER", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    said = [folder / f"said-{rank}.txt" for rank in range(count)]
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        environment = {**kept, **place, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, file, str(folder), *names]
        with said[rank].open("w") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    end = time.monotonic() + SECONDS
    codes: list[int | None] = [None] * count
    try:
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:  # one waits for the other where that has failed
            process.kill()
            process.wait()
    assert codes == [0] * count, f"they ended with {codes}\n" + "\n".join(one.read_text()[-8000:] for one in said)


def main(file: str, folder: str, *names: str) -> None:
    """One of them."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",  # no port to be taken
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=SECONDS / 2),
    )
    sys.path.append(str(HERE))  # as pytest has it: pyproject.toml
    if os.environ.get("TRITON_INTERPRET") == "1":
        import cuda_on_host

        cuda_on_host.install()
    functions = runpy.run_path(file)
    for name in names:
        functions[name](Path(folder))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo that lets go of a tensor while the interpreter ends would abort it, seldom


if __name__ == "__main__":
    main(*sys.argv[1:])
