"""Chat templates that models have, with tools and a system prompt: what is trained on is what they show."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from tiny_models import word_tokenizer
from tokenizers import Regex, pre_tokenizers

from dft_kernels.materials.records import Faults, documents
from dft_kernels.training.examples import examples_of

TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "What time is it?"}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
TOLD = {"role": "tool", "name": "clock", "content": "12:00"}
SAID = {"role": "assistant", "content": "Noon."}
MESSAGES = [SYSTEM, ASKED, CALLED, TOLD, SAID]
THINK = "<think>\n\n</think>\n\n"
SHOWN = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>\n'
COUNTED = {  # of the assistant's messages: what stands between the marks, or what follows the generation prompt
    "qwen3_training": f"{THINK}{SHOWN}{THINK}Noon.<|im_end|>\n",
    "qwen3_instruct_2507": f"{SHOWN}Noon.<|im_end|>\n",
    "qwen3_instruct_2507_training": f"{SHOWN}Noon.<|im_end|>\n",
    "llama3_1": '{"name": "clock", "parameters": {"zone": "UTC"}}<|eot_id|>Noon.<|eot_id|>',
    "qwen3": None,  # shows an answer otherwise once more follows
}


@pytest.fixture
def letters() -> Any:
    """A tokenizer whose tokens are letters."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    made = word_tokenizer(words, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"))
    made.bos_token = "<s>"
    return made


@pytest.mark.parametrize("form", ["lines", "JSON in lines", "table"])
@pytest.mark.parametrize("name", COUNTED)
def test_tools(name: str, form: str, letters: Any, tmp_path: Path) -> None:
    """A table fills what a message or a tool has not with None, which templates would show."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    letters.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    file = tmp_path / ("a.parquet" if form == "table" else "a.jsonl")
    rows: list[dict[str, Any]] = [{"messages": MESSAGES, "tools": [TOOL]}, {"messages": [SYSTEM, ASKED, SAID]}]
    if form == "table":
        other = {"type": "function", "function": {"name": "map", "arguments": {"town": "Bath"}}}
        more = [ASKED, {"role": "assistant", "content": "", "tool_calls": [other]}, {**TOLD, "name": "map"}, SAID]
        datasets.Dataset.from_list([*rows, {"messages": more, "tools": [TOOL]}]).to_parquet(file)
    else:
        rows[0]["tools"] = json.dumps([TOOL]) if form == "JSON in lines" else [TOOL]
        file.write_text("\n".join(map(json.dumps, rows)))
    found = list(documents([str(file)], Faults()))[:2]
    assert [one.tools for one in found] == [[TOOL], None]
    examples, _ = examples_of(found, letters, 4096, Faults())
    for example, messages, tools in zip(examples, (MESSAGES, [SYSTEM, ASKED, SAID]), ([TOOL], None), strict=True):
        whole = letters.apply_chat_template(messages, tools=tools, tokenize=False)
        assert example.ids.tolist() == letters(whole, add_special_tokens=False)["input_ids"]
        assert "Be brief." in whole
    expected = COUNTED[name]
    if expected is None:
        with pytest.raises(ValueError, match=r"(row|line) 1: a record must have a template that adds to what it"):
            examples_of(found[:1], letters, 4096, Faults(), "assistant")
        return
    ((ids, counts), *_), _ = examples_of(found[:1], letters, 4096, Faults(), "assistant")
    assert "".join(letters.convert_ids_to_tokens(ids[counts].tolist())) == expected
