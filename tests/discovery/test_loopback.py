"""Announcing and finding on one machine, over its loopback."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from typer.testing import CliRunner

import mlx_receiver.cli
import vllm_mac_decode.tools.cli
from mlx_receiver.discovery.announce import Announcer
from mlx_receiver.discovery.browse import Browser, Found, Way
from mlx_receiver.discovery.service import Announced
from mlx_receiver.wire.messages import PROTOCOL_VERSION
from tests.discovery.test_service import KEY
from tests.waiting import eventually

HERE = "127.0.0.1"


def receiver(**changes: object) -> Announced:
    """One that no other test has announced."""
    one = Announced(PROTOCOL_VERSION, secrets.token_hex(8), "Studio", "any", True, 7791, KEY)
    return msgspec.structs.replace(one, **changes)


class Announcing:
    """A process that announces."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.discovery.announcing"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, announced: Announced, port: int = 7790, ttl: int = 30) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"announced": msgspec.to_builtins(announced), "port": port, "ttl": ttl}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0


@pytest.fixture
def other() -> Iterator[Announcing]:
    announcing = Announcing()
    yield announcing
    announcing.process.kill()
    announcing.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def announce() -> Iterator[Callable[..., Announcer]]:
    started: list[Announcer] = []

    def begin(announced: Announced, port: int, **options: int) -> Announcer:
        started.append(Announcer(announced, port, HERE, **options))
        return started[-1]

    yield begin
    for announcer in started:
        announcer.close()


def of(browser: Browser, *instances: str) -> list[Found]:
    return [one for one in browser.found() if one.announced.instance in instances]


def test_another_process_is_found_changes_and_says_goodbye(
    browser: Browser, other: Announcing
) -> None:
    first = receiver(paired=False)
    other.say(first, 7790)
    assert eventually(lambda: len(of(browser, first.instance)) == 1)
    (found,) = of(browser, first.instance)
    assert (found.announced, found.port) == (first, 7790)
    assert found.addresses == (Way(HERE, "lo", "virtual"),)
    assert 0 <= time.monotonic() - found.seen < 5

    changed = msgspec.structs.replace(first, model="org/Model", paired=True, name="Renamed")
    other.say(changed)
    assert eventually(lambda: [f.announced for f in of(browser, first.instance)] == [changed])

    other.leave()
    assert eventually(lambda: not of(browser, first.instance))


def test_one_that_is_killed_is_forgotten(browser: Browser, other: Announcing) -> None:
    victim = receiver()
    other.say(victim, ttl=1)
    assert eventually(lambda: len(of(browser, victim.instance)) == 1)
    # It is asked whether it is still there, and stays.
    time.sleep(1.5)
    assert of(browser, victim.instance)
    other.process.kill()
    assert eventually(lambda: not of(browser, victim.instance))


def test_several_of_one_name_are_several(
    browser: Browser, announce: Callable[..., Announcer]
) -> None:
    one, another = receiver(), receiver()
    announce(one, 7790)
    announce(one, 7792)  # two on one machine have one identity
    announce(another, 7790)  # two machines of one name
    expected = sorted([(one.instance, 7790), (one.instance, 7792), (another.instance, 7790)])

    def seen() -> list[tuple[str, int]]:
        return sorted((f.announced.instance, f.port) for f in of(browser, one.instance,
                                                                  another.instance))  # fmt: skip

    assert eventually(lambda: seen() == expected)
    time.sleep(1.2)  # records that others would flush live a second longer
    assert seen() == expected


def test_waiting_ends_with_news(announce: Callable[..., Announcer]) -> None:
    announced = receiver()
    with Browser() as browser:
        while browser.wait(0.3):  # others leave
            browser.found()
        announcer = announce(announced, 7790)
        assert browser.wait(5)
        # Until it is looked at, it is news.
        assert browser.wait(0)
        assert of(browser, announced.instance)
        assert not browser.wait(0)
        announcer.close()
        assert eventually(lambda: browser.wait(5) and not of(browser, announced.instance))


def test_a_listener_that_fails_is_called_again(announce: Callable[..., Announcer]) -> None:
    calls = []

    def changed() -> None:
        calls.append(1)
        raise ValueError("a listener's fault")

    with Browser(changed):
        announce(receiver(), 7790)
        assert eventually(lambda: len(calls) == 1)
        announce(receiver(), 7790)
        assert eventually(lambda: len(calls) == 2)


def test_a_restart_is_found_again(browser: Browser) -> None:
    announced = receiver()

    def seen() -> list[Announced]:
        return [found.announced for found in of(browser, announced.instance)]

    for model in ("any", "org/Model"):
        said = [msgspec.structs.replace(announced, model=model)]
        announcer = Announcer(*said, 7790, HERE)
        assert eventually(lambda expected=said: seen() == expected)
        announcer.close()
        announcer.close()
    assert eventually(lambda: not of(browser, announced.instance))


def test_both_commands_list_what_is_there(announce: Callable[..., Announcer]) -> None:
    announced = receiver(name="Studio [bold]", model="org/Model", paired=False)
    announcer = announce(announced, 7790)
    assert eventually(lambda: bool(announcer._heard))
    as_json = CliRunner().invoke(
        mlx_receiver.cli.app,
        # What was said a moment ago is said again after a second only.
        ["discover", "--seconds", "2", "--json", "--model", "org/Other"],
    )
    assert as_json.exit_code == 0
    (listed,) = [
        one
        for one in json.loads(as_json.stdout)["receivers"]
        if one["instance"] == announced.instance
    ]
    assert listed["addresses"] == [{"host": HERE, "interface": "lo", "kind": "virtual"}]
    assert (listed["port"], listed["matches"]) == (7790, False)
    assert "org/Model, not org/Other" in listed["why_not"] and "not paired" in listed["why_not"]
    as_table = CliRunner(env={"COLUMNS": "200"}).invoke(
        vllm_mac_decode.tools.cli.app, ["discover", "--seconds", "2"]
    )
    assert as_table.exit_code == 0
    for word in ("Studio [bold]", "org/Model", f"{HERE}:7790 (lo, virtual)", "not paired"):
        assert word in as_table.stdout
