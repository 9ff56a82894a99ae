"""How a run of training ends: exported, compared and written down."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from prunelle.compression.quantization import QuantizationPlan, save_packed
from prunelle.compression.record import write_record
from prunelle.export import export_and_report, report_on_sequences, write_card
from prunelle.export.data import reader_of
from prunelle.export.hub import upload
from prunelle.export.pictures import densities, write_picture
from prunelle.tasks import Task
from prunelle.trainers import CompressionTrainer, MutualTrainer
from prunelle.trainers.finetuning import save_model
from prunelle.trainers.models import LoadedModel


def close(
    trainer: CompressionTrainer,
    task: Task,
    encoded: dict[str, Any],
    collator: Any,
    teacher: LoadedModel | None = None,
    teacher_folder: str | None = None,
    plan: QuantizationPlan | None = None,
    compact: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    save_sparse: bool = False,
    **record: Any,
) -> None:
    """Evaluate what was trained, save it, export it, and print the table of what that did to it.

    Encoder-decoders are measured on what they write, not exported; of peers it is the best. `--push_to_hub` uploads it.

    Args:
        collator: The task's own. The trainer's may look for cached answers, which other data has none of.
        plan: What of the model was trained to be quantized.
        compact: What makes the model smaller before it is saved.
        save_sparse: Whether the checkpoint is written without its zeros.
        record: What `compression.json` is to say beside the data and the logs; `density.svg` shows its density.
    """
    folder, metrics = Path(str(trainer.args.output_dir)), trainer.evaluate()
    if isinstance(trainer, MutualTrainer):
        record["peer"] = trainer.keep_best(metrics)
    if compact is not None:  # after the evaluation, whose loss may compare heads and layers with the teacher's
        trainer.model = compact(trainer.unwrapped_model())
        record["layer_shapes"] = getattr(trainer.model.config, "layer_shapes", None)
    save_model(trainer, folder, save_sparse)
    if not trainer.is_world_process_zero():
        return
    # Not the Trainer's loader, which would deal the examples out to the processes.
    examples = DataLoader(encoded.get("test", encoded["validation"]), trainer.args.eval_batch_size, collate_fn=collator)
    model = trainer.unwrapped_model()
    export = partial(export_and_report, plan=plan, reader=reader_of(task, encoded))
    measure = report_on_sequences if model.config.is_encoder_decoder else export
    report = measure(
        model,
        trainer.processing_class,
        folder,
        batches=examples,
        compute_metrics=task.compute_metrics,
        teacher=teacher.model if teacher else None,
        teacher_folder=teacher_folder,
    )
    if plan is not None:
        record["quantization"] = asdict(plan)
        if plan.scheme in ("ternary", "binary"):
            save_packed(model, plan, folder / "model_packed.safetensors")
    if record.get("density"):
        write_picture(densities(record["density"], record["kept_layers"]), folder / "density.svg")
    write_record(folder, data=task.fingerprint(), training=trainer.state.log_history, **record)
    write_card(folder, report, trainer.hub_model_id)
    print(report.to_text())
    upload(folder, trainer.hub_model_id, trainer.args)
