"""A file that is either whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
