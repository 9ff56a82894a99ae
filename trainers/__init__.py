"""Subclasses of `transformers.Trainer` and the arguments that go with them."""

from prunelle.trainers.arguments import DistillationArguments as DistillationArguments
from prunelle.trainers.arguments import FinetuningArguments as FinetuningArguments
from prunelle.trainers.compression import CompressionTrainer as CompressionTrainer
from prunelle.trainers.distillation import DistillationTrainer as DistillationTrainer
from prunelle.trainers.mutual import MutualArguments as MutualArguments
from prunelle.trainers.mutual import MutualTrainer as MutualTrainer
from prunelle.trainers.pruning import PruningArguments as PruningArguments
from prunelle.trainers.pruning import PruningTrainer as PruningTrainer
from prunelle.trainers.quantization import QATTrainer as QATTrainer
from prunelle.trainers.quantization import QuantizationArguments as QuantizationArguments
from prunelle.trainers.quantization import SelfDistillationArguments as SelfDistillationArguments
