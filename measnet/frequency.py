"""The decoder's part: frequency decomposition and the per-picture expert ensemble (Eq. 7-10)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measnet.autocast import autocast_off
from measnet.config import PAPER_ROUTING, RoutingConfig
from measnet.experts import ExpertPath, Routed, Use, resolve_path, scatter_gates
from measnet.ops import gpu_library
from measnet.ops.convolution import pointwise
from measnet.ops.expert_features import expert_features
from measnet.ops.low_pass import low_pass
from measnet.ops.whole import pixel_mean
from measnet.selection import Choice, Selector
from measnet.step_statistics import StepStatistics
from measnet.transformer import Merge, weight

GROUPS = 8
"""Channel groups that share one low-pass kernel (Eq. 7)."""
TAPS = 9
"""A kernel is 3×3."""
MOMENTUM = 0.1
NORM_EPSILON = 1e-5


class KernelNorm(StepStatistics):
    """Batch norm over pictures, one value per channel, that also trains with a single picture.

    At inference: (x − running mean) / √(running variance + ε) · weight + bias. In training it
    normalises by the statistics of the micro-batch, as batch norm does. A single picture has no
    variance, so it is normalised by the running statistics, but updates them.

    The running statistics move by 0.1 towards the mean and unbiased variance: at each training
    forward, or, if deferred, once per `commit_statistics` by the pictures of all forwards and all
    ranks since the last call. For a single picture the variance is its squared distance from the
    running mean.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        """`channels` values are normalised, each independently."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.collect(3, channels)  # count, sum and sum of squares of the pictures

    def forward(self, x_bc: Tensor, defer: bool) -> Tensor:
        """(B, channels) fp32 -> same; `defer`: the statistics wait for `commit_statistics`."""
        if not self.training or len(x_bc) == 1:
            mean, variance = self.running_mean.clone(), self.running_var.clone()
        else:
            mean, variance = x_bc.mean(0), x_bc.var(0, correction=0)
        if self.training:
            self._observe(x_bc.detach().double(), defer)
        scale = torch.rsqrt(variance + NORM_EPSILON) * self.weight.float()
        return (x_bc - mean) * scale + self.bias.float()

    def _observe(self, x_bc: Tensor, defer: bool) -> None:
        count = torch.full_like(x_bc[0], len(x_bc))
        self.moments.add_(torch.stack([count, x_bc.sum(0), x_bc.square().sum(0)]))
        if not defer:
            self.fold()

    def fold(self) -> None:
        """Move the running statistics towards the collected moments."""
        count, total, squares = self.taken()
        mean = total / count.clamp_min(1)
        several = (squares - total * mean).clamp_min(0) / (count - 1).clamp_min(1)
        one = (mean - self.running_mean).square()
        step = MOMENTUM * (count > 0)  # no pictures: no change
        self.running_var.lerp_(torch.where(count > 1, several, one).float(), step.float())
        self.running_mean.lerp_(mean.float(), step.float())


class FrequencySplit(nn.Module):
    """FD: a low-pass kernel per picture and channel group; the rest is high frequency (Eq. 7-8)."""

    def __init__(self, channels: int) -> None:
        """`channels` is a multiple of 8."""
        super().__init__()
        self.predict = nn.Parameter(torch.empty(GROUPS * TAPS, channels))
        nn.init.normal_(self.predict, std=math.sqrt(2 / (GROUPS * TAPS)))  # kaiming, fan-out
        self.norm = KernelNorm(GROUPS * TAPS)

    def forward(self, x_bhwc: Tensor, defer: bool = False) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> (F_low, F_high), each (B, H, W, C); their sum is the input."""
        batch, channels = len(x_bhwc), x_bhwc.shape[-1]
        with autocast_off(x_bhwc):
            pooled_bc = pixel_mean(x_bhwc)
            taps = self.norm(F.linear(pooled_bc, self.predict.float()), defer)
            kernel = torch.softmax(taps.view(batch, GROUPS, TAPS), dim=-1)
        return low_pass(
            x_bhwc, kernel.to(x_bhwc.dtype).repeat_interleave(channels // GROUPS, dim=1)
        )


class PictureExperts(nn.Module):
    """MEE: each picture passes through K experts, chosen by its features (Eq. 9-10).

    The paper's experts have "varying parameters": expert n of N is an MLP C → (n+1)·C/N → C (n
    from 0) with GELU, so the first is the cheapest and the last is as wide as the features.
    """

    def __init__(
        self,
        channels: int,
        *,
        experts: int,
        top_k: int,
        path: ExpertPath,
        routing: RoutingConfig = PAPER_ROUTING,
    ) -> None:
        """`experts` is N, `top_k` K."""
        super().__init__()
        self.top_k, self.path = top_k, path
        balanced = routing.picture_weight > 0
        self.select = Selector(experts, top_k, routing, over_batch=balanced)
        self.norm = nn.LayerNorm(channels)
        self.depthwise = weight(channels, 1, 3, 3, fan_in=9)
        self.project = weight(channels, channels, fan_in=channels)
        self.gate = weight(experts, channels, fan_in=channels)
        self.gate_bias = nn.Parameter(torch.zeros(experts))
        self.widths = [max(1, channels * (n + 1) // experts) for n in range(experts)]
        hidden = sum(self.widths)
        # All experts in one tensor: each gets a gradient, chosen or not.
        self.weight_in = weight(hidden, channels, fan_in=channels)
        self.bias_in = weight(hidden, fan_in=channels)
        self.weight_out = weight(channels, hidden, fan_in=max(1, hidden // experts))
        self.bias_out = weight(experts, channels, fan_in=channels)

    def forward(self, x_bhwc: Tensor, generator: torch.Generator | None = None) -> Routed:
        """(B, H, W, C) -> input plus experts, and the choice as (B, N) zeros and ones."""
        pooled_bc, mixed = expert_features(x_bhwc, self.norm, self.depthwise, self.project)
        logits_bn, (gate_bk, index_bk, probability_bn) = self._choose(pooled_bc, generator)
        gate_bn = scatter_gates(gate_bk, index_bk, len(self.widths))
        chosen_bn = scatter_gates(torch.ones_like(gate_bk).detach(), index_bk, len(self.widths))
        balance = self.select.balance(probability_bn, chosen_bn, 1) if self.select.tracks else None
        use = Use(balance, chosen_bn, self.select.z_loss(logits_bn))
        weights = (self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        if gpu_library.fits_experts(mixed, len(self.widths), *weights):
            from measnet.ops.gpu.experts import mixture

            into, bias_in, back, bias_out = weights
            given = (mixed, gate_bn, x_bhwc, tuple(self.widths))
            return Routed(mixture(*given, into, bias_in, back.t(), bias_out), use)
        path = resolve_path(self.path, len(self.widths), self.top_k, x_bhwc.device)
        if path == "sorted":
            out = self._chosen(mixed, gate_bn, index_bk)
        else:
            out = self._dense(mixed, gate_bn)
        return Routed(x_bhwc + out, use)

    def _choose(
        self, pooled_bc: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Choice]:
        with autocast_off(pooled_bc):
            logits = F.linear(pooled_bc, self.gate.float(), self.gate_bias.float())
            return logits, self.select(logits, generator)

    def _dense(self, x_bhwc: Tensor, gate_bn: Tensor) -> Tensor:
        """All experts as one MLP, whose hidden channels are weighted by their expert's gate."""
        gate_bn = gate_bn.to(x_bhwc.dtype)
        per_hidden = torch.cat(
            [gate_bn[:, n : n + 1].expand(-1, width) for n, width in enumerate(self.widths)], dim=1
        )
        hidden = F.gelu(pointwise(x_bhwc, self.weight_in, self.bias_in))
        out = pointwise(hidden * per_hidden[:, None, None], self.weight_out)
        return out + (gate_bn @ self.bias_out.to(gate_bn.dtype))[:, None, None]

    def _chosen(self, x_bhwc: Tensor, gate_bn: Tensor, index_bk: Tensor) -> Tensor:
        """Only the chosen experts of each picture, concatenated to one narrower MLP."""
        outs = []
        bias_bc = (gate_bn @ self.bias_out.float()).to(x_bhwc.dtype)
        for x_hwc, gate_n, bias_c, chosen in zip(
            x_bhwc, gate_bn, bias_bc, index_bk.tolist(), strict=True
        ):
            parts_in, parts_out, biases = [], [], []
            for n in sorted(chosen):
                rows = slice(sum(self.widths[:n]), sum(self.widths[: n + 1]))
                parts_in.append(self.weight_in[rows])
                biases.append(self.bias_in[rows])
                # Multiply the small matrix by the gate, not all pixels.
                parts_out.append(self.weight_out[:, rows] * gate_n[n].to(x_hwc.dtype))
            hidden = pointwise(x_hwc, torch.cat(parts_in), torch.cat(biases))
            outs.append(pointwise(hidden, torch.cat(parts_out, dim=1), bias_c, gelu=True))
        return torch.stack(outs)


class FrequencyExperts(nn.Module):
    """FD-MEE: separate experts for low and high frequencies, then [high, low] → 1×1 → C.

    Without FD the experts get the undivided features; without MEE the bands are only merged.
    """

    def __init__(
        self,
        channels: int,
        *,
        experts: int,
        top_k: int,
        path: ExpertPath,
        fd: bool,
        mee: bool,
        routing: RoutingConfig = PAPER_ROUTING,
    ) -> None:
        """`fd`, `mee`: the switches of the ablation."""
        super().__init__()
        self.split = FrequencySplit(channels) if fd else None
        names = ("high", "low") if fd else ("all",)
        self.experts = nn.ModuleDict(
            {
                name: PictureExperts(
                    channels, experts=experts, top_k=top_k, path=path, routing=routing
                )
                for name in (names if mee else ())
            }
        )
        self.merge = Merge(channels, channels) if fd else None

    def forward(
        self, x_bhwc: Tensor, defer: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Use]]:
        """(B, H, W, C) -> same, and for each band how its library was used."""
        bands = {"all": x_bhwc}
        if self.split is not None:
            bands["low"], bands["high"] = self.split(x_bhwc, defer)
        uses = {}
        for name, experts in self.experts.items():
            bands[name], uses[name] = experts(bands[name], generator)
        if self.merge is None:
            return bands["all"], uses
        return self.merge(bands["high"], bands["low"]), uses
