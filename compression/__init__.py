"""What a model carries while it is made smaller, and how a smaller one is made out of it."""

from prunelle.compression.bake import bake as bake
from prunelle.compression.layers import LayerList as LayerList
from prunelle.compression.layers import decoder_depth as decoder_depth
from prunelle.compression.layers import find_layers as find_layers
from prunelle.compression.layers import find_stacks as find_stacks
from prunelle.compression.loading import from_pretrained as from_pretrained
from prunelle.compression.method import CompressionMethod as CompressionMethod
from prunelle.compression.pruning.density import bake_masks as bake_masks
from prunelle.compression.student import distilbert_from_bert as distilbert_from_bert
from prunelle.compression.student import every_second_layer as every_second_layer
from prunelle.compression.student import student_from_layers as student_from_layers

__all__ = [
    "CompressionMethod",
    "LayerList",
    "bake",
    "bake_masks",
    "decoder_depth",
    "distilbert_from_bert",
    "every_second_layer",
    "find_layers",
    "find_stacks",
    "from_pretrained",
    "student_from_layers",
]
