"""When vLLM may free blocks: never before they were read, and always in the end."""

from __future__ import annotations

import itertools

from vllm_mac_decode.worker.ledger import BlockLedger


def test_every_order_of_reading_and_finishing() -> None:
    """Two layers of two steps, and the end of the request at any moment."""
    for order in set(itertools.permutations(["announce", "read", "read", "read", "read", "end"])):
        if order[0] != "announce":
            continue
        ledger, reads, ended, freed = BlockLedger(), 0, False, False
        for event in order:
            match event:
                case "announce":
                    ledger.announce("r", 2)
                    ledger.announce("r", 2)
                case "read":
                    ledger.read("r")
                    reads += 1
                case _:
                    ended = True
            found = ledger.finished({"r"} if event == "end" else set())
            assert not (found and freed), "once"
            freed = freed or found == {"r"}
            assert freed == (ended and reads == 4), order


def test_others_are_nobodys_business() -> None:
    ledger = BlockLedger()
    assert ledger.finished({"never announced"}) == set()
    ledger.announce("read elsewhere", 0)
    assert ledger.finished({"never announced", "read elsewhere"}) == {"read elsewhere"}
    assert ledger.finished({"read elsewhere"}) == set()


def test_a_fault_releases_what_was_and_what_will_be() -> None:
    ledger = BlockLedger()
    ledger.announce("a", 5)
    assert ledger.finished({"a"}) == set()
    ledger.release()
    assert ledger.finished(set()) == {"a"}
    ledger.announce("b", 0)
    assert ledger.finished({"b"}) == {"b"}
