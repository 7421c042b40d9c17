"""What the general plugin does in every vLLM process: register the connector, add the flags.

vLLM loads general plugins before it builds its parser, so the flags exist in ``vllm serve
--help`` and the connector's name is known wherever the configuration is read.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

from vllm_mac_decode.settings import DEFAULT_PORT, SettingsError, load, parse_addresses

CONNECTOR = "mac_decode"
_DONE = "_mac_decode_registered"


def register_all() -> None:
    """Register the connector, the flags and the engine hooks. Safe to call more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR, "vllm_mac_decode.connector", "MacDecodeConnector"
        )
    if not getattr(EngineArgs, _DONE, False):
        _add_flags(EngineArgs)
        setattr(EngineArgs, _DONE, True)


def _add_flags(engine_args: Any) -> None:
    add_cli_args = engine_args.add_cli_args
    from_cli_args = engine_args.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def with_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            title="KV connector by name",
            description="Short form of --kv-transfer-config.",
        )
        group.add_argument(
            "--kv-connector",
            metavar="NAME",
            default=None,
            help="Use this KV connector, as the producer unless --kv-transfer-config says "
            "otherwise. `mac_decode` continues each response on an MLX receiver.",
        )
        group.add_argument(
            "--mac-decode-receiver",
            metavar="HOST[:PORT]",
            type=_receiver,
            default=None,
            help="Where `mlx-receiver start` listens (also MAC_DECODE_RECEIVER; port "
            f"{DEFAULT_PORT} unless given). Without it, the paired receiver that is found on the "
            "network.",
        )
        return parser

    @classmethod  # type: ignore[misc]
    @functools.wraps(from_cli_args)
    def merged(cls: Any, args: argparse.Namespace) -> Any:
        _merge(args)
        return from_cli_args(cls, args)

    engine_args.add_cli_args = staticmethod(with_flags)
    engine_args.from_cli_args = merged


def _receiver(text: str) -> str:
    try:
        parse_addresses(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _merge(args: argparse.Namespace) -> None:
    """Fold the short flags into ``args.kv_transfer_config``."""
    from vllm.config import KVTransferConfig

    name = getattr(args, "kv_connector", None)
    receiver = getattr(args, "mac_decode_receiver", None)
    config = getattr(args, "kv_transfer_config", None)
    if isinstance(config, str):
        config = json.loads(config)
    if isinstance(config, dict):
        config = KVTransferConfig(**config)
    if name is not None:
        if config is None:
            config = KVTransferConfig(kv_connector=name, kv_role="kv_producer")
        elif config.kv_connector not in (None, name):
            raise ValueError(
                f"--kv-connector {name} contradicts --kv-transfer-config, which names "
                f"{config.kv_connector}: leave one of them out"
            )
        config.kv_connector = name
        config.kv_role = config.kv_role or "kv_producer"
    if receiver is not None:
        if config is None or config.kv_connector != CONNECTOR:
            raise ValueError(f"--mac-decode-receiver needs --kv-connector {CONNECTOR}")
        config.kv_connector_extra_config["receiver"] = receiver
    if config is not None:
        args.kv_transfer_config = config
        if config.kv_connector == CONNECTOR:
            _check_settings(config.kv_connector_extra_config)


def _check_settings(extra: dict[str, Any]) -> None:
    """Say in one line what the engine's processes would say in some hundred, much later."""
    try:
        load(extra)
    except SettingsError as error:
        raise SystemExit(f"vllm: {error}") from None
