"""The routes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from flask import Flask, Response, request
from prometheus_client.exposition import choose_encoder
from werkzeug.exceptions import HTTPException

from ..core.errors import EngineError, InvalidParamsError, ModelNotFoundError
from ..core.version import __version__
from .body import read_body
from .config import RESERVED_THREADS, ServerConfig
from .disconnects import DisconnectWatcher
from .formats import ChatFormat, CompletionFormat
from .generation import Generations
from .http_errors import RETRY_AFTER_S, ApiError, api_error, first_line
from .protocol import ChatRequest, CompletionRequest, parse
from .sampling import chat_params, chat_spelling, completion_params
from .tenants import tenant_of

if TYPE_CHECKING:
    from ..engine.llm import LLM

log = logging.getLogger("llm_engine.server")


def make_app(llm: LLM, config: ServerConfig, is_draining: Callable[[], bool]) -> Flask:
    """The WSGI application of one engine. Starts the thread that watches for disconnects.

    ``is_draining`` says whether the server is going down: then new work is refused.
    """
    vocabulary = llm.tokenizer
    assert vocabulary is not None, "whoever makes the engine sees to it"
    app = Flask("llm_engine.server", static_folder=None)
    watcher = DisconnectWatcher()
    watcher.start()
    generations = Generations(llm, watcher, config.http_threads - RESERVED_THREADS)
    names = config.served_model_name or (llm.model_name,)
    started = int(time.time())

    def check_admission() -> None:
        if is_draining():
            raise ApiError(503, "the server is shutting down")
        if llm.dead_cause is not None:
            raise api_error(llm.dead_cause)

    def check_model(name: str | None) -> None:
        if name is not None and name not in names:
            raise ModelNotFoundError(f"model {name!r} is not served here; served: {', '.join(names)}")

    @app.post("/v1/completions")
    def completions() -> Response:
        check_admission()
        asked = parse(CompletionRequest, read_body(request.environ, config.max_body_mb))
        check_model(asked.model)
        params, prompts = completion_params(asked, llm.default_sampling), asked.prompts()
        shape = CompletionFormat(asked, vocabulary)
        sock = request.environ["gunicorn.socket"]
        tenant = tenant_of(asked.user, request.headers.get("Authorization"), config.tenant_from)
        return generations.answer(sock, asked, prompts, params, shape, names[0], {}, tenant)

    @app.post("/v1/chat/completions")
    def chat_completions() -> Response:
        check_admission()
        asked = parse(ChatRequest, read_body(request.environ, config.max_body_mb))
        check_model(asked.model)
        spelled = chat_spelling(asked)
        try:
            params = chat_params(asked, llm.default_sampling)
        except InvalidParamsError as error:
            raise api_error(error, spelled) from error
        prompt = llm.render_chat(
            asked.plain_messages(),
            add_generation_prompt=asked.add_generation_prompt and not asked.continue_final_message,
            continue_final_message=asked.continue_final_message,
        )
        shape = ChatFormat(asked, vocabulary)
        sock = request.environ["gunicorn.socket"]
        tenant = tenant_of(asked.user, request.headers.get("Authorization"), config.tenant_from)
        return generations.answer(sock, asked, [prompt], params, shape, names[0], spelled, tenant)

    @app.get("/v1/models")
    def models() -> Response:
        cards: list[dict[str, Any]] = [
            {
                "id": name,
                "object": "model",
                "created": started,
                "owned_by": "llm-engine",
                "root": llm.model_name,
                "parent": None,
                "max_model_len": llm.max_model_len,
                "permission": [],
            }
            for name in names
        ]
        return _json({"object": "list", "data": cards})

    @app.get("/health")
    def health() -> Response:
        dead = llm.dead_cause
        return Response(status=200) if dead is None else _plain(first_line(dead), 503)

    @app.get("/ready")
    def ready() -> Response:
        reason = "the server is shutting down" if is_draining() else llm.unready_reason
        return Response(status=200) if reason is None else _plain(reason, 503)

    @app.get("/version")
    def version() -> Response:
        return _json({"version": __version__})

    @app.get("/metrics")
    def metrics() -> Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return Response(encode(llm.registry), content_type=content_type)

    @app.errorhandler(ApiError)
    def on_api_error(error: ApiError) -> Response:
        response = _json(error.body(), error.status)
        if error.status in RETRY_AFTER_S:
            response.headers["Retry-After"] = str(RETRY_AFTER_S[error.status])
        return response

    @app.errorhandler(EngineError)
    def on_engine_error(error: EngineError) -> Response:
        return on_api_error(api_error(error))

    @app.errorhandler(HTTPException)
    def on_http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 404:
            message = f"no route {request.path}"
        elif status == 405:
            message = f"{request.path} does not take {request.method}"
        else:
            message = error.description or error.name
        response = on_api_error(ApiError(status, message))
        for name, value in error.get_headers():
            if name == "Allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def on_unexpected(error: Exception) -> Response:
        log.error("answering %s %s", request.method, request.path, exc_info=error)
        return on_api_error(api_error(error))

    return app


def _plain(text: str, status: int) -> Response:
    return Response(text + "\n", status=status, mimetype="text/plain")


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status=status, mimetype="application/json")
