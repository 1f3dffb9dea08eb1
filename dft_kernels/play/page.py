"""The page, as gradio's Blocks: what stands where, and what each event does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio

from ..evaluation.wording import number, visible
from .distances import Distance
from .guard import App, Guard, Local
from .hover import SHADES
from .session import CANCELLED, DONE, RANGES, WAITING, WRITING, Served, Session

_EVERY, _MEASURED = 0.1, 1.0  # seconds between what is sent while a text is written, and between its distances
_HERE = Path(__file__).parent
SLIDERS = {  # keyword of `Served.ask`: label, step, value, and what it does
    "temperature": ("Temperature", 0.05, 1.0, "0: the likeliest token"),
    "top_p": ("Top-p", 0.01, 1.0, "of the likeliest tokens of this mass"),
    "min_p": ("Min-p", 0.01, 0.0, "without tokens below this share of the likeliest one's probability"),
    "top_n_sigma": ("Top-n-sigma", 0.1, 0.0, "within n standard deviations of the highest score; 0: off"),
    "diversity": ("Diversity", 0.05, 0.0, "entropy of each token: 1 + this times the model's"),
    "gamma": ("Style mixture", 0.1, 0.0, "gamma; 0: none, 1: all of it"),
    "bound": ("Refiner bound", 0.01, 0.0, "KL in nats a token; 0: no refiner"),
}
_MUTED = {"": "#5b5f66", "_dark": "#a4a9b1"}  # as page.css has it: gradio's own is too faint to read
_FAINT = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "input_placeholder_color")
_COLOURS = {
    **{f"{name}{scheme}": colour for name in _FAINT for scheme, colour in _MUTED.items()},
    **{f"button_primary_background_fill{scheme}": "#0b5394" for scheme in _MUTED},
    **{f"button_primary_background_fill_hover{scheme}": "#083e70" for scheme in _MUTED},
}


def application(served: Served, token: str | None = None) -> App:
    """The page as an ASGI application that serves no one without the token, and asks nothing of anyone."""
    import fastapi

    theme = gradio.themes.Default(
        primary_hue="blue",
        neutral_hue="zinc",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(**_COLOURS)
    head = f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>"
    css = (_HERE / "page.css").read_text(encoding="utf-8")
    made = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), blocks(served), path="/", theme=theme, css=css, head=head,
        footer_links=[], show_error=True, ssr_mode=False, enable_monitoring=False, run_history=False,
    )  # fmt: skip
    return Guard(Local(made), token)


def blocks(served: Served) -> Any:
    """The page."""
    with gradio.Blocks(title=f"dft-kernels play: {visible(served.name)}", analytics_enabled=False) as made:
        gradio.HTML(
            f"<h1>{escape(visible(served.name))}</h1><p>Text, drawn token by token"
            f"{', beside its base' if not served.alone else ', as the model is and with the settings'}.</p>"
        )
        session = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                prompt = gradio.Textbox(
                    label="Prompt", lines=3, max_lines=12, placeholder="How a text begins", info="Shift and Enter write"
                )
                with gradio.Row():
                    write = gradio.Button("Write", variant="primary", min_width=100)
                    cancel = gradio.Button("Cancel", min_width=100)
                status = gradio.HTML(said(""), elem_id="status")
                texts, summaries = [], []
                with gradio.Row():
                    for at, name in enumerate(served.sides):
                        with gradio.Column(min_width=280):
                            gradio.HTML(f"<h2>{escape(visible(name))}</h2>")
                            texts.append(gradio.HTML("", elem_id=f"text-{at}", elem_classes="text"))
                            summaries.append(gradio.HTML("", elem_classes="summary"))
                gradio.HTML(_LEGEND)
                distances = gradio.HTML("", elem_classes="distances")
                command = gradio.Textbox(label="The same from the command line", interactive=False, elem_id="command")
                with gradio.Row():
                    copy = gradio.Button("Copy the command line", min_width=200)
                    save = gradio.Button("Save the pair as JSONL", min_width=200)
            with gradio.Column(scale=1, min_width=300):
                gradio.HTML("<h2>Settings</h2>")
                sliders = _settings(served)
        lines = gradio.Textbox(visible=False)

        def wrote(mine: Session | None, text: str, *values: Any) -> Iterator[dict[Any, Any]]:
            mine = Session() if mine is None else mine
            try:
                asked = served.ask(text, **dict(zip(sliders, values, strict=True)))
                yield {session: mine, status: said("Begun."), command: served.command_line(asked)}
                sent = measured = -_MEASURED
                for _ in mine.write(served, asked):
                    now = time.monotonic()
                    if now - sent < _EVERY:
                        continue
                    sent, shown = now, _shown(mine)
                    if now - measured >= _MEASURED:
                        measured, shown[distances] = now, table(served, mine, mine.distances(served))
                    yield shown
                yield {**_shown(mine), distances: table(served, mine, mine.distances(served))}
            except (ValueError, RuntimeError) as error:
                yield {session: mine, status: said(_plain(error), "error")}

        def _shown(mine: Session) -> dict[Any, Any]:
            return {
                status: said(progress(mine)),
                **{one: written.html for one, written in zip(texts, mine.written, strict=True)},
                **{one: written.summary() for one, written in zip(summaries, mine.written, strict=True)},
            }

        gradio.on(
            [write.click, prompt.submit], wrote, [session, prompt, *sliders.values()],
            [session, status, *texts, *summaries, distances, command],
            concurrency_limit=None, show_progress="hidden", trigger_mode="once", api_visibility="private",
        )  # fmt: skip
        beside = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        cancel.click(lambda mine: None if mine is None else mine.cancel(), session, None, **beside)
        copy.click(None, command, None, js="(text) => { window.dftPlay.copy(text); }", api_visibility="private")
        save.click(lambda mine: "" if mine is None else mine.jsonl(served), session, lines, **beside).then(
            None, lines, None, js="(text) => { window.dftPlay.save(text); }", api_visibility="private"
        )
    return made


def _slider(name: str) -> Any:
    label, step, value, info = SLIDERS[name]
    return gradio.Slider(*RANGES[name], value, step=step, label=label, info=info)


def _settings(served: Served) -> dict[str, Any]:
    """The keywords of `Served.ask`, but for the prompt."""
    names = list(served.rulers)
    first = "literary" if "literary" in names else names[0]
    return {
        **{name: _slider(name) for name in ("temperature", "top_p", "min_p", "top_n_sigma", "diversity")},
        "style": gradio.Dropdown(names, value=first, label="Style", info="whose tokens there shall be more of"),
        "gamma": _slider("gamma"),
        "target": gradio.Dropdown(names, value=first, label="Target", info="to measure by, and to refine towards"),
        "bound": _slider("bound"),
        "length": gradio.Slider(
            1, served.longest, min(128, served.longest), step=1, label="Length", info="tokens at most"
        ),
        "seed": gradio.Number(0, label="Seed", info="of the draws", precision=0, minimum=0),
    }


def said(text: str, kind: str = "") -> str:
    """The line that says what is going on, which screen readers are told of."""
    return f'<p role="status" class="status {kind}">{escape(visible(text))}</p>'


def progress(session: Session) -> str:
    """What is going on; while a text is written always the same, for who is read every change."""
    assert session.asked is not None
    if session.state == WAITING:
        first = "one text comes" if session.before == 1 else f"{session.before} texts come"
        return f"Waiting: {first} first."
    count = max((len(one.drawn) for one in session.written), default=0)
    return {
        WRITING: f"Writing at most {session.asked.length} tokens.",
        DONE: f"Done: {count} tokens.",
        CANCELLED: f"Cancelled after {count} tokens.",
    }[session.state]


def _plain(error: Exception) -> str:
    """An error's own words, without the function that raised it."""
    text = " ".join(str(error).split()) or type(error).__name__
    where, colon, rest = text.partition(": ")
    return rest if colon and where.isidentifier() else text


_LEGEND = (
    '<p class="legend">Shade of a token: KL(what it was drawn from ‖ the model’s own) '
    + " ".join(f'<span class="shade{at + 1}">from {edge:g}</span>' for at, edge in enumerate(SHADES))
    + ' nats. Point at a token, or go to it with Tab and the arrow keys.</p><p id="looked-at" role="status"></p>'
)


def table(served: Served, session: Session | None, columns: list[list[Distance]]) -> str:
    """Distances in floors, a row a statistic and a column a text."""
    if session is None or session.asked is None or not columns:
        return ""
    of = escape(visible(session.asked.target))
    heads = "".join(f'<th scope="col">{escape(visible(name))}</th>' for name in served.sides)
    body = "".join(
        f'<tr><th scope="row">{escape(cells[0].label)}</th>{"".join(map(_cell, cells))}</tr>'
        for cells in zip(*columns, strict=True)
    )
    kl = "".join(f"<td>{one.kl:.2f} nats</td>" for one in session.written)
    return (
        f"<table><caption>Distance of the text so far from {of}, in floors: 1 is what a text of this size, drawn word "
        "by word from the target itself, is off by; people’s own text lies at about 1, seldom above 3.</caption>"
        f'<thead><tr><th scope="col">Statistic</th>{heads}</tr></thead>'
        f'<tbody>{body}<tr><th scope="row">KL spent</th>{kl}</tr></tbody></table>'
    )


def _cell(one: Distance) -> str:
    if one.ratio is None:
        return f'<td class="none">{escape(one.why or "no floor")}</td>'
    title = f"distance {number(one.value)}, floor {number(one.floor)}"
    return f'<td title="{escape(title)}">{one.ratio:.1f} floors</td>'
