"""What HiPART is compared with: plain networks for the same tasks, with the same interfaces.

    MLPLifter    lifts 2D points to 3D like hipart.SpatialLifter, at a cost that a CPU can afford
    Regressor    densifies a sparse pose like hipart.HiPART, without tokens, in one step
"""

import torch
from torch import Tensor, nn

from hipart import (
    J_D,
    J_F,
    J,
    Lifter,
    detected_pelvis,
    from_model_frame,
    hide_missing,
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
