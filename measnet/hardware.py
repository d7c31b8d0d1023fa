"""The hardware of a machine, and the choice of the device.

Decisions are pure functions of a `Machine`, so they can be tested for any card. Only
`this_machine`, `card_of` and `free_memory` look at the real machine. Only they import torch, so
that commands can check their arguments quickly.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]

DRIVER_OF_CUDA = {13: 580, 12: 525, 11: 450}
"""CUDA's major version that torch was built with -> oldest driver that runs it (NVIDIA, CUDA
release notes, minor-version compatibility)."""
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
"""Linux writes the version of the loaded NVIDIA driver here."""


class Peak(NamedTuple):
    """What a card can do at most, by its maker's data sheet."""

    tflops: float
    """Dense products of bf16, accumulated in fp32; 10¹² operations a second."""
    gb_per_s: float
    """Of its memory; 10⁹ bytes a second."""


PEAKS = {
    "H100 PCIe": Peak(756, 2000),
    "H100": Peak(989, 3350),
    "H200": Peak(989, 4800),
    "B200": Peak(2250, 8000),
    "A100-SXM4-80GB": Peak(312, 2039),
    "A100 80GB PCIe": Peak(312, 1935),
    "A100": Peak(312, 1555),
    "L40S": Peak(362, 864),
    "L40": Peak(181, 864),
    "L4": Peak(121, 300),
    "A10G": Peak(70, 600),
    "RTX 5090": Peak(209, 1792),
    "RTX 4090": Peak(165, 1008),
    "RTX 3090": Peak(71, 936),
}
"""Part of the name that the driver gives -> its peak; the first that fits counts."""


def peak(name: str) -> Peak | None:
    """Of a card, by the driver's name for it; None if it is not known."""
    return next((found for part, found in PEAKS.items() if part in name), None)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU."""

    name: str
    memory: int
    """Bytes in all."""
    capability: tuple[int, int]
    """CUDA compute capability: (7, 5) is a T4, (8, 9) an RTX 4090, (9, 0) an H100."""

    @property
    def has_bf16(self) -> bool:
        """Whether it has bf16 in hardware; torch's own function also returns True for emulation."""
        return self.capability >= (8, 0)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware that decisions depend on."""

    cores: int
    """CPU cores."""
    cards: tuple[Card, ...] = ()
    """GPUs that torch can use."""
    problem: str = ""
    """Why an existing GPU cannot be used, and what to do; empty if nothing is wrong."""


class Decision(NamedTuple):
    """A choice of the program, with the reason that is shown to the user."""

    choice: str
    reason: str

    def __str__(self) -> str:
        """`choice: reason`."""
        return f"{self.choice}: {self.reason}"


def this_machine() -> Machine:
    """The machine that this process runs on; opens no CUDA context."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cards: list[Card] = []
    if torch.cuda.is_available():
        found = (card_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))
        cards = [card for card in found if card is not None]
    problem = "" if cards else unusable_card(torch.__version__, torch.version.cuda, _driver())
    return Machine(cores=cores or 1, cards=tuple(cards), problem=problem)


def card_of(device: "torch.device") -> Card | None:
    """The GPU behind `device`; None for a CPU."""
    if device.type != "cuda":
        return None
    import torch

    found = torch.cuda.get_device_properties(device)
    return Card(name=found.name, memory=found.total_memory, capability=(found.major, found.minor))


def _driver() -> str:
    """Linux's text about the loaded NVIDIA driver; empty if there is none."""
    try:
        return DRIVER_VERSION.read_text()
    except OSError:
        return ""


def unusable_card(build: str, cuda_of_torch: str | None, driver: str) -> str:
    """Why torch sees no GPU although a driver is loaded; empty if no driver is loaded.

    Args:
        build: `torch.__version__`.
        cuda_of_torch: `torch.version.cuda`; None for a CPU build.
        driver: the text of /proc/driver/nvidia/version.
    """
    version = next((w for w in driver.split() if w[:1].isdigit() and w.count(".") >= 1), "")
    if not version:
        return ""
    if cuda_of_torch is None:
        return (
            f"a GPU driver ({version}) is loaded, but torch {build} is a CPU build; "
            "install the CUDA build: see 'Which card and driver' in docs/gpu.md"
        )
    needed = DRIVER_OF_CUDA.get(int(cuda_of_torch.split(".")[0]), 0)
    if int(version.split(".")[0]) < needed:
        return (
            f"the GPU driver is {version}, but torch {build} (CUDA {cuda_of_torch}) "
            f"needs {needed} or newer: update the driver, or install a torch build for an older "
            "CUDA (docs/gpu.md)"
        )
    return (
        f"a GPU driver ({version}) is loaded, but torch sees no GPU: "
        "check CUDA_VISIBLE_DEVICES and nvidia-smi"
    )


def choose_device(asked: DeviceChoice, machine: Machine) -> Decision:
    """`cpu` or `cuda` for a command that runs in one process.

    Raises:
        ValueError: `cuda` is requested, but no GPU can be used.
    """
    if asked == "cuda":
        if not machine.cards:
            problem = machine.problem or "torch sees no GPU on this machine"
            raise ValueError(f"device is cuda, but {problem}; or use --device cpu")
        return Decision("cuda", "asked for")
    if asked == "cpu":
        return Decision("cpu", "asked for")
    if machine.cards:
        return Decision("cuda", machine.cards[0].name)
    return Decision("cpu", machine.problem or "no GPU")


def free_memory(device: "torch.device") -> int:
    """Bytes that this process can still allocate on `device`, including torch's free cache.

    The memory pool of a CUDA graph does not count: only the graph can use it.
    """
    if device.type == "cuda":
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        of_graphs = sum(
            one["total_size"] - one["allocated_size"]
            for one in torch.cuda.memory_snapshot()
            if one["device"] == (device.index or 0) and tuple(one["segment_pool_id"]) != (0, 0)
        )
        return int(free + unused - of_graphs)
    import psutil

    return int(psutil.virtual_memory().available)
