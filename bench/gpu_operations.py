"""Operations of the network on a GPU, each beside torch's own, and the kernels that it starts."""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distributed.graphs import WARM_UP, capture, side_stream
from measnet import config as configs
from measnet.config import replace_dotted
from measnet.errors import typed
from measnet.experts import PixelExperts
from measnet.frequency import PictureExperts
from measnet.hardware import peak
from measnet.official.network import (
    RECTANGLE,
    CrossAttention,
    NoisyPixelExperts,
    rectangle_low_pass,
)
from measnet.ops import gpu_library
from measnet.ops.attention import residual_attention
from measnet.ops.choice import torch_only
from measnet.ops.expert_features import expert_features
from measnet.ops.feed_forward import residual_feed_forward
from measnet.ops.gpu_library import Launch
from measnet.ops.low_pass import low_pass
from measnet.transformer import TransformerBlock

SIZES = {48: (128, 1), 96: (128, 2), 192: (32, 4), 384: (16, 8)}
"""Channels -> side and heads, at crops of 128."""
BATCH = 8
FLOOD = 256 * 2**20
"""Bytes that are written before a kernel is timed: more than the cache for L2 of any card."""
NEVER = 10**9
"""So many times more experts than chosen ones no library has."""
Step = Callable[[], None]


def operations(device: torch.device, *, small: bool) -> Iterator[tuple[str, Step]]:
    """Name -> a forward and backward pass in bf16."""
    batch = 1 if small else BATCH
    for channels, (full, heads) in SIZES.items():
        if small and channels > 96:
            return
        side = 16 if small else full
        torch.manual_seed(0)
        block = TransformerBlock(channels, heads, 2.66).to(device)

        def attention(x: Tensor, block: TransformerBlock = block) -> Tensor:
            return residual_attention(x, block.norm1, block.attention)

        def feed_forward(x: Tensor, block: TransformerBlock = block) -> Tensor:
            return residual_feed_forward(x, block.norm2, block.feed_forward)

        size = (batch, side, side, channels)
        where = f"{channels}@{side}"
        yield f"attention {where}", _step(attention, block, size, device)
        yield f"feed-forward {where}", _step(feed_forward, block, size, device)
        if channels <= 192:
            sizes: dict[str, Any] = {"experts": 6, "top_k": 2, "expansion": 2.66}
            library = PixelExperts(channels, **sizes, prompt_length=256, path="dense").to(device)
            prompt = torch.randn(batch, 256, device=device)

            def select(x: Tensor, library: Any = library, prompt: Tensor = prompt) -> Tensor:
                routed = library(x, prompt)
                return routed.features + routed.balance

            def as_they_lie(x: Tensor, select: Any = select) -> Tensor:
                from measnet.ops.gpu import experts as kernels

                before, kernels.SORT_FROM = kernels.SORT_FROM, NEVER
                try:
                    return select(x)
                finally:
                    kernels.SORT_FROM = before

            yield f"pixel experts {where}", _step(select, library, size, device)
            if gpu_library.installed():
                yield f"pixel experts not sorted {where}", _step(as_they_lie, library, size, device)
        if 48 < channels <= 192:
            ensemble = PictureExperts(channels, experts=5, top_k=2, path="dense").to(device)
            taps = nn.Parameter(torch.rand(batch, channels, 9, device=device))

            def split(x: Tensor, taps: Tensor = taps) -> Tensor:
                low, high = low_pass(x, taps.to(x.dtype))
                return low + 2 * high

            def see(x: Tensor, ensemble: Any = ensemble) -> Tensor:
                weights = (ensemble.norm, ensemble.depthwise, ensemble.project)
                mean, mixed = expert_features(x, *weights)
                return mixed + mean[:, None, None].to(mixed.dtype)

            def mix(x: Tensor, ensemble: Any = ensemble) -> Tensor:
                return ensemble(x)[0]

            yield f"low pass {where}", _step(split, nn.ParameterList([taps]), size, device)
            yield f"norm, depth-wise, product {where}", _step(see, ensemble, size, device)
            yield f"picture experts {where}", _step(mix, ensemble, size, device)


def operations_of_official(device: torch.device, *, small: bool) -> Iterator[tuple[str, Step]]:
    """The same of what the authors' program needs besides."""
    batch, config = (1 if small else BATCH), configs.tiny() if small else configs.paper()
    config = replace_dotted(config, {"variant": "official"})
    full = 16 if small else 128
    library = NoisyPixelExperts(config.dim, config, used=True).to(device)
    prompt = torch.randn(batch, config.prompt_dim, device=device)

    def select(x: Tensor) -> Tensor:
        return library(x, prompt, None).features

    size = (batch, full, full, config.dim)
    yield f"log-sum-exp experts {config.dim}@{full}", _step(select, library, size, device)
    for level in (2, 3, 4):  # where the network has them, at crops of 128
        channels, side = config.widths[level - 1], full >> (level - 1)
        attention = CrossAttention(channels).to(device)
        query = torch.randn(batch, side, side, channels, device=device, dtype=torch.bfloat16)

        def attend(x: Tensor, attention: Any = attention, query: Tensor = query) -> Tensor:
            return attention(query, x)

        size = (batch, side, side, channels)
        yield f"mining attention {channels}@{side}", _step(attend, attention, size, device)
    # The transform keeps one frequency for each 128 pixels of the features, so crops have none.
    wide, channels = 2 * RECTANGLE, config.widths[1]
    keep = torch.ones(1, 4, dtype=torch.bool, device=device)

    def transform(x: Tensor) -> Tensor:
        return torch.hypot(*rectangle_low_pass(x.float(), keep, keep))

    size = (1, wide, wide, channels)
    yield f"restricted transform {channels}@{wide}", _step(transform, nn.Module(), size, device)


def _step(
    function: Callable[[Tensor], Tensor],
    weights: nn.Module,
    size: tuple[int, ...],
    device: torch.device,
) -> Step:
    x = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.randn_like(x)
    inputs = (x, *weights.parameters())

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            out = function(x)
        torch.autograd.grad(out, inputs, wanted.to(out.dtype), allow_unused=True)

    return step


def measure(
    name: str, step: Step, device: torch.device, repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One of `operations`, and below it the kernels that it starts."""
    ms, timed = milliseconds(step, repeats, device)
    with torch_only():
        plain, plain_timed = milliseconds(step, repeats, device)
    with gpu_library.counting() as launches:
        step()
    moved = sum(one.bytes for one in launches)
    row: dict[str, Any] = {"ms": ms, "timed": timed, "plain_ms": plain, "plain_timed": plain_timed}
    yield name, row | _traffic(moved, ms)
    if device.type == "cuda":
        yield from _kernels(name, launches, repeats, device)


def _kernels(
    operation: str, launches: list[Launch], repeats: int, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The time of each kernel by itself, started again with what it was started with."""
    for number, one in enumerate(launches):
        ms = _kernel_milliseconds(lambda one=one: gpu_library.start(one), repeats, device)
        yield f"{operation} / {number} {one.name.strip('_')}", {"ms": ms, **_traffic(one.bytes, ms)}


def _traffic(moved: int, ms: float) -> dict[str, float]:
    """What must be moved at least, per second, and as a share of what the card can."""
    if not moved:
        return {}
    found = {"gb_per_s": moved / ms / 1e6}
    card = peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return found | ({"share": found["gb_per_s"] / card.gb_per_s} if card else {})


def milliseconds(step: Step, repeats: int, device: torch.device) -> tuple[float, str]:
    """Of one step, and how they were taken.

    A step starts dozens of kernels, and the host needs longer to start them than a GPU to run them.
    So a CUDA graph is started `repeats` times, as in training; the cache for L2 is as it is. Where
    a step cannot be captured, the time is that of the host, and the row says why.

    Raises:
        RuntimeError: the step itself cannot run.
    """
    if device.type != "cuda":
        step()
        return _host_milliseconds(step, repeats), "cpu"
    with side_stream(device):
        for _ in range(WARM_UP):
            step()
    try:
        again, _ = capture(step)
    except RuntimeError as error:
        return _between_events(step, repeats), f"eager, not captured: {typed(error)}"
    again()
    return _between_events(again, repeats), "graph"


def _host_milliseconds(step: Step, repeats: int) -> float:
    """Median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _between_events(step: Step, repeats: int) -> float:
    """Mean of steps that follow each other on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def _kernel_milliseconds(start: Step, repeats: int, device: torch.device) -> float:
    """Median of a single kernel that finds nothing in the cache for L2.

    What is written before it empties the cache, and keeps the device busy while the host starts the
    kernel: so its start is not part of the time.
    """
    flood = torch.empty(FLOOD, dtype=torch.int8, device=device)
    start()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flood.zero_()
        begin.record()
        start()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


SLIDING = ("depthwise", "correlation")
CHOICES: tuple[tuple[tuple[str, ...], str, tuple[int, ...]], ...] = (
    (SLIDING, "ROWS", (8, 16, 32)),
    (SLIDING, "COLUMNS", (16, 32)),
    (SLIDING, "CHANNELS", (32, 64)),
    (SLIDING, "WARPS", (4, 8)),
    (SLIDING, "STAGES", (1, 2, 3)),
    (("gated",), "COLUMNS", (16, 32)),
    (("gated",), "WIDEST", (0, 128)),  # 0: the gate and the product are two kernels
)
"""Modules of `measnet.ops.gpu`, a constant, and its values, which `tune` tries one by one."""


def tune(device: torch.device, repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Milliseconds of a block of 96 channels with each of `CHOICES`, the others as they are.

    A tile that does not fit into the card gets a reason and no time.
    """
    block = TransformerBlock(96, 2, 2.66).to(device)
    step = _step(block, block, (BATCH, 128, 128, 96), device)
    for names, constant, values in CHOICES:
        every = [importlib.import_module(f"measnet.ops.gpu.{name}") for name in names]
        modules = [one for one in every if hasattr(one, constant)]
        usual = getattr(modules[0], constant)
        for value in values:
            try:
                for module in modules:
                    setattr(module, constant, value)
                ms, timed = milliseconds(step, repeats, device)
                found: dict[str, Any] = {"ms": ms, "timed": timed}
            except RuntimeError as error:
                found = {"ms": None, "reason": typed(error)}
            finally:
                for module in modules:
                    setattr(module, constant, usual)
            yield f"{names[0]}.{constant} {value}", found
