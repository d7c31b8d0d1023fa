"""Keeps Ray's view of a cluster fresh, for runs that take any number of workers."""

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)


class NodeWatch:
    """Tells Ray at once when nodes come or go.

    Ray counts what it may give to a run every 20 s; until then a run that lost a node would wait
    for workers on the dead one.
    """

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
            # Asked for nobody in particular: the counting is what is wanted.
            get_or_create_autoscaling_coordinator().get_reserved_resources.remote(
                "", recompute=True
            )
