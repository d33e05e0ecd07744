"""Routers as networks: equal in every form they are kept in, and refused when damaged."""

from __future__ import annotations

import pytest
import torch

from multicolm.errors import ArtefactError
from multicolm.learning.networks import (
    build,
    fold,
    from_tensors,
    joined,
    router_scores,
    shape_of,
    standardisation,
)

KINDS = ("linear", "mlp", "residual")


def features(n: int = 200, width: int = 12) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    raw = torch.randn(n, width, generator=g) * torch.logspace(-3, 3, width) + 5
    raw[:, 4] = 2.0  # never changes
    return raw


def trained(kind, seed: int = 0, n_outputs: int = 3) -> torch.nn.Sequential:
    """As after training: the last layer is no longer zero."""
    network = build(
        kind, 12, n_outputs, width=16, dropout=0.5, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        g = torch.Generator().manual_seed(9)
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, generator=g) * 0.3
    return network.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_network_gives_every_model_the_same_chance(kind) -> None:
    network = build(kind, 12, 3, width=16, generator=torch.Generator().manual_seed(0)).eval()
    pi = router_scores(network, features()).softmax(-1)
    assert torch.equal(pi, torch.full_like(pi, 0.25))


@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_equal_seeds_give_equal_networks(kind) -> None:
    def made(seed):
        g = torch.Generator().manual_seed(seed)
        return build(kind, 12, 3, width=16, generator=g).state_dict()

    one, same, other = made(4), made(4), made(5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_network_takes_raw_features_for_standardised_ones(kind) -> None:
    raw, network = features(), trained(kind)
    mean, scale = standardisation(raw)
    expected = router_scores(network, (raw - mean) / scale)
    folded = from_tensors(fold(network, mean, scale))
    torch.testing.assert_close(router_scores(folded, raw), expected, atol=2e-2, rtol=1e-3)
    exact = network.double()
    exact.load_state_dict(fold(exact, mean.double(), scale.double()))
    again = router_scores(exact, raw.double())
    torch.testing.assert_close(again, expected.double(), atol=2e-3, rtol=1e-4)
    assert expected[:, 0].abs().max() == 0 and expected[:, 1:].std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_tensors_make_the_network_that_they_are_of(kind, n_outputs) -> None:
    network = trained(kind, n_outputs=n_outputs)
    made = from_tensors({k: v.clone() for k, v in network.state_dict().items()})
    assert shape_of(made) == (12, n_outputs)
    assert torch.equal(made(features()), network(features()))
    assert not made.training and not any(p.requires_grad for p in made.parameters())
    assert made.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: {},
        lambda t: {"a": torch.zeros(3)},
        lambda t: {"0.weight": t["0.weight"]},
        lambda t: {**t, "0.weight": t["0.weight"][0]},
        lambda t: {**t, "0.bias": torch.zeros(99)},
        lambda t: {**t, "extra": torch.zeros(2)},
        lambda t: {**t, "x.bias": torch.zeros(2)},
        lambda t: {k: v for k, v in t.items() if k != "0.bias"},
        lambda t: {k: v.squeeze() * 0 for k, v in t.items() if "weight" in k},
        lambda t: {**t, "0.weight": torch.tensor(0.0)},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_tensors_are_one_sentence_that_begins_with_their_file(kind, damage) -> None:
    tensors = damage(dict(trained(kind).state_dict()))
    with pytest.raises(ArtefactError, match=r"^head\.safetensors holds no router: ") as caught:
        from_tensors(tensors, "head.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_no_numbers_are_refused(kind, value) -> None:
    tensors = dict(trained(kind).state_dict())
    tensors["0.weight"] = tensors["0.weight"].clone()
    tensors["0.weight"][1, 2] = value
    with pytest.raises(ArtefactError, match=r"head is damaged: its tensor 0\.weight holds NaN"):
        from_tensors(tensors, "head")


def test_standardised_features_have_mean_0_and_scale_1() -> None:
    raw = features()
    mean, scale = standardisation(raw)
    standard = (raw - mean) / scale
    changing = [k for k in range(12) if k != 4]
    torch.testing.assert_close(standard.mean(0), torch.zeros(12), atol=1e-2, rtol=0)
    torch.testing.assert_close(standard[:, changing].std(0, unbiased=False), torch.ones(11))
    assert scale[4] == 1 and (standard[:, 4] == 0).all(), "one that never changes says nothing"


def test_joined_features_stand_side_by_side_without_infinities() -> None:
    both = joined([torch.ones(2, 3).half(), torch.tensor([[-1.0, float("-inf")]] * 2)])
    assert both.dtype == torch.float32
    assert both.tolist() == [[1, 1, 1, -1, -1e4]] * 2
