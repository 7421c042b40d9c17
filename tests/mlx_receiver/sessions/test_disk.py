"""What texts leave on disk: found again by another process, checked, and never half there."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_receiver.metrics import Metrics
from mlx_receiver.receiver import Receiver
from mlx_receiver.sessions import disk
from mlx_receiver.sessions.disk import BLOCK, DiskTier, Rows
from mlx_receiver.settings import Settings, SettingsError
from tests.mlx_receiver.client import HERE, connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.mlx_receiver.sessions.test_residents import WEIGHTS, followed, settled, turn
from tests.waiting import eventually

TEXT = list(range(5000, 5000 + 3 * BLOCK + 20))


def rows_of(tokens: list[int]) -> Callable[[int, int], Rows]:
    whole = np.arange(2 * len(tokens) * 4, dtype=np.uint32).reshape(2, len(tokens), 4)

    def rows(start: int, end: int) -> Rows:
        return {(0, 0): whole[:, start:end].copy(), (3, 1): whole[:, start:end] + 1}

    return rows


def tier(folder: Path, limit: int = 1 << 30, model: str = "m") -> DiskTier:
    return DiskTier(folder, limit, [model], Metrics())


def saved(made: DiskTier, tokens: list[int], partition: str = "") -> None:
    made.save(partition, np.array(tokens, np.int32), rows_of(tokens))
    assert made.flush(20)


def loaded(made: DiskTier, tokens: list[int], partition: str = "") -> list[NDArray[Any]]:
    """The rows of layer 0, block by block."""
    found: list[NDArray[Any]] = []

    def into(start: int, rows: Rows) -> bool:
        assert start == BLOCK * len(found)
        found.append(rows[0, 0])
        return rows.keys() == {(0, 0), (3, 1)}

    count = made.covers(partition, tokens)
    assert made.load(partition, tokens[:count], into) == BLOCK * len(found)
    return found


def files(folder: Path) -> list[Path]:
    found = [*folder.glob("*.safetensors"), *folder.glob("*.part")]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def test_another_process_finds_it(tmp_path: Path) -> None:
    first = tier(tmp_path)
    saved(first, TEXT)
    first.close()
    found = loaded(tier(tmp_path), [*TEXT[: 2 * BLOCK + 5], 1, 2, 3])
    expected = rows_of(TEXT)(0, 2 * BLOCK)[0, 0]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)} == {0o600}


def test_what_is_shared_is_written_once(tmp_path: Path) -> None:
    made = tier(tmp_path)
    saved(made, TEXT)
    before = files(tmp_path)
    saved(made, [*TEXT[: 2 * BLOCK], *range(2 * BLOCK)])
    assert len(files(tmp_path)) == len(before) + 2
    assert made.nbytes == sum(path.stat().st_size for path in files(tmp_path))


@pytest.mark.parametrize(
    ("tokens", "partition", "model"),
    [
        ([1, *TEXT[1:]], "", "m"),
        (TEXT, "another's", "m"),
        (TEXT, "", "another"),
        (TEXT[: BLOCK - 1], "", "m"),
    ],
)
def test_what_is_not_found(tmp_path: Path, tokens: list[int], partition: str, model: str) -> None:
    made = tier(tmp_path)
    saved(made, TEXT)
    made.close()
    assert tier(tmp_path, model=model).covers(partition, tokens) == 0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _take_for_another(path: Path) -> None:
    """A file of other tokens under this one's name, whole by itself."""
    other = tier(path.parent / "other")
    saved(other, [7, *TEXT[1:]])
    other.close()
    (stranger, *_) = files(path.parent / "other")
    checksum = stranger.stem.partition("-")[2]
    key = path.stem.partition("-")[0]
    path.unlink()
    (path.parent / f"{key}-{checksum}.safetensors").write_bytes(stranger.read_bytes())


def _nonsense(path: Path) -> None:
    import xxhash

    data = os.urandom(3000)
    key = path.stem.partition("-")[0]
    path.unlink()
    (path.parent / f"{key}-{xxhash.xxh3_64_hexdigest(data)}.safetensors").write_bytes(data)


@pytest.mark.parametrize("damage", [_cut, _flip, _take_for_another, _nonsense, Path.unlink])
def test_a_damaged_block_costs_a_miss(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    made = tier(tmp_path)
    saved(made, TEXT)
    made.close()
    second = next(path for path in files(tmp_path) if path.stem.startswith(_keys(made, TEXT)[1]))
    if damage is Path.unlink:
        again = tier(tmp_path)  # removed by somebody else while this one runs
        damage(second)
    else:
        damage(second)
        again = tier(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(loaded(again, TEXT)) == 1
    assert [record.getMessage() for record in caplog.records if "not used" in record.message]
    assert again.covers("", TEXT) == BLOCK  # it is not looked at again
    saved(again, TEXT)
    assert len(loaded(again, TEXT)) == 3


def _keys(made: DiskTier, tokens: list[int]) -> list[str]:
    return list(made._keys("", np.array(tokens, np.int32)))


def test_what_was_not_finished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
              "film.part", "text.txt", f"{'a' * 40}-{'b' * 15}.safetensors"]  # fmt: skip
    for name in others:
        (tmp_path / name).write_bytes(bytes(9000))
    (tmp_path / f"{'a' * 40}-12345678.part").write_bytes(b"half")
    (tmp_path / f"{'b' * 40}-12345678.part").mkdir()
    target = tmp_path / f"{'c' * 40}-{'1' * 16}.safetensors"
    target.symlink_to(tmp_path / "text.txt")
    made = tier(tmp_path, limit=4000)
    assert made.nbytes == 0
    saved(made, TEXT)  # for which there is no room
    made.close()
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {*others, f"{'b' * 40}-12345678.part", target.name}


def test_one_process_has_the_folder(tmp_path: Path) -> None:
    made = tier(tmp_path)
    with pytest.raises(BlockingIOError):
        tier(tmp_path)
    made.close()
    tier(tmp_path).close()


def test_of_a_text_that_is_too_long_the_beginning_is_kept(tmp_path: Path) -> None:
    made = tier(tmp_path)
    saved(made, TEXT[:BLOCK])
    block = made.nbytes
    made.close()
    made = tier(tmp_path, limit=2 * block + 50)
    for _ in range(3):
        saved(made, TEXT)
        assert made.covers("", TEXT) == 2 * BLOCK
    before = {path: path.stat().st_ino for path in files(tmp_path)}
    saved(made, TEXT)
    assert {path: path.stat().st_ino for path in files(tmp_path)} == before


def test_reading_can_be_given_up(tmp_path: Path) -> None:
    made = tier(tmp_path)
    saved(made, TEXT)
    answers = iter([True, True, False])
    assert made.load("", TEXT, lambda *_: True, lambda: next(answers)) == 2 * BLOCK
    assert made.covers("", TEXT) == 3 * BLOCK  # nothing is wrong with it


def test_the_oldest_goes(tmp_path: Path) -> None:
    made = tier(tmp_path)
    saved(made, TEXT[: BLOCK + 1])
    block = made.nbytes
    made.close()
    made = tier(tmp_path, limit=4 * block + 50)
    others = [[n, *TEXT[1 : BLOCK + 1]] for n in range(6)]
    for other in others:
        saved(made, other)
        assert made.covers("", TEXT) == BLOCK  # looked at, but used only when it is read
        assert loaded(made, TEXT)
    assert len(files(tmp_path)) == 4 and made.nbytes <= 4 * block + 50
    assert [made.covers("", other) for other in others] == [0, 0, 0, BLOCK, BLOCK, BLOCK]
    made.close()
    assert len(files(tmp_path)) == 4
    # A smaller limit at the next start counts, too.
    assert tier(tmp_path, limit=2 * block + 50).nbytes <= 2 * block + 50


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = tier(tmp_path)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(disk.os, "fdopen", full)
        saved(made, TEXT)
        saved(made, [9, *TEXT])
    assert [r for r in caplog.records if "No space left" in r.getMessage()] == caplog.records[:1]
    assert len(caplog.records) == 1
    assert files(tmp_path) == []
    made._paused_until = 0.0
    saved(made, TEXT)
    assert made.covers("", TEXT) == 3 * BLOCK


def test_a_block_that_is_too_large_removes_nothing(tmp_path: Path) -> None:
    made = tier(tmp_path, limit=5 << 10)
    saved(made, TEXT)
    assert files(tmp_path) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_is_none(tmp_path: Path, tiny_llama_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(model=str(tiny_llama_path), kv_disk=str(tmp_path / place), port=0, **HERE)
    receiver = Receiver(settings)
    try:
        with pytest.raises(SettingsError, match=r"--kv-disk .*cannot be used"):
            receiver.start()
    finally:
        receiver.stop()


def test_a_conversation_goes_on_after_a_restart(
    tiny_llama_path: Path, tmp_path: Path, prefill: Prefill
) -> None:
    options = {"kv_disk": str(tmp_path), "prompt_cache": True}
    kv = prefill(600)
    with (
        started(tiny_llama_path, **options) as receiver,
        connected(receiver, weights=WEIGHTS) as client,
    ):
        turn(client, kv)
        settled(client)
        assert receiver.store.earlier._disk is not None
        assert receiver.store.earlier._disk.flush(20)
    more = prefill(followed(kv, kv.tokens, *range(30)))
    with (
        started(tiny_llama_path, **options) as receiver,
        connected(receiver, weights=WEIGHTS) as client,
    ):
        assert turn(client, more) == (2 * BLOCK, more.tokens)
        settled(client)
        again = prefill(followed(more, more.tokens, 3))
        assert turn(client, again) == (len(more.prompt) + 8, again.tokens)  # from memory
        settled(client)
    for path in files(tmp_path):
        _flip(path)
    with (
        started(tiny_llama_path, **options) as receiver,
        connected(receiver, weights=WEIGHTS) as client,
    ):
        assert turn(client, more) == (0, more.tokens)


def test_several_restored_at_once(tiny_llama_path: Path, tmp_path: Path, prefill: Prefill) -> None:
    options = {"kv_disk": str(tmp_path), "prompt_cache": True}
    texts = [prefill(300 + n) for n in range(3)]
    with (
        started(tiny_llama_path, **options) as receiver,
        connected(receiver, weights=WEIGHTS) as client,
    ):
        for kv in texts:
            turn(client, kv)
            settled(client)
        assert eventually(lambda: len(files(tmp_path)) == 3)
    with (
        started(tiny_llama_path, **options) as receiver,
        connected(receiver, weights=WEIGHTS) as client,
    ):
        for kv in texts:
            more = prefill(followed(kv, kv.tokens, 5, 6))
            assert turn(client, more) == (BLOCK, more.tokens)
