"""Features of a whole picture, kept on the device, in RAM or in a file, read and written in rows.

Files are read and written, not mapped: mapped pages would count as memory of the process.
"""

import math
import tempfile
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor


class Features(Protocol):
    """Features (height, width, channels), fp32."""

    height: int
    width: int
    channels: int

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows, (1, bottom - top, W, C); may share memory with the features."""
        ...

    def write(self, top: int, rows_bhwc: Tensor) -> None:
        """Replace rows from `top` on."""
        ...

    def close(self) -> None:
        """Free the memory or the file."""
        ...


class InMemory:
    """Features in a tensor, on any device."""

    def __init__(self, x_hwc: Tensor, store: "Store | None" = None) -> None:
        """`store`: gets the memory back when the features are closed."""
        self._x: Tensor | None = x_hwc
        self._store = store
        self.height, self.width, self.channels = x_hwc.shape

    def read(self, top: int, bottom: int) -> Tensor:
        """See `Features`."""
        assert self._x is not None
        return self._x[None, top:bottom]

    def write(self, top: int, rows_bhwc: Tensor) -> None:
        """See `Features`."""
        assert self._x is not None
        self._x[top : top + rows_bhwc.shape[1]] = rows_bhwc[0]

    def close(self) -> None:
        """See `Features`."""
        if self._x is not None and self._store is not None:
            self._store.give_back(self._x)
        self._x = None


class InFile:
    """Features in a temporary file without a name, which is deleted when the process ends."""

    def __init__(self, height: int, width: int, channels: int, folder: Path) -> None:
        """`folder`: of the file, which takes 4 bytes a value."""
        self.height, self.width, self.channels = height, width, channels
        self._row = 4 * width * channels
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def read(self, top: int, bottom: int) -> Tensor:
        """See `Features`."""
        rows = torch.empty(1, bottom - top, self.width, self.channels)
        self._file.seek(top * self._row)
        count = self._file.readinto(_bytes(rows))  # type: ignore[attr-defined]
        assert count == (bottom - top) * self._row, "rows that were not written"
        return rows

    def write(self, top: int, rows_bhwc: Tensor) -> None:
        """See `Features`."""
        self._file.seek(top * self._row)
        self._file.write(_bytes(rows_bhwc.float().cpu().contiguous()))

    def close(self) -> None:
        """See `Features`."""
        self._file.close()


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return x.flatten().view(torch.uint8).numpy().data


class Store:
    """Where features are kept: on the device while they fit there, in RAM, in files."""

    def __init__(self, device: torch.device, *, on_device: int, in_ram: int, folder: Path) -> None:
        """`on_device`, `in_ram`: bytes; on a CPU the two are the same memory, so the first is 0."""
        self._free = {device: on_device, torch.device("cpu"): in_ram}
        self._folder = folder
        self.in_files = 0
        """Bytes of all features that went to files."""

    def new(self, height: int, width: int, channels: int) -> Features:
        """Features with no values yet."""
        size = 4 * math.prod((height, width, channels))
        for device, free in self._free.items():
            if size <= free:
                self._free[device] -= size
                return InMemory(torch.empty(height, width, channels, device=device), self)
        self.in_files += size
        return InFile(height, width, channels, self._folder)

    def give_back(self, x: Tensor) -> None:
        """The memory of these features is free again."""
        self._free[x.device] += 4 * x.numel()
