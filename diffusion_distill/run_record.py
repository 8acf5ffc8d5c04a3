"""What a run tells about itself: run.json, metrics.jsonl, warnings on stderr, trackers."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from .diagnostics import Watch
from .errors import reject
from .provenance import write_json
from .train_config import TrainConfig


def claim(folder: Path, resume_from_checkpoint: str | None) -> bool:
    """Whether a run has written to `folder` before. InputError: it has, and is not to be continued."""
    begun = (folder / "run.json").exists()
    if begun and not resume_from_checkpoint:
        wanted = "it already holds a run; choose another folder, or continue that run with --resume_from_checkpoint latest"
        raise reject("output_dir", str(folder), wanted)
    return begun


class RunRecord:
    """Written by the main process alone; every file is whole at every moment, or ends in a line that is cut and then dropped."""

    def __init__(self, folder: Path, accelerator: Accelerator, config: TrainConfig):
        self.folder, self.accelerator, self.config = folder, accelerator, config
        self.watch = Watch()

    def start(self, run: Mapping[str, Any], step: int) -> None:
        """Write run.json, and take up metrics.jsonl at `step`: lines after it, and one that a kill cut, are dropped."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", run)
            kept = self._kept(step)
            _replace(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
            for line in kept:  # the watch resumes too
                self.watch.observe(line["step"], {name: value for name, value in line.items() if "/" in name})
        if self.config.report_to:
            settings = {key: str(value) for key, value in run["settings"].items()}
            self.accelerator.init_trackers(self.config.tracker_project_name, settings)

    def add(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and what the watch has to say about it."""
        if self.accelerator.is_main_process:
            found = self.watch.observe(step, values)
            for warning in found:
                tqdm.write(f"warning: {warning}", file=sys.stderr)
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values | ({"warnings": found} if found else {})) + "\n")
        if self.config.report_to:
            self.accelerator.log(values, step=step)

    def finish(self) -> None:
        if self.config.report_to:
            self.accelerator.end_training()

    def _kept(self, step: int) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = filter(None, map(_parsed, text.splitlines()))
        return [line for line in lines if line["step"] <= step]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:  # cut by a kill or a full disk
        return None
    return value if isinstance(value, dict) and "step" in value else None


def _replace(path: Path, text: str) -> None:
    hidden = path.with_name(f".writing-{path.name}")
    hidden.write_text(text)
    hidden.replace(path)
