"""stub"""

from pathlib import Path

from tune.record import Record


def write(record: Record, path: Path) -> Path:
    path.write_text("x")
    return path
