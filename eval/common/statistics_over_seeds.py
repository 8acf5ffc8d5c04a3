"""Mean and spread of a number over seeds, in the form that evaluation files hold."""

import statistics
from typing import Any


def summary(per_seed: dict[str, float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single seed) and the values, for at least one seed."""
    values = list(per_seed.values())
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "per_seed": per_seed}
