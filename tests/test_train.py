"""Training as a user starts it, on a real Ray with real DeepSpeed, at a tiny size."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from distributed import checkpoint as checkpoints
from distributed.launch import Outcome
from distributed.presets import PRESETS
from distributed.run_log import CONSUMED
from distributed.train import main, show
from measnet.network import MEASNet

ROOT = Path(__file__).resolve().parent.parent


def command(packed: Path, *more: str) -> list[str]:
    """A run of 12 steps of 4 samples on the smallest network, by default on one worker."""
    return [
        "demo",
        *(() if "--scaling.workers" in more else ("--scaling.workers", "1")),
        *("--data.train", str(packed / "train"), "--data.validation", str(packed / "test")),
        *("--data.crop", "32", "--model.dim", "8", "--engine.zero-stage", "1"),
        *("--recipe.optimizer", "adam"),  # the demo's needs ZeRO stage 0
        *("--recipe.samples", "48", "--recipe.global-batch", "4", "--recipe.micro-batch", "2"),
        *("--recipe.warmup-samples", "8", "--every.log", "4", "--every.checkpoint", "16"),
        *("--every.validate", "0", "--every.validation-pictures", "1", *more),
    ]


def runs_in_mlflow(folder: Path) -> list[tuple[str, str]]:
    """(name, status) of all runs in a folder's database."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        return database.execute("select name, status from runs").fetchall()


def losses(folder: Path) -> dict[int, float]:
    """Samples -> loss."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["metrics"]["train/loss"] for r in records if "train/loss" in r["metrics"]}


@pytest.fixture(scope="module")
def finished(packed: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a run was trained to its end."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(command(packed)) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_made(
    packed: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distributed.train", *command(packed, "--scaling.device", "gpu")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: scaling.device is gpu, but")
    assert not list(tmp_path.iterdir())


def test_a_reason_with_brackets_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "RuntimeError: [/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    show(Outcome("failed", "runs/demo", reason, samples=40), Console(soft_wrap=True))
    assert f"failed after 40 samples: {reason}; the same command" in capsys.readouterr().out


def test_ray_listens_on_this_machine_only(ray_local: None) -> None:
    listening = {
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_run_leaves_what_is_needed(finished: Path) -> None:
    run = finished / "runs" / "demo"
    newest = checkpoints.newest_complete(str(run))
    assert newest is not None and newest.samples == 48
    assert newest.state().finished and newest.state().updates == 12
    assert MEASNet.from_pretrained(run / "model.safetensors").config.dim == 8
    assert runs_in_mlflow(finished) == [("demo", "FINISHED")]
    curve = losses(run)
    assert list(curve) == list(range(4, 49, 4))
    assert all(0 < loss < 1 for loss in curve.values())
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    metrics = {name: value for r in records for name, value in r["metrics"].items()}
    assert "speed/peak_share" not in metrics  # a CPU is in no table
    parts = ("forward_s", "backward_s", "forward_backward_s", "update_s")
    parts += ("validate_s", "save_s", "first_step_s")
    for name in ("model_tflops", *parts):
        assert metrics[f"speed/{name}"] > 0
    (worker,) = json.loads((run / "environment.json").read_text())["workers"]
    assert worker["ranks"] == [0] and worker["device"] == "cpu"
    assert len(list(finished.rglob("artifacts/environment/000000000000.json"))) == 1
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["status"] == "finished"
    assert set(outcome["validation"]["report"]["tasks"]) == {
        "denoise",
        "derain",
        "dehaze",
        "deblur",
        "lowlight",
    }


def test_a_finished_run_says_so(
    finished: Path,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    assert main(command(packed)) == 0
    assert "is finished" in capsys.readouterr().out


def test_another_recipe_under_the_same_name_is_refused(
    finished: Path,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    assert main(command(packed, "--recipe.lr", "1e-5")) == 2
    message = capsys.readouterr().err
    assert f"recipe.lr {PRESETS['demo']().recipe.lr} (now 1e-05)" in message and "--name" in message


def test_two_workers_learn_what_one_learns(
    finished: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(packed, "--scaling.workers", "2", "--profile", "2")) == 0
    one = losses(finished / "runs" / "demo")
    two = losses(tmp_path / "runs" / "demo")
    assert two == pytest.approx(one, rel=1e-4)
    run = tmp_path / "runs" / "demo"
    trace = json.loads((run / "profile" / "trace.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])
    assert f"profile of 2 steps of rank 0: open {run}" in (run / "events.log").read_text()


@pytest.mark.slow
def test_a_number_of_workers_that_does_not_divide_learns_the_same(
    packed: Path, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    three = ("--recipe.global-batch", "6")  # three micro-batches: one of two workers is idle
    assert main(command(packed, *three, "--name", "one")) == 0
    assert main(command(packed, *three, "--name", "two", "--scaling.workers", "1..2")) == 0
    one, two = (losses(tmp_path / "runs" / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    states = [
        found.state().consumed
        for name in ("one", "two")
        if (found := checkpoints.newest_complete(str(tmp_path / "runs" / name))) is not None
    ]
    assert len(states) == 2 and states[0] == states[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.train", "nowhere"], "nowhere"),
        (["--data.repeats.dehaze", "-1"], "data.repeats.dehaze"),
        (["--model.pixel-top-k", "9"], "model.pixel_top_k"),
        (["--scaling.workers", "3"], "scaling.workers"),
        (["--recipe.lerning-rate", "1"], "lerning"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_a_wrong_command_is_answered_before_ray_starts(
    packed: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    arguments = more if "--config" in more else command(packed, *more)
    done = subprocess.run(
        [sys.executable, "-m", "distributed.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_one_then_two_then_four_then_three_workers_make_one_run(
    packed: Path, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by Ctrl-C after a few steps each time, and continued on another number of workers."""
    monkeypatch.chdir(tmp_path)
    twelve = ("--recipe.global-batch", "12", "--recipe.micro-batch", "1", "--recipe.samples", "288")
    assert main(command(packed, *twelve, "--name", "one")) == 0
    for turn, workers in enumerate((1, 2, 4, 3)):
        finished = threading.Event()

        def stop_after(samples: int, over: threading.Event = finished) -> None:
            log = tmp_path / "runs" / "many" / CONSUMED
            while not over.wait(0.05):
                lines = log.read_text().splitlines() if log.exists() else []
                if lines and json.loads(lines[-1])["samples"] >= samples:
                    os.kill(os.getpid(), signal.SIGINT)
                    return

        watcher = threading.Thread(target=stop_after, args=(72 * (turn + 1),))
        if workers != 3:
            watcher.start()
        code = main(command(packed, *twelve, "--name", "many", "--scaling.workers", str(workers)))
        finished.set()
        assert code == (0 if workers == 3 else 130)
    one, many = (losses(tmp_path / "runs" / name) for name in ("one", "many"))
    assert many == pytest.approx(one, rel=1e-5)
    ends = [checkpoints.newest_complete(str(tmp_path / "runs" / name)) for name in ("one", "many")]
    consumed = [end.state().consumed for end in ends if end is not None]
    assert len(consumed) == 2 and consumed[0] == consumed[1]


@pytest.mark.slow
def test_every_zero_stage_and_number_of_workers_learns_the_same(
    packed: Path, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps in fp32, with gate noise, batch norm and balance loss, as in every run.

    At the paper's learning rate: at the demo's, fifteen times as high, a difference of rounding
    grows threefold with every step.
    """
    monkeypatch.chdir(tmp_path)
    twenty = ("--recipe.global-batch", "12", "--recipe.samples", "240", "--recipe.lr", "2e-4")
    twenty += ("--seed", "1")  # no choice of experts lies within rounding of a tie
    ends = {}
    for stage in (0, 1, 2, 3):
        for workers in (1, 2, 3):
            name = f"zero{stage}-{workers}"
            scale = ("--engine.zero-stage", str(stage), "--scaling.workers", str(workers))
            assert main(command(packed, *twenty, *scale, "--name", name)) == 0
            newest = checkpoints.newest_complete(str(tmp_path / "runs" / name))
            assert newest is not None and newest.state().updates == 20
            ends[name] = (losses(tmp_path / "runs" / name), newest.tensors("weights"))
    curve, weights = ends["zero0-1"]
    for name, (other_curve, other_weights) in ends.items():
        assert other_curve == pytest.approx(curve, rel=1e-5), name
        for key, weight in weights.items():
            # Adam divides by the root of a mean square; where that is near zero, little is known.
            torch.testing.assert_close(
                other_weights[key], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
def test_a_damaged_sample_ends_the_run_by_name_and_marks_it_failed(
    packed: Path,
    ray_local: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    (tar,) = (tmp_path / "packed" / "train").glob("derain-*.tar")
    data = bytearray(tar.read_bytes())
    for at in range(2048, len(data) - 10240, 4096):  # in every picture, in no tar header
        data[at] ^= 255
    tar.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    assert main(command(tmp_path / "packed", "--scaling.max-failures", "0")) == 1
    said = capsys.readouterr().out
    assert "failed" in said and "derain-000000" in said and "Traceback" not in said
    assert runs_in_mlflow(tmp_path) == [("demo", "FAILED")]


@pytest.mark.slow
def test_ctrl_c_keeps_the_last_step_and_the_same_command_resumes(
    packed: Path, tmp_path: Path
) -> None:
    arguments = [
        sys.executable,
        "-m",
        "distributed.train",
        *command(packed, "--recipe.samples", "4000", "--every.checkpoint", "4000"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log.txt"
    for turn in range(2):
        with log.open("w") as out:
            run = subprocess.Popen(
                arguments,
                cwd=tmp_path,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while "/4,000 samples" not in log.read_text():
            assert run.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        asked = time.monotonic()
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        assert run.wait(60) == 130
        assert time.monotonic() - asked < 15
        newest = checkpoints.newest_complete(str(tmp_path / "runs" / "demo"))
        assert newest is not None and newest.samples > 0 and newest.samples % 4 == 0
        assert f"after {newest.samples:,} samples" in log.read_text()
        assert runs_in_mlflow(tmp_path) == [("demo", "KILLED")]
        assert ("resumed from checkpoint" in log.read_text()) == (turn == 1)
