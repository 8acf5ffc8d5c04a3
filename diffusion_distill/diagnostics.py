"""Says in words when the logged scalars of a score-distillation run look unhealthy. Scalars that a method does not log are not judged.

Every rule compares medians over `window` logged lines, for single lines are noisy, and every threshold stands between healthy runs and
provoked failures (docs/papers.md, "Diagnostics").
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

COLLAPSED_SPREAD = 0.5  # of the teacher's own predictions: healthy students settle above 1, collapsed ones below 0.2
LOST_SPREAD = 0.5  # of the largest spread so far
WIDE_SPREAD = 3.0  # of the teacher's own predictions; healthy below 1.6
LARGE_GAP = 1.5  # the difference of the scores as large as the teacher's prediction itself, and half as much again
GROWN_GAP, RELEVANT_GAP = 4.0, 0.3
MEAN_DRIFT = 0.5  # in units of the spread; healthy below 0.2
POOR_RELIABILITY = 0.25
RISEN_CRITIC = 2.0
EXPLODED_GRADIENT, VANISHED_GRADIENT = 20.0, 1e-3  # of the run's own median so far


@dataclass
class Watch:
    """`observe` each logged line; it returns a warning when a cause appears, and again only after it was gone for a window."""

    window: int = 10
    _recent: dict[str, deque[float]] = field(default_factory=dict, repr=False)
    _medians: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list), repr=False)  # of consecutive windows
    _lines: dict[str, int] = field(default_factory=lambda: defaultdict(int), repr=False)
    _absent: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)  # lines since a cause that was reported held

    def observe(self, step: int, values: dict[str, float]) -> list[str]:
        """Warnings after the line of `step`, whose `values` are named ROLE/scalar as in metrics.jsonl."""
        for name, value in values.items():
            recent = self._recent.setdefault(name, deque(maxlen=self.window))
            recent.append(value)
            self._lines[name] += 1
            if self._lines[name] % self.window == 0:
                self._medians[name].append(median(recent))
        roles = sorted({name.split("/")[0] for name in values if "/" in name})
        found = {(role, cause): text for role in roles for cause, text in self._judge(role)}
        fresh = [f"step {step}: {role}: {text}" for (role, cause), text in found.items() if (role, cause) not in self._absent]
        for key in {*self._absent, *found}:
            self._absent[key] = 0 if key in found else self._absent[key] + 1
            if self._absent[key] > self.window:
                del self._absent[key]
        return fresh

    def _judge(self, role: str) -> Iterator[tuple[str, str]]:
        yield from self._spread(role)
        yield from self._gap(role)
        yield from self._critic(role)
        yield from self._gradient(role)

    def _spread(self, role: str) -> Iterator[tuple[str, str]]:
        spread, real, mean = (self._now(f"{role}/{name}") for name in ("sample_spread", "real_spread", "sample_mean"))
        if spread is None or real is None:
            return
        if spread > WIDE_SPREAD * real:
            seen = f"the samples' spread is {spread:.3g}, the teacher's predictions' {real:.3g}"
            yield "blow-up", f"{seen}: lower the student's learning rate."
        past = self._medians[f"{role}/sample_spread"]
        if (len(past) > 2 and spread < COLLAPSED_SPREAD * real and spread < 1.1 * past[-2]) or spread < LOST_SPREAD * max(past):
            yield (
                "collapse",
                f"the samples' spread is {spread:.3g} (largest so far {max(past):.3g}, teacher's predictions {real:.3g}) and does not "
                "grow: the student is collapsing. Likely the fake score does not follow it, or guidance is high: train the fake score more "
                "often or faster, lower the student's learning rate or the guidance scale.",
            )
        first = self._medians[f"{role}/sample_mean"]
        if mean is not None and first and abs(mean - first[0]) > MEAN_DRIFT * max(spread, real):
            yield (
                "drift",
                f"the samples' mean moved from {first[0]:.3g} to {mean:.3g}, by more than {MEAN_DRIFT:g} of their spread. Likely the "
                "student is faster than the fake score, or guidance saturates it: lower the student's learning rate or the guidance scale.",
            )

    def _gap(self, role: str) -> Iterator[tuple[str, str]]:
        gap, past = self._now(f"{role}/gap"), self._medians[f"{role}/gap"][1:]  # the first one starts from equal networks
        if gap is not None and past and (gap > LARGE_GAP or gap > max(GROWN_GAP * min(past), RELEVANT_GAP)):
            yield (
                "divergence",
                f"teacher and fake score are {gap:.3g} of the teacher's prediction apart (smallest so far {min(past):.3g}): the run is "
                "diverging. Lower both learning rates; an epsilon network near zero signal needs a smaller first timestep.",
            )

    def _critic(self, role: str) -> Iterator[tuple[str, str]]:
        reliability, past = self._now(f"{role}/reliability"), self._medians[f"{role}/reliability"]
        if reliability is None or len(past) < 2:
            return
        now = (reliability + past[-1]) / 2
        losses = [name for name in self._recent if name.endswith("/denoising") and self._medians[name]]
        risen = any((self._now(name) or 0) > RISEN_CRITIC * min(self._medians[name]) for name in losses)
        if now < 0 or (now < POOR_RELIABILITY and risen):
            yield (
                "critic",
                f"of the direction that the student follows, {now:.2g} is true (1: all of it; 0: it is noise)"
                f"{', and the fake score loss has risen' if risen else ''}: the fake score lags behind the student. Train it more often or "
                "faster, give it more capacity, or lower the student's learning rate.",
            )

    def _gradient(self, role: str) -> Iterator[tuple[str, str]]:
        norm, past = self._now(f"{role}/grad_norm"), self._medians[f"{role}/grad_norm"]
        if norm is None or len(past) < 3:
            return
        usual = median(past)
        if norm > EXPLODED_GRADIENT * usual:
            yield "exploded", f"the gradient norm is {norm:.3g}, usually {usual:.3g}. Lower the learning rate or `max_grad_norm`."
        elif norm < VANISHED_GRADIENT * usual or norm == 0:
            yield "vanished", f"the gradient norm is {norm:.3g}, usually {usual:.3g}: nothing is learned any more."

    def _now(self, name: str) -> float | None:
        """Median over the last window, once there is a whole one."""
        recent = self._recent.get(name, ())
        return median(recent) if len(recent) == self.window else None
