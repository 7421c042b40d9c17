"""Settings are declared once: the command line, the variables and the table follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import pytest
import typer
from msgspec import Meta
from typer.testing import CliRunner

from mlx_receiver.options import options, table, typed
from mlx_receiver.settings import ENV_PREFIX, Settings, SettingsError
from vllm_mac_decode.settings import ENV_PREFIX as CONNECTOR_PREFIX
from vllm_mac_decode.settings import Settings as ConnectorSettings


class _Kitchen(msgspec.Struct):
    oven: Annotated[int, Meta(description="Degrees.")]
    timer: Annotated[
        float | None, Meta(description="Minutes.", extra={"type": str, "default": "none"})
    ] = None
    secret: Annotated[str, Meta(description="The recipe.", extra={"variable": "GRANDMOTHER"})] = ""


def _application(seen: list[dict[str, object]], *names: str, **defaults: object) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @typed(_Kitchen, "KITCHEN_", *names, **defaults)
    def cook(loud: bool = False, **given: object) -> None:
        seen.append(given | {"loud": loud})

    return app


def test_flags_variables_and_defaults() -> None:
    seen: list[dict[str, object]] = []
    environment = {"KITCHEN_OVEN": "200", "GRANDMOTHER": "salt", "KITCHEN_SECRET": "pepper"}
    run = CliRunner().invoke
    assert run(_application(seen), [], env=environment).exit_code == 0
    assert run(_application(seen), ["--oven", "90", "--timer", "3", "--loud"]).exit_code == 0
    assert seen == [
        {"oven": 200, "timer": "none", "secret": "salt", "loud": False},
        {"oven": 90, "timer": "3", "secret": "", "loud": True},
    ]


def test_what_has_no_default_must_be_given() -> None:
    refused = CliRunner().invoke(_application([]), [])
    assert refused.exit_code == 2
    assert "--oven" in refused.output


def test_some_of_them_with_a_default_of_their_own() -> None:
    seen: list[dict[str, object]] = []
    assert CliRunner().invoke(_application(seen, "oven", oven=7), []).exit_code == 0
    assert seen == [{"oven": 7, "loud": False}]


def test_the_table() -> None:
    assert table(_Kitchen, "", flags=True).splitlines()[2:] == [
        "| `--oven` |  | Degrees. |",
        "| `--timer` | `none` | Minutes. |",
        "| `--secret` |  | The recipe. |",
    ]


@pytest.mark.parametrize(
    ("settings", "prefix"), [(Settings, ENV_PREFIX), (ConnectorSettings, CONNECTOR_PREFIX)]
)
def test_every_setting_says_what_it_means(settings: type[msgspec.Struct], prefix: str) -> None:
    found = {option.name: option for option in options(settings, prefix)}
    assert list(found) == list(settings.__struct_fields__)
    assert all(option.meaning.endswith(".") for option in found.values())
    assert found["token"].variable == "MAC_DECODE_TOKEN"


def test_what_is_typed_becomes_what_is_meant(tmp_path: Path) -> None:
    defaults = {option.name: option.default for option in options(Settings, ENV_PREFIX)}
    given = defaults | {"model": "m", "http_port": -1, "kv_memory": "2GB"}
    assert Settings.typed(given) == Settings(model="m", http_port=None, kv_memory=2 << 30)
    assert Settings.typed(defaults | {"model": "m"}) == Settings(model="m")
    secret = tmp_path / "token"
    secret.write_text("secret\n")
    typed = Settings.typed(defaults | {"token_file": str(secret)})
    assert (typed.token, typed.pairs) == ("secret", False)
    with pytest.raises(SettingsError, match=r"token file .* cannot be read: No such file"):
        Settings.typed(defaults | {"token_file": str(tmp_path / "none")})
    with pytest.raises(SettingsError, match="--dtype"):
        Settings.typed(given | {"dtype": "int3"})
