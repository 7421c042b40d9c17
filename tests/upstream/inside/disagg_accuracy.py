"""vLLM's script test_disagg_accuracy.py as a test: the texts of P alone, then those of the pair."""

import importlib
import os
import sys


def test_disagg_accuracy(tmp_path, monkeypatch):
    accuracy = importlib.import_module(
        "tests.v1.kv_connector.nixl_integration.test_disagg_accuracy"
    )
    # It asks a proxy for /healthcheck; a server of its own has /health.
    monkeypatch.setattr(accuracy, "check_vllm_server", lambda _url: True)
    for mode, port in (("baseline", "PREFILL_PORT"), ("disagg", "PROXY_PORT")):
        arguments = {
            "service_url": f"http://127.0.0.1:{os.environ[port]}",
            "model_name": os.environ["UPSTREAM_MODEL"],
            "mode": mode,
            "file_name": str(tmp_path / "texts.json"),
        }
        flat = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["test_disagg_accuracy.py", *flat])
        accuracy.main()
