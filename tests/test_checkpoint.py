import json
import resource
from pathlib import Path

import pytest
import torch

from distributed import checkpoint as checkpoints
from distributed.checkpoint import RunState, Snapshot, main


def write(run: Path, samples: int, score: float | None = None) -> checkpoints.Checkpoint:
    state = RunState(
        samples=samples,
        updates=samples // 8,
        config={"model": {"dim": 16}},
        data="d",
        plan={"seed": 0},
        score=score,
    )
    tensors = {"w": torch.full((3, 2), float(samples))}
    moments = {"exp_avg.w": torch.ones(3, 2)}
    return Snapshot(state, tensors, tensors, moments).write(str(run))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 8)
    written = write(tmp_path, 16, score=30.5)
    newest = checkpoints.newest_complete(str(tmp_path))
    assert newest is not None and newest.path == written.path
    assert newest.state().samples == 16
    assert newest.score == 30.5
    assert torch.equal(newest.tensors("weights")["w"], torch.full((3, 2), 16.0))
    assert newest.problem() is None


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "cut": "optimizer.safetensors has",
        "flip": "optimizer.safetensors was changed",
        "missing": "optimizer.safetensors is missing",
        "no marker": "no marker",
        "half marker": "cannot be read",
        "bytes for a marker": "cannot be read",
        "empty marker": "lists no files",
        "other version": "version 2",
        "short list": "does not list state.json",
    }.items(),
)
def test_a_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, message: str
) -> None:
    write(tmp_path, 8)
    folder = Path(write(tmp_path, 16).path)
    file, marker = folder / "optimizer.safetensors", folder / checkpoints.MARKER
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "flip":
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "missing":
            file.unlink()
        case "no marker":
            marker.unlink()
        case "half marker":
            marker.write_text(marker.read_text()[:40])
        case "bytes for a marker":
            marker.write_bytes(bytes(range(256)))
        case "empty marker":
            marker.write_text("{}")
        case "other version":
            marker.write_text(marker.read_text().replace('"version": 1', '"version": 2'))
        case "short list":
            listed = json.loads(marker.read_text())
            del listed["files"]["state.json"]
            marker.write_text(json.dumps(listed))
    said: list[str] = []
    newest = checkpoints.newest_complete(str(tmp_path), said.append)
    assert newest is not None and newest.samples == 8
    assert len(said) == 1 and folder.name in said[0] and "going back" in said[0]
    assert message in said[0]


def test_without_a_complete_checkpoint_the_run_starts_again_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoints.newest_complete(str(tmp_path), said.append) is None
    assert not said
    (Path(write(tmp_path, 8).path) / "weights.safetensors").unlink()
    assert checkpoints.newest_complete(str(tmp_path), said.append) is None
    assert "from the beginning" in said[-1]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for samples, score in ((8, 31.0), (16, 35.0), (24, 33.0), (32, None), (40, 34.0)):
        write(tmp_path, samples, score)
    leftover = tmp_path / "checkpoints" / "000000000048-dead00"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    removed = checkpoints.prune(str(tmp_path), keep=2)
    assert [c.samples for c in checkpoints.listed(str(tmp_path))] == [16, 32, 40]
    assert leftover.name in removed and not leftover.exists()


def test_prune_keeps_what_was_just_written(tmp_path: Path) -> None:
    """After a damaged checkpoint at 32 the run resumed from 8, and wrote 16."""
    for samples in (8, 32):
        write(tmp_path, samples)
    written = write(tmp_path, 16)
    checkpoints.prune(str(tmp_path), 1, written)
    assert [c.samples for c in checkpoints.listed(str(tmp_path))] == [16, 32]
    with pytest.raises(ValueError, match="--keep is 0, but must be at least 1"):
        checkpoints.prune(str(tmp_path), 0)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["list", run]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    write(Path(run), 8, 30.0)
    damaged = Path(write(Path(run), 16).path)
    assert main(["verify", run]) == 0
    (damaged / "weights.safetensors").write_bytes(b"x")
    assert main(["verify", run]) == 1
    assert "weights.safetensors" in capsys.readouterr().out
    assert main(["show", run]) == 0
    shown = capsys.readouterr().out
    assert "8 of " in shown and "resume" in shown and len(shown.splitlines()) < 15
    assert main(["show", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 8
    out = tmp_path / "model.safetensors"
    assert main(["export", run, str(out), "--which", "best"]) == 0
    assert out.stat().st_size > 0
    assert main(["export", run, str(out), "--which", "nonsense"]) == 2
    assert main(["prune", run, "--keep", "1"]) == 0
    assert [c.samples for c in checkpoints.listed(run)] == [8]
    (Path(run) / "checkpoints" / "000000000024-00beef").mkdir()
    assert main(["verify", run]) == 0  # it may be being written just now
    assert "no marker" in capsys.readouterr().out


def test_an_export_that_fails_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 8)
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # as a full disc, for larger files
    try:
        status = main(["export", str(tmp_path), str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "no space left to write" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
