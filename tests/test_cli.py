"""How a command ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt.cli import run_command
from tinygpt.config import InputError

FULL = Path("/dev/full")  # Linux's device that is always full


def fill_the_disk() -> int:
    with FULL.open("a") as file:
        file.write("one more row")
    return 0


def read_what_is_gone() -> int:
    return len(Path("no such folder/file").read_text())


def refuse() -> int:
    raise InputError("block_size is 0; it must be 1 or more")


@pytest.mark.parametrize(
    "main, words",
    [
        pytest.param(
            fill_the_disk,
            "No space left on device",
            marks=pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here"),
        ),
        (read_what_is_gone, "No such file or directory at no such folder/file"),
        (refuse, "block_size is 0"),
    ],
)
def test_a_failure_is_one_sentence(
    main: Callable[[], int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message and message.count("\n") == 1


def test_the_status_is_the_commands() -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: 3)
    assert end.value.code == 3
