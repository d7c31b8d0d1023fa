"""Whether accelerated code may run at all; otherwise torch computes everything."""

from collections.abc import Iterator
from contextlib import contextmanager

_allowed = True


def acceleration_allowed() -> bool:
    """False inside `torch_only`."""
    return _allowed


@contextmanager
def torch_only() -> Iterator[None]:
    """Within it torch computes every operation, without the kernels for CPUs and GPUs.

    For one thread at a time.
    """
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before
