"""The watch is silent on what healthy runs log, and names each cause once."""

import json
from pathlib import Path

import pytest
from test_trainer import trainer

from diffusion_distill.diagnostics import Watch

HEALTHY = {
    "student/gap": 0.08,
    "student/sample_mean": -0.39,
    "student/sample_spread": 0.5,
    "student/real_spread": 0.4,
    "student/reliability": 0.6,
    "student/grad_norm": 0.3,
    "fake_score/denoising": 0.25,
    "fake_score/grad_norm": 0.3,
}
SICK = {
    "is collapsing": {"student/sample_spread": 0.05},
    "mean moved": {"student/sample_mean": 0.3},
    "diverging": {"student/gap": 2.0},
    "lags behind": {"student/reliability": -0.2},
    "spread is 1.3, the teacher": {"student/sample_spread": 2.0},
    "gradient norm is 15.2, usually 0.3": {"student/grad_norm": 30.0},
    "nothing is learned any more": {"fake_score/grad_norm": 0.0},
}


def lines(count: int, start: int = 0, **changes: float) -> list[tuple[int, dict[str, float]]]:
    """Logged lines that vary by a fifth, as those of a run do."""
    return [(i, {k: v * (1 + 0.2 * (-1) ** i) for k, v in (HEALTHY | changes).items()}) for i in range(start, start + count)]


def test_a_healthy_run_is_left_in_peace() -> None:
    watch = Watch()
    assert not [w for step, values in lines(200) for w in watch.observe(step, values)]


@pytest.mark.parametrize("message", SICK)
def test_each_cause_is_named_once_until_it_recovers(message: str) -> None:
    watch, constant, found = Watch(), SICK[message], []
    for begin, values in ((0, {}), (60, constant), (140, {}), (220, constant)):
        for step, line in lines(60 if begin == 0 else 80, begin):
            found += watch.observe(step, line | values)
    named = [warning for warning in found if message in warning]
    assert len(named) in (1, 2), named  # the second time, a median of the first sick spell may have become usual
    role = next(iter(constant)).split("/")[0]
    assert int(named[0].split()[1].rstrip(":")) in range(60, 100) and f": {role}: " in named[0]


def test_a_lagging_fake_score_is_seen_in_its_risen_loss_too() -> None:
    watch, found = Watch(), []
    for step, line in [*lines(60), *lines(60, 60, **{"student/reliability": 0.1, "fake_score/denoising": 0.9})]:
        found += watch.observe(step, line)
    assert len(found) == 1 and "the fake score loss has risen" in found[0]


def test_methods_without_these_scalars_are_not_judged() -> None:
    watch = Watch()
    assert not [w for i in range(100) for w in watch.observe(i, {"student/loss": float(i), "lr/student": 1e-4, "steps_per_second": 1.0})]


def test_the_trainer_prints_and_records_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, max_train_steps=2, logging_steps=1, checkpointing_steps=0)
    run.watch.observe = lambda step, values: [f"step {step}: student: trouble"]  # type: ignore[method-assign]
    run.train()
    recorded = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["warnings"] for line in recorded] == [["step 1: student: trouble"], ["step 2: student: trouble"]]
    assert "warning: step 2: student: trouble" in capsys.readouterr().err
