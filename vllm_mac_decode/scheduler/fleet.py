"""All the receivers that there may be: a link to each, in one thread that watches for others."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from mlx_receiver.pairing.keystore import PairingError
from mlx_receiver.wire.handshake import Introduction
from vllm_mac_decode.scheduler.candidates import Candidates, candidates
from vllm_mac_decode.scheduler.link import Link, LinkListener
from vllm_mac_decode.settings import MOST_RECEIVERS, Settings

logger = logging.getLogger("vllm.mac_decode.link")

#: How often the network is looked at, and what the links say.
_LOOK_SECONDS: Final = 0.25
_JOIN_SECONDS: Final = 3.0


class Member(LinkListener, Protocol):
    """A receiver on the side of those who use it."""

    link: Link | None

    def leave(self) -> None:
        """It will not be connected any more."""


class Fleet:
    """Keeps the links until ``close``."""

    def __init__(self, settings: Settings, me: Introduction, join: Callable[[], Member]) -> None:
        """``join`` is called in the fleet's thread for every receiver that there may be."""
        self._settings = settings
        self._me = me
        self._join = join
        self._members: dict[str, tuple[Link, Member]] = {}
        self._ended: dict[str, float] = {}  # when the links ended that there were before
        self._complaint = ""
        self._unused: dict[str, str] = {}  # what was said of those that are not connected
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mac-decode-fleet", daemon=True)
        self._thread.start()

    def close(self, wait: bool = True) -> None:
        """Close every link, and (``wait``) wait for that a while."""
        self._closing.set()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join(timeout=_JOIN_SECONDS)

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.closing(candidates(self._settings)) as found:
            try:
                while not self._closing.is_set():
                    try:
                        self._look(found)
                    except Exception:
                        logger.exception("receivers were not looked for; it will be tried again")
                        self._closing.wait(20 * _LOOK_SECONDS)
                    self._closing.wait(_LOOK_SECONDS)
            finally:
                for link, _ in self._members.values():
                    link.close(wait=False)
                for name in list(self._members):
                    self._end(name)

    def _look(self, found: Candidates) -> None:
        problem = ""
        try:
            there = found.receivers()
        except PairingError as error:
            there, problem = [], str(error)
        for name, (link, _) in list(self._members.items()):
            if name not in there and link.target is None:
                self._end(name)
        waiting = [name for name in there if name not in self._members]
        # Those that were never tried come first, then whoever has waited longest.
        waiting.sort(key=lambda name: self._ended.get(name, 0.0))
        for name in waiting:
            if len(self._members) >= MOST_RECEIVERS and not self._make_room():
                break
            self._begin(found, name)
        self._ended = {name: at for name, at in self._ended.items() if name in there}
        self._complain(problem, found)

    def _begin(self, found: Candidates, name: str) -> None:
        taken = {link.number for link, _ in self._members.values()}
        number = next(n for n in range(MOST_RECEIVERS) if n not in taken)
        member = self._join()
        try:
            link = Link(self._settings, self._me, member, found, name, number)
            member.link = link
            link.start()
        except Exception:  # no more descriptors or threads, say
            member.leave()
            raise
        self._members[name] = link, member

    def _make_room(self) -> bool:
        """End the link that has failed for longest: another name may lead to somebody."""
        for name, (link, _) in self._members.items():
            if link.target is None and link.problem is not None:
                self._end(name)
                return True
        return False

    def _end(self, name: str) -> None:
        self._ended[name] = time.monotonic()
        link, member = self._members.pop(name)
        self._unused.pop(name, None)
        link.close()
        member.leave()

    def _complain(self, problem: str, found: Candidates) -> None:
        """Say why nothing is handed off, or not to some receiver: once, not at every attempt."""
        links = {name: link for name, (link, _) in self._members.items()}
        if any(link.target is not None for link in links.values()):
            self._complaint = ""
            for name, link in links.items():
                self._note(name, link)
            return
        problems = [link.problem for link in links.values() if link.problem is not None]
        if len(problems) < len(links) and not problem:
            return  # some are still being tried
        if not self._settings.receiver:
            # That nobody listens at one of many addresses says little.
            problems = [p for p in problems if not p.nobody]
        text = problem or "; ".join(dict.fromkeys(p.text for p in problems)) or found.none()
        if text != self._complaint:
            self._complaint = text
            logger.warning("decoding locally: %s", text)

    def _note(self, name: str, link: Link) -> None:
        """While others are connected."""
        if link.target is not None:
            self._unused.pop(name, None)
        problem = link.problem
        if problem is None or problem.nobody or problem.text == self._unused.get(name):
            return
        self._unused[name] = problem.text
        logger.warning("one receiver is not used: %s", problem.text)
