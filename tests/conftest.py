"""What several tests need: where the real pictures and reference outputs lie, and a quiet torch."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)
    # The first multi-threaded exp or log of a process can be inexact in one thread (torch 2.13,
    # CPU); once on a tiny tensor avoids it.
    for function in (torch.exp, torch.log, torch.erf, torch.tanh, torch.sigmoid):
        function(torch.ones(4))


@pytest.fixture(autouse=True)
def _own_random_numbers() -> None:
    """A test draws the same numbers whichever tests ran before it."""
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


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One small Ray for the whole test run; its four CPUs are a promise that two cores keep."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    from distributed.cluster import start_local_ray

    start_local_ray(num_cpus=4, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()
