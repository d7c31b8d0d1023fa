"""How K of N experts are chosen from logits, and how their use is balanced (Eq. 2, 4-6, 9).

The defaults of `RoutingConfig` are the paper's. Its options are for networks whose experts
collapse; `docs/routing.md` says what each does and what was measured.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from measnet.config import RoutingConfig
from measnet.step_statistics import StepStatistics

BALANCE_EPSILON = 1e-10
LOAD_MOMENTUM = 0.1
"""How far one step moves the running load."""


class Choice(NamedTuple):
    """What each pixel or picture chose: (..., K) and (..., N), fp32 but for `chosen`."""

    gate: Tensor
    """(..., K): weights of the chosen experts."""
    chosen: Tensor
    """(..., K) int64: their numbers, from the most to the least probable."""
    probability: Tensor
    """(..., N): softmax of the logits."""


Intercept = Callable[[Choice], Choice]


class Hook:
    """Where `measnet.routing` looks at the choices of a library, or replaces them."""

    def __init__(self) -> None:
        """Nothing looks."""
        self.intercept: Intercept | None = None

    def __call__(self, choice: Choice) -> Choice:
        """The choice, or what replaces it."""
        return choice if self.intercept is None else self.intercept(choice)


def squared_variation(load: Tensor) -> Tensor:
    """Squared coefficient of variation σ²/(μ² + ε) over the last dimension, the experts (Eq. 6)."""
    return load.var(-1, correction=0) / (load.mean(-1).square() + BALANCE_EPSILON)


class Selector(StepStatistics):
    """Chooses K of N experts by the largest probability; balances them over pictures or steps.

    Its buffers, the bias and the running load, move at `commit_statistics` only.
    """

    bias: Tensor
    load: Tensor

    def __init__(
        self, experts: int, top_k: int, routing: RoutingConfig, *, over_batch: bool
    ) -> None:
        """Of `experts` (N) choose `top_k` (K).

        Args:
            experts: N.
            top_k: K.
            routing: the options.
            over_batch: balance over the pictures of a step; False: within each picture.
        """
        super().__init__()
        self.experts, self.top_k, self.routing = experts, top_k, routing
        self.over_batch = over_batch
        self.hook = Hook()
        self.noise_left = 1.0
        """Share of `routing.noise` that is still added; see `fade_noise`."""
        if routing.bias_rate:
            self.register_buffer("bias", torch.zeros(experts))
        if over_batch:
            self.register_buffer("load", torch.zeros(2, experts))
        self.tracks = over_batch or bool(routing.bias_rate)
        if self.tracks:
            self.collect(3, experts)

    @property
    def plain(self) -> bool:
        """Whether the choice is the paper's, and nothing looks at it."""
        options = self.routing
        changed = options.bias_rate or options.noise or options.z_loss or options.renormalise
        plain = not changed and options.temperature == 1 and not self.over_batch
        return plain and self.hook.intercept is None

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Choice:
        """(..., N) fp32 -> the choice; `generator` draws the noise of training."""
        options = self.routing
        if options.temperature != 1:
            logits = logits / options.temperature
        probability = torch.softmax(logits, dim=-1)
        score = logits
        if self.training and options.noise and self.noise_left:
            score = score + options.noise * self.noise_left * draw_noise(logits, generator)
        if options.bias_rate:
            score = score + self.bias
        if score is logits:
            gate, index = probability.topk(self.top_k, dim=-1)
        else:
            index = score.topk(self.top_k, dim=-1).indices
            gate = probability.gather(-1, index)
        if options.renormalise:
            gate = gate / gate.sum(-1, keepdim=True)
        return self.hook(Choice(gate, index, probability))

    def balance(self, probability_bn: Tensor, counts_bn: Tensor, pixels: int) -> Tensor:
        """The balance loss (Eq. 6), ().

        Within each picture it is the paper's. Over a step the load is that of the global batch: its
        value comes from the steps before, which are known on all ranks, and its gradient from the
        pictures at hand.

        Args:
            probability_bn: S of Eq. 4, probabilities summed over each picture's pixels.
            counts_bn: S̃ of Eq. 5, how many pixels chose each expert.
            pixels: of a picture.
        """
        if self.training and self.tracks:
            self._observe(probability_bn.detach() / pixels, counts_bn.detach() / pixels)
        if not self.over_batch:
            return (squared_variation(probability_bn) + squared_variation(counts_bn)).mean()
        own = (probability_bn / pixels).mean(0)
        seen = torch.where(self.load.any(), self.load[0], own.detach())
        chosen = torch.where(self.load.any(), self.load[1], (counts_bn / pixels).mean(0))
        return squared_variation(seen + own - own.detach()) + squared_variation(chosen)

    def z_loss(self, logits: Tensor) -> Tensor | None:
        """The weighted mean of logsumexp(logits)², () (Zoph et al. 2022, ST-MoE, Eq. 5)."""
        if not self.routing.z_loss:
            return None
        return self.routing.z_loss * torch.logsumexp(logits, dim=-1).square().mean()

    def _observe(self, probability_bn: Tensor, shares_bn: Tensor) -> None:
        count = torch.full_like(probability_bn[0], len(probability_bn))
        self.moments.add_(torch.stack([count, probability_bn.sum(0), shares_bn.sum(0)]))

    def fold(self) -> None:
        """Correct the bias, and move the running load, by the pictures of a step.

        The bias of an expert that was chosen too often falls by `bias_rate`, else it rises (Wang et
        al. 2024, auxiliary-loss-free load balancing); the mean over the experts stays 0.
        """
        count, probability, shares = self.taken()
        known = count > 0
        mean = torch.stack([probability, shares]) / count.clamp_min(1)
        if self.routing.bias_rate:
            missing = torch.sign(self.top_k / self.experts - mean[1]) * known
            moved = self.bias + self.routing.bias_rate * missing.float()
            self.bias.copy_(moved - moved.mean())
        if self.over_batch:
            step = torch.where(self.load.any(), LOAD_MOMENTUM, 1.0) * known
            self.load.lerp_(mean.float(), step.float())


def draw_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, drawn on the generator's device."""
    if generator is None:
        return torch.randn_like(like)
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def fade_noise(model: torch.nn.Module, progress: float) -> None:
    """Set what is left of the gates' noise.

    Args:
        model: holds `Selector` modules.
        progress: share of the run that is done, 0 to 1.
    """
    for module in model.modules():
        if isinstance(module, Selector):
            module.noise_left = max(0.0, 1.0 - progress / module.routing.noise_until)
