"""Pictures show every number that they are given, once."""

import re

from prunelle.export.pictures import densities


def titles(density: dict[str, float], kept_layers: list[int] | None = None) -> list[str]:
    return re.findall("<title>(.*?)</title>", densities(density, kept_layers))


def test_matrices_of_encoder_and_decoder_stand_apart() -> None:
    """Prevents a decoder's layer from standing in the place of the encoder's of the same number."""
    names = ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.q"]
    names += ["decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q", "lm_head"]
    shares = (0.1, 0.2, 0.3, 0.4, 0.5)
    assert titles({f"{name}.weight": share for name, share in zip(names, shares, strict=True)}) == [
        "encoder.block.0 layer.0.SelfAttention.q: 10.00 % of its weights are left",
        "encoder.block.1 layer.0.SelfAttention.q: 20.00 % of its weights are left",
        "decoder.block.0 layer.0.SelfAttention.q: 30.00 % of its weights are left",
        "decoder.block.0 layer.1.EncDecAttention.q: 40.00 % of its weights are left",
        "lm_head : 50.00 % of its weights are left",
    ]


def test_layers_of_a_single_stack_are_numbers() -> None:
    """Prevents a layer that is gone from being shown with the weights that it had."""
    names = ["bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.output.dense.weight"]
    assert titles(dict.fromkeys(names, 0.5), [1]) == [
        "0 output.dense: 0.00 % of its weights are left",
        "1 output.dense: 50.00 % of its weights are left",
    ]
