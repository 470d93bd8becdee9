"""A simulated 2D detector, for the default data set, and joint dropout for real detections.

The paper trains on detections of CPN, which come with Human3.6M. Here their errors are drawn: small
ones everywhere, and large ones, or no detection at all, where something hides a joint.
"""

import numpy as np

# All that `detect` needs. Lengths are fractions of the person's projected standing height.
NOISE = {
    # A Gaussian error along each axis, about CPN's on Human3.6M, times a factor for each joint
    "sigma": 0.0079,
    "sigma_scale": [1.0, 1.0, 1.1, 1.3, 1.0, 1.1, 1.3, 1.0, 1.0, 1.0, 1.2,
                    1.0, 1.2, 1.4, 1.0, 1.2, 1.4],
    "p_box": 0.43,  # share of samples with a box in front of the person; it may cover no joint
    "box_half_size": [0.10, 0.24],  # half its width and half its height, each uniform
    "box_offset": 0.06,  # it is centred on a random joint, off by this standard deviation
    "p_missing": 0.27,  # of a joint behind the box; if it is not missing, it is displaced
    "sigma_common": 0.065,  # together with all other joints behind the box, and
    "sigma_single": 0.05,  # on its own
    "p_swap": 0.02,  # share of samples in which one pair of arms or legs is swapped
    # The logit of conf: where it starts, what the error takes away, and a Gaussian on top
    "conf": {"visible": 2.3, "occluded": 0.6, "per_error": 6.0, "sigma": 0.9},
}  # fmt: skip
NOISE_TIME = 30  # frames, half a second at 60 Hz: how long errors last where they are correlated
SWAPS = np.array([[[1, 2, 3], [4, 5, 6]], [[14, 15, 16], [11, 12, 13]]])  # legs, arms: right, left


class Draws:
    """Random numbers for n frames, from a generator: each frame has its own, or they are correlated
    in time.

    time is in frames; 0: not correlated. The correlation of numbers that are k frames apart in a
    sequence is exp(-k / time), and each number alone is distributed as without. begins [n] is True
    where a sequence begins (the first frame need not say so). Gaussian numbers are an AR(1)
    process. All others are held, and drawn afresh at random moments, the same for all of them: so a
    box stays for a while, and with it the joints that it hides.
    """

    def __init__(self, rng, n, begins=False, time=0.0):
        self.rng, self.begins = rng, np.broadcast_to(begins, n)
        self.keep = np.float32(np.exp(-1 / time) if time else 0)
        self.since = np.arange(n)  # the frame in which what holds now was drawn
        if time:
            fresh = self.begins | (rng.random(n) >= self.keep)
            self.since = np.maximum.accumulate(np.where(fresh, self.since, 0))

    def normal(self, *shape):
        """Standard normal numbers [n, ...]."""
        x = self.rng.standard_normal(shape, dtype=np.float32)
        if self.keep:
            new = np.sqrt(1 - self.keep**2)
            for i in np.flatnonzero(~self.begins[1:]) + 1:
                x[i] = self.keep * x[i - 1] + new * x[i]
        return x

    def held(self, values):
        """values [n, ...], one draw for each frame -> the draw that holds in each frame."""
        return values[self.since]

    def choice_of(self, rows, k):
        """A number below k for some of the frames, rows [m] -> [m]."""
        since, which = np.unique(self.since[rows], return_inverse=True)
        return self.rng.integers(k, size=len(since))[which]


def detect(x_s, height_px, rng, noise=NOISE, begins=False, time=0.0):
    """What a 2D detector makes of clean joints.

    x_s [N, 17, 2] px, height_px [N] px -> x_det [N, 17, 2] px, conf [N, 17]. begins and time: as in
    `Draws`, if errors are correlated in time.

    Every joint has a Gaussian error in proportion to the person's size. In some samples a box hides
    neighbouring joints, which are then missing (conf and coordinates 0) or carry a large error that
    they partly share. Rarely, a pair of arms or legs is swapped. As with real detectors, conf is
    only correlated with the error: a swap leaves no trace in it, and a visible joint can score low.
    """
    n, f32 = len(x_s), np.float32
    h, draws = np.asarray(height_px, f32)[:, None], Draws(rng, n, begins, time)
    error = draws.normal(n, 17, 2)
    error *= (noise["sigma"] * h * np.array(noise["sigma_scale"], f32))[..., None]
    behind = behind_a_box(x_s, h, draws, noise)
    together = noise["sigma_common"] * draws.normal(n, 1, 2)
    together = together + noise["sigma_single"] * draws.normal(n, 17, 2)
    error += behind[..., None] * together * h[..., None]
    x_det = x_s + error

    swapped = np.flatnonzero(draws.held(rng.random(n, dtype=f32)) < noise["p_swap"])
    right, left = np.moveaxis(SWAPS[draws.choice_of(swapped, 2)], 1, 0)  # [n', 3] each
    swapped = swapped[:, None]
    x_det[swapped, right], x_det[swapped, left] = x_det[swapped, left], x_det[swapped, right]

    c = noise["conf"]
    logit = np.where(behind, f32(c["occluded"]), f32(c["visible"]))
    logit = logit + c["sigma"] * draws.normal(n, 17)
    logit -= c["per_error"] * np.sqrt(np.square(error).sum(-1)) / h
    conf = np.clip(1 / (1 + np.exp(-logit)), 1e-3, 1)

    missing = behind & (draws.held(rng.random((n, 17), dtype=f32)) < noise["p_missing"])
    # A person without a single joint would not have been detected.
    missing &= ~missing.all(1, keepdims=True)
    x_det[missing], conf[missing] = 0, 0
    return x_det.astype(f32), conf.astype(f32)


def behind_a_box(x_s, h, draws, noise=NOISE):
    """Which joints x_s [N, 17, 2] a box in front of the person covers, [N, 17].

    h [N, 1] is the person's height, in the same unit. One box is drawn for each person.
    """
    n, rng = len(x_s), draws.rng
    joint, off = draws.held(rng.integers(17, size=n)), draws.normal(n, 2)
    centre = x_s[np.arange(n), joint] + noise["box_offset"] * h * off
    half = draws.held(rng.uniform(*noise["box_half_size"], size=(n, 2))).astype(np.float32) * h
    behind = (np.abs(x_s - centre[:, None]) < half[:, None]).all(-1)
    return behind & (draws.held(rng.random(n, dtype=np.float32)) < noise["p_box"])[:, None]


def drop_joints(x_det, conf, height_px, rng):
    """Joint dropout: x_det [N, 17, 2] px, conf [N, 17], height_px [N] px -> x_det and conf.

    Real detections seldom lack joints, and a model must learn what a missing joint is. So as many
    go missing, behind the same boxes, as with `detect`.
    """
    h = np.asarray(height_px, np.float32)[:, None]
    behind = behind_a_box(x_det, h, Draws(rng, len(x_det)))
    missing = behind & (rng.random(conf.shape, dtype=np.float32) < NOISE["p_missing"])
    missing &= ((conf > 0) & ~missing).any(1, keepdims=True)  # at least one joint stays
    return x_det * ~missing[..., None], conf * ~missing
