"""Steps of generation: what each does to a distribution, by another way; what stands before what; and in `generate`,
nothing where they are idle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax
from target_texts import WORDS, documents
from tiny_models import far, word_tokenizer
from transformers import CompileConfig, MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

from dft_kernels.backends import extension
from dft_kernels.generation import native
from dft_kernels.generation.refiner import IterativeRefiner
from dft_kernels.generation.sampling import continuations
from dft_kernels.generation.steps import Watch, ordered, warpers
from dft_kernels.generation.style import StyleShift
from dft_kernels.generation.temperature import LEAST, Diversity, EntropyTemperature
from dft_kernels.generation.truncation import TopNSigma
from dft_kernels.targets import corpus
from dft_kernels.targets.target import Target

IDS = torch.zeros(6, 3, dtype=torch.int64)


@pytest.fixture(params=["native", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the C++ kernels, and as where these are not built, or on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(native, "MODULE", None)
    elif native.MODULE is None:
        pytest.skip(str(extension.REASON))
    return str(request.param)


def scores(kind: str) -> torch.Tensor:
    """[6, 3000]: what models and truncation make of rows."""
    made = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))
    if kind == "sharp":
        made = 6 * made
    elif kind == "flat":
        made = 0.01 * made
    elif kind == "two":  # two tokens and a tail far below
        made[:, :2] += torch.tensor([30.0, 29.0])
    elif kind == "truncated":
        made = (2 * made).masked_fill(made < 1.5, -math.inf)
    elif kind == "one":
        made = made.masked_fill(torch.arange(3000) > 0, -math.inf)
    return made + 100  # of a row's constant nothing depends


def entropy(row: np.ndarray, temperature: float = 1.0) -> float:
    logs = log_softmax(row.astype(np.float64) / temperature)
    return float(-(np.exp(logs) * np.where(np.isfinite(logs), logs, 0)).sum())


KINDS = ("plain", "sharp", "flat", "two", "truncated", "one")


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [-0.9, -0.3, -0.01, 0.01, 0.1, 0.5, 3.0])
def test_diversity_finds_the_temperature(kind: str, d: float) -> None:
    given, step = scores(kind), Diversity(d, most=3.0)
    made = step(IDS, given)
    for row, out in zip(given.numpy(), made.double().numpy(), strict=True):
        goal = min(entropy(row) * (1 + d), math.log(np.isfinite(row).sum()))
        ends = (LEAST, 3.0)
        if entropy(row, ends[0]) < goal < entropy(row, ends[1]):
            by = brentq(lambda t, row=row, goal=goal: entropy(row, t) - goal, *ends)
            assert entropy(out) == pytest.approx(goal, abs=1e-4)
        else:
            by = ends[goal >= entropy(row, ends[1])]
        expected = softmax(row.astype(np.float64) / by)
        np.testing.assert_allclose(np.exp(out), expected, rtol=1e-2, atol=2e-3)
        assert (np.isfinite(out) == np.isfinite(row)).all()
        assert np.exp(out).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("by")
def test_an_entropy_that_cannot_be_had_is_at_the_limit() -> None:
    for given in (3 * torch.randn(8, 1000), -1.1 * torch.arange(1.0, 2001).log().repeat(2, 1)):
        for d, limit in ((1.0, 2.0), (3.0, 2.0)):
            made = Diversity(d, most=2.0)(IDS, given)
            far = [entropy(row) * (1 + d) > entropy(row, limit) for row in given.numpy()]
            expected = (given / limit).log_softmax(-1)
            assert torch.allclose(made[far], expected[far], atol=1e-4)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_temperature(kind: str) -> None:
    given = scores(kind)
    made = EntropyTemperature(0.7, 1.3, 0.8)(IDS, given).double().numpy()
    for row, out in zip(given.double().numpy(), made, strict=True):
        by = max(LEAST, 1.3 * 0.8 ** (0.7 / max(entropy(row), 1e-6)))
        np.testing.assert_allclose(np.exp(out), softmax(row / by), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("kind", ["plain", "sharp", "truncated", "one"])
def test_top_n_sigma(kind: str) -> None:
    given = scores(kind)
    made = TopNSigma(1.5)(IDS, given).double().numpy()
    for row, out in zip(given.double().numpy(), made, strict=True):
        kept = row >= row.max() - 1.5 * row[np.isfinite(row)].std()
        assert (np.isfinite(out) == kept).all()
        np.testing.assert_allclose(out[kept], log_softmax(np.where(kept, row, -np.inf))[kept], atol=1e-4)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e20, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("n", [0.5, 1.5, 4.0])
def test_top_n_sigma_of_tokens_masked_by_a_finite_number(n: float, mask: float) -> None:
    """Such a mask is a score as any, which widens sigma, and what stays has its own probability. Masks whose squares
    fp32 does not hold may be left out or in, at a probability of 0."""
    given = scores("sharp").masked_fill(torch.arange(3000) % 3 > 0, mask)
    made = TopNSigma(n)(IDS, given).double().numpy()
    for row, out in zip(given.double().numpy(), made, strict=True):
        kept = row >= row.max() - n * row.std()
        assert kept.all() == (n > 2)
        assert (np.isfinite(out) == kept).all() or mask < -1e19
        assert np.isfinite(out[row > mask / 2]).all()
        np.testing.assert_allclose(np.exp(out), softmax(np.where(kept, row, -np.inf)), rtol=1e-4, atol=1e-7)


STEPS = [Diversity(0.2), Diversity(-0.3), EntropyTemperature(0.7, 1.3), TopNSigma(1.5)]


@pytest.mark.skipif(native.MODULE is None, reason=str(extension.REASON))
@pytest.mark.parametrize("size", [1, 15, 16, 17, 128, 129, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_are_what_torch_computes(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every length of a row's last vector, with tokens left out, of rows apart in memory, by any threads."""
    made = 3 * torch.randn(5, 2 * size, generator=torch.Generator().manual_seed(2), dtype=dtype)
    given = made[:, ::2]
    if size > 1:
        given[1, size // 2 :] = given[2, :1] = -math.inf
    before, threads = given.clone(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = [step(IDS, given) for step in STEPS]
        torch.set_num_threads(3)
        assert all(torch.equal(step(IDS, given), one) for step, one in zip(STEPS, found, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(given, before)
    monkeypatch.setattr(native, "MODULE", None)
    for step, one in zip(STEPS, found, strict=True):
        torch.testing.assert_close(one, step(IDS, given), rtol=1e-4, atol=1e-4)
    assert all(one.dtype == dtype for one in found)


@pytest.mark.usefixtures("by")
def test_what_is_no_number_stays_none() -> None:
    """A row with a NaN, and one without a token, are no distribution, and their neighbours are one."""
    given = torch.randn(6, 40)
    given[1, 3], given[2], given[3, 5] = math.nan, -math.inf, math.inf
    for step in STEPS:
        found = step(IDS, given)
        assert found[1:4].isnan().any(1).all(), step
        assert torch.equal(found[[0, 4, 5]].exp().sum(1).round(decimals=5), torch.ones(3)), step


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_step_keeps_the_dtype(words: Any, pair: tuple[Target, Target], dtype: torch.dtype) -> None:
    """And is off by no more than the rounding of what it is given and gives."""
    given = torch.randn(4, len(words), generator=torch.Generator().manual_seed(4)).to(dtype)
    given[1, 7] = -math.inf
    ids = torch.randint(3, len(words), (4, 9), generator=torch.Generator().manual_seed(5))
    of = ("sentences", "punctuation", "tokens", "ngrams")
    steps = [*STEPS, StyleShift(*pair, 0.5), IterativeRefiner(pair[1], words, pair[0], bound=0.1, towards=of)]
    for step in steps:
        made, expected = step(ids, given), step(ids, given.double())
        assert made.dtype == dtype, step
        assert not torch.equal(expected, given.double().log_softmax(-1)), step
        size = expected.masked_fill(expected.isinf(), 0.0).abs().amax()
        atol = float(size) * torch.finfo(dtype).eps + 1e-4
        torch.testing.assert_close(made.double(), expected, rtol=0, atol=atol)


def test_gradients_are_not_cut_off() -> None:
    given = torch.randn(2, 40, requires_grad=True)
    assert native.computed("scores_within", given, 1.0) is None


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def pair(words: Any) -> tuple[Target, Target]:
    """Of two kinds of writing: the second has cats where the first has dogs, and longer sentences."""
    plain = [text.replace("The", "The dog") for text in documents(80)]
    other = [text.replace("The", "The cat").replace("word1 ", "and the word1 ") for text in documents(80, seed=1)]
    made = [corpus.build(texts, words, name=name) for name, texts in (("plain", plain), ("other", other))]
    return made[0], made[1]


@pytest.mark.usefixtures("by")
def test_style_shift(words: Any, pair: tuple[Target, Target]) -> None:
    base, target = pair
    V = len(words)
    given = torch.randn(6, V + 5)  # models pad their vocabularies
    step = StyleShift(target, base, 0.5, untouched=[words.convert_tokens_to_ids("late")])
    made = step(IDS, given)
    n = min(base.about.tokens or 0, target.about.tokens or 0)
    ratio = np.zeros(V + 5)
    ratio[:V] = np.log((target["unigram"].numpy() * n + 5) / (base["unigram"].numpy() * n + 5))
    assert ratio[words.convert_tokens_to_ids("cat")] > 3 > -3 > ratio[words.convert_tokens_to_ids("dog")]
    np.testing.assert_allclose(made, log_softmax(given.double().numpy() + 0.5 * ratio, axis=1), atol=1e-5)
    with pytest.raises(ValueError, match=r"StyleShift: target must be of the model's 10 tokens, got 79"):
        step(IDS, given[:, :10])
    with pytest.raises(ValueError, match="StyleShift: gamma must be finite, got nan"):
        StyleShift(target, base, math.nan)
    alone = corpus.build(documents(10), name="text alone")
    with pytest.raises(ValueError, match="StyleShift: target and base must be of one tokenizer, got None and"):
        StyleShift(alone, base, 0.5)


def test_what_stands_before_what(pair: tuple[Target, Target]) -> None:
    style, diversity, sigma = StyleShift(*pair, 0.5), Diversity(0.1), TopNSigma(1.0)
    warm, top_p, min_p = TemperatureLogitsWarper(0.9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)
    assert list(ordered([style, warm, top_p, min_p, sigma, diversity])) == [style, warm, top_p, min_p, sigma, diversity]
    with pytest.raises(ValueError, match=r"in the order style, .* got Diversity\(.*\) before TopNSigma\("):
        ordered([diversity, sigma])
    with pytest.raises(ValueError, match="in the order"):
        ordered([top_p, warm])
    with pytest.raises(ValueError, match=r"hold one step of entropy, got Diversity\(.*\) and EntropyTemperature\("):
        ordered([diversity, EntropyTemperature(1.0)])
    with pytest.raises(ValueError, match="hold no temperature with beams"):
        ordered([sigma, diversity], beams=4, sample=False)
    with pytest.raises(ValueError, match="hold no temperature with the likeliest token"):
        ordered([warm], sample=False)
    ordered([style, sigma, Diversity(0.0)], beams=4, sample=False)  # idle: nothing to refuse


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Diversity(-1.5), "Diversity: d must be at least -1, got -1.5"),
        (lambda: Diversity(math.nan), "Diversity: d must"),
        (lambda: Diversity(0.1, most=0.5), r"Diversity: most must lie in 1\.\.100, got 0\.5"),
        (lambda: EntropyTemperature(-1), "EntropyTemperature: theta must be at least 0, got -1"),
        (lambda: EntropyTemperature(1, 0), r"EntropyTemperature: temperature must lie in 0\.05\.\.100, got 0"),
        (lambda: EntropyTemperature(1, base=1.0), "EntropyTemperature: base must lie between 0 and 1, got 1.0"),
        (lambda: TopNSigma(0), "TopNSigma: n must be above 0, got 0"),
    ],
)
def test_wrong_settings(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_repr_says_what_it_does(pair: tuple[Target, Target]) -> None:
    assert repr(Diversity(0.1)) == "Diversity(H = 1.1 * H, T <= 2)"
    assert repr(EntropyTemperature(2, 0.9)) == "EntropyTemperature(T = 0.9 * 0.8^(2 / H))"
    assert repr(TopNSigma(1)) == "TopNSigma(score >= max - 1 sigma)"
    assert repr(TopNSigma()) == "TopNSigma(none left out)"
    assert repr(StyleShift(pair[1], pair[0], 0.5)) == "StyleShift(0.5 log(other / plain))"


def test_no_step_waits_for_the_device(words: Any, pair: tuple[Target, Target]) -> None:
    """On tensors without values whatever asks for one is an error, as it would be a wait on a GPU."""
    steps = [
        StyleShift(*pair, 0.5), TopNSigma(1.0), Diversity(0.1), EntropyTemperature(1.0),
        IterativeRefiner(pair[1], words, pair[0], bound=0.1),
    ]  # fmt: skip
    ids, given = (torch.empty(4, 9, dtype=torch.int64, device="meta"), torch.empty(4, len(words), device="meta"))
    watch = Watch()
    for step in watch.around(steps):
        given = step(ids, given)
    assert given.shape == (4, len(words))
    assert watch.kl[0].shape == (4,)


def test_defaults_leave_the_model_as_it_is(words: Any, pair: tuple[Target, Target]) -> None:
    model, prompts = far(vocab_size=len(words)), [[5, 6, 7], [8]]
    plain = continuations(model, words, prompts, 12, seed=3)
    idle = ordered([StyleShift(*pair), *warpers(), TopNSigma(), Diversity()])
    given = torch.randn(2, 79)
    assert all(step(IDS, given) is given for step in (*idle, EntropyTemperature()))
    assert continuations(model, words, prompts, 12, seed=3, logits_processor=idle) == plain


def test_warpers_are_those_of_generate(words: Any) -> None:
    model, prompts = far(vocab_size=len(words)), [[5, 6, 7], [8]]
    of_generate = continuations(model, words, prompts, 12, 3, temperature=0.8, top_p=0.9, min_p=0.02)
    ours = ordered(warpers(0.8, 0.9, 0.02))
    assert continuations(model, words, prompts, 12, 3, logits_processor=ours) == of_generate
    assert of_generate != continuations(model, words, prompts, 12, 3)


def test_steps_in_generate_do_what_they_do_alone(words: Any, pair: tuple[Target, Target]) -> None:
    """Batches of unequal prompts, beams, and a static cache."""
    model = far(vocab_size=len(words))
    steps = [StyleShift(pair[1], pair[0], 0.5), TopNSigma(2.0), Diversity(0.2)]
    watch = Watch()
    made = continuations(model, words, [[5, 6, 7], [8]], 6, seed=3, logits_processor=watch.around(ordered(steps)))
    static = {"cache_implementation": "static"}
    assert made == continuations(model, words, [[5, 6, 7], [8]], 6, 3, logits_processor=ordered(steps), **static)
    with torch.no_grad():  # the first draw of the first row, by hand
        logits = model(torch.tensor([[5, 6, 7]])).logits[:, -1].float()
    drawn = logits
    for step in steps:
        drawn = step(IDS[:1], drawn)
    q, p = (x[0].double().numpy() for x in (drawn, logits.log_softmax(-1)))
    assert float(watch.entropy[0][0]) == pytest.approx(entropy(q), abs=1e-4)
    kept = np.isfinite(q)
    assert float(watch.kl[0][0]) == pytest.approx(float((np.exp(q[kept]) * (q - p)[kept]).sum()), abs=1e-4)
    beams = {"num_beams": 3, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    shifted = continuations(model, words, [[8]], 6, logits_processor=ordered(steps[:2], beams=3, sample=False), **beams)
    assert shifted != continuations(model, words, [[8]], 6, **beams)


def test_steps_behind_compiled_decoding(words: Any, pair: tuple[Target, Target]) -> None:
    """One graph of the model, none of the steps, and the text that is drawn without it."""
    model, prompts = far(vocab_size=len(words)), [[5, 6, 7], [8]]

    def made(**more: Any) -> tuple[list[list[int]], float]:
        refiner = IterativeRefiner(pair[1], words, pair[0], bound=0.1, towards=("sentences", "tokens", "ngrams"))
        steps = [StyleShift(*pair, 0.2), *warpers(0.9, 0.95, 0.01), TopNSigma(3.0), Diversity(0.1), refiner]
        found = continuations(model, words, prompts, 8, 3, logits_processor=ordered(steps), **more)
        return found, refiner.report().kl

    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True  # generate compiles on a GPU alone
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    found, spent = made(cache_implementation="static", compile_config=compiled)
    assert counted["stats"]["unique_graphs"] == 1
    plain, kl = made()
    assert found == plain
    assert spent == pytest.approx(kl, rel=1e-4)
    assert kl > 1e-3
    assert len({token for row in found for token in row}) > 4
