"""Per-pixel expert selection: gates, banks, ensemble (Eq. 2-6).

Legend: `b` pictures, `p` pixels of all pictures, `n` experts, `k` chosen experts, `c` channels, `h`
hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measnet.autocast import autocast_off
from measnet.config import PAPER_ROUTING, RoutingConfig
from measnet.ops import gpu_library
from measnet.ops.convolution import pointwise, preferred_padding
from measnet.selection import Selector
from measnet.transformer import weight

ExpertPath = Literal["auto", "dense", "sorted"]
CHUNK = 2**15
"""Pixels for which the hidden channels of all N experts are held at once, without gradients."""


class Use(NamedTuple):
    """How a library was used in one forward pass."""

    balance: Tensor | None
    """() fp32, the balance loss of this library; None where it has none."""
    shares: Tensor
    """(B, N) fp32, detached: share of the picture's pixels that chose expert n; rows sum to K."""
    z_loss: Tensor | None = None
    """() fp32, weighted; None where it is switched off."""


class Routed(NamedTuple):
    """Output of a library of experts."""

    features: Tensor
    """(B, H, W, C)."""
    use: Use

    @property
    def balance(self) -> Tensor:
        """() fp32; zeros where the library has none."""
        return self.features.new_zeros(()) if self.use.balance is None else self.use.balance

    @property
    def shares(self) -> Tensor:
        """See `Use`."""
        return self.use.shares


def resolve_path(path: ExpertPath, experts: int, top_k: int, device: torch.device) -> str:
    """`dense` or `sorted`; the rule behind `auto`.

    The kernels for a GPU do not ask: both of their ways need no synchronisation, and
    `measnet.ops.gpu.experts` chooses.

    Dense computes all N experts in one matrix product and masks. It has static shapes and needs no
    synchronisation with the device, so it compiles, exports and is fast on a GPU if N < 8·K. Sorted
    computes only the K chosen experts of each pixel; on a CPU it is faster if K < N.
    """
    if path != "auto":
        return path
    if torch.compiler.is_compiling() or experts == top_k:
        return "dense"
    if device.type == "cpu":
        return "sorted"
    return "sorted" if experts >= 8 * top_k else "dense"


def in_chunks(experts: Callable[..., Tensor], *pixels: Tensor) -> Tensor:
    """`experts(*pixels)`; without gradients in chunks of pixels, to limit the memory of inference.

    Args:
        experts: a function that treats each pixel independently.
        pixels: each (P, ...), P pixels.

    Returns:
        The output of `experts` for all P pixels.
    """
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if whole or len(pixels[0]) <= CHUNK:
        return experts(*pixels)
    parts = zip(*(one.split(CHUNK) for one in pixels), strict=True)
    return torch.cat([experts(*part) for part in parts])


class ExpertBank(nn.Module):
    """N expert MLPs C → hidden → C with GELU and biases, in four tensors.

    All experts' weights are in one tensor, so an expert that no pixel chose has a gradient of zero
    instead of none.
    """

    def __init__(self, experts: int, channels: int, hidden: int) -> None:
        """`experts` is N."""
        super().__init__()
        self.weight_in = weight(experts, hidden, channels, fan_in=channels)
        self.bias_in = weight(experts, hidden, fan_in=channels)
        self.weight_out = weight(experts, channels, hidden, fan_in=hidden)
        self.bias_out = weight(experts, channels, fan_in=hidden)

    def forward(self, x_pc: Tensor, gate_pk: Tensor, index_pk: Tensor, path: str) -> Tensor:
        """Eq. 3: Σ_k gate · E_index(x) for each pixel, by the `dense` or the `sorted` path."""
        mixed = partial(self._mixed, path)
        if path == "sorted":  # needs little memory; each chunk would wait for the GPU
            return mixed(x_pc, gate_pk, index_pk)
        return in_chunks(mixed, x_pc, gate_pk, index_pk)

    def _mixed(self, path: str, x_pc: Tensor, gate_pk: Tensor, index_pk: Tensor) -> Tensor:
        if path == "sorted":
            out_pkc = self.chosen(x_pc, index_pk)
            return (out_pkc * gate_pk.unsqueeze(-1).to(out_pkc.dtype)).sum(1)
        gate_pn = scatter_gates(gate_pk, index_pk, len(self.bias_in)).to(x_pc.dtype)
        hidden_pnh = self._hidden(x_pc) * gate_pn.unsqueeze(-1)
        merged = self.weight_out.transpose(0, 1).flatten(1)  # (C, N·h): the sum is in the product
        return pointwise(hidden_pnh.flatten(1), merged) + gate_pn @ self.bias_out.to(x_pc.dtype)

    def fused(self, x: Tensor, gate_pn: Tensor, residual: Tensor, top_k: int) -> Tensor:
        """Eq. 3 on a GPU, plus `residual`, by one kernel; `gate_pn` is 0 for the not chosen."""
        from measnet.ops.gpu.experts import mixture

        return mixture(x, gate_pn, residual, self._widths(), *self._side_by_side(), top_k)

    def _widths(self) -> tuple[int, ...]:
        return (self.bias_in.shape[1],) * len(self.bias_in)

    def _side_by_side(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights with all experts' hidden channels in the first dimension."""
        weight_out = self.weight_out.transpose(1, 2).flatten(0, 1)
        return self.weight_in.flatten(0, 1), self.bias_in.flatten(), weight_out, self.bias_out

    def all(self, x_pc: Tensor) -> Tensor:
        """Every expert's output for every pixel, (P, N, C)."""
        hidden_nph = self._hidden(x_pc).transpose(0, 1)
        out_npc = hidden_nph @ self.weight_out.transpose(1, 2).to(hidden_nph.dtype)
        return out_npc.transpose(0, 1) + self.bias_out

    def chosen(self, x_pc: Tensor, index_pk: Tensor) -> Tensor:
        """Output of the K experts that each pixel chose, (P, K, C); computed sorted by expert."""
        flat = index_pk.flatten()
        order = torch.argsort(flat, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(flat, minlength=len(self.bias_in)).tolist()
        top_k = index_pk.shape[1]
        parts = _Gather.apply(x_pc, order, back, top_k).split(counts)
        out = torch.cat([mlp(x_pc) for mlp, x_pc in zip(self._experts(x_pc), parts, strict=True)])
        return _Gather.apply(out, back, order, 1).unflatten(0, (-1, top_k))

    def _hidden(self, x_pc: Tensor) -> Tensor:
        hidden = pointwise(x_pc, self.weight_in.flatten(0, 1), self.bias_in.flatten())
        return F.gelu(hidden).unflatten(1, self.bias_in.shape)

    def _experts(self, x_pc: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """Each expert's MLP; hidden channels are padded while computing if that is faster."""
        missing = preferred_padding(x_pc, self.bias_in.shape[1])
        into, bias_in = F.pad(self.weight_in, (0, 0, 0, missing)), F.pad(self.bias_in, (0, missing))
        out = F.pad(self.weight_out, (0, missing))
        each = (one.unbind() for one in (into, bias_in, out, self.bias_out))
        return [partial(_mlp, *weights) for weights in zip(*each, strict=True)]


def _mlp(into: Tensor, bias_in: Tensor, out: Tensor, bias_out: Tensor, x_pc: Tensor) -> Tensor:
    return pointwise(pointwise(x_pc, into, bias_in), out, bias_out, gelu=True)


class _Gather(torch.autograd.Function):
    """Row `i` of the output is row `order[i] // copies` of the input; `back` inverts `order`.

    torch's own gather adds row by row in the backward pass. With the known inverse, the backward
    pass is a gather too.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor, copies: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (back,) = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        if ctx.copies > 1:
            gradient = gradient.unflatten(0, (-1, ctx.copies)).sum(1)
        return gradient, None, None, None


def scatter_gates(gate_pk: Tensor, index_pk: Tensor, experts: int) -> Tensor:
    """The K gates of each row at their positions among N, zeros elsewhere: (P, N)."""
    zeros = gate_pk.new_zeros(gate_pk.shape[0], experts)
    return zeros.scatter(1, index_pk, gate_pk)


class PromptGate(nn.Module):
    """The product of Eq. 2: [features, prompt] × p_e, a logit per expert and pixel, always fp32.

    The prompt is the same for all pixels of a picture, so its part is computed once per picture.
    """

    def __init__(self, channels: int, experts: int, prompt_length: int | None) -> None:
        """`prompt_length` is M; None: features only (ablation)."""
        super().__init__()
        rows = channels if prompt_length is None else 2 * channels
        self.weight = weight(rows, experts, fan_in=rows)
        self.to_channels = None if prompt_length is None else nn.Linear(prompt_length, channels)

    def forward(self, x_bhwc: Tensor, prompt_bm: Tensor | None) -> Tensor:
        """Logits (B, H, W, N)."""
        prompt_bc = None if self.to_channels is None else self.to_channels(prompt_bm)
        return self.logits(x_bhwc, prompt_bc, self.weight)

    def of_prompt(self, prompt_bm: Tensor | None, like: Tensor) -> Tensor:
        """The prompt's part of the logits, (B, N) fp32; zeros without a prompt."""
        if self.to_channels is None or prompt_bm is None:
            return like.new_zeros(len(like), self.weight.shape[1], dtype=torch.float32)
        prompt_bc = self.to_channels(prompt_bm)
        with autocast_off(prompt_bc):
            return prompt_bc.float() @ self.weight[-prompt_bc.shape[1] :].float()

    def logits(self, x_bhwc: Tensor, prompt_bc: Tensor | None, weight_cn: Tensor) -> Tensor:
        """[features, prompt] × weight, without building the concatenation."""
        channels = x_bhwc.shape[-1]
        with autocast_off(x_bhwc):
            logits = x_bhwc.float() @ weight_cn[:channels].float()
            if prompt_bc is not None:
                from_prompt = prompt_bc.float() @ weight_cn[channels:].float()
                logits = logits + from_prompt[:, None, None]
        return logits


class PixelExperts(nn.Module):
    """STP-G-MESE: each pixel passes through K experts, chosen by it and the prompt (Eq. 2-6)."""

    def __init__(
        self,
        channels: int,
        *,
        experts: int,
        top_k: int,
        expansion: float,
        prompt_length: int | None,
        path: ExpertPath,
        routing: RoutingConfig = PAPER_ROUTING,
    ) -> None:
        """`experts` is N, `top_k` K; an expert has int(channels · expansion) hidden channels."""
        super().__init__()
        self.experts, self.top_k, self.path = experts, top_k, path
        over_batch = routing.balance_over == "batch"
        self.select = Selector(experts, top_k, routing, over_batch=over_batch)
        self.gate = PromptGate(channels, experts, prompt_length)
        self.bank = ExpertBank(experts, channels, int(channels * expansion))

    def forward(
        self, x_bhwc: Tensor, prompt_bm: Tensor | None, generator: torch.Generator | None = None
    ) -> Routed:
        """(B, H, W, C) and prompts (B, M) -> features plus experts.

        `generator` draws the noise of the gates, if `RoutingConfig.noise` asks for it.
        """
        bank, gate = self.bank, self.gate.weight
        weights = (gate, bank.weight_in, bank.bias_in, bank.weight_out, bank.bias_out)
        on_gpu = gpu_library.fits_experts(x_bhwc, self.experts, *weights)
        if on_gpu and self.select.plain:
            return self._on_gpu(x_bhwc, prompt_bm)
        logits_bhwn = self.gate(x_bhwc, prompt_bm)
        choice = self.select(logits_bhwn, generator)
        gate_pk, index_pk = choice.gate.flatten(0, 2), choice.chosen.flatten(0, 2)
        if on_gpu:
            gate_pn = scatter_gates(gate_pk, index_pk, self.experts)
            features = bank.fused(x_bhwc, gate_pn, x_bhwc, self.top_k)
        else:
            path = resolve_path(self.path, self.experts, self.top_k, x_bhwc.device)
            out_pc = bank(x_bhwc.flatten(0, 2), gate_pk, index_pk, path)
            features = x_bhwc + out_pc.view(x_bhwc.shape)
        counts_bn = count_choices(choice.chosen.flatten(1, 2), self.experts)
        probability_bn = choice.probability.flatten(1, 2).sum(1)  # of W, the softmax of Eq. 2
        return self._routed(features, probability_bn, counts_bn, self.select.z_loss(logits_bhwn))

    def _on_gpu(self, x_bhwc: Tensor, prompt_bm: Tensor | None) -> Routed:
        """The same by two kernels: the gates of all pixels, and all their experts."""
        from measnet.ops.gpu.routing import route

        weight_cn = self.gate.weight[: x_bhwc.shape[-1]]
        from_prompt = self.gate.of_prompt(prompt_bm, x_bhwc)
        gate_pn, probability_bn, counts_bn = route(x_bhwc, weight_cn, from_prompt, self.top_k)
        features = self.bank.fused(x_bhwc, gate_pn, x_bhwc, self.top_k)
        return self._routed(features, probability_bn, counts_bn)

    def _routed(
        self,
        features: Tensor,
        probability_bn: Tensor,
        counts_bn: Tensor,
        z_loss: Tensor | None = None,
    ) -> Routed:
        """With the balance loss: S and S̃ of Eq. 4 and 5 are sums over each picture's pixels."""
        _, height, width, _ = features.shape
        balance = self.select.balance(probability_bn, counts_bn, height * width)
        return Routed(features, Use(balance, counts_bn / (height * width), z_loss))


def count_choices(index_bpk: Tensor, experts: int) -> Tensor:
    """S̃ (Eq. 5): how many pixels of each picture chose each expert, (B, N) fp32."""
    flat = index_bpk.flatten(1)
    ones = torch.ones_like(flat, dtype=torch.float32)
    return ones.new_zeros(len(flat), experts).scatter_add(1, flat, ones)
