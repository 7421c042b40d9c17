"""The worked example of ``docs/extending.md``, installed as a package of its own beside both
servers: another kind of cache is handed off. One that cannot even be imported ends nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from tests.conftest import free_port
from tests.mlx_alone import _model, greedy
from tests.rounding import rounded
from tests.servers import Receiver, Vllm, metric, start_receiver, start_vllm
from tests.waiting import eventually

EXAMPLE = Path(__file__).parents[1] / "extension"
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"

OUTPUT = 24
PROMPTS = [[1 + (7 * i + 3 * n) % 900 for i in range(length)]
           for n, length in enumerate((5, 64, 129, 300))]  # fmt: skip
#: Of the tiny Llama: 4 layers' K and V, 2 heads of 32 numbers, a byte each, and a scale of two.
BYTES = 4 * 2 * 2 * (32 + 2)


def test_the_page_shows_the_package() -> None:
    shown = dict(re.findall(r"^`([\w/.]+)`.*?^```\w+\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    files = [EXAMPLE / "pyproject.toml", *EXAMPLE.glob("mac_decode_int8/*.py")]
    assert shown == {str(file.relative_to(EXAMPLE)): file.read_text() for file in files}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: the example, and one that is broken."""
    folder = tmp_path_factory.mktemp("site")
    # A copy: setuptools leaves its build folder behind.
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "example")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--target", str(folder), str(source)],
        check=True,
    )  # fmt: skip
    (folder / "broken.py").write_text("import nothing_of_this_name\n")
    metadata = folder / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mac_decode]\nodd = broken\n")
    return folder


@pytest.fixture(scope="module")
def served(
    site: Path, tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Vllm, Receiver, Receiver]]:
    """vLLM with the package, a receiver with it and one without."""
    logs = tmp_path_factory.mktemp("extension")
    ports = [free_port(), free_port()]
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    with ExitStack() as stack:
        without = start_receiver(tiny_llama_path, logs / "without.log", port=ports[1])
        stack.callback(without.server.stop)
        with pytest.MonkeyPatch.context() as patch:
            path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
            patch.setenv("PYTHONPATH", os.pathsep.join(path))
            args = ("--max-num-batched-tokens", "256")
            vllm = start_vllm(
                tiny_llama_path,
                logs / "vllm.log",
                receiver=addresses,
                args=args,
                wait=False,
                fresh=True,
            )
            stack.callback(vllm.server.stop)
            receiver = start_receiver(tiny_llama_path, logs / "with.log", port=ports[0], fresh=True)
            stack.callback(receiver.server.stop)
        vllm.wait_healthy()
        vllm.wait_connected(receiver)
        yield vllm, receiver, without


def by_mlx_alone(path: Path, prompt: list[int]) -> list[int]:
    """MLX prefills, its cache is rounded, and MLX decodes."""
    model = _model(path, mx.float32)
    caches = [KVCache() for _ in model.layers]
    tokens = [int(mx.argmax(model(mx.array([prompt]), cache=caches)[0, -1]).item())]
    for cache in caches:
        for array in (cache.keys, cache.values):
            array[..., : len(prompt), :] = mx.array(rounded(np.array(array)[..., : len(prompt), :]))
    while len(tokens) < OUTPUT:
        logits = model(mx.array([tokens[-1:]]), cache=caches)
        tokens.append(int(mx.argmax(logits[0, -1]).item()))
    return tokens


@pytest.mark.server
def test_tokens_are_those_of_mlx_with_the_same_cache(
    served: tuple[Vllm, Receiver, Receiver], tiny_llama_path: Path
) -> None:
    vllm, receiver, _ = served
    expected = [by_mlx_alone(tiny_llama_path, prompt) for prompt in PROMPTS]
    assert expected != greedy(tiny_llama_path, PROMPTS, OUTPUT), "rounding changes nothing"
    receiver.assert_idle()
    decoded = receiver.metric("mlx_receiver_decoded_tokens_total")
    arrived = receiver.metric("mlx_receiver_kv_bytes_total")
    # Alone, and in one batch.
    assert [vllm.tokens(prompt, OUTPUT) for prompt in PROMPTS] == expected
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: vllm.tokens(prompt, OUTPUT), PROMPTS)) == expected
    receiver.assert_idle()
    count = receiver.metric("mlx_receiver_decoded_tokens_total") - decoded
    assert count == 2 * len(PROMPTS) * (OUTPUT - 1), vllm.server.tail()
    sent = receiver.metric("mlx_receiver_kv_bytes_total") - arrived
    assert sent == 2 * sum(map(len, PROMPTS)) * BYTES


@pytest.mark.server
def test_each_side_says_what_it_has_to_do_with(served: tuple[Vllm, Receiver, Receiver]) -> None:
    vllm, receiver, without = served
    said = receiver.server.log.read_text()
    assert "4 layers compared, at most" in said
    # A proof is of these versions.
    assert re.search(r"\(vllm [\d.+cpu]+, broken 1\.0, mac-decode-int8 1\.0\) connected", said)
    assert metric(without.url, "mlx_receiver_decoded_tokens_total") == 0
    wanted = "layers 0..3, kind: full here, int8 there"
    assert eventually(lambda: wanted in vllm.server.log.read_text())
    broken = "the plugin odd (broken) cannot be loaded and is left out: ModuleNotFoundError: "
    for server in (vllm.server, receiver.server):
        assert broken in server.log.read_text()
    assert broken not in without.server.log.read_text()
