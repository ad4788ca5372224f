"""What the commands have in common: flags made from the config's fields, and how errors end."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tinygpt.config import InputError


def add_flags(parser: argparse.ArgumentParser, title: str, config: type, *skip: str) -> None:
    """Adds a flag per field of the dataclass `config`, in kebab case; unset flags stay absent."""
    group = parser.add_argument_group(title)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        kind = hints[field.name]
        if get_origin(kind) in (Union, types.UnionType):  # int | None
            kind = next(k for k in get_args(kind) if k is not type(None))
        options: dict[str, Any] = {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            help=field.metadata["help"],
            default=argparse.SUPPRESS,
            **options,
        )


def run_command(main: Callable[[], int]) -> None:
    """Runs a command and exits with its status; what goes wrong is said in one sentence."""
    try:
        status = main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:  # a full disk, a folder that is gone
        place = f" at {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}; what was saved before is as it was",
              file=sys.stderr)  # fmt: skip
        status = 1
    sys.exit(status)
