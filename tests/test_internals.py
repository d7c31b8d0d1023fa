"""The modules that hold private parts of other libraries."""

import importlib.metadata

import pytest

from distributed.internals.versions import untested


def test_another_version_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.61.1")
    said = untested("ray", "2.60", "make test-slow")
    assert "ray is 2.61.1" in said and "pip install 'ray==2.60.*'" in said
    assert untested("ray", "2.61", "make test-slow") == ""


def test_the_installed_versions_are_the_tested_ones() -> None:
    from distributed.internals import deepspeed, ray

    assert ray.version_warning() == deepspeed.version_warning() == ""


def test_ray_knows_the_variables() -> None:
    """Ray would ignore one that it has renamed."""
    from ray._private.runtime_env import constants as jobs
    from ray.train import constants
    from ray.train.v2._internal import constants as v2

    from distributed.internals import ray_train

    known = {
        value
        for module in (jobs, constants, v2)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    ours = {*ray_train.ENVIRONMENT, ray_train.START_S, ray_train.HEALTH_S, ray_train.JOB}
    ours |= {ray_train.PREEMPTION_WATCHER, ray_train.LISTED_CHECKPOINTS}
    assert ours <= known, sorted(ours - known)
