"""sources/bvh.py: positions as an independent reading has them, the joints of the skeletons that
programs write, and files that ask for too much."""

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sources import bvh

# A person in CMU's names, facing +z, left = +x, with the arms to the sides; centimetres.
SKELETON = [  # name, parent, offset
    ("Hips", None, (0, 0, 0)),
    ("RightUpLeg", "Hips", (-9, -4, 0)),
    ("RightLeg", "RightUpLeg", (0, -42, 0)),
    ("RightFoot", "RightLeg", (0, -41, 0)),
    ("RightToeBase", "RightFoot", (0, -7, 14)),
    ("LeftUpLeg", "Hips", (9, -4, 0)),
    ("LeftLeg", "LeftUpLeg", (0, -42, 0)),
    ("LeftFoot", "LeftLeg", (0, -41, 0)),
    ("LeftToeBase", "LeftFoot", (0, -7, 14)),
    ("Spine", "Hips", (0, 12, 0)),
    ("Spine1", "Spine", (0, 20, 0)),
    ("Neck", "Spine1", (0, 22, 0)),
    ("Head", "Neck", (0, 10, 2)),
    ("RightShoulder", "Spine1", (-4, 18, 0)),
    ("RightArm", "RightShoulder", (-13, 0, 0)),
    ("RightForeArm", "RightArm", (-28, 0, 0)),
    ("RightHand", "RightForeArm", (-25, 0, 0)),
    ("LeftShoulder", "Spine1", (4, 18, 0)),
    ("LeftArm", "LeftShoulder", (13, 0, 0)),
    ("LeftForeArm", "LeftArm", (28, 0, 0)),
    ("LeftHand", "LeftForeArm", (25, 0, 0)),
]
NAMES = [n for n, _, _ in SKELETON]
PARENTS = [NAMES.index(p) if p else -1 for _, p, _ in SKELETON]
OFFSETS = np.array([offset for *_, offset in SKELETON], float)


def bvh_text(angles, order="ZXY", prefix="", z_up=False, positions=None, frame_time=1 / 30,
             names=NAMES, offsets=OFFSETS):
    """angles [T, 21, 3] degrees in channel order; positions [T, 3] of the root."""

    def swap(v):
        return (v[0], -v[2], v[1]) if z_up else v

    def joint(j, depth):
        pad = "  " * depth
        kind = "JOINT" if depth else "ROOT"
        rotations = " ".join(f"{axis}rotation" for axis in order)
        channels = f"6 Xposition Yposition Zposition {rotations}" if not depth else f"3 {rotations}"
        offset = " ".join(f"{v:.6f}" for v in swap(offsets[j]))
        children = [k for k, p in enumerate(PARENTS) if p == j]
        inside = "".join(joint(k, depth + 1) for k in children)
        inside = inside or f"{pad}  End Site\n{pad}  {{ OFFSET 0 -5 0 }}\n"
        own = f"{pad}  OFFSET {offset}\n{pad}  CHANNELS {channels}\n"
        return f"{pad}{kind} {prefix}{names[j]}\n{pad}{{\n{own}{inside}{pad}}}\n"

    def depth_first(j):
        return [j, *(d for k, p in enumerate(PARENTS) if p == j for d in depth_first(k))]

    T = len(angles)
    positions = np.zeros((T, 3)) + [0, 90, 0] if positions is None else positions
    rows = ""
    for t in range(T):
        row = (*swap(positions[t]), *angles[t, depth_first(0)].ravel())
        rows += " ".join(f"{v:.6f}" for v in row) + "\n"
    motion = f"MOTION\nFrames: {T}\nFrame Time: {frame_time:.8f}\n"
    return f"HIERARCHY\n{joint(0, 0)}{motion}{rows}"


def rotation(axis, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"X": (1, 2), "Y": (2, 0), "Z": (0, 1)}[axis]
    m = np.eye(3)
    m[i, i] = m[j, j] = c
    m[i, j], m[j, i] = -s, s
    return m


def second_reading(angles, order, root):
    """Positions [21, 3] of one frame by 4 x 4 matrices: an implementation of its own."""
    world = []
    for j, (_, _, offset) in enumerate(SKELETON):
        m = np.eye(4)
        m[:3, 3] = root if PARENTS[j] < 0 else offset
        for axis, degrees in zip(order, angles[j], strict=True):
            turn = np.eye(4)
            turn[:3, :3] = rotation(axis, degrees)
            m = m @ turn
        world.append(m if PARENTS[j] < 0 else world[PARENTS[j]] @ m)
    return np.stack([m[:3, 3] for m in world])


def parse(text):
    return bvh.parse_bvh(io.BytesIO(text.encode()))


@pytest.mark.parametrize("order", ["ZXY", "ZYX", "XYZ"])
def test_positions_equal_a_second_reading(order):
    rng = np.random.default_rng(0)
    angles = rng.uniform(-170, 170, (3, 21, 3)).round(4)
    root = rng.uniform(-100, 100, (3, 3)).round(4)
    read = parse(bvh_text(angles, order, positions=root))
    index = [read.names.index(n) for n in NAMES]
    expected = [second_reading(a, order, r) for a, r in zip(angles, root, strict=True)]
    np.testing.assert_allclose(bvh.positions(read, read.values, index), expected, atol=1e-4)
    few = bvh.positions(read, read.values[1:2], index[:3])
    np.testing.assert_allclose(few, np.array(expected)[1:2, :3], atol=1e-4)
    assert read.fps == pytest.approx(30) and sum(n.endswith(" end") for n in read.names) == 5


def test_names_with_spaces_and_brackets_on_one_line():
    text = """HIERARCHY
    ROOT Bip01 Pelvis { OFFSET 0 0 0
      CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
      JOINT Bip01 L Thigh\t
      {
        OFFSET 1 -2 0 CHANNELS 3 Zrotation Xrotation Yrotation End Site { OFFSET 0 -40 0 } } }
    MOTION\r\nFrames:\t2\r\nFrame Time: 0.05\r\n0 90 0 0 0 0 90 0 0\r\n0 91 0 0 0 0
    0 0 0"""
    read = parse("\ufeff" + text)
    assert read.names == ["Bip01 Pelvis", "Bip01 L Thigh", "Bip01 L Thigh end"]
    assert read.parents == [-1, 0, 1] and read.fps == pytest.approx(20)
    expected = [[41, 88, 0], [1, 49, 0]]
    np.testing.assert_allclose(bvh.positions(read, read.values, [2])[:, 0], expected, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# The joints of real skeletons. A chain begins with a joint that it hangs on, and "@" stands for the
# words of the left and the right side. Then: which are hips, chest, neck, head, and hip, knee,
# ankle, toe, shoulder, elbow, wrist; "-" for none. The helpers that mislead are part of it.
SIDES = {"Left": "Right", "left": "right", "L": "R", "l": "r"}
REAL = {
    "Mixamo": ("Left", "mixamorig:", [
        "Hips Spine Spine1 Spine2 Neck Head HeadTop_End", "Head @Eye",
        "Spine2 @Shoulder @Arm @ForeArm @Hand @HandThumb1 @HandThumb2", "@Hand @HandIndex1",
        "Hips @UpLeg @Leg @Foot @ToeBase @Toe_End",
    ], "Hips Spine2 Neck Head @UpLeg @Leg @Foot @ToeBase @Arm @ForeArm @Hand"),
    "Mixamo without colon": ("Left", "mixamorig", [
        "Hips Spine Spine1 Spine2 Neck Head HeadTop_End",
        "Spine2 @Shoulder @Arm @ForeArm @Hand @HandThumb1",
        "Hips @UpLeg @Leg @Foot @ToeBase @Toe_End",
    ], "Hips Spine2 Neck Head @UpLeg @Leg @Foot @ToeBase @Arm @ForeArm @Hand"),
    "HumanIK": ("Left", "Character1_", [
        "Reference Hips Spine Spine1 Neck Head", "Spine1 @Shoulder @Arm @ArmRoll @ForeArm @Hand",
        "@ForeArm @ForeArmRoll", "Hips @UpLeg @Leg @Foot @ToeBase @FootExtraFinger1",
    ], "Hips Spine1 Neck Head @UpLeg @Leg @Foot @ToeBase @Arm @ForeArm @Hand"),
    "CMU, cgspeed's": ("Left", "", [
        "Hips LHipJoint LeftUpLeg", "Hips RHipJoint RightUpLeg", "@UpLeg @Leg @Foot @ToeBase",
        "Hips LowerBack Spine Spine1 Neck=0 Neck1 Head", "Spine1 @Shoulder=0 @Arm @ForeArm @Hand",
        "@Hand @FingerBase=0 @HandIndex1", "LeftHand LThumb=0", "RightHand RThumb=0",
    ], "Hips Spine Neck Head @UpLeg @Leg @Foot @ToeBase @Arm @ForeArm @Hand"),
    "CMU for Daz": ("l", "", [
        "hip abdomen chest neck head leftEye", "head rightEye",
        "chest @Collar @Shldr @ForeArm @Hand @Thumb1 @Thumb2", "@Hand @Index1 @Index2",
        "hip @Buttock @Thigh @Shin @Foot",
    ], "hip chest neck head @Thigh @Shin @Foot - @Shldr @ForeArm @Hand"),
    "CMU, Biovision's": ("Left", "", [
        "Hips Chest Neck Head", "Chest @Collar @Shoulder @Elbow @Wrist", "Hips @Hip @Knee @Ankle",
    ], "Hips Chest Neck Head @Hip @Knee @Ankle - @Shoulder @Elbow @Wrist"),
    "CMU, Biovision's older": ("Left", "", [
        "Hips Chest Neck Head", "Chest @Collar @UpArm @LowArm @Hand", "Hips @UpLeg @LowLeg @Foot",
    ], "Hips Chest Neck Head @UpLeg @LowLeg @Foot - @UpArm @LowArm @Hand"),
    "CMU, ASF's": ("l", "", [
        "root lowerback upperback thorax lowerneck upperneck head",
        "thorax @clavicle @humerus @radius @wrist @hand @fingers", "@hand @thumb",
        "root @hipjoint @femur @tibia @foot @toes",
    ], "root thorax lowerneck head @femur @tibia @foot @toes @humerus @radius @wrist"),
    "Xsens": ("Left", "", [
        "Hips Chest Chest2 Chest3 Chest4 Neck Head",
        "Chest4 @Collar @Shoulder @Elbow @Wrist", "Hips @Hip @Knee @Ankle @Toe",
    ], "Hips Chest4 Neck Head @Hip @Knee @Ankle @Toe @Shoulder @Elbow @Wrist"),
    "Xsens, segments": ("Left", "", [
        "Pelvis L5 L3 T12 T8 Neck Head", "T8 @Shoulder @UpperArm @ForeArm @Hand",
        "Pelvis @UpperLeg @LowerLeg @Foot @Toe",
    ], "Pelvis T8 Neck Head @UpperLeg @LowerLeg @Foot @Toe @UpperArm @ForeArm @Hand"),
    "Rokoko": ("left", "", [
        "root hips spine1 spine2 spine3 spine4 neck head",
        "spine4 @Shoulder @Arm @ForeArm @Hand", "hips @Thigh @Shin @Foot @Toe @ToeTip",
    ], "hips spine4 neck head @Thigh @Shin @Foot @Toe @Arm @ForeArm @Hand"),
    "Unreal": ("l", "", [
        "root pelvis spine_01 spine_02 spine_03 neck_01 head",
        "spine_03 clavicle_@ upperarm_@ lowerarm_@ hand_@ index_01_@ index_02_@",
        "lowerarm_@ lowerarm_twist_01_@", "upperarm_@ upperarm_twist_01_@",
        "pelvis thigh_@ calf_@ foot_@ ball_@", "calf_@ calf_twist_01_@", "thigh_@ thigh_twist_01_@",
        "root ik_foot_root ik_foot_@", "root ik_hand_root ik_hand_gun ik_hand_@",
    ], "pelvis spine_03 neck_01 head thigh_@ calf_@ foot_@ ball_@ upperarm_@ lowerarm_@ hand_@"),
    "3ds Max Biped": ("L", "Bip01_", [
        "Root Pelvis Spine Spine1 Neck Head HeadNub",
        "Neck @_Clavicle @_UpperArm @_Forearm @_Hand @_Finger0 @_Finger01",
        "Spine @_Thigh @_Calf @_Foot @_Toe0 @_Toe0Nub",
    ], "Pelvis Spine1 Neck Head @_Thigh @_Calf @_Foot @_Toe0 @_UpperArm @_Forearm @_Hand"),
    "SMPL": ("left", "", [
        "pelvis spine1 spine2 spine3 neck head", "pelvis @_hip @_knee @_ankle @_foot",
        "spine3 @_collar @_shoulder @_elbow @_wrist @_hand",
    ], "pelvis spine3 neck head @_hip @_knee @_ankle @_foot @_shoulder @_elbow @_wrist"),
    "SMPL in Maya": ("L", "m_avg_", [
        "root Pelvis Spine1 Spine2 Spine3 Neck Head", "Pelvis @_Hip @_Knee @_Ankle @_Foot",
        "Spine3 @_Collar @_Shoulder @_Elbow @_Wrist @_Hand",
    ], "Pelvis Spine3 Neck Head @_Hip @_Knee @_Ankle @_Foot @_Shoulder @_Elbow @_Wrist"),
    "VRoid": ("L", "J_", [
        "Root Bip_C_Hips Bip_C_Spine Bip_C_Chest Bip_C_UpperChest Bip_C_Neck Bip_C_Head",
        "Bip_C_Head Adj_@_FaceEye", "Bip_C_Head Sec_Hair1_01 Sec_Hair2_01",
        "Bip_C_UpperChest Sec_@_Bust1 Sec_@_Bust2",
        "Bip_C_UpperChest Bip_@_Shoulder Bip_@_UpperArm Bip_@_LowerArm Bip_@_Hand Bip_@_Thumb1",
        "Bip_@_UpperArm Sec_@_TopsUpperArm Sec_@_Hand",
        "Bip_C_Hips Bip_@_UpperLeg Bip_@_LowerLeg Bip_@_Foot Bip_@_ToeBase",
        "Bip_C_Hips Sec_@_UpperLeg Sec_@_SkirtLeg",
    ], "Bip_C_Hips Bip_C_UpperChest Bip_C_Neck Bip_C_Head Bip_@_UpperLeg Bip_@_LowerLeg Bip_@_Foot "
       "Bip_@_ToeBase Bip_@_UpperArm Bip_@_LowerArm Bip_@_Hand"),
    "Bandai-Namco": ("L", "", [
        "joint_Root Hips Spine Chest Neck Head", "Chest Shoulder_@ UpperArm_@ LowerArm_@ Hand_@",
        "Hips UpperLeg_@ LowerLeg_@ Foot_@ Toes_@",
    ], "Hips Chest Neck Head UpperLeg_@ LowerLeg_@ Foot_@ Toes_@ UpperArm_@ LowerArm_@ Hand_@"),
    "LAFAN1": ("Left", "", [
        "Hips Spine Spine1 Spine2 Neck Head", "Spine2 @Shoulder @Arm @ForeArm @Hand",
        "Hips @UpLeg @Leg @Foot @Toe",
    ], "Hips Spine2 Neck Head @UpLeg @Leg @Foot @Toe @Arm @ForeArm @Hand"),
    "MocapNET": ("l", "", [
        "hip abdomen chest neck neck1 head __jaw jaw", "head special06.@ eye.@",
        "chest @Collar @Shldr @ForeArm @Hand metacarpal1.@ finger2-1.@", "@Hand __@thumb @thumb",
        "hip @Buttock @Thigh @Shin @Foot toe1-1.@ toe1-2.@",
        "@Foot toe2-1.@ toe2-2.@", "@Foot toe3-1.@ toe3-2.@", "@Foot toe5-1.@",
    ], "hip chest neck head @Thigh @Shin @Foot toe3-1.@ @Shldr @ForeArm @Hand"),
    "MakeHuman": ("L", "", [
        "root spine05 spine04 spine03 spine02 spine01 neck01 neck02 neck03 head jaw",
        "spine01 clavicle.@ shoulder01.@ upperarm01.@ upperarm02.@ lowerarm01.@ lowerarm02.@ "
        "wrist.@ finger1-1.@",
        "root pelvis.@ upperleg01.@ upperleg02.@ lowerleg01.@ lowerleg02.@ foot.@ toe1-1.@",
        "foot.@ toe3-1.@",
    ], "root spine01 neck01 head upperleg01.@ lowerleg01.@ foot.@ toe3-1.@ upperarm01.@ "
       "lowerarm01.@ wrist.@"),
    "Rigify": ("L", "DEF-", [
        "spine spine.001 spine.002 spine.003 spine.004 spine.005 spine.006", "spine pelvis.@",
        "spine.003 shoulder.@ upper_arm.@ upper_arm.@.001 forearm.@ forearm.@.001 hand.@",
        "spine thigh.@ thigh.@.001 shin.@ shin.@.001 foot.@ toe.@",
    ], "spine spine.003 spine.004 spine.006 thigh.@ shin.@ foot.@ toe.@ upper_arm.@ forearm.@ "
       "hand.@"),
    "Character Creator": ("L", "CC_Base_", [
        "BoneRoot Hip Pelvis @_Thigh @_Calf @_Foot @_ToeBase @_BigToe1",
        "@_Thigh @_ThighTwist01", "@_Calf @_KneeShareBone", "@_Foot @_ToeBaseShareBone",
        "Hip Waist Spine01 Spine02 NeckTwist01 NeckTwist02 Head",
        "Spine02 @_Clavicle @_Upperarm @_Forearm @_Hand", "@_Forearm @_ElbowShareBone",
    ], "Hip Spine02 NeckTwist01 Head @_Thigh @_Calf @_Foot @_ToeBase @_Upperarm @_Forearm @_Hand"),
    "Maya's AdvancedSkeleton": ("L", "", [
        "Root_M Spine1_M Chest_M Neck_M NeckPart1_M Head_M HeadEnd_M",
        "Chest_M Scapula_@ Shoulder_@ ShoulderPart1_@ Elbow_@ ElbowPart1_@ Wrist_@",
        "Root_M Hip_@ HipPart1_@ Knee_@ KneePart1_@ Ankle_@ Toes_@ ToesEnd_@",
    ], "Root_M Chest_M Neck_M Head_M Hip_@ Knee_@ Ankle_@ Toes_@ Shoulder_@ Elbow_@ Wrist_@"),
    "Daz Genesis": ("l", "", [
        "hip pelvis @ThighBend @ThighTwist @Shin @Foot @Metatarsals @Toe @BigToe",
        "hip abdomenLower abdomenUpper chestLower chestUpper neckLower neckUpper head upperTeeth",
        "chestUpper @Collar @ShldrBend @ShldrTwist @ForearmBend @ForearmTwist @Hand @Thumb1",
    ], "hip chestUpper neckLower head @ThighBend @Shin @Foot @Toe @ShldrBend @ForearmBend @Hand"),
    "OptiTrack": ("L", "Skeleton1_", [
        "Hip Ab Chest Neck Head", "Chest @Shoulder @UArm @FArm @Hand @Thumb1",
        "Hip @Thigh @Shin @Foot @Toe",
    ], "Hip Chest Neck Head @Thigh @Shin @Foot @Toe @UArm @FArm @Hand"),
    "Leg and Shin": ("Left", "", [
        "Root Hips Spine1 Spine2 Chest Neck1 Neck2 Head", "Chest @Shoulder @Arm @ForeArm @Hand",
        "Hips @Leg @Shin @Foot @ToeBase @ToeEnd",
    ], "Hips Chest Neck1 Head @Leg @Shin @Foot @ToeBase @Arm @ForeArm @Hand"),
    "Kinect": ("Left", "", [
        "SpineBase SpineMid SpineShoulder Neck Head",
        "SpineShoulder Shoulder@ Elbow@ Wrist@ Hand@ HandTip@", "SpineBase Hip@ Knee@ Ankle@ Foot@",
    ], "SpineBase SpineShoulder Neck Head Hip@ Knee@ Ankle@ Foot@ Shoulder@ Elbow@ Wrist@"),
    "DeepMotion": ("l", "", [
        "hips_JNT spine_JNT spine1_JNT spine2_JNT neck_JNT head_JNT",
        "spine2_JNT @_shoulder_JNT @_arm_JNT @_forearm_JNT @_hand_JNT @_handThumb1_JNT",
        "hips_JNT @_upleg_JNT @_leg_JNT @_foot_JNT @_toebase_JNT",
    ], "hips_JNT spine2_JNT neck_JNT head_JNT @_upleg_JNT @_leg_JNT @_foot_JNT @_toebase_JNT "
       "@_arm_JNT @_forearm_JNT @_hand_JNT"),
    "unknown words for the ends": ("Left", "", [
        "Hips Spine Chest Neck Skull", "Chest @Arm @ForeArm @Palm", "Hips @UpLeg @Leg @Foot @Zehen",
    ], "Hips Chest Neck Skull @UpLeg @Leg @Foot @Zehen @Arm @ForeArm @Palm"),
}  # fmt: skip
OURS = "hips chest neck head hip knee ankle toe shoulder elbow wrist".split()


def real(kind):
    """Names, parents, offsets and the expected joints of a skeleton. "=0": where its parent is."""
    left, prefix, chains, expected = REAL[kind]
    names, parents, offsets = [], [], []
    sides = {"l": left, "r": SIDES[left]}
    for chain in chains:
        for word in sides.values() if "@" in chain else ("",):
            above = -1
            for name in chain.replace("@", word).split():
                name, _, nowhere = name.partition("=")
                if name not in names:
                    names.append(name)
                    parents.append(above)
                    offsets.append([0, 0 if nowhere else 10, 0])
                above = names.index(name)
    wanted = {}
    for ours, name in zip(OURS, expected.split(), strict=True):
        for side, word in sides.items() if ours in bvh.LIMBS else (("", ""),):
            if name != "-":
                wanted[f"{side} {ours}".strip()] = prefix + name.replace("@", word)
    return [prefix + name for name in names], parents, np.array(offsets, float), wanted


@pytest.mark.parametrize("kind", REAL)
def test_joints_of_real_skeletons(kind):
    names, parents, offsets, wanted = real(kind)
    found = bvh.find_joints(names, parents, offsets)
    assert {key: names[j] for key, j in found.items()} == wanted


def test_biped_names_with_spaces():
    names, parents, offsets, wanted = real("3ds Max Biped")
    names = [name.replace("_", " ") for name in names]
    found = bvh.find_joints(names, parents, offsets)
    assert {k: names[j] for k, j in found.items()} == {k: v.replace("_", " ")
                                                       for k, v in wanted.items()}


@given(st.sampled_from(sorted(REAL)), st.from_regex(r"[A-Za-z0-9]{1,9}[:_|. -]", fullmatch=True),
       st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_a_prefix_and_the_order_of_joints_change_nothing(kind, prefix, capitals, random):
    names, parents, offsets, wanted = real(kind)
    if bvh.SIDES.keys() & {word.lower() for word in bvh.WORDS.findall(prefix)}:
        return  # "L_" says that all joints are on the left
    spelled = [prefix + (name.upper() if capitals and "_" in name else name) for name in names]
    # Siblings in another order: parents still come first.
    order = sorted(range(len(names)), key=lambda j: (len(bvh.line_to_root(j, parents)),
                                                     random.random()))
    moved = {j: i for i, j in enumerate(order)} | {-1: -1}
    found = bvh.find_joints([spelled[j] for j in order], [moved[parents[j]] for j in order],
                            offsets[order])
    assert {key: names[order[i]] for key, i in found.items()} == wanted


def test_what_is_missing_is_said():
    names, parents, offsets, _ = real("LAFAN1")
    names[names.index("LeftLeg")] = "Left\x1b[31m\nX"
    with pytest.raises(ValueError, match="^expected joints for l knee, found only Hips, ") as e:
        bvh.find_joints(names, parents, offsets)
    assert str(e.value).isprintable() and len(str(e.value)) < 250


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_name_is_taken_apart(name):
    part = bvh.take_apart(name)
    assert part is None or part[1] in ("", "l", "r")


# --------------------------------------------------------------------------------------------------
# Files that ask for too much

ROOT = "HIERARCHY\nROOT a\n{\nOFFSET 0 0 0\nCHANNELS 3 Xrotation Yrotation Zrotation\n"
END = "MOTION\nFrames: 2\nFrame Time: 0.1\n0 0 0\n0 0 0\n"
INSIDE = "OFFSET 0 1 0 CHANNELS 0\n"


@pytest.mark.parametrize("text, expected", [
    (ROOT + "End Site\n{\nOFFSET 0 1 0\n" * 60_000 + "}" * 60_001 + END, "at most 1000 joints"),
    (ROOT + f"JOINT b\n{{\n{INSIDE}" * 2000 + "}" * 2001 + END, "at most 1000 joints"),
    (ROOT + f"JOINT b\n{{\n{INSIDE}}}" * 2000 + "}" + END, "at most 1000 joints"),
    ("{" * (8 << 20) + END, "no such lines in the first 4 MB"),
    ("{" * (1 << 20) + END, "line 1 is not understood"),
    (ROOT + "{" * (1 << 20) + END, "line 6 is not understood"),
    ("HIERARCHY " * 100_000 + END, "a hierarchy of joints that is complete"),
    (ROOT + "}" + END.replace("2", str(10**12)), "found 1000000000000 frames of 3"),
    (ROOT + "}" + END.replace("2", "9" * 5000), "no such lines"),
    (ROOT + "}" + END.replace("2", "\u0662"), "no such lines"),
    (ROOT + "}" + END + "0 " * (6 << 20), "expected 2 frames of 3"),
    (ROOT + "}" + END + "x" * (6 << 20), "expected 2 frames of 3"),
    (ROOT.replace("3 X", "999999 X") + "}" + END, "line 5 is not understood"),
    (ROOT.replace("3 X", "-1 X") + "}" + END, "line 5 is not understood"),
    (ROOT.replace("3 X", "9" * 5000 + " X") + "}" + END, "line 5 is not understood"),
    (ROOT.replace("Zrot", "Wrot") + "}" + END, "line 5 is not understood"),
    (ROOT.replace("0 0 0", "0 secret 0") + "}" + END, "OFFSET three finite numbers"),
    (ROOT.replace("0 0 0", "0 0") + "}" + END, "line 5 is not understood"),
    (ROOT + "secret\n}" + END, "line 6 is not understood"),
    (ROOT + "ROOT secret\n{\nOFFSET 0 0 0\n}\n}" + END, "line 6 is not understood"),
    (ROOT + "JOINT secret\nOFFSET 0 0 0\n}" + END, "line 7 is not understood"),
    ("JOINT secret\n{\nOFFSET 0 0 0\n}" + END, "line 1 is not understood"),
    (ROOT + END, "a hierarchy of joints that is complete"),
    (ROOT + "}" + END.replace("0.1", "0"), "Frame Time to be a number above 0"),
    (ROOT + "}" + END.replace("0.1", "secret"), "Frame Time to be a number above 0"),
    (ROOT + "}" + END.replace("0.1", "nan"), "Frame Time to be a number above 0"),
    (ROOT + "}" + END.replace("0 0 0\n0", "0 0 0\nsecret"), "no finite numbers"),
    (ROOT + "}" + END.replace("0 0 0\n0", "0 0 0\n1e999"), "no finite numbers"),
    (ROOT + "}" + END.replace("2", "0"), "expected 0 frames of 3"),
    (ROOT.replace("CHANNELS 3 Xrotation Yrotation Zrotation", "") + "}" + END,
     "expected 2 frames of 0"),
])  # fmt: skip
def test_refused_at_once_in_one_sentence(text, expected):
    f = io.BytesIO(text.encode())
    tracemalloc.start()
    with pytest.raises(ValueError, match=expected) as e:
        bvh.parse_bvh(f)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = str(e.value)
    assert len(said) < 300 and said.isprintable() and "secret" not in said
    assert peak < 150 << 20


def test_a_skeleton_of_a_thousand_joints_is_read():
    """A spine, on which a quadratic step would take a million."""
    text = ROOT + f"JOINT b\n{{\n{INSIDE}" * 999 + "}" * 1000 + END
    read = parse(text)
    assert len(read.names) == 1000
    place = bvh.positions(read, read.values, [999])
    np.testing.assert_allclose(place[:, 0], [[0, 999, 0]] * 2)


def test_names_of_a_megabyte():
    read = parse(ROOT.replace("ROOT a", "ROOT " + "a_" * (1 << 20)) + "}" + END)
    with pytest.raises(ValueError, match="expected joints for hips.*found only a_a_a") as e:
        bvh.find_joints(read.names, read.parents, read.offsets)
    assert len(str(e.value)) < 400
