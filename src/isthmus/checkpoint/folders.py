"""Run folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.checkpoint.names import _line, _quoted, _sibling
from isthmus.checkpoint.writing import _sync
from isthmus.errors import CheckpointError

RUN_FILES = ("recipe.yaml", "report.json")  # what shows that a folder is one of our runs


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` as a whole when the block ends, and vanishes if it raises.

    With `force` it replaces a file or one of our run folders. kill -9 leaves at most a hidden sibling `.NAME.*.tmp`
    (the unfinished run) or `.NAME.*.old` (the run that was being replaced).

    Raises:
        CheckpointError: at once, if `path` exists and may not be replaced or nothing can be created beside it; at the
            end, if it could not be moved into place (what stood there is then still there).
    """
    target = Path(os.path.realpath(path))
    try:
        _check_target(target, force)
        temporary = _sibling(target, "tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot create {_quoted(target)} ({_line(error)}); choose another -o") from error
    try:
        yield temporary
        _move(temporary, target, force)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the error that brought us here matters more than a left-over
        raise


def _check_target(target: Path, force: bool) -> None:
    """Raises unless a run may be put at `target`; decided by what stands there, before any work."""
    here = Path.cwd().resolve()
    if target in (here, *here.parents, Path(os.path.realpath(os.path.expanduser("~")))) or os.path.ismount(target):
        raise CheckpointError(f"{_quoted(target)} cannot be replaced as a whole; choose a folder inside it as -o")
    if not os.path.lexists(target) or (target.is_dir() and not os.listdir(target)):
        return
    if not force:
        raise CheckpointError(f"{_quoted(target)} exists; choose another -o or pass --force")
    if not target.is_file() and not any((target / name).is_file() for name in RUN_FILES):
        raise CheckpointError(
            f"{_quoted(target)} is no run folder (no {' or '.join(RUN_FILES)}), so --force does not replace it; "
            "choose another -o"
        )


def _move(temporary: Path, target: Path, force: bool) -> None:
    """Puts a finished folder in place of whatever stands there, or puts that back."""
    backup = _sibling(target, "old")
    try:
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(Path(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync(Path(folder))
        _check_target(target, force)  # again: someone may have put something there meanwhile
        try:
            if os.path.lexists(target):
                os.rename(target, backup)
            os.rename(temporary, target)
        finally:  # by what is there, not by what was done: Ctrl-C may have come between any two lines
            if os.path.lexists(backup) and os.path.lexists(target):
                (shutil.rmtree if backup.is_dir() else os.unlink)(backup)
            elif os.path.lexists(backup):
                os.rename(backup, target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot put the finished folder at {_quoted(target)} ({_line(error)}); make room or choose another -o"
        ) from error
