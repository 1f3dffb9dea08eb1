"""A real vLLM with SmolLM2 in fp32, beside the same model run by transformers; with --served URL: `make served`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dft_kernels import DFTConfig, DFTTrainer, ServedTeacher, TopK
from dft_kernels.materials.models import cache_folder, lambada, smollm2
from dft_kernels.teachers.served_rows import ROUNDING


@pytest.fixture(scope="module")
def url(request: Any) -> str:
    return request.config.getoption("--served")


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    model, tokenizer = smollm2(cache_folder())
    tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def texts() -> list[str]:
    return [*lambada(cache_folder())[:3], "In 1952, nobody spoke: 3.14 = π? 日本語.", "def f(x):\n    return x"]


def locally(model: Any, k: int) -> Any:
    """The same k tokens of each row as the server gives, by transformers."""

    def top(inputs: dict[str, Any]) -> TopK:
        with torch.no_grad():
            log_p = model(inputs["input_ids"], inputs.get("attention_mask")).logits.double().log_softmax(-1).float()
        kept = log_p.topk(k).indices
        own = inputs["input_ids"].roll(-1, 1)[..., None]
        kept[..., -1:] = torch.where((kept == own).any(-1, keepdim=True), kept[..., -1:], own)
        return TopK(kept, log_p.gather(-1, kept), log_p.scatter(-1, kept, -torch.inf).logsumexp(-1))

    return top


@pytest.mark.parametrize("protocol", [None, "vllm-tokens"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_log_probabilities_are_those_of_transformers(side: str, protocol: str | None, url: str, both: Any) -> None:
    model, tokenizer = both
    tokenizer.padding_side = side
    batch = dict(tokenizer(texts(), return_tensors="pt", padding=True))
    with ServedTeacher(url, 64, protocol=protocol) as teacher:
        teacher.check(tokenizer, model.config.vocab_size)
        found = teacher(batch)
    with torch.no_grad():
        log_p = model(**batch).logits.double().log_softmax(-1)
    real = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    real[:, :-1] = (batch["attention_mask"][:, :-1] & batch["attention_mask"][:, 1:]) != 0
    exact, found_tail = log_p.gather(-1, found.indices)[real].float(), found.tail_log_prob
    assert found_tail is not None
    torch.testing.assert_close(found.log_probs[real], exact, rtol=0, atol=1e-3)
    outside = log_p.scatter(-1, found.indices, -torch.inf).logsumexp(-1)[real]
    assert float((found_tail[real].double().exp() - outside.double().exp()).abs().max()) < 2 * ROUNDING
    label = (found.indices[:, :-1] == batch["input_ids"][:, 1:, None]).any(-1)
    assert bool(label[real[:, :-1]].all())


def test_two_steps_are_those_of_the_local_teacher(url: str, both: Any, tmp_path: Path) -> None:
    model, tokenizer = both
    tokenizer.padding_side = "right"
    data = [{"input_ids": ids[:48]} for ids in tokenizer(texts()[:3] + texts()[:1]).input_ids]
    data = [{**one, "labels": one["input_ids"]} for one in data]

    def losses(teacher: Any) -> list[float]:
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(model.config._name_or_path, num_hidden_layers=2)
        args = DFTConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-3, hard_weight=0.1, seed=0,
        )  # fmt: skip
        trainer = DFTTrainer(
            transformers.LlamaForCausalLM(config), args, teacher, train_dataset=data, processing_class=tokenizer,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        )  # fmt: skip
        trainer.train()
        return [line[name] for line in trainer.state.log_history[:2] for name in ("loss", "grad_norm", "soft_loss")]

    with ServedTeacher(url, 64) as teacher:
        served = losses(teacher)
        assert teacher.rows > 150
    assert served == pytest.approx(losses(locally(model, 64)), rel=1e-3)


def test_the_servers_own_refusals(url: str) -> None:
    batch = {"input_ids": torch.arange(5, 15)[None]}
    with ServedTeacher(url, 129) as teacher, pytest.raises(ValueError, match="greater than max allowed: 128"):
        teacher(batch)
    with ServedTeacher(url, model="other") as teacher, pytest.raises(ValueError, match="must be one that it serves"):
        teacher(batch)
    with ServedTeacher(url) as teacher:
        for ids, said in (([5] * 1100, "maximum context length is 1024"), ([5, 49152], "out of vocabulary")):
            with pytest.raises(ValueError, match=said):
                teacher({"input_ids": torch.tensor([ids])})
