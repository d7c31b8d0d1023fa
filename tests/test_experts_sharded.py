"""Ranks whose pixels choose different experts get the gradients of one process, ZeRO 0 to 3."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
import deepspeed, torch
from measnet import config as configs
from measnet.config import replace_dotted
from measnet.experts import PromptGate
from measnet.losses import restoration_loss
from measnet.network import MEASNet

torch.set_num_threads(1)
rank, stage = int(os.environ["RANK"]), int(sys.argv[1])
deepspeed.init_distributed("gloo")
real = PromptGate.logits
chooser = {"rank": rank}

def logits(self, x, prompt, weight):
    # Rank 0 uses experts 0 and 1 alone, rank 1 experts 2 and 3.
    push = torch.zeros(weight.shape[1])
    push[2 * chooser["rank"] : 2 * chooser["rank"] + 2] = 50
    return real(self, x, prompt, weight) + push

PromptGate.logits = logits
config = replace_dotted(configs.tiny(), {"dim": 8, "variant": sys.argv[2]})

def build():
    torch.manual_seed(0)
    model = MEASNet(config)
    model.defer_statistics = True  # else the second picture would meet those of the first
    return model

def loss(forward, r):
    chooser["rank"] = r
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(r))
    return restoration_loss(
        forward(image, generator=torch.Generator().manual_seed(7 + r)), image * 0.5, 0.1).total

alone = build()
start = {n: p.detach().clone() for n, p in alone.named_parameters()}
for r in (0, 1):
    (loss(alone, r) / 2).backward()

model = build()
trained = [p for p in model.parameters() if p.requires_grad]
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(trained, lr=1.0),
    config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    },
)
engine.backward(loss(engine, rank))
engine.step()
worst = 0.0
for (name, parameter), expected in zip(engine.module.named_parameters(), alone.parameters()):
    with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
        moved = start[name] - parameter.detach()
        if not expected.requires_grad:
            assert not moved.any()
            continue
        error = (moved - expected.grad).abs().max() / expected.grad.abs().max().clamp_min(1e-3)
        worst = max(worst, error.item())
assert worst < 1e-3, worst
print("agrees", worst)
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_choose_different_experts(stage: int, variant: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(stage), variant],
            env=os.environ
            | common
            | {"RANK": str(r), "LOCAL_RANK": str(r), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0 and "agrees" in output, output[-3000:]
