"""What is recorded about the workers' machines; no card but the worker's own is asked."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.environment import (
    COMPILED,
    ENVIRONMENT,
    SystemMetrics,
    by_hardware,
    driver_process,
    hardware,
    hardware_changes,
    replace_environment,
)

A100 = {"device": "cuda", "card": "NVIDIA A100", "driver": "550.54", "compiled": ["jpeg_decoder"]}
H100 = {**A100, "card": "NVIDIA H100", "driver": "580.65"}
CPU = {"device": "cpu", "processor": "AMD EPYC 7B13", "compiled": []}


def test_all_compiled_parts_of_the_package_are_recorded() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    extensions = tomllib.loads(text)["tool"]["setuptools"]["ext-modules"]
    assert set(COMPILED.values()) == {extension["name"] for extension in extensions}


def on(host: str, hardware: dict[str, Any]) -> dict[str, Any]:
    return {"host": host, **hardware}


def test_one_entry_per_hardware() -> None:
    ranks = [on("a", A100), on("a", A100), on("b", H100), on("c", A100)]
    assert by_hardware(ranks) == [
        {"ranks": [0, 1, 3], "hosts": ["a", "c"], **A100},
        {"ranks": [2], "hosts": ["b"], **H100},
    ]


@pytest.mark.parametrize(
    ("before", "now", "changes"),
    [
        ([on("a", A100)], [on("b", A100), on("c", A100)], []),
        ([on("a", A100), on("b", H100)], [on("b", H100), on("a", A100)], []),
        (
            [on("a", A100)],
            [on("a", H100)],
            ["card NVIDIA A100 -> NVIDIA H100", "driver 550.54 -> 580.65"],
        ),
        (
            [on("a", A100)],
            [on("a", A100), on("b", H100)],
            [
                "card NVIDIA A100 -> NVIDIA A100, NVIDIA H100",
                "driver 550.54 -> 550.54, 580.65",
            ],
        ),
        (
            [on("a", CPU)],
            [on("a", {**CPU, "compiled": ["png_qoi_decoder", "jpeg_decoder"]})],
            ["compiled none -> png_qoi_decoder and jpeg_decoder"],
        ),
        (
            [on("a", A100)],
            [on("a", CPU)],
            [
                "device cuda -> cpu",
                "card NVIDIA A100 -> none",
                "driver 550.54 -> none",
                "compiled jpeg_decoder -> none",
                "processor none -> AMD EPYC 7B13",
            ],
        ),
    ],
)
def test_what_changed(
    before: list[dict[str, Any]], now: list[dict[str, Any]], changes: list[str]
) -> None:
    assert hardware_changes(by_hardware(before), by_hardware(now)) == changes


def test_a_resumed_run_says_what_changed_since_the_last_start(tmp_path: Path) -> None:
    first = {"workers": by_hardware([on("a", A100)]), "driver_process": driver_process()}
    assert replace_environment(str(tmp_path), first) == []
    assert replace_environment(str(tmp_path), first) == []
    second = {**first, "workers": by_hardware([on("a", {**A100, "driver": "580.65"})])}
    assert replace_environment(str(tmp_path), second) == ["driver 550.54 -> 580.65"]
    assert json.loads((tmp_path / ENVIRONMENT).read_text()) == second


def test_a_cpu_worker_tells_its_machine() -> None:
    described = json.loads(json.dumps(hardware(torch.device("cpu"))))
    assert described["device"] == "cpu" and described["torch"] == torch.__version__
    assert described["cores"] >= 1 and described["memory_gib"] > 0 and described["processor"]
    assert "card" not in described


def test_neither_the_command_nor_a_cpu_worker_asks_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("a GPU was asked")

    for name in ("_lazy_init", "mem_get_info", "get_device_properties", "utilization"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert "system/cpu_utilization_percentage" in SystemMetrics().read()
    hardware(torch.device("cpu"))
    code = "import sys; from distributed import environment as e; e.driver_process(); "
    code += "e.SystemMetrics().read(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
def test_a_gpu_worker_tells_its_card_and_asks_no_other() -> None:
    card = torch.device("cuda", 0)
    torch.ones(1, device=card)
    described = hardware(card)
    assert (
        described["card"] == torch.cuda.get_device_name(card)
        and described["driver"]
        and described["cuda"]
    )
    metrics = SystemMetrics(card).read()
    assert {name for name in metrics if "/gpu_" in name} >= {"system/gpu_0_memory_usage_megabytes"}
    assert not any("/gpu_1" in name for name in metrics)
    # A CUDA context takes some hundred megabytes: other cards hold none of this process.
    for other in range(1, torch.cuda.device_count()):
        assert not torch._C._cuda_hasPrimaryContext(other)
