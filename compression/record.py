"""`compression.json`: what was done to a model, enough to do it again."""

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORD_NAME = "compression.json"
PACKAGES = (
    "prunelle",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "onnx",
    "onnxruntime",
    "tokenizers",
)


def write_record(folder: Path, **entries: Any) -> None:
    """Write `folder/compression.json`, whole or not at all: the entries, and the versions of what computed them.

    Args:
        folder: The output folder; it is made where it does not exist.
        entries: What JSON can hold; other values are written as their text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {**entries, "versions": versions()}
    unfinished = folder / f".unfinished-{RECORD_NAME}"
    unfinished.write_text(as_text(record), encoding="utf-8")
    os.replace(unfinished, folder / RECORD_NAME)


def as_text(record: dict[str, Any]) -> str:
    """What stands in the file."""
    return json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder, or None where there is none."""
    file = folder / RECORD_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def without_folders(value: Any) -> Any:
    """What JSON can hold, with no more of a path from the root than its last part: the rest is this machine's own."""
    if isinstance(value, dict):
        return {name: without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprint(*parts: Any) -> str:
    """A short hash of values that JSON can hold, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
