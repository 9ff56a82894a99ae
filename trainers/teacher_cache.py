"""What a teacher says about every example, asked once and kept as Arrow files.

The folder holds `teacher_cache.json`, which says what the answers depend on, and shards `00000.arrow`, `00001.arrow`, …
which `datasets.Dataset.from_file` opens: one row an example, in each the numbers of every position distilled.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import CONFIG_NAME, cached_file

from prunelle.errors import InputError

RECORD_NAME = "teacher_cache.json"
EXAMPLES_PER_SHARD = 1024

Answers = Mapping[str, Sequence[np.ndarray]]


class TeacherCache:
    """A teacher's answers to numbered examples, in a folder.

    Answers are named tables of numbers, (positions, width), one an example.

    Args:
        folder: made where it does not exist.
        examples: how many there are.
        identity: what the answers depend on, by name, as JSON can hold it.

    Raises:
        InputError: The folder holds answers that depend on something else, or no answers.
    """

    def __init__(self, folder: Path, examples: int, identity: Mapping[str, Any]) -> None:
        self.folder, self.examples = folder, examples
        expected, found = {**identity, "examples": examples}, _read_record(folder)
        if found is None:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise InputError(
                    f"{folder} holds something else than a teacher's answers: give another --teacher_cache"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _publish(folder / RECORD_NAME, lambda file: file.write_text(json.dumps(expected, indent=2) + "\n"))
            except OSError as error:
                raise InputError(f"--teacher_cache {folder} cannot be written to: {error.strerror}") from error
        elif found != expected:
            other = [name for name in expected | found if found.get(name) != expected.get(name)]
            raise InputError(
                f"{folder} holds answers that do not fit this run, other in: {', '.join(other)}; give another "
                "--teacher_cache, or remove it"
            )

    def missing(self) -> list[range]:
        """The examples that are not answered yet, by shard."""
        return _missing(self.folder, self.examples)

    def write(self, examples: range, answers: Answers) -> None:
        """Keep the answers to one of the shards that are missing, all of them or none."""
        columns = {name: _column(rows) for name, rows in answers.items()}
        table = pa.table(columns)

        def write(file: Path) -> None:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)

        _publish(_shard(self.folder, examples.start), write)
        _open.cache_clear()

    def read(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """The answers to the examples, one after the other: (positions, width) each."""
        found: dict[str, list[np.ndarray]] = {}
        for example in examples:
            row = example % EXAMPLES_PER_SHARD
            for name, (starts, values) in _open(_shard(self.folder, example)).items():
                found.setdefault(name, []).append(values[starts[row] : starts[row + 1]])
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


def is_complete_for(folder: Path, teachers: Sequence[str]) -> bool:
    """Whether the folder holds all that these teachers, told by their checkpoints, were ever asked for there."""
    record = _read_record(folder)
    if record is None or _missing(folder, record["examples"]):
        return False
    return record["teacher"] == [checkpoint_fingerprint(teacher) for teacher in teachers]


def checkpoint_fingerprint(name_or_path: str) -> str:
    """A hash of the files of a checkpoint that hold its configuration and its weights."""
    config = Path(cached_file(name_or_path, CONFIG_NAME))
    weights = sorted(config.parent.glob("*.safetensors")) or sorted(config.parent.glob("pytorch_model*.bin"))
    digest = hashlib.sha256()
    for file in [config, *weights]:
        with file.open("rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def data_fingerprint(rows: Dataset) -> str:
    """A hash of the numbers that a model reads: of the data, its tokenizer and how it was prepared in one."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=10_000):
        sink = pa.BufferOutputStream()
        table = batch.combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()[:16]


def _shard(folder: Path, example: int) -> Path:
    return folder / f"{example // EXAMPLES_PER_SHARD:05d}.arrow"


def _missing(folder: Path, examples: int) -> list[range]:
    starts = range(0, examples, EXAMPLES_PER_SHARD)
    shards = [range(start, min(start + EXAMPLES_PER_SHARD, examples)) for start in starts]
    return [shard for shard in shards if not _is_whole(_shard(folder, shard.start), len(shard))]


def _is_whole(file: Path, examples: int) -> bool:
    """Whether a shard can be read, and answers as many examples as it should."""
    try:
        return file.is_file() and all(len(starts) == examples + 1 for starts, _ in _open(file).values())
    except (OSError, pa.ArrowException, AttributeError, IndexError):
        return False  # another file in its place: it is made anew


@lru_cache(maxsize=256)  # each holds a file open
def _open(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name: (examples + 1,) where each example's positions start, and (positions, width); on disk until read."""
    table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    shard = {}
    for name in table.column_names:
        positions = table[name].chunk(0)
        width = positions.type.value_type.list_size
        shard[name] = (positions.offsets.to_numpy(), positions.values.values.to_numpy().reshape(-1, width))
    return shard


def _column(rows: Sequence[np.ndarray]) -> pa.Array:
    values = np.concatenate(rows)
    starts = np.cumsum([0, *map(len, rows)])
    positions = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), positions)


def _publish(file: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not there, and not disturbed by another run that builds the same cache."""
    unfinished = file.with_name(f".unfinished-{os.getpid()}-{file.name}")
    write(unfinished)
    os.replace(unfinished, file)


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD_NAME
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: give another --teacher_cache, or remove the folder") from error
