"""What a network costs: multiply-adds, parameters, and measured latency."""

import statistics
import time

from measnet.config import ModelConfig

LATENCY_SIDE = 128
"""Side in pixels of the picture whose restoration is timed."""
LATENCY_RUNS = 7


def count(config: ModelConfig) -> dict[str, float]:
    """`parameters`, and `multiply_adds` of one 256x256 picture (one multiply-add = 1)."""
    from measnet import complexity
    from measnet.network import MEASNet

    counted = complexity.count(MEASNet(config))
    return {
        "parameters": float(counted.total_parameters),
        "multiply_adds": float(counted.total_multiply_adds),
    }


def latency_ms(config: ModelConfig, device: str) -> float:
    """Median time of restoring one picture of `LATENCY_SIDE` squared, in milliseconds."""
    import torch

    from measnet.network import MEASNet

    model = MEASNet(config).to(device).eval()
    picture = torch.full((1, 3, LATENCY_SIDE, LATENCY_SIDE), 0.5, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(LATENCY_RUNS + 2):  # the first ones warm up
            start = time.perf_counter()
            model(picture)
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1000
