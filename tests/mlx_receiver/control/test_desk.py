"""What a receiver says of itself on the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zmq

from mlx_receiver.control.desk import Desk, Presence
from mlx_receiver.discovery.service import ANY_MODEL, Announced
from mlx_receiver.pairing.keystore import STATE_VARIABLE, Keystore, Peer
from mlx_receiver.settings import Settings, SettingsError
from mlx_receiver.wire import keys


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))


def presence(model: str = ANY_MODEL, **options: Any) -> Presence:
    settings = Settings(**{"discovery": False, **options})
    return Presence(Desk.of(settings), settings, 7790, 7791, model)


def said(presence: Presence) -> Announced:
    return presence._said


def test_with_a_token_nothing_is_said_that_one_could_guess_it_from() -> None:
    first, second = said(presence(token="secret")), said(presence(token="secret"))
    assert first.key == second.key == ""
    assert first.instance != second.instance
    assert first.paired, "nobody has to be"
    public = keys.control_keys("secret").receiver_public.decode()
    assert public not in repr(first)


def test_who_pairs_says_its_key_and_whether_somebody_is_paired() -> None:
    here = presence()
    identity = Keystore("receiver").identity()
    assert (said(here).key, said(here).instance) == (identity.public, identity.instance)
    assert not said(here).paired
    Keystore("receiver").add(Peer("spark", zmq.curve_keypair()[0].decode()))
    here.refresh()
    assert said(here).paired
    Keystore("receiver").remove("*")
    here.refresh()
    assert not said(here).paired
    here.close()


@pytest.mark.parametrize(
    ("model", "heard"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/Users/somebody/secret-project/llama", "llama"),
        ("~/models/llama/", "llama"),
        ("./llama", "llama"),
        (ANY_MODEL, "any"),
    ],
)
def test_folders_stay_at_home(model: str, heard: str) -> None:
    assert said(presence(model)).model == heard


def test_keys_that_cannot_be_kept_end_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(SettingsError, match=STATE_VARIABLE):
        Desk.of(Settings())
    Desk.of(Settings(token="t"))
    Desk.of(Settings(host="127.0.0.1"))
