"""How often a run is restarted: without limit while it makes progress, else a few times.

Progress is a new checkpoint. A run on spot machines may lose a thousand nodes. A run that fails
again and again at the same place has an error that a restart does not remove.
"""

from typing import Any

import ray
from ray.train import UserCallback

from distributed import checkpoint as checkpoints


class NoProgressError(RuntimeError):
    """A run was restarted several times and made no new checkpoint."""

    def __init__(self, restarts: int, worker_failures: dict[int, Exception]) -> None:
        """End after so many restarts; `worker_failures`: rank -> its error at the last failure."""
        super().__init__(
            f"{restarts} restarts in a row made no new checkpoint (scaling.max_failures)"
        )
        self.restarts, self.worker_failures = restarts, worker_failures

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions with other arguments than a message need this to be sent to the driver."""
        return type(self), (self.restarts, self.worker_failures)


class RestartBudget:
    """Counts failures in a row without progress."""

    def __init__(self, limit: int, samples: int) -> None:
        """Allow `limit` restarts in a row (-1: no limit) of a run that has `samples` samples."""
        self._limit, self._samples = limit, samples
        self._failures = 0

    def is_spent(self, samples: int) -> bool:
        """Count a failure while the newest checkpoint has `samples`; whether the run has to end."""
        if samples > self._samples:
            self._samples, self._failures = samples, 0
        self._failures += 1
        return 0 <= self._limit < self._failures


class EndWithoutProgress(UserCallback):
    """Ends a run when its budget is spent; Ray Train itself restarts it without limit.

    Ray calls it in the controller. An error that is raised here ends the run with a
    `ControllerError` that contains it.
    """

    def __init__(self, folder: str, limit: int, samples: int) -> None:
        """Watch the run in `folder`; see `RestartBudget`."""
        self._folder, self._limit = folder, limit
        self._budget = RestartBudget(limit, samples)
        self._newest = samples

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count the failure of the workers; a node that is taken away with notice does not count.

        Raises:
            NoProgressError: the budget is spent.
        """
        for error in worker_exceptions.values():
            if isinstance(error, ray.exceptions.RayActorError) and error.preempted:
                return
        try:
            listed = checkpoints.listed(self._folder)
            self._newest = listed[-1].samples if listed else 0
        except OSError:
            pass  # the storage fails too, so no progress is known; it may work after the restart
        if self._budget.is_spent(self._newest):
            raise NoProgressError(self._limit, worker_exceptions)
