"""Predicts the memory of training and inference from the live tensors of two steps.

For a GPU the steps run on `meta` tensors, which have shapes but no numbers: nothing is computed and
no GPU is needed. docs/gpu.md compares the prediction with measurements on an H100.
"""

import re
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from measnet.autocast import CudaAutocast
from measnet.config import ModelConfig, replace_dotted
from measnet.experts import resolve_path
from measnet.hardware import Card
from measnet.internals import TorchDispatchMode, storage_key, tree_leaves, tree_map
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.ops import gpu_library
from measnet.ops.choice import torch_only

RESERVE = 0.9
"""Share of a device's memory that is used; the rest is for fragmentation and libraries."""
PROBES = ((1, 64), (1, 96))
"""Micro-batches and crops of the two steps on a CPU; the rest is linear in pixels."""
META_PROBES = ((2, 128), (8, 128))
"""The same on `meta`, where large sizes take no more time. Not one picture: its path differs."""
SIDES = (64, 96)
"""Sides of the two pictures that are restored to count the memory of inference on a CPU."""
META_SIDES = (512, 1024)
"""The same on `meta`; larger than the experts' `CHUNK`."""
Precision = Literal["fp32", "bf16"]
Where = Literal["cpu", "cuda"]


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors and their peak; each storage counts once.

    Tensors in `besides` do not count: an in-place operation returns a weight or gradient that
    existed before.
    """

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._state = {storage_key(tensor.untyped_storage()) for tensor in besides}
        self._living: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        out = self._call(func, args, kwargs or {})
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self._state or key in self._living:
            return

        def drop(_: object) -> None:
            del self._living[key]
            self.bytes -= size

        self._living[key] = weakref.ref(storage, drop)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class _LiveTensorsOnMeta(_LiveTensors):
    """The same on `meta`, where results depend on the shapes only, so each is computed once.

    This saves time: the network repeats its blocks, and torch needs up to a millisecond per shape.
    """

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__(besides)
        self._results: dict[Any, Any] = {}

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = tree_leaves((args, kwargs))
        key = (func, len(args), *(_described(one) for one in inputs))
        if key not in self._results:
            out = func(*args, **kwargs)
            self._results[key] = None if _shares(out, inputs) else tree_map(_like, out)
            return out
        known = self._results[key]
        return func(*args, **kwargs) if known is None else tree_map(_like, known)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return type(value), value  # 1 and 1.0 are equal, but give different types


def _shares(out: Any, inputs: Sequence[Any]) -> bool:
    """Whether `out` is a view of one of `inputs`, or was written in place."""
    before, after = (
        {storage_key(one.untyped_storage()) for one in values if isinstance(one, Tensor)}
        for values in (inputs, tree_leaves(out))
    )
    return bool(before & after)


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


class Memory(NamedTuple):
    """Bytes of a training step: `state + constant + per_pixel · pixels of the micro-batch`."""

    state: int
    """Weights, gradients, optimizer state, running average, and the engine's buffers."""
    constant: float
    """What a step needs in addition, independent of the size."""
    per_pixel: float
    """What it needs per pixel of the micro-batch."""

    def step(self, batch: int, crop: int) -> float:
        """Peak of a forward and backward pass in bytes, without the state."""
        return self.constant + self.per_pixel * batch * crop * crop

    def total(self, batch: int, crop: int) -> float:
        """Peak in bytes with the state."""
        return self.state + self.step(batch, crop)


def predict(
    config: ModelConfig,
    *,
    precision: Precision = "fp32",
    checkpointing: bool = False,
    device: Where = "cuda",
    state: int | None = None,
    kernels: bool = False,
) -> Memory:
    """Memory of training, from the live tensors of two small steps.

    Activations grow linearly with the pixels, so two sizes are enough. Not counted: workspaces of
    kernels, the allocator's cache, and a GPU's context (about 0.5 GiB); `RESERVE` is for those.

    Args:
        config: the network. On a GPU its experts count as `dense`, which needs the most memory.
        precision: `bf16` is autocast; weights and optimizer state stay fp32.
        checkpointing: recompute the transformer blocks.
        device: `cuda` or `cpu`; kernels and the types under autocast differ.
        state: bytes that are always allocated; None: `state_bytes` of one worker.
        kernels: the GPU computes with Triton's kernels, which keep less. Where Triton is not
            installed, torch's operations are counted.
    """
    sizes = META_PROBES if device == "cuda" else PROBES
    small, large = (
        _step(config, precision, checkpointing, device, *size, kernels) for size in sizes
    )
    pixels = [batch * crop * crop for batch, crop in sizes]
    per_pixel = (large - small) / (pixels[1] - pixels[0])
    constant = max(0.0, small - per_pixel * pixels[0])
    held = state_bytes(parameter_count(config)) if state is None else state
    return Memory(held, constant, per_pixel)


def state_bytes(
    parameters: int, *, zero_stage: int = 0, world: int = 1, buckets: int | None = None
) -> int:
    """Bytes of DeepSpeed's state on one rank when the backward pass begins; all of it is fp32.

    From the source of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py). After the
    backward pass, flattened gradients and the update's tensors need less than the activations did.

    Args:
        parameters: of the network.
        zero_stage: 0 to 3.
        world: ranks that share the optimizer state (stage 1 and up).
        buckets: elements in all buckets of gradients (stage 1 and up): `reduce_bucket_size`, or
            twice that if autocast sends some gradients in bf16. None: `parameters`.
    """
    whole = 4 * parameters
    part = 4 * -(-parameters // world)
    bucket = 4 * (parameters if buckets is None else buckets)
    if zero_stage == 0:  # weights, gradients, two moments, average
        return 5 * whole
    if zero_stage == 1:  # weights, gradients, average; own weights, two moments
        return 3 * whole + 3 * part + bucket
    if zero_stage == 2:  # weights, average; own weights, gradients, two moments
        return 2 * whole + 4 * part + bucket
    return whole + 5 * part + bucket  # gathered weights; own weights, gradients, moments, average


@lru_cache
def parameter_count(config: ModelConfig) -> int:
    """Trained and fixed parameters of the network."""
    return sum(parameter.numel() for parameter in _network(config, "meta").parameters())


def _network(config: ModelConfig, device: str) -> MEASNet:
    with torch.device(device):
        return MEASNet(config)


@lru_cache
def _step(
    config: ModelConfig,
    precision: Precision,
    checkpointing: bool,
    device: Where,
    batch: int,
    crop: int,
    kernels: bool = False,
) -> int:
    """Peak bytes of a forward and backward pass, without weights and gradients."""
    if device == "cuda":
        config = replace_dotted(config, {"expert_path": "dense"})
    model = _network(config, "meta" if device == "cuda" else "cpu")
    model.activation_checkpointing = checkpointing
    image = torch.rand(batch, 3, crop, crop, device=model.patch_embed.weight.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    as_on_gpu, count = (
        (CudaAutocast(), _LiveTensorsOnMeta) if device == "cuda" else (nullcontext(), _LiveTensors)
    )
    computed_by = gpu_library.stand_in("meta") if kernels else nullcontext()
    with computed_by, count([*model.parameters(), *model.buffers(), *gradients]) as live:
        with as_on_gpu, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            restoration = model(image)
        total = restoration_loss(restoration, image, 1e-4).total
        # Not `total.backward()`: there `CudaAutocast` would not see the recomputed operations.
        edge = torch.autograd.graph.get_gradient_edge(total)
        with as_on_gpu if checkpointing else nullcontext():
            torch.autograd.backward(edge, torch.ones_like(total))
    return live.peak


@lru_cache
def inference(config: ModelConfig, device_type: str) -> Memory:
    """Memory of restoring in fp32 without gradients; the state is the weights.

    Two blocks per level are enough, because without gradients memory does not grow with depth.

    Args:
        config: its expert path may be `auto`.
        device_type: `cpu` or `cuda`; no GPU is needed.
    """
    device = torch.device(device_type)
    paths = [
        resolve_path(config.expert_path, config.pixel_experts, config.pixel_top_k, device),
        resolve_path(config.expert_path, config.image_experts, config.image_top_k, device),
    ]
    path = config.expert_path if device_type == "cpu" else max(paths)  # "sorted" if one of them is
    shallow = {"num_blocks": (2, 2, 2, 2), "num_refinement_blocks": 2, "expert_path": path}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))  # keep the caller's random state
        torch.manual_seed(0)  # sizes depend on which experts are chosen
        state = sum(4 * tensor.numel() for tensor in MEASNet(config).state_dict().values())
        if device_type != "cpu":
            stack.enter_context(torch_only())
        without_numbers = device_type != "cpu" and path == "dense"  # the sorted path needs numbers
        where = "meta" if without_numbers else "cpu"
        model = _network(replace_dotted(config, shallow), where).eval()
        sides = META_SIDES if without_numbers else SIDES
        small, large = (_inference_peak(model, side) for side in sides)
    per_pixel = (large - small) / (sides[1] ** 2 - sides[0] ** 2)
    return Memory(state, max(0.0, small - per_pixel * sides[0] ** 2), per_pixel)


@torch.no_grad()
def _inference_peak(model: MEASNet, side: int) -> int:
    image = torch.rand(1, 3, side, side, device=model.patch_embed.weight.device)
    count = _LiveTensorsOnMeta if image.is_meta else _LiveTensors
    with count(besides=[*model.parameters(), *model.buffers()]) as live:
        model(image)
    return live.peak


class Fit(NamedTuple):
    """Whether a micro-batch fits on a card."""

    checkpointing: bool | None
    """False: it fits without activation checkpointing; True: only with it; None: not even then."""
    needed: float
    """Bytes that it needs: without checkpointing if that fits, else with it."""
    usable: float
    """Bytes of the card that may be used."""
    largest: int
    """The largest micro-batch with the same checkpointing; with it on if nothing fits."""


def fit(
    card: Card,
    config: ModelConfig,
    *,
    micro_batch: int,
    crop: int,
    precision: Precision,
    state: int | None = None,
    kernels: bool = False,
) -> Fit:
    """Try the micro-batch without activation checkpointing, then with it.

    Runs one or two steps on `meta`, a second or two. `largest` assumes that all memory of a step
    grows with the micro-batch, so it may be one too low.

    Args:
        card: the GPU.
        config: the network.
        micro_batch: samples that one worker computes at once.
        crop: height and width of the samples.
        precision: see `predict`.
        state: see `predict`.
        kernels: see `predict`.
    """
    held = state_bytes(parameter_count(config)) if state is None else state
    usable, checkpointing = RESERVE * card.memory, False
    step = _step(config, precision, checkpointing, "cuda", micro_batch, crop, kernels)
    if held + step > usable:
        checkpointing = True
        step = _step(config, precision, checkpointing, "cuda", micro_batch, crop, kernels)
    fits = held + step <= usable
    largest = max(0, int((usable - held) * micro_batch / step))
    return Fit(checkpointing if fits else None, held + step, usable, largest)


def largest_micro_batch(memory: Memory, budget: float, crop: int) -> int:
    """Samples of `crop`×`crop` that fit into `budget` bytes; 0 if not even one does."""
    free = RESERVE * budget - memory.state - memory.constant
    return max(0, int(free / (memory.per_pixel * crop * crop)))


def parse_bytes(text: str) -> float:
    """`24GiB`, `16GB`, `800MiB` -> bytes.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT])(i?)B\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it as 24GiB or 800MB")
    number, unit, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1)


def memory_table(config: ModelConfig, budget: float, crop: int, precision: Precision) -> str:
    """The largest micro-batch with and without activation checkpointing, on a GPU.

    Counted for Triton's kernels, which cards from compute capability 8.0 on have.
    """
    lines = [
        f"training with {precision} on crops of {crop}×{crop}; {RESERVE:.0%} of the memory is used",
        f"{'checkpointing':<16}{'state GiB':>12}{'GiB a sample':>14}{'largest micro-batch':>21}",
    ]
    for checkpointing in (False, True):
        memory = predict(config, precision=precision, checkpointing=checkpointing, kernels=True)
        sample = memory.per_pixel * crop * crop / 2**30
        batch = largest_micro_batch(memory, budget, crop)
        name = "on" if checkpointing else "off"
        lines.append(f"{name:<16}{memory.state / 2**30:>12.2f}{sample:>14.2f}{batch:>21}")
    return "\n".join(lines)


CARDS = (
    Card(name="RTX 2080, 8 GB", memory=8 * 2**30, capability=(7, 5)),
    Card(name="RTX 3070, RTX 4060, 8 GB", memory=8 * 2**30, capability=(8, 6)),
    Card(name="RTX 3060, 12 GB", memory=12 * 2**30, capability=(8, 6)),
    Card(name="T4, 16 GB", memory=15 * 2**30, capability=(7, 5)),  # ECC takes a sixteenth
    Card(name="RTX 3090, RTX 4090, 24 GB", memory=24 * 2**30, capability=(8, 6)),
    Card(name="A100, 40 GB", memory=40 * 2**30, capability=(8, 0)),
    Card(name="A100, H100, 80 GB", memory=80 * 2**30, capability=(8, 0)),
)
"""Cards of docs/gpu.md with the memory that their makers state, in GiB."""


def cards_table(config: ModelConfig, crop: int, cards: Sequence[Card] = CARDS) -> str:
    """The largest micro-batch on each card, as a Markdown table; bf16 if the card has it."""
    lines = [
        "| card | precision | micro-batch | with activation checkpointing |",
        "|---|---|---|---|",
    ]
    for card in cards:
        precision: Precision = "bf16" if card.has_bf16 else "fp32"
        batches = [
            largest_micro_batch(
                predict(
                    config,
                    precision=precision,
                    checkpointing=checkpointing,
                    kernels=card.capability >= gpu_library.LEAST_CAPABILITY,
                ),
                card.memory,
                crop,
            )
            for checkpointing in (False, True)
        ]
        lines.append(f"| {card.name} | {precision} | {batches[0]} | {batches[1]} |")
    return "\n".join(lines)
