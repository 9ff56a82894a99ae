"""GeLU to ReLU: gradual, complete in the end, and a stock model then."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from prunelle.compression.activations import GeluToRelu
from prunelle.errors import InputError

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": SIZES,
    "ElectraForSequenceClassification": SIZES,
    "DistilBertForSequenceClassification": {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2},
    "ModernBertForSequenceClassification": {**SIZES, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
    | {"bos_token_id": 2, "eos_token_id": 3},
    "GPT2LMHeadModel": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
}
TOKENS = torch.arange(4, 28).view(2, 12)


def tiny(name: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**CONFIGS[name], initializer_range=0.3, **more)).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_left_is_a_stock_model_of_relus(name: str, tmp_path: Path) -> None:
    """Prevents a checkpoint that is loaded with GeLUs again, and activations of a head that are forgotten."""
    model = tiny(name)
    before = model(input_ids=TOKENS).logits
    method = GeluToRelu()
    method.attach(model)
    method.step(0.1)
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    with pytest.raises(RuntimeError, match=r"a share of 0\.0 ReLU"):
        method.finish()
    method.step(0.7)
    trained = model(input_ids=TOKENS).logits
    method.finish()
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=TOKENS).logits, trained)


def test_the_share_grows_linearly() -> None:
    """Prevents a jump, which is what the gradual change is to spare the model."""
    model = tiny("BertForMaskedLM")
    method = GeluToRelu(0.2, 0.3)
    method.attach(model)
    inputs = torch.linspace(-3, 3, 50, dtype=torch.double)
    for progress, share in ((0.0, 0.0), (0.2, 0.0), (0.3, 0.2), (0.45, 0.5), (0.7, 1.0), (1.0, 1.0)):
        method.step(progress)
        assert method.metrics() == {"relu_share": pytest.approx(share)}
        for blend in method.blends.values():
            gelu = inputs * (1 + torch.erf(inputs / 2**0.5)) / 2
            torch.testing.assert_close(blend(inputs), (1 - share) * gelu + share * inputs.clamp(min=0))
    assert len(method.blends) == 3


def test_a_model_without_gelus_is_refused() -> None:
    """Prevents an option that does nothing."""
    with pytest.raises(InputError, match="BertForMaskedLM has no GeLU"):
        GeluToRelu().attach(tiny("BertForMaskedLM", hidden_act="relu"))


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [
        ((0.5, 0.5), 10, r"0\.5 and .* 0\.5 leave nothing"),
        ((0.6, 0.6), 10, r"0\.6 and .* 0\.6 leave nothing"),
        ((-0.1, 0.3), 10, r"a warmup of -0\.1 must be a share"),
        ((0.1, 1.0), 10, r"a cooldown of 1\.0 must be a share"),
        ((0.1, 0.3), 0, r"has 0 optimizer steps, too few: GeLU would become ReLU from step 0 to step 0 "),
        ((0.6, 0.3), 10, r"has 10 optimizer steps, .* from step 6 to step 7 .* \(0\.6\) and cool-down \(0\.3\)"),
    ],
)
def test_a_change_that_cannot_be_gradual_is_refused(shares: tuple[float, float], steps: int, expected: str) -> None:
    """Prevents activations that change backwards, at once, or fail when the run is over."""
    with pytest.raises(InputError, match=expected):
        GeluToRelu(*shares).start(steps)
