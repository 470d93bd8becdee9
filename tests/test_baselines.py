"""baselines.py: the plain MLP in NumPy, what the baselines make of missing joints, and lifters of
sequences.

What a lifter must do whatever its kind is tested in test_hipart.py for both kinds.
"""

import numpy as np
import pytest
import torch
from test_hipart import as_tuple, hidden_joints, lifters, randomize

from baselines import MixSTE, MLPLifter, PoseFormer, Regressor, ResidualMLP
from hipart import SCALE, SpatialLifter, detected_pelvis


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


# --------------------------------------------------------------------------------------------------
# Lifters of sequences

T = 5
TEMPORAL = [PoseFormer, MixSTE]


def frames_of(n_points, seed=0):
    """x [2, T, n_points, 2] and conf [2, T, 17]; some joints are missing."""
    g = torch.Generator().manual_seed(seed)
    conf = (torch.rand(2, T, 17, generator=g) > 0.2).float()
    return torch.randn(2, T, n_points, 2, generator=g), conf


def small(kind, n_points=17):
    return randomize(kind(n_points, T, width=16, blocks=2), 0.2).eval()


@pytest.mark.parametrize("kind, millions, n_points", [
    (PoseFormer, 9.7, 17), (PoseFormer, 10.7, 161), (MixSTE, 33.7, 17), (MixSTE, 34.8, 161)])
def test_temporal_lifters_have_about_the_published_parameters(kind, millions, n_points):
    """Table 6, 81 frames. With 161 points, the paper also counts what generates them."""
    with torch.device("meta"):
        lifter = kind(n_points)
    assert lifter.frames == 81
    total = sum(p.numel() for p in lifter.parameters())
    assert total == pytest.approx(millions * 1e6, rel=0.15)


@torch.no_grad()
@pytest.mark.parametrize("n_points", [17, 161])
@pytest.mark.parametrize("kind", TEMPORAL)
def test_temporal_lifters_take_frames_of_points(kind, n_points):
    lifter, (x, conf) = small(kind, n_points), frames_of(n_points)
    y = lifter(x, conf)
    assert y.shape == ((2, T, 17, 3) if lifter.every else (2, 17, 3))
    assert torch.equal(lifter(x), lifter(x, torch.full_like(conf, 0.5)))
    filled = x.clone()
    filled[:, :, :17][conf == 0] = torch.nan
    assert torch.equal(lifter(filled, conf), y)
    lifter.mean_y += 7
    torch.testing.assert_close(lifter(x, conf), y + 7)


@pytest.mark.parametrize("kind", TEMPORAL)
def test_temporal_lifters_refuse_what_they_were_not_made_for(kind):
    lifter, (x, conf) = small(kind), frames_of(17)
    for wrong in (x[:, 1:], x[:, 0], frames_of(161)[0]):
        with pytest.raises(ValueError, match=r"takes \[B, 5, 17, 2\]: frames, then points, found"):
            lifter(wrong, conf)
    with pytest.raises(ValueError, match=r"conf \[2, 5, 17\], found \[2, 4, 17\]"):
        lifter(x, conf[:, 1:])
    with pytest.raises(ValueError, match="an odd number, or there is no centre, found 8"):
        kind(17, 8)


def separate_frames(lifter):
    """Blocks over frames that change nothing, and frames that do not know which one they are."""
    for block in lifter.over_time:
        for layer in (block.proj, block.mlp[2]):
            layer.weight.zero_(), layer.bias.zero_()
    lifter.time.zero_()


@torch.no_grad()
@pytest.mark.parametrize("n_points", [17, 161])
def test_mixste_is_the_spatial_lifter_where_frames_do_not_see_one_another(n_points):
    lifter, (x, conf) = small(MixSTE, n_points), frames_of(n_points)
    before = lifter(x, conf)
    separate_frames(lifter)
    spatial = SpatialLifter(n_points, 16, 2, heads=8).eval()
    spatial.load_state_dict(lifter.state_dict(), strict=False)
    alone = torch.stack([spatial(x[:, t], conf[:, t]) for t in range(T)], 1)
    torch.testing.assert_close(lifter(x, conf), alone)
    assert (before - alone).abs().amax((0, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_every_pose_of_mixste_depends_on_every_frame_and_on_their_order():
    lifter, (x, conf) = small(MixSTE), frames_of(17)
    y = lifter(x, conf)
    for t in range(T):
        other = x.clone()
        other[:, t] += 0.3
        assert (lifter(other, conf) - y).abs().amax((0, 2, 3)).min() > 1e-4, t
    turned = lifter(x.flip(1), conf.flip(1)).flip(1)
    assert (turned - y).abs().amax((0, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_the_pose_of_poseformer_is_a_weighted_mean_over_frames():
    """Where frames do not see one another, it is linear in what each of them has become, until the
    head: weights on one frame alone make its pose, and others do not matter."""
    lifter, (x, conf) = small(PoseFormer), frames_of(17)
    whole = lifter(x, conf)
    for t in range(T):
        other = x.clone()
        other[:, t] += 0.3
        assert (lifter(other, conf) - whole).abs().max() > 1e-4, t
    assert (lifter(x.flip(1), conf.flip(1)) - whole).abs().max() > 1e-4
    separate_frames(lifter)
    lifter.mean_t.weight.zero_(), lifter.mean_t.bias.zero_()
    lifter.mean_t.weight[0, T // 2] = 1
    y, centre = lifter(x, conf), x[:, T // 2]
    tokens = lifter.tokens(centre, conf[:, T // 2])
    for block in lifter.blocks:
        tokens = block(tokens)
    row = lifter.norm_t(lifter.norm(tokens).flatten(1))
    torch.testing.assert_close(y, lifter.head(row).unflatten(1, (17, 3)))
