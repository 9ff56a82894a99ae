"""Pruning: what of a model is left out, and models that are the smaller for it."""

from prunelle.compression.pruning.surgery import shrink as shrink

__all__ = ["shrink"]
