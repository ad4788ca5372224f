"""The closing lines of a run: the device, and the largest errors met, for a table of backends."""

from __future__ import annotations

import pytest

from tinygpt.device import device_name

from .compare import ROUNDINGS, UNIT_ROUNDOFF, largest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not largest:
        return
    passed = sum("parity" in report.nodeid for report in terminalreporter.getreports("passed"))
    model = ("logits", "gradient", "after 20 steps")
    figures = "".join(f", {kind} {largest[kind]:.1e}" for kind in model if kind in largest)
    terminalreporter.section(f"parity on {device_name()}: {passed} passed{figures}")
    for kind, error in sorted(largest.items()):
        bound = ROUNDINGS[kind] * UNIT_ROUNDOFF["float32"]
        terminalreporter.write_line(f"{kind:24} relative error {error:.1e}, bound {bound:.1e}")
