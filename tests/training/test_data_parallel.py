"""Data parallelism on two processes: gradients, training and metrics of one process over the whole batch, and every
way that would be another's refused."""

from __future__ import annotations

import functools
import os
from itertools import product
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from stand_in_server import StandIn, TinyModel
from tiny_models import tiny
from training_runs import config, curve, locally, teacher, written
from two_processes import on_two

import dft_kernels as dk
from dft_kernels.generation.sampling import roll_out
from dft_kernels.store.reader import Store
from dft_kernels.terms import OnPolicy, ReferenceKL, TokenL2
from dft_kernels.training import fused_forward, rollouts
from dft_kernels.training.attach import attach, detach
from dft_kernels.training.rollouts import Reference
from dft_kernels.training.trainer import METRICS, DFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Trainer's own
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
    ),
]
RANK = int(os.environ.get("RANK", 0))
COUNTS = (9, 1, 5, 10, 4, 10, 2, 7)  # tokens of a sequence; 25 and 23 of a rank
WRAPPED = ["LlamaDecoderLayer"]


def batch(rows: slice, taught: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (8, 10), generator=generator)
    labels = ids.masked_fill(torch.arange(10) >= torch.tensor(COUNTS)[:, None], -100)
    teacher = torch.randn(8, 10, 64, generator=generator) * 2
    items = (labels[:, 1:] != -100).sum()
    given = {"input_ids": ids[rows], "labels": labels[rows], "num_items_in_batch": items}
    return given | ({"teacher": teacher[rows]} if taught else {})


def of_one_process(tied: bool, taught: bool) -> dict[str, torch.Tensor]:
    model = attach(tiny(tie_word_embeddings=tied), hard_weight=0.3)
    model(**batch(slice(0, 8), taught)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_gradients(model: Any, tied: bool, taught: bool) -> None:
    """Of this model after backward, against those of one process."""
    expected, whole, apart = of_one_process(tied, taught), 0.0, 0.0
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        gradient = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
        whole += float(exact.double().square().sum())
        apart += float((gradient - exact).double().square().sum())
    assert apart**0.5 < 1e-6 * whole**0.5, (apart**0.5 / whole**0.5, tied, taught)


def mine(half: int | None = None) -> slice:
    """This rank's sequences, or a half of them."""
    return slice(4 * RANK, 4 * RANK + 4) if half is None else slice(4 * RANK + 2 * half, 4 * RANK + 2 * half + 2)


def forget() -> None:
    """What accelerate and Trainer's arguments have kept of the function before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def accelerator(**plugin: Any) -> Any:
    """accelerate's, that of FSDP2 where given its plugin's options. It does not take FSDP on a CPU, so that it is told
    of GPUs; all that follows is its own."""
    forget()
    PartialState(cpu=True)
    if not plugin:
        return accelerate.Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU
    more = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": WRAPPED}
    made = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, **more, **plugin)
    return accelerate.Accelerator(cpu=True, fsdp_plugin=made)


def accumulated(model: Any, taught: bool, no_sync: Any) -> None:
    """Two backward passes of one optimiser step; times 2, as Trainer does, since gradients are means over ranks."""
    for half in range(2):
        if half == 0:
            with no_sync():
                (2 * model(**batch(mine(0), taught)).loss).backward()
        else:
            out = model(**batch(mine(1), taught))
            (2 * out.loss).backward()
            assert out.metrics.hard_loss.shape == (2, 10)


def ddp(folder: Path) -> None:
    for tied, taught in product((True, False), (False, True)):
        model = accelerator().prepare(attach(tiny(tie_word_embeddings=tied), hard_weight=0.3))
        assert type(model) is torch.nn.parallel.DistributedDataParallel
        for _ in range(2):
            model.zero_grad()
            accumulated(model, taught, model.no_sync)
            assert_gradients(model, tied, taught)
    wrapped = torch.nn.parallel.DistributedDataParallel(tiny(tie_word_embeddings=True))
    attach(wrapped.module, hard_weight=0.3)
    (2 * wrapped(**batch(mine(), True)).loss).backward()
    assert_gradients(wrapped, True, True)


def fsdp2(folder: Path) -> None:
    from contextlib import nullcontext

    from torch.distributed.fsdp import FSDPModule, fully_shard

    every_pair = ((True, False, True), (True, True, False), (False, False, False), (False, True, True))
    for tied, taught, reshard in every_pair:
        one = accelerator(reshard_after_forward=reshard)
        model = attach(tiny(tie_word_embeddings=tied), hard_weight=0.3)
        model, _ = one.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert isinstance(model, FSDPModule)
        for no_sync in (nullcontext, lambda m=model, a=one: a.no_sync(m)):
            model.zero_grad()
            accumulated(model, taught, no_sync)
            assert_gradients(model, tied, taught)
    for reshard in (True, False):  # the head alone, gathered and its gradient reduced once a step
        model = attach(tiny(tie_word_embeddings=False), hard_weight=0.3)
        fully_shard(model.lm_head, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        for _ in range(2):
            model.zero_grad()
            accumulated(model, True, nullcontext)
            assert_gradients(model, False, True)
    for reshard in (True, False):  # all in the root's unit
        model = attach(tiny(tie_word_embeddings=True), hard_weight=0.3)
        fully_shard(model, reshard_after_forward=reshard)
        for _ in range(2):
            model.zero_grad()
            accumulated(model, True, nullcontext)
            assert_gradients(model, True, True)


def options(folder: Path, size: int, **changes: Any) -> Any:
    more = {"max_steps": 5, "optim": "sgd", "learning_rate": 0.5, "gradient_accumulation_steps": 2, **changes}
    return config(folder, per_device_train_batch_size=size, **more)


def train(folder: Path, args: Any) -> dict[str, Any]:
    """Curves and weights of DFTTrainer, cross-entropy alone in its first two steps."""
    model = tiny(tie_word_embeddings=False)
    trainer = DFTTrainer(model, args, Store(folder / "store"))
    trainer.train()
    assert type(trainer.model).__name__ == ("FSDPLlamaForCausalLM" if args.fsdp else "LlamaForCausalLM")
    assert trainer.accelerator.num_processes == (1 if "RANK" not in os.environ else 2)
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    curves = {name: curve(trainer, name) for name in ("loss", "grad_norm", *METRICS)}
    return {"curves": curves, "weights": {name: p.detach() for name, p in weights.items()}}


def assert_trained(folder: Path, found: dict[str, Any]) -> None:
    expected = torch.load(folder / "of-one.pt")
    for name, one in expected["curves"].items():
        assert len(one) == (3 if name in ("soft_loss", "teacher_agreement") else 5)
        assert found["curves"][name] == pytest.approx(one, rel=1e-3 if name == "loss" else 1e-4), name
    begun = dict(tiny(tie_word_embeddings=False).named_parameters())
    for name, one in expected["weights"].items():
        change = one - begun[name]
        assert float(change.norm()) > 0
        assert float((found["weights"][name] - one).norm()) < 1e-4 * float(change.norm()), name


def trainer_ddp(folder: Path) -> None:
    forget()
    assert_trained(folder, train(folder, options(folder, 1, matching_from=2)))


def of_fsdp2(folder: Path, **changes: Any) -> Any:
    """Its configuration, as `accelerator`."""
    forget()
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED}
    args = options(folder, 1, fsdp=True, fsdp_config=fsdp, **changes)
    assert args.parallel_mode.value == "distributed"
    PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU
    return args


def trainer_fsdp2(folder: Path) -> None:
    assert_trained(folder, train(folder, of_fsdp2(folder, matching_from=2)))


def trainer_bf16(folder: Path) -> None:
    """Mixed precision casts the inputs, but neither the teacher nor the number of items."""
    seen = []
    loss = fused_forward.linear_distribution_loss

    @functools.wraps(loss)
    def looked_at(hidden: Any, weight: Any, target: Any, teacher: Any, **more: Any) -> Any:
        seen.append((hidden.dtype, teacher.logits.dtype, type(more["num_items"])))
        return loss(hidden, weight, target, teacher, **more)

    def logits(inputs: dict[str, Any]) -> Any:
        return dk.TeacherLogits(torch.zeros(*inputs["input_ids"].shape, 64))

    store = Store(folder / "store")
    args = of_fsdp2(folder, bf16=True, max_steps=1)
    trainer = DFTTrainer(tiny(), args, logits, train_dataset=store, data_collator=store.collate)
    fused_forward.linear_distribution_loss = looked_at
    try:
        trainer.train()
    finally:
        fused_forward.linear_distribution_loss = loss
    assert seen == [(torch.bfloat16, torch.float32, float)] * 2


def trainer_rollouts(folder: Path) -> None:
    """Each process draws from its own batches; the step is the mean of their gradients, beside the batches' own."""
    forget()
    store, term = Store(folder / "store"), 4.0 * TokenL2(torch.full((64,), 1 / 64)) + 0.5 * ReferenceKL()
    batches: list[Any] = []
    draws: list[Any] = []

    def collate(items: Any) -> dict[str, Any]:
        batches.append({name: store.collate(items)[name] for name in ("input_ids", "attention_mask", "labels")})
        return batches[-1]

    def kept(*arguments: Any, **named: Any) -> Any:
        draws.append(roll_out(*arguments, **named))
        return draws[-1]

    args = options(folder, 2, max_steps=2, rollout_length=5, max_grad_norm=0.0)
    model = tiny(tie_word_embeddings=False)
    data = {"train_dataset": store, "data_collator": collate}
    rollouts.roll_out = kept
    try:
        trainer = DFTTrainer(model, args, None, rollout_terms=term, **data)
        trainer.train()
    finally:
        rollouts.roll_out = roll_out
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, (batches[:4], draws))
    assert not torch.equal(everyone[0][1][0].target, everyone[1][1][0].target)
    plain, reference, own = tiny(tie_word_embeddings=False), Reference(tiny(tie_word_embeddings=False)), OnPolicy(term)
    attach(plain)
    for step in range(2):
        some = [pair for of in everyone for pair in list(zip(*of, strict=True))[2 * step : 2 * step + 2]]
        items = sum(int((of["labels"][:, 1:] != -100).sum()) for of, _ in some)
        for of, drawn in some:
            plain(**of, num_items_in_batch=items).loss.backward()
            for half in (drawn[:2], drawn[2:]):
                given = half.inputs(plain)
                asked = {"teacher": reference(given), "distribution_terms": own}
                (plain(**given, shift_labels=half.target, **asked).loss / 8).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= args.learning_rate * p.grad
                p.grad = None
        own.pending /= 2  # both processes replay both: `update` adds them up
        own.update()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(trainer.own_text.terms.running, own.running, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="must be trained with a whole model in each process, got FSDP"):
        DFTTrainer(tiny(), of_fsdp2(folder), None, rollout_terms=term, **data)


def trainer_served(folder: Path) -> None:
    """Each process asks for its own rows, once; the steps are those of a local teacher."""
    forget()
    store, curves = Store(folder / "store"), []
    args = options(folder, 2, max_steps=2, gradient_accumulation_steps=1)
    with StandIn(TinyModel(teacher())) as server, dk.ServedTeacher(server.url, 5) as served:
        for given in (served, locally(teacher())):
            data = {"train_dataset": store, "data_collator": store.collate}
            trainer = DFTTrainer(tiny(), args, given, **data)
            trainer.train()
            curves.append([curve(trainer, name) for name in ("loss", "grad_norm", "soft_loss")])
        asked = [tuple(body["prompt"]) for body in server.scored[1:]]
    assert curves[0] == [pytest.approx(one, rel=2e-4) for one in curves[1]]
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, asked)
    assert all(len(set(one)) == len(one) <= 4 for one in everyone)
    assert len({*everyone[0], *everyone[1]}) == 7  # two of the eight are the same


def refused(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    wrapped = torch.nn.parallel.DistributedDataParallel(tiny())
    with pytest.raises(
        ValueError, match=r"attach: model must be .* got DistributedDataParallel\. Call attach\(model\)"
    ):
        attach(wrapped)
    sharded = tiny()
    fully_shard(sharded)
    with pytest.raises(ValueError, match=r"its own rows of it, got a DTensor.*of FSDP2\. Call attach before"):
        attach(sharded)
    mesh = init_device_mesh("cpu", (2,))
    plain = {"hidden": torch.randn(6, 4), "weight": torch.randn(8, 4), "target": torch.zeros(6, dtype=torch.int64)}
    plain |= {"bias": torch.randn(8), "teacher": torch.randn(6, 8), "row_weight": torch.ones(6)}
    for name, value in plain.items():
        if name == "weight":  # test_sharded.py
            continue
        with pytest.raises(TypeError, match=f"linear_distribution_loss: {name} must be a tensor of this process, got "):
            dk.linear_distribution_loss(**{**plain, name: distribute_tensor(value, mesh, [Shard(0)])})

    def with_the_remedy(**given: Any) -> dict[str, Any]:
        weight = model.lm_head.weight.full_tensor(grad_placements=[Partial("avg")])
        hidden = model.model(given["input_ids"]).last_hidden_state
        target, items = dk.shift_labels(given["labels"]), given["num_items_in_batch"]
        loss = dk.linear_distribution_loss(hidden, weight, target, given["teacher"], hard_weight=0.3, num_items=items)
        return {"loss": loss}

    model = tiny(tie_word_embeddings=False)
    model.forward = with_the_remedy
    fully_shard(model.lm_head)
    fully_shard(model)
    (2 * model(**batch(mine(), True))["loss"]).backward()
    assert_gradients(model, False, True)


def test_gradients_and_training_are_one_process_s_or_the_call_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    torch.save(train(tmp_path, options(tmp_path, 2, matching_from=2)), tmp_path / "of-one.pt")
    functions = ("trainer_ddp", "trainer_rollouts", "trainer_fsdp2", "trainer_bf16", "trainer_served", "ddp", "fsdp2",
                 "refused")  # fmt: skip
    on_two(__file__, tmp_path, *functions)


def test_a_weight_that_hooks_gather_and_release() -> None:
    """As DeepSpeed's ZeRO-3 keeps it: nothing but while its layer is called, and in that call's backward."""
    plain, model = (attach(tiny(tie_word_embeddings=False), hard_weight=0.3) for _ in range(2))
    weight = model.lm_head.weight
    whole, weight.ds_id = weight.data, 7

    def gather(*_: Any) -> None:
        weight.data = whole

    def release(*_: Any) -> None:
        weight.data = torch.empty(0)

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(release)
    release()
    expected, found = (of(**batch(slice(0, 2), True)) for of in (plain, model))
    assert weight.numel() == 0
    assert torch.equal(found.loss, expected.loss)
    gather()
    found.loss.backward()
    expected.loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_weight_that_nobody_gathers_is_refused() -> None:
    model = attach(tiny(tie_word_embeddings=False))
    weight = model.lm_head.weight
    weight.ds_id, weight.data = 7, torch.empty(0)  # as deepspeed leaves it between a module's calls
    with pytest.raises(
        ValueError, match=r"the head must be whole where .* ZeRO-3 has partitioned\. Call attach before"
    ):
        model(**batch(slice(0, 2), False))
    with pytest.raises(ValueError, match="its own rows of it, got a parameter that ZeRO-3"):
        attach(detach(model))


def test_threads_of_data_parallel_are_refused(tmp_path: Path) -> None:
    args = config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"args must give each process one device.*got 2\. Start torchrun"):
        DFTTrainer(tiny(), args)
