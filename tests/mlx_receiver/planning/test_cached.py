"""Profiles in files."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from mlx_receiver.planning import cached
from mlx_receiver.wire.profile import Decode, Prefill, Profile

KEY = {"hardware": "a machine", "mlx": "0.32", "model": "m"}
PROFILE = Profile("a machine", "m", Prefill(0.01, 2e-4, 1e-8, 2048), Decode(0.02, 1e-3, 1e-7))
SAVED = cached.Saved(side="receiver", key=KEY, profile=PROFILE, made=1e9, samples=12)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "cache"))
    return cached.folder()


def test_what_was_written_is_read(place: Path) -> None:
    assert cached.read("receiver", KEY) is None and cached.read_all() == []
    file = cached.write(SAVED)
    assert file is not None and file.parent == place
    assert file.stat().st_mode & 0o777 == 0o600 and place.stat().st_mode & 0o777 == 0o700
    assert cached.read("receiver", KEY) == SAVED
    assert list(place.iterdir()) == [file], "nothing half-written is left"


@pytest.mark.parametrize("name", list(KEY))
def test_everything_that_it_depends_on(name: str) -> None:
    cached.write(SAVED)
    assert cached.read("receiver", {**KEY, name: "another"}) is None
    assert cached.read("vllm", KEY) is None
    assert cached.read("receiver", {**KEY, "more": ""}) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"\xff", b"[]", b"1" * 100_000,
        msgspec.json.encode({**msgspec.to_builtins(SAVED), "version": 0}),
        msgspec.json.encode({**msgspec.to_builtins(SAVED), "side": "vllm"}),
        msgspec.json.encode({**msgspec.to_builtins(SAVED), "key": {}}),
        msgspec.json.encode(SAVED).replace(b'"step":0.01', b'"step":-1'),
        msgspec.json.encode(SAVED).replace(b'"step":0.01', b'"step":1e999'),
        msgspec.json.encode(SAVED).replace(b'"chunk":2048', b'"chunk":0'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_none(damage: bytes) -> None:
    file = cached.write(SAVED)
    assert file is not None
    file.write_bytes(damage)
    assert cached.read("receiver", KEY) is None
    cached.write(SAVED)
    assert cached.read("receiver", KEY) == SAVED


def test_all_of_a_side_the_latest_first() -> None:
    for n in range(3):
        key = {**KEY, "model": str(n)}
        cached.write(msgspec.structs.replace(SAVED, key=key, made=float(n)))
    cached.write(msgspec.structs.replace(SAVED, side="vllm"))
    assert [saved.made for saved in cached.read_all("receiver")] == [2.0, 1.0, 0.0]
    assert len(cached.read_all()) == 4
    cached.forget("receiver", {**KEY, "model": "1"})
    assert [saved.made for saved in cached.read_all("receiver")] == [2.0, 0.0]


@pytest.mark.parametrize("phase", ["prefill_error", "decode_error"])
def test_what_was_measured_beside_something_else_is_not_kept(
    phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert cached.write(msgspec.structs.replace(SAVED, **{phase: 0.4})) is None
    assert cached.read_all() == [] and "40 %" in caplog.text
    assert cached.write(msgspec.structs.replace(SAVED, **{phase: 0.2})) is not None


def test_old_files_go(place: Path) -> None:
    for n in range(cached._KEPT + 5):
        file = cached.write(msgspec.structs.replace(SAVED, key={**KEY, "model": str(n)}))
        assert file is not None
        os.utime(file, (n, n))
    left = {saved.key["model"] for saved in cached.read_all()}
    assert len(left) == cached._KEPT and "0" not in left


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "file"))
    assert cached.write(SAVED) is None and cached.read("receiver", KEY) is None
    assert cached.read_all() == []
    assert len(caplog.records) == 1 and "cannot be kept" in caplog.text
