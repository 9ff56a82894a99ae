"""Export any checkpoint to ONNX in several precisions, and show what each does to its predictions.

    prunelle export --model_name_or_path distilbert-base-uncased-finetuned-sst-2-english \
        --variants fp32 fp16 int8-dynamic int8-static int4 \
        --train_file reviews.csv --validation_file held_out.csv --output_dir runs/onnx
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from prunelle.cli import parse, run
from prunelle.compression.record import read_record, write_record
from prunelle.export import export_variants, load_checkpoint, new_folder, report_on, write_card
from prunelle.export.arguments import ExportArguments, ExportDataArguments
from prunelle.export.data import calibration_of, check_limit, examples_of, task_of
from prunelle.export.hub import repository_of, upload
from prunelle.export.sensitivity import quantize_within
from prunelle.launch import start_logging

ARGUMENTS = (ExportArguments, ExportDataArguments)


def main(argv: Sequence[str]) -> None:
    arguments, data, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    check_limit(arguments, data)
    start_logging()
    repository = repository_of(arguments)
    with new_folder(arguments.output_dir) as folder:
        checkpoint = load_checkpoint(arguments.model_name_or_path)
        task = task_of(checkpoint, data, arguments.seed)
        examples = {} if task is None else examples_of(checkpoint, task, arguments)
        files = export_variants(
            checkpoint.model,
            folder,
            arguments.variants,
            input_names=checkpoint.tokenizer.model_input_names,
            opset_version=arguments.opset_version,
            calibration=calibration_of(checkpoint, task, arguments, data),
            calibration_method=arguments.calibration_method,
            int4_block_size=arguments.int4_block_size,
            plan=checkpoint.plan,
        )
        choice = quantize_within(checkpoint, files, task, examples, arguments)
        checkpoint.save_without_weights(folder)
        write_record(
            folder,
            methods=["export"],
            recipe=recipe,
            data=None if task is None else task.fingerprint(),
            source=None if checkpoint.folder is None else read_record(checkpoint.folder),
            left_out=None if choice is None else choice.modules,
        )
        report = None
        if task is None:
            sizes = [f"{file.relative_to(folder)}: {file.stat().st_size / 1e6:.1f} MB" for file in files.values()]
            said = "Predictions were not compared with the model's: give --validation_file or --dataset_name."
            text = "\n".join([*sizes, said])
        else:
            report = report_on(
                checkpoint.model,
                files,
                checkpoint.tokenizer,
                batches=examples["test"].batches,
                compute_metrics=task.compute_metrics,
                reader=examples["test"].reader,
                folder=checkpoint.folder,
                latency_seconds=arguments.latency_seconds,
            )
            report.save(folder)
            text = "\n".join([report.to_text(), *([choice.to_text()] if choice else [])])
        write_card(folder, report, repository)
    print(text)
    upload(Path(arguments.output_dir), repository, arguments)


if __name__ == "__main__":
    sys.exit(run(main))
