"""Training on a teacher's cached answers in place of the teacher."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from prunelle.errors import InputError
from prunelle.tasks.several_tokenizers import TEACHER
from prunelle.trainers.ensemble import Ensemble
from prunelle.trainers.teacher_cache import TeacherCache, checkpoint_fingerprint, data_fingerprint
from prunelle.trainers.terms import SoftTargetTerm, asked, batch_of

if TYPE_CHECKING:
    from prunelle.trainers.distillation import DistillationTrainer

logger = logging.getLogger(__name__)

# The column by which an example finds its answers, and what their names begin with in a batch.
EXAMPLE = "example_number"
PREFIX = "cached_"

# Whole logits are kept as they are: training on them is training on the teacher. What lost its tail needs no digits.
STORED_AS = {"logits": torch.float32, "log_probabilities": torch.float16, "indices": torch.int32}


class CachedAnswersCollator:
    """Puts the teacher's answers to a batch's examples beside what another collator makes of them.

    Args:
        collator: of the examples without their numbers.
        cache: Complete.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], cache: TeacherCache) -> None:
        self.collator, self.cache = collator, cache

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        if EXAMPLE not in examples[0]:
            raise ValueError("with a teacher cache, evaluate on the data that the trainer was made with")
        answers = self.cache.read([example[EXAMPLE] for example in examples])
        batch = self.collator([{k: v for k, v in example.items() if k != EXAMPLE} for example in examples])
        for name, values in answers.items():
            batch[PREFIX + name] = values
        return batch


def cache_answers(trainer: "DistillationTrainer", teacher: nn.Module, teacher_folders: Sequence[str]) -> None:
    """Ask the teacher what its cache does not know yet, and have the trainer's batches carry the answers.

    Examples are numbered through training and evaluation data. Each process asks for shards of its own, with a whole
    teacher; a run that is cut off leaves the shards that were done.

    Raises:
        InputError: The cache is one of another teacher, of other data or settings; or the data has no fixed examples.
    """
    args = trainer.args
    if not teacher_folders:
        raise ValueError("a teacher cache needs to know the teacher's checkpoint: give teacher_folders")
    splits = {"training": trainer.train_dataset, "evaluation": trainer.eval_dataset}
    splits = {name: _checked(trainer, rows) for name, rows in splits.items() if rows is not None}
    term = trainer.objective.terms["soft_target"]
    assert isinstance(term, SoftTargetTerm)

    identity = {
        "teacher": [checkpoint_fingerprint(folder) for folder in teacher_folders],
        **({"ensemble": teacher.identity} if isinstance(teacher, Ensemble) else {}),
        **{f"{name} data": data_fingerprint(rows) for name, rows in splits.items()},
        **{name: getattr(args, name) for name in ("distilled_positions", "teacher_dtype", "bf16", "fp16")},
        **term.identity,
    }
    examples: ConcatDataset[dict[str, Any]] = ConcatDataset(splits.values())
    with args.main_process_first():
        cache = TeacherCache(Path(args.teacher_cache), len(examples), identity)
    _ask(trainer, teacher, term, examples, cache)

    first = 0
    for name, rows in splits.items():
        read_no_more = [name for name in rows.column_names if name.startswith(TEACHER)]
        numbered = rows.remove_columns(read_no_more).add_column(EXAMPLE, np.arange(first, first + len(rows)))
        setattr(trainer, "train_dataset" if name == "training" else "eval_dataset", numbered)
        first += len(rows)
    trainer._signature_columns.append(EXAMPLE)
    trainer.data_collator = CachedAnswersCollator(trainer.data_collator, cache)


def _ask(
    trainer: "DistillationTrainer",
    teacher: nn.Module,
    term: SoftTargetTerm,
    examples: "ConcatDataset[dict[str, Any]]",
    cache: TeacherCache,
) -> None:
    args, missing = trainer.args, cache.missing()
    # All processes must have looked before one of them writes.
    trainer.accelerator.wait_for_everyone()
    if not missing:
        return
    logger.info("the teacher answers %d examples, kept in %s", sum(map(len, missing)), cache.folder)
    teacher.to(args.device)
    for shard in missing[args.process_index :: args.world_size]:
        answers: dict[str, list[np.ndarray]] = defaultdict(list)
        loader = DataLoader(
            Subset(examples, shard),
            batch_size=args.per_device_eval_batch_size,
            collate_fn=trainer.data_collator,
            generator=torch.Generator(),  # not torch's own, from which the run draws the order of its examples
        )
        for batch in loader:
            for name, tables in _answer(trainer, teacher, term, batch).items():
                answers[name] += tables
        cache.write(shard, answers)
    teacher.cpu()
    trainer.accelerator.wait_for_everyone()


def _answer(
    trainer: "DistillationTrainer", teacher: nn.Module, term: SoftTargetTerm, collated: dict[str, Any]
) -> dict[str, list[np.ndarray]]:
    """The answers to one batch: by name, (positions, width) for each of its examples."""
    inputs = trainer._prepare_inputs(collated)
    batch, objective = batch_of(inputs), trainer.objective
    features = {name: value for name, value in inputs.items() if name in trainer.teacher_inputs}
    with torch.inference_mode(), trainer.teacher_precision():
        outputs = objective.ask(teacher, features, objective.positions(batch))
        targets = term.targets(outputs.rows(slice(None))).tensors
    ends = asked(batch, objective.everywhere).reshape(len(batch.labels), -1).sum(1).cumsum(0).tolist()
    return {name: np.split(tensor.to(STORED_AS[name]).cpu().numpy(), ends[:-1]) for name, tensor in targets.items()}


def _checked(trainer: "DistillationTrainer", rows: Any) -> Dataset:
    if not isinstance(rows, Dataset):
        raise InputError("--teacher_cache needs examples that come again: give the data without --streaming")
    if "labels" not in rows.column_names:
        raise InputError("--teacher_cache needs masks that stay, not drawn anew in every epoch: add --static_masking")
    return trainer._remove_unused_columns(rows)
