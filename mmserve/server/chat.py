"""`/v1/chat/completions`: answers to a conversation, streamed or whole. Knows nothing about other routes."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from mmserve.config import ServeConfig
from mmserve.conversation import parse
from mmserve.errors import BadRequest, MMServeError
from mmserve.methods import least_keep
from mmserve.request import Chunk, RequestOutput
from mmserve.server.answers import Answer, Call, ClientGone, Door, Load, unless
from mmserve.server.errors import FieldError, ModelNotFound, error_body, json_response
from mmserve.server.limits import read_json
from mmserve.server.openai import DONE, Shape, event
from mmserve.server.schema import ChatRequest, media_options_of, methods_of, parse_body, sampling_of
from mmserve.server.stream import EventStream, client_gone

MAX_PRIORITY = 1_000_000
_CLIENT_CLOSED_REQUEST = 499  # for the log: nobody reads it


def chat_router(door: Door, config: ServeConfig, model_name: str) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        try:
            door.check_room()
            body = parse_body(ChatRequest, await read_json(request, config.limits.max_json_depth))
            check_model(body.model, model_name)
            call = _call(body, config, getattr(request.state, "tenant", ""))
        except MMServeError as error:
            door.metrics.count_request(error.code)
            raise
        try:
            answer, first = await unless(
                client_gone(request.receive), _begin(door, call, whole=not body.stream)
            )
        except ClientGone:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        request_id = answer.generation.request_id
        shape = Shape(
            request_id=request_id,
            model=model_name,
            wants_usage=body.wants_usage,
            wants_report=body.own.wants_report,
            top_logprobs=body.top_logprobs or 0,
        )
        if body.stream:
            events = _events(answer, first, shape, call.sampling.n)
            return EventStream(events, answer.close, request_id=request_id)
        assert isinstance(first, RequestOutput)
        return json_response(shape.completion(first), headers={"X-Request-Id": request_id})

    return router


def check_model(asked: str | None, served: str) -> None:
    if asked is not None and asked != served:
        raise ModelNotFound(f"Expected the model {served!r}, but got {asked[:80]!r}")


def body_schema(kind: type[Any]) -> dict[str, Any]:
    """Bodies are read by hand, so the schema for /openapi.json is given by hand."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:  # noqa: ANN401  # JSON has no common type
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {name: _inlined(value, definitions) for name, value in schema.items()}
    return [_inlined(value, definitions) for value in schema] if isinstance(schema, list) else schema


def _call(body: ChatRequest, config: ServeConfig, tenant: str) -> Call:
    limits = config.limits
    conversation = parse(
        body.messages,
        options=media_options_of(body, limits),
        max_messages=limits.max_messages,
        max_parts=limits.max_parts,
        max_frames=limits.max_frames,
    )
    if len(conversation.media) > limits.max_images:
        raise FieldError(
            "messages", f"Expected at most {limits.max_images} media items, but got {len(conversation.media)}"
        )
    if body.cache_salt is not None and not body.cache_salt:
        raise FieldError("cache_salt", "Expected cache_salt to be left out or not empty")
    priority = body.priority or 0
    # a client may step back for others, not push them aside
    if not 0 <= priority <= MAX_PRIORITY:
        raise FieldError("priority", f"Expected priority of 0 to {MAX_PRIORITY}, but got {priority}")
    methods = methods_of(body, config.methods)
    floor = None
    if body.own.prune is None and body.own.keep is None:
        floor = least_keep(config.prune_under_load, priority, methods)
    return Call(
        conversation=conversation,
        sampling=sampling_of(body, limits),
        methods=methods,
        load=None if floor is None else Load(floor, limits.max_queued),
        salt=_salt(tenant, body.cache_salt or ""),
        priority=priority,
        report_tokens=bool(body.own.report_tokens),
    )


def _salt(tenant: str, given: str) -> str:
    """Each key, and each salt of it, has caches of its own; all salts of a key share its room there."""
    if not tenant and not given:
        return ""
    return f"{_hashed(tenant)}/{_hashed(given)}"


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if text else ""


async def _begin(door: Door, call: Call, *, whole: bool) -> tuple[Answer, Chunk | RequestOutput]:
    """Open a request and wait for its first news, so that an error until then has its own status."""
    try:
        answer = await door.open(call)
    except BadRequest as error:
        raise _blamed(error) from error
    try:
        return answer, await (answer.output() if whole else answer.next())
    except BaseException:
        answer.close()
        raise


def _blamed(error: BadRequest) -> BadRequest:
    """What is wrong with the request after its form was checked is in its messages."""
    return error if isinstance(error, FieldError) else FieldError("messages", error.public_message)


async def _events(answer: Answer, news: Chunk | RequestOutput, shape: Shape, n: int) -> AsyncIterator[bytes]:
    for index in range(n):
        yield event(shape.role(index))
    try:
        while isinstance(news, Chunk):
            if news.text or news.logprobs:
                yield event(shape.delta(news))
            if news.finish_reason is not None:
                yield event(shape.finish(news.index, news.finish_reason))
            news = await answer.next()
    except MMServeError as error:
        yield event(error_body(error))
    else:
        if shape.wants_usage:
            yield event(shape.usage_chunk(news))
    yield DONE
