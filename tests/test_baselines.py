"""baselines.py: the plain MLP in NumPy, and what the baselines make of missing joints.

What a lifter must do whatever its kind is tested in test_hipart.py for both kinds.
"""

import numpy as np
import pytest
import torch
from test_hipart import as_tuple, hidden_joints, lifters, randomize

from baselines import MLPLifter, Regressor, ResidualMLP
from hipart import SCALE, detected_pelvis


@torch.no_grad()
def test_residual_mlp_against_numpy():
    torch.manual_seed(0)
    mlp = ResidualMLP(5, 3, 7, 2).double()
    x = torch.randn(11, 5).double()
    w = {k: v.numpy() for k, v in mlp.state_dict().items()}

    def layer(h, name):
        h = h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        return h / (1 + np.exp(-h))  # SiLU

    h = layer(x.numpy(), "first.0")
    for b in range(2):
        h = h + layer(layer(h, f"blocks.{b}.0.0"), f"blocks.{b}.1.0")
    expected = h @ w["last.weight"].T + w["last.bias"]
    np.testing.assert_allclose(mlp(x).numpy(), expected, rtol=1e-12)


@pytest.fixture(scope="module")
def takers():
    """name -> f(x_s, conf), a tuple of tensors."""
    torch.manual_seed(0)
    regressor = randomize(Regressor(16, 1), 0.2).eval()
    functions = dict(regressor=as_tuple(regressor), regressor_densify=as_tuple(regressor.densify))
    return functions | lifters(MLPLifter)


TAKERS = ("regressor", "regressor_densify", "MLPLifter_17", "MLPLifter_161")


@torch.no_grad()
@pytest.mark.parametrize("filler", [7.0, -1e4, float("nan")])
@pytest.mark.parametrize("name", TAKERS)
def test_coordinates_of_a_missing_joint_do_not_matter(takers, name, filler):
    x_s, conf = hidden_joints()
    filled = x_s.masked_fill((conf == 0)[..., None], filler)
    assert all(map(torch.equal, takers[name](x_s, conf), takers[name](filled, conf)))


@torch.no_grad()
@pytest.mark.parametrize("name", TAKERS)
def test_no_confidence_means_all_visible(takers, name):
    x_s = torch.randn(4, 17, 2)
    for conf in (torch.ones(4, 17), torch.rand(4, 17) * 0.9 + 0.05):
        assert all(map(torch.equal, takers[name](x_s), takers[name](x_s, conf)))


@torch.no_grad()
@pytest.mark.parametrize("name", TAKERS)
def test_a_missing_joint_is_not_a_joint_at_zero(takers, name):
    x_s, conf = hidden_joints()
    pairs = zip(takers[name](x_s, conf), takers[name](x_s, torch.ones_like(conf)), strict=True)
    assert all(float((a - b).abs().amax((1, 2))[:3].min()) > 1e-5 for a, b in pairs)


@torch.no_grad()
def test_the_regressor_densifies_in_the_frame_of_the_pelvis():
    regressor, (x_s, conf) = randomize(Regressor(16, 1), 0.2).eval(), hidden_joints()
    pelvis, shift = detected_pelvis(x_s, conf), torch.tensor([0.25, -0.5])
    x_d, x_f = regressor.densify(x_s, conf)
    assert x_d.shape == (4, 48, 2) and x_f.shape == (4, 96, 2)
    framed = regressor((x_s - pelvis) / SCALE, conf)
    for got, moved, inside in zip(
        (x_d, x_f), regressor.densify(x_s + shift, conf), framed, strict=True
    ):
        torch.testing.assert_close(got, inside * SCALE + pelvis)
        torch.testing.assert_close(moved, got + shift, rtol=1e-4, atol=1e-4)
