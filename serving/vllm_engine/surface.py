"""Corrections to vLLM's FastAPI app, where its answers deviate from the API's form."""

import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.dependencies.utils import request_body_to_args
from fastapi.responses import JSONResponse
from prometheus_fastapi_instrumentator.metrics import Info
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from pydantic import TypeAdapter
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.responses import Response
from vllm.entrypoints.serve.exception_handling.handlers.vllm_error import vllm_error_handler
from vllm.exceptions import VLLMValidationError

from adakv_serve.serving.http.held_start import HeldStart
from adakv_serve.serving.http.openai_error import error_body
from adakv_serve.serving.http.sse import compact_json, data_of

# What code that expects another type raises, and who has called it then: FastAPI for most paths,
# and vLLM itself for `/invocations`, which takes requests of several kinds.
_OF_WRONG_TYPES = (AttributeError, TypeError, LookupError)
_VALIDATIONS = (request_body_to_args.__code__, TypeAdapter.validate_python.__code__)

Middleware = TypeVar("Middleware")
Stream = AsyncGenerator[str, None]


def mend_surface(app: FastAPI, on_answer: Callable[[Info], None]) -> None:
    """Change an app that vLLM has built and initialized.

    The middleware stack stays vLLM's: Prometheus would refuse the metrics of a second one as
    duplicates, and they would count nothing.

    Args:
        on_answer: called with each answer that vLLM's HTTP metrics count.
    """
    if app.middleware_stack is None:
        app.middleware_stack = app.build_middleware_stack()
    exceptions = _in_stack(app, ExceptionMiddleware)
    exceptions.add_exception_handler(HTTPException, _http_error)
    exceptions.add_exception_handler(RecursionError, _too_deep)
    exceptions.add_exception_handler(NotImplementedError, _unsupported)
    for kind in _OF_WRONG_TYPES:
        exceptions.add_exception_handler(kind, _wrong_type)
    exceptions.add_exception_handler(VLLMValidationError, _invalid)
    exceptions.app = HeldStart(exceptions.app)
    metrics = _in_stack(app, PrometheusInstrumentatorMiddleware)
    metrics.instrumentations = [*metrics.instrumentations, on_answer]
    register_url_convertor("model_id", _ModelId())
    app.add_api_route("/v1/models/{model_id:model_id}", _show_model, methods=["GET"])
    if (messages := app.state.anthropic_serving_messages) is not None:
        messages.message_stream_converter = _passing_errors(messages.message_stream_converter)


def _in_stack(app: FastAPI, kind: type[Middleware]) -> Middleware:
    layer: Any = app.middleware_stack
    while not isinstance(layer, kind):
        layer = layer.app
    return layer


async def _http_error(_: Any, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_body(
        error.status_code, str(error.detail), type_=HTTPStatus(error.status_code).phrase
    )
    return Response(body, error.status_code, error.headers, media_type="application/json")


async def _too_deep(_: Any, error: Exception) -> Response:
    # Some endpoints parse the body themselves.
    body = error_body(400, "the request is nested too deeply", type_="BadRequestError")
    return Response(body, 400, media_type="application/json")


async def _wrong_type(_: Any, error: Exception) -> Response:
    # vLLM's validators look into fields before pydantic has checked their types.
    frames = traceback.walk_tb(error.__traceback__)
    if not any(frame.f_code in _VALIDATIONS for frame, _ in frames):
        raise error
    problem = f"a field of the request has a value of a wrong type: {error}"
    body = error_body(400, problem, type_="BadRequestError")
    return Response(body, 400, media_type="application/json")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, VLLMValidationError)
    if (error.parameter, error.value) == ("max_tokens", 0):
        # A prompt as long as the context leaves no token for the answer, whatever was asked for.
        limit = request.app.state.openai_serving_models.model_config.max_model_len
        problem = f"{error.args[0]} Prompt and answer together have at most {limit} tokens."
        error = VLLMValidationError(problem, parameter=error.parameter, value=error.value)
    answer: Response = await vllm_error_handler(request, error)
    return answer


async def _unsupported(_: Any, error: Exception) -> Response:
    # As for paths that do not exist. vLLM answers 501, and clients send again what gets a 5xx.
    body = error_body(404, str(error), type_="NotFoundError")
    return Response(body, 404, media_type="application/json")


class _ModelId(Convertor[str]):
    """A model's name, which may contain slashes. `/v1/models/` still redirects to `/v1/models`."""

    regex = ".+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


async def _show_model(model_id: str, request: Request) -> Response:
    models = await request.app.state.openai_serving_models.show_available_models()
    for card in models.data:
        if card.id == model_id:
            return JSONResponse(card.model_dump())
    body = error_body(
        404, f"The model `{model_id}` does not exist.", type_="NotFoundError", param="model"
    )
    return Response(body, 404, media_type="application/json")


def _passing_errors(convert: Callable[[Stream], Stream]) -> Callable[[Stream], Stream]:
    """Wrap the conversion of a chat stream to Anthropic's form, which fails on error events."""

    async def converted(chat: Stream) -> Stream:
        errors: list[dict[str, Any]] = []
        async with aclosing(chat), aclosing(convert(_until_error(chat, errors))) as events:
            async for event in events:
                yield event
        for error in errors:
            body = {"type": error["type"], "message": error["message"]}
            data = compact_json({"type": "error", "error": body}).decode()
            yield f"event: error\ndata: {data}\n\n"

    return converted


async def _until_error(chat: Stream, errors: list[dict[str, Any]]) -> Stream:
    async for item in chat:
        if item.startswith('data: {"error"'):
            errors.append((data_of(item.encode()) or {})["error"])
            return
        yield item
