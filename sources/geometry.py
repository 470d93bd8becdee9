"""Rotations, cameras and projection, in NumPy.

Quaternions are (w, x, y, z), of unit length, in the last axis. The axes of a camera are x to the
right, y down and z forward. The cameras are Human3.6M's, as
github.com/facebookresearch/VideoPose3D has them in common/h36m_dataset.py.
"""

import numpy as np

IMAGE_SIZE = (1000, 1000)  # px, of the made-up cameras

# By camera: focal lengths fx fy, centre cx cy, radial k1 k2 k3, tangential p1 p2 (px or no unit).
H36M_INTRINSICS = {
    "54138969": ((1145.0494384765625, 1143.7811279296875), (512.54150390625, 515.4514770507812),
                 (-0.20709891617298126, 0.24777518212795258, -0.0030751503072679043),
                 (-0.0009756988729350269, -0.00142447161488235)),
    "55011271": ((1149.6756591796875, 1147.5916748046875), (508.8486328125, 508.0649108886719),
                 (-0.1942136287689209, 0.2404085397720337, 0.006819975562393665),
                 (-0.0016190266469493508, -0.0027408944442868233)),
    "58860488": ((1149.1407470703125, 1148.7989501953125), (519.8158569335938, 501.40264892578125),
                 (-0.2083381861448288, 0.25548800826072693, -0.0024604974314570427),
                 (0.0014843869721516967, -0.0007599993259645998)),
    "60457274": ((1145.5113525390625, 1144.77392578125), (514.9682006835938, 501.88201904296875),
                 (-0.198384091258049, 0.21832367777824402, -0.008947807364165783),
                 (-0.0005872055771760643, -0.0018133620033040643)),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Rotations


def quat_mul(a, b):
    """Hamilton product of quaternions [..., 4]: first b, then a."""
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


def quat_from_rotvec(v):
    """Rotation vectors [..., 3] (axis times angle, radians) -> quaternions [..., 4]."""
    half = 0.5 * np.linalg.norm(v, axis=-1, keepdims=True)
    # np.sinc(x) = sin(pi x) / (pi x), which is defined at 0, too.
    return np.concatenate([np.cos(half), 0.5 * np.sinc(half / np.pi) * v], -1)


def quat_to_matrix(q):
    """Unit quaternions [..., 4] -> rotation matrices [..., 3, 3]."""
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(r, -1) for r in rows], -2)


def slerp(a, b, t):
    """Interpolate quaternions a, b [..., 4] along the shorter arc, at t [...] in [0, 1]."""
    dot = np.sum(a * b, -1, keepdims=True)
    b = np.where(dot < 0, -b, b)  # b and -b are one rotation, and the nearer one is meant
    angle = np.arccos(np.clip(np.abs(dot), 0, 1))
    t = np.asarray(t)[..., None]
    # Near 0 the arc is as good as its chord, and sin(angle) is no divisor: interpolate linearly.
    near = angle < 1e-4
    s = np.where(near, 1.0, np.sin(angle))
    wa = np.where(near, 1 - t, np.sin((1 - t) * angle) / s)
    wb = np.where(near, t, np.sin(t * angle) / s)
    q = wa * a + wb * b
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def rotation_between(a, b):
    """Smallest rotation [..., 3, 3] that turns the unit vectors a [..., 3] onto b [..., 3].

    Rodrigues' formula without angles: R = I + K + K^2 / (1 + a.b), with K the matrix of a x b.
    It is undefined where a and b point in opposite directions.
    """
    v, c = np.cross(a, b), np.sum(a * b, -1)[..., None, None]
    k = np.zeros(v.shape + (3,))
    k[..., 0, 1], k[..., 0, 2], k[..., 1, 2] = -v[..., 2], v[..., 1], -v[..., 0]
    k = k - np.swapaxes(k, -1, -2)
    return np.eye(3) + k + k @ k / (1 + c)


# --------------------------------------------------------------------------------------------------
# Cameras


def make_cameras(rng):
    """Four cameras around the centre of the room, one in each quadrant, as in Human3.6M.

    Each is a dict with Human3.6M's intrinsics (id, f, c, k, p) and the pose R [3, 3], t [3] mm of
    x_camera = R x_world + t. The world has z up and the floor at z = 0.
    """
    cameras = []
    for k, (name, (f, c, radial, tangential)) in enumerate(H36M_INTRINSICS.items()):
        azimuth = np.pi / 4 + k * np.pi / 2 + rng.uniform(-0.3, 0.3)
        distance, height = rng.uniform(4700, 5500), rng.uniform(1400, 1700)
        centre = np.array([distance * np.cos(azimuth), distance * np.sin(azimuth), height])
        forward = np.array([0, 0, 900.0]) - centre  # looks at the hips of a person in the middle
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1.0])
        right /= np.linalg.norm(right)
        R = np.stack([right, np.cross(forward, right), forward])  # rows: x right, y down, z forward
        t = -R @ centre
        cameras.append({
            "id": name, "f": list(f), "c": list(c), "k": list(radial), "p": list(tangential),
            "R": R.tolist(), "t": t.tolist(),
        })  # fmt: skip
    return cameras


def project(points, camera):
    """Camera-frame points [..., 3] -> pixels [..., 2], with Human3.6M's lens distortion.

    This is VideoPose3D's `project_to_2d`, as its files of 2D ground truth were made with it.
    """
    k, p = camera["k"], np.array(camera["p"])
    # The polynomial below means nothing far outside the image, so rays end at 45 degrees.
    m = np.clip(points[..., :2] / points[..., 2:], -1, 1)
    r2 = np.sum(m * m, -1, keepdims=True)
    radial = 1 + r2 * (k[0] + r2 * (k[1] + r2 * k[2]))
    tangential = np.sum(m * p, -1, keepdims=True)
    return (m * (radial + tangential) + p * r2) * np.array(camera["f"]) + np.array(camera["c"])
