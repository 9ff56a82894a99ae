"""Hold models against one another: accuracy, size, memory, speed, and every prediction that changed.

    prunelle compare --reference runs/teacher --candidates runs/student torch-compile:runs/teacher \
        --test_file test.csv --output_dir runs/comparison

A model is a checkpoint folder, a hub model, an ONNX file or a folder with onnx/*.onnx, or one of them as FORMAT:PATH.
"""

import sys
from collections.abc import Sequence

import datasets
import transformers

from prunelle.cli import parse, run
from prunelle.export.comparison import ComparisonArguments, compare
from prunelle.export.comparison_report import save, to_text
from prunelle.export.files import new_folder
from prunelle.launch import start_logging

ARGUMENTS = (ComparisonArguments,)


def main(argv: Sequence[str]) -> None:
    arguments, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    start_logging()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with new_folder(arguments.output_dir) as folder:
        comparison = compare(arguments, recipe)
        save(comparison, folder)
    print(to_text(comparison))
    print(f"\nThe report to look at: {arguments.output_dir}/report.html")


if __name__ == "__main__":
    sys.exit(run(main))
