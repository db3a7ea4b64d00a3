"""The API process: `python -m mmserve.server.main`, configuration on stdin, one pipeline, until SIGTERM.

Holds no model. On SIGTERM it lets nobody in, finishes what was admitted and exits with 0; a second
signal, or `DRAIN_S`, ends what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI

from mmserve.config import Limits, ServeConfig, from_mapping
from mmserve.errors import ConfigError, MMServeError
from mmserve.log import setup_logging
from mmserve.media.fetch import Fetcher, FetchPolicy
from mmserve.media.intake import Intake
from mmserve.media.limits import MediaLimits
from mmserve.models.chat import ChatFormat
from mmserve.queues import CurveKeys
from mmserve.server.answers import Door
from mmserve.server.app import create_app
from mmserve.workers.pipeline import Pipeline
from mmserve.workers.process import receive_config

# run as a module, __name__ is "__main__"
logger = logging.getLogger("mmserve.server.main")

DRAIN_S = 30.0
DEMO_PORT = 7860
DEMO_HOME = Path(__file__).parents[2]
DEMO_KEY_VARIABLE = "MMSERVE_API_KEY"
_CLOSE_S = 5  # for connections whose answer is complete
_KEEP_ALIVE_S = 30


class ApiConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the API process needs to know; `serve` is a `ServeConfig` as `to_mapping` gives it."""

    serve: dict[str, Any]
    endpoint: str
    directories: tuple[str, ...]  # of the run, the preferred place for leases first, the one on disk last
    model_dir: str
    keys: CurveKeys | None = None  # of the tcp plane
    demo: bool = False  # start the demo page too


class _Server(uvicorn.Server):
    """A server whose signals are ours to interpret."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), backlog=2048, family=_family(host))
        # connections inherit it; asyncio sets it only where the protocol number was given
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ConfigError(
            f"Expected to listen on {host}:{port}, but the address is in use or not ours"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def make_server(app: FastAPI, limits: Limits) -> _Server:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_S,
        h11_max_incomplete_event_size=limits.max_header_bytes,
    )
    return _Server(config)


async def serve(server: _Server, door: Door, listener: socket.socket, drain_s: float = DRAIN_S) -> None:
    """Answer until a signal, then drain."""
    stops: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stops.put_nowait, None)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stops.get())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        logger.info("shutting down: finishing what was admitted")
        door.drain()
        finished, again = asyncio.create_task(door.wait_empty()), asyncio.create_task(stops.get())
        await asyncio.wait({finished, again}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            door.cancel_all()
            await asyncio.wait({finished}, timeout=_CLOSE_S)
        finished.cancel()
        again.cancel()
        server.should_exit = True
    stopping.cancel()
    await serving


async def answer_until_stopped(
    api: ApiConfig, config: ServeConfig, pipeline: Pipeline, listener: socket.socket
) -> None:
    limits, media = config.limits, config.media
    policy = FetchPolicy(
        allow_http=media.allow_http,
        allow_private_hosts=media.allow_private_hosts,
        file_root=media.allowed_media_root,
        max_redirects=limits.max_redirects,
    )
    # videos are kept on disk, not in memory
    media_dir = Path(api.directories[-1]) / "media"
    media_dir.mkdir(mode=0o700, exist_ok=True)
    fetcher = Fetcher(
        policy, MediaLimits.from_config(limits), media_dir, max_held_bytes=limits.max_media_bytes
    )
    app = create_app(
        pipeline=pipeline,
        chat=ChatFormat.from_model_dir(Path(api.model_dir)),
        fetcher=Intake(fetcher, config.cache.remembered_media_bytes),
        config=config,
        model_name=config.model,
    )
    url = _url(listener)
    page = await _start_demo(url, config) if api.demo else None
    logger.info("listening", extra={"ready": pipeline.is_ready, "url": url})
    if not config.api_key and not _is_loopback(listener):
        logger.warning("anybody on the network can use this server: give it an api_key")
    if page is not None:
        logger.info("demo page", extra={"url": f"http://127.0.0.1:{DEMO_PORT}"})
    await serve(make_server(app, limits), app.state.door, listener)
    if page is not None and page.returncode is None:
        page.terminate()
    # inside the loop's life: the last updates are delivered to it
    await asyncio.to_thread(pipeline.close)


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    # every interface includes this one
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # read, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _start_demo(url: str, config: ServeConfig) -> asyncio.subprocess.Process:
    """The page is a client like any other; it dies with this process's group."""
    key = {DEMO_KEY_VARIABLE: config.api_key[0]} if config.api_key else {}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "demo.page", "--server", url, "--port", str(DEMO_PORT)),
        stdin=asyncio.subprocess.DEVNULL,
        # the page is not part of the installed package: it stands beside it in a checkout
        env=os.environ | key | {"PYTHONPATH": str(DEMO_HOME)},
    )


def run(api: ApiConfig) -> None:
    config = from_mapping(api.serve)
    limits = config.limits
    listener = listen(config.host, config.port)
    pipeline = Pipeline(
        api.endpoint,
        [Path(directory) for directory in api.directories],
        max_active=limits.max_running + limits.max_queued,
        deadline_s=config.deadline_s,
        keys=api.keys,
    )
    try:
        asyncio.run(answer_until_stopped(api, config, pipeline, listener))
    finally:
        pipeline.close()


def main() -> None:
    setup_logging()
    try:
        run(receive_config(ApiConfig))
    except MMServeError as error:
        logger.error("the API process cannot start: %s", error.public_message)
        sys.exit(1)


if __name__ == "__main__":
    main()
