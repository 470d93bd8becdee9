"""hipart.py against the paper: NumPy float64 readings of the equations, causality, missing joints.

These readings take weights by their name in the state dict and share no code with the model: loops
and explicit lists of what may be seen stand where the model has masks and batched tensors.
"""

import copy
import dataclasses
import itertools
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import hipart
from baselines import MLPLifter, Regressor
from generation import generate, lean_mode, poses_at_once
from hipart import (
    JOINT_NAMES,
    LEFT,
    MSST,
    PARENTS,
    PART_JOINT,
    RIGHT,
    SCALE,
    Block,
    Config,
    HiARM,
    HiPART,
    SpatialLifter,
    detected_pelvis,
    from_model_frame,
    global_alignment,
    lifting_features,
    local_alignment,
    normalize_screen,
    to_model_frame,
    to_pixels,
    token_log_prob,
    visible_joints,
)
from kernels import backend

ROOT = Path(__file__).resolve().parent.parent
TINY = Config(
    D=6,
    K_s=11,
    K_d=13,
    encoder_blocks=2,
    encoder_width=8,
    decoder_blocks=1,
    decoder_width=10,
    token_hidden=7,
    n_actions=4,
    width=12,
    heads=3,
    mlp_ratio=2,
    lsab_blocks=1,
    gcsab_blocks=2,
    ph_blocks=2,
)


def randomize(model, scale=0.4, seed=0):
    """Every parameter far from its start: embeddings that begin near zero would hide what they
    do."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
        for m in model.modules():
            if isinstance(m, torch.nn.LayerNorm):
                m.weight.add_(1)
    return model


def assert_same(a, b, **kw):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10, **kw)


def assert_differ(a, b):
    assert float((a - b).detach().abs().max()) > 1e-5


# --------------------------------------------------------------------------------------------------
# The equations in NumPy float64


def weights(model):
    return {k: v.detach().double().numpy() for k, v in model.state_dict().items()}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def layer_norm(w, name, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))


def block_reference(w, name, x, heads, visible, eps=1e-5):
    """One pre-norm transformer block on x [T, W]; visible[t] lists the positions that position t
    may look at."""
    T, W = x.shape
    h = W // heads
    qkv = linear(w, f"{name}.qkv", layer_norm(w, f"{name}.norm1", x, eps))
    q, k, v = qkv[:, :W], qkv[:, W : 2 * W], qkv[:, 2 * W :]
    mixed = np.zeros((T, W))
    for t in range(T):
        for a in range(heads):
            cut = slice(a * h, (a + 1) * h)
            score = np.array([q[t, cut] @ k[u, cut] / math.sqrt(h) for u in visible[t]])
            share = np.exp(score - score.max())
            share /= share.sum()
            mixed[t, cut] = sum(s * v[u, cut] for s, u in zip(share, visible[t], strict=True))
    x = x + linear(w, f"{name}.proj", mixed)
    hidden = gelu(linear(w, f"{name}.mlp.0", layer_norm(w, f"{name}.norm2", x, eps)))
    return x + linear(w, f"{name}.mlp.2", hidden)


def hiarm_reference(w, c, x_s, q_s=None, q_d=None, conf=None, history=True):
    """One sample x_s [17, 2], part by part (Eq. 7-11): logits [16, K_s], [48, K_d] and the
    embeddings [16, D], [48, D].

    With tokens q_s [16], q_d [48]: teacher forcing. Without: its own choice at every step (Alg. 1),
    the most probable code or, with c.soft, the expected one. Without history, g^1..g^15 are 0."""
    seen = np.ones(17) if conf is None else (conf > 0).astype(float)
    x = (x_s * seen[:, None]).reshape(-1)
    position = w["part"].copy()
    if c.condition == "every":
        hidden = gelu(linear(w, "P_e.2", gelu(linear(w, "P_e.0", np.concatenate([x, seen])))))
        position += linear(w, "P_e.4", hidden).reshape(16, -1)

    def choose(logits, codebook):
        share = np.exp(log_softmax(logits))
        return share @ codebook if c.soft else codebook[logits.argmax(-1)]

    everyone = [list(range(4))] * 4
    logits_s, logits_d, all_s, all_d, g = (
        [],
        [],
        [],
        [],
        [linear(w, "P_c", x) + linear(w, "missing", 1 - seen)],
    )
    for i in range(16):  # g holds g^0 .. g^i: nothing of part i has been looked up yet
        h = np.stack(g) + position[: i + 1]
        past = [list(range(t + 1)) for t in range(i + 1)]
        for b in range(c.gcsab_blocks):
            h = block_reference(w, f"GCSAB.{b}", h, c.heads, past)
        h = layer_norm(w, "norm_h", h, 1e-5)[-1]

        def head(z_s, h=h):  # Eq. 11: h^i and r times the sparse embedding of this very part
            e = linear(w, "in_s", z_s)
            p = np.stack([h, e, e, e]) + w["slot_p"]
            for b in range(c.ph_blocks):
                p = block_reference(w, f"PH.{b}", p, c.heads, [[0], *everyone[1:]])
            p = layer_norm(w, "norm_p", p, 1e-5)
            return linear(w, "head_s", p[0]), linear(w, "head_d", p[1:])

        own_s = head(np.zeros(c.D))[0]
        z_s = choose(own_s, w["C_s"]) if q_s is None else w["C_s"][q_s[i]]
        own_d = head(z_s)[1]
        z_d = choose(own_d, w["C_d"]) if q_d is None else w["C_d"][q_d[3 * i : 3 * i + 3]]
        local = np.concatenate([linear(w, "in_s", z_s)[None], linear(w, "in_d", z_d)]) + w["slot_l"]
        for b in range(c.lsab_blocks):
            local = block_reference(w, f"LSAB.{b}", local, c.heads, everyone)
        g.append(history * local.mean(0))
        logits_s.append(own_s)
        all_s.append(z_s)
        logits_d += list(own_d)
        all_d += list(z_d)
    return tuple(map(np.stack, (logits_s, logits_d, all_s, all_d)))


def mixer_reference(w, name, x):
    """x [tokens, width]: mix along tokens, then along channels."""
    y = layer_norm(w, f"{name}.norm1", x, 1e-5).T
    x = x + linear(w, f"{name}.mix_tokens.2", gelu(linear(w, f"{name}.mix_tokens.0", y))).T
    y = layer_norm(w, f"{name}.norm2", x, 1e-5)
    return x + linear(w, f"{name}.mix_channels.2", gelu(linear(w, f"{name}.mix_channels.0", y)))


def encoder_reference(w, name, x, blocks):
    x = linear(w, f"{name}.embed", x)
    for b in range(blocks):
        x = mixer_reference(w, f"{name}.mixer.{b}", x)
    x = layer_norm(w, f"{name}.mixer.{blocks}", x, 1e-5)
    return linear(w, f"{name}.out", linear(w, f"{name}.joints", x.T).T)


def decoder_reference(w, name, x, blocks):
    x = linear(w, f"{name}.embed", linear(w, f"{name}.joints", x.T).T)
    for b in range(blocks):
        x = mixer_reference(w, f"{name}.mixer.{b}", x)
    return linear(w, f"{name}.out", layer_norm(w, f"{name}.mixer.{blocks}", x, 1e-5))


def msst_reference(w, c, x_f):
    """One sample x_f [96, 2] through Eq. 1, 2 and 4; every z_hat is the code itself."""
    z_d = encoder_reference(w, "E_f", x_f, c.encoder_blocks)
    z_s = encoder_reference(w, "E_d", z_d, c.encoder_blocks)
    q_s = ((z_s[:, None] - w["Q_s.codebook"]) ** 2).sum(-1).argmin(1)
    zh_s = w["Q_s.codebook"][q_s]
    up = decoder_reference(w, "D_s", zh_s, c.decoder_blocks)
    fused = linear(w, "fuse", np.concatenate([z_d, up], -1))
    q_d = ((fused[:, None] - w["Q_d.codebook"]) ** 2).sum(-1).argmin(1)
    zh_d = w["Q_d.codebook"][q_d]
    both = np.concatenate([zh_d, up], -1)
    p = linear(w, "P_A.0", both)
    for b in (1, 2):
        p = mixer_reference(w, f"P_A.{b}", p)
    return dict(
        z_s=z_s,
        zp_d=fused,
        q_s=q_s,
        q_d=q_d,
        zh_s=zh_s,
        zh_d=zh_d,
        p_A=linear(w, "action", p.mean(0)),
        x_d=decoder_reference(w, "D_d", zh_d, c.decoder_blocks),
        x_f=decoder_reference(w, "D_f", both, c.decoder_blocks),
    )


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def local_reference(zh_s, zh_d, tau, cosine):
    """Eq. 3 written out for zh_s [16, D], zh_d [48, D] of one pose; mean over parts."""
    total = 0.0
    for i in range(16):
        logits = []
        for k in range(16):
            a, b = zh_s[i], zh_d[3 * k : 3 * k + 3].mean(0)
            if cosine:
                a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
            logits.append(a @ b / tau)
        total -= log_softmax(np.array(logits))[i]
    return total / 16


# --------------------------------------------------------------------------------------------------
# Skeleton tables and Config


def bones_from_pelvis(joint):
    return 0 if PARENTS[joint] < 0 else 1 + bones_from_pelvis(PARENTS[joint])


def test_skeleton_tables():
    assert len(JOINT_NAMES) == len(set(JOINT_NAMES)) == len(PARENTS) == 17
    assert PARENTS[0] == -1 and all(0 <= p < j for j, p in enumerate(PARENTS) if j)
    assert list(PART_JOINT) == sorted(range(1, 17), key=lambda j: (bones_from_pelvis(j), j))


def test_left_and_right_mirror_each_other():
    assert [JOINT_NAMES[j].replace("left", "right") for j in LEFT] == [
        JOINT_NAMES[j] for j in RIGHT
    ]
    assert all("left" in JOINT_NAMES[j] for j in LEFT) and len(LEFT) == len(RIGHT) == 6
    assert sum("left" in n or "right" in n for n in JOINT_NAMES) == 12
    mirror = list(range(17))
    for a, b in zip(LEFT, RIGHT, strict=True):
        mirror[a], mirror[b] = b, a
    assert [mirror[PARENTS[mirror[j]]] if j else -1 for j in range(17)] == list(PARENTS)


def test_config_is_the_papers():
    """Section 5.1 and appendix C; docs/decisions.md lists what is ours."""
    paper = dict(
        D=128,
        K_s=2048,
        K_d=2048,
        encoder_blocks=4,
        encoder_width=128,
        decoder_blocks=1,
        decoder_width=96,
        token_hidden=64,
        n_actions=15,
        beta=0.25,
        lambda_l=1.0,
        lambda_g=0.3,
        tau=0.07,
        cosine_local=True,
        ema_decay=0.99,
        width=128,
        heads=8,
        lsab_blocks=1,
        gcsab_blocks=12,
        ph_blocks=4,
        dropout=0.25,
        lambda_d=1.5,
        condition="sos",
        soft=False,
    )
    config = dataclasses.asdict(Config())
    assert {k: config[k] for k in paper} == paper
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().D = 64


# --------------------------------------------------------------------------------------------------
# Coordinate frames


def test_normalisation_known_values():
    """VideoPose3D: X / w * 2 - [1, h / w]."""
    px = torch.tensor(
        [[0.0, 0.0], [1000.0, 1002.0], [500.0, 501.0], [750.0, 0.0], [0.0, 600.0]]
    ).double()
    expected = [[-1.0, -1.002], [1.0, 1.002], [0.0, 0.0], [0.5, -1.002], [-1.0, 0.198]]
    assert_same(normalize_screen(px, 1000, 1002), torch.tensor(expected, dtype=torch.float64))
    assert_same(
        normalize_screen(torch.tensor([[1920.0, 1080.0]]), 1920, 1080),
        torch.tensor([[1.0, 0.5625]]),
    )


@given(seed=st.integers(0, 2**31), w=st.integers(1, 4000), h=st.integers(1, 4000))
@settings(max_examples=30, deadline=None)
def test_frames_invert(seed, w, h):
    g = torch.Generator().manual_seed(seed)
    px = torch.rand(3, 17, 2, generator=g, dtype=torch.float64) * torch.tensor([w, h])
    x = normalize_screen(px, w, h)
    torch.testing.assert_close(to_pixels(x, w, h), px, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        (x[:, 1:] - x[:, :1]).norm(dim=-1), (px[:, 1:] - px[:, :1]).norm(dim=-1) * 2 / w
    )
    pelvis = detected_pelvis(x)
    framed = to_model_frame(x, pelvis)
    assert float(framed[:, 0].abs().max()) == 0.0
    torch.testing.assert_close(framed[:, 3], (x[:, 3] - x[:, 0]) / SCALE)
    torch.testing.assert_close(from_model_frame(framed, pelvis), x, rtol=1e-9, atol=1e-12)


def test_detected_pelvis():
    x, conf = torch.randn(4, 17, 2), torch.ones(4, 17)
    conf[1, 0] = 0  # pelvis missing: mean of the visible ones
    conf[1, 5:] = 0
    conf[2, 3] = 0  # another joint missing: the pelvis still counts
    conf[3] = 0  # nobody there
    pelvis = detected_pelvis(x, conf)
    assert pelvis.shape == (4, 1, 2)
    assert torch.equal(pelvis[[0, 2], 0], x[[0, 2], 0])
    torch.testing.assert_close(pelvis[1, 0], x[1, 1:5].mean(0))
    assert torch.equal(pelvis[3, 0], torch.zeros(2))
    assert torch.equal(detected_pelvis(x), detected_pelvis(x, torch.full((4, 17), 0.1)))


# --------------------------------------------------------------------------------------------------
# Stage 1


def tokenizer(seed=0, config=TINY, n=24):
    """A small MSST with codebooks set from its own outputs, and poses."""
    torch.manual_seed(seed)
    model, x_f = randomize(MSST(config), 0.35, seed), torch.randn(n, 96, 2)
    model.initialize_codebooks(x_f, n)
    return model, x_f


def test_msst_forward_equals_numpy():
    model, x_f = tokenizer()
    with torch.no_grad():
        o = model.eval()(x_f[:3])
    w = weights(model)
    for b in range(3):
        reference = msst_reference(w, TINY, x_f[b].double().numpy())
        for name in ("q_s", "q_d"):
            np.testing.assert_array_equal(o[name][b].numpy(), reference[name])
        for name in ("z_s", "zp_d", "zh_s", "zh_d", "x_d", "x_f", "p_A"):
            np.testing.assert_allclose(
                o[name][b].numpy(), reference[name], rtol=1e-4, atol=1e-4, err_msg=name
            )


@pytest.mark.parametrize("cosine", [True, False])
def test_stage_1_loss_equals_eq_6_in_numpy(cosine):
    """Every reduction as the docstring states it; the codebook term is EMA's business and not in
    the loss."""
    config = dataclasses.replace(
        TINY,
        cosine_local=cosine,
        tau=0.07 if cosine else 5.0,
        beta=0.25,
        lambda_r=7.0,
        lambda_l=1.3,
        lambda_g=0.4,
    )
    model, x_f = tokenizer(1, config)
    x_f, x_d, a = x_f[:4], torch.randn(4, 48, 2), torch.tensor([2, -1, 0, -1])
    loss, terms, o = model.loss(x_f, x_d, a)
    w = weights(model)
    references = [msst_reference(w, config, pose.double().numpy()) for pose in x_f]
    expected = dict.fromkeys(("fine", "dense", "commit_s", "commit_d", "local", "action"), 0.0)
    for b, t in enumerate(references):
        np.testing.assert_array_equal(
            o["q_d"][b].numpy(), t["q_d"]
        )  # else different codes would be compared
        pairs = dict(
            fine=(t["x_f"], x_f[b].double().numpy()),
            dense=(t["x_d"], x_d[b].double().numpy()),
            commit_s=(t["z_s"], t["zh_s"]),
            commit_d=(t["zp_d"], t["zh_d"]),
        )
        for term, (ours, theirs) in pairs.items():
            expected[term] += ((ours - theirs) ** 2).sum(-1).mean() / 4
        expected["local"] += local_reference(t["zh_s"], t["zh_d"], config.tau, cosine) / 4
    expected["action"] = (
        -(log_softmax(references[0]["p_A"])[2] + log_softmax(references[2]["p_A"])[0]) / 2
    )  # the two known ones
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(float(terms[name]), value, rtol=2e-4, err_msg=name)
    total = (
        7.0 * (expected["fine"] + expected["dense"])
        + 0.25 * (expected["commit_s"] + expected["commit_d"])
        + 1.3 * expected["local"]
        + 0.4 * expected["action"]
    )
    np.testing.assert_allclose(loss.item(), total, rtol=2e-4)
    assert not any(t.requires_grad for t in terms.values())


@pytest.mark.parametrize("cosine", [True, False])
@given(seed=st.integers(0, 2**31), tau=st.floats(0.05, 10), scale=st.floats(0.1, 3))
@settings(max_examples=15, deadline=None)
def test_l_local_equals_eq_3_in_numpy(cosine, seed, tau, scale):
    g = torch.Generator().manual_seed(seed)
    zh_s, zh_d = (torch.randn(2, n, 5, generator=g, dtype=torch.float64) * scale for n in (16, 48))
    expected = np.mean(
        [local_reference(zh_s[b].numpy(), zh_d[b].numpy(), tau, cosine) for b in range(2)]
    )
    np.testing.assert_allclose(float(local_alignment(zh_s, zh_d, tau, cosine)), expected, rtol=1e-9)


def test_l_local_ties_a_sparse_token_to_its_own_three_rows():
    zh_s = torch.randn(2, 16, 8)
    own = zh_s.repeat_interleave(3, 1)
    assert float(local_alignment(zh_s, own, 0.07)) < 0.1
    assert float(local_alignment(zh_s, own.roll(1, 1), 0.07)) > 0.1  # one row further and parts mix
    assert float(local_alignment(zh_s, own.roll(3, 1), 0.07)) > 3
    shuffled = own.unflatten(1, (16, 3))[:, :, [2, 0, 1]].flatten(1, 2)
    torch.testing.assert_close(
        local_alignment(zh_s, shuffled, 0.07), local_alignment(zh_s, own, 0.07)
    )


def test_unknown_actions_do_not_count():
    p, a = torch.randn(5, 4, requires_grad=True), torch.tensor([1, -1, 3, -1, 0])
    loss = global_alignment(p, a)
    expected = -log_softmax(p.detach().double().numpy())[[0, 2, 4], [1, 3, 0]].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert float(p.grad[[1, 3]].abs().max()) == 0.0 and float(p.grad[0].abs().max()) > 0
    q = torch.randn(3, 4, requires_grad=True)
    nothing = global_alignment(q, torch.full((3,), -1))
    nothing.backward()
    assert nothing.item() == 0.0 and float(q.grad.abs().max()) == 0.0  # all unknown: zero, not NaN


ONE_TERM = {
    "fine": "lambda_r",
    "dense": "lambda_r",
    "commit": "beta",
    "local": "lambda_l",
    "action": "lambda_g",
}


@pytest.mark.parametrize("term", ONE_TERM)
def test_every_term_reaches_the_encoders(term):
    """A plain lookup passes every test of values and gives the encoder nothing: straight-through
    everywhere."""
    off = dict(lambda_r=0.0, beta=0.0, lambda_l=0.0, lambda_g=0.0)
    model, x_f = tokenizer(2, dataclasses.replace(TINY, **(off | {ONE_TERM[term]: 1.0})))
    x_f = x_f[:6]
    with torch.no_grad():
        o = model(x_f)
    x_d = o["x_d"] if term == "fine" else torch.randn(6, 48, 2)
    target = o["x_f"] if term == "dense" else x_f  # a perfect reconstruction has no gradient
    out = model(x_f)
    if term in ("fine", "dense"):
        loss = ((out["x_f"] - target) ** 2).mean() + ((out["x_d"] - x_d) ** 2).mean()
    else:
        loss = model.loss(x_f, x_d, torch.zeros(6, dtype=torch.int64))[0]
    loss.backward()
    for encoder in ("E_f", "E_d"):
        grads = {n: p.grad for n, p in getattr(model, encoder).named_parameters()}
        assert all(g is not None for g in grads.values()), encoder
        assert all(float(g.abs().max()) > 0 for n, g in grads.items() if n.endswith("weight")), (
            encoder
        )


def test_straight_through_is_the_identity_backwards_and_the_code_forwards():
    model, x_f = tokenizer(3)
    o = model(x_f[:2])
    torch.testing.assert_close(o["zh_s"], model.Q_s.codebook[o["q_s"]])
    torch.testing.assert_close(o["zh_d"], model.Q_d.codebook[o["q_d"]])
    g = torch.randn_like(o["zh_s"])
    (grad,) = torch.autograd.grad(o["zh_s"], o["z_s"], g)
    assert torch.equal(grad, g)


def test_commitment_pulls_z_towards_its_code_only():
    """beta |z - sg(z_hat)|^2: the gradient on z is 2 beta (z - code) / tokens, and nothing flows
    through the code."""
    model, x_f = tokenizer(
        4, dataclasses.replace(TINY, lambda_r=0.0, lambda_l=0.0, lambda_g=0.0, beta=0.5)
    )
    seen, forward = {}, model.Q_d.forward

    def spy(z):
        z.retain_grad()
        seen["z"] = z
        return forward(z)

    model.Q_d.forward = spy
    loss, _, o = model.loss(x_f[:2], x_f[:2, ::2], torch.zeros(2, dtype=torch.int64))
    loss.backward()
    expected = 2 * 0.5 * (seen["z"] - model.Q_d.codebook[o["q_d"]]).detach() / (2 * 48)
    torch.testing.assert_close(seen["z"].grad, expected, rtol=1e-3, atol=1e-6)


def test_codebooks_receive_no_gradient():
    model, x_f = tokenizer(5)
    for q in (model.Q_s, model.Q_d):
        q.codebook.requires_grad_(True)  # even if someone makes them differentiable
    model.loss(x_f[:3], x_f[:3, ::2], torch.zeros(3, dtype=torch.int64))[0].backward()
    for q in (model.Q_s, model.Q_d):
        assert q.codebook.grad is None or float(q.codebook.grad.abs().max()) == 0.0


def test_decode_of_encode_is_forward():
    model, x_f = tokenizer(6)
    model.eval()
    with torch.no_grad():
        o, (q_s, q_d) = model(x_f), model.encode(x_f)
        x_d, x_fine = model.decode(q_s, q_d)
    assert q_s.shape == (24, 16) and q_d.shape == (24, 48) and q_s.dtype == q_d.dtype == torch.int64
    assert torch.equal(q_s, o["q_s"]) and torch.equal(q_d, o["q_d"])
    torch.testing.assert_close(x_d, o["x_d"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_fine, o["x_f"], rtol=1e-4, atol=1e-4)


def test_x_d_depends_on_dense_tokens_alone():
    model, x_f = tokenizer(7)
    with torch.no_grad():
        q_s, q_d = model.eval().encode(x_f[:4])
        x_d, x_fine = model.decode(q_s, q_d)
        other_s = model.decode((q_s + 1) % TINY.K_s, q_d)
        other_d = model.decode(q_s, (q_d + 1) % TINY.K_d)
    assert torch.equal(x_d, other_s[0])
    assert_differ(x_fine, other_s[1])
    assert_differ(x_d, other_d[0])
    assert_differ(x_fine, other_d[1])


def test_samples_of_a_batch_do_not_mix_in_stage_1():
    model, x_f = tokenizer(8)
    with torch.no_grad():
        whole = model.eval()(x_f)
        alone = model(x_f[5:6])
    assert torch.equal(whole["q_d"][5:6], alone["q_d"])
    torch.testing.assert_close(whole["x_f"][5:6], alone["x_f"], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Transformer block


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_block_equals_numpy(eps):
    block = randomize(Block(12, 3, 2, eps=eps)).double().eval()
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    visible = [[0], [0, 1], [0, 2], [1, 3], [0, 1, 2, 3, 4]]
    mask = torch.zeros(5, 5, dtype=torch.bool)
    for t, seen in enumerate(visible):
        mask[t, seen] = True
    w = {f"b.{k}": v for k, v in weights(block).items()}
    with torch.no_grad():
        for m, seen in ((mask, visible), (None, [range(5)] * 5)):
            reference = block_reference(w, "b", x[0].numpy(), 3, seen, eps)
            np.testing.assert_allclose(block(x, m)[0].numpy(), reference, atol=1e-10)


@pytest.mark.parametrize("pieces", [[1] * 7, [1, 3, 3], [4, 1, 2], [7]])
def test_block_with_cache_equals_block_with_mask(pieces):
    """A piece sees all earlier pieces and itself: with pieces of one token that is the causal
    mask."""
    block = randomize(Block(12, 3, 2)).double().eval()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    end = torch.tensor(np.repeat(np.cumsum(pieces), pieces))
    mask = torch.arange(7)[None] < end[:, None]
    cache, out = [], []
    with torch.no_grad():
        for part in x.split(pieces, 1):
            out.append(block(part, cache=cache))
        assert_same(torch.cat(out, 1), block(x, mask))


def test_dropout_and_drop_path_rest_in_eval():
    x = torch.randn(4, 5, 12)
    block = randomize(Block(12, 3, 2, dropout=0.5, drop_path=0.5))
    bare = Block(12, 3, 2)
    bare.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert torch.equal(block.eval()(x), bare(x))
        assert_differ(block.train()(x), bare(x))


def test_drop_path_drops_whole_branches_of_a_sample_and_rescales():
    block = randomize(Block(12, 3, 2, drop_path=0.25)).double().train()
    x = torch.randn(64, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        out, outcomes = block(x), []
        for keep_a in (0, 1):
            y = x + keep_a / 0.75 * block.proj(block._attend(block.norm1(x), None, None))
            for keep_b in (0, 1):
                mlp = block.mlp(block.norm2(y))
                outcomes.append((y + keep_b / 0.75 * mlp - out).abs().amax((1, 2)) < 1e-9)
    hits = torch.stack(outcomes)
    assert bool((hits.sum(0) == 1).all())  # every sample is exactly one of the four
    kept = hits[3].double().mean()
    assert 0.3 < float(kept) < 0.8  # expected 0.5625


SHARED = dataclasses.replace(TINY, K_d=TINY.K_s, shared_codebook=True)


def test_one_codebook_for_both_levels_is_one_codebook():
    """Table 3. It is filled from the rows of both levels, moves once a step by the rows of both,
    and comes back from a checkpoint as one."""
    torch.manual_seed(0)
    model, x_f = MSST(SHARED).train(), torch.randn(9, 96, 2)
    assert model.Q_s is model.Q_d
    with torch.no_grad():
        inactive = model.tokenize(x_f)
    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hipart.Quantizer, "initialize", lambda self, *args: seen.append(args))
        model.initialize_codebooks(x_f, 9)
    (rows, per_step), = seen
    both = torch.cat([inactive["z_s"], inactive["zp_d"]], 1).flatten(0, 1)
    torch.testing.assert_close(rows, both)
    assert per_step == 9 * 64
    model.initialize_codebooks(x_f, 9)
    alone = copy.deepcopy(model.Q_s)
    o = model(x_f)
    torch.manual_seed(1)
    model.update_codebooks(o)
    torch.manual_seed(1)
    alone.update(torch.cat([o["z_s"], o["zp_d"]], 1), torch.cat([o["q_s"], o["q_d"]], 1))
    assert all(map(torch.equal, model.Q_s.state_dict().values(), alone.state_dict().values()))
    q_s, q_d = torch.tensor([[0] * 16]), torch.tensor([[0] * 48])
    hiarm = HiARM(SHARED)
    hiarm.set_codebooks(model, x_f)
    assert torch.equal(hiarm.C_s[q_s][:, 0], hiarm.C_d[q_d][:, 0])
    loaded = MSST(SHARED)
    loaded.load_state_dict(model.state_dict())
    assert loaded.Q_s is loaded.Q_d and torch.equal(loaded.Q_d.codebook, model.Q_s.codebook)


def test_one_codebook_for_both_levels_has_one_size():
    with pytest.raises(ValueError, match="needs equal K_s and K_d, found 11 and 13"):
        dataclasses.replace(TINY, shared_codebook=True)


# --------------------------------------------------------------------------------------------------
# Stage 2


def transformer(seed=0, B=2, config=TINY):
    torch.manual_seed(seed)
    model = randomize(HiARM(config), 0.3, seed).double().eval()
    x_s = torch.randn(B, 17, 2, dtype=torch.float64)
    q_s, q_d = torch.randint(TINY.K_s, (B, 16)), torch.randint(TINY.K_d, (B, 48))
    return model, x_s, q_s, q_d


def tokens(model, x_s, conf=None):
    """The likeliest token of every step of the rollout: q_s [B, 16], q_d [B, 48]."""
    o = model.rollout(x_s, conf)
    return o["logits_s"].argmax(-1), o["logits_d"].argmax(-1)


def other(q, K, rows):
    q = q.clone()
    q[:, rows] = (q[:, rows] + 1 + torch.arange(len(q[0, rows])) % (K - 1)) % K
    return q


FORMS = [
    TINY,
    dataclasses.replace(TINY, condition="every"),
    dataclasses.replace(TINY, soft=True),
    dataclasses.replace(TINY, condition="every", soft=True),
]


def form_name(config):
    return f"{config.condition}-{'soft' if config.soft else 'argmax'}"


@torch.no_grad()
@pytest.mark.parametrize("with_conf", [False, True])
@pytest.mark.parametrize("config", FORMS[:2], ids=form_name)
def test_hiarm_logits_equal_numpy(config, with_conf):
    model, x_s, q_s, q_d = transformer(config=config)
    conf = (torch.rand(2, 17) > 0.3).double() if with_conf else None
    logits_s, logits_d = model(x_s, q_s, q_d, conf)
    assert logits_s.shape == (2, 16, TINY.K_s) and logits_d.shape == (2, 48, TINY.K_d)
    for b in range(2):
        reference = hiarm_reference(
            weights(model),
            config,
            x_s[b].numpy(),
            q_s[b].numpy(),
            q_d[b].numpy(),
            conf[b].numpy() if with_conf else None,
        )
        np.testing.assert_allclose(logits_s[b].numpy(), reference[0], atol=1e-9)
        np.testing.assert_allclose(logits_d[b].numpy(), reference[1], atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("with_conf", [False, True])
@pytest.mark.parametrize("config", FORMS, ids=form_name)
def test_generation_equals_numpy(config, with_conf):
    """Free-running, keys and values kept, against a reading that starts over at every step."""
    model, x_s, _, _ = transformer(11, config=config)
    conf = (torch.rand(2, 17) > 0.3).double() if with_conf else None
    rollout, q = model.rollout(x_s, conf), tokens(model, x_s, conf)
    for b in range(2):
        reference = hiarm_reference(
            weights(model), config, x_s[b].numpy(), conf=conf[b].numpy() if with_conf else None
        )
        for name, expected in zip(("logits_s", "logits_d", "zh_s", "zh_d"), reference, strict=True):
            np.testing.assert_allclose(rollout[name][b].numpy(), expected, atol=1e-9)
        for got, logits in zip(q, reference[:2], strict=True):
            np.testing.assert_array_equal(got[b].numpy(), logits.argmax(-1))


def decoded_reference(w, c, zh_s, zh_d):
    """D_d and D_f of one sample's embeddings."""
    up = decoder_reference(w, "msst.D_s", zh_s, c.decoder_blocks)
    return (
        decoder_reference(w, "msst.D_d", zh_d, c.decoder_blocks),
        decoder_reference(w, "msst.D_f", np.concatenate([zh_d, up], -1), c.decoder_blocks),
    )


@torch.no_grad()
@pytest.mark.parametrize("in_one_pass", [False, True])
@pytest.mark.parametrize("config", FORMS, ids=form_name)
def test_stage_2_loss_equals_eq_12_in_numpy(config, in_one_pass):
    """Teacher-forced cross-entropies; in_one_pass those of generation without a past, and the pose
    error of what it decodes."""
    torch.manual_seed(1)
    model = randomize(HiPART(config), 0.3, 1).double().eval()
    x_s, x_d, x_f = (torch.randn(2, n, 2).double() for n in (17, 48, 96))
    q_s, q_d, conf = (
        torch.randint(config.K_s, (2, 16)),
        torch.randint(config.K_d, (2, 48)),
        torch.ones(2, 17),
    )
    conf[1, 4] = 0
    z_s, zp_d = torch.randn(2, 16, config.D).double(), torch.randn(2, 48, config.D).double()
    loss, terms = model.loss(x_s=x_s, conf=conf, x_d=x_d, x_f=x_f, z_s=z_s, zp_d=zp_d, q_s=q_s,
                                q_d=q_d, in_one_pass=in_one_pass)
    ce_s, ce_d, right_s, right_d, error_d, error_f = [], [], [], [], [], []
    w = weights(model)
    own = {k.removeprefix("hiarm."): v for k, v in w.items()}
    for b in range(2):
        forced = () if in_one_pass else (q_s[b].numpy(), q_d[b].numpy())
        ref_s, ref_d, zh_s, zh_d = hiarm_reference(
            own, config, x_s[b].numpy(), *forced, conf=conf[b].numpy(), history=not in_one_pass
        )
        ce_s += list(-log_softmax(ref_s)[np.arange(16), q_s[b].numpy()])
        ce_d += list(-log_softmax(ref_d)[np.arange(48), q_d[b].numpy()])
        right_s += list(ref_s.argmax(-1) == q_s[b].numpy())
        right_d += list(ref_d.argmax(-1) == q_d[b].numpy())
        y_d, y_f = decoded_reference(w, config, zh_s, zh_d)
        error_d += list(np.linalg.norm(y_d - x_d[b].numpy(), axis=-1))
        error_f += list(np.linalg.norm(y_f - x_f[b].numpy(), axis=-1))
    expected = np.mean(ce_s) + config.lambda_d * np.mean(ce_d)
    if in_one_pass:
        expected += config.lambda_p * (np.mean(error_d) + np.mean(error_f))
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    assert float(terms["sparse"]) == pytest.approx(np.mean(ce_s), rel=1e-9)
    assert float(terms["dense"]) == pytest.approx(np.mean(ce_d), rel=1e-9)
    if in_one_pass:
        assert float(terms["pose"]) == pytest.approx(np.mean(error_d) + np.mean(error_f))
    assert ("pose" in terms) == in_one_pass
    assert not any(t.requires_grad for t in terms.values())
    assert float(terms["acc_s"]) == pytest.approx(np.mean(right_s), abs=1e-6)
    assert float(terms["acc_d"]) == pytest.approx(np.mean(right_d), abs=1e-6)


def test_soft_training_reaches_every_weight_through_generation():
    """The pose error alone must train everything that generation used, from the last part back to
    the SOS token."""
    config = dataclasses.replace(TINY, condition="every", soft=True)
    model = randomize(HiPART(config), 0.3)
    model.msst.requires_grad_(False)
    o = model.hiarm.rollout(torch.randn(2, 17, 2), torch.ones(2, 17))
    zh_s, zh_d = o["zh_s"], o["zh_d"]
    x_d, x_f = model.msst.decode_embeddings(
        zh_s[:, -1:].expand(-1, 16, -1), zh_d[:, -3:].repeat(1, 16, 1)
    )  # last part
    (x_d.square().sum() + x_f.square().sum()).backward()
    silent = [
        n
        for n, p in model.hiarm.named_parameters()
        if p.grad is None or float(p.grad.abs().max()) == 0
    ]
    assert silent == ["missing.weight"]  # nobody is missing here
    assert all(p.grad is None for p in model.msst.parameters())


def test_an_unknown_condition_is_refused():
    with pytest.raises(ValueError, match="condition must be .* found"):
        HiARM(dataclasses.replace(TINY, condition="none"))


@torch.no_grad()
@pytest.mark.parametrize("i", range(16))
def test_causality(i):
    """Nothing of parts >= i reaches the sparse logits of part i; its dense logits see its own
    sparse token on top."""
    model, x_s, q_s, q_d = transformer(2)
    base_s, base_d = model(x_s, q_s, q_d)
    # everything of part i and later changes
    new_s, new_d = model(
        x_s, other(q_s, TINY.K_s, slice(i, 16)), other(q_d, TINY.K_d, slice(3 * i, 48))
    )
    assert_same(new_s[:, : i + 1], base_s[:, : i + 1])
    assert_same(new_d[:, : 3 * i], base_d[:, : 3 * i])
    for j in range(3):
        assert_differ(new_d[:, 3 * i + j], base_d[:, 3 * i + j])
    # the dense tokens of part i and everything after part i change, its sparse token does not
    new_s, new_d = model(
        x_s, other(q_s, TINY.K_s, slice(i + 1, 16)), other(q_d, TINY.K_d, slice(3 * i, 48))
    )
    assert_same(new_s[:, : i + 1], base_s[:, : i + 1])
    assert_same(new_d[:, : 3 * i + 3], base_d[:, : 3 * i + 3])
    # one sparse token, or one dense token, reaches every later part
    for changed in (
        model(x_s, other(q_s, TINY.K_s, slice(i, i + 1)), q_d),
        *(model(x_s, q_s, other(q_d, TINY.K_d, slice(3 * i + j, 3 * i + j + 1))) for j in range(3)),
    ):
        for k in range(i + 1, 16):
            assert_differ(changed[0][:, k], base_s[:, k])
            assert_differ(changed[1][:, 3 * k : 3 * k + 3], base_d[:, 3 * k : 3 * k + 3])


@pytest.mark.parametrize("condition", ["sos", "every"])
def test_gradients_respect_the_factorisation(condition):
    """The same by autograd: d logits / d embeddings is exactly zero where Eq. 8 has no arrow, and
    only there.

    Every position holds a token of its own, so row k of a codebook is the embedding at position k.
    """
    config = dataclasses.replace(TINY, K_s=16, K_d=48, condition=condition)
    model, x_s, _, _ = transformer(3, B=1, config=config)
    codes = [model.C_s.requires_grad_(True), model.C_d.requires_grad_(True)]
    logits_s, logits_d = model(x_s, torch.arange(16)[None], torch.arange(48)[None])
    direction = torch.randn(48, dtype=torch.float64)
    for i in range(16):
        sparse = (logits_s[0, i] * direction[:16]).sum()
        dense = (logits_d[0, 3 * i : 3 * i + 3] * direction).sum()
        for target, reaches_s in (
            (sparse, [k < i for k in range(16)]),
            (dense, [k <= i for k in range(16)]),
        ):
            grads = torch.autograd.grad(target, codes, retain_graph=True, materialize_grads=True)
            by_s, by_d = (g.abs().sum(-1) > 0 for g in grads)
            assert by_s.tolist() == reaches_s
            assert by_d.tolist() == [k < i for k in range(16) for _ in range(3)]


@torch.no_grad()
def test_dense_slots_differ_and_order_within_a_part_matters():
    model, x_s, q_s, q_d = transformer(4)
    _, base_d = model(x_s, q_s, q_d)
    for i in range(16):
        a, b, c = base_d[:, 3 * i : 3 * i + 3].unbind(1)
        assert_differ(a, b)
        assert_differ(b, c)
        assert_differ(a, c)
    q_d[:, 3:6] = torch.tensor([1, 2, 3])
    base_s, base_d = model(x_s, q_s, q_d)
    swapped = q_d.clone()
    swapped[:, 3:6] = torch.tensor([2, 1, 3])
    new_s, new_d = model(x_s, q_s, swapped)
    assert_same(new_s[:, :2], base_s[:, :2])
    assert_same(new_d[:, :6], base_d[:, :6])
    assert_differ(new_s[:, 2:], base_s[:, 2:])
    assert_differ(new_d[:, 6:], base_d[:, 6:])


@torch.no_grad()
def test_parts_and_slots_are_told_apart_from_the_start():
    """Before any training and with equal tokens everywhere, no two parts and no two dense slots
    agree."""
    torch.manual_seed(0)
    model = HiARM(TINY).double().eval()
    x_s, q_s, q_d = (
        torch.randn(1, 17, 2).double(),
        torch.zeros(1, 16).long(),
        torch.zeros(1, 48).long(),
    )
    logits_s, logits_d = model(x_s, q_s, q_d)
    assert len(torch.unique(logits_s[0].round(decimals=9), dim=0)) == 16
    assert len(torch.unique(logits_d[0].round(decimals=9), dim=0)) == 48


@torch.no_grad()
@pytest.mark.parametrize("joint", range(17))
def test_every_coordinate_of_the_sparse_pose_reaches_every_token(joint):
    model, x_s, q_s, q_d = transformer(5)
    base = model(x_s, q_s, q_d)
    for axis in (0, 1):
        moved = x_s.clone()
        moved[:, joint, axis] += 0.5
        for a, b in zip(base, model(moved, q_s, q_d), strict=True):
            assert float((a - b).abs().amax(-1).min()) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("with_conf", [False, True])
def test_generate_equals_repeated_forward(with_conf):
    """Argmax step by step through the teacher-forced model, with rubbish in all places not yet
    written."""
    for seed in range(3):
        model, x_s, q_s, q_d = transformer(seed, B=5)
        conf = (torch.rand(5, 17) > 0.3).double() if with_conf else None
        for i in range(16):
            q_s[:, i] = model(x_s, q_s, q_d, conf)[0][:, i].argmax(-1)
            q_d[:, 3 * i : 3 * i + 3] = model(x_s, q_s, q_d, conf)[1][:, 3 * i : 3 * i + 3].argmax(
                -1
            )
        made_s, made_d = tokens(model, x_s, conf)
        assert made_s.dtype == made_d.dtype == torch.int64
        assert torch.equal(made_s, q_s) and torch.equal(made_d, q_d)
        assert len(torch.unique(made_s)) > 1  # the test would be empty if one token won everywhere
        one_s, one_d = tokens(model, x_s[2:3], None if conf is None else conf[2:3])
        assert torch.equal(one_s, made_s[2:3]) and torch.equal(
            one_d, made_d[2:3]
        )  # samples do not mix


def test_token_loss_is_the_cross_entropy_with_all_near_codes():
    """Soft targets, read from their definition in float64; with no spread, they are one-hot."""
    torch.manual_seed(0)
    logits, z, C = (torch.randn(*shape).double() for shape in ((2, 3, 7), (2, 3, 5), (7, 5)))
    q = torch.cdist(z, C[None]).argmin(-1)
    m, spread = torch.tensor(1.7).double(), 2.0
    for t, sharp in ((spread, False), (1e-4, True), (1e-40, True), (0.0, True)):
        expected = []
        for b, i in np.ndindex(2, 3):
            distances = ((z[b, i].numpy() - C.numpy()) ** 2).sum(-1)
            near = np.exp(-(distances - distances.min()) / (spread * 1.7))
            near = np.eye(7)[q[b, i]] if sharp else near / near.sum()
            expected.append(-near @ log_softmax(logits[b, i].numpy()[None])[0])
        loss = hipart.token_loss(logits, q, z, C, m, t)
        assert float(loss) == pytest.approx(np.mean(expected), rel=1e-9)


def test_training_forgets_a_share_of_the_history_and_evaluation_none():
    model = HiPART(dataclasses.replace(TINY, history_dropout=0.25, dropout=0.0)).hiarm
    zh_s, zh_d = torch.randn(400, 3, TINY.D), torch.randn(400, 3, 3, TINY.D)
    kept = (model.summarize(zh_s, zh_d) != 0).float().mean(-1)  # [400, 3], 1 or 0
    assert set(kept.flatten().tolist()) == {0.0, 1.0}
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.05)
    assert (model.eval().summarize(zh_s, zh_d) != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("config", FORMS, ids=form_name)
def test_one_pass_is_the_rollout_of_a_model_that_remembers_nothing(config, monkeypatch):
    model, x_s, _, _ = transformer(3, B=4, config=config)
    conf = masked(0, 4)[1].double()
    once = model.one_pass(x_s, conf)
    with_history = model.rollout(x_s, conf)["zh_d"]
    monkeypatch.setattr(model, "summarize", lambda zh_s, zh_d: zh_s.new_zeros(4, 1, config.width))
    o = model.rollout(x_s, conf)
    assert once.keys() == o.keys()
    assert all(torch.allclose(once[name], o[name], atol=1e-10) for name in o)
    assert not torch.allclose(once["zh_d"], with_history, atol=1e-3)


def test_hiarm_keeps_its_own_frozen_copy_of_the_codebooks():
    model = HiPART(TINY)
    assert not [n for n, _ in model.hiarm.named_parameters() if n.startswith("C_")]
    model.msst.Q_s.active.fill_(True), model.msst.Q_d.active.fill_(True)
    x_f = torch.randn(5, 96, 2)
    model.hiarm.set_codebooks(model.msst, x_f)
    assert torch.equal(model.hiarm.C_s, model.msst.Q_s.codebook)
    assert torch.equal(model.hiarm.C_d, model.msst.Q_d.codebook)
    for z, C, m in (("z_s", model.hiarm.C_s, model.hiarm.m_s),
                    ("zp_d", model.hiarm.C_d, model.hiarm.m_d)):
        z = model.msst.tokenize(x_f)[z].detach().double().flatten(0, 1)
        assert float(m) == pytest.approx(float(torch.cdist(z, C.double()).amin(1).pow(2).mean()))
    model.msst.Q_s.codebook.add_(1)
    assert not torch.equal(model.hiarm.C_s, model.msst.Q_s.codebook)  # a copy: MSST may move on


@torch.no_grad()
@pytest.mark.parametrize("config", FORMS, ids=form_name)
def test_densify_follows_the_person_through_the_image(config):
    """The model frame takes the place in the image out: moving the detection moves the result by as
    much."""
    torch.manual_seed(0)
    model = randomize(HiPART(config), 0.3).eval()
    model.hiarm.set_codebooks(model.msst, torch.randn(3, 96, 2))
    x_s = torch.randn(3, 17, 2) * 0.125
    conf = torch.ones(3, 17)
    conf[1, [0, 4, 7]] = 0
    x_d, x_f = model.densify(x_s, conf)
    assert x_d.shape == (3, 48, 2) and x_f.shape == (3, 96, 2)
    pelvis = detected_pelvis(x_s, conf)
    q_s, q_d = tokens(model.hiarm, (x_s - pelvis) / SCALE, conf)
    o = model.hiarm.rollout((x_s - pelvis) / SCALE, conf)
    made = (
        model.msst.decode_embeddings(o["zh_s"], o["zh_d"])
        if config.soft
        else model.msst.decode(q_s, q_d)
    )
    for got, framed in zip((x_d, x_f), made, strict=True):
        torch.testing.assert_close(got, framed * SCALE + pelvis)
    shift = torch.tensor([0.25, -0.5])
    for got, here in zip(model.densify(x_s + shift, conf), (x_d, x_f), strict=True):
        torch.testing.assert_close(got, here + shift, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Generation for use: generation.py


def masked(seed, B):
    """Detections of B people, some of whose joints are missing."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 17, 2, generator=g), (torch.rand(B, 17, generator=g) > 0.2).float()


@pytest.mark.parametrize("config", FORMS, ids=form_name)
@given(seed=st.integers(0, 2**31), B=st.integers(1, 5), with_conf=st.booleans())
@settings(max_examples=10, deadline=None)
def test_generation_for_use_equals_the_rollout(config, seed, B, with_conf):
    model, (x_s, conf) = randomize(HiARM(config), 0.3, seed).double().eval(), masked(seed, B)
    x_s, conf = x_s.double(), conf.double() if with_conf else None
    with torch.no_grad():
        o = model.rollout(x_s, conf)
    with lean_mode():
        zh_s, zh_d = generate(model, x_s, conf)
    assert_same(zh_s, o["zh_s"])
    assert_same(zh_d, o["zh_d"])


@torch.no_grad()
@pytest.mark.parametrize("soft", [False, True])
def test_densify_at_the_papers_size_is_what_the_rollout_decodes(soft):
    """In float32, a hundred times as many numbers: rounding must not change what is made."""
    torch.manual_seed(0)
    model, (x_s, conf) = HiPART(Config(soft=soft)).eval(), masked(0, 3)
    pelvis = detected_pelvis(x_s, conf)
    o = model.hiarm.rollout(to_model_frame(x_s, pelvis), conf)
    made = model.msst.decode_embeddings(o["zh_s"], o["zh_d"])
    for got, expected in zip(model.densify(x_s, conf), made, strict=True):
        torch.testing.assert_close(
            got, from_model_frame(expected, pelvis), rtol=0, atol=1e-5
        )


def python_calls(run):
    """How many functions Python calls, its own and built-in ones."""
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event) if "call" in event else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(calls)


@torch.no_grad()
def test_generation_for_use_makes_half_the_calls():
    """What it is for, without a clock."""
    model, x_s = HiARM(Config()).eval(), masked(0, 1)[0]
    plain = python_calls(lambda: model.rollout(x_s))
    with lean_mode():
        lean = python_calls(lambda: generate(model, x_s, None))
    assert 1000 < lean < plain / 2


@pytest.fixture(scope="module")
def densifier():
    return randomize(HiPART(dataclasses.replace(TINY, soft=True)), 0.3).eval()


@given(N=st.integers(0, 9), at_once=st.integers(1, 10), with_conf=st.booleans())
@settings(max_examples=20, deadline=None)
def test_chunks_do_not_change_what_is_made(densifier, N, at_once, with_conf):
    densifier = copy.deepcopy(densifier).double()  # sums of other orders differ in their last bits
    x_s, conf = (x.double() for x in masked(N, N))
    conf = conf if with_conf else None
    memory = next(m for m in range(1, 100) if poses_at_once(TINY, m) > 9)
    whole = densifier.densify(x_s, conf, memory)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hipart, "poses_at_once", lambda *args: at_once)
        pieces = densifier.densify(x_s, conf, memory)
    for a, b, n in zip(whole, pieces, (48, 96), strict=True):
        assert a.shape == b.shape == (N, n, 2)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@given(memory=st.integers(0, 4000), more=st.integers(1, 4), width=st.sampled_from([16, 128, 512]))
@settings(max_examples=30, deadline=None)
def test_more_memory_means_more_poses_at_once(memory, more, width):
    small, large = Config(width=width), Config(width=width, gcsab_blocks=20)
    n = poses_at_once(small, memory)
    assert 1 <= poses_at_once(large, memory) <= n <= poses_at_once(small, memory * more)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("history", [True, False])
def test_densify_keeps_to_its_memory(history):
    """In a process of its own: beside input and output, what many poses add to the peak."""
    code = f"""
import torch
from benchmarks.machine import memory
from hipart import Config, HiPART

torch.set_num_threads(1)
model = HiPART(Config(gcsab_blocks=2, ph_blocks=1)).eval()
x_s, conf = torch.rand(1000, 17, 2), torch.ones(1000, 17)
model.densify(x_s[:2], conf[:2], history={history})
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = memory("VmRSS")
model.densify(x_s, conf, memory=64, history={history})
print(memory("VmHWM") - before - 1000 * 144 * 2 * 4 / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 10 < float(done.stdout) < 64, done.stderr  # all at once it would be 450


def test_densify_leaves_pytorch_as_it_was(densifier):
    for enabled in (True, False):
        torch.backends.mkldnn.enabled = enabled
        try:
            with pytest.raises(RuntimeError):
                densifier.densify(torch.zeros(2, 16, 2))
            densifier.densify(torch.zeros(2, 17, 2))
            assert torch.backends.mkldnn.enabled == enabled and torch.is_grad_enabled()
        finally:
            torch.backends.mkldnn.enabled = True


def test_what_densify_made_may_be_trained_on(densifier):
    x_d, x_f = densifier.densify(torch.randn(2, 17, 2).requires_grad_())
    assert not x_d.requires_grad and not x_f.is_inference()
    layer = torch.nn.Linear(2, 2)
    layer(torch.cat([x_d, x_f], 1)).sum().backward()  # an inference tensor would be refused
    assert float(layer.weight.grad.abs().min()) > 0


def test_densify_has_no_dropout():
    model, x_s = randomize(HiPART(dataclasses.replace(TINY, dropout=0.5)), 0.3), masked(0, 2)[0]
    trained = model.train().densify(x_s)
    assert all(map(torch.equal, trained, model.eval().densify(x_s)))


# --------------------------------------------------------------------------------------------------
# HiARM as a distribution: log_prob, sample


@torch.no_grad()
@pytest.mark.parametrize("with_conf", [False, True])
@pytest.mark.parametrize("config", FORMS[1:3], ids=form_name)
def test_log_prob_equals_numpy(config, with_conf):
    """Eq. 7 and 8: the product of what every token has, given the past."""
    model, x_s, q_s, q_d = transformer(config=config)
    conf = (torch.rand(2, 17) > 0.3).double() if with_conf else None
    got = model.log_prob(x_s, q_s, q_d, conf)
    assert got.shape == (2,) and got.dtype == torch.float64
    for b in range(2):
        own = None if conf is None else conf[b].numpy()
        tokens_b = q_s[b].numpy(), q_d[b].numpy()
        reference = hiarm_reference(weights(model), config, x_s[b].numpy(), *tokens_b, own)
        total = sum(log_softmax(logits[k])[q] for logits, of in zip(reference[:2], tokens_b,
                    strict=True) for k, q in enumerate(of))  # fmt: skip
        assert float(got[b]) == pytest.approx(total, abs=1e-9)


@torch.no_grad()
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_probabilities_of_all_token_sequences_sum_to_one(seed):
    """A body of two parts has 3^2 2^6 = 576 of them. If a token saw itself, or one that is drawn
    later or beside it, this would fail."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hipart, "J_S", 2)
        model = randomize(HiARM(dataclasses.replace(TINY, K_s=3, K_d=2)), 0.6, seed).double().eval()
        q = torch.tensor(list(itertools.product(*[range(3)] * 2, *[range(2)] * 6)))
        x_s = torch.randn(1, 17, 2, dtype=torch.float64).expand(len(q), -1, -1)
        p = model.log_prob(x_s, q[:, :2], q[:, 2:]).exp()
    assert len(q) == 576 and float(p.max()) > 2 / 576
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("i", [0, 7, 15])
def test_probabilities_of_a_part_sum_to_one_whatever_came_before(i):
    """The tokens of part i, all others held: what stands behind it cancels out only in the parts
    up to it, so the last factors are left out by hand."""
    config = dataclasses.replace(TINY, K_s=3, K_d=2)
    model, x_s, q_s, q_d = transformer(i, B=1, config=config)
    own = torch.tensor(list(itertools.product(range(3), *[range(2)] * 3)))
    for _ in range(3):
        q_s, q_d = torch.randint(3, (len(own), 16)), torch.randint(2, (len(own), 48))
        q_s[:], q_d[:] = q_s[:1].clone(), q_d[:1].clone()  # one past for all
        q_s[:, i], q_d[:, 3 * i : 3 * i + 3] = own[:, 0], own[:, 1:]
        logits_s, logits_d = model(x_s.expand(len(own), -1, -1), q_s, q_d)
        p = token_log_prob(logits_s, q_s)[:, i].exp()
        p = p * token_log_prob(logits_d, q_d)[:, 3 * i : 3 * i + 3].sum(1).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)


def generative(config=TINY, seed=0):
    """A model in float64 whose codes can be told from its embeddings, and four detections."""
    model, (x_s, conf) = randomize(HiPART(config), 0.3, seed).eval(), masked(seed, 4)
    model.hiarm.set_codebooks(model.msst, torch.randn(2, 96, 2))
    return model.double(), x_s.double() * SCALE, conf.double()


def drawn_by(model, x_s, conf, *args, **options):
    """What `sample` returns, and the tokens q_s [B n, 16] and q_d [B n, 48] that were decoded."""
    seen, decode = [], model.msst.decode_embeddings
    with pytest.MonkeyPatch.context() as m:
        m.setattr(model.msst, "decode_embeddings", lambda *z: (seen.append(z), decode(*z))[1])
        made = model.sample(x_s, conf, *args, **options)
    q = [torch.cdist(torch.cat(z), C).argmin(-1) for z, C in zip(
        zip(*seen, strict=True), (model.hiarm.C_s, model.hiarm.C_d), strict=True)]  # fmt: skip
    return made, q


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(temperature=0.4), dict(temperature=2.0, top_k=3)])
@pytest.mark.parametrize("config", FORMS[1:3], ids=form_name)
def test_samples_are_the_tokens_drawn_and_log_prob_is_the_models_own(config, options):
    model, x_s, conf = generative(config)
    for c in (conf, None):
        g = torch.Generator().manual_seed(5)
        (x_d, x_f, log_prob), (q_s, q_d) = drawn_by(model, x_s, c, 3, generator=g, **options)
        assert x_d.shape == (4, 3, 48, 2) and x_f.shape == (4, 3, 96, 2)
        many = [None if a is None else a.repeat_interleave(3, 0) for a in (x_s, c)]
        pelvis = detected_pelvis(*many)
        expected = model.hiarm.log_prob(to_model_frame(many[0], pelvis), q_s, q_d, many[1])
        torch.testing.assert_close(log_prob.flatten(), expected, rtol=0, atol=1e-6)
        for got, y in zip((x_d, x_f), model.msst.decode(q_s, q_d), strict=True):
            assert_same(got.flatten(0, 1), from_model_frame(y, pelvis))
        assert len(torch.unique(torch.cat([q_s, q_d], 1), dim=0)) == 12  # no two are alike
        g.manual_seed(5)
        assert all(map(torch.equal, model.sample(x_s, c, 3, generator=g, **options),
                       (x_d, x_f, log_prob)))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [dict(temperature=1e-4), dict(top_k=1), dict(temperature=1e-40)])
def test_cold_samples_are_the_likeliest_chain(options):
    model, x_s, conf = generative()  # not soft: `densify` hands on the likeliest code
    made = model.densify(x_s, conf)
    for got, expected in zip(model.sample(x_s, conf, 2, **options), made, strict=False):
        assert_same(got, expected[:, None].expand(-1, 2, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (1.5, 4)])
def test_first_tokens_are_as_frequent_as_the_softmax_says(temperature, top_k):
    """Chi-square of 4,000 draws of the first sparse token, against a reading in NumPy."""
    model, x_s, conf = generative()
    g, n = torch.Generator().manual_seed(1), 4000
    with pytest.MonkeyPatch.context() as m:  # one part is enough, and 16 times as fast
        m.setattr(hipart, "generate", lambda hiarm, x, c, draw: first_part(hiarm, x, c, draw, seen))
        seen = []
        model.sample(x_s[:1], conf[:1], n, temperature, top_k, g)
    count = torch.bincount(torch.cat(seen), minlength=TINY.K_s).numpy()
    pelvis = detected_pelvis(x_s[:1], conf[:1])
    w = {k.removeprefix("hiarm."): v for k, v in weights(model).items()}
    x = to_model_frame(x_s[:1], pelvis)[0].numpy()
    logits = hiarm_reference(w, TINY, x, conf=conf[0].numpy())[0][0]
    p = np.exp(log_softmax(logits / temperature))
    p[np.argsort(-p)[top_k or len(p) :]] = 0
    p /= p.sum()
    assert count[p == 0].sum() == 0
    expected = n * p[p > 0]
    chi_square = ((count[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 40  # p below 1e-4 for 10 degrees of freedom or fewer


def first_part(hiarm, x_s, conf, draw, seen):
    """The sparse token of part 0 of many times one pose, drawn from teacher-forced logits; all
    other tokens are code 0."""
    n = len(x_s)
    nothing = torch.zeros(n, 16, dtype=torch.int64), torch.zeros(n, 48, dtype=torch.int64)
    one = hiarm(x_s[:1], nothing[0][:1], nothing[1][:1], conf[:1])[0]  # [1, 16, K_s]
    z = draw(one[:, 0].expand(n, -1), hiarm.C_s)
    seen.append(torch.cdist(z, hiarm.C_s).argmin(-1))
    return hiarm.C_s[nothing[0]], hiarm.C_d[nothing[1]]


@torch.no_grad()
def test_samples_come_in_chunks_without_mixing_inputs():
    """One pose at a time, cold: each hypothesis belongs to its own detection."""
    model, x_s, conf = generative()
    whole = model.sample(x_s, conf, 3, top_k=1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(hipart, "poses_at_once", lambda config, memory: 5)
        pieces = model.sample(x_s, conf, 3, top_k=1)
    for a, b in zip(whole, pieces, strict=True):
        assert_same(a, b)
        assert not a.is_inference()
    assert [tuple(y.shape) for y in model.sample(x_s[:0], conf[:0], 3)] == [
        (0, 3, 48, 2), (0, 3, 96, 2), (0, 3)]  # fmt: skip


@pytest.mark.parametrize("options, said", [
    (dict(n=0), "n must be at least 1"), (dict(temperature=0.0), "temperature must be positive"),
    (dict(temperature=-1.0), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(top_k=0), "top_k from 1 to 11"), (dict(top_k=12), "top_k from 1 to 11"),
])  # fmt: skip
def test_sample_refuses_options_that_mean_nothing(densifier, options, said):
    with pytest.raises(ValueError, match=said):
        densifier.sample(torch.zeros(1, 17, 2), None, **dict(n=1) | options)


# --------------------------------------------------------------------------------------------------
# No step of a training waits for the device


def test_codebooks_know_from_their_weights_whether_they_are_active():
    """The buffer tells, and Python remembers: after k-means, and after a checkpoint is loaded."""
    model, x_f = MSST(TINY), torch.randn(24, 96, 2)
    assert not model.Q_s.is_active() and not model.Q_d.is_active()
    inactive = MSST(TINY)
    inactive.load_state_dict(model.state_dict())
    assert not inactive.Q_s.is_active()
    model.initialize_codebooks(x_f, 24)
    assert model.Q_s.is_active() and model.Q_d.is_active()
    loaded = MSST(TINY)
    loaded.load_state_dict(model.state_dict())
    assert loaded.Q_s.is_active() and loaded.Q_d.is_active()


class NoReads(TorchDispatchMode):
    """Refuses operations that hand a value to Python, or a shape that depends on values: on a GPU,
    Python would wait for all that it has asked for so far."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh")
        assert not by_mask and name not in reads, f"{op} in a training step"
        return op(*args, **(kwargs or {}))


def stage_1_step(device):
    model = HiPART(TINY).msst.to(device)
    x_f = torch.randn(24, 96, 2, device=device)
    model.initialize_codebooks(x_f, 24)
    x_d, a = x_f[:, ::2].clone(), torch.zeros(24, dtype=torch.int64, device=device)

    def loss():
        loss, terms, o = model.loss(x_f, x_d, a)
        return loss, terms, lambda: model.update_codebooks(o)

    return model, loss


def stage_2_step(device, in_one_pass):
    model = HiPART(dataclasses.replace(TINY, condition="every", soft=True, soft_targets=2.0,
                                       history_dropout=0.5)).to(device)
    b = dict(x_s=masked(0, 4)[0], conf=masked(0, 4)[1], x_d=torch.randn(4, 48, 2),
             x_f=torch.randn(4, 96, 2), z_s=torch.randn(4, 16, TINY.D),
             zp_d=torch.randn(4, 48, TINY.D), q_s=torch.randint(TINY.K_s, (4, 16)),
             q_d=torch.randint(TINY.K_d, (4, 48)))  # fmt: skip
    b = {name: t.to(device) for name, t in b.items()}

    def loss():
        return *model.loss(**b, in_one_pass=in_one_pass), lambda: None

    return model, loss


def stage_3_step(device, kind, n_points):
    model = (kind(n_points, 12, 2) if n_points else kind(32)).to(device)
    x, y = torch.randn(4, n_points or 17, 2, device=device), torch.randn(4, 17, 3, device=device)
    conf = masked(0, 4)[1].to(device)

    def loss():
        out = model(x, conf)
        error = (out - y if n_points else out[1]).norm(dim=-1).mean()
        return error, dict(error=error.detach()), lambda: None

    return model, loss


STEPS = dict(
    stage_1=stage_1_step,
    stage_2=lambda device: stage_2_step(device, False),
    stage_2_in_one_pass=lambda device: stage_2_step(device, True),
    regressor=lambda device: stage_3_step(device, Regressor, 0),
    spatial_17=lambda device: stage_3_step(device, SpatialLifter, 17),
    spatial_161=lambda device: stage_3_step(device, SpatialLifter, 161),
    mlp_17=lambda device: stage_3_step(device, MLPLifter, 17),
    mlp_161=lambda device: stage_3_step(device, MLPLifter, 161),
)


def steps(name, device, guard):
    """Three steps of a training, the last two under guard."""
    model, loss_of = STEPS[name](device)
    optimizer, sums = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), {}

    def step():
        loss, terms, after = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after()
        for term, value in terms.items():
            sums[term] = sums.get(term, 0.0) + value

    step()  # makes the optimiser's state, and the codebooks' is read
    with guard():
        step()
        step()
    assert all(math.isfinite(value) for value in sums.values())


@pytest.mark.parametrize("name", STEPS)
def test_no_step_hands_a_value_to_python(name):
    if backend("cpu")[0] == "reference":
        pytest.skip("the reference implementation looks for non-finite values")
    steps(name, torch.device("cpu"), NoReads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_gpu(name):
    @contextmanager
    def guard():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    steps(name, torch.device("cuda"), guard)


# --------------------------------------------------------------------------------------------------
# Missing joints, in every place that takes conf


TAKERS = (
    "detected_pelvis",
    "densify",
    "densify_every_soft",
    "tokens",
    "logits",
    "features",
    "SpatialLifter_17",
    "SpatialLifter_161",
)


DENSE = torch.randn(4, 144, 2, generator=torch.Generator().manual_seed(0))


def as_tuple(f):
    """The function f, but its output is always a tuple of tensors."""

    def g(*args):
        out = f(*args)
        return out if isinstance(out, tuple) else (out,)

    return g


def lifters(lifter_class):
    """NAME_17 and NAME_161 -> f(x_s, conf): small lifters of both numbers of points."""
    functions = {}
    for n in (17, 161):
        lifter = randomize(lifter_class(n, 12, 2), 0.2).eval()
        functions[f"{lifter_class.__name__}_{n}"] = as_tuple(
            lambda x, conf=None, lifter=lifter, n=n: lifter(torch.cat([x, DENSE], 1)[:, :n], conf)
        )
    return functions


@pytest.fixture(scope="module")
def takers():
    """name -> f(x_s, conf), a tuple of tensors, for everything here that takes detections."""
    torch.manual_seed(0)
    hipart = randomize(HiPART(TINY), 0.3).eval()
    q_s, q_d = torch.randint(TINY.K_s, (4, 16)), torch.randint(TINY.K_d, (4, 48))
    ours = randomize(HiPART(dataclasses.replace(TINY, condition="every", soft=True)), 0.3).eval()
    functions = dict(
        detected_pelvis=detected_pelvis,
        densify=hipart.densify,
        tokens=lambda x, conf=None: tokens(hipart.hiarm, x, conf),
        densify_every_soft=ours.densify,
        logits=lambda x, conf=None: hipart.hiarm(x, q_s, q_d, conf),
        features=lambda x, conf=None: tuple(
            lifting_features(torch.cat([x, DENSE], 1), conf).values()
        ),
    )
    return {name: as_tuple(f) for name, f in functions.items()} | lifters(SpatialLifter)


def hidden_joints():
    x_s, conf = torch.randn(4, 17, 2), torch.ones(4, 17)
    conf[0, 0] = conf[1, [3, 9]] = conf[2, [0, 1, 16]] = 0
    return x_s * (conf > 0)[..., None], conf


@torch.no_grad()
@pytest.mark.parametrize("filler", [7.0, -1e4])
@pytest.mark.parametrize("name", TAKERS)
def test_coordinates_of_a_missing_joint_do_not_matter(takers, name, filler):
    x_s, conf = hidden_joints()
    for a, b in zip(
        takers[name](x_s, conf),
        takers[name](x_s.masked_fill((conf == 0)[..., None], filler), conf),
        strict=True,
    ):
        assert torch.equal(a, b)


@torch.no_grad()
def test_nan_is_a_fair_coordinate_of_a_missing_joint(takers):
    """Detectors write NaN for what they did not find. 0 * NaN is NaN: masks have to select, not
    multiply."""
    x_s, conf = hidden_joints()
    nan = x_s.masked_fill((conf == 0)[..., None], float("nan"))
    leaks = [
        name
        for name in TAKERS
        if not all(map(torch.equal, takers[name](x_s, conf), takers[name](nan, conf)))
    ]
    assert leaks == []


@torch.no_grad()
@pytest.mark.parametrize("name", TAKERS)
def test_no_confidence_means_all_visible(takers, name):
    x_s = torch.randn(4, 17, 2)
    for conf in (torch.ones(4, 17), torch.rand(4, 17) * 0.9 + 0.05):
        assert all(map(torch.equal, takers[name](x_s), takers[name](x_s, conf)))


@pytest.mark.parametrize("joint", range(17))
def test_a_learned_token_stands_in_for_each_missing_joint(joint):
    """Hiding a joint is not the same as seeing it at the origin, and the token that stands in has a
    gradient."""
    x_s, conf = torch.randn(4, 17, 2), torch.ones(4, 17)
    conf[:, joint] = 0
    x_s[:, joint] = 0
    hiarm, lifter = (
        randomize(HiARM(TINY), 0.3).eval(),
        randomize(SpatialLifter(17, 12, 2), 0.2).eval(),
    )
    q_s, q_d = torch.zeros(4, 16).long(), torch.zeros(4, 48).long()
    assert_differ(hiarm(x_s, q_s, q_d, conf)[0], hiarm(x_s, q_s, q_d)[0])
    hiarm(x_s, q_s, q_d, conf)[0].square().sum().backward()
    moved = hiarm.missing.weight.grad.abs().amax(0) > 0
    assert moved.tolist() == [j == joint for j in range(17)]
    lifter(x_s, conf).square().sum().backward()
    assert float(lifter.missing.grad.abs().max()) > 0


# --------------------------------------------------------------------------------------------------
# Stage 3


def features_reference(x, conf):
    """lifting_features of one sample x [161, 2] in loops, from its docstring."""
    seen = [1.0] * 17 if conf is None else [float(v > 0) for v in conf]
    visible = [x[j] for j in range(17) if seen[j]]
    pelvis = x[0] if seen[0] else (sum(visible) / len(visible) if visible else np.zeros(2))
    sparse = [pelvis] + [x[j] - pelvis if seen[j] else np.zeros(2) for j in range(1, 17)]
    dense, fine = [], []
    for i in range(16):
        joint = PART_JOINT[i]
        triple = x[17 + 3 * i : 17 + 3 * i + 3]
        mean = (triple[0] + triple[1] + triple[2]) / 3
        for j in range(3):
            gap = mean - x[joint] if seen[joint] else np.zeros(2)
            dense.append(np.concatenate([mean - pelvis, gap, triple[j] - mean]))
    for k in range(48):
        for m in range(2):
            fine.append(x[65 + 2 * k + m] - x[17 + k])
    return np.array(sparse), np.array(dense), np.array(fine), np.array(seen)


@pytest.mark.parametrize("with_conf", [False, True])
def test_lifting_features_equal_plain_loops(with_conf):
    x, conf = torch.randn(6, 161, 2, dtype=torch.float64), None
    if with_conf:
        conf = torch.rand(6, 17)
        conf[conf < 0.3] = 0
        conf[0, 0], conf[1] = 0, 0
    got = lifting_features(x, conf)
    assert list(got) == ["sparse", "dense", "fine"]
    for b in range(6):
        *levels, visible = features_reference(
            x[b].numpy(), None if conf is None else conf[b].numpy()
        )
        for ours, expected in zip(got.values(), levels, strict=True):
            np.testing.assert_allclose(ours[b].numpy(), expected, atol=1e-12)
        np.testing.assert_array_equal(visible_joints(x[:, :17], conf)[b].numpy(), visible)
    alone = lifting_features(x[:, :17], conf)
    assert list(alone) == ["sparse"] and torch.equal(alone["sparse"], got["sparse"])


def test_offsets_do_not_depend_on_the_place_in_the_image():
    x, shift = (
        torch.randn(3, 161, 2, dtype=torch.float64),
        torch.tensor([0.3, -0.7], dtype=torch.float64),
    )
    conf = torch.ones(3, 17)
    conf[0, [0, 5]] = 0
    here, there = lifting_features(x, conf), lifting_features(x + shift, conf)
    assert_same(there["sparse"][:, 0], here["sparse"][:, 0] + shift)
    assert_same(there["sparse"][:, 1:], here["sparse"][:, 1:])
    assert_same(there["dense"], here["dense"])
    assert_same(there["fine"], here["fine"])


def test_spatial_lifter_has_the_papers_parameters():
    total = sum(p.numel() for p in SpatialLifter(17).parameters())
    assert total == 900_003 + 96  # the paper's 0.9M, and the token for a missing joint
    lifter = SpatialLifter()
    assert lifter.n_points == 161 and len(lifter.blocks) == 12 and lifter.blocks[0].heads == 6
    assert float(lifter.position.detach().abs().max()) == 0.0
    assert lifter.blocks[0].norm1.eps == lifter.blocks[0].norm2.eps == 1e-6
    rates = [b.drop_path for b in lifter.blocks]
    np.testing.assert_allclose(rates, [0.1 * i / 11 for i in range(12)], atol=1e-8)
    assert all(b.p == 0 and b.mlp[0].out_features == 2 * 96 for b in lifter.blocks)


@torch.no_grad()
@pytest.mark.parametrize("n_points, blocks", [(17, 2), (161, 1)])
def test_spatial_lifter_equals_numpy(n_points, blocks):
    torch.manual_seed(0)
    lifter = randomize(SpatialLifter(n_points, 12, blocks, heads=3), 0.3).double().eval()
    x, y, conf = (
        torch.randn(40, 161, 2).double(),
        torch.randn(40, 17, 3).double() * 200,
        torch.ones(40, 17).double(),
    )
    conf[0, [0, 4]] = 0
    lifter.standardize(x[:, :n_points], y, conf)
    out = lifter(x[:2, :n_points], conf[:2]).numpy()
    w = weights(lifter)
    for b in range(2):
        sparse, dense, fine, seen = features_reference(x[b].numpy(), conf[b].numpy())
        tokens = linear(w, "embed_s", (sparse - w["mean_sparse"]) / w["std_sparse"])
        tokens[seen == 0] = w["missing"]
        if n_points == 161:
            tokens = np.concatenate(
                [
                    tokens,
                    linear(w, "embed_d", (dense - w["mean_dense"]) / w["std_dense"]),
                    linear(w, "embed_f", (fine - w["mean_fine"]) / w["std_fine"]),
                ]
            )
        tokens = tokens + w["position"]
        for i in range(blocks):
            tokens = block_reference(
                w, f"blocks.{i}", tokens, 3, [range(n_points)] * n_points, 1e-6
            )
        tokens = layer_norm(w, "norm", tokens, 1e-6)[:17]
        expected = (
            linear(w, "head.1", layer_norm(w, "head.0", tokens, 1e-5)) * w["std_y"] + w["mean_y"]
        )
        np.testing.assert_allclose(out[b], expected, rtol=1e-6, atol=1e-6)


LIFTERS = [SpatialLifter, MLPLifter]  # one interface, one set of tests


@pytest.mark.parametrize("lifter_class", LIFTERS)
def test_standardize_takes_the_training_sets_statistics(lifter_class):
    torch.manual_seed(0)
    lifter = lifter_class(161, 12, 1).double().eval()
    x, y = (
        torch.randn(300, 161, 2).double() * 0.1 + 0.3,
        torch.randn(300, 17, 3).double() * 250 + 40,
    )
    lifter.standardize(x, y)
    for t in lifter.features(x, None).values():
        torch.testing.assert_close(t.mean(0), torch.zeros_like(t[0]), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            t.std(0, correction=0), torch.ones_like(t[0]), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(lifter.mean_y, y.mean(0))
    assert (
        len(torch.unique(lifter.std_y)) == 1
    )  # one scale for all: the loss weighs millimetres alike
    assert lifter.mean_y.requires_grad is False and "mean_sparse" in lifter.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("lifter_class", LIFTERS)
@pytest.mark.parametrize("n_points", [17, 161])
def test_lifters_give_joints_and_refuse_other_shapes(lifter_class, n_points):
    lifter = lifter_class(n_points, 12, 1).eval()
    assert lifter(torch.randn(3, n_points, 2)).shape == (3, 17, 3)
    for shape in ((3, 16, 2), (3, 160, 2), (3, n_points, 3), (3, 162, 2), (17, 2)):
        with pytest.raises(ValueError, match="found"):
            lifter(torch.randn(shape))


@torch.no_grad()
@pytest.mark.parametrize("lifter_class", LIFTERS)
@pytest.mark.parametrize("n_points", [17, 161])
def test_a_lifter_refuses_the_points_of_the_other_one(lifter_class, n_points):
    with pytest.raises(ValueError, match=f"{n_points}.*found"):
        lifter_class(n_points, 12, 1).eval()(torch.randn(3, 178 - n_points, 2))


@torch.no_grad()
@pytest.mark.parametrize("lifter_class", LIFTERS)
def test_lifters_do_not_mix_samples_in_eval(lifter_class):
    lifter = lifter_class(161, 12, 2).eval()
    x = torch.randn(5, 161, 2)
    torch.testing.assert_close(lifter(x)[3:4], lifter(x[3:4]), rtol=1e-4, atol=1e-5)
