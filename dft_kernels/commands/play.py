"""`dft-kernels play`: a page on this machine to try a model's steps of generation on."""

from __future__ import annotations

import argparse
import ipaddress
import socket
from typing import Any
from urllib.parse import quote

import transformers

from ..generation.settings import Settings
from ..materials.sources import MODEL_HELP, model_of, tokenizer_of, trained_model
from ..play.guard import SHORTEST, is_loopback
from ..targets import target_file
from .arguments import Checked, Help, Parser, Whole
from .flags import add_cache


def parser() -> Parser:
    """The options of `dft-kernels play`."""
    made = Parser(
        prog="dft-kernels play",
        description="A page on this machine: a model beside its base, or beside itself with settings, token by token, "
        "with each token's entropy and shift, and the distance of the text from a target as it grows.",
        formatter_class=Help,
    )
    add = made.add_argument
    add("model", help="what dft-kernels train saved: a model, an adapter of PEFT, or a correction; or any model")
    add("--base", default=None, help=f"{MODEL_HELP}; by default what it was trained from")
    add(
        "--target", nargs="+", type=Checked(target_file.load), default=[], metavar="FILE",
        help="files of dft-kernels target build to choose from, beside the presets",
    )  # fmt: skip
    add("--style-base", type=Checked(target_file.load), default=Settings.style_base, metavar="FILE",
        help="what a style leads from: a file of dft-kernels gap --own, or a preset")  # fmt: skip
    add("--native", type=Checked(target_file.load), default=None, metavar="FILE",
        help="the model's own statistics for the refiner, of dft-kernels gap --own")  # fmt: skip
    add("--host", type=Checked(_check_host), default="127.0.0.1", help="address to serve on; another asks for --token")
    add("--port", type=Whole(1, 65535), default=None, help="by default one that is free")
    add("--token", type=Checked(_check_token), default=None, help="what a visitor must know; it is not encrypted")
    add_cache(made)
    return made


def _check_host(text: str) -> None:
    if text == "localhost":
        return
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(
            f"host must be an address of this machine, got {text!r}. Write one, such as 0.0.0.0."
        ) from None


def _check_token(text: str) -> None:
    if len(text) < SHORTEST or not (text.isascii() and text.isprintable()):
        got = f"{len(text)}, some of them others" if len(text) >= SHORTEST else len(text)
        raise ValueError(f"token must have at least {SHORTEST} characters, of ASCII, got {got}. Write another.")


def run(options: argparse.Namespace) -> int:
    """Load, and serve until interrupted."""
    if options.token is None and not is_loopback(options.host):
        raise ValueError(
            f"play: token must be given with --host {options.host}, got none. Name one that visitors know, or leave "
            "--host out and reach the page by ssh -L."
        )
    listening = listen(options.host, options.port)
    with listening:
        served = _served(options)
        from ..play.page import application

        host, port = listening.getsockname()[:2]
        query = "" if options.token is None else f"?token={quote(options.token, safe='')}"
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}", flush=True)
        server(application(served, options.token)).run(sockets=[listening])
    return 0


def _served(options: argparse.Namespace) -> Any:
    from ..play.session import Served

    transformers.utils.logging.disable_progress_bar()
    chosen = trained_model(options.model, options.base)
    tokenizer = tokenizer_of(chosen.whole, options.cache)
    targets = {name: target_file.load(name) for name in target_file.presets()}
    targets |= {name: target_file.load(name, tokenizer) for name in options.target}
    for name in {options.native, options.style_base} - {None, Settings.style_base}:
        target_file.load(name, tokenizer)
    models = {options.model: chosen.load(options.cache)[0]}
    if chosen.base is not None:
        models = {chosen.base: model_of(chosen.base, options.cache, argument="base")[0], **models}
    return Served(models, tokenizer, targets, base=options.base, style_base=options.style_base, native=options.native)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket on an address, of a free port by default."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port or 0), family=family)
    except OSError as error:
        of = "host" if port is None else "port"
        got, why = host if port is None else port, str(error.strerror).partition(" (")[0]  # that names the host again
        raise ValueError(
            f"play: {of} must be one that this machine can listen on, got {got}: {why}. Name another."
        ) from error


def server(application: Any) -> Any:
    """uvicorn's, of one page. It ends although streams to browsers are open."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1))
