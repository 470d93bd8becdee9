"""sources/detector.py: the statistics of simulated detections, and joint dropout."""

import numpy as np
from conftest import rest_joints

from sources.dataset import load
from sources.detector import NOISE, NOISE_TIME, Draws, detect, drop_joints


def people(n):
    """A person 380 px tall, n times: x_s [n, 17, 2] px, height [n] px."""
    rest = rest_joints()[:, [0, 2]] * [1, -1] * 210 + [500, 700]
    return np.repeat(rest[None], n, 0).astype(np.float32), np.full(n, 380, np.float32)


def test_detector_statistics():
    rng = np.random.default_rng(0)
    x_s, height = people(8000)
    x_det, conf = detect(x_s, height, rng)
    assert x_det.shape == (8000, 17, 2) and conf.shape == (8000, 17)
    assert x_det.dtype == conf.dtype == np.float32
    missing = conf == 0
    assert (x_det[missing] == 0).all() and (conf[~missing] > 0).all()
    assert conf.max() <= 1 and not missing.all(1).any()
    error = np.linalg.norm(x_det - x_s, axis=-1)
    assert 0.02 < missing.mean() < 0.06 and 6 < error[~missing].mean() < 10
    assert 3 < np.median(error[~missing]) < 5  # most have the Gaussian error only, 1.1% of height
    correlation = np.corrcoef(conf[~missing], error[~missing])[0, 1]
    assert -0.8 < correlation < -0.3  # a hint, not an oracle

    only = {**NOISE, "p_box": 1.0, "p_missing": 0.0, "p_swap": 0.0, "sigma": 0.0}
    moved = detect(x_s, height, rng, only)[0] - x_s
    hidden = (moved != 0).any(-1)
    both = moved[hidden[:, 11] & hidden[:, 8]][:, [8, 11], 0]
    assert 0.4 < np.corrcoef(both.T)[0, 1] < 0.85  # joints behind one box move together
    assert hidden[hidden.any(1)].sum(1).mean() > 2

    swap = {**only, "p_box": 0.0, "p_swap": 1.0}
    swapped = detect(x_s, height, rng, swap)[0]
    legs = np.isclose(swapped[:, 1:7], x_s[:, [4, 5, 6, 1, 2, 3]]).all((1, 2))
    arms = np.isclose(swapped[:, 11:17], x_s[:, [14, 15, 16, 11, 12, 13]]).all((1, 2))
    assert (legs ^ arms).all() and 0.4 < legs.mean() < 0.6


def test_detector_scales_with_the_person_and_repeats_itself(tiny_data):
    arrays, meta = load(tiny_data / "tiny", "train")
    x_s, height = arrays["x_s"], arrays["height_px"]
    a, b = (detect(x_s, height, np.random.default_rng(7), meta["noise"]) for _ in range(2))
    assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))
    double = detect(x_s * 2, height * 2, np.random.default_rng(7), meta["noise"])
    assert np.allclose(double[0], 2 * a[0], atol=1e-2) and np.allclose(double[1], a[1], atol=1e-5)
    other = detect(x_s, height, np.random.default_rng(8), meta["noise"])
    assert not np.array_equal(other[0], a[0])


def correlation(x, k):
    """Of numbers [n, ...] with those k frames later."""
    a, b = x[:-k].ravel(), x[k:].ravel()
    return np.corrcoef(a, b)[0, 1]


def test_numbers_that_are_correlated_in_time_are_distributed_as_they_were():
    """One long sequence: standard normal or uniform, with correlations of exp(-k / time)."""
    n, time = 20_000, 10
    draws = Draws(np.random.default_rng(0), n, time=time)
    normal = draws.normal(n, 17)
    uniform = draws.held(np.random.default_rng(1).random((n, 17)))
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert np.allclose(np.quantile(normal, [0.05, 0.5, 0.95]), [-1.645, 0, 1.645], atol=0.05)
    assert np.allclose(np.quantile(uniform, [0.05, 0.5, 0.95]), [0.05, 0.5, 0.95], atol=0.02)
    for k in (1, 5, 10, 30):
        assert abs(correlation(normal, k) - np.exp(-k / time)) < 0.03, k
        assert abs(correlation(uniform, k) - np.exp(-k / time)) < 0.06, k
    # What is held changes at the same moments, about one in `time`.
    change = (np.diff(uniform, axis=0) != 0)
    assert (change.all(1) == change.any(1)).all() and abs(change[:, 0].mean() * time - 0.95) < 0.1


def test_correlated_numbers_know_nothing_of_other_sequences():
    n = 20_000
    draws = Draws(np.random.default_rng(0), n, np.arange(n) % 2 == 0, 30)
    x, since = draws.normal(n, 8), draws.since
    first, second = x[::2], x[1::2]
    keep = np.exp(-1 / 30)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > keep - 0.01
    assert abs(np.corrcoef(second[:-1].ravel(), first[1:].ravel())[0, 1]) < 0.02
    assert (since[::2] == np.arange(0, n, 2)).all()
    assert abs((since[1::2] < np.arange(1, n, 2)).mean() - keep) < 0.01
    alone = Draws(np.random.default_rng(0), n)
    assert (alone.since == np.arange(n)).all()
    assert np.array_equal(alone.normal(n, 8),
                          np.random.default_rng(0).standard_normal((n, 8), dtype=np.float32))


def test_correlated_detections_have_the_same_errors_and_keep_them():
    """People who stand still in sequences of 50 frames."""
    x_s, height = people(30_000)
    new = np.arange(30_000) % 50 == 0
    det = [detect(x_s, height, np.random.default_rng(i), NOISE, new, time)
           for i, time in enumerate((0, NOISE_TIME))]
    error = [np.linalg.norm(x - x_s, axis=-1) for x, _ in det]
    missing = [conf == 0 for _, conf in det]
    values = np.array([[e[~m].mean(), np.median(e[~m]), 100 * m.mean(), conf[~m].mean()]
                       for e, m, (_, conf) in zip(error, missing, det, strict=True)])
    assert np.allclose(values[0], values[1], rtol=0.1)
    for m, (x, _), least, most in zip(missing, det, (0, 0.8), (0.1, 0.99), strict=True):
        stays = (m[1:] & m[:-1])[~new[1:]].sum() / m[:-1][~new[1:]].sum()
        step = np.where(m, np.nan, (x - x_s)[..., 0])
        both = np.isfinite(step[1:] + step[:-1]) & ~new[1:, None]
        moves = np.corrcoef(step[:-1][both], step[1:][both])[0, 1]
        assert least <= stays <= most and least - 0.05 <= moves <= most
    # A swap stays with the same pair of limbs.
    only = {**NOISE, "p_box": 0.0, "p_swap": 0.5, "sigma": 0.0}
    x = detect(x_s, height, np.random.default_rng(2), only, new, NOISE_TIME)[0]
    legs, arms = ((x != x_s)[:, j].any(-1) for j in (1, 11))
    kind = legs + 2 * arms
    assert set(kind) == {0, 1, 2} and abs((kind > 0).mean() - 0.5) < 0.05
    assert (np.diff(kind) == 0)[~new[1:]].mean() > 0.95


def test_joint_dropout_loses_as_many_joints_as_detection():
    x_s, height = people(8000)
    conf = np.full((8000, 17), 0.8, np.float32)
    conf[:, 5], x_s[:, 5] = 0, 0  # missing already
    x_det, kept = drop_joints(x_s, conf, height, np.random.default_rng(0))
    visible = kept > 0
    assert (x_det[~visible] == 0).all() and np.array_equal(x_det[visible], x_s[visible])
    assert np.array_equal(kept[visible], conf[visible]) and not visible[:, 5].any()
    assert visible.any(1).all()
    lost = 1 - np.delete(visible, 5, 1).mean()
    missing = (detect(people(8000)[0], height, np.random.default_rng(1))[1] == 0).mean()
    assert 0.02 < lost < 0.06 and abs(lost - missing) < 0.005
