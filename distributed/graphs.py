"""Forward and backward pass of a micro-batch as one CUDA graph.

A step of the network starts some three thousand kernels, and the host needs longer to start them
than the GPU to run them. A graph is started once. It adds the gradients of a micro-batch to those
of the step, as eager passes do; DeepSpeed updates the weights as usual. Several ranks start to
reduce their gradients when a graph is over: within it, the host does not see when one is complete.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed.config import TrainConfig
from distributed.decisions import Decisions
from distributed.internals.torch import end_failed_capture, foreach_add_, foreach_zero_
from measnet.errors import typed
from measnet.hardware import Decision
from measnet.losses import Losses, restoration_loss
from measnet.network import MEASNet, Restoration

WARM_UP = 3
"""Passes before the capture: libraries choose their algorithms, and kernels are built."""
AGREES = 0.02
"""Largest relative difference of the gradients' norm between the graph and the eager pass."""


class GraphError(RuntimeError):
    """The graph could not be captured, or computes something else than the eager pass."""


class MicroBatchGraph:
    """Replays one micro-batch's forward and backward pass."""

    def __init__(
        self,
        engine: Any,
        *,
        micro_batch: int,
        crop: int,
        bf16: bool,
        balance_weight: float,
        frequency_weight: float = 0.0,
        loss_weight: float,
    ) -> None:
        """Capture, and compare with an eager pass; weights and statistics stay as they are.

        Args:
            engine: DeepSpeed's, ZeRO stage 0, its network in training mode on the GPU.
            micro_batch: pictures.
            crop: their side in pixels.
            bf16: whether autocast is on.
            balance_weight: λ.
            frequency_weight: see `restoration_loss`.
            loss_weight: the gradients are those of the loss times this.

        Raises:
            GraphError: see there. Nothing is left behind; go on without a graph.
        """
        self._engine = engine
        self._network: MEASNet = engine.module
        self._bf16, self._loss_weight = bf16, loss_weight
        self._replay: Callable[[], None] | None = None
        self._results: tuple[Losses, Restoration] | None = None
        self._weights = balance_weight, frequency_weight
        device = next(self._network.parameters()).device
        # Between the two passes. `external`: each replay records it, so its time can be read.
        on_gpu = device.type == "cuda"
        self._middle = torch.cuda.Event(enable_timing=True, external=True) if on_gpu else None
        self.forward_share: float | None = None
        """Of the forward pass in the time of a replay, measured once; None: not measured."""
        # Noise must be drawn anew in each replay, so the capture has to know its source.
        noisy = self._network.config.variant == "official"
        self._noise = torch.Generator(device) if noisy else None
        self._named = [(n, p) for n, p in self._network.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in self._named]
        self._gradients = [  # several ranks have them in buckets already
            torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters
        ]
        self._capture(torch.Size((micro_batch, 3, crop, crop)), device)

    def _capture(self, shape: torch.Size, device: torch.device) -> None:
        """Capture for pictures of this shape; no gradient, weight or statistic is changed.

        Raises:
            GraphError: see `__init__`.
        """
        if self._replay is not None and device.type == "cuda":
            torch.cuda.synchronize(device)  # a replay may still run, and its memory goes now
        self._replay, self._results = None, None
        if device.type == "cuda":
            torch.cuda.empty_cache()  # before the passes below need it
        self._degraded, self._clean = (torch.rand(shape, device=device) for _ in range(2))
        before = [p.grad for p in self._parameters]
        statistics = _Kept(self._network)
        try:
            used = self._warm_up(device)
            expected = self._norm()
            self._replay, self._results = capture(self._pass, self._noise)
            self._start_at_zero()
            self._draw(WARM_UP)
            self.forward_share, found = self._first_replay()
        except RuntimeError as error:  # also torch's errors of a device
            raise GraphError(typed(error)) from error
        finally:
            statistics.restore()
            foreach_zero_(self._gradients)
            for parameter, held in zip(self._parameters, before, strict=True):
                parameter.grad = held
        if not abs(found - expected) <= AGREES * expected:
            raise GraphError(f"its gradients have the norm {found:.4g}, not {expected:.4g}")
        self.unused = [name for i, (name, _) in enumerate(self._named) if i not in used]
        """Parameters that get no gradient."""

    def prepare(self, shape: torch.Size) -> None:
        """Capture anew if the graph is for pictures of another shape; only between two steps.

        Raises:
            GraphError: the graph for that shape cannot be captured.
        """
        if shape != self._degraded.shape:
            self._capture(shape, self._degraded.device)

    def __call__(
        self, degraded: Tensor, clean: Tensor, noise_seed: int = 0
    ) -> tuple[Losses, Restoration]:
        """Add the gradients of a micro-batch; the results hold until the next call.

        Pictures of another shape than before are captured first, see `prepare`.

        Args:
            degraded: (m, 3, c, c) on the device.
            clean: the same.
            noise_seed: of the gates' noise in this micro-batch.

        Raises:
            GraphError: the graph for another side cannot be captured.
        """
        self.prepare(degraded.shape)
        if self._parameters[0].grad is None:  # on a single rank DeepSpeed drops the gradients
            self._start_at_zero()
        self._degraded.copy_(degraded)
        self._clean.copy_(clean)
        self._draw(noise_seed)
        assert self._replay is not None and self._results is not None
        self._replay()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._engine.allreduce_gradients()  # at the last micro-batch of a step
        return self._results

    def _pass(self) -> tuple[Losses, Restoration]:
        device = self._degraded.device.type
        # Weights must be cast in each replay, so none is taken from autocast's cache.
        with torch.autocast(device, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
            restoration = self._network(self._degraded, generator=self._noise)
        losses = restoration_loss(restoration, self._clean, *self._weights)
        if self._middle is not None:
            self._middle.record()
        loss = losses.total * self._loss_weight
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        self._used = [i for i, one in enumerate(gradients) if one is not None]
        pairs = zip(self._gradients, gradients, strict=True)
        _add([(kept, one) for kept, one in pairs if one is not None])
        # With their history, the results would hold what autograd made of this pass.
        return Losses(*(one.detach() for one in losses)), restoration._replace(
            image=restoration.image.detach(),
            balance_loss=restoration.balance_loss.detach(),
            z_loss=restoration.z_loss.detach(),
        )

    def _first_replay(self) -> tuple[float | None, float]:
        """Share of the forward pass in its time, and the norm of the gradients."""
        assert self._replay is not None
        if self._middle is None:
            self._replay()
            return None, self._norm()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._replay()
        end.record()
        norm = self._norm()  # waits for the device
        try:
            share = start.elapsed_time(self._middle) / start.elapsed_time(end)
        except RuntimeError:  # the graph is good without this figure
            share = None
        return share, norm

    def _warm_up(self, device: torch.device) -> Sequence[int]:
        """Eager passes, of which the last one's gradients are left."""
        with side_stream(device):
            for _ in range(WARM_UP):
                foreach_zero_(self._gradients)
                self._draw(WARM_UP)
                self._pass()
        return self._used

    def _draw(self, seed: int) -> None:
        """The next pass draws the noise of this seed."""
        if self._noise is not None:
            self._noise.manual_seed(seed)

    def _start_at_zero(self) -> None:
        foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _norm(self) -> float:
        return torch.nn.utils.get_total_norm(self._gradients).item()


def _add(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the second of each pair to the first.

    torch adds a list in a few kernels if each pair lies in memory in the same way without gaps. A
    single pair that does not, such as the gradient of a padded weight, would make it start one
    kernel for each pair of the list.
    """
    together = [all(one.is_contiguous() for one in pair) for pair in pairs]
    for (kept, one), joined in zip(pairs, together, strict=True):
        if not joined:
            kept.add_(one)
    if any(together):
        kept_ones, ones = zip(*compress(pairs, together), strict=True)
        foreach_add_(kept_ones, ones)


class _Kept:
    """Buffers of a network as they were: passes that train nothing must not move statistics."""

    def __init__(self, network: nn.Module) -> None:
        self._buffers = [(one, one.clone()) for one in network.buffers()]

    def restore(self) -> None:
        for buffer, kept in self._buffers:
            buffer.copy_(kept)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Within it work runs beside the default stream, as torch asks for before a capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(
    function: Callable[[], Any], noise: torch.Generator | None = None
) -> tuple[Callable[[], None], Any]:
    """Capture the kernels of `function` without running them.

    Args:
        function: uses only the current stream and tensors that stay where they are.
        noise: the source of its random numbers; each replay continues from the source's state.

    Returns:
        The function that replays the kernels, and the results, which each replay overwrites.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    if noise is not None:
        graph.register_generator_state(noise)
    stream = torch.cuda.current_stream()
    try:
        # Calls of other threads, such as those that read the load of the card, do no harm.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = function()
    except BaseException:
        torch.cuda.set_stream(stream)
        end_failed_capture(stream.device, pool)
        raise
    return graph.replay, results


def graph_micro_batches(
    engine: Any, config: TrainConfig, decisions: Decisions, loss_weight: float, samples: int = 0
) -> tuple[MicroBatchGraph | None, Decision]:
    """A graph where `decisions` want one; or none, and why.

    Args:
        engine: see `MicroBatchGraph`.
        config: of the run.
        decisions: of the run.
        loss_weight: of one micro-batch in the loss of the step.
        samples: where the run stands.
    """
    if decisions.graphs.choice == "off":
        return None, decisions.graphs
    try:
        graph = MicroBatchGraph(
            engine,
            micro_batch=config.recipe.micro_batch,
            crop=config.data.crop_at(samples),  # later sides are captured when they come
            bf16=decisions.precision.choice == "bf16",
            balance_weight=config.recipe.balance_weight,
            frequency_weight=config.recipe.frequency_weight,
            loss_weight=loss_weight,
        )
    except GraphError as error:
        return None, Decision(
            "off", f"it cannot be captured here ({error}); training continues without it"
        )
    return graph, decisions.graphs
