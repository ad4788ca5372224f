"""The suite runs on the device that DEV names, without network."""

import os

import pytest

os.environ["TINYGPT_OFFLINE"] = "1"

try:
    import tinygpt  # noqa: F401  (chooses compiler and device before any test asks for one)
    from tinygpt.device import select_device

    select_device(None)
except ValueError as error:  # tinygpt's InputError: DEV is not a device of this machine
    pytest.exit(f"error: {error}", returncode=1)
