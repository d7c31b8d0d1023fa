import pytest
import torch

from measnet.hardware import (
    Decision,
    Machine,
    choose_device,
    free_memory,
    this_machine,
    unusable_card,
)
from tests.machines import GTX_1070, H100, MACHINES, RTX_3050, RTX_4090, T4

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
)


def test_what_cards_compute_in() -> None:
    bf16 = {card.name: card.has_bf16 for card in (GTX_1070, T4, RTX_3050, RTX_4090, H100)}
    assert list(bf16.values()) == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("asked", "machine", "chosen"),
    [
        ("auto", "no GPU", Decision("cpu", "no GPU")),
        ("auto", "old driver", Decision("cpu", MACHINES["old driver"].problem)),
        ("auto", "4090", Decision("cuda", "NVIDIA GeForce RTX 4090")),
        ("auto", "8 H100", Decision("cuda", "NVIDIA H100 80GB HBM3")),
        ("cpu", "4090", Decision("cpu", "asked for")),
        ("cuda", "T4", Decision("cuda", "asked for")),
    ],
)
def test_device_of_one_process(asked: str, machine: str, chosen: Decision) -> None:
    assert choose_device(asked, MACHINES[machine]) == chosen  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU on this machine; or use --device cpu"):
        choose_device("cuda", MACHINES["no GPU"])
    with pytest.raises(ValueError, match=r"the GPU driver is 535\.104\.05"):
        choose_device("cuda", MACHINES["old driver"])


@pytest.mark.parametrize(
    ("build", "cuda", "driver", "message"),
    [
        ("2.13.0+cpu", None, "", ""),
        ("2.13.0+cu130", "13.0", "", ""),
        ("2.13.0+cpu", None, DRIVER, "is a CPU build; install the CUDA build"),
        (
            "2.13.0+cu130",
            "13.0",
            DRIVER,
            "535.104.05, but torch 2.13.0+cu130 (CUDA 13.0) needs 580",
        ),
        ("2.13.0+cu126", "12.6", DRIVER, "torch sees no GPU: check CUDA_VISIBLE_DEVICES"),
        ("2.13.0+cu130", "13.0", OPEN_DRIVER, "(580.65.06) is loaded, but torch sees no GPU"),
    ],
)
def test_an_unusable_card_is_explained(
    build: str, cuda: str | None, driver: str, message: str
) -> None:
    said = unusable_card(build, cuda, driver)
    assert message in said and bool(message) == bool(said)


def test_this_machine_is_looked_at() -> None:
    machine = this_machine()
    assert isinstance(machine, Machine) and machine.cores >= 1
    assert len(machine.cards) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert free_memory(torch.device("cpu")) > 2**20
