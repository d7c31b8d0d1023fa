"""The whole network: Eq. 1, 11, 12, the backbone's blocks, sizes, batches, precision, files."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bench import plain
from measnet import config as configs
from measnet.config import ModelConfig, replace_dotted
from measnet.frequency import KernelNorm
from measnet.losses import frequency_loss, restoration_loss
from measnet.network import MEASNet, Restoration
from measnet.prompts import TaskPrompt
from measnet.step_statistics import commit_statistics
from measnet.transformer import Downsample, Merge, TransformerBlock, Upsample

TINY = configs.tiny()
OFFICIAL = replace_dotted(TINY, {"variant": "official"})
VARIANTS = [TINY, OFFICIAL]


def network(config: ModelConfig, seed: int = 0) -> MEASNet:
    torch.manual_seed(seed)
    model = MEASNet(config)
    for block in model.extra.values():
        nn.init.normal_(block.alpha)  # they begin as the identity, which would hide them
    return model


# --- Parts ---


def test_equation_1() -> None:
    prompt, image = TaskPrompt(5, 7), torch.rand(2, 3, 20, 31)
    for b in range(2):
        features = prompt.reader(image[b : b + 1])[0]  # two strides of 3: 20 x 31 -> 2 x 3
        assert features.shape == (32, 2, 3)
        pooled = torch.stack([channel.sum() / 6 for channel in features])
        logits = prompt.mix.weight @ pooled + prompt.mix.bias
        q = logits.exp() / logits.exp().sum()
        mixed = sum(q[t] * prompt.prompts[t] for t in range(5))
        expected = 0.5 * mixed * (1 + torch.erf(mixed / math.sqrt(2)))
        torch.testing.assert_close(prompt(image)[b], expected)


def test_the_prompt_says_the_least_size() -> None:
    prompt = TaskPrompt(5, 7)
    assert prompt(torch.rand(1, 3, 9, 9)).shape == (1, 7)
    with pytest.raises(ValueError, match=r"8x20.*at least 9"):
        prompt(torch.rand(1, 3, 8, 20))


def test_equations_11_and_12() -> None:
    image, clean = torch.rand(2, 3, 4, 5, requires_grad=True), torch.rand(2, 3, 4, 5)
    balance = torch.tensor(2.0, requires_grad=True)
    losses = restoration_loss(Restoration(image, balance, {}, torch.tensor(0.0)), clean, 1e-4)
    l1 = sum(abs(a - b) for a, b in zip(image.flatten(), clean.flatten(), strict=True)) / 120
    torch.testing.assert_close(losses.l1, l1)
    torch.testing.assert_close(losses.total, l1 + 1e-4 * 2)
    losses.total.backward()
    torch.testing.assert_close(balance.grad, torch.tensor(1e-4))


@pytest.mark.parametrize(("channels", "heads"), [(16, 1), (24, 4)])
def test_transformer_block(channels: int, heads: int) -> None:
    block = TransformerBlock(channels, heads, 2.66)
    nn.init.uniform_(block.attention.temperature, 0.5, 2)
    x = torch.randn(2, 5, 6, channels, requires_grad=True)
    results = []
    for compute in (block, lambda x: plain.transformer_block(x.permute(0, 3, 1, 2), block)):
        out = compute(x)
        out = out if len(results) == 0 else out.permute(0, 2, 3, 1)
        inputs = [x, *block.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_down_and_up_sampling() -> None:
    x = torch.randn(2, 4, 6, 8)
    x_bchw = x.permute(0, 3, 1, 2)
    down, up = Downsample(8), Upsample(8)
    expected = F.pixel_unshuffle(F.conv2d(x_bchw, down.conv.weight, padding=1), 2)
    torch.testing.assert_close(down(x).permute(0, 3, 1, 2), expected)
    expected = F.pixel_shuffle(F.conv2d(x_bchw, up.conv.weight, padding=1), 2)
    torch.testing.assert_close(up(x).permute(0, 3, 1, 2), expected)


def test_merge_is_a_convolution_of_the_concatenation() -> None:
    merge, a, b = Merge(4, 6, bias=True), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    expected = F.linear(torch.cat([a, b], dim=-1), merge.weight, merge.bias)
    torch.testing.assert_close(merge(a, b), expected)


# --- The whole against the plain reading ---


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.variant)
@pytest.mark.parametrize("path", ["dense", "sorted"])
def test_equals_the_plain_reading(config: ModelConfig, path: str) -> None:
    model = network(replace_dotted(config, {"expert_path": path}))
    image, clean = torch.rand(2, 3, 64, 72), torch.rand(2, 3, 64, 72)
    results = []
    for compute in (model, lambda *a, **k: plain.forward(model, *a, **k)):
        for norm in (m for m in model.modules() if isinstance(m, KernelNorm)):
            norm.running_mean.zero_()
        model.zero_grad()
        restoration = compute(image, generator=torch.Generator().manual_seed(5))
        losses = restoration_loss(restoration, clean, 0.1)
        losses.total.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((restoration, grads))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours.image, theirs.image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.balance_loss, theirs.balance_loss, rtol=1e-4, atol=1e-5)
    for name, shares in theirs.routing.items():
        torch.testing.assert_close(ours.routing[name], shares)
    for name, gradient in their_grads.items():
        error = (our_grads[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-6)
        assert error < 1e-3, name


# --- Any batch, any size ---


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.variant)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 13, 70), (3, 33, 9), (2, 64, 64)])
def test_any_batch_and_size_trains(config: ModelConfig, size: tuple[int, int, int]) -> None:
    batch, height, width = size
    model, image = network(config), torch.rand(batch, 3, height, width)
    restoration = model(image)
    assert restoration.image.shape == image.shape
    assert restoration.balance_loss.shape == () and restoration.balance_loss.dtype == torch.float32
    restoration_loss(restoration, image * 0.5, 1e-4).total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for name, shares in restoration.routing.items():
        top_k = config.pixel_top_k if name.startswith("encoder") else config.image_top_k
        assert shares.shape[0] == batch and not shares.requires_grad
        torch.testing.assert_close(shares.sum(1), torch.full((batch,), float(top_k)))


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.variant)
def test_a_picture_does_not_depend_on_its_batch_mates(config: ModelConfig) -> None:
    model, batch = network(config).eval(), torch.rand(4, 3, 40, 50)
    batch *= torch.tensor([1, 0.1, 0.5, 0.01]).view(4, 1, 1, 1)
    for name, parameter in model.named_parameters():
        if name.startswith("frequency") and name.endswith(".gate"):
            parameter.data *= 50  # so that the pictures choose differently
    with torch.no_grad():
        together = model(batch)
        for i, picture in enumerate(batch):
            alone = model(picture[None])
            torch.testing.assert_close(together.image[i], alone.image[0], rtol=1e-5, atol=1e-5)
            for name, shares in alone.routing.items():
                torch.testing.assert_close(together.routing[name][i], shares[0])
    chosen = [r for n, r in together.routing.items() if n.startswith("decoder")]
    # That pictures of the variant official choose differently is seen in its reference outputs.
    assert config is OFFICIAL or any((r != r[0]).any() for r in chosen), (
        "all pictures chose alike: the test shows nothing"
    )


def test_padding_repeats_the_border() -> None:
    model, image = network(TINY).eval(), torch.rand(1, 3, 37, 41)
    with torch.no_grad():
        padded = F.pad(image, (0, 7, 0, 3), mode="replicate")
        torch.testing.assert_close(model(image).image, model(padded).image[..., :37, :41])


# --- Training as engines do it ---


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.variant)
def test_activation_checkpointing_changes_nothing(config: ModelConfig) -> None:
    image = torch.rand(2, 3, 64, 64)
    results = []
    for checkpointing in (False, True):
        model = network(config)
        model.activation_checkpointing = checkpointing
        restoration = model(image, generator=torch.Generator().manual_seed(1))
        restoration_loss(restoration, image, 1e-3).total.backward()
        statistics = [b for n, b in model.named_buffers() if "running" in n]
        results.append([p.grad for p in model.parameters() if p.requires_grad] + statistics)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.variant)
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_half_precision_trains(config: ModelConfig, how: str) -> None:
    model = network(config)
    reference, image = copy.deepcopy(model), torch.rand(4, 3, 64, 64)
    generator = torch.Generator()
    exact = reference(image, generator=generator.manual_seed(2))
    if how == "cast":
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        half = model(image, generator=generator.manual_seed(2))
    assert half.balance_loss.dtype == torch.float32
    restoration_loss(half, image * 0.5, 1e-3).total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    # Where two experts are chosen with nearly the same weight, rounding may choose the other one.
    flipped_b = torch.stack(
        [
            (half.routing[block] != chosen_bn).any(1)
            for block, chosen_bn in exact.routing.items()
            if "." in block
        ]
    ).any(0)
    assert not flipped_b.all()
    change = (exact.image - image).abs().mean()  # what the network does to the picture
    assert (half.image.float() - exact.image)[~flipped_b].abs().mean() < 0.1 * change
    torch.testing.assert_close(half.balance_loss, exact.balance_loss, rtol=0.1, atol=0.02)


def test_statistics_wait_for_the_commit() -> None:
    model, image = network(TINY), torch.rand(2, 3, 24, 24)
    at_once = copy.deepcopy(model)
    model.defer_statistics = True
    before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    model(image), at_once(image)
    assert before and all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in before.items())
    commit_statistics(model)
    for (name, ours), theirs in zip(model.named_buffers(), at_once.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_parameters_suit_a_sharding_engine() -> None:
    for config in VARIANTS:
        for name, parameter in network(config).named_parameters():
            assert parameter.ndim > 0 and parameter.is_contiguous(), name


# --- Ablation (Table VI) ---


def test_the_rows_of_table_6() -> None:
    sizes = {}
    for name, preset in configs.ABLATION.items():
        model = network(replace_dotted(preset(), {"dim": 8, "num_blocks": [1, 1, 1, 1]}))
        restoration = model(torch.rand(1, 3, 16, 16))
        restoration_loss(restoration, torch.rand(1, 3, 16, 16), 1e-4).total.backward()
        assert all(p.grad is not None for p in model.parameters()), name
        assert (restoration.balance_loss > 0) == preset().mese
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert len(sizes) == len(set(sizes.values())) == 6
    assert min(sizes, key=sizes.__getitem__) == "baseline"
    assert max(sizes, key=sizes.__getitem__) == "full"


def test_an_ablation_has_only_what_it_names() -> None:
    def parts(**switches: bool) -> set[str]:
        names = (n for n, _ in network(replace_dotted(TINY, switches)).named_parameters())
        found = {n.split(".")[0] for n in names}
        return {n for n in found if n.startswith(("prompt", "experts", "frequency"))}

    off = dict.fromkeys(("tspg", "mese", "fd", "mee"), False)
    pixels = {"experts1", "experts2", "experts3"}
    decoder = {"frequency1", "frequency2", "frequency3"}
    assert parts(**off) == set()
    assert parts(**off | {"tspg": True}) == {"prompt"} | pixels
    assert parts(**off | {"mese": True}) == pixels
    assert parts(**off | {"fd": True}) == decoder
    assert parts() == {"prompt"} | pixels | decoder


@pytest.mark.parametrize("switches", [{"mese": False}, {"tspg": False, "fd": False}])
def test_ablations_equal_the_plain_reading(switches: dict[str, bool]) -> None:
    model, image = network(replace_dotted(TINY, switches)).eval(), torch.rand(2, 3, 24, 32)
    with torch.no_grad():
        expected = plain.forward(model, image).image
        torch.testing.assert_close(model(image).image, expected, rtol=1e-4, atol=1e-5)


# --- Files ---


def test_a_file_gives_the_same_network(tmp_path: Path) -> None:
    for config in VARIANTS:
        model, image = network(config), torch.rand(1, 3, 20, 20)
        model(image)  # moves the running statistics, which belong to the file
        model.save_pretrained(tmp_path / "model.safetensors")
        loaded = MEASNet.from_pretrained(tmp_path / "model.safetensors")
        assert loaded.config == config and not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(image).image, model.eval()(image).image)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    network(TINY).save_pretrained(good)
    bad.write_bytes(good.read_bytes()[:5000])
    with pytest.raises(ValueError, match="complete safetensors"):
        MEASNet.from_pretrained(bad)
    save_file({"weight": torch.zeros(3)}, bad)
    with pytest.raises(ValueError, match=r"measnet\.official\.weights\.load"):
        MEASNet.from_pretrained(bad)
    from safetensors import safe_open

    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
    state: dict[str, Tensor] = load_file(good)
    del state["output.weight"]
    save_file(state, bad, metadata)
    with pytest.raises(ValueError, match=r"output\.weight"):
        MEASNet.from_pretrained(bad)
    with pytest.raises(FileNotFoundError):
        MEASNet.from_pretrained(tmp_path / "nothing.safetensors")


def test_the_frequency_loss_is_the_l1_distance_of_the_spectra() -> None:
    image, target = torch.rand(2, 3, 12, 9), torch.rand(2, 3, 12, 9)
    theirs, ours = np.fft.fft2(target.numpy()), np.fft.fft2(image.numpy())
    half = (ours - theirs)[..., : 9 // 2 + 1]  # the other half are its complex conjugates
    expected = (np.abs(half.real) + np.abs(half.imag)).mean() / 2
    assert frequency_loss(image, target).item() == pytest.approx(expected, rel=1e-5)


def test_the_frequency_weight_adds_to_the_total_alone() -> None:
    model, clean = network(TINY), torch.rand(1, 3, 16, 16)
    output = model(torch.rand(1, 3, 16, 16))
    without, with_it = (restoration_loss(output, clean, 1e-4, weight) for weight in (0, 0.1))
    added = 0.1 * frequency_loss(output.image, clean)
    assert with_it.total.item() == pytest.approx((without.total + added).item(), rel=1e-6)
    assert with_it.l1 == without.l1
    with_it.total.backward()
