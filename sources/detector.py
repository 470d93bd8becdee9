"""A simulated 2D detector, and joint dropout for the output of real ones."""

import numpy as np

# Everything that detect() needs; lengths are fractions of the person's projected standing height.
NOISE = {
    "sigma": 0.0079,  # Gaussian error per axis (about CPN's on Human3.6M), times this for each joint:
    "sigma_scale": [
        1.0,
        1.0,
        1.1,
        1.3,
        1.0,
        1.1,
        1.3,
        1.0,
        1.0,
        1.0,
        1.2,
        1.0,
        1.2,
        1.4,
        1.0,
        1.2,
        1.4,
    ],
    "p_box": 0.43,  # share of samples with a box in front of the person (some boxes cover no joint)
    "box_half_size": [0.10, 0.24],  # half width and half height of the box, each uniform
    "box_offset": 0.06,  # the box is centred on a random joint, off by this sigma
    "p_missing": 0.27,  # a joint behind the box is missing (conf 0); otherwise its error is
    "sigma_common": 0.065,  # a displacement common to all joints behind the box, plus
    "sigma_single": 0.05,  # one of its own
    "p_swap": 0.02,  # share of samples in which one arm or leg pair is swapped left/right
    "conf": {
        "visible": 2.3,
        "occluded": 0.6,
        "per_error": 6.0,
        "sigma": 0.9,
    },  # logit of conf, see detect()
}

SWAPS = np.array([[[1, 2, 3], [4, 5, 6]], [[14, 15, 16], [11, 12, 13]]])  # legs, arms: right, left


def detect(x_s, height_px, rng, noise=NOISE):
    """What a 2D detector makes of clean joints: x_s [N, 17, 2] px, height_px [N] px -> x_det [N,
    17, 2], conf [N, 17].

    Gaussian error in proportion to the person's size; in some samples a box hides neighbouring
    joints, which are then missing (conf 0, coordinates 0) or carry a large error that they partly
    share; rarely an arm or leg pair is swapped. conf only correlates with the error: swaps leave no
    trace in it, and visible joints can score low. """
    n, f32 = len(x_s), np.float32
    h = np.asarray(height_px, f32)[:, None]

    def normal(*shape):
        return rng.standard_normal(shape, dtype=f32)

    error = normal(n, 17, 2) * (noise["sigma"] * h * np.array(noise["sigma_scale"], f32))[..., None]
    behind = behind_a_box(x_s, h, rng, noise)
    together = noise["sigma_common"] * normal(n, 1, 2) + noise["sigma_single"] * normal(n, 17, 2)
    error += behind[..., None] * together * h[..., None]
    x_det = x_s + error

    swapped = np.flatnonzero(rng.random(n, dtype=f32) < noise["p_swap"])
    right, left = np.moveaxis(SWAPS[rng.integers(2, size=len(swapped))], 1, 0)  # [n', 3] each
    x_det[swapped[:, None], right], x_det[swapped[:, None], left] = (
        x_det[swapped[:, None], left], x_det[swapped[:, None], right])  # fmt: skip

    c = noise["conf"]
    logit = np.where(behind, f32(c["occluded"]), f32(c["visible"])) + c["sigma"] * normal(n, 17)
    logit -= c["per_error"] * np.sqrt(np.square(error).sum(-1)) / h
    conf = np.clip(1 / (1 + np.exp(-logit)), 1e-3, 1)
    missing = behind & (rng.random((n, 17), dtype=f32) < noise["p_missing"])
    missing &= ~missing.all(
        1, keepdims=True
    )  # a person with no joint at all would not have been detected
    x_det[missing], conf[missing] = 0, 0
    return x_det.astype(f32), conf.astype(f32)


def behind_a_box(x_s, h, rng, noise=NOISE):
    """Joints that a box in front of the person covers: x_s [N, 17, 2], height h [N, 1], same unit
    -> [N, 17]."""
    n = len(x_s)
    joint, off = rng.integers(17, size=n), rng.standard_normal((n, 2), dtype=np.float32)
    centre = x_s[np.arange(n), joint] + noise["box_offset"] * h * off
    half = rng.uniform(*noise["box_half_size"], size=(n, 2)).astype(np.float32) * h
    behind = (np.abs(x_s - centre[:, None]) < half[:, None]).all(-1)
    return behind & (rng.random(n, dtype=np.float32) < noise["p_box"])[:, None]


def drop_joints(x_det, conf, height_px, rng):
    """Joint dropout for real detections, which seldom lack joints: as many go missing, behind the
    same boxes, as with `detect`, so that a model learns what a missing joint is. x_det [N, 17, 2]
    px, conf [N, 17] -> the same."""
    behind = behind_a_box(x_det, np.asarray(height_px, np.float32)[:, None], rng)
    gone = behind & (rng.random(conf.shape, dtype=np.float32) < NOISE["p_missing"])
    gone &= ((conf > 0) & ~gone).any(1, keepdims=True)
    return x_det * ~gone[..., None], conf * ~gone
