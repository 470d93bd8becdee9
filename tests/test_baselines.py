"""baselines.py: the plain MLP in NumPy, what the baselines make of missing joints, lifters of
sequences, and the ways to generate tokens (HiARM's in the order of joint numbers, too).

What a lifter must do whatever its kind is tested in test_hipart.py for both kinds.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hipart import (
    TINY,
    as_tuple,
    assert_differ,
    assert_same,
    hidden_joints,
    lifters,
    masked,
    randomize,
    tokens,
)

import baselines
import hipart
from baselines import (
    KINDS,
    MixSTE,
    MLPLifter,
    OneLevel,
    PoseFormer,
    Regressor,
    ResidualMLP,
    ThirdLevel,
    new_hipart,
)
from generation import lean_mode
from hipart import GENERATIONS, PART_JOINT, SCALE, Config, SpatialLifter, detected_pelvis
from train import Training, new_lifter


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


@pytest.mark.parametrize("kind", [MLPLifter, SpatialLifter])
@pytest.mark.parametrize("levels", ["dense", "fine"])
def test_a_lifter_of_one_level_is_blind_to_the_other(kind, levels):
    """Table 5: whatever the other level holds, even in the statistics, comes out the same; and the
    missing level is what the docstring says."""
    lifter = OneLevel(randomize(kind(161, 12, 2), 0.2), levels).double().eval()
    x, conf = torch.randn(9, 161, 2, dtype=torch.float64), torch.ones(9, 17)
    own, rest = (slice(17, 65), slice(65, 161))[:: 1 if levels == "dense" else -1]
    other, seen, y = x.clone(), x.clone(), torch.randn(9, 17, 3, dtype=torch.float64)
    other[:, rest] = torch.randn_like(other[:, rest])
    for k in range(48):
        pair = [65 + 2 * k, 66 + 2 * k]
        if levels == "dense":
            seen[:, pair] = x[:, 17 + k, None]
        else:
            seen[:, 17 + k] = x[:, pair].mean(1)
    found = []
    for points in (x, other, seen):
        lifter.standardize(points, y, conf)
        found.append(lifter(points, conf))
    assert_same(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-6)
    moved = x.clone()
    moved[:, own] += 0.1 * torch.randn_like(moved[:, own])
    assert_differ(lifter(moved, conf), found[0])


@torch.no_grad()
def test_a_third_level_is_seen_as_offsets_from_the_nearest_fine_points():
    """Table 5, against NumPy. The points of the third level stand at random beside fine points."""
    rng, conf = np.random.default_rng(0), torch.ones(9, 17)
    x = rng.normal(size=(9, 161, 2))
    fine_of = np.r_[rng.permutation(96), rng.integers(96, size=96)]  # each has one at least
    x_t = x[:, 65:][:, fine_of] + 0.01 * rng.normal(size=(9, 192, 2))
    x, y = torch.tensor(np.concatenate([x, x_t], 1)), torch.randn(9, 17, 3, dtype=torch.float64)
    for levels in ("dense+fine+192", "192"):
        lifter = randomize(ThirdLevel(levels, 12, 2), 0.2).double().eval()
        lifter.standardize(x, y, conf)
        assert lifter.fine_of.tolist() == fine_of.tolist()
        x_f = x[:, 65:161]
        if levels == "192":
            x_f = x[:, 161:][:, lifter.third_of]
            assert (fine_of[lifter.third_of.numpy()] == np.arange(96)).all()
        offsets = x_t - x_f.numpy()[:, fine_of]
        expected = (offsets - offsets.mean(0)) / offsets.std(0).clip(1e-6)
        f = lifter.features(x, conf)
        np.testing.assert_allclose(f["fine"][:, 96:].numpy(), expected, atol=1e-5)
        assert lifter(x, conf).shape == (9, 17, 3)
        # It is blind to dense and fine points in the one case, and not in the other.
        moved, seen = x.clone(), lifter(x, conf)
        moved[:, 17:161] += 0.01
        (assert_same if levels == "192" else assert_differ)(lifter(moved, conf), seen)
        moved = x.clone()
        moved[:, 161:] += 0.01 * torch.randn_like(moved[:, 161:])
        assert_differ(lifter(moved, conf), seen)


# --------------------------------------------------------------------------------------------------
# Ways to generate

# The parts in the order in which they are generated.
BY_JOINT = sorted(range(16), key=lambda part: PART_JOINT[part])
ORDERS = {name: BY_JOINT if name in ("sparse-to-dense", "next-token") else list(range(16))
          for name in GENERATIONS}


def generator(name, seed=0, **options):
    return randomize(new_hipart(replace(TINY, generation=name, **options)), 0.3,
                     seed).hiarm.double().eval()


def reaches(name):
    """Which tokens reach the logits of which: [64, 64], by sparse tokens and then dense ones."""
    place = {part: k for k, part in enumerate(ORDERS[name])}
    kinds = [(part, -1) for part in range(16)] + [(i // 3, i % 3) for i in range(48)]

    def before(a, b):
        own, earlier = a[0] == b[0], place[a[0]] < place[b[0]]
        if name == "classification":
            return own and a[1] < 0 <= b[1]
        if name in ("both", "sparse-to-dense"):
            return earlier or own and a[1] < 0 <= b[1]
        return earlier or own and a[1] < b[1]

    return [[before(a, b) for b in kinds] for a in kinds]


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_token_sees_what_comes_before_it_in_its_order_and_nothing_else(name):
    """By autograd: every token has a code of its own, so that gradients say which of them reach
    which logits."""
    model = generator(name, K_s=16, K_d=48)
    assert type(model) is KINDS[name]
    codes = [model.C_s.requires_grad_(), model.C_d.requires_grad_()]
    x_s = torch.randn(1, 17, 2, dtype=torch.float64)
    logits = model(x_s, torch.arange(16)[None], torch.arange(48)[None])
    every = [of for level in logits for of in level[0].unbind()]
    rows = []
    for of in every:
        grads = torch.autograd.grad((of * torch.randn_like(of)).sum(), codes, retain_graph=True,
                                    materialize_grads=True)
        rows.append(torch.cat([g.abs().sum(-1) > 0 for g in grads]))
    assert torch.stack(rows).T.tolist() == reaches(name)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATIONS)
def test_the_rollout_is_the_forward_on_its_own_tokens(name):
    model, (x_s, conf) = generator(name), masked(1, 5)
    x_s, conf = x_s.double(), conf.double()
    o = model.rollout(x_s, conf)
    q_s, q_d = tokens(model, x_s, conf)
    for got, logits in zip(("logits_s", "logits_d"), model(x_s, q_s, q_d, conf), strict=True):
        torch.testing.assert_close(o[got], logits, rtol=0, atol=1e-9)
    assert torch.equal(o["zh_s"], model.C_s[q_s]) and torch.equal(o["zh_d"], model.C_d[q_d])
    assert len(torch.unique(q_s)) > 1


@pytest.mark.parametrize("condition, soft", [("sos", False), ("every", True)])
@pytest.mark.parametrize("name", GENERATIONS[1:])
@given(seed=st.integers(0, 2**31), B=st.integers(1, 4), with_conf=st.booleans())
@settings(max_examples=5, deadline=None)
def test_the_fast_way_equals_the_rollout(name, condition, soft, seed, B, with_conf):
    model, (x_s, conf) = generator(name, seed, condition=condition, soft=soft), masked(seed, B)
    x_s, conf = x_s.double(), conf.double() if with_conf else None
    with torch.no_grad():
        o = model.rollout(x_s, conf)
    with lean_mode():
        zh_s, zh_d = model.generate(x_s, conf)
    torch.testing.assert_close(zh_s, o["zh_s"], rtol=0, atol=1e-9)
    torch.testing.assert_close(zh_d, o["zh_d"], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATIONS[1:])
def test_probabilities_of_all_token_sequences_sum_to_one(name, monkeypatch):
    """A body of two parts, as for HiARM in test_hipart.py; of joint 4 and joint 1, so that the
    order of joint numbers is not that of the parts."""
    for module in (hipart, baselines):
        monkeypatch.setattr(module, "J_S", 2)
        monkeypatch.setattr(module, "PART_JOINT", (4, 1))
    model = generator(name, K_s=3, K_d=2)
    q = torch.tensor(list(itertools.product(*[range(3)] * 2, *[range(2)] * 6)))
    x_s = torch.randn(1, 17, 2, dtype=torch.float64).expand(len(q), -1, -1)
    p = model.log_prob(x_s, q[:, :2], q[:, 2:]).exp()
    assert len(q) == 576 and float(p.max()) > 2 / 576
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATIONS[1:])
def test_samples_have_the_log_prob_of_their_tokens(name):
    model = randomize(new_hipart(replace(TINY, generation=name)), 0.3).eval()
    model.hiarm.set_codebooks(model.msst, torch.randn(2, 96, 2))
    model, (x_s, conf), seen = model.double(), masked(2, 3), []
    decode = model.msst.decode_embeddings
    model.msst.decode_embeddings = lambda *z: (seen.append(z), decode(*z))[1]
    x_s, conf = x_s.double() * SCALE, conf.double()
    _, _, log_prob = model.sample(x_s, conf, 2, generator=torch.Generator().manual_seed(0))
    q_s, q_d = (torch.cdist(z, C).argmin(-1)
                for z, C in zip(seen[0], (model.hiarm.C_s, model.hiarm.C_d), strict=True))
    many, c = x_s.repeat_interleave(2, 0), conf.repeat_interleave(2, 0)
    framed = (many - detected_pelvis(many, c)) / SCALE
    torch.testing.assert_close(log_prob.flatten(), model.hiarm.log_prob(framed, q_s, q_d, c),
                               rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "in_one_pass"), [
    *((name, False) for name in GENERATIONS), *((name, True) for name in GENERATIONS[:2])])
def test_training_reaches_every_weight(name, in_one_pass):
    """A weight without a gradient would have no use, and several processes would refuse it. Only
    what summarizes the past has nothing to do in one pass."""
    config = replace(TINY, generation=name, condition="every", soft=True)
    model = randomize(new_hipart(config), 0.3)
    model.msst.requires_grad_(False)
    n, conf = 2, torch.ones(2, 17)
    conf[:, 3] = 0
    loss, _ = model.loss(
        torch.randn(n, 17, 2), conf, torch.randn(n, 48, 2), torch.randn(n, 96, 2),
        torch.randn(n, 16, TINY.D), torch.randn(n, 48, TINY.D), torch.randint(TINY.K_s, (n, 16)),
        torch.randint(TINY.K_d, (n, 48)), in_one_pass=in_one_pass)
    loss.backward()
    silent = [k for k, p in model.hiarm.named_parameters()
              if p.grad is None or float(p.grad.abs().max()) == 0]
    assert all(k.split(".")[0] in ("LSAB", "in_d", "slot_l") for k in silent)
    assert bool(silent) == in_one_pass


def test_all_but_the_classifier_have_as_many_parameters():
    """And that one lacks a block, as in Table 4 (2.2 million to 2.4)."""
    count = {name: sum(p.numel() for p in new_hipart(Config(generation=name)).hiarm.parameters())
             for name in GENERATIONS}
    assert len({count[name] for name in GENERATIONS[:4]}) == 1
    assert 0.19e6 < count["both"] - count["classification"] < 0.23e6


@pytest.mark.parametrize("options, words", [
    (dict(generation="diffusion"), "generation must be one of both"),
    (dict(generation="next-token", history_dropout=0.5), "history_dropout must be 0"),
    (dict(generation="classification", history_dropout=0.5), "history_dropout must be 0"),
])
def test_other_ways_to_generate_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **options)


def test_hiarm_does_not_pretend_to_be_another_generator():
    with pytest.raises(ValueError, match="HiARM generates both, found next-token"):
        hipart.HiPART(replace(TINY, generation="next-token"))


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


@pytest.mark.parametrize("lifter, frames, own", [
    ("spatial", 1, 6), ("poseformer", 9, 8), ("mixste", 9, 8)])
def test_lifters_have_their_papers_heads_unless_told_otherwise(lifter, frames, own):
    for told, heads in ((0, own), (2, 2)):
        t = Training(lifter=lifter, frames=frames, lifter_width=24, lifter_heads=told)
        made = new_lifter(t, "sparse")
        blocks = [*made.blocks, *getattr(made, "over_time", ())]
        assert {block.heads for block in blocks} == {heads}
    with pytest.raises(ValueError, match=f"lifter_heads {own}, found 25"):
        Training(lifter=lifter, frames=frames, lifter_width=25)


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


@torch.no_grad()
@pytest.mark.parametrize("kind", [MixSTE, PoseFormer])
def test_lifters_of_sequences_tell_joints_apart_from_the_start(kind):
    """From position embeddings of zero, MixSTE stayed near the mean pose for a thousand steps."""
    torch.manual_seed(0)
    lifter, hidden = kind(17, 3, 16, 1, 2), torch.zeros(1, 3, 17)
    tokens = lifter.tokens_of_frames(torch.zeros(1, 3, 17, 2), hidden)[0]  # all joints are missing
    assert torch.nn.functional.pdist(tokens).min() > 1


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
