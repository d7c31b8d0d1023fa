"""Files that are never seen half-written."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; it gets the name of `path` at the end, if nothing failed.

    It keeps the suffix, which some libraries look at. An existing file is replaced only then.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
