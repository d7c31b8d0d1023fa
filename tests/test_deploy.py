"""Ray accepts the cluster files, and they request what the README says."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ["cluster.yaml", "deploy/gcp.yaml"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_accepts_the_cluster_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_refuses_a_slip_in_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    broken = load(name)
    broken["max_wrokers"] = broken.pop("max_workers")
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", CLUSTERS)
def test_gpus_come_and_go_and_nothing_trains_on_the_head(name: str) -> None:
    config = load(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert {"gpu_spot", "gpu_on_demand"} == set(types)
    assert all(node["min_workers"] == 0 and node["max_workers"] > 0 for node in types.values())
    assert "spot" in str(types["gpu_spot"]["node_config"]).lower()
    assert "spot" not in str(types["gpu_on_demand"]["node_config"]).lower()


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_the_nodes_run_is_there(name: str) -> None:
    config = load(name)
    for local in config["file_mounts"].values():
        assert (ROOT / local).is_dir()
    commands = [
        *config["setup_commands"],
        *config["head_start_ray_commands"],
        *config["worker_start_ray_commands"],
    ]
    scripts = [word for c in commands for word in c.split() if word.startswith("~/measnet/")]
    assert len(scripts) == 3
    for script in scripts:
        path = ROOT / "deploy" / "node" / script.removeprefix("~/measnet/")
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert "RAY_AUTH_MODE=token" in path.read_text() or path.name == "setup.sh"


def test_the_kubernetes_job() -> None:
    job = load("deploy/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == 0 < workers["maxReplicas"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_lost_nodes_are_found_everywhere_as_in_the_tests_of_lost_nodes() -> None:
    from tests.chaos import NODE_HEALTH

    head = load("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    on_kubernetes = {entry["name"]: entry["value"] for entry in container["env"]}
    script = (ROOT / "deploy" / "node" / "head.sh").read_text()
    for name, value in NODE_HEALTH.items():
        assert on_kubernetes[name] == value
        assert f"{name}={value}" in script


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no rayjobs.yaml")
def test_the_kubernetes_job_fits_kuberays_definition() -> None:
    import jsonschema

    definition = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.validate(load("deploy/rayjob.yaml"), version["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize("name", [*CLUSTERS, "deploy/rayjob.yaml"])
def test_commands_in_the_files_parse(name: str) -> None:
    from distributed.presets import parse

    text = (ROOT / name).read_text()
    if "python -m distributed.train " not in text:
        return
    command = text.split("python -m distributed.train ", 1)[1].split("shutdownAfter")[0]
    parse(command.replace("\\", " ").split())
