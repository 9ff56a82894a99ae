"""An output folder on the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from prunelle.compression.record import RECORD_NAME, as_text, read_record, without_folders
from prunelle.errors import InputError

# Checkpoints to resume from, logs, and files that are not whole.
LEFT_OUT = ["checkpoint-*/**", "runs/**", "*.unfinished-*/*", "_*", *DEFAULT_IGNORE_PATTERNS]


def repository_of(arguments: Any) -> str | None:
    """Make the repository that `--push_to_hub` asks for, where there is none yet; None where it is not asked.

    Args:
        arguments: `push_to_hub`, `hub_model_id`, `hub_token` and `hub_private_repo` of `TrainingArguments` or alike.

    Returns:
        Its full name: `--hub_model_id`, or the output folder's name under the user's.

    Raises:
        InputError: It cannot be made or written to.
    """
    if not arguments.push_to_hub:
        return None
    name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
    api = HfApi(token=arguments.hub_token)
    try:
        return api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # of whatever library the Hub's client talks HTTP with
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"--push_to_hub: there is no writing to {name}: {reason}") from error


def upload(folder: Path, repository: str | None, arguments: Any) -> None:
    """Put a folder into a repository, if there is one, as one commit, without what only its own machine needs.

    The records keep no more of this machine's paths than their last parts; here they name what was read.
    """
    if repository is None:
        return
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    HfApi(token=arguments.hub_token).create_commit(
        repo_id=repository,
        operations=[
            CommitOperationAdd(name, _content(files[name]))
            for name in filter_repo_objects(files, ignore_patterns=LEFT_OUT)
        ],
        commit_message="Made with Prunelle",
        revision=arguments.hub_revision,
    )


def _content(file: Path) -> Path | bytes:
    if file.name != RECORD_NAME:
        return file
    return as_text(without_folders(read_record(file.parent))).encode()
