"""Tensors in, scalar out. One loss a file; torch alone."""

from prunelle.losses.attention_map import AttentionMapLoss as AttentionMapLoss
from prunelle.losses.decoupled import DecoupledLoss as DecoupledLoss
from prunelle.losses.hard_labels import HardLabelLoss as HardLabelLoss
from prunelle.losses.hidden_cosine import HiddenCosineLoss as HiddenCosineLoss
from prunelle.losses.hidden_mse import HiddenMSELoss as HiddenMSELoss
from prunelle.losses.jensen_shannon import JensenShannonLoss as JensenShannonLoss
from prunelle.losses.logit_mse import LogitMSELoss as LogitMSELoss
from prunelle.losses.patient import PatientLoss as PatientLoss
from prunelle.losses.projection import HiddenProjection as HiddenProjection
from prunelle.losses.relational_angle import RelationalAngleLoss as RelationalAngleLoss
from prunelle.losses.relational_distance import RelationalDistanceLoss as RelationalDistanceLoss
from prunelle.losses.reverse_kl import ReverseKLLoss as ReverseKLLoss
from prunelle.losses.self_attention_relation import SelfAttentionRelationLoss as SelfAttentionRelationLoss
from prunelle.losses.soft_targets import SoftTargetLoss as SoftTargetLoss
from prunelle.losses.top_k_targets import TopKTargetLoss as TopKTargetLoss
from prunelle.losses.top_k_targets import top_k_distribution as top_k_distribution

__all__ = [
    "AttentionMapLoss",
    "DecoupledLoss",
    "HardLabelLoss",
    "HiddenCosineLoss",
    "HiddenMSELoss",
    "HiddenProjection",
    "JensenShannonLoss",
    "LogitMSELoss",
    "PatientLoss",
    "RelationalAngleLoss",
    "RelationalDistanceLoss",
    "ReverseKLLoss",
    "SelfAttentionRelationLoss",
    "SoftTargetLoss",
    "TopKTargetLoss",
    "top_k_distribution",
]
