"""sources/layouts.py: orders of joints, recognised by names, converted, and checked for bodies."""

import numpy as np
import pytest
from conftest import FRONT, person
from hypothesis import given
from hypothesis import strategies as st

from hipart import JOINT_NAMES
from sources.layouts import LAYOUTS, joint_table, layout_of, misfit, to_h36m

# How the owners of the layouts write their joints.
_SIDES = [f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
          for side in ("left", "right")]
_COCO = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", *_SIDES]
_MPII = ["right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis",
         "thorax", "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder",
         "left_shoulder", "left_elbow", "left_wrist"]  # fmt: skip
_FEET = ["left_big_toe", "right_big_toe", "left_small_toe", "right_small_toe", "left_heel",
         "right_heel"]  # fmt: skip
OWNERS = {
    "coco17": _COCO,
    "posetrack17": ["nose", "head_bottom", "head_top", "left_ear", "right_ear", *_SIDES],
    "crowdpose14": [*_SIDES, "head", "neck"],
    "aic14": ["right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow",
              "left_wrist", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee",
              "left_ankle", "head_top", "neck"],
    "mpii16": _MPII,
    "halpe26": [*_COCO, "head", "neck", "hip", *_FEET],
    "h36m17": ["root", "right_hip", "right_knee", "right_foot", "left_hip", "left_knee",
               "left_foot", "spine", "thorax", "neck_base", "head", "left_shoulder", "left_elbow",
               "left_wrist", "right_shoulder", "right_elbow", "right_wrist"],
}  # fmt: skip


def test_layouts_are_recognised_by_the_names_of_all_joints():
    for layout, names in OWNERS.items():
        assert layout_of(names) == layout
        assert layout_of([n.upper().replace("_", "-") for n in names]) == layout
        assert layout_of(["".join(w.title() for w in n.split("_")) for n in names]) == layout
        assert layout_of(names[::-1]) is None and layout_of(names[:-1]) is None
    assert layout_of(list(JOINT_NAMES)) == "h36m17"
    short = [n.replace("left_", "L").replace("right_", "R") for n in _COCO]  # Lknee
    assert layout_of(short) == "coco17"
    assert layout_of([*_COCO, *(f"face_{i}" for i in range(116))]) == "coco17"  # WholeBody
    assert layout_of([*_COCO, "left_big_toe"]) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_against_where_the_joints_of_a_body_are(layout):
    """Limbs come out exactly, left and right as they are, and the middle within 9 cm."""
    x_s, conf = to_h36m(person(layout)[None], layout)
    points, names = person(layout), LAYOUTS[layout]
    for j, target in enumerate(LAYOUTS["h36m17"]):
        if target in names:
            np.testing.assert_allclose(x_s[0, j], points[names.index(target), :2], rtol=1e-6)
        else:
            middle = np.array([320, 240 + (0.9 - FRONT[target][1]) * 300 / 1.76])
            far = 0.14 if target == "head top" else 0.09  # eyes are below the top of the head
            assert np.linalg.norm(x_s[0, j] - middle) < far * 300 / 1.76, target
    assert (conf == np.float32(0.9)).all()


def test_maps_use_as_many_left_joints_as_right_ones():
    for layout in LAYOUTS:
        for sources in joint_table(layout).values():
            names = [LAYOUTS[layout][s] for s in sources]
            sides = [sum(n.startswith(s) for n in names) for s in ("l ", "r ")]
            assert sides[0] == sides[1] or len(names) == 1


def test_a_mean_needs_all_its_sources_and_takes_the_least_score():
    p = person("coco17")
    p[[11, 12], 2] = 0.9, 0.4
    x_s, conf = to_h36m(p[None], "coco17")
    np.testing.assert_allclose(x_s[0, 0], (p[11, :2] + p[12, :2]) / 2, rtol=1e-6)
    assert conf[0, 0] == np.float32(0.4)
    p[12] = 0
    x_s, conf = to_h36m(p[None], "coco17")
    assert conf[0, [0, 1, 7]].tolist() == [0, 0, 0] and conf[0, 4] > 0
    assert (x_s[0, [0, 1, 7]] == 0).all()


@pytest.mark.parametrize("value", [
    (np.nan, 5), (np.inf, 5), (5, -np.inf), (1e7, 5), (1e300, 5), (0, 0), (-1, -1),
])  # fmt: skip
def test_impossible_coordinates_are_missing_joints(value):
    p = person("coco17")
    p[9, :2] = value
    x_s, conf = to_h36m(p[None], "coco17")
    assert conf[0, 13] == 0 and np.isfinite(x_s).all() and (conf > 0).sum() == 16
    p[9] = 5, 0, 0.9  # at the edge of the image is a place
    assert to_h36m(p[None], "coco17")[1][0, 13] > 0


@given(st.sampled_from(["h36m17", "coco17", "posetrack17"]), st.integers(0, 99), st.integers(1, 9))
def test_a_wrong_order_is_told_from_the_right_one(layout, seed, n):
    """In any size, at any place; COCO's eyes are no misfit for PoseTrack's neck and head."""
    rng = np.random.default_rng(seed)
    people = np.stack([person(layout, seed + i, rng.uniform(20, 2000), rng.uniform(0, 5000, 2))
                       for i in range(n)])
    wrong = {"h36m17": ("coco17", "posetrack17"), "coco17": ("h36m17",),
             "posetrack17": ("coco17", "h36m17")}  # fmt: skip
    right = misfit(people, layout)
    assert right < 0.9
    assert all(misfit(people, other) > max(1, right / 0.8) for other in wrong[layout])
    upside_down = people * [1, -1, 1] + [0, 9000, 0]
    assert misfit(upside_down, layout) == 2


def test_people_of_few_joints_do_not_speak_against_a_layout():
    people = person("h36m17")[None]
    people[:, 5:, 2] = 0
    assert misfit(people, "coco17") == 0
