"""How every script of this folder takes its arguments and reports what the user can fix."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Literal, TypeVar

import tyro

Config = TypeVar("Config")


class InputError(ValueError):
    """A wrong value from outside (flag, file, folder, pipeline). The message names the field, the value and what is accepted."""


def reject(field: str, value: object, accepted: str) -> InputError:
    """Return (not raise) the error for `field` having received `value` where `accepted` is what would do."""
    return InputError(f"{field}: got {value!r}; {accepted}")


def run(config: type[Config], main: Callable[[Config], object], processes: Literal["one", "many"] = "one") -> None:
    """Parse the command line into `config` and call `main`; an `InputError` becomes one line and exit code 2.

    A script of one process refuses to be started as several.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if processes == "one" and started != 1:
            raise reject("num_processes", started, "this script runs in one process")
        main(tyro.cli(config, use_underscores=True))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
