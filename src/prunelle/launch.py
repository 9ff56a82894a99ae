"""How a run starts: its processes, its seed, its logs and its output folder."""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from prunelle.errors import InputError
from prunelle.export.hub import repository_of
from prunelle.tasks import DataArguments

logger = logging.getLogger(__name__)


def start(arguments: TrainingArguments, data: DataArguments) -> None:
    """Seed everything, start the logs, and see that the run can begin.

    Raises:
        InputError: The output folder is not empty (and no checkpoint in it is resumed), the processes
            started do not know of each other, the run would have no end, windows would lose their order, or the
            Hub's repository that it is to be pushed to cannot be written to.
    """
    start_logging()
    # The Trainer pins memory unless told not to, and torch tells everyone without a GPU on every epoch.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    check_processes()
    check_output_dir(arguments)
    if data.streaming and arguments.max_steps < 1:
        raise InputError("a stream has no epochs: give --max_steps with --streaming")
    if data.task == "question-answering" and arguments.train_sampling_strategy == "group_by_length":
        raise InputError(
            "--train_sampling_strategy group_by_length would mix up the windows of a context, which are all of one "
            "length: leave it out with --task question-answering"
        )
    if PartialState().is_main_process:
        repository_of(arguments)
    set_seed(arguments.seed)


def start_logging() -> None:
    """Let only the first process log, and the libraries only where something is wrong."""
    first = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "httpcore", "absl", "torch.onnx", "onnxscript", "onnx_ir", "evaluate", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    (transformers.logging.set_verbosity_warning if first else transformers.logging.set_verbosity_error)()
    if not first:
        datasets.disable_progress_bars()


def check_output_dir(arguments: TrainingArguments) -> None:
    """See that nothing would be overwritten. The first process looks, before any of them writes.

    Raises:
        InputError: The folder is not empty, or there is no checkpoint to resume from.
    """
    if arguments.output_dir is None:
        raise InputError("no output folder: give --output_dir DIR")
    folder = Path(arguments.output_dir)
    if arguments.resume_from_checkpoint is not None:
        if not Path(arguments.resume_from_checkpoint).is_dir():
            raise InputError(f"no checkpoint folder {arguments.resume_from_checkpoint} to resume from")
    elif PartialState().is_main_process and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} already holds a run: give another --output_dir, remove it, or go on with it by "
            f"--resume_from_checkpoint {folder}/checkpoint-N"
        )


def check_processes() -> None:
    """See that the processes asked for are those that train together, and that they use the cores.

    `accelerate launch --cpu --num_processes N` starts one process without mpirun, and says nothing; without
    `--cpu` it leaves that process one thread.

    Raises:
        InputError: Several processes were started that each believe to be alone: they would all write the
            same files.
    """
    started, known = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if started != known:
        raise InputError(
            f"{started} processes were started and {known} train together: on CPUs start them with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {started}"
        )
    parent = psutil.Process().parent()
    asked = processes_asked_of_accelerate(parent)
    if asked > known:
        logger.warning(
            "accelerate launch was asked for %d processes and started %d, which trains alone; on CPUs start them "
            "with ACCELERATE_USE_CPU=true torchrun --nproc_per_node %d",
            *(asked, known, asked),
        )
    if known == 1 and not torch.cuda.is_available() and was_left_one_thread(parent):
        torch.set_num_threads(psutil.cpu_count(logical=False) or 1)


def processes_asked_of_accelerate(parent: psutil.Process | None) -> int:
    """How many processes the `accelerate launch` that is our parent was asked for; 1 where none is.

    Asked by its `--num_processes`, or by its configuration file. Accelerate passes the number on in no other way.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    arguments = arguments_of_accelerate(parent)
    if arguments is None:
        return 1
    if arguments.num_processes is None and (arguments.config_file or Path(default_config_file).is_file()):
        return load_config_from_file(arguments.config_file).num_processes or 1
    return arguments.num_processes or 1


def was_left_one_thread(parent: psutil.Process | None) -> bool:
    """Whether the `accelerate launch` that is our parent chose one thread of itself.

    Without `--cpu` it sets OMP_NUM_THREADS to 1 where nobody has set it, which suits a GPU and leaves a CPU's
    other cores idle.
    """
    arguments = arguments_of_accelerate(parent)
    if parent is None or arguments is None or arguments.num_cpu_threads_per_process is not None:
        return False
    return "OMP_NUM_THREADS" not in parent.environ() and os.environ.get("OMP_NUM_THREADS") == "1"


def arguments_of_accelerate(parent: psutil.Process | None) -> argparse.Namespace | None:
    """The parsed command line of our parent process, where that is `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    try:
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return None
    if "launch" not in words[:3] or Path(words[words.index("launch") - 1]).name != "accelerate":
        return None
    return launch_command_parser().parse_args(words[words.index("launch") + 1 :])
