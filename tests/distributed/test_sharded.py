"""The vocabulary over several processes: every case of the table, every result, against one process and the oracle;
what travels; and mistakes, of which every process hears."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, PRESENT, differentiate, judged, leaves, make
from two_processes import on

import dft_kernels as dk
from dft_kernels.distributed import count_labels, gather_rows, shift_labels
from dft_kernels.distributed import shards as shards_module
from dft_kernels.distributed import sums as sums_module

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BACKENDS = [name for name in ("native", "reference") if name in PRESENT]
VOCAB_ROWS = ("weight", "bias", "features")  # [V, ...]


def sizes(vocab: int, how: str) -> list[int]:
    """even: as equal as can be; odd: very unlike, and of more than two processes one without any."""
    if how == "even":
        return [vocab // COUNT + (rank < vocab % COUNT) for rank in range(COUNT)]
    first = 2 * vocab // 3
    return (
        [first, vocab - first] if COUNT == 2 else [first // 2, 0, first - first // 2, vocab - first, *[0] * (COUNT - 4)]
    )


def own(vocab: int, how: str) -> slice:
    """The ids of this process."""
    before = sum(sizes(vocab, how)[:RANK])
    return slice(before, before + sizes(vocab, how)[RANK])


def divided(arguments: dict[str, Any], how: str) -> dict[str, Any]:
    """The arguments of this process."""
    mine = own(arguments["weight"].shape[0], how)
    out = {**arguments, "process_group": dist.group.WORLD}
    for name in VOCAB_ROWS:
        if name in arguments:
            part = arguments[name].detach()[mine].clone()
            out[name] = part.requires_grad_() if arguments[name].requires_grad else part
    if "potential" in arguments:
        out["potential"] = arguments["potential"][:, mine].contiguous()
    if "low_rank" in arguments:
        down, up = arguments["low_rank"]
        out["low_rank"] = (down, up.detach()[mine].clone().requires_grad_())
    return out


def whole(part: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Parts of unequal sizes, put together."""
    parts: list[Any] = [None] * COUNT
    dist.all_gather_object(parts, part)
    return torch.cat(parts, dim)


def complete(arguments: dict[str, Any], results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients, those of divided tensors put together."""
    of_rows = ["loss", "hidden", *([] if "low_rank" not in arguments else ["down"])]
    names = ["loss", *(n for n in ("hidden", "weight", "bias") if n in arguments)]
    names += ["down", "up"] if "low_rank" in arguments else []
    return [value if name in of_rows else whole(value) for name, value in zip(names, results, strict=True)]


def run(case: str, dtype: torch.dtype, backend: str, how: str, **options: Any) -> None:
    """One case: within the gate in every process, and of the same bits in all."""
    arguments = make(CASES[case], dtype)
    mine = divided(arguments, how)
    found = differentiate(dk.linear_distribution_loss(**{**mine, "backend": backend, **options}), leaves(mine))
    ours = complete(arguments, found)
    for value in found[:2]:
        every = shards_module.gathered(value, dist.group.WORLD)
        assert all(torch.equal(every[0], one) or bool(one.isnan().any()) for one in every), case
    if list(CASES).index(case) % COUNT == RANK:  # one of them judges
        for one in judged(CASES[case], arguments, ours, options.get("chunk_size") == 1):
            assert one.error <= one.allowed, f"{case} {dtype} {backend} {one.name}: {one.error:.2e} {one.allowed:.2e}"


def table_of_two(folder: Path) -> None:
    for number, case in enumerate(CASES):
        run(
            case,
            torch.float32,
            "native" if "native" in PRESENT else "reference",
            "odd",
            chunk_size=(None, 10)[number % 2],
        )
        run(case, torch.bfloat16, "reference", "even", chunk_size=(10, None)[number % 2])


def table_of_four(folder: Path) -> None:
    for number, case in enumerate(CASES):
        run(case, torch.float32, "reference", "odd", chunk_size=(10, None)[number % 2])
        if "native" in PRESENT:
            run(case, torch.bfloat16, "native", "even", chunk_size=(None, 10)[number % 2])


def doubles_of_two(folder: Path) -> None:
    for case in CASES:
        run(case, torch.float64, "reference", "odd")
        if "native" in PRESENT:
            run(case, torch.float64, "native", "odd", chunk_size=7)


KERNEL_CASES = (
    *("everything", "every_statistic_rows", "topk_everything", "near_forward_kl", "near_jensen_shannon"),
    *("reverse_kl", "low_rank_topk", "topk_capped"),
)


def kernels_of_two(folder: Path) -> None:
    """The GPU kernels, emulated."""
    for case in KERNEL_CASES:
        for backend in (name for name in ("triton", "cuda") if name in PRESENT):
            run(case, torch.float32, backend, "odd", chunk_size=10)


@contextmanager
def sent() -> Iterator[list[int]]:
    """Bytes that this process gives to each collective: what each of the others is sent, n - 1 times."""
    found: list[int] = []

    def all_gather(out: torch.Tensor, mine: torch.Tensor, **more: Any) -> Any:
        found.append((COUNT - 1) * mine.numel() * mine.element_size())
        return gather(out, mine, **more)

    def all_to_all(out: torch.Tensor, mine: torch.Tensor, **more: Any) -> Any:
        found.append((COUNT - 1) * mine.numel() * mine.element_size() // COUNT)
        return exchange(out, mine, **more)

    gather, exchange = shards_module.all_gather, dist.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "all_gather", all_gather)
        patch.setattr(sums_module, "all_gather", all_gather)
        patch.setattr(dist, "all_to_all_single", all_to_all)
        yield found


def travels(folder: Path) -> None:
    """What docs/scale.md says, in bytes: an agreement of 7 numbers a call; of a chunk of R rows 4 bytes for each of k
    quantities, 2 more for a divergence to a dense target, and 2 (n - 1) / n R H numbers of dhidden; nothing of size
    V."""
    n, h, v, rows = 96, 16, 4096, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.bfloat16)[own(v, "even")].clone().requires_grad_()
    target = torch.randint(0, v, (n,), generator=generator)
    teacher = torch.randn(n, v, generator=generator)
    index = torch.stack([torch.randperm(v, generator=generator)[:5] for _ in range(n)])
    top = dk.TopK(index, torch.full((n, 5), 0.1).log(), torch.full((n,), 0.5).log())
    gradient = 2 * (COUNT - 1) * (rows * h // COUNT) * 2
    for given, quantities, again in (
        ({}, 3, 0),  # LOG_PROB, LSE and its low part
        ({"teacher": teacher}, 4, 2),  # two log-sum-exps; DIVERGENCE and SLOPE
        ({"teacher": teacher, "hard_weight": 0.5}, 7, 2),
        ({"teacher": top}, 4 + 5 + 2, 0),  # of tokens and of the tail
    ):
        call = {"hidden": hidden, "weight": weight, "target": target, "process_group": dist.group.WORLD, **given}
        dk.linear_distribution_loss(**call)  # sizes are known after it
        with sent() as found:
            dk.linear_distribution_loss(**call, chunk_size=rows).backward()
        statistics = (COUNT - 1) * 4 * rows * (quantities + again)
        assert sum(found) == (COUNT - 1) * 7 * 8 + n // rows * (statistics + gradient), (given.keys(), found)
        assert len(found) == 1 + n // rows * (1 + (again > 0) + 2), (given.keys(), found)
        assert max(found) < v * 2  # less than a row of logits
    with sent() as found:  # nothing of hidden states, whose gradient nobody asks for
        dk.linear_distribution_loss(hidden.detach(), weight, target, process_group=dist.group.WORLD, chunk_size=rows)
    assert sum(found) == (COUNT - 1) * (7 * 8 + n * 4 * 3), found


def close(ours: Any, theirs: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda text: f"{name}: {text}")


def statistics(folder: Path) -> None:
    """Statistics, their gradients, token statistics, metrics: as in one process, of parts in each."""
    for case, how in (("every_statistic", "odd"), ("topk_everything", "even"), ("every_statistic_rows", "odd")):
        arguments = make(CASES[case], torch.float32)
        mine = divided(arguments, how)
        loss, metrics = dk.linear_distribution_loss(**{**mine, "return_metrics": True})
        exact, expected = dk.linear_distribution_loss(**{**arguments, "return_metrics": True})
        close(loss, exact, case)
        for name in (
            "hard_loss",
            "soft_loss",
            "entropy",
            "lse",
            "correct",
            "teacher_agreement",
            "log_prob",
            "features",
        ):
            if getattr(expected, name) is not None:
                close(getattr(metrics, name), getattr(expected, name), name)
        if expected.mean_probability is not None:
            close(whole(metrics.mean_probability, 1), expected.mean_probability, "mean_probability")
        taken = {"hidden", "weight", "target", "teacher", "bias", "group", "num_groups", "features", "row_weight"}
        taken |= {"temperature", "teacher_temperature", "divergence", "softcap", "logit_scale", "process_group"}
        gradients = []
        for given in (arguments, mine):
            found = dk.linear_distribution_statistics(**{k: v for k, v in given.items() if k in taken})
            part = own(arguments["weight"].shape[0], how) if given is mine else slice(None)
            pull = torch.linspace(-1, 1, arguments["weight"].shape[0])[part]
            total = (found.mean_probability @ pull).sum()
            if given is mine:  # the sum over all columns, as each of them has it
                total = total + (whole(found.mean_probability.detach() @ pull, -1).sum() - total.detach())
            total = total + found.entropy.square().sum() + (found.divergence * 0.3).sum() + found.lse.sum()
            total = total + (0 if found.features is None else found.features.sin().sum())
            gradients.append([found, torch.autograd.grad(total, [given["hidden"], given["weight"]])])
        (expected, (dhidden, dweight)), (found, (own_dhidden, own_dweight)) = gradients
        for name in ("log_prob", "entropy", "lse", "divergence"):
            close(getattr(found, name), getattr(expected, name), name)
        close(whole(found.mean_probability, 1), expected.mean_probability, "mean_probability")
        close(own_dhidden, dhidden, f"dhidden of statistics, {case}")
        close(whole(own_dweight), dweight, "dweight of statistics")
    arguments = make(CASES["cross_entropy_bias"], torch.float32)
    outputs = ("log_prob", "entropy", "lse", "log_sum_sq_probs", "mean_logits", "is_top1")
    expected, found = (
        dk.token_statistics(**given, outputs=outputs, temperature=0.7)
        for given in (arguments, divided(arguments, "odd"))
    )
    for name in outputs:
        close(getattr(found, name), getattr(expected, name), name)


def maxima(folder: Path) -> None:
    """correct and teacher_agreement where maxima are in other parts, and equal ones in several."""
    n, v = 64, 12
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 3, (n, v), generator=generator).float()  # ties everywhere
    teacher = torch.randint(0, 3, (n, v), generator=generator).float()
    target = torch.randint(0, v, (n,), generator=generator)
    names = {"correct", "teacher_agreement", "log_prob", "soft_loss"}
    _, expected = dk.distribution_loss(logits, target, teacher, return_metrics=names)
    assert 0 < expected.correct.sum() < n
    assert 0 < expected.teacher_agreement.sum() < n
    for how in ("even", "odd"):
        part = logits[:, own(v, how)].contiguous()
        for backend in BACKENDS:
            _, found = dk.distribution_loss(
                part, target, teacher, return_metrics=names, process_group=dist.group.WORLD, backend=backend
            )
            for name in names:
                close(getattr(found, name), getattr(expected, name), f"{name} {how} {backend}")


def given_logits(folder: Path) -> None:
    """Functions of logits that are there, in parts; cross_entropy with class weights and in place."""
    arguments = make(CASES["jensen_shannon"], torch.float32)
    logits = (arguments["hidden"] @ arguments["weight"].t()).detach().requires_grad_()
    mine = own(logits.shape[1], "odd")
    part = logits.detach()[:, mine].clone().requires_grad_()
    options = {"target": arguments["target"], "teacher": arguments["teacher"], "divergence": "jensen_shannon"}
    expected, found = (
        dk.distribution_loss(logits, **options),
        dk.distribution_loss(part, **options, process_group=dist.group.WORLD),
    )
    close(found, expected, "loss")
    gradient, own_gradient = torch.autograd.grad(expected, logits)[0], torch.autograd.grad(found, part)[0]
    close(own_gradient, gradient[:, mine], "dlogits")
    weight = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(1))
    expected = dk.cross_entropy(logits, arguments["target"], weight=weight)
    (gradient,) = torch.autograd.grad(expected, logits)
    spent = (part * 1).contiguous()
    found = dk.cross_entropy(
        spent, arguments["target"], weight=weight, inplace_gradient=True, process_group=dist.group.WORLD
    )
    close(found, expected, "cross_entropy")
    close(torch.autograd.grad(found, part)[0], gradient[:, mine], "gradient in place")


def teachers(folder: Path) -> None:
    """Teachers that are whole, divided as the model is, or longer; a padded vocabulary cut by its last processes."""
    arguments = make(CASES["forward_kl"], torch.float32)
    head, v = arguments["teacher"], arguments["weight"].shape[0]
    expected = dk.linear_distribution_loss(**arguments)
    mine = own(v, "odd")
    constants = (head.logit_scale, head.softcap)
    parted = dk.TeacherHead(head.hidden, head.weight[mine], head.bias[mine], *constants)
    longer = dk.TeacherHead(
        head.hidden, torch.cat([head.weight, torch.ones(3, head.weight.shape[1])]), torch.cat([head.bias, torch.ones(3)]),
        head.logit_scale, head.softcap, vocab_size=v,
    )  # fmt: skip
    raw = head.logit_scale * torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    logits = head.softcap * torch.tanh(raw / head.softcap)
    for teacher in (head, parted, longer, logits, logits[:, mine], dk.TeacherLogits(logits),
                    dk.LogitStream(lambda rows: logits[rows]), dk.LogitStream(lambda rows: logits[rows][:, mine]),
                    dk.LogitStream(iter(logits.split(5)))):  # fmt: skip
        found = dk.linear_distribution_loss(**{**divided(arguments, "odd"), "teacher": teacher})
        close(found, expected, type(teacher).__name__)
    padded = {**arguments, "weight": torch.cat([arguments["weight"].detach(), torch.ones(27, 12)])}
    cut = divided(padded, "even")
    keep = max(0, min(v - own(v + 27, "even").start, cut["weight"].shape[0]))
    cut["weight"] = cut["weight"][:keep]
    close(dk.linear_distribution_loss(**cut), expected, "padded")


def masked(folder: Path) -> None:
    """-inf logits: over all of a process's columns, and of a label."""
    arguments = make(CASES["every_statistic"], torch.float32)
    arguments.pop("num_groups"), arguments.pop("group")
    arguments["potential"] = arguments["potential"][:1]
    mine = sizes(101, "even")
    bias = torch.zeros(101)
    bias[: mine[0]] = -torch.inf
    arguments["teacher"] = dk.TeacherLogits(torch.randn(29, 101, generator=torch.Generator().manual_seed(1)) + bias)
    arguments["target"] = arguments["target"].clamp(max=100)
    arguments["target"][arguments["target"] >= 0] = 100
    for label in (100, 0):
        arguments["target"][0] = label  # 0: log q_y = -inf
        given = {**arguments, "bias": bias, "hard_weight": 1.0}
        names = {"log_prob", "entropy", "soft_loss", "features", "correct", "teacher_agreement"}
        expected, metrics = dk.linear_distribution_loss(**given, return_metrics=names)
        for backend in BACKENDS:
            found, ours = dk.linear_distribution_loss(**divided(given, "even"), return_metrics=names, backend=backend)
            close(found, expected, f"{backend} {label}")
            for name in names:
                close(getattr(ours, name), getattr(metrics, name), f"{name} {backend}")


def dtensors(folder: Path) -> None:
    """A head that is a DTensor, of parts that torch makes unequal; no process_group is named."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (COUNT,))
    for case in ("everything", "low_rank_topk", "cross_entropy"):
        arguments = make(CASES[case], torch.float32)
        exact = differentiate(dk.linear_distribution_loss(**arguments), leaves(arguments))
        given = dict(arguments)
        for name in ("weight", "bias"):
            if name in arguments:
                given[name] = distribute_tensor(arguments[name].detach(), mesh, [Shard(0)]).requires_grad_()
        lengths = [len(part) for part in torch.empty(101).chunk(COUNT)]
        part = slice(sum(lengths[:RANK]), sum(lengths[: RANK + 1]))
        if "potential" in arguments:
            given["potential"] = arguments["potential"][:, part].contiguous()
        if "low_rank" in arguments:
            down, up = arguments["low_rank"]
            given["low_rank"] = (down, distribute_tensor(up.detach(), mesh, [Shard(0)]).requires_grad_())
        given["hidden"] = DTensor.from_local(arguments["hidden"].detach(), mesh, [Replicate()]).requires_grad_()
        loss = dk.linear_distribution_loss(**given)
        found = [loss, *torch.autograd.grad(loss, leaves(given), torch.tensor(0.5))]
        assert all(isinstance(g, DTensor) for g in found[1:3])
        for ours, theirs in zip(found, exact, strict=True):
            close(ours.full_tensor() if isinstance(ours, DTensor) else ours, theirs, case)
    weight = distribute_tensor(arguments["weight"].detach(), mesh, [Shard(1)])
    refused({**arguments, "weight": weight}, r"weight must be \[Shard\(0\)\] over one mesh dimension, got a DTensor")
    weight = distribute_tensor(arguments["weight"].detach(), mesh, [Shard(0)])
    hidden = distribute_tensor(arguments["hidden"].detach(), mesh, [Shard(0)])
    refused({**arguments, "weight": weight, "hidden": hidden}, "hidden must be replicated, or a tensor of this process")


def compiled(folder: Path) -> None:
    """torch.compile leaves the call out of its graph."""
    arguments = make(CASES["cross_entropy"], torch.float32)
    mine = divided(arguments, "even")

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (
            dk.linear_distribution_loss(hidden * 1.5, weight, mine["target"], process_group=mine["process_group"]) * 2
        )

    expected = step(mine["hidden"], mine["weight"])
    found = torch.compile(step, backend="eager")(mine["hidden"], mine["weight"])
    close(found, expected, "compiled")
    close(
        torch.autograd.grad(found, mine["hidden"])[0], torch.autograd.grad(expected, mine["hidden"])[0], "its gradient"
    )


def refused(call: dict[str, Any], text: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=text):
        dk.linear_distribution_loss(**call)


def mistakes(folder: Path) -> None:
    """Of one process: an error in all, at once, and the next call is right again."""
    arguments = make(CASES["forward_kl"], torch.float32)
    good = divided(arguments, "even")
    expected = dk.linear_distribution_loss(**good)
    other = RANK == COUNT - 1
    labels = good["target"].roll(1) if other else good["target"]
    refused({**good, "target": labels}, "process_group must be called with the same labels in all of its processes")
    rows = {name: good[name][:-2] if other else good[name] for name in ("hidden", "target")}
    teacher = dk.TeacherLogits(torch.zeros(len(rows["hidden"]), 101))
    refused(
        {**good, **rows, "teacher": teacher},
        f"the same rows in all of its processes, got 29 in rank 0 and 27 in rank {COUNT - 1}",
    )
    refused({**good, "temperature": 2.0 if other else 1.0}, "called with the same options, dtypes and kind of teacher")
    refused({**good, "chunk_size": 7 if other else 8}, "called with the same options")
    text = (
        "temperature must be greater than 0"
        if other
        else f"without error in all of its processes, got an error in rank {COUNT - 1}"
    )
    refused({**good, "temperature": -1.0 if other else 1.0}, text)
    text = "weight must have shape" if other else "without error in all of its processes"
    refused({**good, "weight": good["weight"][:, :-1] if other else good["weight"]}, text)
    refused({**good, "weight": good["weight"][:0], "teacher": None}, "weight must have at least one row in one process")
    refused({**good, "target": torch.full_like(good["target"], 101)}, r"target must hold labels in 0\.\.100 or -100")
    refused({**good, "process_group": "tp"}, "process_group must be a ProcessGroup or a DeviceMesh", TypeError)
    alone = [dist.new_group([rank]) for rank in range(COUNT)]
    if COUNT > 1:
        group = alone[(RANK + 1) % COUNT]
        refused(
            {**good, "process_group": group},
            "process_group must (be a ProcessGroup|have this process as a member)",
            (ValueError, TypeError),
        )
    refused(
        {**good, "teacher": dk.TeacherLogits(torch.zeros(29, 60))},
        "the model's vocabulary of 101, or this process's part of it of",
    )
    with pytest.raises(ValueError, match=r"process_group must come without transforms of torch\.func"):
        torch.func.grad(lambda h: dk.linear_distribution_loss(**{**good, "hidden": h}))(good["hidden"].detach())
    close(dk.linear_distribution_loss(**good), expected, "afterwards")
    alone_loss = dk.linear_distribution_loss(**{**arguments, "process_group": alone[RANK]})
    close(alone_loss, dk.linear_distribution_loss(**arguments), "a group of one")


def other_sizes(folder: Path) -> None:
    """Heads of which this process has as many ids as before, and others have not."""
    for vocab in (40, 41, 40, 43):
        generator = torch.Generator().manual_seed(vocab)
        hidden, weight = torch.randn(9, 4, generator=generator), torch.randn(vocab, 4, generator=generator)
        target = torch.randint(0, vocab, (9,), generator=generator)
        first = 40 // COUNT
        mine = slice(first * RANK, first * (RANK + 1) if RANK < COUNT - 1 else vocab)
        found = dk.linear_distribution_loss(hidden, weight[mine], target, process_group=dist.group.WORLD)
        close(found, dk.linear_distribution_loss(hidden, weight, target), str(vocab))


def sequences(folder: Path) -> None:
    """Context parallelism: labels over boundaries, one mean; and all rows of a divided sequence."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (3, 4 * COUNT + 1), generator=generator)
    labels[1, 5:] = -100
    ends = [4 * rank for rank in range(COUNT)] + [4 * COUNT + 1]
    mine = slice(ends[RANK], ends[RANK + 1])
    shifted = shift_labels(labels[:, mine], dist.group.WORLD)
    assert torch.equal(shifted, dk.shift_labels(labels)[:, mine])
    items = count_labels(shifted, dist.group.WORLD)
    assert int(items) == int((dk.shift_labels(labels) != -100).sum())
    hidden = torch.randn(3, 4 * COUNT + 1, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    expected = dk.linear_distribution_loss(hidden, weight, dk.shift_labels(labels))
    part = dk.linear_distribution_loss(hidden[:, mine], weight, shifted, num_items=items)
    total, gradients = part.detach().clone(), list(torch.autograd.grad(part, [hidden, weight]))
    for tensor in (total, *gradients):
        dist.all_reduce(tensor)
    for ours, theirs in zip(
        (total, *gradients), (expected, *torch.autograd.grad(expected, [hidden, weight])), strict=True
    ):
        close(ours, theirs, "context parallel")
    states = torch.randn(2, 3 * COUNT, 8, generator=generator)
    mine = slice(3 * RANK, 3 * RANK + 3)
    local = states[:, mine].clone().requires_grad_()
    rows = gather_rows(local, dist.group.WORLD, dim=1)
    assert torch.equal(rows, states)
    target = torch.randint(0, 50, (2, 3 * COUNT), generator=generator)
    loss = dk.linear_distribution_loss(rows, weight.detach()[own(50, "even")], target, process_group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad(loss, local)
    states.requires_grad_()
    (exact,) = torch.autograd.grad(dk.linear_distribution_loss(states, weight.detach(), target), states)
    close(gradient, exact[:, mine], "sequence parallel")
    with pytest.raises(ValueError, match=r"shift_labels: labels must be \[\.\.\., T\] with T >= 1"):
        shift_labels(labels[:, :0], dist.group.WORLD)


CHECKS = ("travels", "statistics", "maxima", "given_logits", "teachers", "masked", "dtensors", "mistakes",
          "other_sizes", "sequences")  # fmt: skip


@pytest.mark.parametrize(
    "names", [("table_of_two", *CHECKS, "compiled"), pytest.param(("doubles_of_two",), marks=pytest.mark.full)], ids=str
)
def test_two_processes(names: tuple[str, ...], tmp_path: Path) -> None:
    on(2, __file__, tmp_path, *names)


def test_four_processes(tmp_path: Path) -> None:
    on(4, __file__, tmp_path, "table_of_four", *CHECKS)


def test_the_kernels_of_gpus(tmp_path: Path) -> None:
    on(2, __file__, tmp_path, "kernels_of_two", emulated=True)


def dies(folder: Path) -> None:
    """One process ends between two chunks; the others hear of it."""
    arguments = make(CASES["cross_entropy"], torch.float32)
    good = divided(arguments, "even")
    dk.linear_distribution_loss(**good)
    if RANK == COUNT - 1:
        real = shards_module.all_gather

        def last(*given: Any, **more: Any) -> Any:
            if given[1].dtype == torch.float32:
                os._exit(0)
            return real(*given, **more)

        shards_module.all_gather = last
    with pytest.raises(RuntimeError):
        dk.linear_distribution_loss(**good, chunk_size=5)
    os._exit(0)


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    on(3, __file__, tmp_path, "dies")


def test_without_torch_distributed() -> None:
    text = re.escape("process_group must come after torch.distributed is initialised, got none")
    with pytest.raises(ValueError, match=text):
        dk.linear_distribution_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long(), process_group="x")
