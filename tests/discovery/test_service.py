"""What a TXT record may say, and what is made of one that a stranger has sent."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_receiver.discovery.announce import label
from mlx_receiver.discovery.service import SERVICE_TYPE, Announced, decode, encode, why_not
from mlx_receiver.wire.messages import PROTOCOL_VERSION
from mlx_receiver.wire.ranges import MAX_INT
from mlx_receiver.wire.seldom import printable

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
MAC = Announced(PROTOCOL_VERSION, "0123456789abcdef", "Studio", "any", True, 7791, KEY)

short = st.text(st.characters(categories=("L", "N", "P", "S"), include_characters=" "), max_size=50)
announcements = st.builds(
    Announced,
    protocol=st.integers(0, MAX_INT),
    instance=st.from_regex(r"\A[0-9a-f]{8,64}\Z"),
    name=short,
    model=short,
    paired=st.booleans(),
    http_port=st.integers(0, 65535),
    key=st.sampled_from(["", KEY]),
)


def record(*pairs: bytes) -> bytes:
    return b"".join(bytes([len(pair)]) + pair for pair in pairs)


def with_(**changes: object) -> Announced:
    return msgspec.structs.replace(MAC, **changes)


@given(announcements)
def test_what_is_announced_is_read(announced: Announced) -> None:
    assert decode(encode(announced)) == announced


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_whatever_a_host_or_a_model_is_called_fits(name: str, model: str) -> None:
    said = encode(with_(name=name, model=model))
    read = decode(said)
    assert read is not None
    assert read.name.isprintable() and read.model.isprintable()
    assert printable(name).startswith(read.name) and printable(model).startswith(read.model)
    assert encode(read) == said


@given(st.binary(max_size=600))
def test_a_strangers_bytes_are_nothing_or_an_announcement(said: bytes) -> None:
    read = decode(said)
    assert read is None or read == msgspec.convert(msgspec.to_builtins(read), Announced)


@given(
    st.dictionaries(
        st.sampled_from(["v", "id", "name", "model", "paired", "http", "key"]),
        st.one_of(
            st.binary(max_size=60),
            st.integers().map(lambda number: str(number).encode()),
            st.sampled_from([b"1", b"0123456789abcdef", KEY.encode(), b"0", b"true"]),
        ),
    )
)
def test_a_strangers_values_are_of_the_announced_types(values: dict[str, bytes]) -> None:
    pairs = [key.encode() + b"=" + value for key, value in values.items()]
    read = decode(record(*(pair for pair in pairs if len(pair) < 256)))
    if read is not None:
        assert read == msgspec.convert(msgspec.to_builtins(read), Announced)
        assert read.name.isprintable() and read.model.isprintable()


@pytest.mark.parametrize(
    "pairs",
    [
        (b"v=2",),
        (b"id=0123456789abcdef",),
        (b"v=two", b"id=0123456789abcdef"),
        (b"v=-1", b"id=0123456789abcdef"),
        (b"v=99999999999999999999999", b"id=0123456789abcdef"),
        (b"v=2", b"id=../../etc/passwd"),
        (b"v=2", b"id=0123456789abcdef\n"),
        (b"v=2", b"id=0123456789abcdef", b"name=a\x1b[31mb"),
        (b"v=2", b"id=0123456789abcdef", "name=a\u202eb".encode()),
        (b"v=2", b"id=0123456789abcdef", b"name=\xff"),
        (b"v=2", b"id=0123456789abcdef", b"model=a\nb"),
        (b"v=2", b"id=0123456789abcdef", b"http=65536"),
        (b"v=2", b"id=0123456789abcdef", b"paired=perhaps"),
        (b"v=2", b"id=0123456789abcdef", b"key=short"),
    ],
)
def test_what_is_malformed_is_nothing(pairs: tuple[bytes, ...]) -> None:
    assert decode(record(*pairs)) is None


def test_a_record_that_is_too_long_is_not_read() -> None:
    assert decode(encode(MAC) + 20 * record(b"x=" + 250 * b"y")) is None


def test_unknown_keys_and_later_values_of_a_key_do_not_count() -> None:
    said = record(b"", b"=", b"colour=blue", b"flag") + encode(MAC) + record(b"v=9", b"NAME=other")
    assert decode(said) == MAC


def test_a_later_protocol_is_read() -> None:
    said = record(b"v=99", b"id=0123456789abcdef", b"shape=round")
    assert decode(said) == Announced(99, "0123456789abcdef", "0123456789abcdef")


def test_what_matches_has_nothing_against_it() -> None:
    assert why_not(MAC, "some/model", PROTOCOL_VERSION) == ""
    assert why_not(with_(model="org/Model"), "", PROTOCOL_VERSION) == ""
    assert why_not(with_(model="org/Model"), "/models/model/", PROTOCOL_VERSION) == ""


def test_what_does_not_match_is_said() -> None:
    later = why_not(with_(protocol=PROTOCOL_VERSION + 1), "", PROTOCOL_VERSION)
    assert "update vllm-mac-decode here" in later
    earlier = why_not(with_(protocol=PROTOCOL_VERSION - 1), "", PROTOCOL_VERSION)
    assert "update vllm-mac-decode on its machine" in earlier
    other = why_not(with_(model="org/a"), "org/b", PROTOCOL_VERSION)
    assert other == "it serves org/a, not org/b"
    unpaired = why_not(with_(paired=False, model="org/a"), "org/b", PROTOCOL_VERSION)
    assert "org/a" in unpaired and "mlx-receiver pair" in unpaired


@given(st.text(max_size=200), st.integers(0, 65535))
def test_a_label_is_one_dns_label(name: str, port: int) -> None:
    made = label(with_(name=name), port, "enp1s0f0np0.100")
    assert len(made.encode()) <= 63 and "." not in made
    assert made.endswith(f" 01234567 {port} enp1s0f0np0-100")


def test_the_service_type_is_one_of_rfc_6763() -> None:
    service, transport, domain, end = SERVICE_TYPE.split(".")
    assert len(service) <= 16 and (transport, domain, end) == ("_tcp", "local", "")


def test_discovery_imports_no_engine_and_zeroconf_late() -> None:
    script = (
        "import sys, mlx_receiver.discovery.announce, mlx_receiver.discovery.listing;"
        "bad = {'mlx', 'mlx_lm', 'torch', 'vllm', 'vllm_mac_decode', 'zeroconf', 'ifaddr'};"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_who_is_paired_with_others_is_not_paired_with_this_machine() -> None:
    key = "k" * 40
    one = with_(key=key)
    assert why_not(one, "", PROTOCOL_VERSION, {key}) == ""
    assert "not paired with this machine" in why_not(one, "", PROTOCOL_VERSION, set())
    # Without a key it has a token, which only an attempt can compare.
    assert why_not(with_(key=""), "", PROTOCOL_VERSION, set()) == ""
