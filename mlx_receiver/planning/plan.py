"""A request's plan: what each strategy is predicted to take, which one is chosen, and why."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_receiver.planning.cost import RAW, Codec, Prediction, Strategy, fastest
from mlx_receiver.planning.topology import Situation

#: As people call them.
NAMES = {
    Strategy.VLLM: "all on vLLM",
    Strategy.SPLIT: "split, KV streamed",
    Strategy.MAC: "all on the Mac",
    Strategy.MEET: "meet in the middle",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Predictions of the strategies that are possible, in the order of ``Strategy``: of those as
    fast, the first has less computed or sent for nothing. ``by_codec`` are those of the split in
    each codec that the cache can travel in, also where it is another one that is used."""

    situation: Situation
    predictions: tuple[Prediction, ...]
    by_codec: tuple[Prediction, ...] = ()

    @property
    def chosen(self) -> Prediction:
        """The fastest."""
        return fastest(list(self.predictions))

    def of(self, strategy: Strategy) -> Prediction | None:
        """What is predicted for one; None where it is not possible."""
        return next((p for p in self.predictions if p.strategy is strategy), None)

    @property
    def why(self) -> str:
        """In one sentence, with the figures that decide."""
        chosen = self.chosen
        others = [p for p in self.predictions if p is not chosen]
        name = NAMES[chosen.strategy]
        name = name[0].upper() + name[1:]
        if not others:
            return f"{name}: nothing else is possible."
        second = fastest(others)
        gain = 1 - chosen.total / second.total if second.total else 0.0
        beside = f"{100 * gain:.0f} % sooner than {NAMES[second.strategy]}"
        if gain < 0.005:
            beside = f"as soon as {NAMES[second.strategy]}, and less of it is done twice"
        return f"{name}, {beside}: {self._reason(chosen)}."

    def _reason(self, chosen: Prediction) -> str:
        pair, work = self.situation.pair, self.situation.work
        vllm, mac = (side.decode.seconds(work.prompt) for side in (pair.vllm, pair.mac))
        decodes = f"a token takes the Mac {1e3 * mac:.0f} ms and vLLM {1e3 * vllm:.0f} ms"
        match chosen.strategy:
            case Strategy.VLLM if work.decoded == 0:
                return "there is one token to produce, and vLLM's prefill produces it"
            case Strategy.VLLM:
                return f"{decodes}, which does not pay for another machine within {work.output}"
            case Strategy.SPLIT:
                way = f" in {chosen.codec.name}" if chosen.codec.name != RAW.name else ""
                return f"{decodes}, and {1e3 * chosen.shown:.0f} ms of the transfer{way} show"
            case Strategy.MAC:
                split = self.of(Strategy.SPLIT)
                ready = chosen.spans[0].end
                behind = f" for {split.first_token + split.shown:.2f} s" if split else ""
                return f"it has its cache after {ready:.2f} s and waits{behind} otherwise"
            case Strategy.MEET:
                return (
                    f"the Mac computes the first {chosen.met:,} tokens while the rest of the KV "
                    f"comes, and {1e3 * chosen.shown:.0f} ms of that show"
                )


def plan(situation: Situation, codec: Codec = RAW) -> Plan:
    """Of the four strategies, those that are possible; what is split travels in that codec."""
    # KV that is met travels raw: what is computed beside it must fit.
    found = (
        situation.predict(strategy, codec if strategy is Strategy.SPLIT else RAW)
        for strategy in Strategy
        if strategy is not Strategy.MEET or situation.meets
    )
    by_codec = (situation.predict(Strategy.SPLIT, way) for way in situation.codecs)
    return Plan(situation, tuple(found), tuple(by_codec))
