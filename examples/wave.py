"""Write examples/wave.json: 2D keypoints of a stick figure that waves, as AlphaPose writes them.

    python examples/wave.py
    python lift.py examples/wave.json

It is made from nothing but the numbers below. For a while the left wrist and knee are as good as
hidden.
"""

import json
from pathlib import Path

import numpy as np

# COCO's 17 joints of a person of 1.75 m, metres: x to the person's left, y up, z to the front
REST = np.array([
    [0, 1.60, 0.10],  # nose
    [0.03, 1.63, 0.08], [-0.03, 1.63, 0.08],  # eyes
    [0.07, 1.61, 0], [-0.07, 1.61, 0],  # ears
    [0.18, 1.42, 0], [-0.18, 1.42, 0],  # shoulders
    [0.22, 1.14, 0], [-0.22, 1.14, 0],  # elbows
    [0.24, 0.90, 0.05], [-0.24, 0.90, 0.05],  # wrists
    [0.11, 0.93, 0], [-0.11, 0.93, 0],  # hips
    [0.12, 0.50, 0.02], [-0.12, 0.50, 0.02],  # knees
    [0.12, 0.09, 0], [-0.12, 0.09, 0],  # ankles
])  # fmt: skip
HIDDEN = (9, 13)  # left wrist, left knee


def main() -> None:
    rng, results = np.random.default_rng(0), []
    for frame in range(40):
        t, x = frame / 20 * np.pi, REST.copy()
        lift = 2.3 + 0.4 * np.sin(3 * t)  # the right arm: raised, the forearm waving
        x[8] = x[6] + 0.28 * np.array([-np.sin(2.0), -np.cos(2.0), 0])
        x[10] = x[8] + 0.25 * np.array([-np.sin(lift), -np.cos(lift), 0.1])
        bend = 0.5 * (1 - np.cos(t))  # the left knee: lifted to the front
        x[13] = x[11] + 0.43 * np.array([0, -np.cos(bend), np.sin(bend)])
        x[15] = x[13] + 0.41 * np.array([0, -1, 0])
        turn = 0.4 * np.sin(t / 2)
        c, s = np.cos(turn), np.sin(turn)
        x = x @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        # A camera 5 m away, with an image of 1000 x 1000 px.
        px = 500 + 1145 * np.stack([x[:, 0], 0.9 - x[:, 1]], 1) / (5.0 - x[:, 2:])
        px += rng.normal(0, 3, px.shape)
        score = rng.uniform(0.8, 0.95, 17)
        if 10 <= frame < 26:
            # A detector that does not see a joint still says where it may be.
            score[list(HIDDEN)] = 0.05
            px[list(HIDDEN)] += rng.normal(0, 40, (2, 2))
        keypoints = np.column_stack([px.round(1), score.round(3)]).ravel().tolist()
        results.append(dict(image_id=f"{frame}.jpg", category_id=1, keypoints=keypoints,
                            score=2.9, idx=1))  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
