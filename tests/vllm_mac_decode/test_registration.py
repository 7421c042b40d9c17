"""The flags in vLLM's own parser, and the configuration that they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from mac_decode_entrypoints.vllm_plugin import register
from vllm_mac_decode.registration import CONNECTOR


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def parse(*arguments: str) -> KVTransferConfig | None:
    """What ``vllm serve`` makes of a command line."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    # A folder, so that nothing is looked up elsewhere; it is not read.
    args = parser.parse_args(["--model", str(Path(__file__).parent), *arguments])
    return AsyncEngineArgs.from_cli_args(args).kv_transfer_config


def fields(config: KVTransferConfig | None) -> dict[str, Any]:
    """Everything but the id that each configuration makes up for itself."""
    assert config is not None
    return {name: value for name, value in vars(config).items() if name != "engine_id"}


def test_the_name_the_json_and_the_dotted_form_mean_the_same() -> None:
    by_name = fields(parse("--kv-connector", "mac_decode"))
    document = {"kv_connector": "mac_decode", "kv_role": "kv_producer"}
    assert by_name == fields(parse("--kv-transfer-config", json.dumps(document)))
    dotted = [f"--kv-transfer-config.{key}={value}" for key, value in document.items()]
    assert by_name == fields(parse(*dotted))
    assert (by_name["kv_connector"], by_name["kv_role"]) == ("mac_decode", "kv_producer")


def test_every_configuration_has_an_engine_id() -> None:
    config = parse("--kv-connector", "mac_decode")
    assert config is not None and config.engine_id


def test_without_the_flags_nothing_changes() -> None:
    assert parse() is None
    other = parse("--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":"kv_both"}')
    assert other is not None and (other.kv_connector, other.kv_role) == ("NixlConnector", "kv_both")


def test_the_name_completes_the_json() -> None:
    extra = {"kv_connector_extra_config": {"receiver": "mac:1"}}
    config = parse("--kv-connector", "mac_decode", "--kv-transfer-config", json.dumps(extra))
    assert config is not None
    assert (config.kv_connector, config.kv_role) == ("mac_decode", "kv_producer")
    assert config.kv_connector_extra_config == {"receiver": "mac:1"}


def test_the_json_may_say_the_same_and_choose_the_role() -> None:
    document = {"kv_connector": "mac_decode", "kv_role": "kv_both"}
    config = parse("--kv-connector", "mac_decode", "--kv-transfer-config", json.dumps(document))
    assert config is not None and config.kv_role == "kv_both"


def test_a_contradiction_is_refused() -> None:
    document = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    with pytest.raises(ValueError, match=r"--kv-connector mac_decode contradicts .* NixlConnector"):
        parse("--kv-connector", "mac_decode", "--kv-transfer-config", json.dumps(document))


def test_another_connector_may_be_named() -> None:
    config = parse("--kv-connector", "NixlConnector")
    assert config is not None
    assert (config.kv_connector, config.kv_role) == ("NixlConnector", "kv_producer")


def test_the_receiver_lands_in_the_extra_config() -> None:
    by_name = parse("--kv-connector", "mac_decode", "--mac-decode-receiver", "mac:7790")
    document = {
        "kv_connector": "mac_decode",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"token": "t", "receiver": "elsewhere:1"},
    }
    merged = parse(
        "--kv-transfer-config", json.dumps(document), "--mac-decode-receiver", "mac:7790"
    )
    assert by_name is not None and merged is not None
    assert by_name.kv_connector_extra_config == {"receiver": "mac:7790"}
    assert merged.kv_connector_extra_config == {"receiver": "mac:7790", "token": "t"}


@pytest.mark.parametrize("rest", [[], ["--kv-connector", "NixlConnector"]])
def test_a_receiver_without_the_connector_is_refused(rest: list[str]) -> None:
    with pytest.raises(ValueError, match="--mac-decode-receiver needs --kv-connector mac_decode"):
        parse("--mac-decode-receiver", "mac:7790", *rest)


def test_a_bad_address_on_the_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--kv-connector", "mac_decode", "--mac-decode-receiver", "mac:port")
    last = capsys.readouterr().err.splitlines()[-1]
    assert "argument --mac-decode-receiver: receiver must be host:port, not 'mac:port'" in last


def test_settings_that_cannot_be_are_one_line_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"kv_connector": "mac_decode", "kv_role": "kv_producer"}
    monkeypatch.setenv("MAC_DECODE_RECEIVER", "mac:port")
    with pytest.raises(
        SystemExit, match=r"^vllm: mac_decode settings: .*host:port, not 'mac:port'"
    ):
        parse("--kv-connector", "mac_decode")
    parse("--kv-connector", "NixlConnector")  # no business of ours
    monkeypatch.delenv("MAC_DECODE_RECEIVER")
    config["kv_connector_extra_config"] = {"stall_timeout": 0}  # type: ignore[assignment]
    with pytest.raises(SystemExit, match="stall_timeout must be above 0 seconds"):
        parse("--kv-transfer-config", json.dumps(config))


def test_the_help_shows_the_flags() -> None:
    text = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).format_help()
    assert "--kv-connector NAME" in text
    assert "--mac-decode-receiver HOST[:PORT]" in text


def test_a_second_registration_changes_nothing() -> None:
    before = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__
    register()
    assert (EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__) == before
    assert parse("--kv-connector", "mac_decode") is not None


def test_the_name_is_the_connector_class() -> None:
    cls = KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
    assert cls.__name__ == "MacDecodeConnector"
