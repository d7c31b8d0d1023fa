"""What `distributed.doctor` finds out about a node: plain facts, without a judgement."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import access
from distributed.environment import COMPILED, importable, installed_version
from shards import patience
from shards.storage import absolute, is_remote

CHECK_S = 20.0
"""Seconds that a check of a store or a server may take."""
RETRY_S = 3.0
"""Seconds for which a store that fails is asked again."""
BLOCK = 32 * 2**20
"""Bytes that are sent to measure the bandwidth between two nodes."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a run will use; an empty one is not checked."""

    storage: str = ""
    train: str = ""
    validation: str = ""
    tracking: str = ""
    cache: str = ""
    shared: str = ""
    """Name of an object in the storage that the first node has written."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """Facts about one node."""

    host: str
    python: str
    versions: dict[str, str]
    """Of the packages that must agree: torch, ray, measnet-ray."""
    torch_problem: str = ""
    """Why torch cannot be imported, or cannot use a card that is there."""
    cards: tuple[tuple[str, int, bool], ...] = ()
    """Name, bytes, and whether it has bf16, of each GPU."""
    driver: str = ""
    """Version of the NVIDIA driver; empty: none is loaded."""
    missing: tuple[str, ...] = ()
    """Compiled parts of this project that are not there."""
    triton: bool = False
    compiler: str = ""
    """Path of a C compiler; empty: none."""
    headers: bool = False
    """Whether Python.h is there."""
    disks: tuple[tuple[str, int, int], ...] = ()
    """Path, free bytes and all bytes of each disk that a run writes to."""
    shared_memory: int | None = None
    """Free bytes of /dev/shm; None: there is no such folder."""
    problems: tuple[tuple[str, str], ...] = ()
    """What was checked (`storage`, `data`, `MLflow`), and why it fails; empty: it works."""
    clock_s: float = 0.0
    """How far its clock is ahead of the first node's, seconds; at least, with the time of the
    message taken off."""
    bandwidth: float | None = None
    """From the first node to this one, bytes a second."""


def inspect_node(targets: Targets) -> Node:
    """Find out about this node; takes a few seconds."""
    from measnet.hardware import DRIVER_VERSION

    cards: tuple[tuple[str, int, bool], ...] = ()
    try:
        from measnet.hardware import this_machine

        machine = this_machine()
        problem = machine.problem
        cards = tuple((card.name, card.memory, card.has_bf16) for card in machine.cards)
    except (ImportError, OSError, RuntimeError) as error:  # an incomplete or a wrong build
        problem = f"torch cannot be imported ({error})"
    driver = DRIVER_VERSION.read_text() if DRIVER_VERSION.exists() else ""
    memory = Path("/dev/shm")
    return Node(
        host=socket.gethostname(),
        python=platform.python_version(),
        versions={name: installed_version(name) for name in ("torch", "ray", "measnet-ray")},
        torch_problem=problem,
        cards=cards,
        driver=next((w for w in driver.split() if w[:1].isdigit() and "." in w), ""),
        missing=tuple(name for name, module in COMPILED.items() if not importable(module)),
        triton=importlib.util.find_spec("triton") is not None,
        compiler=next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), ""),
        headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
        disks=_disks(targets),
        shared_memory=shutil.disk_usage(memory).free if memory.is_dir() else None,
        problems=_problems(targets),
    )


def _disks(targets: Targets) -> tuple[tuple[str, int, int], ...]:
    """The disks of the working folder, Ray's files, the cache and a local storage, each once."""
    local = (
        [absolute(targets.storage)] if targets.storage and not is_remote(targets.storage) else []
    )
    found: dict[int, tuple[str, int, int]] = {}
    for wanted in (*local, os.path.expanduser(targets.cache), tempfile.gettempdir(), os.getcwd()):
        path = Path(wanted).absolute()
        path = next(p for p in (path, *path.parents) if p.exists())
        usage = shutil.disk_usage(path)
        found.setdefault(path.stat().st_dev, (str(path), usage.free, usage.total))
    return tuple(found.values())


def _problems(targets: Targets) -> tuple[tuple[str, str], ...]:
    checks: list[tuple[str, Callable[[], Any]]] = []
    if targets.storage:
        checks.append(("storage", lambda: access.check_storage(targets.storage)))
    if targets.shared:
        checks.append(("storage", lambda: access.check_shared(targets.storage, targets.shared)))
    if targets.train:
        checks.append(("training data", lambda: access.check_data(targets.train)))
    if targets.validation:
        checks.append(("validation data", lambda: access.check_data(targets.validation)))
    if targets.tracking:
        checks.append(("MLflow", lambda: access.check_tracking(targets.tracking)))
    # All at once, because a server that does not answer makes each of them wait.
    with patience.limited_to(RETRY_S):
        return in_time([(name, check) for name, check in checks], CHECK_S)


def in_time(
    checks: Sequence[tuple[str, Callable[[], Any]]], limit_s: float
) -> tuple[tuple[str, str], ...]:
    """Run checks side by side; why each fails, or `""`. One that takes too long fails."""
    reasons = [f"no answer within {limit_s:.0f} s" for _ in checks]

    def run(number: int, check: Callable[[], Any]) -> None:
        try:
            check()
            reasons[number] = ""
        except OSError as error:
            reasons[number] = str(error)

    threads = [
        threading.Thread(target=run, args=(number, check), daemon=True)
        for number, (_, check) in enumerate(checks)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return tuple((name, reason) for (name, _), reason in zip(checks, tuple(reasons), strict=True))


class Probe:
    """An actor on one node of a cluster."""

    def inspect(self, targets: Targets) -> Node:
        """See `inspect_node`."""
        return inspect_node(targets)

    def now(self) -> float:
        """This node's clock, seconds since 1970."""
        return time.time()

    def block(self) -> bytes:
        """Bytes that another node fetches."""
        return bytes(BLOCK)

    def fetch(self, block: list[Any]) -> float:
        """Bytes a second at which a block of another node comes here."""
        import ray

        started = time.perf_counter()
        return len(ray.get(block[0])) / (time.perf_counter() - started)
