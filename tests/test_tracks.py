"""sources/tracks.py: who is who in a video, and that photos are no video."""

import numpy as np
import pytest
from conftest import person
from hypothesis import given
from hypothesis import strategies as st

from sources.tracks import CROWD, GAP, PLACE, POSE, SIZE, Frame, follow, frames_of


def walk(steps, seed=0, x=200.0, speed=6.0, height=300.0):
    """Somebody in some frames of a video: {frame: points}. All joints move, and a little apart."""
    rng = np.random.default_rng(seed)
    body = person("coco17", seed, height, (x, 240))
    return {t: body + [speed * t, 0, 0] + rng.normal(0, 3, (17, 3)) * [1, 1, 0] for t in steps}


def tracks_of(*people, ids=None, name="clip_{:03}.jpg"):
    """Tracks of people by frame: [{frame: track}] as `people` are given."""
    rows = sorted((t, i) for i, of in enumerate(people) for t in of)
    frames = frames_of({name.format(t) for t, _ in rows})
    found = follow([people[i][t] for t, i in rows], [frames[name.format(t)] for t, _ in rows],
                   [ids[i] if ids else "" for _, i in rows])
    return [{t: track for (t, j), track in zip(rows, found, strict=True) if i == j}
            for i in range(len(people))]  # fmt: skip


@pytest.mark.parametrize("image, frame", [
    ("clip_0012.jpg", ("clip_", 12)), ("10.png", ("", 10)), ("a/b_3", ("a/b_", 3)),
    ("2/000000.jpg", ("2/", 0)), ("frame 7", ("frame ", 7)), ("x12_rendered.png",
                                                              ("x_rendered", 12)),
])  # fmt: skip
def test_frames_by_name(image, frame):
    assert frames_of([image, "beach.jpg", "2024/beach"]) == {
        image: frame, "beach.jpg": None, "2024/beach": None}


@pytest.mark.parametrize("name", ["clip_{}_1080p.jpg", "a9/clip-{:04}.30fps.mp4_2.png",
                                  "{}_{}_0", "cam2_{}_x264"])  # fmt: skip
def test_the_number_that_rises_counts_frames(name):
    """What follows it is the same in all names."""
    images = [name.format(t, 7) for t in range(3)]
    frames = [frames_of(images)[image] for image in images]
    assert [frame.number for frame in frames] == [0, 1, 2]
    assert len({frame.sequence for frame in frames}) == 1
    assert set(tracks_of(walk(range(5)), name=name.replace("{}_{}", "{}_7"))[0].values()) == {"0"}


def test_the_last_number_that_rises_counts_frames():
    images = [f"cam{cam}_{t}_1080p.jpg" for cam in (1, 2) for t in (7, 8)]
    assert list(frames_of(images).values()) == [
        Frame(f"cam{cam}__1080p", t) for cam in (1, 2) for t in (7, 8)]
    assert frames_of([digits := "9" * 150])[digits].number == 1 << 62


@given(st.integers(0, 9), st.integers(1, GAP), st.integers(1, 7))
def test_a_track_lives_through_a_gap_while_others_are_seen(seed, gap, step):
    """Also where only every step-th image was kept."""
    seen = [t * step for t in range(40)]
    missed = range(15, 15 + gap - 1)
    a = walk([t for i, t in enumerate(seen) if i not in missed], seed, 100, 6 / step)
    b = walk(seen, seed + 1, 900, -4 / step)
    found_a, found_b = tracks_of(a, b)
    assert len(set(found_a.values())) == len(set(found_b.values())) == 1
    assert set(found_a.values()) != set(found_b.values())


def test_after_a_long_gap_or_a_leap_it_is_somebody_else():
    later = walk([*range(5), *range(20, 25)], speed=0)
    (found,) = tracks_of(later | {30: later[24]}, name="{}.jpg")
    assert [found[4], found[20], found[24]] == ["0", "1", "1"]
    leap = walk(range(5)) | {t: p + [2000, 0, 0] for t, p in walk(range(5, 9)).items()}
    assert list(tracks_of(leap)[0].values()) == ["0"] * 5 + ["1"] * 4
    shrunk = walk(range(5), speed=0) | walk(range(5, 9), speed=0, height=120)
    assert set(tracks_of(shrunk)[0].values()) == {"0", "1"}


def test_people_who_pass_one_another_keep_their_tracks():
    a, b = walk(range(60), 0, 100, 12), walk(range(60), 1, 900, -12)
    found = [set(of.values()) for of in tracks_of(a, b)]
    assert [len(of) for of in found] == [1, 1] and found[0] != found[1]


def test_photos_are_no_film():
    body = walk(range(9), speed=0)
    photos = ["beach_04.jpg", "kitchen_11.jpg", "park_02.jpg"]
    found = follow(list(body.values())[:3], list(frames_of(photos).values()), [""] * 3)
    assert found == [""] * 3
    numbers = dict(zip([139, 285, 632, 724, 776, 785, 802, 872, 885], body.values(), strict=True))
    assert set(tracks_of(numbers, name="{:012}.jpg")[0].values()) == {""}  # one stem, uneven steps
    assert follow([body[0]] * 2, [None] * 2, ["1", "2"]) == ["", ""]


def test_ids_of_the_file_are_believed_if_they_tell_people_apart():
    a, b = walk(range(4)), walk(range(4), 1, 900)
    assert [set(of.values()) for of in tracks_of(a, b, ids=["7", "x"])] == [{"7"}, {"x"}]
    assert [set(of.values()) for of in tracks_of(a, b, ids=["0", "0"])] == [{"0"}, {"1"}]
    (one,) = tracks_of(a, ids=["0"])  # AlphaPose without tracking
    assert set(one.values()) == {"0"}
    far = walk(range(4), speed=900)
    assert set(tracks_of(far, ids=["3"])[0].values()) == {"3"}


def test_people_without_an_id_of_their_own_are_single():
    body = list(walk(range(3), speed=0).values()) * 2
    frames = [Frame("", t) for t in (0, 1, 2)] * 2
    assert follow(body, frames, ["4", "4", "4", "7", "", "4"]) == ["4", "4", "", "7", "", ""]


def test_steps_of_milliseconds():
    body = walk(range(40), speed=0)
    (found,) = tracks_of({round(t * 1000 / 24): p for t, p in body.items()}, name="{}.jpg")
    assert set(found.values()) == {"0"}


def test_sequences_are_apart():
    body = list(walk(range(4), speed=0).values())
    frames = [Frame("a ", 1), Frame("a ", 2), Frame("b ", 1), Frame("b ", 2)]
    assert follow(body, frames, [""] * 4) == ["a  0", "a  0", "b  0", "b  0"]
    assert follow(body, frames, ["1"] * 4) == ["a  1", "a  1", "b  1", "b  1"]


def test_crowds_are_not_followed():
    rng = np.random.default_rng(0)
    at = rng.uniform(0, 20_000, (CROWD + 1, 2))
    crowd = [person("coco17", 0, 100, xy) for xy in at] * 2
    frames = [Frame("", i // (CROWD + 1)) for i in range(len(crowd))]
    assert set(follow(crowd, frames, [""] * len(crowd))) == {""}
    fewer = [i for i in range(len(crowd)) if i % (CROWD + 1)]
    found = follow([crowd[i] for i in fewer], [frames[i] for i in fewer], [""] * len(fewer))
    assert found[:CROWD] == found[CROWD:] == [str(i) for i in range(CROWD)]


def test_points_that_are_missing_are_not_compared():
    body = walk(range(3), speed=0)
    for t, joint in enumerate((0, 5, 9)):
        body[t][joint] = 0
    assert set(tracks_of(body)[0].values()) == {"0"}
    nobody = {t: p * [1, 1, 0] for t, p in walk(range(3)).items()}
    assert list(tracks_of(nobody)[0].values()) == ["0", "1", "2"]


@given(st.integers(0, 99), st.floats(0, 0.2), st.integers(1, 5))
def test_a_link_is_made_if_the_movement_can_be(seed, missing, gap):
    """Two people, a gap apart, against a plain reading of what sources/tracks.py promises."""
    rng = np.random.default_rng(seed)
    a = person("coco17", seed)
    b = a + np.c_[rng.normal(0, rng.uniform(0, 50), (17, 2)) + rng.uniform(-200, 200, 2),
                  np.zeros(17)]  # fmt: skip
    b = (b - [320, 240, 0]) * [*[rng.choice([0.7, 1, 1.4])] * 2, 1] + [320, 240, 0]
    for x in (a, b):
        x[rng.random(17) < missing] = 0
    joints = [j for j in range(17) if a[j, 2] > 0 and b[j, 2] > 0]
    ways = [b[j, :2] - a[j, :2] for j in joints]
    place = sum(ways) / len(ways)
    boxes = [np.linalg.norm(np.ptp(x[x[:, 2] > 0, :2], axis=0)) for x in (a, b)]
    size, pose = np.sqrt(boxes[0] * boxes[1]), np.mean([np.linalg.norm(w - place) for w in ways])
    efforts = [pose / size / POSE, np.linalg.norm(place) / size / PLACE]
    if len(joints) == 17:
        efforts.append(abs(np.log(boxes[0] / boxes[1])) / np.log(SIZE))
    far = person("coco17", 0, at=(9000, 240))  # somebody else, so that steps are of one frame
    times = [0, *range(gap), gap]
    found = follow([a, *[far] * gap, b], [Frame("", t) for t in times], [""] * (gap + 2))
    assert (found[0] == found[-1]) == (max(efforts) < min(gap, 3))
