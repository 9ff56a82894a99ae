"""Carry out a recipe of several stages, each on what the ones before have left; go on where it was cut off.

accelerate launch scripts/run.py recipes/pretrained_distillation/docstrings.yaml
prunelle run recipes/pretrained_distillation/docstrings.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prunelle.cli import run
from prunelle.launch import start_logging
from prunelle.stages import read_stages, run_stages


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="prunelle run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", metavar="RECIPE.yaml", type=Path, help="`stages`, a list of commands and their flags."
    )
    arguments = parser.parse_args(argv)
    stages = read_stages(arguments.recipe)
    start_logging()
    run_stages(stages)


if __name__ == "__main__":
    sys.exit(run(main))
