"""How a student is made out of a teacher: some of its layers, in its own class or as a DistilBERT.

Either way the student is what its stock class builds from its config, filled with the teacher's weights.
So whatever it computes in memory, `from_pretrained` computes again from its checkpoint.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from prunelle.compression.layers import LayerList, find_stacks
from prunelle.compression.norms import LAYER_NORM
from prunelle.compression.rebuild import build, copied_config, fill
from prunelle.errors import InputError


def every_second_layer(depth: int) -> list[int]:
    """Chooses half of a teacher's layers, rounded up, from the first to the last, evenly spread.

    For 12 layers that is DistilBERT's choice (arXiv:1910.01108), 0, 2, 4, 7, 9, 11; for 6 it is 0, 2, 5;
    for an odd depth, exactly every second.

    Args:
        depth: how many layers the teacher has.

    Returns:
        The layers to keep, counted from 0, in ascending order.
    """
    kept = (depth + 1) // 2
    return [round(place * (depth - 1) / max(kept - 1, 1)) for place in range(kept)]


def student_from_layers(
    teacher: PreTrainedModel, layers: Sequence[int] | None, decoder_layers: Sequence[int] | None = None
) -> PreTrainedModel:
    """Makes a shallower copy of a model: the layers given, and everything else, of the teacher.

    Initializing a student so is DistilBERT's (arXiv:1910.01108), and for encoder-decoders "shrink and
    fine-tune" (arXiv:2010.13002), which keeps the encoder and a few layers of the decoder. Embeddings,
    head, and what the layers share (DeBERTa's relative positions, and its convolution after the first
    layer) are the teacher's. Tied embeddings stay tied, and each layer keeps its own kind of attention:
    lists in the config with one entry a layer, as `layer_types`, are cut to the layers kept.

    Args:
        teacher: any model whose layers `find_stacks` finds; it is left as it is.
        layers: which of its layers (of its encoder's, where it has a decoder beside) to keep, counted from
            0, in the order in which the student runs them. All of them when None.
        decoder_layers: the same of the decoder's.

    Returns:
        A model of the teacher's class, on its device, in its dtype, in evaluation mode. It shares no tensor
        with the teacher, and all of its parameters can be trained.

    Raises:
        InputError: `layers` is empty, repeats a layer or names one that does not exist; the teacher carries
            parametrizations, which must be baked first; or a layer would compute something else at its
            place in the student than it did in the teacher. The first layer of ModernBERT alone has no
            attention norm, for instance. In the stock class a later layer put first would lose its norm
            (which cannot be folded into other weights exactly, since it also centres and scales each
            token), so a ModernBERT student must begin with layer 0; so must both stacks of a T5, whose
            first layers hold the relative positions of all. Or `decoder_layers` are given and the teacher
            is no encoder-decoder.
    """
    for name, module in teacher.named_modules():
        if is_parametrized(module):
            raise InputError(f"the teacher's {name} carries a mask or a quantizer; bake the teacher first")
    stacks = find_stacks(teacher)
    if len(stacks) == 1 and decoder_layers is not None:
        raise InputError(f"{type(teacher).__name__} has no encoder beside a decoder: its layers are chosen alone")
    chosen = zip(stacks, (layers, decoder_layers), strict=False)
    kept = [list(range(len(stack.modules)) if numbers is None else numbers) for stack, numbers in chosen]
    kinds = ["layer"] if len(stacks) == 1 else ["encoder layer", "decoder layer"]
    for stack, numbers, kind in zip(stacks, kept, kinds, strict=True):
        _check_choice(numbers, len(stack.modules), kind)

    config = _config_of_layers(teacher, stacks, kept)
    student = build(type(teacher), config, teacher.dtype)
    for stack, places, numbers, kind in zip(stacks, find_stacks(student), kept, kinds, strict=True):
        for place, number in enumerate(numbers):
            _check_same_computation(stack.modules[number], places.modules[place], number, place, kind)

    weights = {}
    for name, tensor in teacher.state_dict().items():
        if (new_name := _name_in_student(name, stacks, kept)) is not None:
            weights[new_name] = tensor
    return fill(student, weights, teacher)


def distilbert_from_bert(teacher: PreTrainedModel, layers: Sequence[int] | None = None) -> PreTrainedModel:
    """Makes a DistilBERT out of a BERT (arXiv:1910.01108): the same layers, fewer, under DistilBERT's names.

    With all layers taken, its hidden states are BERT's for inputs of token type 0:

    - DistilBERT has no token types. The embedding of type 0 is added to every position's, which loses
      nothing; the published script drops it. (Added to the words it would reach the tied LM head too.)
      Inputs of token type 1 are seen as type 0.
    - For classification and multiple choice, BERT's pooler becomes `pre_classifier`. DistilBERT follows it
      with ReLU where BERT has tanh, so logits differ from the teacher's until the student is trained.
    - The masked LM head is carried over whole; next-sentence prediction and the pooler of a bare `BertModel`
      have no place in DistilBERT and are left out.
    - DistilBERT's layer norms have a fixed epsilon of 1e-12, BERT's by default too. A teacher with another
      one gets a warning, since no config can carry it over.

    Args:
        teacher: a BERT model, bare or with a head for masked LM, pretraining, sequence or token
            classification, question answering or multiple choice; it is left as it is.
        layers: which of its layers to keep, counted from 0, in the order in which the student runs them;
            `every_second_layer` by default.

    Returns:
        The DistilBERT with the matching head, on the teacher's device, in its dtype, in evaluation mode. It
        shares no tensor with the teacher. Sizes, dropout, activation, pad id and labels are the teacher's.

    Raises:
        InputError: the teacher is not such a BERT, or is one that decodes; or `layers` is refused as in
            `student_from_layers`.
    """
    if type(teacher) not in _DISTILBERT_OF:
        raise InputError(
            f"a DistilBERT student cannot be made from {type(teacher).__name__}: the teacher must be one of "
            + ", ".join(bert.__name__ for bert in _DISTILBERT_OF)
        )
    if teacher.config.is_decoder:
        raise InputError(
            "a DistilBERT student cannot be made from a BERT with config.is_decoder: DistilBERT attends "
            "both ways; give a BERT encoder"
        )
    if layers is None:
        layers = every_second_layer(teacher.config.num_hidden_layers)

    shallow = student_from_layers(teacher, layers)
    config = _distilbert_config(shallow.config)
    stock = _DISTILBERT_OF[type(teacher)]
    student = build(stock, config, teacher.dtype)

    embeddings = shallow.base_model.embeddings
    with torch.no_grad():
        embeddings.position_embeddings.weight += embeddings.token_type_embeddings.weight[0]

    weights = {_distilbert_name(name): tensor for name, tensor in shallow.state_dict().items()}
    # What DistilBERT has no place for is left out; that nothing of its own is missing is checked on loading.
    return fill(student, {name: weights[name] for name in student.state_dict() if name in weights}, teacher)


def _check_choice(layers: Sequence[int], depth: int, kind: str) -> None:
    if not layers:
        raise InputError(f"no student {kind}s given; name at least one of 0 to {depth - 1}")
    if unknown := [layer for layer in layers if not 0 <= layer < depth]:
        raise InputError(f"student {kind} {unknown[0]} does not exist: the teacher's are 0 to {depth - 1}")
    if repeated := [layer for layer in layers if layers.count(layer) > 1]:
        raise InputError(f"student {kind} {repeated[0]} is given more than once; name each layer once")


def _config_of_layers(
    teacher: PreTrainedModel, stacks: Sequence[LayerList], kept: Sequence[Sequence[int]]
) -> PreTrainedConfig:
    config = copied_config(teacher)
    if len(stacks) == 1:
        for name, value in list(vars(config).items()):
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == len(stacks[0].modules):
                setattr(config, name, type(value)(value[layer] for layer in kept[0]))
    # ModernBERT's old way to write layer_types, which wins. Left in, it would now contradict them.
    vars(config).pop("global_attn_every_n_layers", None)
    for stack, layers in zip(stacks, kept, strict=True):
        setattr(config, stack.depth, len(layers))
    return config


def _name_in_student(name: str, stacks: Sequence[LayerList], kept: Sequence[Sequence[int]]) -> str | None:
    """What a weight of the teacher is called in the student; None for one of a layer left out."""
    for stack, layers in zip(stacks, kept, strict=True):
        if name.startswith(f"{stack.name}."):
            layer, rest = name.removeprefix(f"{stack.name}.").split(".", maxsplit=1)
            return f"{stack.name}.{layers.index(int(layer))}.{rest}" if int(layer) in layers else None
    return name


def _check_same_computation(old: nn.Module, new: nn.Module, layer: int, place: int, kind: str) -> None:
    """A class may build its layers by their index (norms, windows, scales), which a weight cannot show."""
    before, after = dict(_settings(old)), dict(_settings(new))
    for name in before | after:
        if before.get(name) != after.get(name):
            advice = "keep layer 0, as the first" if 0 in (layer, place) else "leave this layer out"
            raise InputError(
                f"student {kind} {layer} would not compute at place {place} what it did in the teacher: its "
                f"{name} would be {after.get(name)} instead of {before.get(name)}; {advice}"
            )


def _settings(layer: nn.Module) -> Iterator[tuple[str, object]]:
    """All that tells one layer's computation from another's, apart from its weights."""
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        yield f"{prefix}class", type(module).__name__
        for name, value in vars(module).items():
            # The index itself only says which slot of a cache is the layer's; the others are how it is run.
            incidental = name.startswith("_") or name in ("layer_idx", "training", "gradient_checkpointing")
            if not incidental and (value is None or isinstance(value, (bool, int, float, str))):
                yield f"{prefix}{name}", value


_DISTILBERT_OF: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    BertModel: DistilBertModel,
    BertForPreTraining: DistilBertForMaskedLM,
    BertForMaskedLM: DistilBertForMaskedLM,
    BertForSequenceClassification: DistilBertForSequenceClassification,
    BertForTokenClassification: DistilBertForTokenClassification,
    BertForQuestionAnswering: DistilBertForQuestionAnswering,
    BertForMultipleChoice: DistilBertForMultipleChoice,
}

# In this order: some of the later parts are contained in earlier ones.
_DISTILBERT_NAMES = {
    "bert.pooler.dense.": "pre_classifier.",
    "bert.": "distilbert.",
    "encoder.layer.": "transformer.layer.",
    "attention.self.query.": "attention.q_lin.",
    "attention.self.key.": "attention.k_lin.",
    "attention.self.value.": "attention.v_lin.",
    "attention.output.dense.": "attention.out_lin.",
    "attention.output.LayerNorm.": "sa_layer_norm.",
    "intermediate.dense.": "ffn.lin1.",
    "output.dense.": "ffn.lin2.",
    "output.LayerNorm.": "output_layer_norm.",
    "cls.predictions.transform.dense.": "vocab_transform.",
    "cls.predictions.transform.LayerNorm.": "vocab_layer_norm.",
    "cls.predictions.decoder.": "vocab_projector.",
}


def _distilbert_name(name: str) -> str:
    for bert, distilbert in _DISTILBERT_NAMES.items():
        name = name.replace(bert, distilbert)
    return name


def _distilbert_config(bert: PreTrainedConfig) -> DistilBertConfig:
    epsilon = 1e-12
    if bert.layer_norm_eps != epsilon:
        warnings.warn(
            f"the teacher's layer_norm_eps is {bert.layer_norm_eps}, the DistilBERT student's is always "
            f"{epsilon}: its hidden states begin slightly off",
            stacklevel=3,
        )
    classifier_dropout = bert.classifier_dropout
    return DistilBertConfig(
        **{key: value for key in ("layer_shapes", LAYER_NORM) if (value := getattr(bert, key, None)) is not None},
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        sinusoidal_pos_embds=False,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        seq_classif_dropout=bert.hidden_dropout_prob if classifier_dropout is None else classifier_dropout,
        qa_dropout=0.0,  # BERT's question answering has none
        activation=bert.hidden_act,
        initializer_range=bert.initializer_range,
        pad_token_id=bert.pad_token_id,
        bos_token_id=bert.bos_token_id,
        eos_token_id=bert.eos_token_id,
        tie_word_embeddings=bert.tie_word_embeddings,
        id2label=bert.id2label,
        label2id=bert.label2id,
        problem_type=bert.problem_type,
        attn_implementation=bert._attn_implementation,
    )
