"""Records where a run trained: hardware, versions and commit; and the load of the machine."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from shards.storage import open_folder, read_json, write_json

if TYPE_CHECKING:
    import torch

ENVIRONMENT = "environment.json"
"""File of a run: hardware of the workers and versions at the latest start."""

PACKAGES = ("torch", "ray", "deepspeed", "webdataset", "mlflow", "numpy", "pillow")
"""Distributions whose version can change a result."""

COMPILED = {
    "kernels_avx512": "measnet.ops._kernels16",
    "kernels_avx2": "measnet.ops._kernels8",
    "png_qoi_decoder": "shards._pixels",
    "jpeg_decoder": "shards._jpeg",
}
"""Optional compiled parts of this project: name -> module."""

CPU_INFO = Path("/proc/cpuinfo")
"""Linux writes the processor's name here."""


def driver_process() -> dict[str, Any]:
    """Host and versions of the process that starts the workers; asks no GPU."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
    }


def hardware(device: "torch.device") -> dict[str, Any]:
    """Hardware of a worker, for JSON.

    Asks only the worker's own card: asking another one would open a CUDA context there.

    Args:
        device: of the worker.
    """
    import torch

    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "device": device.type,
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled": [name for name, module in COMPILED.items() if importable(module)],
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        cudnn = torch.backends.cudnn.version()
        found |= {
            "card": card.name,
            "card_memory_gib": round(card.total_memory / 2**30, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": cudnn,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def by_hardware(of_ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per different hardware, with the `ranks` and `hosts` that have it.

    Args:
        of_ranks: `hardware` of each rank, in order.
    """
    entries: list[dict[str, Any]] = []
    for rank, own in enumerate(of_ranks):
        rest = {name: value for name, value in own.items() if name != "host"}
        same = next((entry for entry in entries if rest.items() <= entry.items()), None)
        if same is None:
            same = {"ranks": [], "hosts": [], **rest}
            entries.append(same)
        same["ranks"].append(rank)
        if own["host"] not in same["hosts"]:
            same["hosts"].append(own["host"])
    return entries


def hardware_changes(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Each difference as `card NVIDIA A100 -> NVIDIA H100`.

    Names of hosts and the number of workers are not compared.

    Args:
        before: from `by_hardware`, at an earlier start.
        now: the same, at this one.
    """
    names = dict.fromkeys(name for entry in [*before, *now] for name in entry)
    changes = []
    for name in names:
        if name not in ("ranks", "hosts") and _values(before, name) != _values(now, name):
            changes.append(f"{name} {_values(before, name)} -> {_values(now, name)}")
    return changes


def code_version() -> dict[str, str]:
    """The commit of the running code, if it is in a git repository, and the package's version."""
    tags = {"measnet.version": installed_version("measnet-ray")}
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(here), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return done.stdout.strip()

        if git("ls-files", "environment.py"):  # not if it is installed inside another repository
            tags["mlflow.source.git.commit"] = git("rev-parse", "HEAD")
            # results/ holds no code: a benchmark that writes there does not change the program.
            whole = (":(top)", ":(top,exclude)results")
            changed = git("status", "--porcelain", "--untracked-files=no", "--", *whole)
            tags["measnet.code_changed"] = str(bool(changed)).lower()
    return tags


def installed_packages() -> str:
    """All installed distributions as `name==version`, one per line, sorted; see `requirement`."""
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    lines = (requirement(name) for name in found if name)
    return "\n".join(sorted(lines, key=str.lower)) + "\n"


def requirement(distribution: str) -> str:
    """`name==version` of an installed distribution, as on PyPI.

    The local part of a version, as in `2.13.0+cpu`, is not on PyPI, so it is left out.
    """
    return f"{distribution}=={installed_version(distribution).split('+')[0]}"


NOT_INSTALLED = "not installed"
"""Stands for the version of a distribution that is not there."""


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or `NOT_INSTALLED`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


class SystemMetrics:
    """Load of this machine, under the names that MLflow's page `System metrics` expects."""

    def __init__(self, card: "torch.device | None" = None) -> None:
        """Start counting the network's bytes.

        Args:
            card: the GPU of this process; None: no GPU. Other GPUs are never asked, because that
                would open a CUDA context on each of them.
        """
        self._card = card
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        """Use of CPU and GPU in per cent; memory, disk and network in MB."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.getcwd())
        network = psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_usage_percentage": disk.percent,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / 1e6,
            **(_load_of(self._card) if self._card is not None else {}),
        }
        return {f"system/{name}": float(value) for name, value in values.items()}


def _load_of(card: "torch.device") -> dict[str, float]:
    """Memory of this process's card; also its load if nvidia-ml-py is installed."""
    import torch

    free, total = torch.cuda.mem_get_info(card)
    prefix = f"gpu_{card.index or 0}"
    values: dict[str, float] = {
        f"{prefix}_memory_usage_megabytes": (total - free) / 1e6,
        f"{prefix}_memory_usage_percentage": 100 * (total - free) / total,
    }
    if importlib.util.find_spec("pynvml"):
        nvml = importlib.import_module("pynvml")
        with contextlib.suppress(
            nvml.NVMLError, RuntimeError
        ):  # a part of a card (MIG) has no such value
            values[f"{prefix}_utilization_percentage"] = torch.cuda.utilization(card)
    return values


def replace_environment(folder: str, environment: Mapping[str, Any]) -> list[str]:
    """Write a run's environment.json; returns how the workers differ from the last start's.

    Args:
        folder: folder or URI of the run.
        environment: `workers`, from `by_hardware`, and `driver_process`.

    Returns:
        See `hardware_changes`; empty at a run's first start.
    """
    fs, root = open_folder(folder)
    path = f"{root}/{ENVIRONMENT}"
    before = read_json(fs, path)["workers"] if fs.exists(path) else environment["workers"]
    write_json(fs, path, environment)
    return hardware_changes(before, environment["workers"])


def record_environment(
    device: "torch.device", driver_process: Mapping[str, Any], folder: str
) -> tuple[dict[str, Any], list[str]]:
    """Gather the hardware of all ranks and write it to the run's folder; a collective call.

    Args:
        device: of this rank.
        driver_process: versions and machine of the process that started the run.
        folder: folder or URI of the run.

    Returns:
        The environment; and, on rank 0, how the workers differ from those of the last start.
    """
    import torch.distributed as dist

    of_ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, hardware(device))
    environment = {"workers": by_hardware(of_ranks), "driver_process": dict(driver_process)}
    changes = replace_environment(folder, environment) if dist.get_rank() == 0 else []
    return environment, changes


def keep_environment(environment: Mapping[str, Any], folder: Path, samples: int) -> Path:
    """Write the environment of a start at `samples` samples; returns the folder of all starts."""
    kept = folder / "environment" / f"{samples:012d}.json"
    kept.parent.mkdir(exist_ok=True)
    write_json(*open_folder(str(kept)), environment)
    return kept.parent


def _values(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """The different values of one field, as text."""
    found = (entry.get(name) for entry in entries)
    words = {
        " and ".join(value) if isinstance(value, list) else str(value)
        for value in found
        if value is not None
    }
    return ", ".join(sorted(words)) or "none"


def processor() -> str:
    """The processor's name on Linux, else its architecture."""
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    """Version of the loaded NVIDIA driver; empty if unknown."""
    from measnet.hardware import DRIVER_VERSION  # imports torch

    with contextlib.suppress(OSError):
        words = DRIVER_VERSION.read_text().split()
        return next((w for w in words if w[:1].isdigit() and "." in w), "")
    return ""


def importable(module: str) -> bool:
    """Whether a module is there and can be loaded on this machine."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False  # not built, or built for another processor
    return True
