"""How an error is said."""

from __future__ import annotations

from typing import NoReturn


def fail(
    function: str, argument: str, relation: str, got: object, remedy: str, kind: type[Exception] = ValueError
) -> NoReturn:
    """Raise the one form of message that users of this package see."""
    raise kind(f"{function}: {argument} must {relation}, got {got}. {remedy}.")
