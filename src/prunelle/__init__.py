"""Prunelle makes transformer models small and fast, and proves that they still predict the same.

The rooms: `prunelle.losses`, `prunelle.compression`, `prunelle.tasks`, `prunelle.trainers`, `prunelle.export`.
"""

from importlib.metadata import version
from pathlib import Path

__version__ = version("prunelle")

if (Path(__file__).parent / "losses").is_file():
    raise ImportError(
        f"{Path(__file__).parent / 'losses'} is a text file where a symbolic link should be: git checked the links "
        "out as text (Windows without developer mode does). Run `git config core.symlinks true`, then check out "
        "again, or install the wheel."
    )
