"""A file that is written completely or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .caches import reason_of


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """
    Context for writing a file under a temporary name. At the end it gets its own name; after an error it is removed.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        `OSError`: If it cannot be written, for example because the disk is full.

    Example:

    ```python
    >>> import tempfile

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder, "results.json")) as temporary:
    ...         _ = temporary.write_text("{}")
    ...     os.listdir(folder)
    ['results.json']

    ```
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"Cannot write {str(path)!r} ({reason_of(error)}). Free disk space or fix the permissions, and run it "
            "again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write an object as a whole file of JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
