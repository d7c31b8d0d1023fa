"""The settings of Ray Train and of Ray's jobs that are environment variables only. Tested with Ray
2.60.

Ray's manual names few of them. test_internals.py::test_ray_knows_the_variables fails when Ray
renames one. Does not import Ray, because Ray reads at its import whether it needs a token.
"""

import os

import fsspec

JOB, JOB_STOP_S = "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment of a job of `ray job submit`; after `ray job stop` Ray waits so many seconds. No
public call says whether this process is a job. test_restarts.py."""
JOB_STOP_DEFAULT_S = 3.0
"""Ray's own value where the head sets none."""

LEAVE_S = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
"""Seconds that the workers' process group may take to shut down. A hung worker never does; by
default Ray waits 30 s before it replaces it."""

PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether a process looks for pre-emption; a local machine does not need it."""

ENVIRONMENT = {
    # Otherwise each printed line appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Seconds between two checks of the workers: the lower, the sooner a lost one is replaced.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    LEAVE_S: "5",
}
START_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Seconds that the workers may take to start."""
HEALTH_S = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""Seconds after which a worker that does not answer counts as lost."""
LISTED_CHECKPOINTS = "checkpoint_manager_snapshot.json"
"""Ray's list of the checkpoints of a run, in the run's folder."""


def configure(start_s: float, health_s: float) -> None:
    """Set the variables, before Ray starts; those that the caller has set are kept, but for the
    two times, which are options of a run."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[START_S], os.environ[HEALTH_S] = str(start_s), str(health_s)


def forget_listed_checkpoints(fs: fsspec.AbstractFileSystem, root: str) -> None:
    """Remove Ray's own list of checkpoints of an earlier launch.

    Ray refuses to start if its list names a checkpoint that is gone, and has no option to leave
    the list unread. This program reads the folder instead and verifies what it finds.
    test_checkpoint.py.
    """
    path = f"{root}/{LISTED_CHECKPOINTS}"
    if fs.exists(path):
        fs.rm(path)
