"""What training needs of Ray beyond its documented interface. Tested with Ray 2.60."""

import os
import socket
from typing import Any

import ray
from ray._private import services
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroupContext

from distributed.internals.versions import untested

TESTED = "2.60"
"""Ray's version that everything here was tested with."""
LOOPBACK = "127.0.0.1"
COUNT_S = 5.0
"""Seconds that a count of the resources may take; after that a start uses the last count."""


def version_warning() -> str:
    """A warning if Ray has another version than the tested one; else empty."""
    return untested("ray", TESTED, "make test-slow")


def init_on_loopback(**options: Any) -> None:
    """Start a local Ray that listens on 127.0.0.1 only; `options` are those of `ray.init`.

    * Ray replaces 127.0.0.1 by the machine's outward address and listens on that. No argument of
      `ray.init` changes this.
    * No documented argument names the address of the node.
    * Processes of Ray Train connect to RAY_ADDRESS, else to any cluster on this machine. Another
      cluster does not know this run, so they would end its workers. So the port is chosen here.

    test_train.py::test_ray_listens_on_this_machine_only.
    """
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    pinned = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{LOOPBACK}:{port}"}
    outward = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    os.environ.update(pinned)
    try:
        ray.init(address="local", _node_ip_address=LOOPBACK, include_dashboard=False, **options)
    finally:
        services.resolve_ip_for_localhost = outward
        for name in pinned:  # for Ray's own processes only
            del os.environ[name]


class ShardTrainer(TorchTrainer):
    """A `TorchTrainer` without the manager of Ray datasets, because samples come from shards.

    The manager is a process whose imports take seconds at each start, also after the loss of a
    worker. No argument switches it off. test_train.py::test_a_run_leaves_what_is_needed fails if
    the overridden method is gone; bench/overhead.py shows the seconds.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        given = super()._create_default_callbacks()
        return [one for one in given if not isinstance(one, DatasetsCallback)]


def _recount() -> ray.ObjectRef:
    """Make Ray count its free resources now; the result itself is not needed.

    Ray counts every 20 s, and no public call makes it count earlier. Until then a run that lost a
    node would wait for workers on the dead node. tests/test_lost_nodes.py.
    """
    coordinator = get_or_create_autoscaling_coordinator()
    counted: ray.ObjectRef = coordinator.get_reserved_resources.remote("", recompute=True)
    return counted


class NodeWatch:
    """Makes Ray count its resources when nodes come or go."""

    def __init__(self) -> None:
        """No node is known yet."""
        self._alive: set[str] = set()

    def look(self) -> None:
        """Compare the nodes with those of the last call."""
        try:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        except ray.exceptions.RayError:
            return  # the head does not answer; the run itself reports that
        if alive != self._alive:
            self._alive = alive
            _recount()


class RecountBeforeStart(WorkerGroupCallback):
    """Makes Ray count its resources after a run's workers have ended and before new ones start.

    Ray Train has no public callback at this point. tests/test_nodes.py.
    """

    def after_worker_group_shutdown(self, worker_group_context: WorkerGroupContext) -> None:
        """Wait for the count, which determines the number of the next workers."""
        try:
            ray.get(_recount(), timeout=COUNT_S)
        except ray.exceptions.RayError:
            return  # the start uses the last count
