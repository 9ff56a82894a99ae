"""Weights that a model can do without: found, masked while it is trained, and zero in the end."""

from prunelle.compression.pruning.density import density_by_weight as density_by_weight
from prunelle.compression.pruning.layers import kept_layers as kept_layers
from prunelle.compression.pruning.layers import remove_layers as remove_layers
from prunelle.compression.pruning.masks import LearnedMask as LearnedMask
from prunelle.compression.pruning.masks import Mask as Mask
from prunelle.compression.pruning.pruning import Pruning as Pruning
from prunelle.compression.pruning.rewinding import Rewinding as Rewinding
from prunelle.compression.pruning.schedule import CubicSchedule as CubicSchedule
from prunelle.compression.pruning.schedule import IterativeSchedule as IterativeSchedule
from prunelle.compression.pruning.schedule import OneShotSchedule as OneShotSchedule
from prunelle.compression.pruning.selection import keep_highest as keep_highest
from prunelle.compression.pruning.structures import LAYERS as LAYERS
from prunelle.compression.pruning.structures import SHARED as SHARED
from prunelle.compression.pruning.surgery import shrink as shrink
from prunelle.compression.pruning.targets import find_prunable as find_prunable
from prunelle.compression.pruning.vocabulary import prune_vocabulary as prune_vocabulary

__all__ = [
    "LAYERS",
    "SHARED",
    "CubicSchedule",
    "IterativeSchedule",
    "LearnedMask",
    "Mask",
    "OneShotSchedule",
    "Pruning",
    "Rewinding",
    "density_by_weight",
    "find_prunable",
    "keep_highest",
    "kept_layers",
    "prune_vocabulary",
    "remove_layers",
    "shrink",
]
