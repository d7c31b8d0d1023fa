"""What only the authors' released program computes.

Noisy top-K gates whose experts are averaged in log space, other per-picture experts, and three
frequency-mining blocks that the paper does not mention.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measnet.autocast import autocast_off
from measnet.config import ModelConfig
from measnet.experts import (
    ExpertBank,
    ExpertPath,
    PromptGate,
    Routed,
    Use,
    count_choices,
    resolve_path,
    scatter_gates,
)
from measnet.frequency import FrequencySplit
from measnet.ops import gpu_library
from measnet.ops.attention import attend_planes
from measnet.ops.convolution import (
    Pointwise,
    convolve,
    pointwise,
    preferred_padding,
    project,
)
from measnet.selection import BALANCE_EPSILON, Choice, Hook, draw_noise
from measnet.transformer import Merge, weight

OFFICIAL_MIN_SIDE = 64
"""Smallest side in pixels: `RankExperts` reduces level 3 twice by 4."""
NOISE_FLOOR = 1e-2
LOG_FLOOR = math.log(2.220446049250313e-16)
"""Used as the log of an exact 0."""
LOG_UNDERFLOW = math.log(2.0) * -150
"""Below this, exp is an exact 0 in fp32."""
RECTANGLE = 128
"""The rectangle of low frequencies grows by one per this many pixels."""
MINING_HEADS = 4


def replacements(config: ModelConfig) -> dict[str, nn.Module]:
    """Parts of `MEASNet` that the released program computes in another way, by name."""
    width1, width2, width3, _ = config.widths
    return {
        "experts1": NoisyPixelExperts(width1, config, used=True),
        "experts2": NoisyPixelExperts(width2, config, used=False),
        "experts3": NoisyPixelExperts(width3, config, used=False),
        "frequency3": RankFrequencyExperts(width3, config),
        "frequency2": RankFrequencyExperts(width2, config),
        "frequency1": RankFrequencyExperts(width2, config),
    }


def additions(config: ModelConfig) -> dict[str, nn.Module]:
    """Blocks that the paper does not have, by the part of the network that they follow."""
    _, width2, width3, width4 = config.widths
    return {
        "latent": FrequencyMining(width4),
        "decoder3": FrequencyMining(width3),
        "decoder2": FrequencyMining(width2),
    }


# --- Per-pixel experts ---


class LogExpertBank(ExpertBank):
    """An ensemble in log space: log Σ_k g_k · exp(E_k(x)), as a stable log-sum-exp in fp32."""

    def _mixed(self, path: str, x_pc: Tensor, gate_pk: Tensor, index_pk: Tensor) -> Tensor:
        """As `ExpertBank`, but `gate_pk` are the logarithms of the gates."""
        if path == "sorted":
            terms = self.chosen(x_pc, index_pk).float() + gate_pk.unsqueeze(-1)
        else:
            shape = (gate_pk.shape[0], len(self.bias_in))
            never = gate_pk.new_full(shape, -torch.inf)
            log_gate_pn = never.scatter(1, index_pk, gate_pk)
            terms = self.all(x_pc).float() + log_gate_pn.unsqueeze(-1)
        out_pc = torch.logsumexp(terms, dim=1)
        floor = torch.full_like(out_pc, LOG_FLOOR)
        return torch.where(out_pc < LOG_UNDERFLOW, floor, out_pc).to(x_pc.dtype)

    def fused(self, x: Tensor, gate_pn: Tensor, residual: Tensor, top_k: int) -> Tensor:
        """As the paper's bank, but `gate_pn` are logarithms, -inf for the not chosen."""
        from measnet.ops.gpu.log_experts import log_mixture

        limits = (LOG_UNDERFLOW, LOG_FLOOR)
        given = (x, gate_pn, residual, self._widths())
        return log_mixture(*given, *self._side_by_side(), limits)


class NoisyPixelExperts(nn.Module):
    """Noisy top-K gating over per-pixel experts; softmax over the chosen K only."""

    def __init__(self, channels: int, config: ModelConfig, *, used: bool) -> None:
        """`used` False: only the balance loss is needed, so there are no experts."""
        super().__init__()
        self.experts, self.top_k = config.pixel_experts, config.pixel_top_k
        self.path: ExpertPath = config.expert_path
        self.gate = NoisyGate(channels, self.experts, config.prompt_dim)
        hidden = int(channels * config.ffn_expansion)
        self.bank = LogExpertBank(self.experts, channels, hidden) if used else None
        self.hook = Hook()

    def forward(
        self, x_bhwc: Tensor, prompt_bm: Tensor, generator: torch.Generator | None = None
    ) -> Routed:
        """(B, H, W, C) and prompts (B, M) -> features plus experts; `generator` draws the noise."""
        clean_pn, noisy_pn, spread_pn = self.gate(x_bhwc, prompt_bm, generator)
        top, index = noisy_pn.topk(min(self.top_k + 1, self.experts), dim=-1)
        index_pk = index[:, : self.top_k]
        log_gate_pk = torch.log_softmax(top[:, : self.top_k], dim=-1)
        if self.hook.intercept is not None:
            log_gate_pk, index_pk = self._intercepted(log_gate_pk, index_pk, noisy_pn, x_bhwc)
        gate_pn = scatter_gates(log_gate_pk.exp(), index_pk, self.experts)
        if spread_pn is not None and self.top_k < self.experts:
            load_n = expected_load(clean_pn, noisy_pn, spread_pn, top, self.top_k)
        else:
            load_n = (gate_pn > 0).sum(0).float()
        balance = unbiased_variation(gate_pn.sum(0)) + unbiased_variation(load_n)
        counts_bn = count_choices(index_pk.view(len(x_bhwc), -1, self.top_k), self.experts)
        use = Use(balance, counts_bn / x_bhwc.shape[1:3].numel())
        if self.bank is None:
            return Routed(x_bhwc, use)
        bank = self.bank
        weights = (bank.weight_in, bank.bias_in, bank.weight_out, bank.bias_out)
        if gpu_library.fits_experts(x_bhwc, self.experts, *weights):
            log_gate_pn = torch.full_like(gate_pn, -torch.inf).scatter(1, index_pk, log_gate_pk)
            return Routed(bank.fused(x_bhwc, log_gate_pn, x_bhwc, self.top_k), use)
        path = resolve_path(self.path, self.experts, self.top_k, x_bhwc.device)
        out_pc = self.bank(x_bhwc.flatten(0, 2), log_gate_pk, index_pk, path)
        return Routed(x_bhwc + out_pc.view(x_bhwc.shape), use)

    def _intercepted(
        self, log_gate_pk: Tensor, index_pk: Tensor, logits_pn: Tensor, x_bhwc: Tensor
    ) -> tuple[Tensor, Tensor]:
        each = (log_gate_pk.exp(), index_pk, torch.softmax(logits_pn, dim=-1))
        choice = self.hook(Choice(*(one.unflatten(0, x_bhwc.shape[:3]) for one in each)))
        return choice.gate.log().flatten(0, 2), choice.chosen.flatten(0, 2)


class NoisyGate(PromptGate):
    """Logits of [features, prompt], with learnt Gaussian noise in training; always fp32."""

    def __init__(self, channels: int, experts: int, prompt_length: int) -> None:
        """`prompt_length` is M."""
        super().__init__(channels, experts, prompt_length)
        self.noise = nn.Parameter(torch.zeros_like(self.weight))

    def forward(  # type: ignore[override]
        self, x_bhwc: Tensor, prompt_bm: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clean and noisy logits and the noise's spread, each (P, N); no noise in evaluation."""
        assert self.to_channels is not None
        prompt_bc = self.to_channels(prompt_bm)
        both = torch.cat([self.weight, self.noise], dim=1) if self.training else self.weight
        logits = self.logits(x_bhwc, prompt_bc, both).flatten(0, 2)
        if not self.training:
            return logits, logits, None
        clean_pn, spread_pn = logits.chunk(2, dim=1)
        spread_pn = F.softplus(spread_pn) + NOISE_FLOOR
        return clean_pn, clean_pn + draw_noise(clean_pn, generator) * spread_pn, spread_pn


def expected_load(
    clean_pn: Tensor, noisy_pn: Tensor, spread_pn: Tensor, top: Tensor, top_k: int
) -> Tensor:
    """The probability under new noise that an expert is among the K, summed over pixels, (N,).

    A chosen expert is compared with the (K+1)-th noisy logit, another one with the K-th (Shazeer et
    al. 2017, appendix A).
    """
    to_stay, to_enter = top[:, top_k : top_k + 1], top[:, top_k - 1 : top_k]
    threshold = torch.where(noisy_pn > to_stay, to_stay, to_enter)
    return torch.special.ndtr((clean_pn - threshold) / spread_pn).sum(0)


def unbiased_variation(load_n: Tensor) -> Tensor:
    """Squared coefficient of variation with the unbiased variance; 0 for a single expert."""
    if len(load_n) == 1:
        return load_n.new_zeros(())
    return load_n.var() / (load_n.mean().square() + BALANCE_EPSILON)


# --- Per-picture experts ---


class RankExperts(nn.Module):
    """The released MEE: experts of rank 2, 3, ... that modulate one branch by the other."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        """Expert n (from 0) has rank n + 2."""
        super().__init__()
        self.top_k = config.image_top_k
        self.ranks = [n + 2 for n in range(config.image_experts)]
        self.hook = Hook()
        total = sum(self.ranks)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.conv_in = weight(channels, channels, 3, 3, fan_in=channels * 9)
        self.conv_in_bias = weight(channels, fan_in=channels * 9)
        self.divide = weight(2 * channels, channels, fan_in=channels)
        self.divide_bias = weight(2 * channels, fan_in=channels)
        self.across = weight(channels, 1, 1, 3, fan_in=3)
        self.across_bias = weight(channels, fan_in=3)
        self.along = weight(channels, 1, 3, 1, fan_in=3)
        self.along_bias = weight(channels, fan_in=3)
        self.shrink = weight(channels, 1, 4, 4, fan_in=16)
        self.shrink_bias = weight(channels, fan_in=16)
        self.smooth = weight(channels, 1, 3, 3, fan_in=9)
        self.smooth_bias = weight(channels, fan_in=9)
        self.calibrate = nn.Linear(channels, channels)
        self.gate = weight(len(self.ranks), channels, fan_in=channels)
        # All experts together: `total` columns are one narrow matrix product.
        self.from_x = weight(total, channels, fan_in=channels)
        self.from_x_bias = weight(total, fan_in=channels)
        self.from_k = weight(total, channels, fan_in=channels)
        self.from_k_bias = weight(total, fan_in=channels)
        self.back = weight(channels, total, fan_in=4)
        self.back_bias = weight(len(self.ranks), channels, fan_in=4)
        self.project = Pointwise(channels, channels)

    def forward(self, x_bhwc: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> same, and the choice as (B, N) zeros and ones."""
        hidden = convolve(self.norm(x_bhwc), self.conv_in, self.conv_in_bias)
        x, k = project(hidden, self.divide.chunk(2), self.divide_bias.chunk(2), gelu=True)
        x = convolve(x, self.across, self.across_bias, x.shape[-1])
        x = convolve(x, self.along, self.along_bias, x.shape[-1], gelu=True)
        k = self._calibrated(k)

        gate_bk, index_bk = self._choose(x)
        gate_bn = scatter_gates(gate_bk, index_bk, len(self.ranks)).to(x.dtype)
        columns = [gate_bn[:, n : n + 1].expand(-1, rank) for n, rank in enumerate(self.ranks)]
        missing = preferred_padding(x, len(self.from_x))  # not of the parameters
        gate_br = F.pad(torch.cat(columns, dim=1), (0, missing))
        from_x, from_k = (F.pad(one, (0, 0, 0, missing)) for one in (self.from_x, self.from_k))
        mixed = pointwise(x, from_x, F.pad(self.from_x_bias, (0, missing)))
        mixed = mixed * pointwise(k, from_k, F.pad(self.from_k_bias, (0, missing)))
        mixed = mixed * gate_br[:, None, None]
        bias_bc = gate_bn @ self.back_bias.to(x.dtype)
        x = x + pointwise(mixed, F.pad(self.back, (0, missing))) + bias_bc[:, None, None]
        chosen_bn = scatter_gates(torch.ones_like(gate_bk.detach()), index_bk, len(self.ranks))
        return self.project(x) + x_bhwc, chosen_bn

    def _calibrated(self, k_bhwc: Tensor) -> Tensor:
        """Add its summary: reduced twice by 4 with the same weights, and upsampled again."""
        small = k_bhwc.permute(0, 3, 1, 2)
        for _ in range(2):
            groups = len(self.shrink)
            small = F.gelu(F.conv2d(small, self.shrink, self.shrink_bias, stride=4, groups=groups))
        small = convolve(small.permute(0, 2, 3, 1), self.smooth, self.smooth_bias, len(self.smooth))
        small = self.calibrate(small).permute(0, 3, 1, 2)
        spread = F.interpolate(small, k_bhwc.shape[1:3], mode="bilinear", align_corners=False)
        return k_bhwc + spread.permute(0, 2, 3, 1)

    def _choose(self, x_bhwc: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_off(x_bhwc):
            pooled_bc = x_bhwc.mean((1, 2), dtype=torch.float32)
            probability_bn = torch.softmax(F.linear(pooled_bc, self.gate.float()), dim=-1)
            choice = self.hook(Choice(*probability_bn.topk(self.top_k, dim=-1), probability_bn))
        return choice.gate, choice.chosen


class RankFrequencyExperts(nn.Module):
    """FD, then `RankExperts` for each band, then [high, low] → 1×1 → C."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        """See `RankExperts`."""
        super().__init__()
        self.split = FrequencySplit(channels)
        self.high = RankExperts(channels, config)
        self.low = RankExperts(channels, config)
        self.merge = Merge(channels, channels, bias=True)

    def forward(
        self, x_bhwc: Tensor, defer: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Use]]:
        """As the paper's; `generator` is unused."""
        low, high = self.split(x_bhwc, defer)
        high, chosen_high = self.high(high)
        low, chosen_low = self.low(low)
        uses = {"high": Use(None, chosen_high), "low": Use(None, chosen_low)}
        return self.merge(high, low), uses


# --- Frequency mining ---


class CrossAttention(nn.Module):
    """Channel attention with the query from one feature map, key and value from another."""

    def __init__(self, channels: int, heads: int = MINING_HEADS) -> None:
        """`heads` divides `channels`."""
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = weight(channels, channels, fan_in=channels)
        self.q_depthwise = weight(channels, 1, 3, 3, fan_in=9)
        self.kv = weight(2, channels, channels, fan_in=channels)
        self.kv_depthwise = weight(2, channels, 1, 3, 3, fan_in=9)
        self.project_out = weight(channels, channels, fan_in=channels)

    def forward(self, query_bhwc: Tensor | None, y_bhwc: Tensor) -> Tensor:
        """Two of (B, H, W, C) -> same; a query of None means zeros."""
        if query_bhwc is None:
            return self._uniform(y_bhwc)
        q, (k, v) = pointwise(query_bhwc, self.q), project(y_bhwc, self.kv.unbind())
        depthwise = torch.cat([self.q_depthwise[None], self.kv_depthwise])
        return attend_planes(q, k, v, depthwise, self.temperature, self.project_out)

    def _uniform(self, y_bhwc: Tensor) -> Tensor:
        """With a query of zeros, all channels weigh the same: a head gives their mean."""
        heads = len(self.temperature)
        to_v, depthwise = self.kv[1], self.kv_depthwise[1]
        v = convolve(pointwise(y_bhwc, to_v), depthwise, groups=len(depthwise))
        mean = v.unflatten(-1, (heads, -1)).mean(-1)
        out = pointwise(mean, self.project_out.unflatten(1, (heads, -1)).sum(-1))
        if torch.is_grad_enabled():
            # Gradients of zero, not None: a sharded engine waits for every parameter.
            untouched = (self.q, self.q_depthwise, self.temperature)
            out = out + 0 * sum(p.sum() for p in untouched).to(out.dtype)  # type: ignore[union-attr]
        return out


class Modulate(nn.Module):
    """conv1x1(low · s(high) + high · c(low)): `s` a weight per pixel, `c` a weight per channel."""

    def __init__(self, channels: int) -> None:
        """`channels` / 16 hidden in the channel weights."""
        super().__init__()
        self.spatial = weight(1, 2, 7, 7, fan_in=98)
        self.reduce = weight(channels // 16, channels, fan_in=channels)
        self.expand = weight(channels, channels // 16, fan_in=max(1, channels // 16))
        self.project = Pointwise(channels, channels)

    def forward(self, low_bhwc: Tensor, high_bhwc: Tensor) -> Tensor:
        """Two of (B, H, W, C) -> same."""
        most, mean = high_bhwc.amax(-1, keepdim=True), high_bhwc.mean(-1, keepdim=True)
        per_pixel = convolve(torch.cat([most, mean], dim=-1), self.spatial).sigmoid()
        pooled = torch.stack([low_bhwc.mean((1, 2)), low_bhwc.amax((1, 2))])
        hidden = F.relu(F.linear(pooled, self.reduce))
        per_channel = F.linear(hidden, self.expand).sum(0).sigmoid()[:, None, None]
        return self.project(low_bhwc * per_pixel + high_bhwc * per_channel)


class FrequencyMining(nn.Module):
    """Attention to the low and high frequencies of the picture; initially the identity."""

    def __init__(self, channels: int) -> None:
        """`channels` is a multiple of 16."""
        super().__init__()
        self.embed = weight(channels, 3, 3, 3, fan_in=27)
        # An int() follows, so they get no gradient.
        self.rate_in = nn.Parameter(torch.empty(channels // 8, channels), requires_grad=False)
        self.rate_out = nn.Parameter(torch.empty(2, channels // 8), requires_grad=False)
        for rate in (self.rate_in, self.rate_out):
            nn.init.kaiming_uniform_(rate, a=math.sqrt(5))
        self.attend_high = CrossAttention(channels)
        self.attend_low = CrossAttention(channels)
        self.modulate = Modulate(channels)
        self.attend_both = CrossAttention(channels)
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.ones(channels))

    def forward(self, y_bhwc: Tensor, image_bchw: Tensor) -> Tensor:
        """Features (B, H, W, C) and the degraded picture (B, 3, any size) -> features."""
        size = y_bhwc.shape[1:3]
        small = F.interpolate(image_bchw, size, mode="bilinear", align_corners=False)
        low, high = self.bands(convolve(small.permute(0, 2, 3, 1), self.embed))
        high = self.attend_high(high, y_bhwc)
        low = self.attend_low(low, y_bhwc)
        mined = self.attend_both(y_bhwc, self.modulate(low, high))
        return mined * self.alpha + y_bhwc * self.beta

    def bands(self, x_bhwc: Tensor) -> tuple[Tensor | None, Tensor]:
        """Magnitudes of the low and the high frequencies; None for a low band that is 0 everywhere.

        Low frequencies are -h ... h-1 of each axis, with h = int(size // 128 · t) and a rate `t`
        per picture and axis. They are few, so a product with their cosines and sines is cheaper
        than an FFT. The high band is the (complex) rest.
        """
        most_y, most_x = (size // RECTANGLE for size in x_bhwc.shape[1:3])
        if most_y == 0 or most_x == 0:
            return None, x_bhwc.abs()
        with autocast_off(x_bhwc):
            real, imaginary = rectangle_low_pass(
                x_bhwc.float(), *self._half_sizes(x_bhwc, most_y, most_x)
            )
            low = torch.hypot(real, imaginary)
            high = torch.hypot(x_bhwc.float() - real, imaginary)
        return low.to(x_bhwc.dtype), high.to(x_bhwc.dtype)

    def _half_sizes(self, x_bhwc: Tensor, most_y: int, most_x: int) -> tuple[Tensor, Tensor]:
        """For each axis, which of the frequencies -most ... most-1 a picture keeps: (B, 2·most)."""
        pooled_bc = x_bhwc.mean((1, 2), dtype=torch.float32)
        hidden = F.gelu(F.linear(pooled_bc, self.rate_in.float()))
        rate_b2 = torch.sigmoid(F.linear(hidden, self.rate_out.float()))
        kept = []
        for axis, most in enumerate((most_y, most_x)):
            half = (most * rate_b2[:, axis : axis + 1]).int()
            frequency = torch.arange(-most, most, device=half.device)
            kept.append((frequency >= -half) & (frequency < half))
        return kept[0], kept[1]


def rectangle_low_pass(x_bhwc: Tensor, keep_y: Tensor, keep_x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of x with only the kept frequencies (complex, for -h has no +h)."""
    cos_y, sin_y = _waves(x_bhwc.shape[1], keep_y)
    cos_x, sin_x = _waves(x_bhwc.shape[2], keep_x)
    # Forward: X = (1/HW) Σ x (cos_y - i sin_y)(cos_x - i sin_x), over x first, then over y.
    count = cos_x.shape[2]
    along_x = torch.cat([cos_x, sin_x], dim=2).transpose(1, 2)[:, None] @ x_bhwc  # b h 2k c
    real, minus = along_x.flatten(2).split(count * x_bhwc.shape[3], dim=2)
    to_y = torch.cat([cos_y, sin_y], dim=2).transpose(1, 2)
    spectrum = (to_y @ torch.cat([real, minus], dim=2)).unflatten(1, (2, -1))
    (cc, cs), (sc, ss) = (half.chunk(2, dim=2) for half in spectrum.unbind(1))
    area = x_bhwc.shape[1] * x_bhwc.shape[2]
    real_f, imaginary_f = (cc - ss) / area, -(cs + sc) / area  # (B, Ky, Kx·C)
    # Back over y, then over x; the inverse has no factor.
    real_y = (cos_y @ real_f - sin_y @ imaginary_f).unflatten(2, (count, -1))
    imaginary_y = (cos_y @ imaginary_f + sin_y @ real_f).unflatten(2, (count, -1))
    cos_x, sin_x = cos_x[:, None], sin_x[:, None]
    return cos_x @ real_y - sin_x @ imaginary_y, cos_x @ imaginary_y + sin_x @ real_y


def _waves(size: int, keep_bk: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each kept frequency at each position, (B, size, K); zeros if not kept."""
    most = keep_bk.shape[1] // 2
    place = torch.arange(size, device=keep_bk.device, dtype=torch.float32)
    frequency = torch.arange(-most, most, device=keep_bk.device, dtype=torch.float32)
    angle = place[:, None] * frequency * (2 * math.pi / size)
    keep = keep_bk[:, None].float()
    return angle.cos() * keep, angle.sin() * keep
