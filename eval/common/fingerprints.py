"""Hashes by which results name the model that they belong to."""

import hashlib
from pathlib import Path

from common.image_files import file_sha256


def fingerprint(folder: Path) -> str:
    """SHA-256 over the files that decide what a pipeline folder draws: weights, configurations and code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        record = name == "distillation.json" or (name.startswith("evaluation") and name.endswith(".json"))
        if path.suffix in (".json", ".py", ".safetensors") and not record:
            digest.update(name.encode() + b"\0" + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()
