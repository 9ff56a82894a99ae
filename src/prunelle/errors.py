"""What the command line turns into a line of text and exit code 2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used: a flag, a file, a column, a folder.

    The message is one line that says what is wrong, where, and what would be right. It is raised
    before long work starts. Errors of the project's own making are other exceptions, with a traceback.
    """


def load_checkpoint_with(load: Callable[..., Any], name_or_path: str, **options: Any) -> Any:
    """Call a stock `from_pretrained`; code that a checkpoint brings along is not run.

    Raises:
        InputError: There is no such checkpoint, or it cannot be loaded.
    """
    try:
        return load(name_or_path, trust_remote_code=False, **options)
    except Exception as error:  # of the hub, of safetensors, of tokenizers and of configurations: each has its own
        if isinstance(error, OSError) and not Path(name_or_path).exists():
            raise InputError(f"no folder {name_or_path}, and no such model can be had from the hub") from error
        reason = " ".join(str(error).split())
        raise InputError(f"{name_or_path} is not a checkpoint that can be loaded: {reason}") from error
