"""Prunelle makes transformer models small and fast, and proves that they still predict the same.

`prunelle.from_pretrained` loads what any step of it wrote, layers of a size of their own included.
The rooms: `prunelle.losses`, `prunelle.compression`, `prunelle.tasks`, `prunelle.trainers`, `prunelle.export`.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelle.compression import from_pretrained as from_pretrained

__version__ = version("prunelle")

if (Path(__file__).parent / "losses").is_file():
    raise ImportError(
        f"{Path(__file__).parent / 'losses'} is a text file where a symbolic link should be: git checked the links "
        "out as text (Windows without developer mode does). Run `git config core.symlinks true`, then check out "
        "again, or install the wheel."
    )


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":  # late, so that losses need torch alone
        from prunelle.compression import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
