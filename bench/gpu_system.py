"""Training in `distributed.train`, with Ray, DeepSpeed, data and tracking, on one GPU."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from skimage import data

from distributed.config import (
    DataConfig,
    IntervalConfig,
    Recipe,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)
from distributed.launch import launch
from distributed.mlflow_tracker import read_metrics
from distributed.run_log import CONSUMED
from measnet import config as configs
from shards.packing import pack

MICRO_BATCH, CROP = 8, 128
GLOBAL_BATCH = 32
WARM_UP = 8
"""Steps that do not count."""


def run_system(
    *, steps: int = 60, small: bool = False, device: str = "gpu"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Samples per second between the steps of a run, and seconds until the first one.

    Raises:
        RuntimeError: the run did not finish.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = folder / "pictures"
        pictures.mkdir()
        for picture in ("astronaut", "coffee", "chelsea", "rocket"):
            Image.fromarray(getattr(data, picture)()).save(pictures / f"{picture}.png")
        pack("clean", str(pictures), str(folder / "train"), workers=1)
        crop, micro = (16, 2) if small else (CROP, MICRO_BATCH)
        batch = micro * GLOBAL_BATCH // MICRO_BATCH
        noise = {"denoise_15": 1, "denoise_25": 1, "denoise_50": 1}
        config = TrainConfig(
            name="bench-gpu",
            storage=str(folder / "runs"),
            model=replace(configs.tiny() if small else configs.paper(), expert_path="dense"),
            data=DataConfig(
                train=str(folder / "train"),
                validation=str(folder / "train"),
                crop=crop,
                repeats=noise,
                loader_workers=0 if small else 8,
            ),
            recipe=Recipe(samples=steps * batch, global_batch=batch, micro_batch=micro),
            every=IntervalConfig(
                checkpoint=steps * batch, validate=0, validation_pictures=1, log=10 * batch
            ),
            scaling=ScalingConfig(device="cpu" if device == "cpu" else "gpu"),
            tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
        )
        started = time.time()
        outcome = launch(config, console=Console(stderr=True), export=False)
        if outcome.status != "finished":
            raise RuntimeError(f"the run {outcome.status}: {outcome.reason}")
        lines = (Path(config.folder) / CONSUMED).read_text().splitlines()
        ends = [json.loads(line)["time"] for line in lines]
        points = [record["metrics"] for record in read_metrics(config.folder)]
        (first_s,) = (one["speed/first_step_s"] for one in points if "speed/first_step_s" in one)
    took = [later - earlier for earlier, later in itertools.pairwise(ends)][WARM_UP:]
    ms = statistics.median(took) * 1e3
    yield (
        f"{'tiny' if small else 'paper'} system {micro}x{crop}",
        {
            "ms": ms * micro / batch,
            "samples_per_s": batch / ms * 1e3,
            "workers_to_first_step_s": first_s,
            "command_to_first_step_s": ends[0] - started,
        },
    )
