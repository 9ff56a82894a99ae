"""Files and folders that are either whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunelle.errors import InputError


@contextmanager
def published_when_done(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target`, and renames it to `target` when the block ends well.

    When the block raises, the temporary file is gone and an older `target` is as it was. The path lies
    in a folder of its own, so that whatever a writer leaves beside its file goes with it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        yield unfinished
        os.replace(unfinished, target)


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside `target`, which becomes `target` when the block ends well.

    Raises:
        InputError: at once, when something is at `target` already, other than an empty folder.
    """
    target = Path(target).absolute()  # "." has no name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already holds something: give another --output_dir, or remove it")
    with published_when_done(target) as unfinished:
        unfinished.mkdir()
        yield unfinished
        if target.exists():
            target.rmdir()  # where Windows could not replace it
