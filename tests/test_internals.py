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
