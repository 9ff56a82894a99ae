"""LayerNorm to NoNorm: gradual, complete in the end, and loaded as what it is."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import prunelle
from prunelle.compression import distilbert_from_bert
from prunelle.compression.anatomy import dissect, matrix
from prunelle.compression.norms import MEMORY, LayerNormToNoNorm, NoNorm
from prunelle.compression.pruning import shrink
from prunelle.errors import InputError
from prunelle.export import export_onnx
from prunelle.export.runner import OnnxRunner

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": SIZES,
    "RobertaForSequenceClassification": SIZES,
    "DistilBertForSequenceClassification": {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2},
    "ModernBertForSequenceClassification": {**SIZES, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
    | {"bos_token_id": 2, "eos_token_id": 3},
    "GPT2LMHeadModel": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
}
TOKENS = torch.arange(4, 28).view(2, 12)


def tiny(name: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**CONFIGS[name], initializer_range=0.3, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def without_norms(name: str) -> PreTrainedModel:
    """As it comes out of a run."""
    model, method = tiny(name), LayerNormToNoNorm()
    method.attach(model)
    for progress in (0.0, 0.3, 0.5):
        method.step(progress)
        model.train()(input_ids=TOKENS)
    method.step(1.0)
    trained = model.eval()(input_ids=TOKENS).logits
    method.finish()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, trained)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_left_is_loaded_without_norms(name: str, tmp_path: Path) -> None:
    """Prevents a checkpoint that comes back with LayerNorms, in silence: a stock class is to refuse it."""
    model = without_norms(name)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded, loading = prunelle.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(loaded) is type(model)
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path)


def test_means_and_variances_move_to_constants() -> None:
    """Prevents a jump, which is what the gradual change is to spare the model, and means of something else."""
    model = tiny("BertForMaskedLM")
    before = model(input_ids=TOKENS).logits
    method = LayerNormToNoNorm(0.2, 0.3)
    method.attach(model)
    method.step(0.1)
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    assert len(method.blends) == 6  # of the embeddings, twice two of layers, and of the head
    with pytest.raises(RuntimeError, match=r"a share of 0\.0 NoNorm"):
        method.finish()

    blend = method.blends["bert.encoder.layer.0.output.LayerNorm"]
    norm = blend.norm.double()
    batches = [torch.randn(3, 5, 16, dtype=torch.double) * scale + 1 for scale in (1, 2, 3, 4)]
    mean = variance = 0.0
    for number, (progress, batch) in enumerate(zip((0.2, 0.3, 0.45, 0.6), batches, strict=True), 1):
        method.step(progress)
        share = (progress - 0.2) / 0.5
        assert method.metrics() == {"nonorm_share": pytest.approx(share)}
        mean += (batch.mean() - mean) / number
        variance += (batch.var(-1, correction=0).mean() - variance) / number
        means = (1 - share) * batch.mean(-1, keepdim=True) + share * mean
        variances = (1 - share) * batch.var(-1, keepdim=True, correction=0) + share * variance
        expected = (batch - means) / (variances + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(blend.train()(batch), expected, rtol=1e-5, atol=1e-5)  # it remembers in float32
    method.step(0.7)
    constant = (batches[0] - mean) / (variance + norm.eps) ** 0.5 * norm.weight + norm.bias
    for each in (blend.train(), blend.eval(), blend.finished()):
        torch.testing.assert_close(each(batches[0]), constant, rtol=1e-5, atol=1e-5)
    assert blend.batches == 4 < MEMORY  # from then on they stay


def test_smaller_models_are_made_of_one_without_norms(tmp_path: Path) -> None:
    """Prevents LayerNorms from coming back where a model is built anew: shrunk, or as a DistilBERT."""
    model = without_norms("BertForMaskedLM")
    with torch.no_grad():
        heads = dissect(model)[0].heads
        matrix(heads.consumer[1])[:, heads.inputs([1])] = 0
    logits = model(input_ids=TOKENS).logits
    small = shrink(model)
    small.save_pretrained(tmp_path)
    loaded = prunelle.from_pretrained(str(tmp_path))
    assert [layer.heads.count for layer in dissect(loaded)] == [1, 2]
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, logits, rtol=0, atol=1e-4)
    student = distilbert_from_bert(model, [0, 1])
    assert any(isinstance(module, NoNorm) for module in student.modules())
    assert not any(isinstance(module, nn.LayerNorm) for module in student.modules())


def test_the_exported_file_has_no_norms(tmp_path: Path) -> None:
    """Prevents an export that normalizes still, or multiplies by weights of another shape."""
    model = without_norms("RobertaForSequenceClassification")
    export_onnx(model, tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"LayerNormalization", "ReduceMean", "Sqrt"}
    ones, zeros = torch.ones_like(TOKENS), torch.zeros_like(TOKENS)
    inputs = {"input_ids": TOKENS, "attention_mask": ones, "token_type_ids": zeros}
    logits = OnnxRunner(tmp_path / "model.onnx", "onnx", parameters=0)(inputs)
    torch.testing.assert_close(torch.as_tensor(logits), model(**inputs).logits, rtol=0, atol=1e-4)


def test_a_model_without_layer_norms_is_refused() -> None:
    """Prevents an option that does nothing."""
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(InputError, match="T5ForConditionalGeneration has no LayerNorm"):
        LayerNormToNoNorm().attach(model)
    with pytest.raises(InputError, match="the run has 0 optimizer steps, too few: LayerNorm would become NoNorm"):
        LayerNormToNoNorm().start(0)
