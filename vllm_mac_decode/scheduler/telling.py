"""What vLLM's log says of plans: once, that requests are planned, and once, that some stay."""

from __future__ import annotations

import logging

from mlx_receiver.planning.cost import Strategy
from vllm_mac_decode.scheduler.planner import Plan

logger = logging.getLogger("vllm.mac_decode.relay")


class Telling:
    """For one engine."""

    def __init__(self) -> None:
        self._planned = self._local = False

    def decided(self, plan: Plan) -> None:
        """A request was planned."""
        if not plan.decision.predictions:
            return  # something is not known yet, or nothing was to be chosen
        work = plan.work
        if plan.decision.strategy is Strategy.VLLM:
            if not self._local:
                logger.info(
                    "for a request of %d tokens (some %d out) vLLM alone is predicted to be the "
                    "fastest, so it decodes locally, and so do others like it: %s. offload=always "
                    "hands all requests off",
                    *(work.prompt, work.output, plan.decision.text),
                )
            self._local = self._planned = True
        elif not self._planned:
            logger.info(
                "both sides' profiles are known: each request is done in the way that is predicted "
                "to be the fastest (offload=auto), one of %d tokens (some %d out) by %s",
                *(work.prompt, work.output, plan.decision.text),
            )
            self._planned = True
