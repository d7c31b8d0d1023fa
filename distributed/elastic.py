"""Keeps Ray's view of a cluster fresh, for runs that take any number of workers.

Ray counts what it may give to a run every 20 s; until then a run that lost a node would wait for
workers on the dead one.
"""

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroupContext

COUNT_S = 5.0
"""Seconds that a count may take before a start goes on without it."""


def count_anew() -> ray.ObjectRef:
    """Have Ray count; for nobody in particular: the counting is what is wanted."""
    coordinator = get_or_create_autoscaling_coordinator()
    counted: ray.ObjectRef = coordinator.get_reserved_resources.remote("", recompute=True)
    return counted


class NodeWatch:
    """Tells Ray at once when nodes come or go."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._alive: set[str] = set()

    def look(self) -> None:
        """Have Ray count anew if nodes have come or gone since the last look."""
        try:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        except ray.exceptions.RayError:
            return  # the head does not answer; the run itself says what happened to it
        if alive != self._alive:
            self._alive = alive
            count_anew()


class CountBeforeStart(WorkerGroupCallback):
    """Has Ray count anew between the end of a run's workers and the start of others."""

    def after_worker_group_shutdown(self, worker_group_context: WorkerGroupContext) -> None:
        """Wait for the count: the number of the next workers follows from it."""
        try:
            ray.get(count_anew(), timeout=COUNT_S)
        except ray.exceptions.RayError:
            return  # the count of a while ago has to do
