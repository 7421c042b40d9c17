"""KVConnectorStats and Prometheus metrics: what vLLM's log line and ``/metrics`` show."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_mac_decode.scheduler.handoff import KEPT_TIMES
from vllm_mac_decode.scheduler.relay import Relay

#: name -> help, for the counters without a reason label.
_COUNTERS = {
    "completed": "Responses that the receiver finished",
    "aborted": "Handed-off requests that were aborted",
    "tokens": "Output tokens decoded by the receiver",
    "kv_bytes": "Bytes of KV that became resident on the receiver",
    "computed_bytes": "Bytes of KV that the receiver computed while the rest of it was sent",
    "held_tokens": "Prompt tokens whose KV the receiver still held from earlier texts",
    "computed_tokens": "Prompt tokens that the receiver prefilled",
    "shadow_tokens": "Tokens that an idle vLLM prefilled of what the receiver decoded",
}
#: name -> help, for the counters with a reason label.
_BY_REASON = {
    "local": "Requests decoded locally from the start, by reason",
    "fallbacks": "Hand-offs that went on locally, by reason",
    "shadow_skipped": "Shadow prefills that were given up or put off, by reason",
}
#: The counter with a label for each of two things; ``name:strategy:reason`` in the counts.
_PLANS = ("plans", "Requests that could be handed off, by what was chosen and why")
#: The histogram of a ratio: its help and buckets.
_PLAN_ERROR = (
    "plan_error",
    "Seconds that requests took, over those that their plan had predicted",
    [0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4, 2.0, 4.0],
)
#: name -> help and buckets in seconds, for the histograms.
_TIMES = {
    "handoff_gap": (
        "From vLLM's first token to the receiver's first",
        [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
    ),
    "relay": (
        "From the arrival of a receiver's decode step to its place in vLLM's output queue",
        [0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05],
    ),
}


class MacDecodeStats(KVConnectorStats):
    """Counts of one interval, as a flat mapping: ``name`` or ``name:reason`` -> number, and for
    the times ``name`` -> the latest seconds."""

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another interval's counts."""
        for key, value in other.data.items():
            if isinstance(value, list):
                self.data[key] = [*self.data.get(key, []), *value][-KEPT_TIMES:]
            else:
                self.data[key] = self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line: counts, and the mean times in milliseconds."""
        numbers = {k: v for k, v in self.data.items() if not isinstance(v, list)}
        for name in _TIMES:
            if seconds := self.data.get(name):
                numbers[f"mean_{name}_ms"] = round(1000 * sum(seconds) / len(seconds), 2)
        if ratios := self.data.get(_PLAN_ERROR[0]):
            numbers["mean_plan_error"] = round(sum(ratios) / len(ratios), 2)
        return numbers

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


def stats_from(relay: Relay) -> MacDecodeStats | None:
    """The relay's counts since the last call, or None when nothing happened."""
    counts = relay.take_counts()
    data: dict[str, Any] = dict(counts.events)
    data |= {f"local:{reason}": n for reason, n in counts.local.items()}
    data |= {f"fallbacks:{reason}": n for reason, n in counts.fallbacks.items()}
    data |= {f"shadow_skipped:{reason}": n for reason, n in counts.skipped.items()}
    data |= {f"plans:{what}": n for what, n in counts.plans.items()}
    for name, values in (
        ("handoff_gap", counts.handoff_gaps),
        ("relay", counts.relay_times),
        (_PLAN_ERROR[0], counts.plan_errors),
    ):
        if values:
            data[name] = list(values)
    return MacDecodeStats(data=data) if data else None


class MacDecodePromMetrics(KVConnectorPromMetrics):
    """``vllm:mac_decode_*``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._plain = {
            name: self._counter_cls(
                name=f"vllm:mac_decode_{name}", documentation=text, labelnames=labelnames
            )
            for name, text in _COUNTERS.items()
        }
        self._reasons = {
            name: self._counter_cls(
                name=f"vllm:mac_decode_{name}",
                documentation=text,
                labelnames=[*labelnames, "reason"],
            )
            for name, text in _BY_REASON.items()
        }
        self._plans = self._counter_cls(
            name=f"vllm:mac_decode_{_PLANS[0]}",
            documentation=_PLANS[1],
            labelnames=[*labelnames, "strategy", "reason"],
        )
        self._plan_error = self._histogram_cls(
            name=f"vllm:mac_decode_{_PLAN_ERROR[0]}_ratio",
            documentation=_PLAN_ERROR[1],
            buckets=_PLAN_ERROR[2],
            labelnames=labelnames,
        )
        self._times = {
            name: self._histogram_cls(
                name=f"vllm:mac_decode_{name}_seconds",
                documentation=text,
                buckets=buckets,
                labelnames=labelnames,
            )
            for name, (text, buckets) in _TIMES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one interval's counts."""
        values = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            name, _, reason = key.partition(":")
            if name in self._times:
                for seconds in value:
                    self._times[name].labels(*values).observe(seconds)
            elif name == _PLAN_ERROR[0]:
                for ratio in value:
                    self._plan_error.labels(*values).observe(ratio)
            elif name == _PLANS[0]:
                self._plans.labels(*values, *reason.split(":")).inc(value)
            elif reason:
                self._reasons[name].labels(*values, reason).inc(value)
            else:
                self._plain[name].labels(*values).inc(value)
