"""Probes, metrics, models and tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest

import mmserve
from mmserve.server.health import LoopMonitor
from tests.server.fakes import QUESTION, VIDEO, RunningServer, ask, chat_format, running_server

# R40: dashboards depend on these names
METRICS = {
    "mmserve_requests",
    "mmserve_tokens",
    "mmserve_visual_tokens",
    "mmserve_prefill_sparsity_ratio",
    "mmserve_kv_bytes",
    "mmserve_kv_bytes_saved",
    "mmserve_stage_seconds",
    "mmserve_slow_readers",
    "mmserve_ready",
    "mmserve_keep",
    "mmserve_dispatcher_now",
    "mmserve_dispatcher_events",
    "mmserve_encode_events",
    "mmserve_encode_now",
    "mmserve_embedding_cache_events",
    "mmserve_embedding_cache_bytes",
    "mmserve_held_bytes",
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


def get(server: RunningServer, path: str) -> httpx.Response:
    return server.http.get(path)


def test_probes_follow_the_pipeline(server: RunningServer) -> None:
    assert get(server, "/livez").json() == {"status": "alive"}
    assert get(server, "/readyz").json() == {"status": "ready"}
    server.pipeline.is_ready = False
    try:
        for path in ("/readyz", "/health"):
            response = get(server, path)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
        assert get(server, "/livez").status_code == 200
    finally:
        server.pipeline.is_ready = True
    assert get(server, "/health").status_code == 200


def test_a_late_event_loop_is_not_alive() -> None:
    async def lag_after_blocking() -> tuple[float, float]:
        monitor = LoopMonitor()
        beating = asyncio.create_task(monitor.run())
        await asyncio.sleep(0)
        before = monitor.lag_s
        time.sleep(0.4)  # noqa: ASYNC251  # the fault that is looked for
        after = monitor.lag_s
        beating.cancel()
        return before, after

    before, after = asyncio.run(lag_after_blocking())
    assert before < 0.1 <= after


def test_version_and_models(server: RunningServer) -> None:
    assert get(server, "/version").json() == {"version": mmserve.__version__}
    (model,) = get(server, "/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert get(server, "/v1/models/tiny").json() == model


def test_the_schema_names_every_request_field(server: RunningServer) -> None:
    paths = get(server, "/openapi.json").json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "mmserve", "media_io_kwargs"} <= set(schema["properties"])
    assert "$ref" not in str(schema)


def test_metrics_count_what_happened() -> None:
    with running_server() as server:
        ask(server, messages=VIDEO)
        ask(server, model="other")
        ask(server, max_tokens=1)
        text = get(server, "/metrics").text
    found = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE mmserve_")}
    assert {name.removesuffix("_total").removesuffix("_created") for name in found} == METRICS
    for line in (
        'mmserve_requests_total{outcome="stop"} 1.0',
        'mmserve_requests_total{outcome="length"} 1.0',
        'mmserve_requests_total{outcome="model_not_found"} 1.0',
        'mmserve_visual_tokens_total{state="before"} 20.0',
        'mmserve_visual_tokens_total{state="kept"} 5.0',
        'mmserve_visual_tokens_total{state="cached"} 5.0',
        'mmserve_tokens_total{kind="generated"} 10.0',
        "mmserve_prefill_sparsity_ratio 0.25",
        'mmserve_stage_seconds_count{stage="prefill"} 2.0',
        'mmserve_dispatcher_events_total{event="worker_deaths"} 1.0',
        'mmserve_dispatcher_now{what="active"} 0.0',
        'mmserve_encode_events_total{event="frames_decoded"} 7.0',
        'mmserve_encode_now{what="items_open"} 1.0',
        'mmserve_embedding_cache_events_total{event="hits",tier="memory"} 2.0',
        'mmserve_embedding_cache_bytes{tier="memory"} 512.0',
        'mmserve_held_bytes{what="bodies"} 0.0',
        'mmserve_held_bytes{what="media"} 0.0',
        "mmserve_ready 1.0",
    ):
        assert line in text


def test_tokenize_and_back(server: RunningServer) -> None:
    def post(path: str, **body: object) -> dict[str, object]:
        response = server.http.post(path, json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, object] = response.json()
        return answer

    tokens = post("/tokenize", prompt="red circle", return_token_strs=True)
    assert tokens["tokens"] == chat_format().tokenizer.encode("red circle").ids
    assert tokens["token_strs"] == ["red", " circle"]
    assert post("/detokenize", tokens=tokens["tokens"]) == {"prompt": "red circle"}
    asked = post("/tokenize", messages=QUESTION)
    assert asked["tokens"] == chat_format().encode(QUESTION)
    with_video = post("/tokenize", messages=VIDEO)["tokens"]
    assert isinstance(with_video, list)
    assert chat_format().video_token in with_video
