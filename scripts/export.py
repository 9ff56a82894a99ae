"""Export any checkpoint to ONNX in several precisions, and show what each does to its predictions.

    python scripts/export.py --model_name_or_path runs/student --validation_file held_out.csv --output_dir runs/onnx
    prunelle export --model_name_or_path distilbert-base-uncased-finetuned-sst-2-english \
        --variants fp32 fp16 int8-dynamic int8-static int4 \
        --train_file reviews.csv --validation_file held_out.csv --output_dir runs/onnx
"""

import sys
from collections.abc import Sequence

from torch.utils.data import DataLoader

from prunelle.cli import parse, run
from prunelle.compression.record import read_record, write_record
from prunelle.export import export_variants, load_checkpoint, new_folder, report_on
from prunelle.export.arguments import ExportArguments, ExportDataArguments
from prunelle.export.data import answers_of, calibration_of, task_of
from prunelle.launch import start_logging

ARGUMENTS = (ExportArguments, ExportDataArguments)


def main(argv: Sequence[str]) -> None:
    arguments, data, recipe = parse(argv, *ARGUMENTS, description=__doc__)
    start_logging()
    with new_folder(arguments.output_dir) as folder:
        checkpoint = load_checkpoint(arguments.model_name_or_path)
        task = task_of(checkpoint, data, arguments.seed)
        is_calibrated = "int8-static" in arguments.variants
        calibration = calibration_of(checkpoint, task, arguments, data) if is_calibrated else ()
        encoded = {} if task is None else task.encode(checkpoint.tokenizer)

        files = export_variants(
            checkpoint.model,
            folder,
            arguments.variants,
            input_names=checkpoint.tokenizer.model_input_names,
            opset_version=arguments.opset_version,
            calibration=calibration,
            calibration_method=arguments.calibration_method,
            int4_block_size=arguments.int4_block_size,
            plan=checkpoint.plan,
        )
        checkpoint.save_without_weights(folder)
        write_record(
            folder,
            methods=["export"],
            recipe=recipe,
            data=None if task is None else task.fingerprint(),
            source=None if checkpoint.folder is None else read_record(checkpoint.folder),
        )
        if task is None:
            sizes = [f"{file.relative_to(folder)}: {file.stat().st_size / 1e6:.1f} MB" for file in files.values()]
            said = "Predictions were not compared with the model's: give --validation_file or --dataset_name."
            text = "\n".join([*sizes, said])
        else:
            examples = DataLoader(
                encoded.get("test", encoded["validation"]),
                batch_size=arguments.per_device_eval_batch_size,
                collate_fn=task.collator(checkpoint.tokenizer, encoded),
            )
            report = report_on(
                checkpoint.model,
                files,
                checkpoint.tokenizer,
                batches=examples,
                compute_metrics=task.compute_metrics,
                answers=answers_of(task, encoded),
                folder=checkpoint.folder,
                latency_seconds=arguments.latency_seconds,
            )
            report.save(folder)
            text = report.to_text()
    print(text)


if __name__ == "__main__":
    sys.exit(run(main))
