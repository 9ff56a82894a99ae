"""What the triple loss and the teacher's layers are worth to a masked-LM student, at equal steps.

    python benchmarks/masked_lm_students.py --train_file train.txt --validation_file validation.txt

A small BERT teacher is trained on the text; then three students of half its layers are trained for the same steps
on the same blocks: with the triple loss from the teacher's layers, with masked LM alone from the same layers, and
with the triple loss from a fresh initialization. Validation masks are the same for all. The last line is JSON:
validation MLM loss (nats a masked token) per student and seed.
"""

import argparse
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, Trainer, set_seed

from prunelle.compression import every_second_layer, student_from_layers
from prunelle.tasks import TASKS, DataArguments
from prunelle.tasks.tokenizer import train_tokenizer
from prunelle.trainers import DistillationArguments, DistillationTrainer, FinetuningArguments
from prunelle.trainers.finetuning import trainer_data

MLM_ALONE = {"soft_target_weight": 0.0, "hidden_cosine_weight": 0.0, "hard_label_weight": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file")
    parser.add_argument("--validation_file")
    parser.add_argument("--dataset_name")
    parser.add_argument("--max_eval_samples", type=int, help="rows of the validation file")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--teacher_steps", type=int, default=2500)
    parser.add_argument("--student_steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results_file", type=Path, help="one JSON line a student is appended here as it ends")
    options = parser.parse_args()
    logging.disable(logging.INFO)

    data = DataArguments(
        task="masked-lm",
        dataset_name=options.dataset_name,
        train_file=options.train_file,
        validation_file=options.validation_file,
        max_seq_length=options.tokens,
        max_eval_samples=options.max_eval_samples,
    )
    task = TASKS["masked-lm"](data, 0)
    tokenizer = train_tokenizer(task.texts(), options.vocabulary)
    encoded = task.encode(tokenizer)
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.hidden_size // 32,
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=options.tokens,
        initializer_range=0.06,  # narrow layers want a wider start than 0.02
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )

    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "output_dir": folder,
            "learning_rate": options.learning_rate,
            "per_device_train_batch_size": options.batch,
            "per_device_eval_batch_size": options.batch,
            "warmup_steps": 0.1,
            "weight_decay": 0.01,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 100,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

        def loss_after(trainer: Trainer) -> float:
            """The validation MLM loss after training: the hard-label term, whatever the objective was."""
            trainer.train()
            metrics = trainer.evaluate()
            return metrics.get("eval_loss_hard_label", metrics["eval_loss"])

        set_seed(0)
        teacher = BertForMaskedLM(config)
        arguments = FinetuningArguments(**shared, max_steps=options.teacher_steps)
        teacher_loss = loss_after(Trainer(model=teacher, args=arguments, **trainer_data(task, tokenizer, encoded)))
        print(f"teacher: {teacher_loss:.4f}", flush=True)

        layers = every_second_layer(options.layers)
        losses: dict[str, list[float]] = {"triple": [], "mlm_alone": [], "triple_from_scratch": []}
        for seed in options.seeds:
            for name, found in losses.items():
                set_seed(seed)
                student: PreTrainedModel = student_from_layers(teacher, layers)
                if name == "triple_from_scratch":
                    student = BertForMaskedLM(student.config)
                weights = MLM_ALONE if name == "mlm_alone" else {}
                arguments = DistillationArguments(
                    **shared, **weights, seed=seed, max_steps=options.student_steps, distilled_positions="masked"
                )
                trainer = DistillationTrainer(student, teacher, arguments, **trainer_data(task, tokenizer, encoded))
                found.append(loss_after(trainer))
                line = {"student": name, "seed": seed, "mlm_loss": found[-1], "perplexity": math.exp(found[-1])}
                print(json.dumps(line), flush=True)
                if options.results_file:
                    with options.results_file.open("a") as file:
                        file.write(json.dumps(line) + "\n")

    means = {name: sum(found) / len(found) for name, found in losses.items()}
    print(
        json.dumps(
            {
                "teacher": teacher_loss,
                **losses,
                "ratio_to_triple": {name: mean / means["triple"] for name, mean in means.items()},
                "steps": options.student_steps,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
