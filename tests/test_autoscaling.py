"""Nodes from nothing: training and a search on a cluster whose head has no CPUs.

Ray's autoscaler starts and ends the nodes, with Ray's fake cloud (`tests.autoscaling`).
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed.internals.spot import on_demand
from tests.autoscaling import (
    AutoscalingCluster,
    Recorded,
    SpotFirstRecorded,
    SpotFirstWithoutSpot,
    WithoutSpot,
)
from tests.chaos import Run
from tests.photographs import pack_photographs

CPU_NODE: dict[str, Any] = {
    "resources": {"CPU": 1, "object_store_memory": 80 * 2**20},
    "node_config": {},
    "min_workers": 0,
    "max_workers": 2,
}
SPOT = {"InstanceMarketOptions": {"MarketType": "spot"}}
SPOT_NODE = {"node_config": SPOT}
ASK = """
import sys
import ray
from ray.util import placement_group
ray.init(logging_level="ERROR", log_to_driver=False)
placement_group([{"CPU": 1}, {"CPU": 1}]).wait(float(sys.argv[1]))
"""
"""A program that asks the cluster for two CPUs on two nodes."""


@pytest.mark.parametrize(
    ("node_config", "expected"),
    [
        ({"InstanceType": "g5.4xlarge", **SPOT}, {"InstanceType": "g5.4xlarge"}),
        ({"InstanceType": "m6i.xlarge"}, {"InstanceType": "m6i.xlarge"}),
        (
            {"scheduling": [{"provisioningModel": "SPOT"}, {"onHostMaintenance": "TERMINATE"}]},
            {"scheduling": [{"onHostMaintenance": "TERMINATE"}]},
        ),
    ],
)
def test_an_on_demand_machine_is_the_same_without_the_wish_for_spot(
    node_config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert on_demand(node_config) == expected
    assert on_demand(expected) == expected


@pytest.mark.slow
def test_training_gets_nodes_from_nothing_and_releases_them(tmp_path: Path) -> None:
    data = pack_photographs(tmp_path / "data")
    cluster = AutoscalingCluster(tmp_path, {"cpu": CPU_NODE})
    try:
        assert cluster.nodes() == 0
        more = ("--scaling.workers", "1..2", "--scaling.resize-interval-s", "5")
        run = Run(tmp_path, data, cluster.environment, *more)
        assert run.end() == 0, (tmp_path / "log.txt").read_text()
        assert re.search(r"/ [12] workers", (tmp_path / "log.txt").read_text())
        assert 1 <= len(cluster.machines()) <= 2
        cluster.wait_for(lambda: cluster.nodes() == 0, 120)
    finally:
        cluster.close()


@pytest.mark.slow
def test_a_search_asks_for_nodes_and_says_what_it_waits_for(tmp_path: Path) -> None:
    data = pack_photographs(tmp_path / "data")
    cluster = AutoscalingCluster(tmp_path, {"cpu": CPU_NODE})
    try:
        done = search(tmp_path, data, cluster, "--scaling.start-timeout-s", "1")
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "waiting for 2 workers of 1 CPU (2 trials); the cluster has no CPUs" in output
        assert "the search fails in" in output
        assert "2 trials at a time, each of 1 worker with 1 CPU" in output
        record = json.loads((tmp_path / "runs" / "found" / "search.json").read_text())
        assert [trial["state"] for trial in record["trials"]] == ["finished", "finished"]
        assert len(cluster.machines()) >= 2
        cluster.wait_for(lambda: cluster.nodes() == 0, 120)
    finally:
        cluster.close()


@pytest.mark.slow
def test_a_search_gives_up_by_the_limit_of_training(tmp_path: Path) -> None:
    data = pack_photographs(tmp_path / "data")
    cluster = AutoscalingCluster(tmp_path, {})
    try:
        done = search(tmp_path, data, cluster, "--scaling.give-up-s", "5")
        assert done.returncode == 2
        assert "no room for 2 workers of 1 CPU (2 trials) within 5 s" in done.stderr
    finally:
        cluster.close()


TWO_TYPES = {"a_on_demand": CPU_NODE, "b_spot": CPU_NODE | SPOT_NODE | {"priority": 1}}
ONE_TYPE = {"gpu": CPU_NODE | SPOT_NODE}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("provider", "types", "nodes", "machines"),
    [
        (Recorded, TWO_TYPES, 2, {"spot"}),
        # Two node types do not help: Ray asks for spot machines again and again.
        (WithoutSpot, TWO_TYPES, 0, {"refused"}),
        (SpotFirstRecorded, ONE_TYPE, 2, {"spot"}),
        (SpotFirstWithoutSpot, ONE_TYPE, 2, {"refused", "on demand"}),
    ],
)
def test_spot_machines_come_first_and_on_demand_ones_where_there_are_none(
    tmp_path: Path, provider: Any, types: dict[str, Any], nodes: int, machines: set[str]
) -> None:
    cluster = AutoscalingCluster(tmp_path, types, provider=provider, idle_s=600)
    try:
        ask = [sys.executable, "-c", ASK, "120" if nodes else "20"]
        subprocess.run(ask, env=cluster.environment, check=True)
        assert cluster.nodes() == nodes
        assert set(cluster.machines()) == machines
        assert machines != {"refused"} or len(cluster.machines()) > 4
    finally:
        cluster.close()


def search(
    folder: Path, data: Path, cluster: AutoscalingCluster, *more: str
) -> subprocess.CompletedProcess[str]:
    """Two trials at a time of 8 steps."""
    arguments = [
        *(sys.executable, "-m", "tune.search", "demo", "--name", "found", "--trials", "2"),
        *("--data.train", str(data / "train"), "--data.validation", str(data / "test")),
        *("--data.crop", "32", "--model.dim", "8", "--validations", "2", "--samples", "32"),
        *("--recipe.samples", "32", "--recipe.global-batch", "4", "--recipe.micro-batch", "2"),
        *("--recipe.warmup-samples", "4", "--every.validation-pictures", "1"),
        *("--parallel", "2", "--scaling.cpus-per-worker", "1", *more),
    ]
    return subprocess.run(
        arguments, cwd=folder, env=cluster.environment, capture_output=True, text=True, timeout=600
    )
