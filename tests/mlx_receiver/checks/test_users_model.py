"""Whether the user's model fits."""

from __future__ import annotations

from pathlib import Path

from mlx_receiver.checks.users_model import check_fit
from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.decode.weights import Memory


def test_what_fits_beside_a_model(tiny_llama_path: Path, tmp_path: Path) -> None:
    source = find_model(str(tiny_llama_path))
    found = check_fit(source, Memory(1 << 30, 2 << 30, metal=True))
    assert found.state == "fine"
    # 4 layers, 2 KV heads of 32, K and V, 2 bytes.
    assert "1 KiB of KV a token" in found.seen
    assert "weights of 0.02 GiB of the 1.0 GiB" in found.seen
    room = int(((1 << 30) - load_model(source).nbytes) * 0.4) // 1024
    assert f"room for {room:,} tokens, or {room // 8192} sessions" in found.seen
    found = check_fit(source, Memory(20 << 20, 64 << 30, metal=True))
    assert (found.state, "does not fit" in found.seen) == ("wrong", True)
    assert "iogpu.wired_limit_mb" in found.remedy
    (tmp_path / "config.json").write_bytes((tiny_llama_path / "config.json").read_bytes())
    assert check_fit(find_model(str(tmp_path))).state == "unchecked"
