"""What a model costs a process that has no other in it: the time to load it, and memory."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import transformers

from prunelle.export.candidates import Candidate
from prunelle.export.latency import full_batch, parse_shape


@dataclass(frozen=True)
class Footprint:
    """
    Attributes:
        load_seconds: from the files, which the operating system has read before, to the first answer. Libraries are
            imported by then; what torch.compile compiles is not.
        peak_memory_bytes: what the process grew by at its largest, over loading and one call at each shape.
    """

    load_seconds: float
    peak_memory_bytes: int


def measure_footprint(
    candidate: Candidate, auto_class_name: str, *, shapes: Sequence[str], vocabulary: int, maximum_length: int
) -> Footprint:
    """Loads and runs the model in a fresh process. Memory that another model left behind would be used again."""
    order = {
        "candidate": asdict(candidate),
        "auto_class_name": auto_class_name,
        "shapes": list(shapes),
        "vocabulary": vocabulary,
        "maximum_length": maximum_length,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from prunelle.export.footprint import main; main()"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{candidate.name}, alone in a process, ended with {done.returncode}:\n{done.stderr}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The fresh process: an order in from stdin, a footprint out to stdout."""
    order = json.load(sys.stdin)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(order["threads"])
    candidate = Candidate(**order["candidate"])
    auto_class = getattr(transformers, order["auto_class_name"])
    batches = [
        full_batch(*parse_shape(shape, order["maximum_length"]), order["vocabulary"]) for shape in order["shapes"]
    ]
    if candidate.format != "onnx":
        with torch.device("meta"):  # imports the model's class, and holds nothing
            auto_class.from_config(candidate.config())
    reset_peak_memory()
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    runner = candidate.load(auto_class)
    runner(batches[0])
    seconds = time.perf_counter() - start
    for batch in batches:
        runner(batch)
    print(json.dumps(asdict(Footprint(seconds, max(0, peak_memory() - before)))))


def reset_peak_memory() -> None:
    """Lets `peak_memory` forget what was before, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes that this process has held in memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage, which on Linux remembers the peak of the parent from before exec
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak
