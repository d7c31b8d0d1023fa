"""What a run was made on: the hardware, the versions, the commit, and the load of the machine."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil


def environment() -> dict[str, Any]:
    """The machine and the versions that matter for a result."""
    packages = ("torch", "ray", "deepspeed", "webdataset", "mlflow", "numpy", "pillow")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": _gpu_names(),
        "packages": {name: installed_version(name) for name in packages},
    }


def code_version() -> dict[str, str]:
    """The commit of the code that runs, where git knows it, and the version of the package."""
    tags = {"measnet.version": installed_version("measnet-ray")}
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(here), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return done.stdout.strip()

        if git("ls-files", "environment.py"):  # not merely installed below somebody's repository
            tags["mlflow.source.git.commit"] = git("rev-parse", "HEAD")
            changed = git("status", "--porcelain", "--untracked-files=no")
            tags["measnet.code_changed"] = str(bool(changed)).lower()
    return tags


def installed_packages() -> str:
    """Every installed distribution as `name==version`, sorted, a line each; see `requirement`."""
    found = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    lines = (requirement(name) for name in found if name)
    return "\n".join(sorted(lines, key=str.lower)) + "\n"


def requirement(distribution: str) -> str:
    """`name==version` of an installed distribution, with the version that a package index knows.

    A build's own part of the version, as in `2.13.0+cpu`, is not on PyPI, so it is left out.
    """
    return f"{distribution}=={installed_version(distribution).split('+')[0]}"


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or `not installed`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class SystemMetrics:
    """Load of this machine, under the names that MLflow's page `System metrics` shows."""

    def __init__(self) -> None:
        """Start counting the network's bytes."""
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        """CPU and GPU in per cent, memory, disk and network in MB."""
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
            **_gpus(),
        }
        return {f"system/{name}": float(value) for name, value in values.items()}


def _gpus() -> dict[str, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    values = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        values[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
        values[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
        with contextlib.suppress(Exception):  # needs NVIDIA's management library
            values[f"gpu_{index}_utilization_percentage"] = torch.cuda.utilization(index)
    return values


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
