"""Recipes of several stages: commands that follow one another, each on what the ones before have left.

shared:            # flags of every stage
  dataset_name: builtin:docstrings
stages:
  - finetune:
      model_config: bert.json
      output_dir: runs/teacher
  - distill:
      teacher_name_or_path: runs/teacher
      output_dir: runs/student
"""

import importlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from prunelle.cli import COMMANDS, as_flags, nearest, parse, read_recipe
from prunelle.errors import InputError

logger = logging.getLogger(__name__)

# What commands leave, last of all, when they are done. It says what was asked for.
RECORDS = ("compression.json", "report.json")


@dataclass(frozen=True)
class Stage:
    """A command and its flags.

    Args:
        place: how a message names it.
        script: the command's module.
        words: its command line.
        recipe: what that says beyond the defaults.
    """

    place: str
    script: Any
    words: Sequence[str]
    recipe: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its result goes."""
        return Path(self.recipe["output_dir"])

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the result of just these flags."""
        done = [json.loads(file.read_text()) for name in RECORDS if (file := self.folder / name).is_file()]
        wanted = json.loads(json.dumps(self.recipe, default=str))
        return any({**wanted, **_how_it_went_on(record)} == record.get("recipe") for record in done)

    def command_line(self) -> list[str]:
        """The words to start it with, or to go on with it.

        Raises:
            InputError: The folder holds something that cannot be gone on with.
        """
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return list(self.words)
        checkpoint = get_last_checkpoint(str(self.folder))
        if checkpoint is None or any((self.folder / name).exists() for name in RECORDS):
            raise InputError(
                f"{self.place}: {self.folder} holds another run, or one that was cut off before its first checkpoint: "
                "remove it, or give another output_dir"
            )
        return [*self.words, "--resume_from_checkpoint", checkpoint]


def read_stages(path: Path) -> list[Stage]:
    """The stages of a recipe, their flags checked as their commands check them.

    Raises:
        InputError: There is no such file, it is no such recipe, or a command rejects its flags.
    """
    content = read_recipe(path)
    shared, stages = content.get("shared", {}), content.get("stages")
    if content.keys() - {"shared", "stages"} or not isinstance(shared, dict) or not isinstance(stages, list):
        raise InputError(f"{path} must be a mapping of `stages`, a list, and perhaps `shared`, flags of every stage")
    return [_stage(f"{path}, stage {number}", entry, shared) for number, entry in enumerate(stages, start=1)]


def run_stages(stages: Sequence[Stage]) -> None:
    """Run what is not finished, one after the other.

    Raises:
        InputError: A folder holds something else than its stage's result, or a result of an earlier run of the
            stages before; said before anything runs. Or a stage refuses what it finds.
    """
    waiting = next((number for number, stage in enumerate(stages) if not stage.is_finished), len(stages))
    for stage in stages[waiting + 1 :]:
        if stage.is_finished:
            raise InputError(
                f"{stage.place}: {stage.folder} is finished, and {stages[waiting].folder} of an earlier stage is not: "
                f"remove {stage.folder}, so that it can be made anew"
            )
    lines = [stage.command_line() for stage in stages[waiting:]]
    for stage in stages[:waiting]:
        logger.info("%s is finished, in %s", stage.place, stage.folder)
    for stage, words in zip(stages[waiting:], lines, strict=True):
        logger.info("%s", stage.place)
        try:
            stage.script.main(words)
        except InputError as error:
            raise InputError(f"{stage.place}: {error}") from error


def _stage(place: str, entry: Any, shared: dict[str, Any]) -> Stage:
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(flags := next(iter(entry.values())), dict):
        raise InputError(f"{place} must be one command, such as `distill:`, and under it its flags")
    command = next(iter(entry))
    known = COMMANDS.keys() - {"run"}
    if command not in known:
        raise InputError(f"{place}: no command {command!r}{nearest(str(command), known)}")
    script = importlib.import_module(f"prunelle.scripts.{command}")
    place, words = f"{place} ({command})", as_flags(shared | flags)
    try:
        *_, recipe = parse(words, *script.ARGUMENTS)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if "output_dir" not in recipe:
        raise InputError(f"{place}: no output folder: give output_dir")
    return Stage(place, script, words, recipe)


def _how_it_went_on(record: dict[str, Any]) -> dict[str, Any]:
    name = "resume_from_checkpoint"
    return {name: record["recipe"][name]} if name in record.get("recipe", {}) else {}
