"""Stored pairs that were drawn otherwise than a training expects: said in one line each, and not refused."""

from collections.abc import Mapping
from typing import Any

FEWEST_CALLS = 10  # of a first-order sampler; below, its own error is most of what the student learns


def pair_warnings(settings: Mapping[str, Any], expected: Mapping[str, float], student_steps: int) -> list[str]:
    """What a user should know before training on pairs of these `settings`, those of `pairs.json`.

    Args:
        expected: settings that the method would have drawn them with.
        student_steps: the largest number of network calls that the student serves.
    """
    found = [
        f"pairs_dir: {name} of the pairs is {settings[name]:g}, the method's {value:g}: its two losses pull to different samples"
        for name, value in expected.items()
        if settings[name] != value
    ]
    calls, least = len(settings["timesteps"]), max(FEWEST_CALLS, 2 * student_steps)
    if calls < least:
        found.append(
            f"pairs_dir: the pairs were drawn in {calls} network calls; fewer than {least} leave a student of up to {student_steps} "
            "their error to learn"
        )
    return found
