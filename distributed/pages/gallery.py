"""The pictures of a page: each once, with the restorations of all runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from distributed.pages.render import data_uri
from distributed.pages.runs import QUALITY, RunPage


@dataclass
class Entry:
    """One picture and what the runs did with it."""

    id: str
    """Of its elements on the page."""
    degradation: str
    name: str
    height: int
    width: int
    cut: str
    """Size of the shown part; empty: the whole picture is shown."""
    before: float
    """PSNR in dB of the degraded picture."""
    images: list[tuple[str, str, str]]
    """(Label, alternative text, address): degraded, clean, then a restoration of each run."""
    after: dict[str, float] = field(default_factory=dict)
    """Run -> PSNR in dB of its restoration."""
    inside: list[dict[str, Any]] = field(default_factory=list)
    """For each run with maps: its name (`run`), `id`, `maps` and `bands`."""


def gallery(runs: Sequence[RunPage]) -> list[Entry]:
    """The shown pictures of all runs; runs with the same degraded picture share an entry."""
    entries: dict[tuple[str, str, bytes], Entry] = {}
    for number, run in enumerate(runs):
        for key, shown in run.shown.items():
            score = run.restored.scores[key]
            same = (*key, shown.degraded.tobytes())
            if same not in entries:
                part = shown.part
                whole = (part.height, part.width) == (shown.height, shown.width)
                before = f"degraded, {score.input_psnr:.2f} dB"
                entries[same] = Entry(
                    id=f"picture{len(entries)}",
                    degradation=shown.degradation,
                    name=shown.name,
                    height=shown.height,
                    width=shown.width,
                    cut="" if whole else f"{part.width}×{part.height}",
                    before=score.input_psnr,
                    images=[
                        ("degraded", _alt(shown.name, before), data_uri(shown.degraded, QUALITY)),
                        ("clean", _alt(shown.name, "clean"), data_uri(shown.clean, QUALITY)),
                    ],
                )
            entry = entries[same]
            label = run.name if len(runs) > 1 else "restored"
            after = f"restored by {run.name}, {score.restored_psnr:.2f} dB"
            image = run.restored.images[key]
            entry.images.append((label, _alt(shown.name, after), data_uri(image, QUALITY)))
            entry.after[run.name] = score.restored_psnr
            maps = run.restored.maps.get(key, {})
            bands = run.restored.bands.get(key, {})
            if maps or bands:
                described = {
                    name: {"image": image, "alt": _shares(image)} for name, image in maps.items()
                }
                entry.inside.append(
                    {
                        "run": run.name,
                        "id": f"{entry.id}-run{number}",
                        "maps": described,
                        "bands": bands,
                    }
                )
    return list(entries.values())


def _alt(name: str, what: str) -> str:
    return f"{name}: {what}"


def _shares(image: Image.Image) -> str:
    """`expert 0 62%, expert 3 38%`: how much of the map each expert covers."""
    counts = np.bincount(np.asarray(image).ravel())
    shares = {n: one / counts.sum() for n, one in enumerate(counts) if one}
    return ", ".join(f"expert {n} {share:.0%}" for n, share in shares.items())
