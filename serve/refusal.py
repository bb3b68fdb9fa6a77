"""Answers that refuse: a status, a short code for programs, and one sentence for people."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):  # noqa: N818 - an answer, and seldom an error of ours
    """A request that is not answered as it hoped.

    Args:
        status: HTTP status.
        code: A short name that stays the same, such as `too_many_items`.
        message: What was expected and what came; nothing of the server's inside.
        headers: Further headers, such as `Retry-After`.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"code": self.code, "message": self.message}}


def busy(what: str, seconds: float) -> Refusal:
    """The answer of a full queue: come again in that many seconds."""
    after = str(max(1, min(60, round(seconds + 0.5))))
    return Refusal(503, "busy", f"{what} is full: try again in {after} s", {"Retry-After": after})
