"""Tokens that a corpus never uses go; its texts, and what models make of them, stay as they were."""

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertTokenizer, PreTrainedTokenizerFast

import prunelle
from prunelle.compression import student_from_layers
from prunelle.compression.anatomy import dissect, matrix
from prunelle.compression.pruning import prune_vocabulary, shrink
from prunelle.errors import InputError

WORDS = ["".join(random.Random(seed).choices("abcdefghiklmnopqrstuvw", k=3 + seed % 6)) for seed in range(300)]
CORPUS = [" ".join(random.Random(seed).choices([*WORDS[:40], "Été", "☃"], k=9)) for seed in range(20)]
LEARNED_FROM = [" ".join(WORDS[start : start + 5]) for start in range(295)] + CORPUS
MASKED = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
# Not first in the vocabulary, and with a token of the text before them.
AROUND = ["zz", "<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def bpe(around: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=around, initial_alphabet=alphabet))
    return tokenizer


def learn(tokenizer: tokenizers.Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(LEARNED_FROM, trainer)


def gpt2() -> Any:
    tokenizer = bpe([])
    tokenizer.add_special_tokens(["<|endoftext|>"])  # numbered after the vocabulary
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def roberta() -> Any:
    tokenizer = bpe(AROUND)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 1))
    tokenizer.enable_padding(pad_id=2, pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **MASKED)


def words_with_ends() -> Any:
    """As the first GPT's: characters, of which the last in a word is another."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learn(tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=AROUND, end_of_word_suffix="</w>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **MASKED)


def unigram() -> Any:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    learn(tokenizer, trainers.UnigramTrainer(vocab_size=400, special_tokens=specials, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["<x>"]
    )


def wordpiece() -> Any:
    pieces = sorted({word[:3] for word in WORDS} | {f"##{word[3:]}" for word in WORDS if word[3:]})
    letters = [start + letter for letter in "abcdefghiklmnopqrstuvwxyz" for start in ("", "##")]
    specials = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={piece: n for n, piece in enumerate(dict.fromkeys([*specials, *pieces, *letters]))})


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
KINDS = {
    "BertForSequenceClassification": (wordpiece, SIZES),
    "DistilBertForMaskedLM": (wordpiece, {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}),
    "RobertaForMaskedLM": (roberta, SIZES),
    "ElectraForTokenClassification": (words_with_ends, {**SIZES, "embedding_size": 8}),
    "GPT2LMHeadModel": (gpt2, GPT2),
    "GPT2ForSequenceClassification": (gpt2, GPT2),
    "T5ForConditionalGeneration": (unigram, {**T5, "decoder_start_token_id": 0}),
}


def make(name: str) -> tuple[Any, Any]:
    tokenizer_of, sizes = KINDS[name]
    tokenizer, model_class = tokenizer_of(), getattr(transformers, name)
    names = ("pad", "bos", "eos", "cls", "sep")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    config = model_class.config_class(**{"vocab_size": len(tokenizer) + 3, **ids, **sizes})
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return tokenizer, model


def logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", KINDS)
def test_the_corpus_is_read_as_before(name: str, tmp_path: Path) -> None:
    """Prevents rows at the wrong ids, words split otherwise, special tokens lost, biases and positions left behind."""
    tokenizer, model = make(name)
    small_tokenizer, (small,) = prune_vocabulary(iter(CORPUS), tokenizer, model)
    small_tokenizer.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    small_tokenizer, small = AutoTokenizer.from_pretrained(tmp_path), prunelle.from_pretrained(str(tmp_path))

    tokens = small_tokenizer.convert_ids_to_tokens(range(len(small_tokenizer)))
    assert len(tokens) == small.config.vocab_size == small.get_input_embeddings().num_embeddings < 0.9 * len(tokenizer)
    rows = tokenizer.convert_tokens_to_ids(tokens)
    for text in CORPUS:
        ids, before = small_tokenizer(text)["input_ids"], tokenizer(text)["input_ids"]
        assert [rows[number] for number in ids] == before
        assert small_tokenizer.decode(ids) == tokenizer.decode(before)
    expected = logits(model, tokenizer, CORPUS)
    if expected.shape[-1] == model.config.vocab_size:
        expected = expected[..., rows]
    torch.testing.assert_close(logits(small, small_tokenizer, CORPUS), expected, rtol=0, atol=1e-5)
    assert small_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    for special in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if (before := getattr(model.config, special, None)) is not None:
            assert rows[getattr(small.config, special)] == before
    if small.can_generate() and model.generation_config.eos_token_id is not None:
        assert rows[small.generation_config.eos_token_id] == model.generation_config.eos_token_id


def test_every_token_that_is_left_is_of_use() -> None:
    """Prevents rows kept for nothing, and merges without the pieces that they make or need."""
    merges = [("l", "o"), ("lo", "w"), ("e", "r"), ("low", "er"), ("n", "e"), ("ne", "w"), ("w", "er"), ("o", "w")]
    pieces = dict.fromkeys([*"lowernx", *(left + right for left, right in merges), "[UNK]"])
    backend = tokenizers.Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    small, _ = prune_vocabulary(["lower low"], PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    assert set(small.get_vocab()) == {*"lower", "lo", "low", "er", "lower", "[UNK]"}
    assert small.tokenize("lower owe x") == ["lower", "o", "w", "e", "[UNK]"]

    small, _ = prune_vocabulary([WORDS[0]], wordpiece())
    first, rest = WORDS[0][:3], f"##{WORDS[0][3:]}"
    letters = {start + letter for letter in WORDS[0] for start in ("", "##")}
    assert set(small.get_vocab()) == {first, rest, *letters, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - {"##"}


def test_an_unknown_word_stays_unknown() -> None:
    """Prevents a word that WordPiece gave up from being spelt, once the piece that led it astray is gone."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "abc", "ab", "x", "##cd", "other"]
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    small, _ = prune_vocabulary(["abcd", "ab", "xcd"], tokenizer)
    assert small.tokenize("abcd ab xcd") == ["[UNK]", "ab", "x", "##cd"]
    assert "other" not in small.get_vocab()


def test_an_unseen_word_is_spelt() -> None:
    """Prevents unknown tokens where letters would do, and bytes that a tokenizer has no token for."""
    text = WORDS[0] + WORDS[1][::-1]
    for tokenizer, unseen in ((wordpiece(), text), (roberta(), "日本")):
        small, _ = prune_vocabulary(CORPUS, tokenizer)
        assert small.unk_token not in small.tokenize(unseen)
        assert "".join(small.tokenize(unseen)).replace("##", "") == "".join(tokenizer.tokenize(unseen)).replace(
            "##", ""
        )


def test_two_models_and_what_else_was_done_to_them(tmp_path: Path) -> None:
    """Prevents a teacher that reads other ids than its student, and layers that come back at full size."""
    tokenizer, teacher = make("BertForSequenceClassification")
    with torch.no_grad():
        matrix(dissect(teacher)[0].ffn.consumer[1])[:, 8:] = 0
    pruned = shrink(teacher)
    small_tokenizer, (large, small) = prune_vocabulary(CORPUS, tokenizer, student_from_layers(teacher, [1]), pruned)
    assert large.config.vocab_size == small.config.vocab_size
    torch.testing.assert_close(
        logits(small, small_tokenizer, CORPUS), logits(pruned, tokenizer, CORPUS), rtol=0, atol=1e-5
    )
    small.save_pretrained(tmp_path)
    assert prunelle.from_pretrained(str(tmp_path)).config.layer_shapes == pruned.config.layer_shapes


def test_what_cannot_be_pruned_is_refused() -> None:
    """Prevents an embedding that is looked up beyond its end."""
    tokenizer = wordpiece()
    model = transformers.BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer) - 1))
    with pytest.raises(InputError, match=f"BertModel has {len(tokenizer) - 1} rows, and the tokenizer tokens up to"):
        prune_vocabulary(CORPUS, tokenizer, model)
