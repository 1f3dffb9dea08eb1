"""README.md and docs/: what they name is there, what is public is listed, links lead somewhere, every example runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_server import StandIn, TinyModel
from test_structure import ANYWHERE, FLOORS

import dft_kernels
from dft_kernels import divergences
from dft_kernels.backends import BACKENDS
from dft_kernels.commands import main as commands

ROOT = Path(dft_kernels.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path: path.read_text() for path in PAGES}
README, DOCS = TEXT[PAGES[0]], {path.stem: TEXT[path] for path in PAGES[1:]}
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
WORDS = [f"word{n}" for n in range(96)]


def test_the_readme_is_short_and_leads() -> None:
    assert len(README.splitlines()) <= 150
    assert all(f"    make {command} " in README.split("## Install")[0] for command in ("demo", "test"))
    assert 'TRL\'s `loss_type="dft"`' in README.split("## Install")[0]
    assert all(f"](docs/{path.name})" in README for path in PAGES[1:])


def anchors(text: str) -> set[str]:
    """The headings of a page, as GitHub links to them."""
    found = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", TEXT[path])):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), link
        assert not heading or heading in anchors(there.read_text()), link


def test_a_page_begins_with_what_a_reader_can_do_there() -> None:
    for name in DOCS.keys() - {"install", "effect"}:
        assert re.match(r"# .+\n\nOn this page: \w", DOCS[name]), name


def test_every_source_that_is_cited_is_on_its_page() -> None:
    numbered = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
    code = [path for top in ("dft_kernels", "csrc", "triton_ops") for path in (ROOT / top).rglob("*")]
    texts = [path.read_text() for path in code if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    texts += [text for name, text in DOCS.items() if name != "citations"]
    assert set(numbered.findall(DOCS["citations"])) == {found for text in texts for found in numbered.findall(text)}
    for number, address in re.findall(r"\[arXiv:(\S+)\]\((\S+)\)", DOCS["citations"]):
        assert address == f"https://arxiv.org/abs/{number}"
    for entry in divergences.TABLE.values():
        assert entry.source.split(",")[0].split(" et al.")[0] in DOCS["citations"], entry.name


def test_the_changelog_has_the_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert re.search(rf"^(?:## |Towards ){re.escape(version)}\b", changes, re.M)


def figure(name: str) -> Any:
    """A script of docs/figures as a module."""
    spec = importlib.util.spec_from_file_location(f"figure_{name}", ROOT / "docs" / "figures" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_divergences_is_of_this_loss() -> None:
    """What its panels say is what the loss gives now; and its fits are what theory says of two of them."""
    script = figure("divergences")
    panels = re.findall(r">([^<>]+)</text>", (ROOT / "docs" / "figures" / "divergences.svg").read_text())
    assert {one.name for one in script.SHOWN} == set(divergences.TABLE)
    fits = {one: script.fit(one) for one in script.SHOWN if one.name in ("forward_kl", "reverse_kl", "skew_kl")}
    for divergence, found in fits.items():
        said = script.title(divergence, found).split("\n")
        assert set(said) <= set(panels), said
    p = script.target().softmax(-1)
    forward, reverse, _ = fits.values()
    assert (forward.mean, forward.sd) == pytest.approx(script.moments(p), rel=1e-3)  # an exponential family's moments
    assert reverse.loss == pytest.approx(-math.log(0.6), abs=1e-3)  # q is the larger mode alone


def test_the_loss_page_has_every_divergence_and_backend() -> None:
    for name in (*divergences.TABLE, *BACKENDS):
        assert re.search(rf"^\| `{name}[`(]", DOCS["loss"], re.M), name


def test_the_install_page_has_the_variables_of_the_build() -> None:
    read = set(re.findall(r"DFT_KERNELS_[A-Z_]+", (ROOT / "setup.py").read_text()))
    assert set(re.findall(r"^\| `(DFT_KERNELS_\w+)`", DOCS["install"], re.M)) == read


def names_below(heading: str) -> list[str]:
    """The first cells of the tables of a section of the API page."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", DOCS["api"], re.M | re.S)
    return re.findall(r"^\| `(\w+)` \| \S", section, re.M)


PUBLIC = (
    "dft_kernels",
    *(f"dft_kernels.{name}" for name in ("divergences", "terms", "targets", "generation", "distributed", "testing")),
)


@pytest.mark.parametrize("module", PUBLIC)
def test_the_api_page_is_the_api(module: str) -> None:
    assert sorted(names_below(f"`{module}`")) == sorted(import_module(module).__all__)


def command_names(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert commands.main(["?"]) == 2
    return re.findall(r"\w+", re.findall(r"must be one of (.*), got", capsys.readouterr().err)[0])


def test_the_api_page_has_every_command_and_no_other_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(names_below("Commands")) == command_names(capsys)
    assert re.findall(r"^## (.*)$", DOCS["api"], re.M) == [*(f"`{module}`" for module in PUBLIC), "Commands"]


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        commands.main([*words, "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


def test_command_lines_have_flags_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `dft-kernels ...` line of the pages."""
    from dft_kernels.training.config import Job
    from dft_kernels.training.trainer import DFTConfig

    known, seen = command_names(capsys), set()
    trained = {f"--{one.name}" for kind in (Job, DFTConfig) for one in dataclasses.fields(kind)}
    for line in (line for text in TEXT.values() for line in re.findall(r"^(?:    )?dft-kernels (\w.*)$", text, re.M)):
        command, *rest = line.split("  #")[0].split()
        assert command in known, line
        seen.add(command)
        flags = {word for word in rest if word.startswith("--")}
        if command == "train":
            assert flags <= trained, line
        elif flags:
            words = [command, rest[0]] if command == "target" else [command]
            assert flags <= set(re.findall(r"--[\w-]+", help_of(words, capsys))), line
    assert seen == set(known)


def tree() -> set[str]:
    """Files and folders of the design page's tree, as paths."""
    (block,) = re.findall(r"^## The tree\n\n```\n(.*?)^```$", DOCS["design"], re.M | re.S)
    found, folders = set(), [""]
    for line in block.splitlines():
        indent, name = re.fullmatch(r"((?:  )*)(\S+)(?: +\S.*)?", line).groups()  # type: ignore[union-attr]
        folders = folders[: len(indent) // 2 + 1]
        found.add(folders[-1] + name)
        folders.append(folders[-1] + name)
    return found


def test_the_design_page_has_the_tree() -> None:
    """Every source file of the package, of triton_ops, csrc and bench; folders alone elsewhere."""
    kinds = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".sh", ".md")
    real = {"tests/", "docs/", "examples/"}
    for top in ("dft_kernels", "triton_ops", "csrc", "bench"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in kinds and path.name != "__init__.py":
                name = path.relative_to(ROOT)
                real |= {name.as_posix(), *(f"{parent.as_posix()}/" for parent in name.parents if parent.name)}
    listed = tree()
    assert not sorted(name for name in listed if not (ROOT / name).exists())
    assert not sorted(real - listed)


def test_the_design_page_has_the_floors() -> None:
    order = re.findall(r"^\d+\. (`.*)$", DOCS["design"].split("## The tree")[0], re.M)
    order = [line for line in order if re.match(r"`\w+`(, `\w+`)*( \(|$)", line)]
    assert [set(re.findall(r"`(\w+)`", line)) for line in order] == list(FLOORS)
    (above,) = re.findall(r"^(.*) may import any of them", DOCS["design"], re.M)
    assert set(re.findall(r"`(\w+)`", above)) == ANYWHERE


# ---- the examples, each on its own


def examples() -> list[Any]:
    found = []
    for path, text in TEXT.items():
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
            line = text[: block.start()].count("\n") + 1
            found.append(pytest.param(path, line, block[1], id=f"{path.name}:{line}"))
    return found


EXAMPLES = examples()


def tiny(hidden_size: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=hidden_size, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model at student/ and a store at teacher/."""
    at = tmp_path_factory.mktemp("examples")
    tokenizer = words()
    tiny(16).save_pretrained(at / "student")
    tokenizer.save_pretrained(at / "student")
    sequences = [torch.randint(4, 100, (10,)) for _ in range(12)]
    dft_kernels.capture(tiny(24), tokenizer, sequences, at / "teacher", "topk", k=20)
    return at


def words() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def given() -> dict[str, Any]:
    """What the pages take for granted."""
    model, teacher = tiny(16).train(), tiny(24)
    ids = torch.randint(4, 100, (2, 9))
    hidden = torch.randn(2, 9, 16, requires_grad=True)
    return {
        "torch": torch, "model": model, "teacher": teacher, "tokenizer": words(), "ids": ids, "labels": ids,
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "dataset": [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.randint(4, 100, (8, 9))],
        "texts": [" ".join(WORDS[(7 * n + k * k) % 96] for k in range(20)) + "." for n in range(40)],
        "hidden": hidden, "weight": torch.randn(100, 16, requires_grad=True),
        "teacher_hidden": torch.randn(2, 9, 24), "teacher_weight": torch.randn(100, 24),
        "teacher_logits": torch.randn(2, 9, 100), "stored_logits": torch.randn(18, 100),
        "frequencies": torch.full((100,), 0.01),
    }  # fmt: skip


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("path", "line", "code"), EXAMPLES)
def test_an_example_runs(
    path: Path,
    line: int,
    code: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if "torch.distributed" in code:
        request.getfixturevalue("one_process")
    for optional in re.findall(r"^from (trl|datasets) import", code, re.M):
        pytest.importorskip(optional)
    monkeypatch.chdir(folder)
    whole = "from_pretrained" in code  # takes nothing for granted
    scope = {} if whole else given()
    tree = ast.increment_lineno(ast.parse(code), line)  # so that a traceback shows the page's line
    with StandIn(lambda *asked: TinyModel(scope["teacher"], words())(*asked)) as server:
        scope |= {} if whole else {"url": server.url}
        exec(compile(tree, str(path), "exec"), scope)
    if whole:
        assert capsys.readouterr().out.count("loss ") == 2  # a step a batch
        return
    if "loss" in scope:
        assert 0 < float(scope["loss"].detach()) < 100
    if "backward()" in code:
        gradients = [
            scope["weight"].grad,
            getattr(scope.get("head"), "grad", None),
            *(parameter.grad for parameter in scope["model"].parameters()),
        ]
        assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)
    assert scope["teacher"].lm_head.weight.grad is None
