"""`/v1/models`, `/tokenize` and `/detokenize`: what is served, and its tokens. No request is started."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response

from mmserve.config import Limits
from mmserve.conversation import parse
from mmserve.models.chat import ChatFormat
from mmserve.server.chat import body_schema, check_model
from mmserve.server.errors import FieldError, json_response
from mmserve.server.limits import read_json
from mmserve.server.schema import DetokenizeRequest, TokenizeRequest, parse_body


def models_router(chat: ChatFormat, limits: Limits, model_name: str) -> APIRouter:
    router = APIRouter()
    model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "mmserve"}

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model]})

    @router.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> Response:
        check_model(model_id, model_name)
        return json_response(model)

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        body = parse_body(TokenizeRequest, await read_json(request, limits.max_json_depth))
        check_model(body.model, model_name)
        tokens = await asyncio.to_thread(_tokens, chat, limits, body)
        strings = [chat.token_text(token) for token in tokens] if body.return_token_strs else None
        return json_response({"count": len(tokens), "tokens": tokens, "token_strs": strings})

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        body = parse_body(DetokenizeRequest, await read_json(request, limits.max_json_depth))
        check_model(body.model, model_name)
        size = chat.tokenizer.get_vocab_size(with_added_tokens=True)
        if not all(0 <= token < size for token in body.tokens):
            raise FieldError("tokens", f"Expected token ids from 0 to {size - 1}, but got another")
        return json_response({"prompt": await asyncio.to_thread(chat.decode, body.tokens)})

    return router


def _tokens(chat: ChatFormat, limits: Limits, body: TokenizeRequest) -> list[int]:
    """Of a conversation as it would be asked, one id per media item, or of a bare text."""
    if (body.prompt is None) == (body.messages is None):
        raise FieldError("prompt", "Expected either prompt or messages")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return list(chat.tokenizer.encode(body.prompt, add_special_tokens=special).ids)
    conversation = parse(body.messages, max_messages=limits.max_messages, max_parts=limits.max_parts)
    return chat.encode(conversation.messages)
