"""Several models on the same data, held against one of them: what changed, and whether that is chance."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.compression.record import versions
from prunelle.errors import InputError
from prunelle.export.candidates import Candidate, find_candidates
from prunelle.export.data import reader_of
from prunelle.export.evaluation import IGNORED, Evaluation, Reader, evaluate
from prunelle.export.footprint import Footprint, measure_footprint
from prunelle.export.hardware import hardware
from prunelle.export.inference import maximum_length
from prunelle.export.latency import Latency, measure_latency, parse_shape
from prunelle.export.mcnemar import McNemar
from prunelle.export.report import ModelReport, Report
from prunelle.export.runner import Batch, Logits, Runner, TorchRunner
from prunelle.export.weights import Weights
from prunelle.tasks import TASKS, Classification, DataArguments, QuestionAnswering, ReadsLogits, Task, TextTask
from prunelle.tasks.pretrained_tokenizer import pad_alike

logger = logging.getLogger(__name__)

SIGNIFICANT = 0.05
LISTED_FLIPS = 500  # the surest; their count is complete


@dataclass
class ComparisonArguments(DataArguments):
    """Which models, on which data. Of the data only the test split is used, or validation where there is none."""

    reference: str | None = field(
        default=None, metadata={"help": "A checkpoint, hub model or ONNX file, which the others are held against."}
    )
    candidates: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Like --reference, or folders with onnx/*.onnx. FORMAT:PATH says how one is run: torch, "
            "torch-bf16, torch-compile, onnx."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where the report is written: a new folder."})
    shapes: list[str] = field(
        default_factory=lambda: ["1x32", "1x128", "16x128"],
        metadata={"help": "Where latency is measured, batch x tokens."},
    )
    latency_seconds: float = field(default=60.0, metadata={"help": "How long latency is measured, in all."})
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "Texts predicted together; dynamic int8 depends on it a little."}
    )
    seed: int = field(default=42, metadata={"help": "Draws masks (masked-lm) and held-out data."})

    def __post_init__(self) -> None:
        if self.reference is None:
            raise InputError("no model to hold the others against: give --reference MODEL")
        if not self.candidates:
            raise InputError("nothing to compare: give --candidates MODEL …")
        if self.output_dir is None:
            raise InputError("no output folder: give --output_dir DIR")
        if self.per_device_eval_batch_size < 1:
            raise InputError(f"--per_device_eval_batch_size {self.per_device_eval_batch_size} must be at least 1")
        if not self.latency_seconds >= 0:
            raise InputError(f"--latency_seconds {self.latency_seconds} must not be negative")
        for shape in self.shapes:
            parse_shape(shape, self.max_seq_length)
        file = self.test_file or self.validation_file
        if self.dataset_name is None:
            if file is None and self.train_file is None:
                raise InputError("no data: give --test_file FILE or --dataset_name NAME")
            # Nothing is trained: the labels of the test data stand in for those of training data, and the classes
            # are the reference's.
            self.train_file = self.train_file or file
            self.validation_file = self.validation_file or file
        super().__post_init__()


@dataclass(frozen=True)
class Flip:
    """A prediction that changed. `example` counts from 1; the margins run from 0, undecided, to 1, sure."""

    example: int
    text: str
    label: str
    reference: str
    candidate: str
    reference_margin: float
    margin: float


@dataclass(frozen=True)
class ClassChange:
    """How many of a class's examples were predicted rightly, by the reference and by the candidate."""

    name: str
    examples: int
    reference_right: int
    right: int


@dataclass(frozen=True)
class Judgement:
    """A candidate against the reference.

    Attributes:
        agreement: share of predictions that are the reference's.
        worse: predictions that were right and are wrong now.
        better: the other way round.
        p_value: McNemar's, exact: how likely counts as uneven as these two are by chance.
        verdict: all that in a sentence.
        classes: by class, in the reference's order. Empty where classes are the words of a vocabulary.
        flips: the changed predictions, those of which the reference was surest first; at most `LISTED_FLIPS`.
    """

    agreement: float
    worse: int
    better: int
    p_value: float
    verdict: str
    classes: list[ClassChange]
    flips: list[Flip]


@dataclass(frozen=True)
class ComparedModel:
    """What is known of one model beyond its row in the table.

    `confusion` is (classes, classes), the true ones in rows; None for the words of a vocabulary. The reference has no
    `judgement`.
    """

    weights: Weights
    footprint: Footprint
    confusion: NDArray[np.int64] | None
    judgement: Judgement | None


@dataclass(frozen=True)
class Comparison:
    """Everything a comparison found; `comparison_report.save` writes it down.

    Attributes:
        report: the table, the reference in its first row.
        models: what else is known, in the same order.
        data: task, source, split, count of examples and fingerprint.
        classes: their names, in the reference's order; None for the words of a vocabulary.
        recipe: the flags given.
    """

    report: Report
    models: list[ComparedModel]
    data: dict[str, Any]
    classes: list[str] | None
    recipe: dict[str, Any]


def compare(arguments: ComparisonArguments, recipe: dict[str, Any]) -> Comparison:
    """Loads, evaluates and measures all models, and judges each candidate.

    Raises:
        InputError: A model or data that cannot be used. What can be seen early is seen before the measurements.
    """
    assert arguments.reference is not None
    candidates = find_candidates(arguments.reference, arguments.candidates)
    task = TASKS[arguments.task](arguments, arguments.seed)
    contestants = _prepare(candidates, task, arguments.max_seq_length)
    runners = [contestant.runner for contestant in contestants]
    examples = _Examples(task, arguments, contestants)
    for contestant in contestants:
        examples.try_out(contestant)

    logger.info("evaluating %d models on %s", len(runners), examples.source)
    evaluations = evaluate(
        [contestant.aligned for contestant in contestants],
        examples.batches(),
        task.compute_metrics,
        reference=contestants[0].aligned,
        reader=examples.reader,
    )
    measured: dict[str, Any] = {
        "shapes": arguments.shapes,
        "vocabulary": min(len(contestant.tokenizer) for contestant in contestants),
        "maximum_length": min(contestant.maximum_length for contestant in contestants),
    }
    logger.info("measuring latency for %.0f s", arguments.latency_seconds)
    latencies = measure_latency(runners, **measured, seconds=arguments.latency_seconds)
    weights = [candidate.weigh(runner) for candidate, runner in zip(candidates, runners, strict=True)]
    logger.info("measuring load time and memory, each model in a process of its own")
    footprints = [measure_footprint(candidate, task.auto_model_class.__name__, **measured) for candidate in candidates]

    names = task.class_names if isinstance(task, Classification) and not isinstance(task, ReadsLogits) else None
    rows = [
        _row(*figures, base=latencies[0]) for figures in zip(candidates, evaluations, weights, latencies, strict=True)
    ]
    models = [
        ComparedModel(
            weights[index],
            footprints[index],
            None if names is None else confusion_matrix(evaluation, len(names)),
            None if index == 0 else judge(evaluations[0], evaluation, names, examples.class_name, examples.text),
        )
        for index, evaluation in enumerate(evaluations)
    ]
    machine = hardware()
    report = Report(candidates[0].name, rows, machine, versions(), _warnings(rows, machine))
    data = {
        "task": arguments.task,
        "source": examples.source,
        "split": examples.split,
        "examples": evaluations[0].total,
        "fingerprint": task.fingerprint(),
    }
    return Comparison(report, models, data, names, recipe)


def class_order(reference: PreTrainedConfig, other: PreTrainedConfig, name: str) -> list[int] | None:
    """Which class number of the other model stands for each of the reference's; None where they are the same.

    Classes are matched by name, whatever the case; those of a model that calls them LABEL_0, LABEL_1, … by number.

    Raises:
        InputError: The models predict other classes.
    """
    ours, theirs = ([str(c.id2label[index]).lower() for index in range(len(c.id2label))] for c in (reference, other))
    unnamed = any(names == [f"label_{index}" for index in range(len(names))] for names in (ours, theirs))
    if theirs == ours or (unnamed and len(theirs) == len(ours)):
        return None
    if sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        raise InputError(
            f"{name} predicts {', '.join(map(str, other.id2label.values()))}, the reference "
            f"{', '.join(map(str, reference.id2label.values()))}: they must be the same"
        )
    return [theirs.index(label) for label in ours]


def confusion_matrix(evaluation: Evaluation, classes: int) -> NDArray[np.int64]:
    """(classes, classes) counts: true classes in rows, predicted ones in columns."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (evaluation.references, evaluation.predictions), 1)
    return matrix


def judge(
    reference: Evaluation,
    candidate: Evaluation,
    classes: Sequence[str] | None,
    class_name: Callable[[Any], str],
    text: Callable[[int], str],
) -> Judgement:
    """Holds a candidate's predictions against the reference's, on the same examples."""
    true, before, after = reference.references, reference.predictions, candidate.predictions
    differs = candidate.differs(reference)
    is_worse, is_better = (differs & sign(candidate.errors, reference.errors) for sign in (np.greater, np.less))
    test = McNemar(keep_in_memory=True).compute(
        predictions1=1 - is_better, predictions2=1 - is_worse, references=np.ones(len(differs), dtype=np.int64)
    )
    changed = np.flatnonzero(differs)
    surest = changed[np.argsort(-reference.margins[changed], kind="stable")]
    flips = [
        Flip(
            example=int(index) + 1,
            text=text(int(index)),
            label=class_name(true[index]),
            reference=class_name(before[index]),
            candidate=class_name(after[index]),
            reference_margin=float(reference.margins[index]),
            margin=float(candidate.margins[index]),
        )
        for index in surest[:LISTED_FLIPS]
    ]
    by_class = [
        ClassChange(
            name,
            examples=int((true == number).sum()),
            reference_right=int(((true == number) & (before == number)).sum()),
            right=int(((true == number) & (after == number)).sum()),
        )
        for number, name in enumerate(classes or [])
    ]
    are_graded = not np.isin([reference.errors, candidate.errors], (0.0, 1.0)).all()
    worse, better, p_value = test["only_first_right"], test["only_second_right"], test["p_value"]
    return Judgement(
        agreement=1 - len(changed) / len(true),
        worse=worse,
        better=better,
        p_value=p_value,
        verdict=verdict(len(changed), len(true), worse, better, p_value, "errors" if are_graded else "accuracies"),
        classes=by_class,
        flips=flips,
    )


def verdict(changed: int, total: int, worse: int, better: int, p_value: float, compared: str = "accuracies") -> str:
    """What a reader in a hurry should know."""
    if not changed:
        return f"none of {total:,} predictions changed"
    differ = "do not differ at 5 %"
    if p_value < SIGNIFICANT:
        is_lower = (worse > better) == (compared == "accuracies")
        differ = f"differ at 5 %: the candidate's {'is' if compared == 'accuracies' else 'are'} "
        differ += "lower" if is_lower else "higher"
    return (
        f"{changed:,} of {total:,} predictions changed, {worse:,} for the worse and {better:,} for the better; "
        f"the {compared} {differ} (McNemar p = {p_value:.2g})"
    )


@dataclass(frozen=True)
class _Contestant:
    """A model that is loaded, with what its texts are read by."""

    runner: Runner
    aligned: "_Aligned"
    tokenizer: Tokenizer
    maximum_length: int


class _Aligned(Runner):
    """A model fed by its own tokenizer, its classes in the reference's order."""

    def __init__(self, runner: Runner, tokenizer_name: str, order: list[int] | None) -> None:
        self.runner, self.tokenizer_name, self.order = runner, tokenizer_name, order
        self.name, self.format = runner.name, runner.format
        self.size_bytes, self.parameters, self.input_names = runner.size_bytes, runner.parameters, ()

    def __call__(self, batch: Batch) -> Logits:
        logits = self.runner(batch[self.tokenizer_name])
        return logits if self.order is None else logits[..., self.order]


def _prepare(candidates: Sequence[Candidate], task: Task, longest: int) -> list[_Contestant]:
    """Loads the models; the task takes over the reference's classes."""
    config, tokenizer = candidates[0].config(), candidates[0].tokenizer()
    if config is None or tokenizer is None:
        what = "config.json" if config is None else "tokenizer"
        raise InputError(f"no {what} with {candidates[0].path}: the reference says what is predicted, and from what")
    task.adopt(config, candidates[0].path)
    contestants = []
    for candidate in candidates:
        its_config, its_tokenizer = candidate.config() or config, candidate.tokenizer() or tokenizer
        order = None
        if isinstance(task, Classification):
            order = class_order(config, its_config, candidate.path)
        if not isinstance(task, TextTask) and its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{candidate.path} has another vocabulary than the reference: their tokens cannot be compared"
            )
        logger.info("loading %s", candidate.name)
        runner = candidate.load(task.auto_model_class)
        positions = getattr(its_config, "max_position_embeddings", None)
        if isinstance(runner, TorchRunner):
            pad_alike(runner.model, its_tokenizer)
            positions = maximum_length(runner.model)
        length = min(its_tokenizer.model_max_length, positions or longest)
        if length < longest:
            raise InputError(
                f"--max_seq_length {longest} is more than the {length} tokens that {candidate.path} can read"
            )
        aligned = _Aligned(runner, its_tokenizer.name_or_path, order)
        contestants.append(_Contestant(runner, aligned, its_tokenizer, length))
    return contestants


class _Examples:
    """The evaluation data, as every tokenizer reads it."""

    def __init__(self, task: Task, arguments: ComparisonArguments, contestants: Sequence[_Contestant]) -> None:
        self.split = "test" if "test" in task.splits else "validation"
        self.source = getattr(arguments, f"{self.split}_file") or arguments.dataset_name or arguments.train_file
        rows = task.splits[self.split]
        self.texts: Sequence[str] | None = None
        if isinstance(task, TextTask):
            self.texts = [" | ".join(texts) for texts in task.readings(self.split)]
        elif isinstance(task, QuestionAnswering):
            self.texts = [f"{row['question']} {row['context']}" for row in rows]
        self.class_names = task.class_names if isinstance(task, Classification) else None
        self.tokenizer = contestants[0].tokenizer
        self.reader: Reader | None = None
        self.rows: dict[str, Any] = {}
        self.loaders: dict[str, DataLoader[Any]] = {}
        for contestant in contestants:
            name = contestant.aligned.tokenizer_name
            if name not in self.rows:
                encoded = task.encode(contestant.tokenizer)
                self.rows[name] = encoded[self.split]
                self.reader = reader_of(task, encoded)
                collator = task.collator(contestant.tokenizer, encoded)
                self.loaders[name] = DataLoader(
                    encoded[self.split], batch_size=arguments.per_device_eval_batch_size, collate_fn=collator
                )

    def batches(self) -> Iterator[dict[str, Any]]:
        """For each batch of examples its labels, and its tensors by the name of the tokenizer."""
        for batches in zip(*self.loaders.values(), strict=True):
            yield {"labels": batches[0]["labels"], **dict(zip(self.loaders, batches, strict=True))}

    def try_out(self, contestant: _Contestant) -> None:
        """Runs the model on the longest example, so that one that cannot read it fails before the long work.

        Raises:
            InputError: It cannot, or it gives other logits than one for each class.
        """
        name = contestant.aligned.tokenizer_name
        rows, collate = self.rows[name], self.loaders[name].collate_fn
        longest = max(range(len(rows)), key=[len(ids) for ids in rows["input_ids"]].__getitem__)
        batch = collate([rows[longest]])
        try:
            logits = contestant.runner(batch)
        except InputError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{contestant.runner.name} cannot be run on {batch['input_ids'].shape[1]} tokens: {reason}"
            ) from error
        if self.class_names is not None and logits.shape[-1] != len(self.class_names):
            raise InputError(
                f"{contestant.runner.name} gives logits of shape {logits.shape} for one text; the reference predicts "
                f"{len(self.class_names)} classes"
            )

    def class_name(self, prediction: Any) -> str:
        """A class, an answer, a number, or a word of the vocabulary."""
        if isinstance(prediction, str):
            return prediction or "(no answer)"
        if isinstance(prediction, float):
            return f"{prediction:.4g}"
        number = int(prediction)
        if self.class_names is not None:
            return self.class_names[number]
        return self.tokenizer.decode([number])

    def text(self, index: int) -> str:
        """An example's text; of a token that is predicted, the words around it."""
        if self.texts is not None:
            return self.texts[index]
        row, position = map(int, self.scored[index])
        words = self.rows[self.tokenizer.name_or_path][row]["input_ids"]
        return self.tokenizer.decode(words[max(0, position - 10) : position + 11])

    @cached_property
    def scored(self) -> NDArray[np.int64]:
        """(predicted tokens, 2): the row and the position of each, in the order in which they are evaluated."""
        rows = self.rows[self.tokenizer.name_or_path]["labels"]
        return np.array([(row, place) for row, ids in enumerate(rows) for place, id in enumerate(ids) if id != IGNORED])


def _row(
    candidate: Candidate,
    evaluation: Evaluation,
    weights: Weights,
    latency: dict[str, Latency],
    *,
    base: dict[str, Latency],
) -> ModelReport:
    return ModelReport(
        name=candidate.name,
        format=weights.format if candidate.format == "onnx" else candidate.format,
        metrics=evaluation.metrics,
        size_bytes=weights.size_bytes,
        parameters=weights.parameters,
        latency_ms=latency,
        speedup={shape: base[shape].p50 / latency[shape].p50 for shape in latency},
        flips=evaluation.flips,
        total=evaluation.total,
        max_abs_logit_difference=evaluation.max_abs_logit_difference,
    )


def _warnings(rows: Sequence[ModelReport], machine: dict[str, Any]) -> list[str]:
    formats = {row.format for row in rows}
    found = []
    for precision, format in (("int8", "onnx-int8"), ("bf16", "torch-bf16")):
        if format in formats and machine[f"{precision}_instructions"] == []:
            found.append(
                f"this CPU ({machine['cpu']}) has no {precision} instructions: {format} runs faster on one that has."
            )
    return found
