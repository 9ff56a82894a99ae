"""Tokenizers that come with checkpoints: whether they can be used, and what they pad batches with."""

from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError, load_checkpoint_with


def load_tokenizer(name_or_path: str, flag: str | None = None) -> Tokenizer:
    """Load a checkpoint's tokenizer. One without a padding token, as GPT-2's and Llama's, pads with its end of a text.

    Args:
        flag: by which another would be given.

    Raises:
        InputError: There is none, or it knows no words.
    """
    tokenizer = load_checkpoint_with(AutoTokenizer.from_pretrained, name_or_path)
    # Where its files are missing `transformers` makes one up, of special tokens and at most the mark of a blank.
    if not any(token.strip("▁") for token in tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)):
        remedy = "save it beside the model" + (f", or give --{flag}" if flag else "")
        raise InputError(f"{name_or_path} holds no tokenizer, or one that knows nothing but special tokens: {remedy}")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_padding(tokenizer: Tokenizer) -> None:
    """See that a tokenizer can make texts equally long.

    Raises:
        InputError: It has no token to do it with.
    """
    if tokenizer.pad_token is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has no token to pad a batch with, nor an end of a text: add a "
            "pad_token to its tokenizer_config.json"
        )


def pad_alike(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Tell a classifier, in place, with what its texts are padded: a decoder looks for the last token before that.

    Language models are left as they are: they read full blocks, and a padding token's embedding is not trained.
    """
    if model.get_output_embeddings() is None:
        model.config.pad_token_id = tokenizer.pad_token_id
