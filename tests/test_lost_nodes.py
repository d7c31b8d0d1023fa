"""A cluster that loses all of its nodes and gets no others."""

import re
from pathlib import Path

import pytest

from distributed import checkpoint as checkpoints
from tests.chaos import Cluster, Run
from tests.photographs import pack_photographs

pytestmark = pytest.mark.slow


def test_without_other_nodes_the_run_says_what_it_waits_for_and_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    data = pack_photographs(tmp_path / "data")
    limits = ("--scaling.start-timeout-s", "5", "--scaling.give-up-s", "60")
    cluster = Cluster()
    try:
        run = Run(tmp_path, data, cluster.environment, *limits)
        assert run.wait_for_step(6)
        cluster.resize(0)
        assert run.end() != 0
    finally:
        cluster.close()
    output = (tmp_path / "log.txt").read_text()
    assert re.search(r"no message from a worker for \d+ s; waiting for 2 workers", output)
    assert "the run fails in" in output
    assert "the same command resumes it" in output.splitlines()[-1], output
    kept = checkpoints.newest_complete(str(run.folder))
    assert kept is not None and kept.samples >= 20
