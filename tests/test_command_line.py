"""Recipes and flags, and the processes that a launcher starts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelle.cli import main, parse
from prunelle.errors import InputError
from prunelle.launch import check_processes, processes_asked_of_accelerate, was_left_one_thread
from prunelle.tasks import DataArguments
from prunelle.trainers import DistillationArguments

ROOT = Path(__file__).parents[1]


def recipe(tmp_path: Path, text: str) -> str:
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    """Prevents a sweep whose flag is silently overruled by its recipe."""
    path = recipe(tmp_path, "train_file: a.csv\nmax_seq_length: 64\nbf16: false\nreport_to: [none]\ntemperature: 3\n")
    words = ["--max_seq_length", "32", "--output_dir", str(tmp_path)]
    data, arguments, _ = parse(["--config", path, *words], DataArguments, DistillationArguments)
    assert (data.train_file, data.max_seq_length) == ("a.csv", 32)
    assert arguments.temperature == 3.0
    assert arguments.report_to == []


def test_what_was_given_is_a_recipe_that_does_the_same(tmp_path: Path) -> None:
    """Prevents a compression.json that does not say how to do it again, or that tells secrets."""
    path = recipe(tmp_path, "train_file: a.csv\ntemperature: 4\nseed: 1\n")
    words = ["--config", path, "--output_dir", str(tmp_path), "--seed", "3", "--hub_token", "secret"]
    *first, said = parse(words, DataArguments, DistillationArguments)
    assert said == {"train_file": "a.csv", "temperature": 4.0, "seed": 3, "output_dir": str(tmp_path)}
    *again, _ = parse(["--config", recipe(tmp_path, yaml.safe_dump(said))], DataArguments, DistillationArguments)
    assert again[0] == first[0]
    assert again[1].to_dict() == first[1].to_dict() | {"hub_token": again[1].to_dict()["hub_token"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- a\n- b\n", "must be a mapping"), ("a: [\n", "is not YAML"), ("config: x\n", "unknown key")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """Prevents an empty recipe from passing for the one that was meant."""
    with pytest.raises(InputError, match=expected):
        parse(["--config", recipe(tmp_path, text)], DataArguments)


def test_the_console_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a script that the console command does not know."""
    assert main([]) == 0
    shown = capsys.readouterr().out
    for script in (ROOT / "scripts").glob("[a-z]*.py"):
        assert f"  {script.stem} " in shown


class Parent:
    """A process with a command line and an environment."""

    def __init__(self, line: str, environment: str = "") -> None:
        self.line, self.environment = line, environment

    def cmdline(self) -> list[str]:
        return self.line.split()

    def environ(self) -> dict[str, str]:
        return dict(word.split("=") for word in self.environment.split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python /venv/bin/accelerate launch --cpu --num_processes 2 scripts/distill.py --seed 1", 2),
        ("accelerate launch --cpu --num-processes=3 scripts/distill.py", 3),
        ("accelerate launch scripts/distill.py --num_processes 4", 1),
        ("bash launch --num_processes 2", 1),
    ],
)
def test_what_accelerate_was_asked_for_is_read_off_its_command_line(line: str, expected: int) -> None:
    """Prevents a script's own flag from passing for the launcher's."""
    parent: Any = Parent(line)
    assert processes_asked_of_accelerate(parent) == expected


def test_a_configuration_file_is_asked_too(tmp_path: Path) -> None:
    """Prevents the silence where the number of processes stands in accelerate's own file."""
    (tmp_path / "cpu.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    parent: Any = Parent(f"accelerate launch --config_file {tmp_path}/cpu.yaml scripts/distill.py")
    assert processes_asked_of_accelerate(parent) == 2


@pytest.mark.parametrize(
    ("line", "environment", "expected"),
    [
        ("accelerate launch scripts/distill.py", "", True),
        ("accelerate launch scripts/distill.py", "OMP_NUM_THREADS=1", False),
        ("accelerate launch --num_cpu_threads_per_process 1 scripts/distill.py", "", False),
        ("bash", "", False),
    ],
)
def test_one_thread_is_told_from_one_that_was_asked_for(line: str, environment: str, expected: bool) -> None:
    """Prevents a CPU's cores from idling behind accelerate's default; and a user's own choice from being overruled."""
    parent: Any = Parent(line, environment)
    assert was_left_one_thread(parent) is expected  # the tests' own OMP_NUM_THREADS is 1


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents two processes that each believe to be alone from writing the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started and 1 train together"):
        check_processes()


def test_accelerate_that_starts_one_process_of_two_is_spoken_of(tmp_path: Path) -> None:
    """Prevents a run of half the batch from passing for the one that was asked for."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text("{}")  # so that nothing is trained
    words = ["--config", "recipes/quickstart.yaml", "--output_dir", str(tmp_path / "run")]
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "scripts/distill.py", *words], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert "asked for 2 processes and started 1" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr
    assert "already holds a run" in done.stderr
