"""What libraries choose: options of the choice, measures, recording and replacing it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from measnet import routing
from measnet.config import ModelConfig, RoutingConfig, from_dict, official, tiny, to_dict
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.selection import Selector, fade_noise, squared_variation
from measnet.step_statistics import commit_statistics
from measnet.tiling import restore

LIBRARIES = ["encoder1", "encoder2", "encoder3"]
BANDS = [f"decoder{level}.{band}" for level in (3, 2, 1) for band in ("high", "low")]


def small(**options: object) -> MEASNet:
    """A tiny network with these options of the routing."""
    torch.manual_seed(0)
    data = to_dict(tiny())
    data["routing"] = {**data["routing"], **options}
    return MEASNet(from_dict(ModelConfig, data))


def small_official() -> MEASNet:
    torch.manual_seed(0)
    data = {**to_dict(tiny()), "variant": "official"}
    return MEASNet(from_dict(ModelConfig, data))


def selector(experts: int = 4, top_k: int = 2, *, over_batch: bool = False, **options: object):  # type: ignore[no-untyped-def]
    return Selector(experts, top_k, RoutingConfig(**options), over_batch=over_batch)  # type: ignore[arg-type]


# --- Options ---


def test_the_default_is_the_papers_choice() -> None:
    logits = torch.randn(3, 5, 5, 4)
    choice = selector()(logits)
    expected = torch.softmax(logits, -1).topk(2, -1)
    assert torch.equal(choice.gate, expected.values)
    assert torch.equal(choice.chosen, expected.indices)
    assert selector().plain
    assert not list(selector().buffers())  # so weights of earlier versions can be loaded


def test_renormalised_gates_add_up_to_one() -> None:
    choice = selector(renormalise=True)(torch.randn(3, 7, 4))
    torch.testing.assert_close(choice.gate.sum(-1), torch.ones(3, 7))


def test_a_low_temperature_sharpens_the_gates() -> None:
    logits = torch.randn(20, 4)
    sharp, flat = selector(temperature=0.1)(logits), selector(temperature=10.0)(logits)
    assert (sharp.gate[:, 0] > flat.gate[:, 0]).all()
    assert torch.equal(sharp.chosen, flat.chosen)


def test_the_temperature_of_the_prompts_sharpens_their_weights() -> None:
    read = torch.randn(2, 32)
    sharp, flat = small(prompt_temperature=0.1), small()
    assert sharp.prompt is not None and flat.prompt is not None
    assert (
        sharp.prompt.weights(read).max(1).values > flat.prompt.weights(read).max(1).values
    ).all()


def test_noise_changes_the_choice_in_training_until_it_has_faded() -> None:
    own, logits = selector(noise=3.0, noise_until=0.5), torch.randn(50, 4)
    quiet = torch.softmax(logits, -1).topk(2, -1).indices
    draw = torch.Generator().manual_seed(1)
    assert not torch.equal(own(logits, draw).chosen, quiet)
    repeated = (own(logits, torch.Generator().manual_seed(5)).chosen for _ in range(2))
    assert torch.equal(*repeated)
    own.eval()
    assert torch.equal(own(logits).chosen, quiet)
    own.train()
    fade_noise(own, 0.25)
    assert own.noise_left == 0.5
    fade_noise(own, 0.5)
    assert torch.equal(own(logits).chosen, quiet)


def test_the_bias_corrects_the_choice_but_not_the_gates() -> None:
    own = selector(bias_rate=0.5)
    logits = torch.randn(8, 100, 4) + torch.tensor([3.0, 1.5, 0.0, -1.5])
    before = share_of_choices(own, logits)
    for _ in range(20):
        choice = own(logits)
        counts = share_of_choices(own, logits) * 100
        own.balance(choice.probability.sum(1), counts, 100)
        commit_statistics(own)
    assert abs(own.bias.mean()) < 1e-6
    after = share_of_choices(own, logits)
    assert squared_variation(after.mean(0)) < 0.3 * squared_variation(before.mean(0))
    choice = own(logits)
    expected = torch.softmax(logits, -1).gather(-1, choice.chosen)
    assert torch.equal(choice.gate, expected)


def share_of_choices(own: Selector, logits: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(own(logits).chosen, own.experts).sum(-2).float().mean(1)


def test_balance_within_pictures_forbids_what_balance_over_the_batch_allows() -> None:
    """Two pictures that use different experts: each is unbalanced, the batch is not."""
    probability = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]) * 10
    counts = torch.tensor([[10.0, 10, 0, 0], [0, 0, 10, 10]])
    assert selector().balance(probability, counts, 10) == 2.0
    own = selector(over_batch=True)
    assert own.balance(probability, counts, 10) == 0.0
    one = own.balance(probability[:1], counts[:1], 10)
    assert one == 2.0  # nothing of other micro-batches is known before the first commit
    commit_statistics(own)
    assert own.balance(probability[:1], counts[:1], 10) < 0.3


def test_the_gradient_of_the_global_balance_is_that_of_the_load_seen() -> None:
    own = selector(over_batch=True)
    own.load.copy_(torch.tensor([[0.7, 0.1, 0.1, 0.1], [1.0, 1.0, 0.0, 0.0]]))
    probability = torch.full((2, 4), 2.5, requires_grad=True)
    own.balance(probability, torch.full((2, 4), 5.0), 10).backward()
    assert probability.grad is not None
    assert (probability.grad[:, 0] > 0).all()  # the gradient lowers what is used too much
    load = torch.tensor([0.7, 0.1, 0.1, 0.1], requires_grad=True)
    squared_variation(load).backward()
    assert load.grad is not None
    torch.testing.assert_close(probability.grad[0] * 20, load.grad)


def test_statistics_of_two_ranks_are_those_of_one() -> None:
    logits = torch.randn(4, 30, 4)
    whole, first, second = (selector(over_batch=True, bias_rate=0.1) for _ in range(3))

    def forward(own: Selector, part: torch.Tensor) -> None:
        choice = own(part)
        own.balance(choice.probability.sum(1), share_of_choices(own, part) * 30, 30)

    forward(whole, logits)
    forward(first, logits[:2])
    forward(second, logits[2:])
    total = first.moments + second.moments
    commit_statistics(whole)
    for rank in (first, second):
        commit_statistics(rank, lambda flat: flat.copy_(total.flatten()))
        assert torch.equal(rank.bias, whole.bias)
        torch.testing.assert_close(rank.load, whole.load)
    assert whole.load[0].sum() == pytest.approx(1) and whole.load[1].sum() == pytest.approx(2)


def test_a_pass_that_is_not_finite_leaves_bias_and_load() -> None:
    own = selector(over_batch=True, bias_rate=0.1)
    own.balance(torch.full((1, 4), math.nan), torch.ones(1, 4), 1)
    commit_statistics(own)
    assert not own.bias.any() and not own.load.any()


@pytest.mark.parametrize(
    "options",
    [
        {"level_weights": [0.0, 5.0, 0.0]},
        {"balance_over": "batch"},
        {"picture_weight": 1.0},
        {"z_loss": 1e-3},
        {"bias_rate": 1e-3, "noise": 0.1, "renormalise": True, "temperature": 2.0},
    ],
)
def test_a_network_trains_with_each_option(options: dict[str, object]) -> None:
    model, image = small(**options), torch.rand(2, 3, 32, 32)
    plain = small()
    losses = restoration_loss(model(image), torch.rand(2, 3, 32, 32), 1.0)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    restoration_loss(plain(image), torch.rand(2, 3, 32, 32), 1.0).total.backward()
    gates = [n for n, _ in model.named_parameters() if n.endswith(("gate.weight", ".gate"))]
    own, other = dict(model.named_parameters()), dict(plain.named_parameters())
    assert any(not torch.allclose(own[name].grad, other[name].grad) for name in gates)  # type: ignore[arg-type]
    commit_statistics(model)


def test_the_z_loss_is_in_the_total() -> None:
    image, clean = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    restoration = small(z_loss=0.1)(image)
    losses = restoration_loss(restoration, clean, 0.0)
    assert restoration.z_loss > 0
    torch.testing.assert_close(losses.total, losses.l1 + restoration.z_loss)
    assert small()(image).z_loss == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "model.routing.temperature"),
        ({"noise": -1.0}, "model.routing.noise"),
        ({"level_weights": [1.0, -1.0, 1.0]}, "model.routing.level_weights"),
        ({"level_weights": [1.0]}, "model.routing.level_weights|routing.level_weights"),
        ({"balance_over": "epoch"}, "balance_over"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        from_dict(ModelConfig, {"routing": options}, "model")


def test_the_official_variant_refuses_the_options() -> None:
    with pytest.raises(ValueError, match=r"model\.routing"):
        from_dict(ModelConfig, {**to_dict(official()), "routing": {"z_loss": 1.0}})


# --- Measures ---


def test_measures_of_known_shares() -> None:
    found = routing.measures(
        {
            "denoise": {"one": [1.0, 1.0, 0.0, 0.0], "two": [1.0, 1.0, 0.0, 0.0]},
            "derain": {"one": [1.0, 1.0, 0.0, 0.0], "two": [0.0, 0.0, 1.0, 1.0]},
        }
    )
    assert found["one"].effective_experts == pytest.approx(2)
    assert found["one"].mutual_information == 0
    assert found["one"].similarity == {"denoise/derain": 0.0}
    assert found["two"].effective_experts == pytest.approx(4)
    assert found["two"].mutual_information == pytest.approx(math.log(2))
    assert found["two"].similarity["denoise/derain"] == pytest.approx(1)
    assert found["two"].shares == [0.25] * 4


def test_similarity_is_scipys_jensen_shannon_distance() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    first, second = torch.rand(2, 6).double().softmax(1).numpy()
    expected = distance.jensenshannon(first, second, base=2)
    assert routing.jensen_shannon(first, second) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("effective", "experts", "top_k", "collapsed"),
    [(2.0, 6, 2, True), (2.19, 6, 2, True), (2.21, 6, 2, False), (2.0, 2, 2, False)],
)
def test_collapse(effective: float, experts: int, top_k: int, collapsed: bool) -> None:
    assert routing.has_collapsed(effective, experts=experts, top_k=top_k) is collapsed


# --- Recording and replacing ---


@pytest.mark.parametrize("make", [small, small_official])
def test_recorded_choices_are_those_of_the_output(make) -> None:  # type: ignore[no-untyped-def]
    model, image = make().eval(), torch.rand(2, 3, 64, 72)
    with torch.no_grad(), routing.record(model) as choices:
        out = model(image)
    assert list(choices) == list(out.routing) == [*LIBRARIES, *BANDS]
    assert choices["encoder2"].chosen.shape == (2, 32, 36, model.config.pixel_top_k)
    assert choices["decoder1.low"].gate.shape == (2, model.config.image_top_k)
    for name, choice in choices.items():
        flat = choice.chosen.flatten(1, -2) if name in LIBRARIES else choice.chosen[:, None]
        experts = choice.probability.shape[-1]
        shares = nn.functional.one_hot(flat, experts).sum(2).float().mean(1)
        torch.testing.assert_close(shares, out.routing[name])
    with torch.no_grad():
        torch.testing.assert_close(model(image).image, out.image)


@pytest.mark.parametrize("make", [small, small_official])
def test_a_replaced_choice_changes_only_its_library_and_is_undone(make) -> None:  # type: ignore[no-untyped-def]
    model, image = make().eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        learned = model(image)
        with routing.intercepting(model, {"encoder1": routing.single(3)}):
            replaced = model(image)
        again = model(image)
    assert not torch.equal(replaced.image, learned.image)
    assert torch.equal(again.image, learned.image)


def test_an_unknown_library_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="encoder1"), routing.intercepting(small(), {"x": print}):  # type: ignore[dict-item]
        pass


def test_replacements() -> None:
    choice = selector()(torch.randn(2, 6, 6, 4))
    same = routing.fixed(torch.tensor([0.1, 0.5, 0.0, 0.2]), 2)(choice)
    assert same.chosen.unique(dim=0).flatten().unique().tolist() == [1, 3]
    torch.testing.assert_close(same.gate[0, 0, 0], torch.tensor([0.5, 0.2]) * 0.8 / 0.7)
    assert (same.chosen == same.chosen[0, 0, 0]).all()
    drawn = routing.at_random(0)(choice)
    assert torch.equal(drawn.gate, choice.gate) and not torch.equal(drawn.chosen, choice.chosen)
    assert (drawn.chosen[..., 0] != drawn.chosen[..., 1]).all()
    assert torch.equal(routing.at_random(0)(choice).chosen, drawn.chosen)
    alone = routing.single(2)(choice)
    assert (alone.chosen[..., 0] == 2).all() and (alone.gate[..., 1] == 0).all()
    torch.testing.assert_close(alone.gate.sum(-1), choice.gate.sum(-1))


def test_the_margin_is_the_distance_to_the_next_expert() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    torch.testing.assert_close(routing.margin(selector()(logits)), torch.tensor([0.15]))
    assert routing.margin(selector(2, 2)(torch.randn(5, 2))).tolist() == [1.0] * 5


def test_mean_gates_are_means_over_pixels() -> None:
    model, image = small().eval(), torch.rand(1, 3, 48, 32)
    with torch.no_grad():
        with routing.mean_gates(model) as means:
            model(image[..., :16, :])
            model(image[..., 16:, :])
        with routing.record(model) as choices:
            model(image[..., :16, :])
            first = choices["encoder1"]
            model(image[..., 16:, :])
            second = choices["encoder1"]
    gates = torch.cat([first.gate.flatten(0, 2), second.gate.flatten(0, 2)]).double()
    chosen = torch.cat([first.chosen.flatten(0, 2), second.chosen.flatten(0, 2)])
    expected = torch.zeros(len(gates), 4, dtype=torch.float64).scatter(1, chosen, gates).mean(0)
    torch.testing.assert_close(means.gates("encoder1"), expected)
    both = torch.cat([routing.margin(first).flatten(), routing.margin(second).flatten()])
    assert means.margin("encoder1") == pytest.approx(both.mean().item(), rel=1e-5)


def test_drift_is_the_distance_of_the_shares_of_each_task() -> None:
    before = {"derain": {"encoder1": [2.0, 0.0], "encoder2": [1.0, 1.0]}, "dehaze": {}}
    now = {
        "derain": {"encoder1": [0.0, 2.0], "encoder2": [1.0, 1.0]},
        "deblur": {"encoder1": [1.0, 1.0]},
    }
    assert routing.drift(before, now) == pytest.approx({"encoder1": 1.0, "encoder2": 0.0})
    assert routing.drift({}, now) == {}
    half = {"derain": {"encoder1": [1.0, 1.0]}}
    expected = routing.jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    assert routing.drift(before, half) == pytest.approx({"encoder1": expected})


@pytest.mark.parametrize("tile", [None, 64])
def test_maps_of_a_picture_in_exact_tiles_are_those_of_the_whole(tile: int | None) -> None:
    model = MEASNet(tiny()).eval()
    image = torch.rand(3, 131, 150)
    with torch.no_grad(), routing.record(model) as choices:
        model(image[None])
    with routing.record_maps(model, 131, 150) as maps:
        restore(model, image, tile=tile)
    assert list(maps) == ["encoder1", "encoder2", "encoder3"]
    for level, (name, map_hw) in enumerate(maps.items()):
        height, width = -(-131 // 2**level), -(-150 // 2**level)
        expected = choices[name].chosen[0, :height, :width, 0]
        assert map_hw.dtype == torch.uint8 and map_hw.shape == (height, width)
        assert (map_hw == expected).float().mean() > 0.999  # equal gates are decided by rounding


def test_tiles_are_joined_row_by_row_without_those_of_a_failed_try() -> None:
    whole = torch.arange(7 * 9).view(7, 9)
    tiles = [
        whole[top : top + 4, left : left + 4] for top in range(0, 7, 4) for left in range(0, 9, 4)
    ]
    failed = [torch.full((6, 6), -1), torch.full((6, 3), -1)]
    assert torch.equal(routing.join_tiles([*failed, *tiles], 7, 9), whole)
    assert torch.equal(routing.join_tiles([whole], 7, 9), whole)
