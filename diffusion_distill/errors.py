"""The one exception that means "the user can fix this": shown as a single line, exit code 2."""


class InputError(ValueError):
    """A wrong value from outside (flag, file, folder, pipeline). The message names the field, the value and what is accepted."""


def reject(field: str, value: object, accepted: str) -> InputError:
    """Return (not raise) the error for `field` having received `value` where `accepted` is what would do."""
    return InputError(f"{field}: got {value!r}; {accepted}")
