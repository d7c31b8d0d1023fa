"""Ray accepts the cluster files, and they request what the README says."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed.internals.spot import on_demand

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
    broken["idle_timeout_minuts"] = broken.pop("idle_timeout_minutes")
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", CLUSTERS)
def test_gpus_come_and_go_and_nothing_trains_on_the_head(name: str) -> None:
    config = load(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    (gpu,) = types.values()
    assert gpu["min_workers"] == 0 < gpu["max_workers"]
    # Ray fills resources in on AWS only; without them no GPU node is ever started.
    assert gpu["resources"] == {"CPU": 16, "GPU": 1}
    assert "spot" in str(gpu["node_config"]).lower()
    assert on_demand(gpu["node_config"]) != gpu["node_config"]
    assert "spot" not in str(on_demand(gpu["node_config"])).lower()


@pytest.mark.parametrize(
    ("name", "package", "account"),
    [
        ("cluster.yaml", "boto3", {"IamInstanceProfile": {"Name": "measnet-worker"}}),
        ("deploy/gcp.yaml", "google-api-python-client", {}),
    ],
)
def test_the_head_can_start_nodes_and_workers_have_an_account(
    name: str, package: str, account: dict[str, Any]
) -> None:
    config = load(name)
    # Ray's defaults would install it outside of the virtual environment that Ray runs in.
    (command,) = config["head_setup_commands"]
    assert command.startswith("~/venv/bin/pip install ") and command.endswith(f" {package}")
    node = config["available_node_types"]["gpu"]["node_config"]
    if "serviceAccounts" in node:
        (one,) = node["serviceAccounts"]
        assert one["email"].startswith("measnet-worker@")
    else:
        assert account.items() <= node.items()


class Template(yaml.SafeLoader):
    """Reads CloudFormation: `!Sub`, `!Ref` and `!GetAtt` stay as text."""


for tag in ("!Sub", "!Ref", "!GetAtt"):
    Template.add_constructor(tag, lambda loader, node: loader.construct_scalar(node))


def profiles(bucket: str) -> dict[str, list[dict[str, Any]]]:
    """Each instance profile of deploy/aws-roles.yaml, with what its role may do."""
    text = (ROOT / "deploy" / "aws-roles.yaml").read_text().replace("${Bucket}", bucket)
    resources = yaml.load(text, Template)["Resources"]
    found: dict[str, list[dict[str, Any]]] = {}
    for one in resources.values():
        if one["Type"] == "AWS::IAM::InstanceProfile":
            (role,) = one["Properties"]["Roles"]
            policies = resources[role]["Properties"]["Policies"]
            found[one["Properties"]["InstanceProfileName"]] = [
                statement for p in policies for statement in p["PolicyDocument"]["Statement"]
            ]
    return found


def test_head_and_workers_of_aws_may_use_the_bucket_and_no_other() -> None:
    own = profiles("own-bucket")
    assert set(own) == {"measnet-head", "measnet-worker"}
    for statements in own.values():
        places = [one["Resource"] for one in statements]
        assert places == ["arn:aws:s3:::own-bucket", "arn:aws:s3:::own-bucket/*"]


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cloud like AWS in this process; keys are written to a home of its own."""
    import boto3
    from moto import mock_aws

    (tmp_path / ".ssh").mkdir()
    for variable, value in {
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    with mock_aws():
        yield boto3


def test_aws_starts_the_cluster_file(aws: Any) -> None:
    """Ray's own code makes ready what `ray up` needs, and starts a worker, spot or on demand."""
    from botocore.exceptions import ClientError
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    from distributed.internals.spot_aws import SpotFirstAws

    iam = aws.client("iam")
    for profile in profiles("own-bucket"):
        iam.create_instance_profile(InstanceProfileName=profile)

    config = prepare_config(load("cluster.yaml"))
    counted = SpotFirstAws.fillout_available_node_types_resources(config)
    own = config["available_node_types"]["gpu"]["resources"]
    assert own.items() <= counted["available_node_types"]["gpu"]["resources"].items()
    validate_config(config)
    config = SpotFirstAws.bootstrap_config(config)
    types = config["available_node_types"]
    assert types["head"]["node_config"]["IamInstanceProfile"] == {"Name": "measnet-head"}
    assert types["gpu"]["node_config"]["KeyName"] and types["gpu"]["node_config"]["SubnetIds"]

    provider = SpotFirstAws(config["provider"], "measnet")
    tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: "gpu"}

    def start() -> Any:
        made = provider.create_node_with_resources_and_labels(
            types["gpu"]["node_config"], tags, 1, own, {}
        )
        (instance,) = made
        return aws.resource("ec2").Instance(instance)

    spot = start()
    assert spot.instance_lifecycle == "spot"
    assert spot.iam_instance_profile["Arn"].endswith("/measnet-worker")

    def refuse(params: dict[str, Any], **_: Any) -> None:
        if any(key.startswith("InstanceMarketOptions") for key in params["body"]):
            error = {"Code": "InsufficientInstanceCapacity", "Message": "no spot machines"}
            raise ClientError({"Error": error}, "RunInstances")

    events = provider.ec2_fail_fast.meta.client.meta.events
    events.register("before-call.ec2.RunInstances", refuse)
    other = start()
    assert other.instance_lifecycle is None and other.instance_type == "g5.4xlarge"


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
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == "measnet"
        (container,) = pod["containers"]
        assert container["envFrom"] == [
            {"secretRef": {"name": "measnet-storage", "optional": True}}
        ]
        (wait,) = [e for e in container["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
        assert int(wait["value"]) < pod["terminationGracePeriodSeconds"]


def test_nodes_and_image_can_build_kernels() -> None:
    setup = (ROOT / "deploy" / "node" / "setup.sh").read_text()
    assert all(package in setup for package in ("gcc", "libc6-dev", "python3.11-dev"))
    image = (ROOT / "deploy" / "Dockerfile").read_text().rpartition("FROM")[2]
    assert "gcc libc6-dev" in image and "COPY measnet" not in image


@pytest.mark.parametrize(
    ("loaded", "code", "message"),
    [
        ("580.95.05", 0, ""),
        ("570.133.20", 1, "the GPU driver is 570.133.20, but torch needs 580 or newer"),
        (None, 1, "the GPU driver is 0, but torch needs 580 or newer"),
    ],
)
def test_a_node_with_an_old_driver_is_refused(
    tmp_path: Path, loaded: str | None, code: int, message: str
) -> None:
    """The first part of setup.sh, on the /sys of a machine with a card."""
    card = tmp_path / "bus" / "pci" / "devices" / "0000:00:1e.0" / "vendor"
    card.parent.mkdir(parents=True)
    card.write_text("0x10de\n")
    if loaded:
        version = tmp_path / "module" / "nvidia" / "version"
        version.parent.mkdir(parents=True)
        version.write_text(f"{loaded}\n")
    script = (ROOT / "deploy" / "node" / "setup.sh").read_text().split("# A fresh machine")[0]
    done = subprocess.run(
        ["bash", "-c", script.replace("/sys/", f"{tmp_path}/")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and message in done.stderr


def test_lost_nodes_are_found_everywhere_as_in_the_tests_of_lost_nodes() -> None:
    from tests.chaos import NODE_HEALTH

    head = load("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    on_kubernetes = {entry["name"]: entry["value"] for entry in container["env"]}
    script = (ROOT / "deploy" / "node" / "head.sh").read_text()
    for name, value in NODE_HEALTH.items():
        assert on_kubernetes[name] == value
        assert f"{name}={value}" in script


def closed(schema: Any) -> Any:
    """The same schema, which refuses unknown fields: Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(part) for name, part in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    return {"additionalProperties": False, **parts} if is_object and not open_ended else parts


def check_job(job: dict[str, Any]) -> None:
    """The job against KubeRay's fields, and its pods against Kubernetes' own schema."""
    import jsonschema
    import kubernetes_validate

    schema = yaml.safe_load((ROOT / "tests" / "data" / "kuberay_rayjob.yaml").read_text())
    jsonschema.validate(job, schema)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)


def test_the_kubernetes_job_has_the_fields_of_kuberay_and_kubernetes() -> None:
    check_job(load("deploy/rayjob.yaml"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("backofLimit", 3),
        ("backoffLimit", "3"),
        ("rayClusterSpec.authOptions.mode", "tokens"),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("rayClusterSpec.headGroupSpec.template.spec.serviceAcountName", "measnet"),
        ("rayClusterSpec.headGroupSpec.template.spec.terminationGracePeriodSeconds", "long"),
        ("rayClusterSpec.headGroupSpec.template.spec.containers", [{"image": "IMAGE"}]),
    ],
)
def test_a_slip_in_the_kubernetes_job_is_found(place: str, value: object) -> None:
    import jsonschema
    import kubernetes_validate

    job = load("deploy/rayjob.yaml")
    *path, last = place.split(".")
    part = job["spec"]
    for name in path:
        part = part[name]
    part[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_job(job)


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no rayjobs.yaml")
def test_the_kubernetes_job_fits_the_definition_of_an_operator() -> None:
    import jsonschema

    definition = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {}  # Kubernetes' own, which the definition does not repeat
    jsonschema.validate(load("deploy/rayjob.yaml"), schema)


@pytest.mark.parametrize("name", [*CLUSTERS, "deploy/rayjob.yaml"])
def test_commands_in_the_files_parse(name: str) -> None:
    from distributed.presets import parse

    text = (ROOT / name).read_text()
    if "python -m distributed.train " not in text:
        return
    command = text.split("python -m distributed.train ", 1)[1].split("shutdownAfter")[0]
    parse(command.replace("\\", " ").split())
