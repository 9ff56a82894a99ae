"""The data that an export is calibrated on and compared on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from prunelle.errors import InputError
from prunelle.export.arguments import ExportArguments, ExportDataArguments
from prunelle.export.calibration import calibration_batches
from prunelle.export.checkpoint import Checkpoint
from prunelle.export.evaluation import Reader
from prunelle.export.inference import maximum_length
from prunelle.export.runner import Batch
from prunelle.tasks import TASKS, ReadsLogits, Task, TextTask, problem_type
from prunelle.tasks.loading import read_file
from prunelle.tasks.text_classification import text_columns


def task_of(checkpoint: Checkpoint, data: ExportDataArguments, seed: int) -> Task | None:
    """The task that the model's head is for, with the data given; None where none is given.

    Raises:
        InputError: the data cannot be read, or the model is not one for it.
    """
    if data.task not in (None, checkpoint.task):
        raise InputError(
            f"--task {data.task} is not what {checkpoint.name} is for, a {type(checkpoint.model).__name__}"
        )
    if not data.is_given:
        return None
    _check_length(checkpoint, data)
    # The checkpoint's word is a plain str; TASKS and the problem types are looked up by it.
    data.task = checkpoint.task  # type: ignore[assignment]
    if checkpoint.task == "text-classification" and (problem := problem_type(checkpoint.model)) is not None:
        data.problem_type = problem  # type: ignore[assignment]
    task = TASKS[checkpoint.task](data, seed)
    task.adopt(checkpoint.model.config, checkpoint.name)
    return task


def reader_of(task: Task, encoded: dict[str, Any], split: str = "test") -> Reader | None:
    """How predictions are read from a split's logits, where they are no classes; of the validation data where there is
    no such split."""
    if not isinstance(task, ReadsLogits):
        return None
    split = split if split in encoded else "validation"
    return Reader(task.choices, lambda logits: task.read(logits, encoded[split], split))


def calibration_of(
    checkpoint: Checkpoint, task: Task | None, arguments: ExportArguments, data: ExportDataArguments
) -> Sequence[Batch]:
    """What `quantize_static` calibrates on: a sample of the calibration file's texts, or of the training data's.

    Nothing where it is not to be called.

    Raises:
        InputError: there is neither; data to evaluate on is not taken, since it would praise the result.
    """
    texts: Iterable[str | tuple[str, ...]]
    if "int8-static" not in arguments.variants:
        return ()
    if arguments.calibration_file is not None:
        rows = read_file(Path(arguments.calibration_file))
        columns = text_columns(rows, data, arguments.calibration_file)
        texts = zip(*(rows[column] for column in columns.values()), strict=True)
    elif task is not None and data.has_training_data:
        texts = task.readings("train") if isinstance(task, TextTask) else task.texts()
    else:
        raise InputError("int8-static has no data to calibrate on: give --calibration_file or --train_file")
    _check_length(checkpoint, data)
    return calibration_batches(
        texts,
        checkpoint.tokenizer,
        samples=arguments.calibration_samples,
        length=data.max_seq_length,
        masked=data.mlm_probability if checkpoint.task == "masked-lm" else 0.0,
        seed=arguments.seed,
    )


def check_limit(arguments: ExportArguments, data: ExportDataArguments) -> None:
    """See that there is data to judge `--max_accuracy_drop` by, which is not that of the closing table.

    Raises:
        InputError: there is none.
    """
    if arguments.max_accuracy_drop is not None and not data.has_validation_data:
        raise InputError("--max_accuracy_drop is kept on validation data: give --validation_file")


@dataclass
class Examples:
    """One split.

    Attributes:
        batches: as `evaluate` takes them; they can be gone through again.
        reader: as `reader_of` gives it.
    """

    batches: Iterable[Batch]
    reader: Reader | None = None


def examples_of(checkpoint: Checkpoint, task: Task, arguments: ExportArguments) -> dict[str, Examples]:
    """The splits `test`, on which files are compared, and `validation`, which serves where there is no other."""
    encoded = task.encode(checkpoint.tokenizer)
    collator = task.collator(checkpoint.tokenizer, encoded)
    examples = {}
    for split in ("validation", "test"):
        rows = encoded.get(split, encoded["validation"])
        batches = DataLoader(rows, batch_size=arguments.per_device_eval_batch_size, collate_fn=collator)
        examples[split] = Examples(batches, reader_of(task, encoded, split))
    return examples


def _check_length(checkpoint: Checkpoint, data: ExportDataArguments) -> None:
    positions = maximum_length(checkpoint.model)
    if data.max_seq_length > positions:
        raise InputError(
            f"--max_seq_length {data.max_seq_length} is more than the {positions} positions of {checkpoint.name}"
        )
