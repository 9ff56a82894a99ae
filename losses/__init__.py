"""Tensors in, scalar out. One loss a file; torch alone."""

from prunelle.losses.hard_labels import HardLabelLoss as HardLabelLoss
from prunelle.losses.hidden_cosine import HiddenCosineLoss as HiddenCosineLoss
from prunelle.losses.soft_targets import SoftTargetLoss as SoftTargetLoss

__all__ = ["HardLabelLoss", "HiddenCosineLoss", "SoftTargetLoss"]
