"""From the command line to a script and back: recipes, flags, and errors in one line.

`prunelle distill …`, `accelerate launch scripts/distill.py …` and `torchrun scripts/distill.py …` all end in
the same `main(argv)` of a module in `scripts/`, called through `run`.
"""

import argparse
import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import prunelle
from prunelle.errors import InputError

COMMANDS = {
    "distill": "train a student to predict what its teacher predicts, and export it",
    "prune": "set the weights that matter least to zero while a model trains, alone or with a teacher",
    "qat": "train a model to predict with int8 weights and inputs as it does without, and export it",
    "mutual": "train two or more models on the labels and on one another's predictions, and export the best",
    "finetune": "train a model, such as a teacher, on labels alone",
    "run": "carry out a recipe of several of these, and go on where it was cut off",
    "export": "write a checkpoint as ONNX in several precisions, and show what that does to its predictions",
    "compare": "hold models against one another: accuracy, size, speed, and what changed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console command `prunelle`: the scripts as sub-commands."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"prunelle {prunelle.__version__}")
        return 0
    if arguments[:1] in ([], ["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        print("usage: prunelle COMMAND [--config recipe.yaml] [--flag value ...]\n")
        print("\n".join(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()))
        print("\nprunelle COMMAND --help lists the command's flags.")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"prunelle: error: no command {command!r}{nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"prunelle.scripts.{command}").main, rest)


def run(script: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main` and turn an `InputError` into one line on stderr and exit code 2.

    With several processes each raises the same error; the first one prints it.
    """
    try:
        script(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str], *dataclass_types: type, description: str | None = None) -> tuple[Any, ...]:
    """Fill argument dataclasses from `--config recipe.yaml` and flags; flags win over the recipe.

    Args:
        argv: The command line without the program's name.
        dataclass_types: Dataclasses whose fields are the flags, such as `TrainingArguments`.
        description: What `--help` says first.

    Returns:
        One instance per dataclass, in order; then a dict of what was given beyond the defaults, by recipe and
        flags together: a recipe that does the same again (without secrets).

    Raises:
        InputError: An unknown flag or recipe key (the nearest one is named), a value that cannot be read or
            that a dataclass rejects, a recipe that does not exist or is not flat YAML.
    """
    parser = _parser(dataclass_types, description)
    parser.add_argument("--config", default=None, metavar="RECIPE.yaml", help="A recipe: YAML of these flags.")
    flags = {option for action in parser._actions for option in action.option_strings}

    recipe_finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_finder.add_argument("--config")
    config = recipe_finder.parse_known_args(argv)[0].config
    recipe = [] if config is None else _recipe_as_flags(Path(config), flags)

    for word in argv:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name not in flags:
            raise InputError(f"unknown flag {name}{nearest(name, flags)}")
    words = [*recipe, *argv]
    try:
        *instances, _ = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from error
    defaults, values = (vars(parser.parse_args(line)) for line in ([], words))
    given = {name: value for name, value in values.items() if value != defaults[name]}
    given = {name: value for name, value in given.items() if name not in ("config", "hub_token")}
    return *instances, given


def _parser(dataclass_types: Sequence[type], description: str | None) -> Any:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(message)

    # Without abbreviations `--student_layer` is an error that names `--student_layers`, not a guess.
    return Parser(dataclass_types, description=description, allow_abbrev=False)


def read_recipe(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        InputError: There is no such file, or it is something else.
    """
    import yaml

    if not path.is_file():
        raise InputError(f"no recipe {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path} must be a mapping of flags to values")
    return recipe


def as_flags(recipe: Mapping[str, Any]) -> list[str]:
    """A recipe's entries as the words of a command line, so that one parser judges both."""
    words: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{key}", *map(_as_word, value)]
        else:
            words.append(f"--{key}={_as_word(value)}")
    return words


def _recipe_as_flags(path: Path, flags: set[str]) -> list[str]:
    recipe = read_recipe(path)
    for key in recipe:
        if f"--{key}" not in flags or key in ("config", "help"):
            raise InputError(f"unknown key {key!r} in {path}{nearest(str(key), {f[2:] for f in flags})}")
    return as_flags(recipe)


def _as_word(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """How a message about an unknown name ends: with the known one that it may stand for."""
    matches = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; the nearest is {matches[0]}" if matches else ""
