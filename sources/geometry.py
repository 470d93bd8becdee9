"""Rotations, cameras and projection, in NumPy.

Quaternions are (w, x, y, z), of unit length, in the last axis. Camera frames have x to the right, y
down and z forward.
"""

import numpy as np

IMAGE_SIZE = (1000, 1000)  # px


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
    """Shortest-arc interpolation of quaternions a, b [..., 4] at t [...] in [0, 1]."""
    dot = np.sum(a * b, -1, keepdims=True)
    b = np.where(dot < 0, -b, b)
    angle = np.arccos(np.clip(np.abs(dot), 0, 1))
    t, near = np.asarray(t)[..., None], angle < 1e-4
    s = np.where(near, 1.0, np.sin(angle))  # near 0 the arc is a chord: interpolate linearly
    wa = np.where(near, 1 - t, np.sin((1 - t) * angle) / s)
    wb = np.where(near, t, np.sin(t * angle) / s)
    q = wa * a + wb * b
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def rotation_between(a, b):
    """Smallest rotation [..., 3, 3] that turns unit vectors a onto b [..., 3] (undefined for
    opposite vectors)."""
    v, c = np.cross(a, b), np.sum(a * b, -1)[..., None, None]
    k = np.zeros(v.shape + (3,))
    k[..., 0, 1], k[..., 0, 2], k[..., 1, 2] = -v[..., 2], v[..., 1], -v[..., 0]
    k = k - np.swapaxes(k, -1, -2)
    return np.eye(3) + k + k @ k / (1 + c)


# --------------------------------------------------------------------------------------------------
# Cameras

H36M_INTRINSICS = {  # id: focal length fx fy, centre cx cy, radial k1 k2 k3, tangential p1 p2 (VideoPose3D's order)
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


def make_cameras(rng):
    """Four cameras around the room's centre, one in each quadrant: H36M intrinsics, R and t (mm) of
    x = R X + t."""
    cameras = []
    for k, (name, (f, c, radial, tangential)) in enumerate(H36M_INTRINSICS.items()):
        azimuth = np.pi / 4 + k * np.pi / 2 + rng.uniform(-0.3, 0.3)
        distance, height = rng.uniform(4700, 5500), rng.uniform(1400, 1700)
        centre = np.array([distance * np.cos(azimuth), distance * np.sin(azimuth), height])
        forward = np.array([0, 0, 900.0]) - centre
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1.0])
        right /= np.linalg.norm(right)
        rotation = np.stack(
            [right, np.cross(forward, right), forward]
        )  # rows: x right, y down, z forward
        cameras.append({"id": name, "f": list(f), "c": list(c), "k": list(radial), "p": list(tangential),
                        "R": rotation.tolist(), "t": (-rotation @ centre).tolist()})  # fmt: skip
    return cameras


def project(points, camera):
    """Camera-frame points [..., 3] -> pixels [..., 2] with Human3.6M's distortion, as VideoPose3D
    writes it."""
    k, p = camera["k"], np.array(camera["p"])
    m = np.clip(points[..., :2] / points[..., 2:], -1, 1)
    r2 = np.sum(m * m, -1, keepdims=True)
    radial = 1 + r2 * (k[0] + r2 * (k[1] + r2 * k[2]))
    tangential = np.sum(m * p, -1, keepdims=True)
    return (m * (radial + tangential) + p * r2) * np.array(camera["f"]) + np.array(camera["c"])
