"""sources/motion.py: which frames a split may show, and varied poses, on clips of conftest.py."""

import itertools
import json

import numpy as np
import pytest
from conftest import clip_text, make_clips, random_pose
from hypothesis import given, settings
from hypothesis import strategies as st

from hipart import LEFT, RIGHT
from sources import motion
from sources.bodies import point_tables, pose_points, segment_transforms
from sources.dataset import SPLITS
from sources.motion import HINGE_LIMITS, MIRROR_HINGES, Motion, augment, mirror, parse_clip, turn


@pytest.mark.parametrize("loop", ["wrap", "none"])
@settings(deadline=None, max_examples=25)
@given(duration=st.floats(0.8, 4), dt=st.sampled_from([1 / 60, 1 / 30, 1 / 24, 1 / 16]))
def test_frames_of_two_splits_are_a_tenth_of_a_second_apart(loop, duration, dt):
    frames = int(duration / dt)
    clip = parse_clip(clip_text(0, frames, dt, loop))
    parts = motion.split_frames(clip)
    time = clip["time"]
    for split, other in itertools.permutations(parts, 2):
        assert len(parts[split]) > 0
        away = np.abs(time[parts[split]][:, None] - time[parts[other]])
        if loop == "wrap":
            away = np.minimum(away, frames * dt - away)
        assert away.min() >= 0.1 - 1e-9, (split, other)


def test_training_never_sees_held_out_frames_or_unseen_clips():
    table = Motion(make_clips(), unseen=("kick",))
    of = {split: set(np.concatenate(table.frames[split])) for split in SPLITS}
    train, val, test, unseen = of.values()
    assert not train & val and not train & test and not val & test
    assert not unseen & (train | val | test)
    assert {table.names[c] for c in table.clip[list(unseen)]} == {"kick"}
    for split in SPLITS:
        drawn = table.draw(split, 2000, np.random.default_rng(0))
        assert set(drawn) <= of[split]
    drawn = table.draw("train", 3000, np.random.default_rng(0))
    count = np.bincount(table.clip[drawn], minlength=4)
    assert count[1] == 0 and (abs(count[[0, 2, 3]] - 1000) < 120).all()


def test_augmented_poses_lie_between_training_frames(monkeypatch):
    """Without joint noise and mixing, every training pose lies on the arc between two neighbouring
    training frames."""
    monkeypatch.setattr(motion, "QUAT_NOISE", motion.QUAT_NOISE * 0)
    monkeypatch.setattr(motion, "HINGE_NOISE", motion.HINGE_NOISE * 0)
    table = Motion(make_clips(), unseen=("kick",))
    (_, hinges, _), clip, action = augment(table, 400, np.random.default_rng(0))
    train = np.concatenate(table.frames["train"])
    first = np.array([f for f in train if f + 1 in train and table.clip[f] == table.clip[f + 1]])
    a, b = table.hinges[first], table.hinges[first + 1]
    a, b = (np.concatenate([h, h[:, MIRROR_HINGES]]) for h in (a, b))
    d = b - a
    t = np.clip(np.einsum("nk,pk->np", hinges, d) - (a * d).sum(1), 0, (d * d).sum(1))
    t /= (d * d).sum(1)
    near = np.linalg.norm(hinges[:, None] - a - t[..., None] * d, axis=-1).min(1) < 1e-6
    assert (action == clip).mean() == pytest.approx(0.73, abs=0.1)  # the others mix two clips
    assert near.mean() == pytest.approx(0.6, abs=0.1)  # neither recombined nor blended
    assert set(action) == {-1, 0, 2, 3}


def test_sequences_are_unbroken_stretches_at_60_hertz():
    table = Motion(make_clips(), unseen=("kick",))
    for split in SPLITS:
        of = set(np.concatenate(table.frames[split]))
        rng = np.random.default_rng(0)
        (quats, hinges, height), clip, action, who, number = motion.draw_sequences(
            table, split, 500, rng)
        assert 500 <= len(who) < 620 and len(set(who)) == who[-1] + 1
        assert (np.diff(number)[np.diff(who) == 0] == 1).all()
        assert set(action) == ({1} if split == "unseen" else {0, 2, 3})
        for i in np.unique(who):
            mine = who == i
            assert len(set(clip[mine])) == 1
            # The clips have 30 frames per second: every second moment lies between two of them.
            at = number[mine] / 2
            around = np.concatenate([np.floor(at), np.ceil(at)]).astype(int)
            first = np.flatnonzero(table.clip == clip[mine][0])[0]
            assert set(first + around) <= of, split
            if split != "train":
                expected = [(table.hinges[first + int(np.floor(t))]
                             + table.hinges[first + int(np.ceil(t))]) / 2 for t in at]
                assert np.allclose(hinges[mine], expected)
                assert len(set(at)) == mine.sum()


def test_poses_of_a_training_sequence_are_varied_alike(monkeypatch):
    table = Motion(make_clips(), unseen=("kick",))
    rng = np.random.default_rng
    plain = motion.draw_sequences(table, "test", 300, rng(0))
    monkeypatch.setattr(motion, "HINGE_LIMITS", np.array([[-99, 99]] * 4))
    quats, hinges, height = motion.vary(plain[0], plain[3], rng(1))
    moved = set()
    for i in np.unique(plain[3]):
        mine = plain[3] == i
        own, other = plain[0][1][mine], hinges[mine]
        shift = [other - own[:, order] for order in (np.arange(4), MIRROR_HINGES)]
        alike = [np.ptp(s, axis=0).max() < 1e-9 for s in shift]
        assert any(alike), i
        moved.add(tuple(np.round(shift[alike.index(True)][0], 6)))
    assert len(moved) == plain[3][-1] + 1


def test_mirror_swaps_sides_and_undoes_itself(bodies, levels):
    pose = random_pose(np.random.default_rng(3), 10)
    for once, twice in zip(pose, mirror(mirror(pose)), strict=True):
        assert np.allclose(once, twice)
    area = np.ones(len(bodies["weights"]))
    tables, align = point_tables(bodies, levels, area)

    def joints(pose):
        transforms = segment_transforms(pose, align[[0] * 10], bodies["heads"][[0] * 10])
        return pose_points(transforms, tables[0])[:, :17]

    swap = np.arange(17)
    swap[list(LEFT)], swap[list(RIGHT)] = [1, 2, 3, 14, 15, 16], [4, 5, 6, 11, 12, 13]
    assert np.allclose(joints(mirror(pose)), joints(pose)[:, swap] * [-1, 1, 1], atol=1e-9)
    turned = joints(turn(pose, np.full(10, np.pi / 2)))  # left a quarter: -y becomes +x
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert np.allclose(turned, joints(pose) @ quarter.T, atol=1e-9)


def test_augmentation_keeps_hinges_within_their_limits():
    table = Motion(make_clips(), unseen=("kick",))
    (quats, hinges, _), _, _ = augment(table, 1000, np.random.default_rng(0))
    assert np.allclose(np.linalg.norm(quats, axis=-1), 1)
    assert (hinges >= HINGE_LIMITS[:, 0]).all() and (hinges <= HINGE_LIMITS[:, 1]).all()


def test_a_damaged_clip_is_refused():
    with pytest.raises(ValueError, match="frames of 44 finite numbers"):
        parse_clip(json.dumps({"Loop": "wrap", "Frames": [[0.1] * 43]}))
