"""The suite runs on the device that DEV names, without network."""

import os

import pytest
from hypothesis import HealthCheck, settings

# A machine that is busy with something else makes no test fail.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
os.environ["TINYGPT_OFFLINE"] = "1"
os.environ.setdefault("PARALLEL", "0")  # processes that compile take longer to start than to work


def pytest_configure() -> None:
    try:
        from tinygpt.device import select_device

        select_device(None)
    except ValueError as error:  # tinygpt's InputError: DEV is not a device of this machine
        raise pytest.UsageError(str(error)) from None
