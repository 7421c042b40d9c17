"""``mac-decode profile``: where figures come from, and what is shown of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from mlx_receiver.planning import cached
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.messages import DataPath, Ping
from mlx_receiver.wire.profile import Coding, Decode, Prefill, Profile
from tests.conftest import free_port
from vllm_mac_decode.tools.cli import app

VLLM = Profile(
    "NVIDIA GB10", "org/model", Prefill(0.02, 1.7e-4, 6e-9, 8192), Decode(0.085, 2e-4, 2e-7),
    kv_bytes=8 << 30,
)  # fmt: skip
KEY = {"hardware": "NVIDIA GB10", "vllm": "0.32.0", "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def measured() -> None:
    cached.write(
        cached.Saved(
            side="vllm", key=KEY, profile=VLLM, made=1.7e9, seconds=9.5, samples=21,
            prefill_error=0.02, decode_error=0.01,
        )
    )  # fmt: skip


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["profile", *arguments])
    return result.exit_code, result.output


def there(receiver: Receiver) -> str:
    assert receiver.http is not None
    return f"http://127.0.0.1:{receiver.http.port}"


@pytest.fixture(scope="module")
def receiver(tiny_llama_path: Path) -> Iterator[Receiver]:
    from tests.mlx_receiver.client import started

    with started(tiny_llama_path, http_port=0) as receiver:
        yield receiver


def test_both_sides(measured: None, receiver: Receiver, tmp_path: Path) -> None:
    assert receiver.speed is not None
    mac = Profile("a Mac", "model", Prefill(0.01, 7e-4, 2e-8, 2048), Decode(0.02, 1e-3, 1e-7))
    receiver.speed._estimate.measured(mac)
    picture = tmp_path / "p.svg"
    code, text = run("--receiver-http", there(receiver), "--svg", str(picture))
    assert code == 0, text
    assert "NVIDIA GB10" in text and "a Mac" in text
    assert f"{1024 / VLLM.prefill.seconds(1024):,.0f} tokens/s" in text
    assert f"{1 / mac.decode.seconds(1024):,.1f} tokens/s" in text
    assert f"{mac.prefill.seconds(8192):,.4g} s" in text
    words = " ".join(text.split())
    assert "vllm 0.32.0 (bfloat16), 21 samples, of which half are within 2.0 %" in words
    drawn = ElementTree.parse(picture).getroot()
    assert len(drawn.findall(".//{*}polyline")) == 4
    code, text = run("--receiver-http", there(receiver), "--json")
    told = json.loads(text)
    assert code == 0 and told["vllm"]["profile"]["device"] == "NVIDIA GB10"
    assert told["receiver"]["profile"]["prefill"]["token"] == 7e-4
    receiver.speed._estimate.observe_decode(500, 1, 2 * mac.decode.seconds(500))
    _, text = run("--receiver-http", there(receiver))
    assert "corrected by what it has decoded since" in " ".join(text.split())
    assert "prediction error, p50" in text and "50 % (decode)" in text


def test_how_fast_both_sides_quantise(measured: None, receiver: Receiver) -> None:
    assert receiver.speed is not None
    mac = Profile("a Mac", "model", Prefill(0.01, 7e-4, 2e-8, 2048), Decode(0.02, 1e-3, 1e-7))
    receiver.speed._estimate.measured(mac)
    _, text = run("--receiver-http", there(receiver))
    words = " ".join(text.split())
    assert words.count("q8 and q4 were not measured: plans take what stands in brackets") == 2
    assert words.count("(0.65 GB/s)") == 4
    known = msgspec.structs.replace(mac, coding=Coding(1.25e9, 0.5e9, 3.5))
    receiver.speed._estimate.measured(known)
    (saved,) = cached.read_all("vllm")
    told = msgspec.structs.replace(VLLM, coding=Coding(20e9, 0.0, 1))
    cached.write(msgspec.structs.replace(saved, profile=told))
    _, text = run("--receiver-http", there(receiver))
    words = " ".join(text.split())
    assert "20.00 GB/s" in words and "4.38 GB/s, 3.5 threads" in words
    assert "1.75 GB/s, 3.5 threads" in words and words.count("(0.65 GB/s)") == 1
    assert "q8 and q4 when it started" in words and "q8 and q4 with it" in words
    _, text = run("--receiver-http", there(receiver), "--json")
    assert json.loads(text)["receiver"]["profile"]["coding"]["q8"] == 1.25e9


def test_the_link_is_what_vllm_has_told_the_receiver(receiver: Receiver) -> None:
    from tests.mlx_receiver.client import connected
    from tests.waiting import eventually

    with connected(receiver) as client:

        def shown() -> bool:
            client.send(Ping(1, DataPath("10.0.0.2", 1_250_000_000, 200_000, 9000)))
            _, text = run("--receiver-http", there(receiver))
            return "KV goes to 10.0.0.2 (10.00 Gbit/s, 0.2 ms, MTU 9000)" in " ".join(text.split())

        # Its own pings say that it has measured nothing.
        client.silence()
        assert eventually(shown, 3)


def test_what_is_not_known_is_said(receiver: Receiver) -> None:
    assert receiver.speed is not None
    receiver.speed._estimate.measured(None)
    code, text = run("--receiver-http", there(receiver))
    words = " ".join(text.split())
    assert code == 1
    assert "vLLM: nothing in" in words and "receiver: it has not been measured" in words


def test_a_receiver_of_this_machine_that_does_not_run(measured: None) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    code, text = run("--receiver-http", nobody)
    assert code == 1 and f"no receiver answers at {nobody}" in " ".join(text.split())
    saved = cached.read_all("vllm")[0]
    cached.write(
        cached.Saved(side="receiver", key={"mlx": "mlx 0.32"}, profile=VLLM, made=saved.made)
    )
    code, text = run("--receiver-http", nobody)
    assert code == 0 and "on this machine; no receiver answers" in " ".join(text.split())


@pytest.mark.parametrize(
    ("profile", "made"),
    [
        (Profile("none", "m", Prefill(0, 0, 0, 1), Decode(0, 0, 0)), 1.7e9),
        (Profile("tiny", "m", Prefill(0, 5e-324, 0, 1), Decode(5e-324, 0, 0)), 1.7e9),
        (Profile("a [/b] c", "[red]m", VLLM.prefill, VLLM.decode), 1.7e9),
        (Profile("long ago", "m", VLLM.prefill, VLLM.decode), -1e15),
        (Profile("never", "m", VLLM.prefill, VLLM.decode), 1e300),
    ],
)
def test_profiles_that_nobody_measured(profile: Profile, made: float, tmp_path: Path) -> None:
    for side in ("vllm", "receiver"):
        cached.write(cached.Saved(side=side, key=KEY, profile=profile, made=made))  # type: ignore[arg-type]
    code, text = run("--receiver-http", "http://127.0.0.1:1", "--svg", str(tmp_path / "p.svg"))
    assert code == 0, text
    assert profile.device in text and profile.model in text


@pytest.mark.parametrize("address", ["http://", "nonsense", "http://[::1"])
def test_an_address_that_is_none(address: str) -> None:
    code, text = run("--receiver-http", address)
    assert code == 1 and len(text.splitlines()) < 30 and "Traceback" not in text


def test_a_receiver_with_a_key(tiny_llama_path: Path) -> None:
    from tests.mlx_receiver.client import started

    with started(tiny_llama_path, http_port=0, api_key="k") as receiver:
        code, text = run("--receiver-http", there(receiver))
        assert code == 1 and "wants a key: --api-key" in text
        code, text = run("--receiver-http", there(receiver), "--api-key", "k")
        assert "it has not been measured" in " ".join(text.split())
