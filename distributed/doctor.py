"""Check machines before a run: `python -m distributed.doctor [--storage URI] [--data.train URI]
[--data.validation URI] [--tracking.uri URI]`.

Looks at this machine and, if RAY_ADDRESS names a cluster, at each of its nodes. Prints one table:
what was checked, what was found, and what to do about it. Exits with 1 if something is wrong.
"""

import dataclasses
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from distributed.cluster import join_cluster
from distributed.config import TrackingConfig
from distributed.environment import NOT_INSTALLED
from distributed.node import Node, Probe, Targets, inspect_node
from measnet.errors import first_line
from shards import storage
from shards.config import DataConfig

GIB = 2**30
LEAST_DISK = 5 * GIB
"""Free bytes that a run needs: a checkpoint is 0.5 GB, and shards are fetched beside it."""
FULLEST = 0.95
"""Share of a disk above which Ray stores no objects on it."""
LEAST_SHARED_MEMORY = GIB
"""Free bytes of /dev/shm: for the loader's batches and Ray's objects."""
CLOCK_S = 5.0
"""Clocks that differ by more confuse leases and logs; S3 refuses requests above 15 minutes."""
LEAST_BANDWIDTH = 100e6
"""Bytes a second between nodes: workers exchange about 120 MB of gradients per step."""
ADDRESS_S = 3.0
"""Seconds in which the head of a cluster must accept a connection."""

State = Literal["ok", "slow", "wrong"]


class Finding(NamedTuple):
    """One row of the table."""

    node: str
    what: str
    found: str
    state: State = "ok"
    """`slow`: a run works, but could be faster."""
    then: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Arguments:
    """Check this machine, and each node of the cluster of RAY_ADDRESS, before a run."""

    storage: str = ""
    """Folder or URI of the runs: each node writes, reads and removes one small object."""
    train: Annotated[str, tyro.conf.arg(name="data.train")] = ""
    """Folder or URI of the training shards: each node reads the manifest and a shard."""
    validation: Annotated[str, tyro.conf.arg(name="data.validation")] = ""
    """The same for the validation."""
    tracking: Annotated[str, tyro.conf.arg(name="tracking.uri")] = ""
    """MLflow server or database."""


def judge(nodes: Sequence[Node], targets: Targets) -> list[Finding]:
    """All findings about some nodes; the first is the one that asks.

    Args:
        nodes: at least one.
        targets: what was checked.
    """
    findings = []
    for node in nodes:
        findings += [*software(node, nodes[0]), *card(node), *parts(node), *space(node)]
        findings += [
            Finding(node.host, what, reason or "works", "wrong" if reason else "ok")
            for what, reason in node.problems
        ]
        if node is not nodes[0]:
            findings += between(node, nodes[0])
    if targets.tracking.startswith("sqlite:") and len({node.host.split()[0] for node in nodes}) > 1:
        findings.append(
            Finding(
                nodes[0].host,
                "MLflow",
                f"{targets.tracking} is a file of one machine, and there are others",
                "wrong",
                "start a server: docs/mlflow.md",
            )
        )
    return findings


def software(node: Node, first: Node) -> list[Finding]:
    """Python and packages, compared with the first node's and with what is installed here."""
    findings = []
    same = node.python.split(".")[:2] == first.python.split(".")[:2]
    findings.append(
        Finding(node.host, "Python", node.python)
        if same
        else Finding(
            node.host,
            "Python",
            f"{node.python}, but {first.host} has {first.python}",
            "wrong",
            "install the same minor version on all nodes",
        )
    )
    for name, version in node.versions.items():
        expected = first.versions[name]
        if version == NOT_INSTALLED and name != "measnet-ray":
            then = "pip install -c constraints.txt ."
            findings.append(Finding(node.host, name, version, "wrong", then))
        elif _public(version) != _public(expected):
            found = f"{version}, but {first.host} has {expected}"
            then = f"pip install '{name}=={_public(expected)}' there"
            findings.append(Finding(node.host, name, found, "wrong", then))
        else:
            findings.append(Finding(node.host, name, version))
    if (wanted := _pinned("torch")) and _public(node.versions["torch"]) != wanted:
        findings.append(
            Finding(
                node.host,
                "torch build",
                f"{node.versions['torch']}, but this project is tested with {wanted}",
                "wrong",
                f"pip install 'torch=={wanted}' (docs/gpu.md)",
            )
        )
    return findings


def card(node: Node) -> list[Finding]:
    """GPUs, their driver and bf16."""
    if node.torch_problem:
        return [Finding(node.host, "GPU", node.torch_problem, "wrong", "docs/gpu.md")]
    if not node.cards:
        return [Finding(node.host, "GPU", "none")]
    driver = f", driver {node.driver}" if node.driver else ""
    return [
        Finding(node.host, "GPU", f"{name}, {memory / GIB:.0f} GiB, bf16{driver}")
        if bf16
        else Finding(
            node.host,
            "GPU",
            f"{name}, {memory / GIB:.0f} GiB, no bf16{driver}",
            "slow",
            "nothing: it trains in fp32; cards from RTX 30 and A100 on have bf16",
        )
        for name, memory, bf16 in node.cards
    ]


def parts(node: Node) -> list[Finding]:
    """The accelerated parts: compiled decoders and kernels, and Triton where there is a GPU."""
    findings = []
    kernels = {"kernels_avx512", "kernels_avx2"}
    # One of the two kernels is enough: each is for another kind of processor.
    missing = [name for name in node.missing if name not in kernels or kernels <= set(node.missing)]
    if missing:
        then = "make wheel, and install dist/*.whl there"
        findings.append(
            Finding(node.host, "compiled parts", f"without {', '.join(missing)}", "slow", then)
        )
    else:
        findings.append(Finding(node.host, "compiled parts", "all"))
    if node.cards:
        lacks = [
            name
            for name, there in (
                ("Triton", node.triton),
                ("a C compiler", bool(node.compiler)),
                ("Python.h", node.headers),
            )
            if not there
        ]
        then = "pip install triton; apt-get install gcc python3-dev"
        findings.append(
            Finding(node.host, "GPU kernels", f"without {', '.join(lacks)}", "slow", then)
            if lacks
            else Finding(node.host, "GPU kernels", f"Triton, {node.compiler}, Python.h")
        )
    return findings


def space(node: Node) -> list[Finding]:
    """Disks and shared memory."""
    findings = []
    for path, free, total in node.disks:
        found = f"{free / GIB:.1f} of {total / GIB:.0f} GiB free at {path}"
        full = free < LEAST_DISK or free < (1 - FULLEST) * total
        then = f"free at least {max(LEAST_DISK, (1 - FULLEST) * total) / GIB:.0f} GiB there"
        findings.append(
            Finding(node.host, "disk", found, "wrong", then)
            if full
            else Finding(node.host, "disk", found)
        )
    if node.shared_memory is not None:
        found = f"{node.shared_memory / GIB:.1f} GiB free"
        findings.append(
            Finding(node.host, "/dev/shm", found)
            if node.shared_memory >= LEAST_SHARED_MEMORY
            else Finding(
                node.host,
                "/dev/shm",
                found,
                "wrong",
                "docker run --shm-size 8g; on Kubernetes a volume emptyDir with medium Memory",
            )
        )
    return findings


def between(node: Node, first: Node) -> list[Finding]:
    """Clock and bandwidth of a node, compared with the first one."""
    findings = []
    ahead = abs(node.clock_s) > CLOCK_S
    where = f"of {first.host}"
    findings.append(
        Finding(
            node.host,
            "clock",
            f"{node.clock_s:+.0f} s from that {where}",
            "wrong",
            "synchronise the clocks: timedatectl set-ntp true",
        )
        if ahead
        else Finding(node.host, "clock", f"that {where}")
    )
    if node.bandwidth is not None:
        found = f"{node.bandwidth / 1e6:.0f} MB/s from {first.host}"
        findings.append(
            Finding(node.host, "network", found)
            if node.bandwidth >= LEAST_BANDWIDTH
            else Finding(
                node.host, "network", found, "slow", "nodes of one zone, with 10 Gbit/s or more"
            )
        )
    return findings


def _public(version: str) -> str:
    """Without the name of the build: 2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]


def _pinned(package: str) -> str:
    """The version that this project demands exactly; empty if it is not installed as a package."""
    import importlib.metadata as metadata

    try:
        demands = metadata.requires("measnet-ray") or []
    except metadata.PackageNotFoundError:
        return ""
    exact = f"{package}=="
    return next((d.removeprefix(exact) for d in demands if d.startswith(exact)), "")


def inspect_cluster(targets: Targets) -> list[Node]:
    """The facts about each node of the cluster of RAY_ADDRESS, the one of this process first.

    Raises:
        OSError: its head does not answer, or this process cannot join it.
    """
    address = os.environ["RAY_ADDRESS"]
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), ADDRESS_S).close()
        except OSError as error:
            raise OSError(f"no Ray cluster answers at {address} ({error})") from error
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        join_cluster()
    except RuntimeError as error:  # another version of Ray or Python
        raise OSError(f"this process cannot join the cluster: {first_line(error)}") from error
    try:
        own = ray.get_runtime_context().get_node_id()
        ids = sorted((n["NodeID"] for n in ray.nodes() if n["Alive"]), key=lambda i: i != own)
        probes = [
            ray.remote(num_cpus=0)(Probe)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote()
            for node in ids
        ]
        answers = [probe.inspect.remote(targets) for probe in probes]
        nodes: list[Node] = ray.get(answers, timeout=120)
        block = probes[0].block.remote()
        for number, probe in enumerate(probes[1:], start=1):
            asked = time.time()
            there = ray.get(probe.now.remote())
            took = time.time() - asked
            ahead = there - asked - took / 2
            certain = max(0.0, abs(ahead) - took / 2) * (1 if ahead > 0 else -1)
            speed = ray.get(probe.fetch.remote([block]))
            nodes[number] = dataclasses.replace(
                nodes[number],
                clock_s=certain,
                bandwidth=speed,
                host=f"{nodes[number].host} {number}",
            )
        return nodes
    except RayError as error:  # a node without this program, for example
        raise OSError(f"a node could not be checked: {first_line(error)}") from error
    finally:
        ray.shutdown()


def examine(arguments: Arguments) -> list[Finding]:
    """All findings about this machine, or about the nodes of the cluster."""
    targets = Targets(
        storage=storage.absolute(arguments.storage) if arguments.storage else "",
        train=storage.absolute(arguments.train) if arguments.train else "",
        validation=storage.absolute(arguments.validation) if arguments.validation else "",
        tracking=_tracking(arguments.tracking),
        cache=DataConfig().cache_dir,
    )
    if not os.environ.get("RAY_ADDRESS"):
        return judge([inspect_node(targets)], targets)
    try:
        return judge(_with_shared_object(targets), targets)
    except OSError as error:
        unreachable = Finding(
            socket.gethostname(), "Ray", str(error), "wrong", "ray status; check RAY_ADDRESS"
        )
        return [*judge([inspect_node(targets)], targets), unreachable]


def _with_shared_object(targets: Targets) -> list[Node]:
    """Look at the cluster; each node must see an object that this one has written."""
    name = f".shared-{secrets.token_hex(4)}"
    where = storage.join(targets.storage, name)
    if targets.storage:
        try:
            storage.write(where, b"seen by all nodes")
            targets = dataclasses.replace(targets, shared=name)
        except OSError:
            pass  # the nodes' own check of the storage says why
    try:
        return inspect_cluster(targets)
    finally:
        if targets.shared:
            storage.remove(where)


def _tracking(uri: str) -> str:
    if not uri:
        return ""
    from distributed.mlflow_tracker import tracking_uri

    return tracking_uri(TrackingConfig(uri=uri))


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the table, and what is wrong in one line."""
    table = Table("node", "what", "found", "", "what to do")
    colour = {"ok": "green", "slow": "yellow", "wrong": "red"}
    for one in findings:
        table.add_row(
            one.node, one.what, one.found, f"[{colour[one.state]}]{one.state}[/]", one.then
        )
    console.print(table)
    counts = {state: sum(one.state == state for one in findings) for state in ("wrong", "slow")}
    console.print(
        f"{counts['wrong']} wrong, {counts['slow']} slower than possible, of {len(findings)} checks"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print the table, and return 1 if something is wrong."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m distributed.doctor")
    try:
        findings = examine(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(findings, Console(soft_wrap=False, highlight=False))
    return int(any(one.state == "wrong" for one in findings))


if __name__ == "__main__":
    sys.exit(main())
