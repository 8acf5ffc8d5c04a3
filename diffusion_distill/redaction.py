"""Tokens and passwords stay out of what a run writes and prints."""

import os
import re
from typing import Any

HIDDEN = "<hidden>"
_SECRET_VARIABLE = re.compile(r"(^|_)(TOKEN|API_?KEY|SECRET|PASSWORD)($|_)", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+(?=@)")  # Hub tokens; the user's part of an address
_SHORTEST = 8  # shorter values of such variables are words that stand elsewhere too


def redacted(value: Any) -> Any:
    """`value` (text, or lists and mappings of it) without Hub tokens, passwords in addresses and values of variables such as HF_TOKEN."""
    if isinstance(value, str):
        for secret in _of_the_environment():
            value = value.replace(secret, HIDDEN)
        return _SECRET_TEXT.sub(HIDDEN, value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value


def _of_the_environment() -> list[str]:
    """Values of variables named like a secret, the longest first: one may hold another."""
    found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)
