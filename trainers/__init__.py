"""Subclasses of `transformers.Trainer` and the arguments that go with them."""

from prunelle.trainers.arguments import DistillationArguments as DistillationArguments
from prunelle.trainers.arguments import FinetuningArguments as FinetuningArguments
from prunelle.trainers.distillation import DistillationTrainer as DistillationTrainer
