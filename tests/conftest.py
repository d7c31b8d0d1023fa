"""Fixtures of several tests: real pictures, reference outputs, devices, a small Ray."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import faults, s3

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = pytest.StashKey[set[str]]()
FIGURES = pytest.StashKey[dict[str, float]]()


def pytest_configure(config: pytest.Config) -> None:
    shared = "PYTEST_XDIST_WORKER" in os.environ  # two processes that test, on two cores
    torch.set_num_threads(1 if shared else 2)
    # The first multi-threaded exp or log of a process can be inexact in one thread (torch 2.13,
    # CPU); once on a tiny tensor avoids it.
    for function in (torch.exp, torch.log, torch.erf, torch.tanh, torch.sigmoid):
        function(torch.ones(4))


# --- Tests marked `gpu` (docs/testing.md) ---


@pytest.fixture(scope="session")
def gpu() -> Iterator[torch.device]:
    """The card that tests marked `gpu` run on, with TF32 off: its products are then exact fp32.

    MEASNET_GPU_DEVICE=cpu tries these tests without a card, smaller.
    """
    device = torch.device(os.environ.get("MEASNET_GPU_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU; MEASNET_GPU_DEVICE=cpu tries these tests without one")
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = False
    yield device
    for one, allowed in zip(settings, before, strict=True):
        one.allow_tf32 = allowed


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Runs a test on the CPU, and on the card as a test marked `gpu`."""
    if request.param == "cpu":
        return torch.device("cpu")
    chosen: torch.device = request.getfixturevalue("gpu")
    return chosen


@pytest.fixture(scope="session")
def figure(pytestconfig: pytest.Config) -> Callable[[str, float], None]:
    """Keeps a measured number under a name: shown as `GPU name value` at the end of the tests."""
    return pytestconfig.stash.setdefault(FIGURES, {}).__setitem__


def pytest_collection_finish(session: pytest.Session) -> None:
    chosen = {item.nodeid for item in session.items if item.get_closest_marker("gpu")}
    session.config.stash[GPU_TESTS] = chosen


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many tests marked `gpu` ran, and what they measured; also into MEASNET_GPU_REPORT."""
    chosen = config.stash.get(GPU_TESTS, set())
    if not chosen:
        return
    stats = terminalreporter.stats
    skipped = {
        r.nodeid: str(r.longrepr[-1]) for r in stats.get("skipped", []) if r.nodeid in chosen
    }
    failed = {r.nodeid for kind in ("failed", "error") for r in stats.get(kind, [])} & chosen
    passed = {r.nodeid for r in stats.get("passed", [])} & chosen - failed
    figures = config.stash.get(FIGURES, {})
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    terminalreporter.section("tests on a GPU")
    for what, value in figures.items():
        terminalreporter.write_line(f"GPU {what} {value:.6g}")
    terminalreporter.write_line(
        f"{name}, torch {torch.__version__}: {len(passed | failed)} gpu tests ran "
        f"({len(failed)} failed), {len(skipped)} were skipped"
    )
    if path := os.environ.get("MEASNET_GPU_REPORT"):
        report = {
            "device": name,
            "torch": torch.__version__,
            "passed": sorted(passed),
            "failed": sorted(failed),
            "skipped": skipped,
            "figures": figures,
        }
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


# --- Shared by many tests ---


@pytest.fixture(autouse=True)
def _own_random_numbers() -> None:
    """Same random numbers in a test, independent of the tests before it."""
    torch.manual_seed(0)


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not path.is_dir():
        pytest.skip(f"no folder {path}; set {variable}")
    return path


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """Folder of genuine benchmark pictures: denoise/, derain/, dehaze/, deblur/, lowlight/."""
    return _folder("MEASNET_TEST_DATA", "../shared/data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of outputs of the authors' program."""
    return _folder("MEASNET_GOLDEN", "../shared/golden")


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `train` and `test` shards of all five tasks, from pieces of real photographs."""
    from tests.photographs import pack_photographs

    return pack_photographs(tmp_path_factory.mktemp("packed"))


@pytest.fixture()
def pairs(tmp_path: Path) -> Path:
    """Two tars of six samples each, as `ShardWriter` names them; keys have folders and long
    names."""
    import webdataset

    from tests.webdataset_tars import pair

    folder = tmp_path / "pairs"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=6, verbose=0) as writer:
        for number in range(12):
            long = "long" * 40 if number % 5 == 0 else "b"
            writer.write({"__key__": f"a/{long}/{number:04d}", **pair(number)})
    return folder


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """The address of an S3-compatible server on loopback."""
    with s3.moto() as address:
        yield address


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a second, independent S3-compatible server."""
    with s3.rclone(tmp_path_factory.mktemp("rclone")) as address:
        yield address


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> str:
    """The address of moto's server, or of rclone's with `MEASNET_S3=rclone`."""
    address: str = request.getfixturevalue(f"{os.environ.get('MEASNET_S3', 'moto')}_server")
    return address


@pytest.fixture(scope="session")
def bucket(s3_server: str) -> Iterator[str]:
    """A bucket in an S3-compatible server on loopback."""
    with s3.used(s3_server) as place:
        yield place


@pytest.fixture(params=["folder", "moto", "rclone"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A local folder, and a place in each of two independent S3-compatible servers."""
    if request.param == "folder":
        yield str(tmp_path / "place")
        return
    with s3.used(request.getfixturevalue(f"{request.param}_server")) as bucket:
        yield f"{bucket}/{tmp_path.name}"


@pytest.fixture
def faulty(s3_server: str, tmp_path: Path) -> Iterator[tuple[str, faults.Proxy]]:
    """A place in a bucket, and the proxy before its server, which fails as it is told."""
    with faults.proxy(s3_server) as proxy, s3.used(proxy.url) as place:
        yield f"{place}/{tmp_path.name}", proxy


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One small Ray for the whole test run, with four CPUs, also on machines with fewer cores."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    if "ray" not in sys.modules:  # Ray read it when it was imported: a run before may have a token
        os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    from distributed.cluster import start_local_ray

    start_local_ray(num_cpus=4, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()
