"""What tasks with classes have in common: their labels, checked, and the head that predicts them."""

from collections import Counter
from typing import Any

from transformers import PreTrainedConfig

from prunelle.errors import InputError
from prunelle.tasks import loading
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.loading import where


class Classification:
    """A task whose labels are classes; see `tasks.Task` for the verbs.

    Subclasses read the splits and call `learn_classes`.

    Attributes:
        problem_type: what `transformers` calls it in the configuration of a classifier of texts.
        class_index: the labels of the data to the numbers of the classes.
        class_names: the classes, in the order of the model's logits.
    """

    problem_type: str | None = None
    arguments: DataArguments
    splits: dict[str, Any]

    def learn_classes(self, values: list[Any], names: list[str] | None) -> None:
        """Number the classes.

        Args:
            values: every label that the training data may hold, in the order of the classes.
            names: what a `ClassLabel` column calls them; None for bare values.
        """
        self.class_index: dict[Any, int] = {value: index for index, value in enumerate(values)}
        self.class_names: list[str] = [str(value) for value in values] if names is None else names
        self.data_is_unnamed = names is None and all(isinstance(value, int) for value in values)

    def fingerprint(self, unlabeled: bool = True) -> str:
        """A hash of the data, with or without what is unlabeled, and of how it is prepared."""
        return loading.fingerprint(self.splits, self.arguments, unlabeled)

    def configure(self, config: PreTrainedConfig) -> None:
        """Give a model whose head is still to be trained this task's classes."""
        config.num_labels = len(self.class_names)
        config.id2label = dict(enumerate(self.class_names))
        config.label2id = {name: index for index, name in enumerate(self.class_names)}
        config.problem_type = self.problem_type

    def adopt(self, config: PreTrainedConfig, model_name: str) -> None:
        """Take over the classes, and their order, of a model whose head is trained already.

        Labels are matched by name, whatever the case. Bare numbers in the data, or a model whose classes are
        called LABEL_0, LABEL_1, …, are matched by number.

        Raises:
            InputError: The model lacks one of the labels, or was trained for another problem.
        """
        check_problem(config, self.problem_type, model_name)
        classes = {str(name).lower(): int(index) for index, name in config.id2label.items()}
        model_is_unnamed = set(classes) == {f"label_{index}" for index in range(len(classes))}
        if all(name.lower() in classes for name in self.class_names):
            indices = [classes[name.lower()] for name in self.class_names]
        elif (self.data_is_unnamed or model_is_unnamed) and set(self.class_index) <= set(range(len(classes))):
            indices = list(self.class_index)
        else:
            raise InputError(
                f"{model_name} predicts {', '.join(map(str, config.id2label.values()))}, but "
                f"{where(self.arguments, 'train')} is labelled {', '.join(self.class_names)}: they must be the same"
            )
        self.class_index = dict(zip(self.class_index, indices, strict=True))
        self.class_names = [str(config.id2label[index]) for index in range(len(classes))]


def check_problem(config: PreTrainedConfig, problem_type: str | None, model_name: str) -> None:
    """See that a trained head is for the problem, and have its configuration say so.

    Raises:
        InputError: It says that it is for another.
    """
    if (theirs := getattr(config, "problem_type", None)) not in (None, problem_type) and problem_type is not None:
        raise InputError(f"{model_name} was trained for {theirs}: give --problem_type {theirs}, or another model")
    config.problem_type = problem_type


def class_values(values: set[Any], column: str, place: str) -> list[Any]:
    """The labels that a column holds, in the order of the classes.

    Raises:
        InputError: They are fractions, or all the same.
    """
    ordered = sorted(values, key=lambda value: (str(type(value)), value))
    if any(isinstance(value, float) for value in ordered):
        raise InputError(
            f"{place}: column {column!r} holds fractions such as {ordered[0]}; classification wants classes"
        )
    if len(ordered) < 2:
        raise InputError(f"{place}: column {column!r} holds one label only, {ordered[0]!r}: nothing to tell apart")
    return ordered


def check_known(labels: list[list[Any]], known: list[Any], place: str) -> None:
    """See that validation and test data hold the training data's labels alone.

    Args:
        labels: the labels of each example.

    Raises:
        InputError: One of them does not occur in the training data.
    """
    unknown = Counter(value for example in labels for value in example)
    for value in known:
        unknown.pop(value, None)
    if unknown:
        value, count = unknown.most_common(1)[0]
        number = next(index for index, example in enumerate(labels, start=1) if value in example)
        raise InputError(
            f"{place}, example {number}: label {value!r} (occurs {count} times) does not occur in the training "
            f"data, which has: {', '.join(map(str, known))}"
        )
