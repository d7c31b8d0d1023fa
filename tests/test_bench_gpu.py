"""The benchmark of a GPU: what of it a CPU can show."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import pytest
import torch

from bench import gpu, gpu_operations, gpu_steps
from bench.gpu_steps import Training
from measnet.ops.choice import acceleration_allowed

CPU = torch.device("cpu")


def test_a_kind_of_step_that_fails_leaves_the_others_their_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fails:
        def __init__(self, *_: Any) -> None: ...

        def step(self) -> None:
            if acceleration_allowed():
                raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(gpu, "Training", Fails)
    report = gpu.Report(CPU, beside_json=True)
    case = gpu.SMALL_CASES[0]
    report.attempt("cases", case.name, lambda: gpu.train_case(case, CPU, steps=2))
    row = report.found["cases"][case.name]
    assert row["eager_ms"] is None
    assert row["eager_failed"] == "RuntimeError: operation not permitted"
    assert row["plain_ms"] > 0 and row["plain_alone_ms"] > 0
    assert list(report.found["errors"]) == [f"{case.name} eager_failed"]


def test_steps_in_training_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(gpu, "_wait", lambda device: done.append("wait"))
    gpu._mean(lambda: done.append("step"), 3, CPU)
    assert done == ["wait", "step", "step", "step", "wait"]


def test_quality_is_measured_against_fp32_all_through(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions: list[tuple[bool, str]] = []
    network = gpu.build("tiny")
    forward = network.forward

    def watched(image: torch.Tensor) -> Any:
        exact = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        precisions.append((acceleration_allowed(), exact))
        return forward(image)

    monkeypatch.setattr(network, "forward", watched)
    monkeypatch.setattr(gpu, "build", lambda preset: network)
    rows = dict(gpu.infer(CPU, 32, "tiny", steps=1))
    assert list(rows) == [f"tiny infer 32x32 {one}" for one in ("fp32", "tf32", "bf16")]
    assert precisions[0] == (False, "ieee")
    usual = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    assert {exact for _, exact in precisions[-4:]} == {usual}
    fp32, _, bf16 = rows.values()
    assert fp32["difference"] < 1e-4 < bf16["difference"]


def test_a_tile_that_does_not_fit_leaves_the_others_their_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from measnet.ops.gpu import depthwise

    def milliseconds(*_: Any) -> tuple[float, str]:
        if depthwise.CHANNELS == 32:
            raise RuntimeError("the kernel cannot be built")
        return float(depthwise.ROWS), "graph"

    monkeypatch.setattr(gpu_operations, "milliseconds", milliseconds)
    monkeypatch.setattr(gpu_operations, "_step", lambda *_: None)
    before = depthwise.ROWS, depthwise.CHANNELS
    rows = dict(gpu_operations.tune(CPU, 1))
    assert before == (depthwise.ROWS, depthwise.CHANNELS)
    assert rows["depthwise.ROWS 8"] == {"ms": 8.0, "timed": "graph"}
    assert rows["depthwise.CHANNELS 32"] == {
        "ms": None,
        "reason": "RuntimeError: the kernel cannot be built",
    }
    assert rows["depthwise.WARPS 8"]["ms"] == before[0]
    assert len(rows) == sum(len(values) for *_, values in gpu_operations.CHOICES)


class Events:
    """Of a card that is not there."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Events") -> float:
        return 8.0


@pytest.mark.parametrize("captures", [True, False])
def test_an_operation_is_timed_in_a_graph_where_it_can_be_captured(
    monkeypatch: pytest.MonkeyPatch, captures: bool
) -> None:
    eager, replayed = [], []

    def capture(step: Callable[[], None]) -> tuple[Callable[[], None], None]:
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: replayed.append(1), None

    monkeypatch.setattr(gpu_operations, "capture", capture)
    monkeypatch.setattr(gpu_operations, "side_stream", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Events)
    ms, timed = gpu_operations.milliseconds(lambda: eager.append(1), 4, torch.device("cuda"))
    assert ms == 2.0
    if captures:
        assert timed == "graph" and len(replayed) == 5
    else:
        assert timed.startswith("eager, not captured: RuntimeError: operation not permitted")
        assert len(eager) == gpu_operations.WARM_UP + 4


def test_a_step_is_captured_as_that_of_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def capture(step: Callable[[], None]) -> tuple[Callable[[], None], None]:
        captured.append(step)
        return step, None

    monkeypatch.setattr(gpu_steps, "capture", capture)
    monkeypatch.setattr(gpu_steps, "side_stream", lambda device: nullcontext())
    training = Training(gpu.build("tiny"), CPU, 1, 16, "fp32")
    monkeypatch.setattr(training, "step", lambda: None)
    assert training.graphed() is training.step
    assert captured == [training.step]
