"""Prometheus metrics of one receiver, in a registry of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Shares of the latest predictions, whose largest errors are shown.
QUANTILES: Final = (0.5, 0.9)


class Metrics:
    """Everything that ``GET /metrics`` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self.registry)
        gauge = functools.partial(Gauge, registry=self.registry)
        histogram = functools.partial(Histogram, registry=self.registry)
        self.decoded_tokens = counter("mlx_receiver_decoded_tokens_total", "Tokens decoded.")
        self.kv_bytes = counter("mlx_receiver_kv_bytes_total", "Bytes of KV received.")
        self.held_tokens = counter(
            "mlx_receiver_held_tokens_total",
            "Prompt tokens whose KV was still held from earlier texts.",
        )
        self.computed_bytes = counter(
            "mlx_receiver_computed_kv_bytes_total",
            "KV of hand-offs that was computed here while the rest of it came.",
        )
        self.computed_tokens = counter(
            "mlx_receiver_computed_tokens_total",
            "Prompt tokens of vLLM's requests that were prefilled here.",
        )
        self.evicted = counter(
            "mlx_receiver_evicted_texts_total",
            "Texts whose KV made room for others'.",
        )
        self.resident_bytes = gauge(
            "mlx_receiver_kv_resident_bytes",
            "KV memory of texts that have ended, kept until it is needed.",
        )
        self.disk_bytes = gauge(
            "mlx_receiver_kv_disk_bytes",
            "KV of texts that have ended, on disk (--kv-disk).",
        )
        self.sessions = counter(
            "mlx_receiver_sessions_total",
            "Sessions that ended or were refused.",
            ["outcome"],
        )
        self.refused_blocks = counter(
            "mlx_receiver_refused_blocks_total",
            "KV blocks read and thrown away.",
            ["code"],
        )
        self.frontdoor_requests = counter(
            "mlx_receiver_frontdoor_requests_total",
            "Prompts of the front door: short ones (local), prefilled by vLLM (remote), or here "
            "because vLLM could not (fallback).",
            ["path"],
        )
        self.sessions_active = gauge("mlx_receiver_sessions_active", "Sessions that exist.")
        self.kv_reserved_bytes = gauge("mlx_receiver_kv_reserved_bytes", "KV memory reserved.")
        self.queued_bytes = gauge(
            "mlx_receiver_queued_bytes",
            "Bytes of messages that wait for clients to read them.",
        )
        self.handoff_seconds = histogram(
            "mlx_receiver_handoff_seconds",
            "From the arrival of the first token or the last block to the first decoded token.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.decode_step_seconds = histogram(
            "mlx_receiver_decode_step_seconds",
            "One decode step of the whole batch.",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5),
        )
        self.prediction_error = gauge(
            "mlx_receiver_prediction_error_ratio",
            "Of the latest prefills and decode steps: the relative error of what the profile "
            "predicted that so large a share of them stays within.",
            ["phase", "quantile"],
        )

    def show_errors(self, error: Callable[[float, str], float]) -> None:
        """``error`` says it for a quantile and a phase."""
        for phase in ("prefill", "decode"):
            for quantile in QUANTILES:
                gauge = self.prediction_error.labels(phase, str(quantile))
                gauge.set_function(lambda q=quantile, p=phase: error(q, p))  # type: ignore[misc]
