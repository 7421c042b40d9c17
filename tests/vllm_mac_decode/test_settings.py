"""Where settings come from, and what is said about unusable ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from vllm_mac_decode.settings import Settings, SettingsError, load


def test_a_token_may_lie_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("  secret\n")
    assert load({"token_file": str(secret)}, {}).token == "secret"
    assert load({"token_file": str(secret), "token": "t"}, {}).token == "t"
    assert load({}, {"MAC_DECODE_TOKEN_FILE": str(secret)}).token == "secret"
    for content, said in ((b" \n", "is empty"), (b"\xff", "it is no text")):
        secret.write_bytes(content)
        with pytest.raises(SettingsError, match=said):
            load({"token_file": str(secret)}, {})
    with pytest.raises(SettingsError, match="none cannot be read: No such file"):
        load({"token_file": str(tmp_path / "none")}, {})


def test_the_defaults_need_nothing() -> None:
    assert load({}, {}) == load(None, {}) == Settings()
    assert not Settings().addresses(), "receivers are discovered"


def test_every_setting_can_come_from_the_environment() -> None:
    wanted = Settings(
        receiver="mac:1",
        token="t",
        token_file="/run/token",
        transport="other",
        enabled=False,
        min_prompt_tokens=9,
        min_output_tokens=3,
        stall_timeout=0.5,
        staging_mib=64,
        streams=2,
        queue_timeout=7.0,
        checksum=True,
        plain_data=True,
        discovery=False,
        offload="mac",
        offload_threshold=9,
        proof=False,
        shadow_prefill=False,
        shadow_chunk=64,
        profile=False,
        codec="q8",
    )
    values = msgspec.structs.asdict(wanted)
    assert set(values) == set(Settings.__struct_fields__)
    assert all(value != getattr(Settings(), name) for name, value in values.items())
    environ = {f"MAC_DECODE_{name.upper()}": str(value) for name, value in values.items()}
    assert load(None, environ) == wanted
    assert load(values, {}) == wanted


def test_the_extra_config_goes_before_the_environment() -> None:
    environ = {"MAC_DECODE_RECEIVER": "from-environment:1", "MAC_DECODE_TOKEN": "e"}
    settings = load({"receiver": "from-config:2"}, environ)
    assert (settings.receiver, settings.token) == ("from-config:2", "e")


def test_the_process_environment_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAC_DECODE_RECEIVER", "mac.local:7000")
    assert load().addresses() == {"mac.local:7000": ("mac.local", 7000)}


def test_an_empty_variable_is_as_if_unset() -> None:
    assert load(None, {"MAC_DECODE_RECEIVER": "", "MAC_DECODE_STAGING_MIB": ""}) == Settings()


def test_text_is_converted_and_other_variables_are_left_alone() -> None:
    environ = {"MAC_DECODE_ENABLED": "false", "MAC_DECODE_CHECKSUM": "1", "MAC_DECODE_OTHER": "x"}
    settings = load({"stall_timeout": "1.5"}, environ)
    assert (settings.enabled, settings.checksum, settings.stall_timeout) == (False, True, 1.5)


def test_unknown_keys_are_named_with_the_known_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"reciever": "mac:1", "receiver": "mac:1", "speed": 9}, {})
    text = str(caught.value)
    assert "unknown keys in kv_connector_extra_config: reciever, speed (" in text
    assert all(name in text for name in Settings.__struct_fields__)
    with pytest.raises(SettingsError, match=r"unknown key in kv_connector_extra_config: speed \("):
        load({"speed": 9}, {})


@pytest.mark.parametrize(
    "address",
    [
        *("mac:", ":7790", "mac:0", "mac:65536", "mac:port", "mac:-1", "mac:7790/x", "mac:७७९०"),
        *(
            "http://mac:7790",
            "[mac]:7790",
            "[fe80::1]:",
            "[fe80::1",
            "fe80::1]:7790",
            "a:b:7790",
        ),
    ],
)
def test_bad_addresses_are_quoted(address: str) -> None:
    sources: list[tuple[dict[str, str], dict[str, str]]] = [
        ({"receiver": address}, {}),
        ({}, {"MAC_DECODE_RECEIVER": address}),
    ]
    for extra, environ in sources:
        with pytest.raises(SettingsError, match="receiver must be host:port, not ") as caught:
            load(extra, environ)
        assert repr(address) in str(caught.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.7:7790", ("10.0.0.7", 7790)),
        ("studio.local:1", ("studio.local", 1)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
        ("studio.local", ("studio.local", 7790)),
        ("10.0.0.7", ("10.0.0.7", 7790)),
        ("[fe80::1]", ("fe80::1", 7790)),
        ("fe80::1", ("fe80::1", 7790)),
        ("::1", ("::1", 7790)),
    ],
)
def test_good_addresses(address: str, expected: tuple[str, int]) -> None:
    assert load({"receiver": address}, {}).addresses() == {address: expected}


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"stall_timeout": 0}, "stall_timeout must be above 0 seconds"),
        ({"queue_timeout": -1}, "queue_timeout must be at least 0 seconds"),
        ({"stall_timeout": -2}, "stall_timeout must be above 0 seconds"),
        ({"staging_mib": 15}, "staging_mib must be at least 16"),
        ({"offload_threshold": -1}, "offload_threshold must be at least 0 tokens"),
        ({"min_output_tokens": 1}, "min_output_tokens must be at least 2"),
        ({"staging_mib": "plenty"}, "staging_mib"),
        ({"enabled": "perhaps"}, "enabled"),
        ({"receiver": 7790}, "receiver"),
        ({"token": None}, "token"),
    ],
)
def test_unusable_values_are_named(extra: dict[str, object], complaint: str) -> None:
    with pytest.raises(SettingsError, match="mac_decode settings") as caught:
        load(extra, {})
    assert complaint in str(caught.value)
