"""What a run must remember about where it came from."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("diffusion-distill", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def provenance() -> dict[str, Any]:
    """Commit of this package's checkout (None outside one), package and Python versions."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"commit": _commit(), "python": platform.python_version(), "packages": versions}


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def write_json(path: Path, value: Any) -> None:
    """Write the file whole or not at all."""
    hidden = path.with_name(f".writing-{path.name}")
    hidden.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")
    hidden.replace(path)
