"""The built-in data: which library does this docstring come from, what is the function called, and what are its
parameters?

The docstrings of Python's standard library and of the libraries that every installation of Prunelle
brings along, read from their source files (nothing is imported or run), reduced to plain prose, with the
libraries' names struck out. They need no network. `builtin:docstrings` serves text classification and language
modelling, `builtin:function-names` what makes a text of a text, and `builtin:parameters` what answers questions.
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
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets

from prunelle.errors import InputError

STANDARD_LIBRARY = "python"
LIBRARIES = (
    "datasets",
    "huggingface_hub",
    "networkx",
    "numpy",
    "onnxscript",
    "pandas",
    STANDARD_LIBRARY,
    "sympy",
    "tensorboard",
    "torch",
    "transformers",
)
"""The labels. Each is a distribution that `prunelle` requires, directly or through another, with enough
docstrings for a class. What else happens to be installed is not looked at, so that every machine has the
same classes."""

MIN_WORDS, MAX_WORDS = 10, 80
MIN_EXAMPLES, MAX_EXAMPLES = 300, 1000
"""A library that some later version leaves with fewer examples drops out; one with more (torch has
thousands) does not swamp the rest."""

MIN_WORDS_OF_A_FUNCTION = 4
WORDS_OF_A_NAME = range(2, 7)
"""Shorter names, such as `run`, say too little, longer ones are mostly tests'."""

MAX_FUNCTIONS = 1000

MAX_WORDS_OF_A_CONTEXT, MAX_WORDS_OF_AN_ANSWER = 150, 20
MAX_QUESTIONS = 800

SPLITS = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}
"""Which values of a text's hash modulo 100 belong to which split."""


def load_docstrings() -> datasets.DatasetDict:
    """The splits train, validation and test, with the columns `text` and `label` (a `ClassLabel`).

    The first call reads the source files (some 15 seconds) and leaves the result in the cache of Hugging
    Face `datasets`, for the versions of Python and of the libraries that it came from; later calls load it
    from there.

    Raises:
        InputError: no library had enough docstrings, as happens where source files were stripped.
    """
    return _cached("docstrings", _build)


def load_function_names() -> datasets.DatasetDict:
    """The splits train, validation and test, with the columns `text`, the first sentence of a function's docstring,
    and `target`, the words of its name in lower case.

    Cached as `load_docstrings`.

    Raises:
        InputError: no library has documented functions, as happens where source files were stripped.
    """
    return _cached("function-names", _build_function_names)


def load_parameters() -> datasets.DatasetDict:
    """The splits train, validation and test, with SQuAD's columns: `context`, a docstring as it is, `question`, what
    one of the parameters is that it explains, and `answers`, the first sentence of the explanation.

    Cached as `load_docstrings`.

    Raises:
        InputError: no library explains parameters, as happens where source files were stripped.
    """
    return _cached("parameters", _build_parameters)


def _cached(name: str, build: Callable[[], datasets.DatasetDict]) -> datasets.DatasetDict:
    cached = Path(datasets.config.HF_DATASETS_CACHE) / f"prunelle-{name}-{_fingerprint()}"
    if not cached.is_dir():
        _save_atomically(build(), cached)
    return datasets.load_from_disk(str(cached))


def _fingerprint() -> str:
    """Changes with whatever the texts depend on: the libraries, Python, and this file."""
    installed = [distribution for name in LIBRARIES for distribution in metadata.distributions(name=name)]
    versions = [f"{distribution.name} {distribution.version}" for distribution in installed]
    code = Path(__file__).read_text(encoding="utf-8")
    return _sha256(json.dumps([platform.python_version(), versions, code]))[:16]


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
    label_type = datasets.ClassLabel(names=labels) if labels else datasets.Value("string")
    features = {"text": datasets.Value("string"), "label": label_type}
    return _split("docstrings", features, [(text, label) for label in labels for text in texts[label]])


def _build_function_names() -> datasets.DatasetDict:
    seen: set[tuple[str, ...]] = set()
    pairs = [pair for library in LIBRARIES for pair in _collect_function_names(library, seen)]
    return _split("function-names", {"text": datasets.Value("string"), "target": datasets.Value("string")}, pairs)


def _build_parameters() -> datasets.DatasetDict:
    seen: set[tuple[str, ...]] = set()
    rows = [row for library in LIBRARIES for row in _collect_parameters(library, seen)]
    text = datasets.Value("string")
    answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int64"))}
    return _split("parameters", {"context": text, "question": text, "answers": answers}, rows)


def _split(name: str, features: dict[str, Any], examples: Sequence[tuple[Any, ...]]) -> datasets.DatasetDict:
    """The splits. An example's values come in the order of the features, first the text that says where it belongs."""
    if not examples:
        raise InputError(
            f"builtin:{name} is empty: the installed libraries have no docstrings in their .py files "
            "(were the sources stripped?); give --dataset_name or --train_file instead"
        )
    # Ordered by hash: shuffled, yet the same everywhere.
    ordered = sorted((_sha256(example[0]), example) for example in examples)
    splits = datasets.DatasetDict()
    for split, buckets in SPLITS.items():
        chosen = [example for digest, example in ordered if int(digest, 16) % 100 in buckets]
        columns = {column: [example[place] for example in chosen] for place, column in enumerate(features)}
        splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return splits


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- From a library to its docstrings


def _collect(library: str, seen: set[tuple[str, ...]]) -> list[str]:
    """At most MAX_EXAMPLES clean texts of one library, none of them close to one that was `seen` before."""
    texts: list[str] = []
    for path in _source_files(library):
        for _, docstring in _docstrings(path):
            text = clean(docstring)
            if text and not _is_known(text, seen):
                texts.append(text)
        if len(texts) >= MAX_EXAMPLES:
            break
    return texts[:MAX_EXAMPLES]


def _collect_function_names(library: str, seen: set[tuple[str, ...]]) -> list[tuple[str, str]]:
    """At most MAX_FUNCTIONS pairs of a docstring's first sentence and a name, no sentence close to one `seen`."""
    pairs: list[tuple[str, str]] = []
    for path in _source_files(library):
        for name, docstring in _docstrings(path):
            words = NAME_PART.findall(name)
            if len(words) in WORDS_OF_A_NAME:
                text = SENTENCE_END.split(clean(docstring, MIN_WORDS_OF_A_FUNCTION))[0]
                if len(text.split()) >= MIN_WORDS_OF_A_FUNCTION and not _is_known(text, seen):
                    pairs.append((text, " ".join(words).lower()))
        if len(pairs) >= MAX_FUNCTIONS:
            break
    return pairs[:MAX_FUNCTIONS]


def _collect_parameters(library: str, seen: set[tuple[str, ...]]) -> list[tuple[str, str, dict[str, list[Any]]]]:
    """At most MAX_QUESTIONS contexts, questions and answers, no context close to one `seen`."""
    rows: list[tuple[str, str, dict[str, list[Any]]]] = []
    for path in _source_files(library):
        for _, docstring in _docstrings(path):
            explained = explained_parameters(docstring)
            if len(explained) > 1 and len(docstring.split()) <= MAX_WORDS_OF_A_CONTEXT:
                name, answer, start = explained[int(_sha256(docstring), 16) % len(explained)]
                if len(answer.split()) <= MAX_WORDS_OF_AN_ANSWER and not _is_known(docstring, seen):
                    rows.append((docstring, f"What is {name}?", {"text": [answer], "answer_start": [start]}))
        if len(rows) >= MAX_QUESTIONS:
            break
    return rows[:MAX_QUESTIONS]


def explained_parameters(docstring: str) -> list[tuple[str, str, int]]:
    """The parameters that a docstring explains under "Args:", with the first sentence on each and where that begins."""
    section = ARGUMENTS.search(docstring)
    if section is None:
        return []
    found = PARAMETER.finditer(docstring, section.start(1), section.end(1))
    return [(match["name"], match["answer"], match.start("answer")) for match in found]


SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "site-packages", "dist-packages", "__pycache__"),
    *("_vendor", "vendor", "third_party"),  # another library's docstrings
    *("distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"),  # not in every Python
}


def _source_files(library: str) -> Iterator[Path]:
    """The library's .py files in an order that mixes its folders and is the same on every machine, so that
    one may stop once there is enough."""
    if library == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        tops = [top for top in root.iterdir() if top.name not in SKIPPED_FOLDERS]
        paths = [path for top in tops for path in ([top] if top.suffix == ".py" else top.rglob("*.py"))]
        files = {path.relative_to(root).as_posix(): path for path in paths}
    else:
        listed = [file for found in metadata.distributions(name=library) for file in found.files or []]
        files = {file.as_posix(): Path(str(file.locate())) for file in listed if file.suffix == ".py"}
    for name in sorted(files, key=_sha256):
        generated = name.endswith(("_pb2.py", "_pb2_grpc.py"))
        if not generated and SKIPPED_FOLDERS.isdisjoint(name.split("/")):
            yield files[name]


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Docstrings with the names of their functions; of modules and classes without one."""
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
                yield ("" if isinstance(node, ast.Module | ast.ClassDef) else node.name), docstring
        nodes += getattr(node, "body", [])  # statements alone: ast.walk's descent into expressions is slow


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
    r"copyright|all rights reserved|warrant(y|ies)|licensed under|do not edit|auto-?generated|generated by",
    re.I,
)
SECTION = re.compile(  # the first of these ends the description: what follows is lists, types and code
    r"^[ \t]*(?:#+ *|\*\*)?"
    r"(?:(?:Keyword |Other |Optional )?(?:Args?|Arguments|Param(?:eter)?s?|Inputs?|Outputs?)|Attributes"
    r"|Methods|Returns?|Yields?|Raises|Warns|(?:Usage )?Examples?|Usage|Shapes?|Type Constraints|See Also"
    r"|References?)(?:\*\*)?[ \t]*(?::|\n[ \t]*[-=~]{3,}|\n|$)"
    r"|^[ \t]*[:@](?:param|parameter|arg|type|returns?|rtype|raises?|ivar|cvar|var|keyword|key)\b"
    r"|^[ \t]*[`*]*\w+[`*]* ?(?: : [\w`]|\(.*\) ?:)"  # an argument and its type, without a heading
    r"|^[ \t]*>>>",
    re.M | re.I,
)
ARGUMENTS = re.compile(r"^(?:Args|Arguments|Parameters):[ \t]*\n((?:[ \t]+.*(?:\n|\Z)|[ \t]*\n)+)", re.M)
PARAMETER = re.compile(
    r"^[ ]{4}`?(?P<name>\w+)`?(?:[ ]?\(.*\))?:\s+"
    r"(?P<answer>\S(?:.|\n(?!\s*\n|[ ]{0,4}\S))*?)"  # over lines that are indented further
    r"(?=\.?\s*(?:\n\s*\n|\n[ ]{0,4}\S|\Z)|\.\s+[A-Z])",  # until a blank line, the next parameter, a sentence
    re.M,
)
FENCED_CODE = re.compile(r"^[ \t]*(```|~~~).*?(^[ \t]*\1|\Z)", re.M | re.S)
UNDERLINED = re.compile(r"^.*\n[ \t]*([-=~^*#\"'+.])\1{2,}[ \t]*$", re.M)
NOT_PROSE = re.compile(  # how a paragraph begins that is quoted, a directive, a table, a signature or code
    r"\s|\.\.|[|+=@#%$]|\[\[|[\w.]+\(.*\)(?:\s*->.*)?$|(?:import|from) [\w.]+( import|$)"
    r"|\w[\w.\[\]]* = |class \w+[(:]|def \w+\(",
    re.M,
)
MARKUP = [
    (r":math:`[^`]*`|\$\$?[^$]+\$\$?|\\[(\[].*?\\[)\]]", " "),
    (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"),  # [text](address)
    (r"(?::[\w:+.-]+:)?`+([^`<]*?)\s*<[^`>]*>`+_*", r"\1"),  # `text <address>`_, :role:`text <target>`
    (r"(?::[\w:+.-]+:)?`+~?!?\.?([^`]*)`+_*", r"\1"),  # :role:`text`, ``code``, `link`_
    (r"<?\b(?:https?|ftp)://[^\s>)\]]+>?|\bwww\.[^\s>)\]]+", " "),
    (r"</?[A-Za-z][^<>\n]*>", " "),  # <Tip>
    (r"\[~?([A-Za-z][\w.]*)\](?!_)", r"\1"),  # [a_name]
    (r"\[[#!]?\w+\]_?|\|\w+\|_?", " "),  # [1], [Knuth98]_, [!TIP], |substitution|
    (r"^\s*(?:[-*+•>]|\(?\d+[.)]|#+)\s+", " "),  # bullets
    (r"\\[A-Za-z]+|[`*\\{}|~^@]+|[-=#.]{3,}", " "),
    (r"(?<![^\W_])_+|_+(?![^\W_])", ""),  # __init__
    (r":{2,}(?=\s|$)", ":"),
]
MARKUP_PATTERNS = [(re.compile(pattern, re.M | re.S), replacement) for pattern, replacement in MARKUP]

NAMES = (  # give-aways wherever they stand, as in from_numpy or PyTorch's
    r"dataset|hugging ?face|networkx|numpy|onnx|pandas|python|sympy|tensorboard|tensorflow|torch|transformer"
)
ALIASES = r"aten|hf|hub|nn|np|nx|ort|pd|peps?|stdlib|tf"  # only as a whole part of a name: is_hf_model
STRUCK_OUT = re.compile(
    rf"\b(?:\w*?(?:{NAMES}|(?<![^\W_])(?:{ALIASES})(?![^\W_]))\w*|(?-i:H[fF][A-Z])\w*|standard library)"
    r"(?:'s\b)?(?:(?:\.|::)(?=\w))?",
    re.I,
)

TIDYING = [  # what struck out words leave around themselves
    (r"\s+", " "),
    (r"[(\[\"']\s*[)\]\"']", " "),
    (r"\s+(?=[.,;:!?)\]]+(?:\s|$))", ""),
    (r"[,;:]+(?=[.,;:])|\.(?=\.)", ""),
    (r"(?<= )[\"'/]+(?= )", ""),
    (r"(?<=[(\[])\s+", ""),
    (r"^[\s.,;:!?)\]/-]+", ""),
]
TIDYING_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in TIDYING]
NAME_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
WORD = re.compile(r"[(\"']?[A-Za-z]+(?:['-][A-Za-z]+)*[.,;:!?)\"']*")
SENTENCE_END = re.compile(r"(?<=[a-z)\"'0-9][.!?]) (?=[A-Z])")


def clean(docstring: str, min_words: int = MIN_WORDS) -> str:
    """The description that a docstring begins with, as plain prose without a library's name.

    Empty if there is none, or fewer than `min_words` words of it. Of a long one, the first sentences are kept.
    """
    if len(docstring.split()) < min_words or BOILERPLATE.search(docstring):
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
    return " ".join(words) if len(words) >= min_words and plain >= 0.75 * len(words) else ""


def _first_sentences(text: str) -> str:
    """As many whole sentences as fit into MAX_WORDS, or the first MAX_WORDS words of an endless one."""
    kept: list[str] = []
    for sentence in SENTENCE_END.split(text):
        words = sentence.split()
        if kept and len(kept) + len(words) > MAX_WORDS:
            break
        kept += words
    return " ".join(kept[:MAX_WORDS])
