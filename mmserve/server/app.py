"""Puts the HTTP front door together: routes, limits, keys, errors and the life of what they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import mmserve
from mmserve.config import ServeConfig
from mmserve.media.budget import ByteBudget
from mmserve.metrics import Metrics
from mmserve.models.chat import ChatFormat
from mmserve.server.answers import Door, Fetches
from mmserve.server.auth import ApiKeyMiddleware
from mmserve.server.chat import chat_router
from mmserve.server.errors import install_error_handlers
from mmserve.server.health import LoopMonitor, health_router
from mmserve.server.limits import LimitsMiddleware
from mmserve.server.models import models_router
from mmserve.workers.pipeline import Pipeline


def create_app(
    *, pipeline: Pipeline, chat: ChatFormat, fetcher: Fetches, config: ServeConfig, model_name: str
) -> FastAPI:
    """The application; its `state.door` is the `Door` to drain. The pipeline stays its caller's."""
    bodies = ByteBudget(config.limits.max_media_bytes, "request bodies")
    metrics = Metrics(
        pipeline.counts,
        lambda: pipeline.is_ready,
        pipeline.work_counts,
        lambda: fetcher.held_bytes() | {"bodies": bodies.taken},
    )
    door = Door(pipeline, chat, fetcher, metrics)
    monitor = LoopMonitor()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        monitoring = asyncio.create_task(monitor.run())
        try:
            yield
        finally:
            monitoring.cancel()

    # the documentation pages would load scripts from elsewhere
    app = FastAPI(
        title="mmserve", version=mmserve.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.door = door
    app.include_router(chat_router(door, config, model_name))
    app.include_router(models_router(chat, config.limits, model_name))
    app.include_router(health_router(door, monitor))
    install_error_handlers(app)
    app.add_middleware(LimitsMiddleware, limits=config.limits, bodies=bodies, count=metrics.count_request)
    if config.api_key is not None:
        # added last, so it comes first
        app.add_middleware(ApiKeyMiddleware, keys=config.api_key)
    return app
