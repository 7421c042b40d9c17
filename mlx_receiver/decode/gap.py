"""What is done between two decode steps, and while nothing is decoded, beside the jobs themselves.

Everything here runs on the decoding thread; the lists of what is to be done take more from any.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mlx_receiver.decode.comparisons import Comparisons
from mlx_receiver.decode.copies import Copies
from mlx_receiver.decode.fronts import Fronts
from mlx_receiver.decode.turns import COPIES, FRONTS, PROMPTS, Turns

if TYPE_CHECKING:
    from mlx_receiver.decode.batch import Batch
    from mlx_receiver.decode.model import LoadedModel, ModelSource
    from mlx_receiver.decode.speed import Speed


class Gap:
    """See the module's text. True while something waits to be done."""

    def __init__(self, source: ModelSource) -> None:
        self.proofs = Comparisons(source)
        self.fronts = Fronts()
        self.copies = Copies()
        self.turns = Turns()
        #: How fast it is; None where nobody asks.
        self.speed: Speed | None = None

    def __bool__(self) -> bool:
        return bool(self.proofs or self.fronts or self.copies)

    @property
    def measures(self) -> bool:
        """Whether how fast it is may be measured at present, if nobody needs the thread."""
        return self.speed is not None and self.speed.due

    @property
    def measures_later(self) -> bool:
        """Whether there is something to measure, now or later."""
        return self.speed is not None and self.speed.wanted

    @property
    def rests(self) -> float | None:
        """Seconds after which there may be something to do although nobody comes; None for
        never."""
        return self.speed.rests if self.speed is not None else None

    def begin(self, decoding: bool) -> None:
        """Let go of what nobody wants any more, and measure nothing where there is work."""
        self.proofs.drop_unwanted()
        if (speed := self.speed) is not None and (
            decoding or self.proofs or self.fronts or speed.hampers
        ):
            speed.busy()
        self.fronts.drop_unwanted()

    def work(self, loaded: LoadedModel, batch: Batch, prefills: bool, failing: bool) -> None:
        """Copy what is to be copied out of the batch, and compute a chunk of a front, as long as
        running responses may wait. ``prefills``: so do prompts that MLX prefills."""
        wants = {
            COPIES: bool(self.copies),
            FRONTS: self.fronts.wanting(len(batch)) and not failing,
            PROMPTS: prefills,
        }
        self.turns.begin([who for who in wants if wants[who]], batch.decoding)
        interrupted = False
        if wants[COPIES] and (seconds := self.turns.seconds(COPIES)):
            began = time.perf_counter()
            self.copies.make(batch, seconds)
            self.turns.took(COPIES, time.perf_counter() - began)
            interrupted = True
        if wants[FRONTS] and (seconds := self.turns.seconds(FRONTS)):
            began = time.perf_counter()
            interrupted |= self.fronts.compute(loaded, len(batch), seconds)
            self.turns.took(FRONTS, time.perf_counter() - began)
        if self.proofs.overdue and not failing:
            self.proofs.make_one(loaded)
            interrupted = True
        if interrupted and self.speed is not None:
            self.speed.interrupted()

    def rest(self, loaded: LoadedModel, failing: bool) -> None:
        """What waits until nothing is decoded: a comparison, or one forward that is timed."""
        if self.proofs:
            self.proofs.make_one(loaded)
        elif self.speed is not None and self.speed.due and not (self.fronts or failing):
            self.speed.forward()

    def end(self) -> None:
        """Nothing is done any more."""
        self.proofs.end()
        self.fronts.end()
        if self.speed is not None:
            self.speed.close()
            self.speed = None
        self.copies.end()
