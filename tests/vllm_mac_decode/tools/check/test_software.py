"""A vLLM or a plugin that is another, or missing."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from vllm_mac_decode.tools.check import software


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.25.1", "warning"),
        ("0.26.0", "fine"),
        ("0.33.2+cu130", "fine"),
        ("0.34.0rc1", "warning"),
        ("0.1.dev16260+g0123456", "warning"),
    ],
)
def test_a_version_alone_never_rules_a_vllm_out(
    version: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / f"vllm-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = software.check_vllm()
    assert (finding.state, version in finding.seen) == (state, True)
    assert "pip install" not in finding.remedy


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    finding = software.check_vllm()
    assert finding.state == "wrong"
    assert "'vllm>=0.26,<0.34'" in finding.remedy


class Point:
    """An entry point that does not load."""

    def load(self) -> None:
        raise ImportError("half an installation")


@pytest.mark.parametrize(
    ("points", "seen"),
    [([], "is not registered"), ([Point()], "does not load: ImportError: half an installation")],
)
def test_a_plugin_that_is_not_there(
    points: list[Point], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: points)
    finding = software.check_plugin()
    assert finding.state == "wrong"
    assert seen in finding.seen
    # No index has a package of our name.
    assert "vllm-mac-decode @ git+" in finding.remedy


def test_a_plugin_that_vllm_may_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    remedy = software.check_plugin().remedy
    assert "export VLLM_PLUGINS=lora_filesystem_resolver,mac_decode" in remedy
    monkeypatch.setenv("VLLM_PLUGINS", "mac_decode")
    assert software.check_plugin().state == "fine"
