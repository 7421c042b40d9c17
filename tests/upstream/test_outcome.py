"""The gate's own logic; vLLM's tests run with `make upstream`."""

import io
import tarfile

import pytest

from tests.upstream.outcome import Outcome, Result, differences, page, replaced, unneeded
from tests.upstream.selection import Expected, File, Selection, read_expected, read_selection
from tests.upstream.source import MODEL_NAME, adapt, unpack

PASSED, FAILED = Outcome("passed", 1.0), Outcome("failed", 1.0, "assert 1 == 2")
SELECTION = Selection(
    groups={},
    files=[
        File("a.py", "tiny", left_out={"test_lora": "LoRA"}),
        File("b.py", "tiny", not_offered={"receiver": "no /b"}),
    ],
    left_out={},
)
OUTCOMES = {
    "plain": {
        "a.py::test_both": PASSED,
        "a.py::test_one[x]": PASSED,
        "a.py::test_lost": PASSED,
        "a.py::test_skip": PASSED,
        "a.py::test_model": FAILED,
        "b.py::test_b": PASSED,
    },
    "connector": {
        "a.py::test_both": PASSED,
        "a.py::test_one[x]": PASSED,
        "a.py::test_lost": PASSED,
        "a.py::test_skip": PASSED,
        "a.py::test_model": FAILED,
        "b.py::test_b": FAILED,
    },
    "receiver": {
        "a.py::test_both": PASSED,
        "a.py::test_one[x]": FAILED,
        "a.py::test_skip": Outcome("skipped", 0.1, "no"),
        "a.py::test_model": FAILED,
    },
}


def test_differences_are_what_plain_vllm_passes_and_another_does_not() -> None:
    """Failed, skipped and missing tests differ; what vLLM fails, or nobody offers, does not."""
    found = list(differences(OUTCOMES, SELECTION, []))
    assert [(each.target, each.test) for each in found] == [
        ("connector", "b.py::test_b"),
        ("receiver", "a.py::test_one[x]"),
        ("receiver", "a.py::test_lost"),
        ("receiver", "a.py::test_skip"),
    ]
    assert not any(each.reason for each in found)


def test_an_expected_difference_has_its_reason_on_its_target_only() -> None:
    """Entries name the beginning of an id, and one that nothing needs any more is reported."""
    one = Expected("receiver", ["a.py::test_one"], "because")
    other = Expected("connector", ["a.py::test_one"], "not this target")
    found = list(differences(OUTCOMES, SELECTION, [one, other]))
    assert {each.test: each.reason for each in found if each.reason} == {
        "a.py::test_one[x]": "because"
    }
    assert unneeded(found, [one, other]) == [other]


def test_the_page_counts_and_names_differences() -> None:
    """Its table has a row for each file, and what nobody expected stands out."""
    expected = [Expected("receiver", ["a.py::test_one"], "because")]
    text = page(Result("0.0", "2026-01-01", 1.0, "a machine", {}, OUTCOMES), SELECTION, expected)
    assert "| a.py | 4 / 1 / 0 | 4 / 1 / 0 | 1 / 2 / 1 |" in text
    assert "| b.py | 1 / 0 / 0 | 0 / 1 / 0 | not offered |" in text
    assert "**vLLM with the connector, not expected**: `b.py::test_b`: `assert 1 == 2`" in text
    assert "- the receiver: `a.py::test_one` (1): because" in text
    assert "- `a.py::test_lora`: LoRA" in text


def test_a_part_replaces_its_files() -> None:
    """Outcomes of files that ran again are new, those of tests that no longer run are gone."""
    old = {target: {**tests, "a.py::test_lora[1]": FAILED} for target, tests in OUTCOMES.items()}
    old["plain"]["gone.py::test_x"] = PASSED
    part = {
        "plain": {"b.py::test_c": PASSED},
        "connector": {"b.py::test_c": PASSED},
        "receiver": {},
    }
    whole = Result("0.0", "2026-01-01", 20.0, "a machine", {}, old)
    run = Result("0.0", "2026-01-02", 1.0, "a machine", {}, part)
    result = replaced(whole, run, SELECTION)
    assert set(result.outcomes["plain"]) == {*OUTCOMES["plain"], "b.py::test_c"} - {"b.py::test_b"}
    assert result.outcomes["receiver"] == OUTCOMES["receiver"]
    assert (result.date, result.minutes) == ("2026-01-02", 20.0)
    run.vllm = "0.1"
    with pytest.raises(ValueError, match="run all"):
        replaced(whole, run, SELECTION)


def test_the_lists_are_valid() -> None:
    """Both files decode, and each group that a file names exists."""
    selection = read_selection()
    assert {file.group for file in selection.files} == set(selection.groups)
    assert len({file.path for file in selection.files}) == len(selection.files)
    assert all(entry.reason for entry in read_expected())


@pytest.mark.parametrize(
    "text", ['NAME = "Qwen/Qwen3-0.6B-LoRA"', 'print("see Qwen/Qwen3-0.6B")', "assert a == 'b'"]
)
def test_nothing_but_models_names_is_edited(text: str) -> None:
    """A whole string that names a model is replaced, whatever else stays."""
    assert adapt(text) == text
    assert adapt(f'M = "Qwen/Qwen3-0.6B"\n{text}') == f'M = "{MODEL_NAME}"\n{text}'


def test_unpacking_leaves_vllm_itself_out(tmp_path) -> None:
    """vLLM's sources beside its tests would hide the installed package."""
    archive = tmp_path / "vllm-0.0.tar.gz"
    with tarfile.open(archive, "w:gz") as bundle:
        for name in ("vllm/__init__.py", "tests/test_a.py", "pyproject.toml", "setup.py"):
            entry = tarfile.TarInfo(f"vllm-0.0/{name}")
            content = b'M = "facebook/opt-125m"\n'
            entry.size = len(content)
            bundle.addfile(entry, io.BytesIO(content))
    unpack(archive, tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert files == {"tests/test_a.py", "pyproject.toml"}
    assert (tmp_path / "out/tests/test_a.py").read_text() == f'M = "{MODEL_NAME}"\n'
