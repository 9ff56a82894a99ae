from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
)

from prunelle.errors import InputError
from prunelle.export import ExportError, OnnxRunner, export_onnx, export_variants
from prunelle.export.divergence import parting
from prunelle.export.inference import model_input_names
from prunelle.export.verification import verify_onnx


def run(file, inputs, output="logits"):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    return torch.from_numpy(session.run([output], {name: inputs[name].numpy() for name in names})[0])


def batch(rows, length, padded, side="right", pad=0, vocabulary=100):
    """`padded` positions of every row but the first are padding."""
    generator = torch.Generator().manual_seed(rows * length)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if padded:
        mask[1:, slice(-padded, None) if side == "right" else slice(padded)] = 0
    words = torch.randint(3, vocabulary, (rows, length), generator=generator).where(mask == 1, torch.tensor(pad))
    types = (torch.arange(length) % 2).expand(rows, length).contiguous()
    return {"input_ids": words, "attention_mask": mask, "token_type_ids": types}


SHAPES = [(1, 1, 0, "right"), (1, 48, 0, "right"), (4, 9, 5, "right"), (3, 20, 7, "left"), (7, 2, 1, "left")]


@pytest.mark.parametrize("kind", ["classifier", "language_model"])
@pytest.mark.parametrize(("rows", "length", "padded", "side"), SHAPES)
def test_logits_equal_at_any_shape(kind, rows, length, padded, side, request):
    """A dimension or a mask frozen at tracing gives right answers for the example's shape alone."""
    exported = request.getfixturevalue(kind)
    inputs = batch(rows, length, padded, side)
    with torch.inference_mode():
        expected = exported.model(**inputs).logits
    torch.testing.assert_close(run(exported.file, inputs), expected, atol=1e-5, rtol=1e-5)


def test_blocks_of_plain_text_have_token_types_of_0(language_model):
    """Masked-LM students of pretrained BERTs would be trained to the end and then not be measured."""
    inputs = batch(3, 8, 0)
    del inputs["token_type_ids"]
    with torch.inference_mode():
        expected = language_model.model(**inputs).logits
    runner = OnnxRunner(language_model.file, "onnx", parameters=0)
    assert "token_type_ids" in runner.input_names
    torch.testing.assert_close(torch.from_numpy(runner(inputs)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="onnx needs attention_mask, the batch has"):
        runner({"input_ids": inputs["input_ids"]})


def test_padding_is_masked(classifier):
    """An export that drops the mask still agrees with PyTorch wherever nothing is padded."""
    padded = batch(2, 12, 4)
    alone = {name: tensor[1:, :8] for name, tensor in padded.items()}
    torch.testing.assert_close(run(classifier.file, padded)[1:], run(classifier.file, alone), atol=1e-5, rtol=1e-5)


def test_attention_is_one_node_and_dimensions_are_free(classifier):
    """Attention in pieces is slower than PyTorch, and a fixed dimension shows only in production."""
    graph = onnx.load(classifier.file).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("Attention") == 1
    assert not {"Softmax", "IsNaN", "Where"} & set(operators)
    dimensions = {
        value.name: [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    tokens = ["batch_size", "sequence_length"]
    assert dimensions == {
        "input_ids": tokens,
        "attention_mask": tokens,
        "token_type_ids": tokens,
        "logits": ["batch_size", 3],
    }


def test_tied_embeddings_are_stored_once(language_model):
    """The output layer of a language model, stored beside its embeddings, makes the file twice as large."""
    sizes = [tuple(tensor.dims) for tensor in onnx.load(language_model.file).graph.initializer]
    assert sizes.count((300, 32)) + sizes.count((32, 300)) == 1


def test_the_model_comes_back_as_it_was(make_bert, tmp_path):
    """Training that goes on after an export must not go on without dropout or in another precision."""
    model = make_bert().to(torch.bfloat16).train()
    model.set_attn_implementation("eager")
    model.bert.encoder.layer[0].attention.eval()
    weight = model.classifier.weight
    expected = weight.detach().clone()

    file = export_onnx(model, tmp_path / "model.onnx", input_names=["input_ids", "attention_mask"])

    assert model.classifier.weight is weight
    assert torch.equal(weight, expected)
    assert model.training
    assert not model.bert.encoder.layer[0].attention.training
    assert model.config._attn_implementation == "eager"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert "Attention" in {node.op_type for node in onnx.load(file).graph.node}


class ChangedByTracing(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None):
        output = super().forward(input_ids, attention_mask)
        if torch.compiler.is_exporting():
            output.logits = output.logits + 0.01
        return output


def test_a_file_that_computes_something_else_is_not_published(make_bert, tmp_path):
    """A wrong file that stays behind is what gets deployed, whatever the message said."""
    file = tmp_path / "model.onnx"
    file.write_bytes(b"the one before")
    with pytest.raises(ExportError, match=r"differ from PyTorch's by 1\.0e-02.* which gives logits$"):
        export_onnx(make_bert(ChangedByTracing), file)
    assert file.read_bytes() == b"the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


class Untraceable(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None):
        raise RuntimeError("no\ntrace")


def test_a_model_that_cannot_be_traced_is_named_in_one_line(make_bert, tmp_path):
    """The exporter's own message is pages long, and the reason is buried in it."""
    with pytest.raises(ExportError) as caught:
        export_onnx(make_bert(Untraceable), tmp_path / "onnx" / "model.onnx")
    assert str(caught.value) == "Untraceable cannot be exported to ONNX: no"
    assert not list(tmp_path.rglob("*.onnx"))


class DependsOnData(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids if input_ids.sum() > 0 else -input_ids, attention_mask)


def test_nothing_but_that_line_is_said(make_bert, tmp_path, capfd):
    """The exporter prints the half of the graph that it has, which scrolls the reason off the screen."""
    with pytest.raises(ExportError, match=r"^DependsOnData cannot be exported to ONNX: .*data-dependent"):
        export_onnx(make_bert(DependsOnData), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


class NeedsTwoTokens(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        if input_ids.shape[1] < 2:
            raise IndexError("no second token")
        return super().forward(input_ids, attention_mask, token_type_ids)


def test_a_model_that_does_not_run_at_every_shape_is_named(make_bert, classifier):
    """Its own traceback says neither what was asked of it, nor that the export is what failed."""
    message = "^NeedsTwoTokens does not run at 1 x 1 tokens with no padding: no second token$"
    with pytest.raises(ExportError, match=message):
        verify_onnx(make_bert(NeedsTwoTokens), classifier.file)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
BOTH_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
# What of a small configuration is each one's own. All reach 48 tokens: tables with a padding index lose some to it.
ARCHITECTURES = {
    "bert": {"max_position_embeddings": 48},
    "roberta": {"max_position_embeddings": 50, "pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 50, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"max_position_embeddings": 48, "hidden_dim": 64},
    "electra": {"max_position_embeddings": 48, "embedding_size": 16},
    "mpnet": {"max_position_embeddings": 50, "pad_token_id": 1},
    "deberta-v2": {
        "max_position_embeddings": 48,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    "modernbert": {
        "max_position_embeddings": 48,
        "num_hidden_layers": 2,  # one attends to all tokens, the other to those near
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "pad_token_id": 0,
        **BOTH_ENDS,
    },
    "gpt2": {"n_positions": 48, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {
        "max_position_embeddings": 48,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
HEADS = {
    "text classification": AutoModelForSequenceClassification,
    "token classification": AutoModelForTokenClassification,
    "question answering": AutoModelForQuestionAnswering,
    "masked LM": AutoModelForMaskedLM,
    "causal LM": AutoModelForCausalLM,
}
DECODERS = ("gpt2", "llama")
PAIRS = [
    (architecture, head)
    for architecture in ARCHITECTURES
    for head in HEADS
    if (head == "causal LM") == (architecture in DECODERS)
]
# Each architecture once, each head more than once, BERT's by the tests above; `pytest -m matrix` runs the others.
ALWAYS = {
    ("roberta", "text classification"),
    ("xlm-roberta", "token classification"),
    ("distilbert", "masked LM"),
    ("electra", "question answering"),
    ("mpnet", "masked LM"),
    ("deberta-v2", "masked LM"),
    ("modernbert", "text classification"),
    ("gpt2", "causal LM"),
    ("llama", "causal LM"),
}


@pytest.mark.parametrize(
    ("architecture", "head"),
    [pytest.param(*pair, marks=[] if pair in ALWAYS else [pytest.mark.matrix]) for pair in PAIRS],
)
def test_every_architecture_and_head(architecture, head, tmp_path: Path):
    """Positions that skip padding, relative and rotary ones, and causal masks each break in a way of their own."""
    torch.manual_seed(0)
    classes = 2 if head == "question answering" else 3  # where answers start, and where they end
    config = AutoConfig.for_model(architecture, **{**SMALL, **ARCHITECTURES[architecture]}, num_labels=classes)
    model = HEADS[head].from_config(config).eval()
    files = export_variants(model, tmp_path)
    graph = onnx.load(files["int8-dynamic"]).graph
    stored = {tensor.name for tensor in graph.initializer}
    assert "MatMulInteger" in {node.op_type for node in graph.node}
    assert not [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored]

    expected, rounded = [], []
    for rows, length, padded, side in SHAPES:
        inputs = batch(rows, length, padded, side, pad=model.config.pad_token_id or 0)
        attended = inputs["attention_mask"] == 1 if head != "text classification" else slice(None)
        taken = {name: inputs[name] for name in model_input_names(model)}
        with torch.inference_mode():
            outputs = model(**taken)
        for output in ("start_logits", "end_logits") if head == "question answering" else ("logits",):
            logits = outputs[output][attended]
            torch.testing.assert_close(run(files["fp32"], inputs, output)[attended], logits, atol=1e-5, rtol=1e-5)
            expected.append(logits.flatten())
            rounded.append(run(files["int8-dynamic"], inputs, output)[attended].flatten())
        # Of a sound file no module is blamed, whatever its layers are made of.
        assert "they agree" in parting(model, files["fp32"], taken, inputs["attention_mask"].numpy() == 1)
    # 32 hidden units average little of the rounding away; a wrong scale or axis would leave nothing in common.
    assert torch.corrcoef(torch.stack([torch.cat(expected), torch.cat(rounded)]))[0, 1] > 0.95
