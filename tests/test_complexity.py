"""Counts against a count by hand."""

from pathlib import Path

import pytest
import torch

from measnet import complexity
from measnet import config as configs
from measnet.complexity import count
from measnet.config import replace_dotted
from measnet.network import MEASNet

TINY = configs.tiny()


def test_parameters_and_multiply_adds_by_hand() -> None:
    """The backbone of one size, written out from the description of its parts."""
    config = replace_dotted(TINY, dict.fromkeys(("tspg", "mese", "fd", "mee"), False))
    counted = count(MEASNet(config), 64, 64)
    width, expansion = config.dim, config.ffn_expansion

    def block(channels: int, heads: int, pixels: int) -> tuple[float, float]:
        hidden = int(channels * expansion)
        padded = hidden + -hidden % 16  # what is computed; the parameters are not padded
        parameters = 4 * channels + heads  # two norms, temperature
        parameters += 3 * channels * (channels + 9) + channels * channels
        parameters += 2 * hidden * (channels + 9) + hidden * channels
        operations = 2 * 2 * channels * pixels  # norms
        operations += 3 * channels * (channels + 9) * pixels  # q, k, v
        operations += channels * channels / heads * pixels  # q kᵀ
        operations += channels * channels / heads * channels  # output convolution times attention
        operations += channels * channels * pixels  # v
        operations += padded * (2 * (channels + 9) + channels) * pixels
        return parameters, operations

    sizes = [64 * 64 // 4**level for level in range(4)]
    blocks = [(width * 2**n, config.heads[n], sizes[n]) for n in range(4)]  # encoder, latent
    blocks += [blocks[2], blocks[1], *2 * [(width * 2, config.heads[0], sizes[0])]]
    counts = [block(*one) for one in blocks]
    parameters = sum(p for p, _ in counts)
    operations = sum(o for _, o in counts)
    dense = [(3, width, sizes[0]), (2 * width, 3, sizes[0])]  # 3×3: in, out, pixels
    dense += [(width * 2**n, width * 2**n // 2, sizes[n]) for n in range(3)]  # down
    dense += [(width * 2**n, width * 2**n * 2, sizes[n]) for n in (3, 2, 1)]  # up
    parameters += sum(9 * i * o for i, o, _ in dense)
    operations += sum(9 * i * o * pixels for i, o, pixels in dense)
    for n in (1, 2):  # merging at levels 2 and 3
        parameters += 2 * (width * 2**n) ** 2
        operations += 2 * (width * 2**n) ** 2 * sizes[n]
    assert counted.total_parameters == parameters
    assert counted.total_multiply_adds == pytest.approx(operations, rel=1e-6)
    assert sum(counted.operators.values()) == pytest.approx(counted.total_multiply_adds)


def test_only_chosen_experts_are_counted() -> None:
    def experts1(**changes: object) -> float:
        config = replace_dotted(TINY, {"expert_path": "sorted", **changes})
        return count(MEASNet(config), 64, 64).multiply_adds["experts1"]

    hidden, pixels, width = int(16 * 2.66), 64 * 64, 16
    one_expert = 2 * width * hidden * pixels
    assert experts1(pixel_top_k=3) - experts1(pixel_top_k=2) == one_expert
    gate = width * pixels + width + 0  # one more column of logits, and of the prompt's half
    assert experts1(pixel_experts=5) - experts1() == pytest.approx(gate, abs=width)


def test_presets_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart.png"
    assert complexity.main(["tiny", "--chart", str(chart)]) == 0
    out = capsys.readouterr().out
    assert "refinement" in out and "PromptIR" in out and "total" in out
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert complexity.main(["large"]) == 2
    assert "unknown preset large" in capsys.readouterr().err
    assert complexity.main(["--memory", "much"]) == 2
    assert "24GiB" in capsys.readouterr().err


def test_a_count_repeats_whatever_the_weights_choose() -> None:
    """The experts of a picture differ in width; the widest are counted."""
    counts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        model = MEASNet(TINY)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        counts.add(count(model, 64, 64).total_multiply_adds)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(counts) == 1


def test_the_official_network_is_the_programs_less_what_has_no_effect() -> None:
    with torch.device("meta"):
        ours = sum(p.numel() for p in MEASNet(configs.official()).parameters())
    assert ours + complexity.DEAD_OFFICIAL_PARAMETERS == 31_680_752
