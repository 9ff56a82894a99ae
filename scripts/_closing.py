"""How a run of training ends: exported, compared and written down."""

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from prunelle.compression.record import write_record
from prunelle.export import export_and_report
from prunelle.tasks import Task
from prunelle.trainers import CompressionTrainer
from prunelle.trainers.finetuning import save_model
from prunelle.trainers.models import LoadedModel


def close(
    trainer: CompressionTrainer,
    task: Task,
    encoded: dict[str, Any],
    teacher: LoadedModel | None = None,
    teacher_folder: str | None = None,
    **record: Any,
) -> None:
    """Evaluate what was trained, save it, export it, and print the table of what that did to it.

    Args:
        record: What `compression.json` is to say beside the data and the logs.
    """
    folder = Path(str(trainer.args.output_dir))
    trainer.evaluate()
    save_model(trainer, folder)
    if not trainer.is_world_process_zero():
        return
    # Not the Trainer's loader, which would deal the examples out to the processes.
    examples = DataLoader(
        encoded.get("test", encoded["validation"]),
        batch_size=trainer.args.per_device_eval_batch_size,
        collate_fn=trainer.data_collator,
    )
    report = export_and_report(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        folder,
        batches=examples,
        compute_metrics=task.compute_metrics,
        teacher=teacher.model if teacher else None,
        teacher_folder=teacher_folder,
    )
    write_record(folder, data=task.fingerprint(), training=trainer.state.log_history, **record)
    print(report.to_text())
