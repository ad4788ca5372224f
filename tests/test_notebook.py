"""The companion notebook: it runs from top to bottom, and what is committed is such a run."""

# ruff: noqa: E402 (what follows the check for the extra is of the extra)
from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

for module in ("nbclient", "nbformat", "ipykernel", "matplotlib", "tiktoken"):
    pytest.importorskip(module)

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tinygpt import GPT2Tokenizer, InputError

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "lets_build_gpt.ipynb"

SECTIONS = [
    "Setup",
    "The text",
    "65 characters",
    "Characters or subwords?",
    "Training data",
    "One block, eight examples",
    "A batch",
    "The bigram model",
    "Training it",
    "What it learned is a table of counts",
    "The mathematical trick in self-attention",
    "One head of self-attention",
    "Why divide by the square root of the head size?",
    "Without a mask, and across two sequences",
    "Several heads",
    "Feed-forward",
    "LayerNorm, the residual stream, and a block",
    "Dropout",
    "The ladder from bigram to GPT",
    "The GPT of the package",
    "Where the parameters are",
    "Training it, live",
    "Samples on the way",
    "Temperature and top-k",
    "What the heads look at",
    "Writing with a key/value cache",
    "What tinygrad did",
    "How many kernels are in a step?",
    "One of them, in source",
    "The same step on another backend",
    "Exercises",
]


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def cells(kind: str) -> list[Any]:
    return [cell for cell in read().cells if cell.cell_type == kind]


def solutions() -> list[str]:
    """The code of each exercise's solution, "" where it has none."""
    text = "\n".join(cell.source for cell in cells("markdown"))
    hidden = re.findall(r"<details><summary>Solution</summary>\n(.*?)</details>", text, re.S)
    return ["\n\n".join(re.findall(r"```python\n(.*?)```", each, re.S)) for each in hidden]


class ThisPython(AsyncKernelManager):
    """Starts a kernel in the Python that runs the tests, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="this Python", language="python")


@pytest.mark.skipif(
    "TINYGPT_SMOKE" not in os.environ,
    reason="takes minutes: TINYGPT_SMOKE=1 runs it with short training, TINYGPT_SMOKE=0 in full",
)
def test_it_runs_and_so_do_the_solutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new kernel, without network; a number outside of its range is an error there."""
    try:
        GPT2Tokenizer()
    except InputError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TINYGPT_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read()
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions()]  # type: ignore[no-untyped-call]
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert list(tmp_path.iterdir()) == []  # it leaves no files


def test_committed_outputs_are_of_one_run_in_order() -> None:
    code = cells("code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        kinds = [output.output_type for output in cell.outputs]
        assert "error" not in kinds, cell.id
        if "print(" in cell.source.replace("def expect", "") and cell.id != "imports":
            assert kinds, f"{cell.id} has no output"
        if "plt.show()" in cell.source or "live.update" in cell.source:
            pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
            assert pictures, f"{cell.id} has no picture"
        assert "execution" not in cell.metadata, f"{cell.id} holds the times of its execution"


def test_nothing_committed_is_of_one_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/root/|/tmp/|/Users/|site-packages|C:\\\\", text)
    assert len(text) < 1_500_000  # bytes: it has to load quickly and to show on a phone


def test_sections_in_order() -> None:
    source = "\n".join(cell.source for cell in cells("markdown"))
    headings = re.findall(r"^#{2,3} (.*)$", source, re.M)
    positions = [headings.index(section) for section in SECTIONS]
    assert positions == sorted(positions)


def test_exercises_have_hidden_solutions() -> None:
    source = "\n".join(cell.source for cell in cells("markdown"))
    exercises = re.findall(r"^### \d+\. ", source, re.M)
    assert len(exercises) >= 8
    assert len(solutions()) == len(exercises) and all(solutions())
