"""Raw data sets: files, the hub, or what is built in, as named splits."""

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets

from prunelle.errors import InputError
from prunelle.tasks.arguments import BUILTIN_PREFIX, DataArguments
from prunelle.tasks.docstrings import load_docstrings, load_function_names, load_parameters

logger = logging.getLogger(__name__)

BUILTIN: dict[str, Callable[[], datasets.DatasetDict]] = {
    "docstrings": load_docstrings,
    "function-names": load_function_names,
    "parameters": load_parameters,
}

# keep_default_na: pandas would read the texts "null", "NA" and "None" as missing.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}

STREAMED_EVALUATION_SAMPLES = 1000


def load_splits(arguments: DataArguments, seed: int) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The splits `train`, `validation` and, where they are given, `test` and `unlabeled`, as they are in the source.

    Without validation data a share of the training data is held out, the same for the same seed. Only `train`
    can be a stream.

    Raises:
        InputError: A file or data set that does not exist, cannot be read or is empty; an unknown file type.
    """
    if arguments.dataset_name is None:
        files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
        splits = {split: read_file(Path(file)) for split, file in files.items() if file is not None}
    elif arguments.dataset_name.startswith(BUILTIN_PREFIX):
        name = arguments.dataset_name.removeprefix(BUILTIN_PREFIX)
        if name not in BUILTIN:
            known = ", ".join(BUILTIN_PREFIX + builtin for builtin in BUILTIN)
            raise InputError(f"no built-in data set {name!r}; there is {known}")
        splits = dict(BUILTIN[name]())
    else:
        splits = _from_hub(arguments)

    if "validation" not in splits:
        splits = _hold_out(splits, arguments, seed)
    for split, limit in {
        "train": arguments.max_train_samples,
        "validation": arguments.max_eval_samples,
        "test": arguments.max_eval_samples,
    }.items():
        if split in splits and limit is not None:
            splits[split] = splits[split].take(limit)
    if (unlabeled := getattr(arguments, "unlabeled_file", None)) is not None:
        splits["unlabeled"] = read_file(Path(unlabeled))
    for split, rows in splits.items():
        if isinstance(rows, datasets.Dataset) and len(rows) == 0:
            raise InputError(f"{where(arguments, split)} is empty")
    return splits


def read_file(path: Path) -> datasets.Dataset:
    """One file as a data set; its type is told by its ending."""
    if not path.is_file():
        raise InputError(f"no file {path}")
    if path.suffix not in READERS:
        raise InputError(f"{path}: cannot read {path.suffix or 'files without ending'}; give {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    builder, options = READERS[path.suffix]
    try:
        return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        if "corresponds to no data" in str(error):  # a header alone
            raise InputError(f"{path} is empty") from error
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{path} cannot be read as {builder}: {cause}") from error


def find_column(
    rows: datasets.Dataset | datasets.IterableDataset,
    given: str | None,
    usual_names: tuple[str, ...],
    flag: str,
    place: str,
) -> str:
    """The column that was given, else the first with a usual name.

    Raises:
        InputError: There is no such column; the line names the columns that there are.
    """
    columns = rows.column_names or list(next(iter(rows)))
    if given is not None:
        if given in columns:
            return given
        near = difflib.get_close_matches(given, columns, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise InputError(f"no column {given!r} in {place}{hint} (it has: {', '.join(columns)})")
    by_lower_case = {column.lower(): column for column in reversed(columns)}
    for name in usual_names:
        if name in by_lower_case:
            return by_lower_case[name]
    names = " or ".join(usual_names)
    raise InputError(f"no column named {names} in {place}: give --{flag} (it has: {', '.join(columns)})")


def check_texts(texts: Iterable[Any], column: str, place: str) -> None:
    """See that each of a column's values is a text.

    Raises:
        InputError: One is not; the line names the first.
    """
    for number, value in enumerate(texts, start=1):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{place}, example {number}: column {column!r} holds no text but {value!r}")


def where(arguments: DataArguments, split: str) -> str:
    """How a message names a split: by its file where there is one."""
    file = getattr(arguments, f"{split}_file")
    return str(file) if file is not None else f"the {split} split of {arguments.dataset_name or arguments.train_file}"


def fingerprint(splits: dict[str, Any], arguments: DataArguments, unlabeled: bool = True) -> str:
    """A hash of the data's content (of its name, for a stream) and of how it is prepared.

    Args:
        unlabeled: whether the split of that name counts. A model trained on labels alone does not depend on it.
    """
    digest = hashlib.sha256()
    for split, rows in splits.items():
        if split == "unlabeled" and not unlabeled:
            continue
        digest.update(split.encode())
        if isinstance(rows, datasets.IterableDataset):
            digest.update(f"{arguments.dataset_name} {arguments.dataset_config_name}".encode())
            continue
        for batch in rows.iter(batch_size=10_000):
            digest.update(json.dumps(batch, default=str).encode())
    prepared = (arguments.task, arguments.max_seq_length, arguments.mlm_probability, arguments.mask_frequency_exponent)
    digest.update(repr(prepared).encode())
    if arguments.static_masking:
        digest.update(b"static_masking")
    if arguments.problem_type != "single_label_classification":
        digest.update(arguments.problem_type.encode())
    if arguments.task == "question-answering":
        digest.update(repr(arguments.doc_stride).encode())
    if arguments.task == "sequence-to-sequence":
        digest.update(repr((arguments.max_target_length, arguments.source_prefix)).encode())
    return digest.hexdigest()[:16]


def _from_hub(arguments: DataArguments) -> dict[str, Any]:
    name = arguments.dataset_name
    try:
        loaded = datasets.load_dataset(name, arguments.dataset_config_name, streaming=arguments.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data set {name} cannot be loaded: {' '.join(str(error).split())}") from error
    splits = {split: loaded[split] for split in ("train", "validation", "test") if split in loaded}
    if "train" not in splits:
        raise InputError(f"data set {name} has no train split; it has: {', '.join(loaded)}")
    if arguments.streaming:
        limit = arguments.max_eval_samples or STREAMED_EVALUATION_SAMPLES
        for split in set(splits) - {"train"}:
            splits[split] = _materialize(splits[split].take(limit))
    return splits


def _hold_out(splits: dict[str, Any], arguments: DataArguments, seed: int) -> dict[str, Any]:
    train = splits["train"]
    if arguments.streaming:
        count = arguments.max_eval_samples or STREAMED_EVALUATION_SAMPLES
        held_out, rest = _materialize(train.take(count)), train.skip(count)
        logger.info("no validation split: the first %d examples of the stream are held out", count)
    else:
        if len(train) < 2:
            raise InputError(f"{where(arguments, 'train')} has one example: too few to hold out validation data")
        parts = train.train_test_split(test_size=arguments.validation_split_percentage / 100, seed=seed)
        held_out, rest = parts["test"], parts["train"]
        logger.info("no validation data: %d of %d training examples are held out", len(held_out), len(train))
    return {**splits, "train": rest, "validation": held_out}


def _materialize(stream: datasets.IterableDataset) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(stream))
