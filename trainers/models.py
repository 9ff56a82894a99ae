"""Where models come from: a checkpoint, a configuration, or a teacher's layers."""

import copy
import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.compression import distilbert_from_bert, from_pretrained, student_from_layers
from prunelle.compression.targets import match_modules
from prunelle.errors import InputError, load_checkpoint_with
from prunelle.tasks import DataArguments, Task, problem_type
from prunelle.tasks.causal_lm import check_causal
from prunelle.tasks.pretrained_tokenizer import load_tokenizer, pad_alike
from prunelle.tasks.tokenizer import train_causal_tokenizer, train_sequence_tokenizer, train_tokenizer
from prunelle.trainers.ensemble import members, readers_of_the_same

logger = logging.getLogger(__name__)

TOKENIZER_TRAINERS = {AutoModelForCausalLM: train_causal_tokenizer, AutoModelForSeq2SeqLM: train_sequence_tokenizer}


@dataclass
class ModelArguments:
    """The model to fine-tune."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint folder or hub model."})
    model_config: str | None = field(
        default=None, metadata={"help": "Train from scratch: config.json's folder or file, or the JSON itself."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "By default the model's; with --model_config one is trained on the training texts."},
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise InputError("give a model: --model_name_or_path, or --model_config for one from scratch")


@dataclass
class TeacherStudentArguments:
    """The teacher, and how the student is made."""

    teacher_name_or_path: list[str] | None = field(
        default=None, metadata={"help": "A checkpoint folder or hub model; several are an ensemble."}
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Of an ensemble, one a teacher; by default all alike."}
    )
    teacher_mean: Literal["probabilities", "logits"] = field(
        default="probabilities", metadata={"help": "What an ensemble's soft targets are the mean of."}
    )
    teacher_config: str | None = field(
        default=None,
        metadata={"help": "Train the teacher from scratch: config.json's folder or file, or the JSON itself."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "By default the teacher's; with --teacher_config one is trained on the training texts."},
    )
    finetune_teacher: bool = field(
        default=False, metadata={"help": "Fine-tune a teacher without a trained head first; done once and reused."}
    )
    teacher_output_dir: str | None = field(
        default=None, metadata={"help": "Where the fine-tuned teacher is kept. By default OUTPUT_DIR-teacher."}
    )
    teacher_num_train_epochs: float | None = field(default=None, metadata={"help": "By default the student's."})
    teacher_learning_rate: float | None = field(default=None, metadata={"help": "By default the student's."})
    student_layers: str | None = field(
        default=None, metadata={"help": "The teacher's layers (its encoder's) that the student takes, such as 0,2,4."}
    )
    student_decoder_layers: str | None = field(
        default=None,
        metadata={"help": "The same of an encoder-decoder's decoder; of the one that is not given, all are taken."},
    )
    student_architecture: Literal["distilbert"] | None = field(
        default=None, metadata={"help": "Build a DistilBERT out of a BERT: of --student_layers, or every second."}
    )
    student_name_or_path: str | None = field(default=None, metadata={"help": "An existing student."})
    student_config: str | None = field(
        default=None, metadata={"help": "A student from scratch: config.json's folder or file, or the JSON itself."}
    )
    student_tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "By default that of --student_name_or_path, else the teacher's (classifiers may differ)."},
    )
    generations: int = field(
        default=1,
        metadata={"help": "How many students, each taught by the one before and made like the first."},
    )

    def __post_init__(self) -> None:
        if self.generations < 1:
            raise InputError(f"--generations {self.generations} must be at least 1")
        if (self.teacher_name_or_path is None) == (self.teacher_config is None):
            raise InputError("give a teacher: --teacher_name_or_path, or --teacher_config for one from scratch")
        if self.teacher_config is not None and not self.finetune_teacher:
            raise InputError("a teacher from --teacher_config knows nothing yet: add --finetune_teacher")
        of_its_training = ("teacher_output_dir", "teacher_num_train_epochs", "teacher_learning_rate")
        unread = [name for name in of_its_training if getattr(self, name) is not None and not self.finetune_teacher]
        if unread:
            raise InputError(f"--{unread[0]} is for a teacher that is trained first: add --finetune_teacher")
        self._check_ensemble()
        ways = {
            "--student_layers, --student_decoder_layers or --student_architecture": self.student_layers
            or self.student_decoder_layers
            or self.student_architecture,
            "--student_name_or_path": self.student_name_or_path,
            "--student_config": self.student_config,
        }
        if sum(way is not None for way in ways.values()) != 1:
            raise InputError(f"give the student in one way: {', '.join(ways)}")
        if self.student_is_of_the_teacher and self.student_tokenizer_name_or_path is not None:
            raise InputError(
                "--student_tokenizer_name_or_path: a student made of the teacher's layers reads its tokens"
            )
        if self.student_decoder_layers is not None and self.student_architecture is not None:
            raise InputError(f"--student_decoder_layers: {self.student_architecture} has no decoder")
        self.layers()
        self.decoder_layers()

    def _check_ensemble(self) -> None:
        teachers = self.teacher_name_or_path or []
        if len(teachers) > 1 and self.finetune_teacher:
            raise InputError(
                "--finetune_teacher trains one teacher: train each of an ensemble by scripts/finetune.py, and name "
                "their folders"
            )
        weights = self.teacher_weights
        if weights is not None and len(weights) != len(teachers):
            raise InputError(f"--teacher_weights gives {len(weights)} weights for {len(teachers)} teachers")
        for weight in weights or []:
            if not 0 < weight < float("inf"):
                raise InputError(f"--teacher_weights {weight} must be above 0: leave out a teacher that is not heard")

    @property
    def student_is_of_the_teacher(self) -> bool:
        """Whether the student takes over weights of its teacher."""
        return self.student_name_or_path is None and self.student_config is None

    def layers(self) -> list[int] | None:
        """`--student_layers` as numbers."""
        return layer_numbers(self.student_layers, "--student_layers")

    def decoder_layers(self) -> list[int] | None:
        """`--student_decoder_layers` as numbers."""
        return layer_numbers(self.student_decoder_layers, "--student_decoder_layers")


@dataclass
class LoadedModel:
    """A model, its tokenizer, and whether its head has been trained for the task."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    is_trained: bool


def load_or_start(
    name_or_path: str | None,
    config: str | None,
    tokenizer_name_or_path: str | None,
    task: Task,
    weights: bool = True,
) -> LoadedModel:
    """The checkpoint that is named, else a model from scratch of the configuration; see the two below."""
    if name_or_path is not None:
        flag = "tokenizer_name_or_path"
        return load_model(name_or_path, task, tokenizer_name_or_path, weights=weights, tokenizer_flag=flag)
    assert config is not None
    return fresh_model(config, task, tokenizer_name_or_path)


def load_model(
    name_or_path: str,
    task: Task,
    tokenizer_name_or_path: str | None = None,
    adopt: bool = True,
    weights: bool = True,
    tokenizer_flag: str | None = None,
) -> LoadedModel:
    """Load a checkpoint for a task. A head that the checkpoint lacks is made new, for the task's labels.

    Args:
        adopt: whether the task takes over the classes of a trained head. It can follow one model alone.
        weights: without them the model, which must have a trained head, is on the meta device: a shape that holds
            no memory.
        tokenizer_flag: by which another tokenizer would be given.

    Raises:
        InputError: There is no such checkpoint, its trained head knows other labels, its tokenizer cannot be used, or
            it sees what it would have to predict.
    """
    config = load_checkpoint_with(AutoConfig.from_pretrained, name_or_path)
    tokenizer = load_tokenizer(tokenizer_name_or_path or name_or_path, tokenizer_flag)
    if weights:
        model, loading = from_pretrained(name_or_path, task.auto_model_class, config=config, output_loading_info=True)
        is_trained = all(key.startswith(f"{model.base_model_prefix}.") for key in loading["missing_keys"])
    else:
        with torch.device("meta"):
            model, is_trained = task.auto_model_class.from_config(config), True
    if is_trained and adopt:
        task.adopt(model.config, name_or_path)
    elif not is_trained:
        task.configure(config)
        model = from_pretrained(name_or_path, task.auto_model_class, config=config)
    if weights:
        check_causal(model, task.auto_model_class, name_or_path)
    pad_alike(model, tokenizer)
    return LoadedModel(model, tokenizer, is_trained)


def fresh_model(source: str, task: Task, tokenizer_name_or_path: str | None = None) -> LoadedModel:
    """A model from scratch, and the tokenizer named or one trained on the task's texts.

    Args:
        source: A `config.json`, its folder, a hub model, or the configuration itself as JSON.

    Raises:
        InputError: The configuration cannot be read or is no causal model's where one is asked for, or there is no such
            tokenizer.
    """
    config = _read_config(source)
    if tokenizer_name_or_path is not None:
        tokenizer = load_tokenizer(tokenizer_name_or_path, "tokenizer_name_or_path")
    else:
        train = TOKENIZER_TRAINERS.get(task.auto_model_class, train_tokenizer)
        tokenizer = train(task.texts(), config.vocab_size)
        if (positions := getattr(config, "max_position_embeddings", None)) is not None:
            tokenizer.model_max_length = positions
    _fit_to_tokenizer(config, tokenizer)
    task.configure(config)
    return LoadedModel(_from_config(config, task), tokenizer, is_trained=False)


def build_student(
    arguments: TeacherStudentArguments, teacher: nn.Module, task: Task, tokenizer: Tokenizer
) -> PreTrainedModel:
    """The student, in the way that the arguments ask for; of an ensemble, out of the first teacher.

    Args:
        tokenizer: as `student_tokenizer` gives it.

    Raises:
        InputError: Layers that the teacher has not, or a checkpoint that cannot be used.
    """
    first = members(teacher)[0]
    if arguments.student_architecture == "distilbert":
        return distilbert_from_bert(first, arguments.layers())
    if arguments.student_layers is not None or arguments.student_decoder_layers is not None:
        return student_from_layers(first, arguments.layers(), arguments.decoder_layers())
    others, own = readers_of_the_same(teacher), arguments.student_tokenizer_name_or_path
    student = companion(arguments.student_name_or_path, arguments.student_config, others, task, tokenizer, own)
    student.config.problem_type = problem_type(first)  # many a checkpoint does not say
    return student


def student_tokenizer(arguments: TeacherStudentArguments, tokenizer: Tokenizer) -> Tokenizer:
    """The student's own, or the teacher's where that has the same tokens, or the student none of its own."""
    name = arguments.student_tokenizer_name_or_path or arguments.student_name_or_path
    if name is None:
        return tokenizer
    own = load_tokenizer(name, "student_tokenizer_name_or_path")
    return tokenizer if own.get_vocab() == tokenizer.get_vocab() else own


def companion(
    name_or_path: str | None,
    config: str | None,
    others: Sequence[PreTrainedModel],
    task: Task,
    tokenizer: Tokenizer,
    tokenizer_name_or_path: str | None = None,
) -> PreTrainedModel:
    """A checkpoint, or a model from scratch of a configuration, that reads the same token ids as others.

    Args:
        tokenizer_name_or_path: the checkpoint's, where it is not beside it.

    Raises:
        InputError: It does not.
    """
    if name_or_path is not None:
        loaded = load_model(name_or_path, task, tokenizer_name_or_path, adopt=False)
        if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"the vocabularies differ: {name_or_path} has {len(loaded.tokenizer)} tokens and "
                f"{others[0].name_or_path or 'the other model'} {len(tokenizer)}, or they stand for other words; both "
                "must read the same token ids"
            )
        model = loaded.model
    else:
        assert config is not None
        settings = _read_config(config)
        if "vocab_size" not in _explicit(config):
            settings.vocab_size = others[0].config.vocab_size if others else len(tokenizer)
        _fit_to_tokenizer(settings, tokenizer)
        task.configure(settings)
        model = _from_config(settings, task)
    trim_vocabularies(tokenizer, model, *others)
    return model


def trim_vocabularies(tokenizer: Tokenizer, *models: PreTrainedModel) -> None:
    """Cut the vocabularies of models that read the same token ids, in place, to that of the smallest.

    They are made larger than the tokenizer's to be a multiple of 64 or so, not always the same. What is cut stands
    for no token.

    Raises:
        InputError: The smallest has no place for every token.
    """
    smallest = min(model.config.vocab_size for model in models)
    tokens = max(tokenizer.get_vocab().values()) + 1
    for model in models:
        size, name = model.config.vocab_size, model.name_or_path or "the student"
        if size == smallest:
            continue
        if smallest < tokens:
            raise InputError(
                f"{name} has a vocabulary of {size} and another model of the run one of {smallest}, and the tokenizer "
                f"{tokens} tokens: the smaller cannot read them all"
            )
        logger.info("the vocabulary of %s is cut from %d to %d: only %d stand for tokens", name, size, smallest, tokens)
        model.resize_token_embeddings(smallest, pad_to_multiple_of=1)  # without it, advice on sizes is printed


def disable_dropout(model: nn.Module) -> None:
    """Set every rate of dropout in a model to 0, in place, and leave its configuration as it is.

    Rates are those of `nn.Dropout` and its like, and what other modules hold for `nn.functional.dropout`.
    """
    for module in model.modules():
        rates = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        for name in rates:
            setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def frozen_parameters(model: PreTrainedModel, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The weights of some modules, and of all within them.

    Args:
        patterns: shell patterns of their qualified names, such as `*embeddings`.

    Raises:
        InputError: A pattern matches no module, or together they leave nothing to train.
    """
    modules = match_modules(model, (nn.Module,), patterns).values()
    frozen = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    if patterns and all(id(parameter) in frozen for parameter in model.parameters()):
        raise InputError(f"--frozen_modules {' '.join(patterns)} leaves nothing to train")
    return list(frozen.values())


def tokenizer_for(student: PreTrainedModel, tokenizer: Tokenizer) -> Tokenizer:
    """The teacher's tokenizer, giving only what the student takes (a DistilBERT takes no token types)."""
    tokenizer = copy.deepcopy(tokenizer)
    accepted = inspect.signature(student.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in accepted]
    return tokenizer


def check_length(data: DataArguments, *models: nn.Module) -> None:
    """See that the models have a position for every token, read or written.

    Raises:
        InputError: One of them has not.
    """
    for model in chain.from_iterable(map(members, models)):
        positions = getattr(model.config, "max_position_embeddings", None)
        for flag in ("max_seq_length", *(["max_target_length"] if model.config.is_encoder_decoder else [])):
            length = getattr(data, flag)
            if positions is not None and positions < length:
                raise InputError(f"--{flag} {length} is more than the {positions} positions of {type(model).__name__}")


def layer_numbers(text: str | None, flag: str) -> list[int] | None:
    """Layers that a flag names, such as 0,2,4.

    Raises:
        InputError: They are no numbers.
    """
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text} must be numbers, such as 0,2,4") from None


def _explicit(source: str) -> dict[str, Any]:
    """What a configuration given as JSON or as a file says itself, without defaults."""
    if source.lstrip().startswith("{"):  # asked first: the file system refuses a name as long as this
        text = source
    else:
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        if not path.is_file():
            return load_checkpoint_with(AutoConfig.from_pretrained, source).to_dict()
        text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the configuration {source} is not JSON: {error}") from error


def _read_config(source: str) -> PreTrainedConfig:
    settings = _explicit(source)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise InputError(f"the configuration {source} says no model_type, such as bert")
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"the configuration {source} cannot be used: {' '.join(str(error).split())}") from error
    unknown = [name for name in settings if not hasattr(type(config)(), name)]
    if unknown:
        raise InputError(f"the configuration {source} sets {', '.join(unknown)}, which {model_type} does not know")
    return config


def _from_config(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    model = task.auto_model_class.from_config(config)
    check_causal(model, task.auto_model_class, f"a {config.model_type} from scratch")
    return model


def _fit_to_tokenizer(config: PreTrainedConfig, tokenizer: Tokenizer) -> None:
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"the vocabularies differ: the configuration has {config.vocab_size} tokens, the tokenizer {len(tokenizer)}"
        )
    for name in ("pad", "bos", "eos", "cls", "sep"):
        if hasattr(config, f"{name}_token_id") and getattr(tokenizer, f"{name}_token_id") is not None:
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
