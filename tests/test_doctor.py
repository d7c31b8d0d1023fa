"""The doctor: judgements over tables of machines, and what it says on machines that are broken."""

import dataclasses
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distributed.access import check_data, check_storage, check_tracking
from distributed.doctor import GIB, Finding, judge, main
from distributed.node import Node, Targets, in_time
from shards.indexing import index
from tests.chaos import Cluster

ROOT = Path(__file__).resolve().parent.parent
A10G = ("NVIDIA A10G", 24 * GIB, True)
WELL = Node(
    host="first",
    python="3.11.7",
    versions={"torch": "2.13.0+cu130", "ray": "2.60.0", "measnet-ray": "0.1.0"},
    cards=(A10G,),
    driver="580.95.05",
    triton=True,
    compiler="/usr/bin/gcc",
    headers=True,
    disks=(("/", 100 * GIB, 300 * GIB),),
    shared_memory=8 * GIB,
    problems=(("storage", ""),),
)


NOTHING = Targets()


def other(**changes: Any) -> Node:
    """A second node, different from the first one."""
    return dataclasses.replace(WELL, host="second", bandwidth=1e9, **changes)


def bad(nodes: list[Node], targets: Targets = NOTHING) -> list[Finding]:
    return [one for one in judge(nodes, targets) if one.state != "ok"]


def test_nothing_is_wrong_on_good_nodes() -> None:
    assert bad([WELL]) == bad([WELL, other()]) == []
    assert bad([dataclasses.replace(WELL, cards=(), compiler="", headers=False)]) == []
    # The other kernel is for another processor; the build of torch may differ.
    assert bad([dataclasses.replace(WELL, missing=("kernels_avx512",))]) == []
    versions = WELL.versions | {"torch": "2.13.0+cpu"}
    assert bad([WELL, other(versions=versions)]) == []


@pytest.mark.parametrize(
    ("changes", "what", "state", "found", "then"),
    [
        ({"python": "3.12.1"}, "Python", "wrong", "3.12.1, but first has 3.11.7", "same minor"),
        (
            {"versions": WELL.versions | {"ray": "2.59.0"}},
            *("ray", "wrong", "2.59.0, but first has 2.60.0", "pip install 'ray==2.60.0'"),
        ),
        (
            {"versions": WELL.versions | {"ray": "not installed"}},
            *("ray", "wrong", "not installed", "pip install -c constraints.txt ."),
        ),
        (
            {"torch_problem": "the GPU driver is 550.54"},
            *("GPU", "wrong", "the GPU driver is 550.54", "docs/gpu.md"),
        ),
        (
            {"cards": (("Tesla T4", 16 * GIB, False),)},
            *("GPU", "slow", "Tesla T4, 16 GiB, no bf16", "fp32"),
        ),
        ({"compiler": ""}, "GPU kernels", "slow", "without a C compiler", "apt-get install gcc"),
        ({"headers": False}, "GPU kernels", "slow", "without Python.h", "python3-dev"),
        ({"triton": False}, "GPU kernels", "slow", "without Triton", "pip install triton"),
        ({"missing": ("jpeg_decoder",)}, "compiled parts", "slow", "jpeg_decoder", "make wheel"),
        (
            {"missing": ("kernels_avx512", "kernels_avx2")},
            *("compiled parts", "slow", "kernels_avx512, kernels_avx2", "make wheel"),
        ),
        ({"disks": (("/", GIB, 30 * GIB),)}, "disk", "wrong", "1.0 of 30 GiB free at /", "5 GiB"),
        (
            {"disks": (("/", 20 * GIB, 1000 * GIB),)},
            *("disk", "wrong", "20.0 of 1000 GiB free at /", "50 GiB"),
        ),
        ({"shared_memory": 64 * 2**20}, "/dev/shm", "wrong", "0.1 GiB free", "--shm-size"),
        ({"problems": (("storage", "no access"),)}, "storage", "wrong", "no access", ""),
        ({"clock_s": -90.0}, "clock", "wrong", "-90 s from that of first", "timedatectl"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(
    changes: dict[str, Any], what: str, state: str, found: str, then: str
) -> None:
    (one,) = bad([WELL, other(**changes)])
    assert (one.node, one.what, one.state) == ("second", what, state)
    assert found in one.found and then in one.then


def test_a_slow_network_and_a_database_of_one_machine() -> None:
    (slow,) = bad([WELL, dataclasses.replace(other(), bandwidth=20e6)])
    assert (slow.what, slow.state, slow.found) == ("network", "slow", "20 MB/s from first")
    (one,) = bad([WELL, other()], Targets(tracking="sqlite:////home/u/mlflow.db"))
    assert one.what == "MLflow" and "is a file of one machine" in one.found
    assert bad([WELL], Targets(tracking="sqlite:////home/u/mlflow.db")) == []


def test_another_version_of_torch_than_this_project_is_tested_with() -> None:
    old = dataclasses.replace(WELL, versions=WELL.versions | {"torch": "2.8.0+cu128"})
    (one,) = bad([old])
    assert one.what == "torch build" and one.then.startswith("pip install 'torch==2.13.0'")


def test_a_check_that_never_answers_does_not_hold_up_the_others() -> None:
    import threading

    found = in_time([("a", threading.Event().wait), ("b", lambda: None)], 0.2)
    assert found == (("a", "no answer within 0 s"), ("b", ""))


def test_the_storage_is_written_read_and_left_clean(tmp_path: Path) -> None:
    check_storage(str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB without any space left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            for _ in range(100):
                filler.write(bytes(4096))
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(OSError, match=r"cannot use the storage .*No space left on device"):
        check_storage(str(full_disk / "runs"))
    assert main(["--storage", str(full_disk / "runs")]) == 1
    output = capsys.readouterr().out
    assert "0.0 of 0 GiB free" in output and "No space left" in output


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    program = (
        "import os\n"
        "from distributed.access import check_storage\n"
        "os.seteuid(65534)\n"
        f"try: check_storage({str(locked)!r})\n"
        "except OSError as error: print(error)"
    )
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        os.chmod(folder, 0o755)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Permission denied" in done.stdout and "docs/cluster.md" in done.stdout, done


def test_data_and_servers_that_are_not_there(tmp_path: Path, packed: Path) -> None:
    assert check_data(str(packed / "train")) == 10
    with pytest.raises(OSError, match=r"cannot read the data .*shards.pack"):
        check_data(str(tmp_path))
    check_tracking(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []  # nothing is created
    with pytest.raises(OSError, match=r"cannot reach MLflow at http://127.0.0.1:9: .*refused"):
        check_tracking("http://127.0.0.1:9")


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "distributed.doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "torch cannot be imported (libcudart.so.13: cannot open)" in done.stdout, done


def test_a_cluster_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert main([]) == 1
    assert "no Ray cluster answers at 127.0.0.1:9" in capsys.readouterr().out


def test_a_cluster_with_another_version_of_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    def refuses(**_options: object) -> None:
        raise RuntimeError("Version mismatch: the cluster was started with Ray 2.59\nmore")

    monkeypatch.setattr(ray, "init", refuses)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "this process cannot join the cluster: Version mismatch: the cluster was started" in said


def test_data_whose_tars_are_in_another_folder(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "clean.png")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        tar.add(tmp_path / "clean.png", "a.png")
    index(str(tmp_path / "tars"), task="denoise", clean="png", out=str(tmp_path / "out"))
    assert check_data(str(tmp_path / "out")) == 1


@pytest.mark.slow
def test_each_node_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(nodes=2)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "distributed.doctor", "--storage", str(tmp_path / "runs")],
            cwd=ROOT,
            env={**os.environ, **cluster.environment, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        cluster.close()
    rows = [line for line in done.stdout.splitlines() if "│" in line]
    assert sum(" storage " in row for row in rows) == 6, done  # each node: its own and a shared one
    assert sum(" clock " in row for row in rows) == sum(" network " in row for row in rows) == 2
    assert sum(" MB/s from " in row for row in rows) == 2
    assert " wrong │" not in done.stdout and done.returncode == 0, done
    assert list((tmp_path / "runs").iterdir()) == []
