"""Where a quantised block lands, and what puts its numbers where a raw one's would have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_receiver.caches.memory import Reservation
from mlx_receiver.caches.quantised import decoded, scratch_bytes
from mlx_receiver.transports.landing import scatter
from mlx_receiver.transports.transport import Landing
from mlx_receiver.wire.frames import Header


def quantised(
    header: Header, reservation: Reservation, plain: Callable[[Header], Landing]
) -> Landing | None:
    """Memory for the block as it travels, and for decoding it into what ``plain`` gives; None where
    the reservation has no room for that. Raises what ``plain`` does."""
    nbytes = header.payload_bytes + scratch_bytes(header)
    if not reservation.take(nbytes, beside=True):
        return None
    try:
        payload = np.empty(header.payload_bytes, np.uint8).data
        landing = plain(header)
    except BaseException:
        reservation.give_back(nbytes)
        raise

    def commit() -> None:
        try:
            scatter(decoded(header, payload), landing.buffers)
        except BaseException:
            landing.abort()
            raise
        finally:
            reservation.give_back(nbytes)
        landing.commit()

    def abort() -> None:
        reservation.give_back(nbytes)
        landing.abort()

    return Landing([payload], commit, abort)
