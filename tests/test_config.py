"""Configuration: defaults, strict merging, messages, and the files under configs/."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mmserve import config
from mmserve.config import (
    CacheSizes,
    EmbeddingTiers,
    Limits,
    ServeConfig,
    from_mapping,
    load_config,
    to_mapping,
)
from mmserve.errors import ConfigError
from mmserve.request import Methods

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_every_setting_is_optional() -> None:
    assert from_mapping({}) == ServeConfig() == ServeConfig(model="tiny", epd=(1, 1, 1))


def test_defaults_are_safe() -> None:
    default = ServeConfig()
    assert default.host == "127.0.0.1"
    assert default.api_key is None
    assert default.media.allowed_media_root is None
    assert not default.media.allow_http
    assert not default.media.allow_private_hosts


def test_method_defaults_are_those_of_a_request() -> None:
    plain = dataclasses.asdict(config.MethodDefaults())
    assert plain == {**msgspec.structs.asdict(Methods()), "keep": None}


def test_a_partial_section_keeps_its_other_defaults() -> None:
    merged = from_mapping({"limits": {"max_images": 2}, "cache": {"kv_memory_bytes": 1}})
    assert merged.limits == Limits(max_images=2)
    assert merged.cache.embedding_cache_bytes == ServeConfig().cache.embedding_cache_bytes


def test_plain_yaml_values_become_the_annotated_types() -> None:
    merged = from_mapping(
        {
            "epd": [2, 1, 1],
            "deadline_s": 5,
            "api_key": "one",
            "threads": None,
            "media": {"allowed_media_root": "clips"},
            "methods": {"kv_budget": 256},
        }
    )
    assert merged.epd == (2, 1, 1)
    assert isinstance(merged.deadline_s, float)
    assert merged.api_key == ("one",)
    assert merged.media.allowed_media_root == Path("clips")
    assert merged.methods.kv_budget == 256.0


def test_floors_by_priority_survive_json() -> None:
    given = {"prune_under_load": {"floor": 0.1, "floors": {0: 0.2, 7: 0.05}}}
    config_of = from_mapping(given)
    assert config_of.prune_under_load.floors == {0: 0.2, 7: 0.05}
    assert from_mapping(msgspec.json.decode(msgspec.json.encode(to_mapping(config_of)))) == config_of


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"modle": "x"}, ("'modle'", "'model'")),
        ({"limits": {"max_image": 1}}, ("'limits.max_image'", "'limits.max_images'")),
        ({"kv_budget": 64}, ("'kv_budget'", "'methods.kv_budget'")),
        ({"zzzz": 1}, ("'zzzz'", "the nearest is")),
        ({1: 1}, ("'1'", "the nearest is")),
        ({"port": "8000"}, ("port", "a whole number", "str '8000'")),
        ({"port": True}, ("port", "a whole number", "bool True")),
        ({"port": None}, ("port", "a whole number", "nothing")),
        ({"deadline_s": "soon"}, ("deadline_s", "a number", "'soon'")),
        ({"media": {"allow_http": 1}}, ("media.allow_http", "true or false", "int 1")),
        ({"media": ["x"]}, ("media", "a mapping", "list")),
        ({"dtype": "fp64"}, ("dtype", "auto, float32", "'fp64'")),
        ({"dtype": ["auto"]}, ("dtype", "auto, float32", "list")),
        ({"epd": [1, 1]}, ("epd", "a list of 3 values", "list")),
        ({"epd": [1, 1, "x"]}, ("epd[2]", "a whole number", "'x'")),
        ({"epd": [1, 0, 1]}, ("epd", "1 or more", "[1, 0, 1]")),
        ({"port": 70000}, ("port", "0 to 65535", "70000")),
        ({"model": ""}, ("model", "nothing")),
        ({"threads": 0}, ("threads", "1 or more", "0")),
        ({"deadline_s": float("nan")}, ("deadline_s", "more than 0", "nan")),
        ({"methods": {"keep": 0}}, ("methods.keep", "above 0", "0")),
        ({"methods": {"keep": 1.5}}, ("methods.keep", "a whole number above 1", "1.5")),
        ({"methods": {"keep": True}}, ("methods.keep", "above 0", "True")),
        ({"methods": {"keep_image": "8/frames"}}, ("methods.keep_image", "'8/frames'")),
        ({"methods": {"prune_options": [1]}}, ("methods.prune_options", "a mapping", "list")),
        ({"methods": {"prune_options": {1: 1}}}, ("a name in methods.prune_options", "text")),
        ({"prune_under_load": {"floor": 0}}, ("prune_under_load.floor", "above 0")),
        ({"prune_under_load": {"floors": {5: 2}}}, ("prune_under_load.5", "above 0")),
        (
            {"prune_under_load": {"floors": {"x": 0.1}}},
            ("a name in prune_under_load.floors", "a whole number"),
        ),
        ({"methods": {"kv_budget": -1}}, ("methods.kv_budget", "more than 0", "-1")),
        ({"limits": {"max_frames": 0}}, ("limits.max_frames", "more than 0", "0")),
        ({"limits": {"max_frames": 8}}, ("limits.default_frames", "limits.max_frames (8)", "32")),
        ({"limits": {"min_side": 20_000}}, ("limits.min_side", "16384", "20000")),
        ({"limits": {"max_tokens": 70_000}}, ("limits.max_tokens", "65536", "70000")),
        ({"cache": {"kv_memory_bytes": 0}}, ("cache.kv_memory_bytes", "more than 0", "0")),
        ({"cache": {"embedding_tiers": {"disk": "x"}}}, ("embedding_tiers.disk'", "disk_path")),
        (
            {"cache": {"embedding_tiers": {"disk_bytes": 1}}},
            ("embedding_tiers.disk_bytes", "at least 16777216"),
        ),
        ({"cache": {"embedding_tiers": {"storage": "int4"}}}, ("embedding_tiers.storage", "auto, int8, fp8")),
        ({"cache": {"embedding_tiers": {"redis_timeout_s": 0}}}, ("redis_timeout_s", "more than 0")),
        ({"api_key": []}, ("api_key", "one or more keys")),
        ({"api_key": ["a", ""]}, ("api_key", "none of them empty")),
        ([], ("the configuration", "a mapping", "list")),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected_and_found(
    mapping: dict[str, object], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(mapping)
    for part in parts:
        assert part in caught.value.public_message


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "fp64"), ("port", "8000"), ("epd", (1, 1)), ("limits", {"max_image": 1})]
)
def test_settings_given_in_python_are_checked_as_well(field: str, value: object) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=field):
        ServeConfig(**settings)


@pytest.mark.parametrize("mapping", [{"api_key": 12345678}, {"api_key": ["secret", 12345678]}])
def test_no_message_repeats_a_key(mapping: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(mapping)
    assert "12345678" not in caught.value.public_message
    assert "secret" not in caught.value.public_message


def test_a_configuration_survives_the_trip_to_a_subprocess() -> None:
    sent = ServeConfig(
        model="m",
        epd=(2, 1, 3),
        api_key=("a", "b"),
        media=config.MediaPolicy(allowed_media_root=Path("/data")),
        methods=config.MethodDefaults(prune="holitom", keep=0.25),
    )
    assert from_mapping(msgspec.json.decode(msgspec.json.encode(to_mapping(sent)))) == sent


def test_keys_stay_out_of_logs() -> None:
    sent = ServeConfig(api_key=("secret-1", "secret-2"))
    assert to_mapping(sent, hide_keys=True)["api_key"] == ["***", "***"]
    assert "secret" not in repr(sent)
    cache = CacheSizes(embedding_tiers=EmbeddingTiers(redis_url="redis://:secret@host"))
    sent = ServeConfig(cache=cache)
    assert "secret" not in repr(sent)
    assert "secret" not in str(to_mapping(sent, hide_keys=True))
    assert from_mapping(to_mapping(sent)) == sent
    assert to_mapping(ServeConfig(), hide_keys=True)["api_key"] is None


def test_load_config_reads_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("port: 0\nmethods:\n  prune: holitom\n")
    assert load_config(path).methods.prune == "holitom"
    path.write_text("# nothing is set\n")
    assert load_config(str(path)) == ServeConfig()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"port: [1", "valid YAML"),
        (b"a: 1\n\tb: 2\n", "line 2"),
        (b"\xff\xfe", "readable YAML"),
        (b"!!python/object/apply:os.system [true]", "valid YAML"),
    ],
)
def test_a_broken_file_is_a_config_error(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=part):
        load_config(path)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        load_config(tmp_path / "absent.yaml")


def test_configs_exist() -> None:
    assert {path.stem for path in CONFIGS} >= {"laptop", "epd", "low_memory", "video_chat"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_and_says_why(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith("#")


def test_config_needs_no_torch() -> None:
    code = "import sys, mmserve.config; sys.exit(bool({'torch', 'PIL', 'av', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "224.0.0.1", "*", "localhost", "eth0", "127.0.0.1:5", ""]
)
def test_processes_listen_on_one_numeric_address(address: str) -> None:
    with pytest.raises(ConfigError, match=r"transfer\.address of one numeric address"):
        from_mapping({"transfer": {"plane": "tcp", "address": address}})


def test_transfer_stays_on_this_host_and_exact_by_default() -> None:
    transfer = ServeConfig(host="0.0.0.0").transfer  # nothing is served
    assert (transfer.plane, transfer.address, transfer.wire_dtype) == ("memory", "127.0.0.1", "auto")
    given = from_mapping({"transfer": {"plane": "tcp", "wire_dtype": "int8", "lease_ttl_s": 60}}).transfer
    assert (given.plane, given.wire_dtype, given.lease_ttl_s) == ("tcp", "int8", 60.0)
    for wrong in ({"plane": "ipc"}, {"wire_dtype": "int4"}, {"lease_ttl_s": 0}):
        with pytest.raises(ConfigError):
            from_mapping({"transfer": wrong})
