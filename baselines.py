"""What HiPART is compared with: plain networks for the same tasks, with the same interfaces.

    MLPLifter    lifts 2D points to 3D like hipart.SpatialLifter, at a cost that a CPU can afford
    PoseFormer   lifts the centre of T frames (Tables 6 and 10)
    MixSTE       lifts all of T frames (Tables 6 and 10)
    Regressor    densifies a sparse pose like hipart.HiPART, without tokens, in one step
"""

import torch
from torch import Tensor, nn

from hipart import (
    J_D,
    J_F,
    Block,
    J,
    Lifter,
    SpatialLifter,
    detected_pelvis,
    from_model_frame,
    hide_missing,
    run_blocks,
    to_model_frame,
    visible_joints,
)


class ResidualMLP(nn.Module):
    """After Martinez et al. 2017: a linear layer, residual blocks of two layers, a linear layer.

    Their batch norm and dropout are left out: both are noise on a coordinate, and with a fresh
    detection of every pose in every epoch they only cost accuracy. SiLU takes the place of ReLU,
    since what perspective does is smooth (docs/decisions.md has the measurements).
    """

    def __init__(self, n_in: int, n_out: int, width: int, blocks: int):
        super().__init__()

        def layer(n: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(n, width), nn.SiLU())

        self.first = layer(n_in)
        self.blocks = nn.ModuleList(
            [nn.Sequential(layer(width), layer(width)) for _ in range(blocks)])
        self.last = nn.Linear(width, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n_in] -> [B, n_out]."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class MLPLifter(Lifter):
    """The field's simple baseline, after Martinez et al. 2017: n_points is 17 or 161."""

    def __init__(self, n_points: int = J + J_D + J_F, width: int = 1024, blocks: int = 2):
        super().__init__(n_points)
        n_in = J * 3 + (J_D * 6 + J_F * 2 if n_points > J else 0)
        self.mlp = ResidualMLP(n_in, J * 3, width, blocks)

    def forward(self, x: Tensor, conf: Tensor | None = None) -> Tensor:
        """x [B, n_points, 2] in normalised image coordinates, conf [B, 17] -> y [B, 17, 3] in mm,
        relative to the pelvis."""
        f, visible = self.features(x, conf), visible_joints(x[:, :J], conf)
        # A missing joint is 0, which is its mean in the training set, and it is flagged.
        flat = [(f["sparse"] * visible[..., None]).flatten(1), visible]
        if self.n_points > J:
            flat += [f["dense"].flatten(1), f["fine"].flatten(1)]
        y = self.mlp(torch.cat(flat, 1)).unflatten(1, (J, 3))
        return y * self.std_y + self.mean_y


class TemporalLifter(SpatialLifter):
    """What PoseFormer and MixSTE share: T frames of a sequence come in together, and each of them
    becomes a token per point like a frame of `SpatialLifter`.

    `over_time` are the blocks in which frames see one another. `every` says whether a lifter gives
    the pose of every frame, or that of the centre alone.
    """

    every: bool

    def __init__(self, n_points: int, frames: int, width: int, blocks: int, width_t: int):
        super().__init__(n_points, width, blocks, heads=8)
        if frames < 1 or frames % 2 == 0:
            raise ValueError(f"frames must be an odd number, or there is no centre, found {frames}")
        self.frames = frames
        self.time = nn.Parameter(torch.zeros(frames, width_t))
        self.over_time = nn.ModuleList(
            [Block(width_t, 8, 2, drop_path=block.drop_path, eps=1e-6) for block in self.blocks])

    def tokens_of_frames(self, x: Tensor, conf: Tensor | None) -> Tensor:
        """x [B, T, n_points, 2], conf [B, T, 17] or None -> [B T, n_points, width]. ValueError for
        another number of frames or points."""
        if x.shape[1:] != (self.frames, self.n_points, 2):
            raise ValueError(f"this lifter takes [B, {self.frames}, {self.n_points}, 2]: frames, "
                             f"then points, found {list(x.shape)}")
        if conf is not None and conf.shape != (len(x), self.frames, J):
            raise ValueError(f"this lifter takes conf [{len(x)}, {self.frames}, {J}], "
                             f"found {list(conf.shape)}")
        return self.tokens(x.flatten(0, 1), None if conf is None else conf.flatten(0, 1))


class PoseFormer(TemporalLifter):
    """After Zheng et al. 2021: a transformer over the points of each frame, then one over frames,
    whose tokens are the 17 joints of a frame in a row. A weighted mean over frames leaves the
    centre's pose.

    Dense and fine points are seen within their frame, and not carried on: a row of all 161 would
    ask for 90 times the weights, and with HiPART's points the paper's lifter has hardly more.
    """

    every = False

    def __init__(self, n_points: int = J + J_D + J_F, frames: int = 81, width: int = 32,
                 blocks: int = 4):
        super().__init__(n_points, frames, width, blocks, J * width)
        self.norm_t = nn.LayerNorm(J * width, eps=1e-6)
        self.mean_t = nn.Conv1d(frames, 1, 1)
        self.head = nn.Sequential(nn.LayerNorm(J * width), nn.Linear(J * width, J * 3))

    def forward(self, x: Tensor, conf: Tensor | None = None) -> Tensor:
        """x [B, T, n_points, 2] in normalised image coordinates, conf [B, T, 17] -> y [B, 17, 3] of
        the centre frame in mm, relative to the pelvis, in the camera's axes."""
        tokens = run_blocks(self.blocks, self.tokens_of_frames(x, conf))  # [B T, n_points, width]
        joints = self.norm(tokens[:, :J]).flatten(1).unflatten(0, (-1, self.frames))
        rows = self.norm_t(run_blocks(self.over_time, joints + self.time))  # [B, T, 17 width]
        y = self.head(self.mean_t(rows)[:, 0]).unflatten(1, (J, 3))
        return y * self.std_y + self.mean_y


class MixSTE(TemporalLifter):
    """After Zhang et al. 2022: blocks in turns over the points of a frame and over the frames of a
    point. A head reads the 17 joints of every frame."""

    every = True

    def __init__(self, n_points: int = J + J_D + J_F, frames: int = 81, width: int = 512,
                 blocks: int = 8):
        super().__init__(n_points, frames, width, blocks, width)

    def forward(self, x: Tensor, conf: Tensor | None = None) -> Tensor:
        """x [B, T, n_points, 2] in normalised image coordinates, conf [B, T, 17] -> y
        [B, T, 17, 3] in mm, relative to the pelvis of each frame, in the camera's axes."""

        def turn_round(tokens: Tensor, n: int) -> Tensor:
            """[B n, m, width] -> [B m, n, width]."""
            return tokens.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)

        tokens, time = self.tokens_of_frames(x, conf), self.time
        for over_points, over_frames in zip(self.blocks, self.over_time, strict=True):
            tokens = turn_round(over_points(tokens), self.frames)  # [B n_points, T, width]
            tokens = turn_round(over_frames(tokens + time), self.n_points)  # [B T, n_points, width]
            time = 0.0  # which frame it is, a token is told once
        y = self.head(self.norm(tokens[:, :J])).unflatten(0, (-1, self.frames))
        return y * self.std_y + self.mean_y


class Regressor(nn.Module):
    """The plain alternative to tokens: an MLP from the sparse pose straight to the dense and fine
    points. Trained on the mean distance, it learns where a point most likely is."""

    def __init__(self, width: int = 1024, blocks: int = 3):
        super().__init__()
        self.mlp = ResidualMLP(J * 3, (J_D + J_F) * 2, width, blocks)

    def forward(self, x_s: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """In the model frame: x_s [B, 17, 2] -> x_d [B, 48, 2], x_f [B, 96, 2]."""
        visible = visible_joints(x_s, conf)
        x = torch.cat([hide_missing(x_s, visible).flatten(1), visible], 1)
        out = self.mlp(x).unflatten(1, (J_D + J_F, 2))
        return out[:, :J_D], out[:, J_D:]

    @torch.no_grad()
    def densify(self, x_s: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """In normalised image coordinates, as `HiPART.densify`."""
        pelvis = detected_pelvis(x_s, conf)
        x_d, x_f = self(to_model_frame(x_s, pelvis), conf)
        return from_model_frame(x_d, pelvis), from_model_frame(x_f, pelvis)
