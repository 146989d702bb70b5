"""Errors as clients see them: ``{"error": {"message", "type", "param", "code"}}`` with the status as the code."""

from __future__ import annotations

from typing import Any

from ..core.errors import (
    CapacityError,
    EngineDeadError,
    InvalidParamsError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
    RequestFailedError,
    RequestShedError,
)

TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
RETRY_AFTER_S = {429: 1, 503: 5}


class ApiError(Exception):
    """An error with its HTTP status; ``param`` names the request's field at fault, as the client spelled it."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def api_error(error: BaseException, spelled: dict[str, str] | None = None) -> ApiError:
    """The HTTP error for what the engine raised.

    ``spelled`` maps the engine's field names to the request's, where they differ. An error nobody expected becomes a
    500 that gives nothing away; the caller logs it. Of a failed step or a dead engine the client hears what happened;
    the traceback below it is for the log, where the engine has written it.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidParamsError):
        field = (spelled or {}).get(error.field, error.field)
        message = str(InvalidParamsError(field, error.value, error.allowed))
        return ApiError(400, message, field)
    if isinstance(error, ModelNotFoundError):
        return ApiError(404, str(error), "model")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error))
    if isinstance(error, EngineDeadError):
        return ApiError(503, first_line(error))
    if isinstance(error, RequestShedError):
        return ApiError(503, str(error))
    if isinstance(error, RequestFailedError):
        return ApiError(500, first_line(error))
    if isinstance(error, CapacityError | RequestError):
        return ApiError(400, str(error))
    return ApiError(500, "internal error; the server's log says more")


def first_line(error: BaseException) -> str:
    """What it says without the traceback of a stage below."""
    return str(error).partition("\n")[0]
