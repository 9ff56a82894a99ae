"""The built-in data, `builtin:docstrings`: which library does this docstring come from?

The docstrings of Python's standard library and of the libraries that every installation of Prunelle
brings along, read from their source files (nothing is imported or run), reduced to plain prose, with the
libraries' names struck out. It needs no network, and serves text classification and language modelling.
"""

import ast
import hashlib
import json
import os
import platform
import re
import sysconfig
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import datasets

from prunelle.errors import InputError

CLEANING_VERSION = 1
"""Part of the cache's key: raise it with every change to this file that changes a text or a label."""

STANDARD_LIBRARY = "python"
LIBRARIES = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "networkx",
    "numpy",
    "onnxruntime",
    "onnxscript",
    "pandas",
    STANDARD_LIBRARY,
    "sympy",
    "tensorboard",
    "torch",
    "transformers",
)
"""The labels. Each is a distribution that `prunelle` requires, directly or through another; what else
happens to be installed is not looked at, so that every machine has the same classes."""

MIN_WORDS, MAX_WORDS = 8, 80
MIN_EXAMPLES, MAX_EXAMPLES = 300, 1000
"""A library with fewer examples is left out; one with more (torch has thousands) does not swamp the rest."""

SPLITS = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}
"""Which values of a text's hash modulo 100 belong to which split."""


def load_docstrings() -> datasets.DatasetDict:
    """The splits train, validation and test, with the columns `text` and `label` (a `ClassLabel`).

    The first call reads the source files (some 15 seconds) and leaves the result in the Hugging Face
    datasets cache, under a name that changes with the versions of Python and of the libraries; later calls
    load it from there.

    Raises:
        InputError: no library had enough docstrings, as happens where source files were stripped.
    """
    cached = Path(datasets.config.HF_DATASETS_CACHE) / f"prunelle-docstrings-{_fingerprint()}"
    if not cached.is_dir():
        _save_atomically(_build(), cached)
    return datasets.load_from_disk(str(cached))


def _fingerprint() -> str:
    versions = {name: metadata.version(name) for name in LIBRARIES if name != STANDARD_LIBRARY}
    versions[STANDARD_LIBRARY] = platform.python_version()
    return _sha256(json.dumps([CLEANING_VERSION, versions], sort_keys=True))[:16]


def _save_atomically(splits: datasets.DatasetDict, folder: Path) -> None:
    """Several processes may do this at once: each writes its own folder, and the first to rename it wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        unfinished = Path(temporary) / folder.name
        splits.save_to_disk(str(unfinished))
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # not a lost race: say what went wrong
                raise


def _build() -> datasets.DatasetDict:
    seen: set[tuple[str, ...]] = set()
    texts = {library: _collect(library, seen) for library in LIBRARIES}
    labels = [library for library in LIBRARIES if len(texts[library]) >= MIN_EXAMPLES]
    if not labels:
        raise InputError(
            "builtin:docstrings is empty: the installed libraries have no docstrings in their .py files "
            "(were the sources stripped?); give --dataset_name or --train_file instead"
        )
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=labels)})
    # Ordered by hash: shuffled, yet the same everywhere.
    examples = sorted((_sha256(text), text, label) for label in labels for text in texts[label])
    splits = datasets.DatasetDict()
    for split, buckets in SPLITS.items():
        chosen = [(text, label) for digest, text, label in examples if int(digest, 16) % 100 in buckets]
        columns = {"text": [text for text, _ in chosen], "label": [label for _, label in chosen]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- From a library to its docstrings


def _collect(library: str, seen: set[tuple[str, ...]]) -> list[str]:
    """At most MAX_EXAMPLES clean texts of one library, none of them close to one that was `seen` before."""
    texts: list[str] = []
    for path in _source_files(library):
        for docstring in _docstrings(path):
            text = clean(docstring)
            if text and not _is_known(text, seen):
                texts.append(text)
        if len(texts) >= MAX_EXAMPLES:
            break
    return texts[:MAX_EXAMPLES]


SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "site-packages", "dist-packages", "__pycache__"),
    *("_vendor", "vendor", "third_party"),  # another library's docstrings
    *("idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
}


def _source_files(library: str) -> Iterator[Path]:
    """The library's .py files in an order that mixes its folders and is the same on every machine, so that
    one may stop once there is enough."""
    if library == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    else:
        listed = metadata.distribution(library).files or []
        files = {file.as_posix(): Path(str(file.locate())) for file in listed if file.suffix == ".py"}
    for name in sorted(files, key=_sha256):
        generated = name.endswith(("_pb2.py", "_pb2_grpc.py"))
        if not generated and SKIPPED_FOLDERS.isdisjoint(name.split("/")):
            yield files[name]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escape sequences in other people's files
            nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (OSError, SyntaxError, ValueError):  # not there, or written for another version of Python
        return
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        # Docstrings hang on statements: not to descend into expressions saves half of the time.
        nodes.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def _is_known(text: str, seen: set[tuple[str, ...]]) -> bool:
    """Whether more than half of the text's runs of five words were seen before; adds them if not."""
    words = re.findall(r"[a-z]+", text.lower())
    runs = {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
    if len(runs & seen) > len(runs) / 2:
        return True
    seen |= runs
    return False


# --- From a docstring to prose

BOILERPLATE = re.compile(
    r"copyright|all rights reserved|warrant(y|ies)|licensed under|do not edit|auto-?generated|generated by", re.I
)
SECTION = re.compile(  # the first of these ends the description: what follows is lists, types and code
    r"^[ \t]*(?:#+ *|\*\*)?(?:(?:Keyword |Other |Optional )?(?:Args?|Arguments|Param(?:eter)?s?|Inputs?|Outputs?)"
    r"|Returns?|Yields?|Raises|Warns|Attributes|Methods|Examples?|Usage|Usage examples?|See Also|References?"
    r"|Shapes?|Type Constraints|Keyword arguments)(?:\*\*)?[ \t]*(?::|\n[ \t]*[-=~]{3,}|\n|$)"
    r"|^[ \t]*[:@](?:param|parameter|arg|type|returns?|rtype|raises?|ivar|cvar|var|keyword|key)\b"
    r"|^[ \t]*>>>",
    re.M | re.I,
)
FENCED_CODE = re.compile(r"^[ \t]*(```|~~~).*?(^[ \t]*\1|\Z)", re.M | re.S)
UNDERLINED = re.compile(r"^.*\n[ \t]*([-=~^*#\"'+.])\1{2,}[ \t]*$", re.M)
NOT_PROSE = re.compile(  # how a paragraph begins that is a directive, comment, table, signature or code
    r"\s|\.\.|[|+=]|@|#|%|\$|\[\[|[\w.]+\([^)]*\)(?:\s*->.*)?$|(?:import|from) [\w.]+|\w[\w.\[\]]* = |class \w+[(:]|def \w+\(",
    re.M,
)
MARKUP = [
    (r":math:`[^`]*`|\$\$?[^$]+\$\$?|\\[(\[].*?\\[)\]]", " "),
    (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"),  # [text](address)
    (r"`+([^`<]*?)\s*<[^`>]*>`+_*", r"\1"),  # `text <address>`_
    (r"(?::[\w+.-]+)+:`+~?!?([^`]*)`+", r"\1"),  # :role:`text`
    (r"<?\b(?:https?|ftp)://[^\s>)\]]+>?|\bwww\.[^\s>)\]]+", " "),
    (r"</?[A-Za-z][^<>\n]*>", " "),  # <Tip>
    (r"\[[\w#^]+\]_?|\|\w+\|_?", " "),  # [1]_, |substitution|
    (r"^\s*(?:[-*+•]|\(?\d+[.)]|#+)\s+", " "),  # bullets
    (r"\\[A-Za-z]+|[`*\\{}|~^]+|_{2,}|(?<=\w)_(?!\w)|::+|[-=#.]{3,}", " "),
]
MARKUP_PATTERNS = [(re.compile(pattern, re.M | re.S), replacement) for pattern, replacement in MARKUP]

NAMES = (  # struck out of the text with the word that they are a part of
    r"\w*(?:accelerat|hugging ?face|networkx|numpy|scipy|onnx|pandas|python|sympy|tensorboard|torch"
    r"|transformers|tensorflow|caffe)\w*"
    r"|\bHf(?=[A-Z])\w*"
)
ALIASES = (  # struck out where they stand alone, or as a part of a dotted or underscored name
    r"(?<![^\W_])(?:aten|datasets?|hf|hub|nn|np|nx|ort|pd|peps?(?:[ -]\d+)?|stdlib|standard library|tf)(?![^\W_])_*"
)
STRUCK_OUT = re.compile(rf"(?:{NAMES}|{ALIASES})(?:['’]s\b)?(?:\.(?=\w))?", re.I)

TIDYING = [
    (r"\s+", " "),
    (r"[(\[\"']\s*[)\]\"']|(?<= )[\"'.,:;/&-]+(?= )", " "),  # what a struck name leaves around itself
    (r"\s+", " "),
    (r"\s+(?=[.,;:!?)\]])", ""),
    (r"(?<=[(\[])\s+", ""),
    (r"^[\s.,;:!?)\]/-]+", ""),
]
TIDYING_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in TIDYING]
WORD = re.compile(r"[(\"']?[A-Za-z]+(?:['-][A-Za-z]+)*[.,;:!?)\"']*")
SENTENCE_END = re.compile(r"(?<=[a-z)\"'0-9][.!?]) (?=[A-Z])")


def clean(docstring: str) -> str:
    """The description that a docstring begins with, as plain prose without a library's name.

    Empty if there is none, or fewer than MIN_WORDS words of it. Of a long one, the first sentences are kept.
    """
    if BOILERPLATE.search(docstring):
        return ""
    text = FENCED_CODE.sub("", docstring)
    section = SECTION.search(text)
    text = UNDERLINED.sub("", text[: section.start()] if section else text)
    text = "\n\n".join(part for part in re.split(r"\n\s*\n", text.strip()) if not NOT_PROSE.match(part))
    for pattern, replacement in MARKUP_PATTERNS:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = STRUCK_OUT.sub(" ", text)
    for pattern, replacement in TIDYING_PATTERNS:
        text = pattern.sub(replacement, text)
    words = _first_sentences(text.strip()).split()
    plain = sum(1 for word in words if WORD.fullmatch(word))
    return " ".join(words) if len(words) >= MIN_WORDS and plain >= 0.75 * len(words) else ""


def _first_sentences(text: str) -> str:
    """As many whole sentences as fit into MAX_WORDS, or the first MAX_WORDS words of an endless one."""
    kept: list[str] = []
    for sentence in SENTENCE_END.split(text):
        words = sentence.split()
        if kept and len(kept) + len(words) > MAX_WORDS:
            break
        kept += words
    return " ".join(kept[:MAX_WORDS])
