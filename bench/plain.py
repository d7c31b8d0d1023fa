"""MEASNet as a straightforward reading gives it: the reference of the speed figures and of tests.

Works on a `MEASNet`'s own parameters, so both compute the same function of the same weights.
Features are (B, C, H, W); each step is the operation that its description names (a 1×1 convolution
is a convolution, the prompt is spread and concatenated, experts are looped over, filters unfolded).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measnet.frequency import FrequencyExperts, FrequencySplit, PictureExperts
from measnet.network import MEASNet, Restoration
from measnet.official import network as official
from measnet.prompts import PromptConcat
from measnet.transformer import TransformerBlock


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None], bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    batch, channels, height, width = x.shape
    rows = x.flatten(2).transpose(1, 2)
    mean = rows.mean(-1, keepdim=True)
    variance = rows.var(-1, keepdim=True, unbiased=False)
    rows = (rows - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias
    return rows.transpose(1, 2).reshape(batch, channels, height, width)


def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, project_out: Tensor) -> Tensor:
    batch, channels, height, width = q.shape
    q, k, v = (t.reshape(batch, len(temperature), -1, height * width) for t in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attention = (q @ k.transpose(-2, -1) * temperature).softmax(dim=-1)
    return conv1x1((attention @ v).reshape(batch, channels, height, width), project_out)


def transformer_block(x: Tensor, block: TransformerBlock) -> Tensor:
    attention, ffn = block.attention, block.feed_forward
    qkv = conv1x1(layer_norm(x, block.norm1), attention.qkv.flatten(0, 1))
    qkv = depthwise(qkv, attention.qkv_depthwise.flatten(0, 1))
    x = x + attend(*qkv.chunk(3, dim=1), attention.temperature, attention.project_out)
    hidden = conv1x1(layer_norm(x, block.norm2), ffn.project_in.flatten(0, 1))
    a, b = depthwise(hidden, ffn.depthwise.flatten(0, 1)).chunk(2, dim=1)
    return x + conv1x1(F.gelu(a) * b, ffn.project_out)


def with_prompt(x: Tensor, prompt: Tensor | None, to_channels: nn.Linear | None) -> Tensor:
    """[features, prompt] for every pixel."""
    if to_channels is None or prompt is None:
        return x
    spread = to_channels(prompt)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, spread], dim=1)


def squared_variation(load: Tensor, unbiased: bool) -> Tensor:
    return load.var(unbiased=unbiased) / (load.mean() ** 2 + 1e-10)


def experts_of_pixels(x: Tensor, gates: Tensor, bank: nn.Module, in_log_space: bool) -> Tensor:
    """Each expert on the pixels whose gate (P, N) is positive."""
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    out = torch.zeros_like(rows)
    for n in range(gates.shape[1]):
        chosen = gates[:, n].nonzero().squeeze(1)
        hidden = F.gelu(F.linear(rows[chosen], bank.weight_in[n], bank.bias_in[n]))
        result = F.linear(hidden, bank.weight_out[n], bank.bias_out[n])
        result = result.exp() if in_log_space else result
        out = out.index_add(0, chosen, result * gates[chosen, n, None])
    if in_log_space:
        out = torch.where(out == 0, torch.full_like(out, 2.220446049250313e-16), out).log()
    return out.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def paper_pixel_experts(x: Tensor, prompt: Tensor | None, experts: nn.Module):
    both = with_prompt(x, prompt, experts.gate.to_channels)
    logits = both.permute(0, 2, 3, 1).flatten(0, 2) @ experts.gate.weight
    probability = logits.softmax(dim=-1)
    top, index = probability.topk(experts.top_k, dim=-1)
    gates = torch.zeros_like(probability).scatter(1, index, top)
    pixels = x.shape[2] * x.shape[3]
    balance = x.new_zeros(())
    for one, its_gates in zip(probability.split(pixels), gates.split(pixels), strict=True):
        balance = balance + squared_variation(one.sum(0), False)
        balance = balance + squared_variation((its_gates > 0).sum(0).float(), False)
    shares = (gates > 0).float().view(len(x), pixels, -1).mean(1)
    return x + experts_of_pixels(x, gates, experts.bank, False), balance / len(x), shares


def official_pixel_experts(x: Tensor, prompt: Tensor, experts: nn.Module, generator):
    both = with_prompt(x, prompt, experts.gate.to_channels)
    rows = both.permute(0, 2, 3, 1).flatten(0, 2)
    clean = rows @ experts.gate.weight
    noisy, top_k = clean, experts.top_k
    if experts.training:
        spread = F.softplus(rows @ experts.gate.noise) + 1e-2
        noisy = clean + official.draw_noise(clean, generator) * spread
    top, index = noisy.topk(min(top_k + 1, clean.shape[1]), dim=-1)
    softmax = top[:, :top_k].softmax(dim=-1)
    gates = torch.zeros_like(clean).scatter(1, index[:, :top_k], softmax)
    if experts.training and top_k < clean.shape[1]:
        normal = torch.distributions.Normal(x.new_zeros(1), x.new_ones(1))
        stays = normal.cdf((clean - top[:, top_k : top_k + 1]) / spread)
        enters = normal.cdf((clean - top[:, top_k - 1 : top_k]) / spread)
        load = torch.where(noisy > top[:, top_k : top_k + 1], stays, enters).sum(0)
    else:
        load = (gates > 0).sum(0).float()
    balance = squared_variation(gates.sum(0), True) + squared_variation(load, True)
    shares = (gates > 0).float().view(len(x), -1, clean.shape[1]).mean(1)
    if experts.bank is None:
        return x, balance, shares
    return x + experts_of_pixels(x, gates, experts.bank, True), balance, shares


def frequency_split(x: Tensor, split: FrequencySplit) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    norm = split.norm
    taps = conv1x1(F.adaptive_avg_pool2d(x, 1), split.predict)
    taps = F.batch_norm(
        taps, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias,
        training=norm.training and batch > 1,
    )  # fmt: skip
    kernel = taps.view(batch, 8, 1, 9, 1).softmax(dim=3)
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3)
    patches = patches.view(batch, 8, channels // 8, 9, height * width)
    low = (patches * kernel).sum(3).view(x.shape)
    return low, x - low


def paper_picture_experts(x: Tensor, mee: PictureExperts) -> Tensor:
    depth = depthwise(layer_norm(x, mee.norm), mee.depthwise)
    pooled = F.adaptive_avg_pool2d(depth, 1).flatten(1)
    top, index = F.linear(pooled, mee.gate, mee.gate_bias).softmax(dim=-1).topk(mee.top_k, dim=-1)
    lower = conv1x1(depth, mee.project)
    mixed = lower * depth + lower
    starts = [sum(mee.widths[:n]) for n in range(len(mee.widths) + 1)]
    outs = []
    for b in range(len(x)):
        out = x[b : b + 1]
        for gate, n in zip(top[b], index[b].tolist(), strict=True):
            rows = slice(starts[n], starts[n + 1])
            hidden = F.gelu(conv1x1(mixed[b : b + 1], mee.weight_in[rows], mee.bias_in[rows]))
            out = out + gate * conv1x1(hidden, mee.weight_out[:, rows], mee.bias_out[n])
        outs.append(out)
    return torch.cat(outs)


def official_picture_experts(x: Tensor, mee: official.RankExperts) -> Tensor:
    hidden = F.gelu(conv3x3(layer_norm(x, mee.norm), mee.conv_in, mee.conv_in_bias))
    a, k = conv1x1(hidden, mee.divide, mee.divide_bias).chunk(2, dim=1)
    a = F.gelu(depthwise(depthwise(a, mee.across, mee.across_bias), mee.along, mee.along_bias))
    small = k
    for _ in range(2):
        small = F.conv2d(small, mee.shrink, mee.shrink_bias, stride=4, groups=small.shape[1])
        small = F.gelu(small)
    small = depthwise(small, mee.smooth, mee.smooth_bias)
    small = conv1x1(small, mee.calibrate.weight, mee.calibrate.bias)
    k = k + F.interpolate(small, k.shape[2:], mode="bilinear")
    pooled = F.adaptive_avg_pool2d(a, 1).flatten(1)
    top, index = F.linear(pooled, mee.gate).softmax(dim=-1).topk(mee.top_k, dim=-1)
    gates = torch.zeros(len(x), len(mee.ranks)).scatter(1, index, top)
    out = a
    for n, rank in enumerate(mee.ranks):
        chosen = gates[:, n, None, None, None]
        if not mee.training and not bool((chosen > 0).any()):
            continue
        rows = slice(sum(mee.ranks[:n]), sum(mee.ranks[:n]) + rank)
        mixed = conv1x1(a, mee.from_x[rows], mee.from_x_bias[rows])
        mixed = mixed * conv1x1(k, mee.from_k[rows], mee.from_k_bias[rows])
        out = out + chosen * conv1x1(mixed, mee.back[:, rows], mee.back_bias[n])
    return conv1x1(out, mee.project.weight, mee.project.bias) + x


def frequency_experts(x: Tensor, level: nn.Module) -> Tensor:
    if isinstance(level, official.RankFrequencyExperts):
        low, high = frequency_split(x, level.split)
        high = official_picture_experts(high, level.high)
        low = official_picture_experts(low, level.low)
        return conv1x1(torch.cat([high, low], dim=1), level.merge.weight, level.merge.bias)
    assert isinstance(level, FrequencyExperts)
    if level.split is None:
        return paper_picture_experts(x, level.experts["all"])
    low, high = frequency_split(x, level.split)
    if len(level.experts):
        high = paper_picture_experts(high, level.experts["high"])
        low = paper_picture_experts(low, level.experts["low"])
    return conv1x1(torch.cat([high, low], dim=1), level.merge.weight)


def cross_attention(x: Tensor, y: Tensor, layer: official.CrossAttention) -> Tensor:
    q = depthwise(conv1x1(x, layer.q), layer.q_depthwise)
    kv = depthwise(conv1x1(y, layer.kv.flatten(0, 1)), layer.kv_depthwise.flatten(0, 1))
    k, v = kv.chunk(2, dim=1)
    return attend(q, k, v, layer.temperature, layer.project_out)


def frequency_mining(y: Tensor, image: Tensor, block: official.FrequencyMining) -> Tensor:
    height, width = y.shape[2:]
    x = conv3x3(F.interpolate(image, (height, width), mode="bilinear"), block.embed)
    rate = conv1x1(F.gelu(conv1x1(F.adaptive_avg_pool2d(x, 1), block.rate_in)), block.rate_out)
    rate = rate.sigmoid()
    spectrum = torch.fft.fft2(x, norm="forward").roll((height // 2, width // 2), (2, 3))
    mask = torch.zeros_like(x)
    for b in range(len(x)):
        h = int(height // 128 * rate[b, 0].item())
        w = int(width // 128 * rate[b, 1].item())
        top, left = height // 2, width // 2
        mask[b, :, top - h : top + h, left - w : left + w] = 1

    def back(part: Tensor) -> Tensor:
        part = part.roll((-(height // 2), -(width // 2)), (2, 3))
        return torch.fft.ifft2(part, norm="forward").abs()

    high, low = back(spectrum * (1 - mask)), back(spectrum * mask)
    high = cross_attention(high, y, block.attend_high)
    low = cross_attention(low, y, block.attend_low)
    m = block.modulate
    most_mean = torch.cat([high.amax(1, keepdim=True), high.mean(1, keepdim=True)], dim=1)
    per_pixel = F.conv2d(most_mean, m.spatial, padding=3).sigmoid()
    mean = conv1x1(F.relu(conv1x1(F.adaptive_avg_pool2d(low, 1), m.reduce)), m.expand)
    most = conv1x1(F.relu(conv1x1(F.adaptive_max_pool2d(low, 1), m.reduce)), m.expand)
    both = low * per_pixel + high * (mean + most).sigmoid()
    both = conv1x1(both, m.project.weight, m.project.bias)
    mined = cross_attention(y, both, block.attend_both)
    return mined * block.alpha[:, None, None] + y * block.beta[:, None, None]


def pixel_experts(x: Tensor, prompt: Tensor | None, experts: nn.Module | None, generator):
    if experts is None:
        return x, None, None
    if isinstance(experts, PromptConcat):
        return conv1x1(with_prompt(x, prompt, experts.to_channels), experts.weight), None, None
    if isinstance(experts, official.NoisyPixelExperts):
        return official_pixel_experts(x, prompt, experts, generator)
    return paper_pixel_experts(x, prompt, experts)


def task_prompt(image: Tensor, prompt: nn.Module) -> Tensor:
    q = prompt.mix(F.adaptive_avg_pool2d(prompt.reader(image), 1).flatten(1)).softmax(dim=-1)
    return F.gelu((q.unsqueeze(-1) * prompt.prompts).sum(1))


def forward(model: MEASNet, image: Tensor, generator=None) -> Restoration:
    """What `model(image)` computes; height and width are multiples of 8 and of the least size."""
    prompt = None if model.prompt is None else task_prompt(image, model.prompt)
    balances, routing, skips = [], {}, []
    x = conv3x3(image, model.patch_embed.weight)
    for level in (1, 2, 3):
        experts = getattr(model, f"experts{level}")
        x, balance, shares = pixel_experts(x, prompt, experts, generator)
        if balance is not None:
            balances.append(balance)
            routing[f"encoder{level}"] = shares.detach()
        for block in getattr(model, f"encoder{level}"):
            x = transformer_block(x, block)
        skips.append(x)
        x = F.pixel_unshuffle(conv3x3(x, getattr(model, f"down{level}").conv.weight), 2)
    for block in model.latent:
        x = transformer_block(x, block)
    if "latent" in model.extra:
        x = frequency_mining(x, image, model.extra["latent"])
    for level in (3, 2, 1):
        x = F.pixel_shuffle(conv3x3(x, getattr(model, f"up{level}").conv.weight), 2)
        x = torch.cat([x, skips[level - 1]], dim=1)
        if level > 1:
            x = conv1x1(x, getattr(model, f"reduce{level}").weight)
        if getattr(model, f"frequency{level}") is not None:
            x = frequency_experts(x, getattr(model, f"frequency{level}"))
        for block in getattr(model, f"decoder{level}"):
            x = transformer_block(x, block)
        if f"decoder{level}" in model.extra:
            x = frequency_mining(x, image, model.extra[f"decoder{level}"])
    for block in model.refinement:
        x = transformer_block(x, block)
    total = image.new_zeros(())
    if balances:
        total = torch.stack(balances).sum()
        if model.config.variant == "paper":
            total = total / len(balances)
    return Restoration(conv3x3(x, model.output.weight) + image, total, routing, torch.zeros(()))
