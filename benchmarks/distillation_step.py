"""What a distillation step costs, against one that computes all logits of student and teacher at once.

    OMP_NUM_THREADS=2 python benchmarks/distillation_step.py
    OMP_NUM_THREADS=1 python benchmarks/distillation_step.py --cpu_time
    python benchmarks/distillation_step.py --device cuda --bf16 --batch 256

Masked LM with DistilBERT's triple loss, a 6-layer teacher and a 3-layer student of MiniLM's sizes. The reference
selects what it needs of whole logits, as DistilBERT's published training script does; ours is the trainer's own step,
from the collated batch to the gradients. Both are seen to compute the same. A step on cached answers of the teacher is
held against one on the labels alone, each with its batch's collation.

Steps of all kinds take turns, and medians are compared. Peak memory is a fresh process's, beyond what it held before
there were models; on a GPU what was allocated there. The last line is JSON:
{"masked": {"time_ratio", "memory_ratio"}, "all": {…}, "cached": {"time_ratio"}}.
"""

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, default_data_collator, set_seed

from prunelle.compression import student_from_layers
from prunelle.trainers import DistillationArguments, DistillationTrainer

MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEMPERATURE, WEIGHTS = 2.0, {"soft": 5.0, "hard": 2.0, "cosine": 1.0}
SOFT_AND_HARD = {"hidden_cosine_weight": 0.0}
HARD_ALONE = {"hidden_cosine_weight": 0.0, "soft_target_weight": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu_time", action="store_true", help="the process's own time: for a machine with other work")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            sizes = {"batch": 2, "tokens": 8, "vocabulary": 64}
            small = argparse.Namespace(**vars(options) | sizes)
            Bench(Path(folder), small).step(options.memory_of)()  # what a first step loads is not its memory
            print(Bench(Path(folder), options).peak_memory(options.memory_of))
            return
        bench = Bench(Path(folder), options)
        for positions in ("masked", "all"):
            bench.check_same(positions)
        times = bench.times()
        result: dict[str, dict[str, float]] = {}
        for positions in ("masked", "all"):
            ours, naive = f"ours {positions}", f"naive {positions}"
            memory = {name: _in_fresh_process(name) for name in (ours, naive)}
            print(json.dumps({"peak_memory_megabytes": {name: round(found / 2**20) for name, found in memory.items()}}))
            result[positions] = {
                "time_ratio": round(times[ours] / times[naive], 3),
                "memory_ratio": round(memory[ours] / memory[naive], 3),
            }
        result["cached"] = {"time_ratio": round(times["cached"] / times["alone"], 3)}
        parts = times["teacher"] + times["alone"]
        print(json.dumps({"step_over_teacher_forward_and_student_step": round(times["ours masked"] / parts, 3)}))
        print(json.dumps(result))


class Bench:
    """Teacher, student, data and the steps to compare."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options, self.folder = options, folder
        self.before = _status("VmRSS")
        self.autocast = partial(torch.autocast, options.device, torch.bfloat16, enabled=options.bf16)
        set_seed(0)
        sizes = {"vocab_size": options.vocabulary, "max_position_embeddings": options.tokens}
        self.teacher = BertForMaskedLM(BertConfig(**MINILM, **NO_DROPOUT, **sizes)).to(options.device)
        self.teacher.save_pretrained(folder / "teacher")
        self.student = student_from_layers(self.teacher, [1, 3, 5])
        self.data = _masked_text(options)

    def step(self, name: str) -> Callable[[], Any]:
        """One step by name; what it returns is its loss, and it leaves its gradients."""
        kind, _, positions = name.partition(" ")
        if kind == "cached":
            cache = {"teacher_cache": str(self.folder / "cache"), **SOFT_AND_HARD}
            return self._trained(cache)
        if kind == "alone":
            return self._trained(HARD_ALONE)
        if kind == "teacher":
            return self._teacher_forward()
        return self._trained({"distilled_positions": positions}) if kind == "ours" else self._naive(positions)

    def check_same(self, positions: str) -> None:
        """See that both ways give one loss and one gradient."""
        expected = self.step(f"naive {positions}")().item()
        slopes = {name: weight.grad.clone() for name, weight in self.student.named_parameters()}
        found = self.step(f"ours {positions}")().item()
        errors = {
            # The absolute part is for biases of keys, whose gradient is 0 but for rounding.
            name: (
                torch.linalg.vector_norm(weight.grad - slopes[name]) / (torch.linalg.vector_norm(slopes[name]) + 1e-3)
            )
            for name, weight in self.student.named_parameters()
        }
        loss, slope = abs(found / expected - 1), max(errors.values()).item()
        print(json.dumps({"positions": positions, "loss_difference": loss, "gradient_difference": slope}), flush=True)
        # In bfloat16 the two round at other places: chunks sum in float32.
        assert loss <= (1e-2 if self.options.bf16 else 1e-5)
        assert slope <= (1e-1 if self.options.bf16 else 1e-4)

    def times(self) -> dict[str, float]:
        """The median seconds of each step."""
        order = ["naive masked", "ours masked", "naive all", "ours all", *3 * ["alone", "cached", "teacher"]]
        steps = {name: self.step(name) for name in order}
        clock = time.process_time if self.options.cpu_time else time.perf_counter
        found: dict[str, list[float]] = defaultdict(list)
        for each in range(self.options.rounds + 1):
            for name in order:
                start = clock()
                steps[name]()
                if self.options.device == "cuda":
                    torch.cuda.synchronize()
                if each:  # the first warms up
                    found[name].append(clock() - start)
        medians = {name: statistics.median(seconds) for name, seconds in found.items()}
        milliseconds = {name: round(1000 * seconds, 1) for name, seconds in medians.items()}
        print(json.dumps({"milliseconds": milliseconds, "threads": torch.get_num_threads()}), flush=True)
        return medians

    def peak_memory(self, name: str) -> int:
        """The most bytes held in two steps."""
        step = self.step(name)
        for _ in range(2):
            step()
        if self.options.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self.before

    def _trained(self, flags: dict[str, Any]) -> Callable[[], Any]:
        arguments = DistillationArguments(
            str(self.folder / "run"),
            per_device_train_batch_size=self.options.batch,
            per_device_eval_batch_size=self.options.batch,
            train_sampling_strategy="sequential",
            temperature=TEMPERATURE,
            use_cpu=self.options.device == "cpu",
            bf16=self.options.bf16,
            report_to="none",
            dataloader_pin_memory=False,
            **flags,
        )
        trainer = DistillationTrainer(
            self.student,
            self.teacher,
            arguments,
            train_dataset=self.data,
            data_collator=default_data_collator,
            teacher_folders=[str(self.folder / "teacher")],
        )
        trainer.current_gradient_accumulation_steps = 1
        loader = trainer.get_train_dataloader()
        # A copy that shares all weights: what has the forward pass compute in bfloat16 is not to be in the others' way.
        model = trainer.accelerator.prepare_model(copy.copy(trainer.model))

        def step() -> Any:
            trainer.model.zero_grad()
            [batch], items = trainer.get_batch_samples(iter(loader), 1, arguments.device)
            return trainer.training_step(model, batch, items)

        return step

    def _batch(self) -> dict[str, Tensor]:
        return {name: values.to(self.options.device) for name, values in self.data.with_format("torch")[:].items()}

    def _naive(self, positions: str) -> Callable[[], Any]:
        student, teacher, batch = self.student.train(), self.teacher.eval(), self._batch()

        def step() -> Any:
            student.zero_grad()
            with self.autocast():
                loss = naive_triple_loss(student, teacher, **batch, everywhere=positions == "all")
            loss.backward()
            return loss.detach()

        return step

    def _teacher_forward(self) -> Callable[[], Any]:
        inputs = {k: v for k, v in self._batch().items() if k != "labels"}

        def step() -> Any:
            with torch.inference_mode(), self.autocast():
                return self.teacher.eval().base_model(**inputs)

        return step


def naive_triple_loss(
    student: BertForMaskedLM,
    teacher: BertForMaskedLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    everywhere: bool,
) -> Tensor:
    """All logits of both, then a selection of them."""
    ours = student(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    attended = attention_mask.bool().unsqueeze(-1)
    chosen = (attended if everywhere else labels.ne(-100).unsqueeze(-1)).expand_as(ours.logits)
    s, t = (each.logits.masked_select(chosen).view(-1, each.logits.shape[-1]) for each in (ours, theirs))
    divergence = F.kl_div(F.log_softmax(s / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1), reduction="batchmean")
    hard = F.cross_entropy(ours.logits.view(-1, ours.logits.shape[-1]), labels.view(-1))
    h, g = (each.hidden_states[-1] for each in (ours, theirs))
    h, g = (each.masked_select(attended.expand_as(each)).view(-1, each.shape[-1]) for each in (h, g))
    cosine = F.cosine_embedding_loss(h, g, h.new_ones(len(h)))
    return WEIGHTS["soft"] * TEMPERATURE**2 * divergence + WEIGHTS["hard"] * hard + WEIGHTS["cosine"] * cosine


def _masked_text(options: argparse.Namespace) -> Dataset:
    """One batch: random tokens, 15 % of them to be guessed."""
    draw = torch.Generator().manual_seed(0)
    shape = (options.batch, options.tokens)
    words = torch.randint(5, options.vocabulary, shape, generator=draw)
    labels = torch.where(torch.rand(shape, generator=draw) < 0.15, words, -100)
    columns = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    return Dataset.from_dict({name: values.tolist() for name, values in columns.items()})


def _in_fresh_process(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _status(name: str) -> int:
    """Bytes, as Linux counts them of this process; `getrusage` would count the parent's peak too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
