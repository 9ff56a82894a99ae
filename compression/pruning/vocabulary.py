"""Takes out of a tokenizer, and of the models that read it, the tokens that a corpus never uses.

Half of a small encoder's parameters are the rows of its embedding. What is left numbers its tokens anew, from 0, and
splits every text of the corpus as before.
"""

import copy
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.compression.rebuild import build, copied_config, fill
from prunelle.errors import InputError

State: TypeAlias = dict[str, Any]  # a tokenizer.json

TEXTS_AT_ONCE = 1000


def prune_vocabulary(
    texts: Iterable[str], tokenizer: Tokenizer, *models: PreTrainedModel
) -> tuple[Tokenizer, list[PreTrainedModel]]:
    """Makes a smaller copy of a tokenizer and of models that read it: with the tokens of a corpus alone.

    Kept are the tokens of the texts, as if none of them were cut; what merges need on the way to them (BPE); all added
    and special tokens, and those that configurations name; and every single character of a token that is kept, all
    256 bytes where the tokenizer spells with bytes. So a word that the corpus lacks is spelt in smaller pieces.

    Texts of the corpus are split as before, and on them a model's outputs are what they were; a language model's
    logits are those of the kept tokens.

    Args:
        texts: the corpus.
        tokenizer: a fast one, by words, WordPiece, BPE or Unigram.
        models: with as many rows in their vocabulary as the tokenizer has tokens, or more; they are left as they are.

    Returns:
        The tokenizer, and a copy of each model, in the order given, of the same class, device, dtype and mode. Ids in
        configurations (`pad_token_id`, `eos_token_id`, …) are the new ones.

    Raises:
        InputError: the tokenizer is not fast or of another kind, or a model carries masks or quantizers, or has fewer
            rows than there are tokens.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer, whose vocabulary could be rewritten")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] not in ("WordLevel", "WordPiece", "BPE", "Unigram"):
        raise InputError(f"the vocabulary of a {state['model']['type']} tokenizer cannot be pruned")
    ids = tokenizer.get_vocab()
    for model in models:
        _check(model, ids)

    token_of = {number: token for token, number in ids.items()}
    named = [number for model in models for number in _special_ids(model) if number in token_of]
    kept = _used(texts, state) | {token_of[number] for number in named} | _special_tokens(tokenizer, state)
    kept |= _spelling(kept, state) & ids.keys()
    # Positions are counted from the padding's id in RoBERTa's family: nothing before it may go.
    if _counts_from_pad(models):
        kept |= {token_of[number] for number in range((tokenizer.pad_token_id or 0) + 1)}
    merges: list[tuple[str, str]] = []
    if state["model"]["type"] == "BPE":
        pieces, merges = _ways(kept, state["model"])
        kept |= pieces

    in_model = _model_tokens(state["model"])
    # Tokens that are only added are numbered after those of the model.
    order = sorted(kept, key=lambda token: (token not in in_model, ids[token]))
    small = _rewritten(tokenizer, _pruned_state(state, order, merges))
    rows = [ids[token] for token in order]
    return small, [_with_rows(model, rows) for model in models]


def _check(model: PreTrainedModel, ids: dict[str, int]) -> None:
    for name, module in model.named_modules():
        if is_parametrized(module):
            raise InputError(f"{name} carries a mask or a quantizer; bake the model first")
    if model.config.vocab_size <= max(ids.values()):
        raise InputError(
            f"the vocabularies differ: {type(model).__name__} has {model.config.vocab_size} rows, and the tokenizer "
            f"tokens up to {max(ids.values())}"
        )


def _used(texts: Iterable[str], state: State) -> set[str]:
    """The tokens that the texts are made of, uncut."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))
    unknown = state["model"].get("unk_token")
    unknown_id = None if unknown is None else backend.token_to_id(unknown)
    used: set[int] = set()
    pieces: set[str] = set()
    remaining = iter(texts)
    while batch := list(islice(remaining, TEXTS_AT_ONCE)):
        for text, encoding in zip(batch, backend.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            used.update(encoding.ids)
            if state["model"]["type"] == "WordPiece" and unknown_id in encoding.ids:
                pieces |= _pieces_of_unknown_words(text, backend, state["model"])
    return pieces | {str(backend.id_to_token(number)) for number in used}


def _pieces_of_unknown_words(text: str, backend: tokenizers.Tokenizer, model: State) -> set[str]:
    """What WordPiece takes of a word before it finds no piece to go on with.

    Without these it would take smaller ones, and might get to the end.
    """
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text] if backend.pre_tokenizer is None else [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    found: set[str] = set()
    for word in words:
        start, prefix = 0, ""
        while len(word) <= model["max_input_chars_per_word"] and start < len(word):
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in model["vocab"]), None)
            if end is None:
                break
            found.add(prefix + word[start:end])
            start, prefix = end, model["continuing_subword_prefix"]
    return found


def _special_tokens(tokenizer: Tokenizer, state: State) -> set[str]:
    """Added tokens, special ones, those that are put around texts, and what Unigram's scores are reckoned from."""
    model, backend = state["model"], tokenizer.backend_tokenizer
    found = {token["content"] for token in state["added_tokens"]} | set(tokenizer.all_special_tokens)
    found |= {str(backend.id_to_token(number)) for number in _around(tokenizer)}
    if model["type"] == "Unigram":
        # What is unknown scores less than the lowest score by a fixed amount.
        found.add(min(model["vocab"], key=lambda piece: piece[1])[0])
        if model["unk_id"] is not None:
            found.add(model["vocab"][model["unk_id"]][0])
    elif model.get("unk_token") is not None:
        found.add(model["unk_token"])
    return found & tokenizer.get_vocab().keys()


def _around(tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer("")["input_ids"], *tokenizer("", "")["input_ids"]]


def _spelling(kept: set[str], state: State) -> set[str]:
    """Every single character of these tokens, as pieces are written, and all bytes."""
    model = state["model"]
    if model["type"] == "WordLevel":
        return set()
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    characters = set(chain.from_iterable(kept))
    if '"ByteLevel"' in json.dumps(state["pre_tokenizer"]):
        characters |= set(ByteLevel.alphabet())
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    return bytes_ | {start + c + end for c in characters for start in ("", prefix) for end in ("", suffix)}


def _ways(kept: set[str], model: State) -> tuple[set[str], list[tuple[str, str]]]:
    """How BPE comes from characters to these tokens: what it makes on the way, and its merges, in their order.

    Within a word nothing else happens to a token's characters, since no merge goes over the end of a token.
    """
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    made: set[str] = set()
    merges: set[tuple[str, str]] = set()
    for token in kept:
        pieces = _characters(token, prefix, suffix)
        seen, used = list(pieces), []
        while len(pieces) > 1:
            rank, place = min((ranks.get(pair, inf), place) for place, pair in enumerate(pairwise(pieces)))
            if rank == inf:
                break
            used.append((pieces[place], pieces[place + 1]))
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1].removeprefix(prefix)]
            seen.append(pieces[place])
        if pieces == [token]:  # else one that is added, or stands for a whole word only
            made.update(seen)
            merges.update(used)
    return made, sorted(merges, key=lambda merge: ranks[merge])


def _characters(token: str, prefix: str, suffix: str) -> list[str]:
    """What BPE begins with."""
    goes_on, ends = bool(prefix) and token.startswith(prefix), bool(suffix) and token.endswith(suffix)
    body = token.removeprefix(prefix).removesuffix(suffix)
    pieces = [prefix + c if place or goes_on else c for place, c in enumerate(body)]
    return [*pieces[:-1], pieces[-1] + suffix] if ends and pieces else pieces


def _model_tokens(model: State) -> set[str]:
    return {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else set(model["vocab"])


def _pruned_state(state: State, order: Sequence[str], merges: list[tuple[str, str]]) -> State:
    """The tokenizer.json with these tokens, numbered in this order."""
    new = {token: number for number, token in enumerate(order)}
    state = copy.deepcopy(state)
    model = state["model"]
    if model["type"] == "Unigram":
        unknown = None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
        scores = dict(model["vocab"])
        model["vocab"] = [[token, scores[token]] for token in order if token in scores]
        model["unk_id"] = None if unknown is None else new[unknown]
    else:
        model["vocab"] = {token: new[token] for token in order if token in model["vocab"]}
    if model["type"] == "BPE":
        model["merges"] = merges
    for token in state["added_tokens"]:
        token["id"] = new[token["content"]]
    state["added_tokens"].sort(key=lambda token: token["id"])
    if state["padding"] is not None:
        state["padding"]["pad_id"] = new[state["padding"]["pad_token"]]
    if state["post_processor"] is not None:
        for processor in state["post_processor"].get("processors", [state["post_processor"]]):
            _renumber(processor, new)
    return state


def _renumber(processor: State, new: dict[str, int]) -> None:
    """The ids of what is put around texts, in the three ways of writing it."""
    for name in ("cls", "sep"):
        if name in processor:
            token, _ = processor[name]
            processor[name] = [token, new[token]]
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [new[token] for token in special["tokens"]]


def _rewritten(tokenizer: Tokenizer, state: State) -> Tokenizer:
    """The tokenizer with another tokenizer.json, by way of its files: what comes back is what will be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            if file.name == "tokenizer.json":
                file.write_text(json.dumps(state), encoding="utf-8")
            elif file.name == "tokenizer_config.json":
                settings = json.loads(file.read_text(encoding="utf-8"))
                settings.pop("added_tokens_decoder", None)  # the old ids; tokenizer.json has them all
                file.write_text(json.dumps(settings), encoding="utf-8")
            elif file.suffix != ".jinja":
                file.unlink()  # the old vocabulary once more
        small = AutoTokenizer.from_pretrained(folder)
    small.name_or_path = tokenizer.name_or_path
    return small


def _special_ids(model: PreTrainedModel) -> Iterator[int]:
    for config in _configs(model):
        for _, value in _ids_in(config):
            yield from value if isinstance(value, list) else [value]


def _configs(model: PreTrainedModel) -> list[Any]:
    return [model.config, *([model.generation_config] if model.can_generate() else [])]


def _ids_in(config: Any) -> list[tuple[str, int | list[int]]]:
    """What a configuration calls special tokens, and their ids."""
    return [
        (name, value)
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_ids")) and value is not None
    ]


def _counts_from_pad(models: Iterable[PreTrainedModel]) -> bool:
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None)
        for model in models
        for name, module in model.named_modules()
    )


def _with_rows(model: PreTrainedModel, rows: Sequence[int]) -> PreTrainedModel:
    """A copy of the model with these rows of its vocabulary, wherever it has them."""
    new = {row: number for number, row in enumerate(rows)}
    config = copied_config(model)
    config.vocab_size = len(rows)
    _renumber_ids(config, new)
    small = build(type(model), config, model.dtype)
    places = torch.tensor(rows)
    weights = {}
    for name, tensor in model.state_dict().items():
        sizes = zip(tensor.shape, small.state_dict()[name].shape, strict=True)
        dim = next((dim for dim, (before, after) in enumerate(sizes) if before != after), None)
        weights[name] = tensor if dim is None else tensor.index_select(dim, places.to(tensor.device))
    fill(small, weights, model)
    if small.can_generate():
        _renumber_ids(small.generation_config, new)
    return small.train(model.training)


def _renumber_ids(config: Any, new: dict[int, int]) -> None:
    """Those of tokens that there are; a default beyond the vocabulary stays what it is, of no meaning."""
    for name, value in _ids_in(config):
        renumbered = [new.get(number, number) for number in value] if isinstance(value, list) else new.get(value, value)
        setattr(config, name, renumbered)
