"""JSON in, JSON out, without the framework's machinery: what it costs a request is a quarter of a small model's pass.

FastAPI declares the routes, documents them, and answers GET; the POST routes' functions are called from here, with the
same models of pydantic checking what comes and what goes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, get_type_hints

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from serve.refusal import Refusal

logger = logging.getLogger(__name__)
Endpoint = Callable[[Any], Awaitable[BaseModel]]


class Direct:
    """One POST route: a function of one request model that returns an answer model.

    Args:
        path: The route.
        endpoint: The function; its argument `request` says by its annotation what it takes.
    """

    def __init__(self, path: str, endpoint: Endpoint):
        self.path, self.endpoint = path, endpoint
        self.model: type[BaseModel] = get_type_hints(endpoint)["request"]

    async def answer(self, body: bytes) -> bytes:
        """The answer to a body, as JSON.

        Raises:
            Refusal: Not JSON, not a valid request, or what the function refuses; 500 where it fails.
        """
        try:
            request = self.model.model_validate(parsed(body))
        except ValidationError as error:
            raise invalid(error.errors(include_url=False, include_input=False)[:5]) from None
        try:
            found = await self.endpoint(request)
            return found.__pydantic_serializer__.to_json(found)
        except Refusal:
            raise
        except Exception as error:
            logger.error("POST %s failed", self.path, exc_info=error)
            raise Refusal(500, "internal", "something went wrong in the server") from None


def direct_routes(app: FastAPI) -> dict[str, Direct]:
    """The POST routes of an application by their path."""
    return {
        route.path: Direct(route.path, route.endpoint)
        for route in app.routes
        if isinstance(route, APIRoute) and route.methods == {"POST"}
    }


def parsed(body: bytes) -> Any:
    """A body's JSON.

    Raises:
        Refusal: 422: not JSON; 400: not text, or nested too deeply.
    """
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        text = f"not JSON, at character {error.pos}: {error.msg}"
        raise Refusal(422, "invalid", text[:200]) from None
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise Refusal(400, "bad_request", "the body could not be read as JSON") from None


def invalid(faults: list[Any]) -> Refusal:
    """The answer to a request that is not as its model wants it: where, and what was expected."""
    texts = []
    for fault in faults:
        where = ".".join(str(part) for part in fault["loc"])[:100] or "body"
        texts.append(f"{where}: {fault['msg'].removeprefix('Value error, ')}")
    text = "; ".join(texts).encode("ascii", "backslashreplace").decode()  # a key may be half a character
    return Refusal(422, "invalid", text)
