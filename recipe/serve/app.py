"""What stands before the two llama-servers: the key, the choice of the model, the limits, the chat page.

A request goes on as it is to the server of the model that it names, and the answer comes back byte by byte; so what
llama-server understands (stop, seed, top_p, logprobs, stream_options, …) is understood, and what it complains about is
said in its words, which have OpenAI's form.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from recipe.serve.llama import Model

HERE = Path(__file__).parent
MOST_BYTES = 2**20  # of a request; more than any context here can hold
LOCAL_NAMES = ["127.0.0.1", "localhost"]
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
PAGE = {
    "/": ("text/html", [HERE / "page.html"]),
    "/page.js": ("text/javascript", [HERE / "page.js"]),
    # The house's look, as reports have it, and what only the chat needs.
    "/style.css": ("text/css", [HERE.parent / "report" / "style.css.jinja", HERE / "style.css"]),
}
T = TypeVar("T")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, kind: str, message: str, code: str | None = None):
        self.status, self.kind, self.message, self.code = status, kind, message, code

    def response(self) -> JSONResponse:
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status)


def make(models: Sequence[Model], key: str, form: dict[str, Any]) -> FastAPI:
    """`form`: how the training rows put a question, for the page: {"messages": bool, "system": str | None}."""
    app = FastAPI(openapi_url=None)
    # Another site's page that has given itself this address (DNS rebinding) comes with its own name.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES, www_redirect=False)
    app.add_exception_handler(ApiError, lambda _request, error: error.response())
    app.add_exception_handler(HTTPException, _not_here)
    _add_page(app)
    client = httpx2.AsyncClient(timeout=None, trust_env=False, limits=httpx2.Limits(max_connections=None))
    by_name = {model.name: model for model in models}

    def keyed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError(401, "invalid_request_error", "the key is missing or wrong", "invalid_api_key")

    needs_key = [Depends(keyed)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=needs_key)
    async def list_models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "recipe"} for name in by_name]
        return {"object": "list", "data": data, "form": form}

    @app.post("/v1/chat/completions", dependencies=needs_key)
    @app.post("/v1/completions", dependencies=needs_key)
    async def answer(request: Request) -> Response:
        asked = await _asked(request)
        model = by_name.get(str(asked.get("model")))
        if model is None:
            names = " and ".join(by_name)
            message = f"there is no model {asked.get('model')!r} here, only {names}"
            raise ApiError(404, "invalid_request_error", message, "model_not_found")
        asked.pop("lora", None)  # base and tuned stay what they are called
        onward = client.build_request(
            "POST",
            model.address + request.url.path,
            json=asked,
            headers={"Authorization": f"Bearer {model.key}"},
        )
        response = await _unless_gone(request, client.send(onward, stream=True))
        kind = response.headers.get("content-type")
        if response.is_success and asked.get("stream"):
            return StreamingResponse(_bytes(response), media_type=kind)
        content = await _unless_gone(request, _whole(response))
        return Response(content, response.status_code, media_type=kind)

    return app


async def _asked(request: Request) -> dict[str, Any]:
    """The request's JSON object."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            message = f"the request has more than {MOST_BYTES:,} bytes"
            raise ApiError(413, "invalid_request_error", message, "request_too_large")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_request_error", f"the request is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ApiError(400, "invalid_request_error", "the request is not a JSON object")
    return found


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; where the client goes away it is cancelled, which ends the work of llama-server too."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "invalid_request_error", "the client went away")  # which nobody reads
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _bytes(response: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for part in response.aiter_raw():
            yield part
    finally:
        await response.aclose()


async def _whole(response: httpx2.Response) -> bytes:
    try:
        return await response.aread()
    finally:
        await response.aclose()


def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, "invalid_request_error", message).response()


def _add_page(app: FastAPI) -> None:
    def add(path: str, kind: str, files: list[Path]) -> None:
        content = "".join(file.read_text(encoding="utf-8") for file in files)

        async def send() -> Response:
            return Response(content, media_type=kind, headers=SAFE)

        app.get(path)(send)

    for path, (kind, files) in PAGE.items():
        add(path, kind, files)
