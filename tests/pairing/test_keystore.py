"""What is kept of pairings, whoever else reads and writes it."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import zmq

from mlx_receiver.pairing.keystore import STATE_VARIABLE, Keystore, PairingError, Peer


def a_key() -> str:
    return zmq.curve_keypair()[0].decode()


def test_the_identity_is_made_once_and_kept(state: Path) -> None:
    store = Keystore("receiver")
    me = store.identity()
    assert Keystore("receiver").identity() == me
    assert Keystore("vllm").identity() != me, "each side has its own"
    assert len(me.public) == 40 and len(me.instance) == 16


def test_many_at_once_agree_on_one_identity(state: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(Keystore("vllm").identity().secret))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_only_the_user_may_read_it(state: Path) -> None:
    store = Keystore("receiver")
    store.identity()
    store.add(Peer("spark", a_key()))
    for path in store.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    (store.folder / "identity.json").chmod(0o644)  # as a backup that was restored
    Keystore("receiver").identity()
    assert stat.S_IMODE((store.folder / "identity.json").stat().st_mode) == 0o600


def test_peers_come_and_go_for_everybody_who_looks(state: Path) -> None:
    writer, reader = Keystore("receiver"), Keystore("receiver")
    assert reader.peers() == []
    first, second = Peer("spark", a_key()), Peer("spark", a_key(), address="spark:7790")
    writer.add(first)
    assert [peer.key for peer in reader.peers()] == [first.key]
    writer.add(second)
    writer.add(first)  # again: the newer one stays
    assert [peer.key for peer in reader.peers()] == [second.key, first.key]
    assert reader.peers()[1].since > 0
    assert writer.remove(first.instance[:6])[0].key == first.key
    assert [peer.key for peer in reader.peers()] == [second.key]
    assert writer.remove("nobody") == []
    assert len(writer.remove("*")) == 1
    assert reader.peers() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"secret": "short"}', b"\xff\xfe"])
def test_a_damaged_file_is_named(state: Path, content: bytes) -> None:
    store = Keystore("receiver")
    store.identity()
    (store.folder / "identity.json").write_bytes(content)
    with pytest.raises(PairingError, match=r"identity\.json is damaged.*delete it"):
        Keystore("receiver").identity()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(state: Path) -> None:
    state.chmod(0o500)
    with pytest.raises(PairingError, match=STATE_VARIABLE):
        Keystore("receiver").identity()


def test_a_file_where_the_folder_should_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(PairingError, match=STATE_VARIABLE):
        Keystore("vllm").identity()
