"""Runs in an object store: a real S3-compatible server on loopback, and several processes."""

import subprocess
import sys

import torch

from distributed import checkpoint as checkpoints
from distributed.config import TrainConfig
from distributed.presets import PRESETS
from measnet.config import to_dict
from tune.trial import take_over

CONFIG = PRESETS["demo"]()

WRITE = """
import sys
from tests.test_stores import write
for samples in map(int, sys.argv[2:]):
    write(sys.argv[1], samples)
"""


def write(run: str, samples: int) -> checkpoints.Checkpoint:
    """A small checkpoint of a run."""
    state = checkpoints.RunState(
        samples=samples, updates=samples, config=to_dict(CONFIG), data="", plan={}
    )
    tensors = {"a": torch.full((2,), float(samples))}
    return checkpoints.Snapshot(state, tensors, tensors, tensors).write(run)


def elsewhere(code: str, *arguments: object) -> str:
    """What another process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_driver_sees_the_checkpoints_that_workers_write(bucket: str) -> None:
    """Listings are not cached: it listed the folder before, as every resumed driver does."""
    run = f"{bucket}/runs/seen"
    write(run, 8)
    assert [c.samples for c in checkpoints.listed(run)] == [8]
    elsewhere(WRITE, run, 16, 24)
    newest = checkpoints.newest_complete(run)
    assert newest is not None and newest.samples == 24
    elsewhere("import sys; from distributed.checkpoint import prune; prune(sys.argv[1], 1)", run)
    assert [c.samples for c in checkpoints.listed(run)] == [24]
    newest = checkpoints.newest_complete(run)
    assert newest is not None and newest.tensors("ema")["a"].tolist() == [24, 24]


def test_a_trial_takes_over_what_another_process_has_just_written(bucket: str) -> None:
    donor, own = f"{bucket}/trials/donor", TrainConfig(name="own", storage=f"{bucket}/trials")
    write(donor, 8)
    old = write(own.folder, 8)
    assert checkpoints.newest_complete(donor) and checkpoints.newest_complete(own.folder)
    elsewhere(WRITE, donor, 16)
    name = checkpoints.listed(donor)[-1].name
    assert take_over(donor, name, own).samples == 16
    assert [c.samples for c in checkpoints.listed(own.folder)] == [16]
    assert old.problem() is not None
