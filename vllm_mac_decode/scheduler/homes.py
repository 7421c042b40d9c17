"""Who holds what a prompt begins with: receivers keep the texts that they got.

vLLM's hashes of a prompt's blocks, each of everything up to its end, name its beginnings. What is
kept is what was sent, not what a receiver still has: ``Opened`` tells that, and how much of what is
expected there is found on the whole is kept with the receiver (``Remote``).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mlx_receiver.wire.quantised import RAW

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_mac_decode.scheduler.remote import Remote

#: Prompts whose receiver is remembered.
_MOST_HOMES: Final = 4096

#: Beginnings of prompts that are remembered, of all and of one: other prompts branch off there.
_MOST_BEGINNINGS: Final = 32768
_OF_ONE: Final = 64


@dataclass(eq=False, slots=True)
class Home:
    """Where one text is: ``tokens`` of it, as far as is known, which travelled in a codec."""

    remote: Remote
    tokens: int
    codec: str = RAW


class Homes:
    """By the hashes of blocks, who got their caches; bounded, the latest last."""

    def __init__(self) -> None:
        #: Of prompts' last blocks.
        self._ends: dict[Hashable, Home] = {}
        #: Of some blocks before, with their numbers, from 1 on.
        self._beginnings: dict[Hashable, tuple[Home, int]] = {}
        #: Tokens of a block: the least that all prompts allow.
        self._block = 1

    def of(self, request: Request) -> Remote | None:
        """The receiver that had the longest prompt that is remembered and this one begins with."""
        found = next((b for b in reversed(blocks_of(request)) if b in self._ends), None)
        return self._ends[found].remote if found is not None else None

    def find(self, request: Request, remote: Remote) -> tuple[int, str]:
        """How many tokens of the prompt the receiver may have, and the codec that they came in. A
        prompt that begins with a whole earlier one is taken to go on as that text did."""
        for block in reversed(blocks_of(request)):
            home = self._ends.get(block)
            if home is not None and home.remote is remote:
                return min(home.tokens, int(request.num_prompt_tokens)), home.codec
            beginning = self._beginnings.get(block)
            if beginning is not None and beginning[0].remote is remote:
                return min(beginning[0].tokens, beginning[1] * self._block), beginning[0].codec
        return 0, RAW

    def held(self, request: Request, remote: Remote, codec: str = RAW) -> int:
        """Those that it may have of a prompt that travels in that codec."""
        tokens, came_in = self.find(request, remote)
        return tokens if came_in == codec else 0

    def sent(self, request: Request, remote: Remote, codec: str = RAW) -> Home:
        """The receiver gets this prompt's cache."""
        blocks, home = blocks_of(request), Home(remote, request.num_prompt_tokens, codec)
        if not blocks:
            return home
        self._ends.pop(blocks[-1], None)
        self._ends[blocks[-1]] = home
        while len(self._ends) > _MOST_HOMES:
            del self._ends[next(iter(self._ends))]
        # A power of two, so that prompts of different lengths share the places.
        stride = 1 << max(0, (len(blocks) // _OF_ONE).bit_length())
        # So many blocks fitted, and one more did not.
        most = request.num_prompt_tokens // len(blocks)
        least = request.num_prompt_tokens // (len(blocks) + 1) + 1
        self._block = max(self._block, least) if self._block <= most else least
        for index in range(stride - 1, len(blocks), stride):
            self._beginnings.pop(blocks[index], None)
            self._beginnings[blocks[index]] = home, index + 1
        while len(self._beginnings) > _MOST_BEGINNINGS:
            del self._beginnings[next(iter(self._beginnings))]
        return home

    def restarted(self, remote: Remote) -> None:
        """It has nothing in its memory any more. Its disk may have, so that it is still the one to
        ask, but nothing is expected there."""
        for home in [*self._ends.values(), *(found for found, _ in self._beginnings.values())]:
            if home.remote is remote:
                home.tokens = 0

    def leave(self, remote: Remote) -> None:
        """It is gone for good."""
        self._ends = {b: home for b, home in self._ends.items() if home.remote is not remote}
        self._beginnings = {
            b: found for b, found in self._beginnings.items() if found[0].remote is not remote
        }


def blocks_of(request: Request) -> Sequence[Hashable]:
    """vLLM's hashes of the prompt's whole blocks; none where its prefix cache is off."""
    return getattr(request, "block_hashes", ())
