"""Probes, version and metrics. Probes ask nobody: they answer at once under any load.

Knows nothing about requests for answers.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Response

import mmserve
from mmserve.metrics import CONTENT_TYPE
from mmserve.server.answers import Door
from mmserve.server.errors import json_response

MAX_LAG_S = 1.0
_BEAT_S = 0.25


class LoopMonitor:
    """Measures how late the event loop runs what is due."""

    def __init__(self) -> None:
        self._beat_at = time.monotonic()

    @property
    def lag_s(self) -> float:
        return max(time.monotonic() - self._beat_at - _BEAT_S, 0.0)

    async def run(self) -> None:
        while True:
            self._beat_at = time.monotonic()
            await asyncio.sleep(_BEAT_S)


def health_router(door: Door, monitor: LoopMonitor) -> APIRouter:
    router = APIRouter()

    @router.get("/livez")
    async def livez() -> Response:
        return _status(monitor.lag_s < MAX_LAG_S, "alive", "event loop is late")

    @router.get("/readyz")
    @router.get("/health")
    async def readyz() -> Response:
        if door.is_draining:
            return _status(False, "", "shutting down")
        return _status(door.pipeline.is_ready, "ready", "a stage has no worker")

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": mmserve.__version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        # asks the pipeline's thread
        text = await asyncio.to_thread(door.metrics.render)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    return router


def _status(is_good: bool, good: str, bad: str) -> Response:
    if is_good:
        return json_response({"status": good})
    return json_response({"status": bad}, status=503, headers={"Retry-After": "1"})
