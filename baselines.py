"""What HiPART is compared with: plain networks for the same tasks, with the same interfaces.

    MLPLifter    lifts 2D points to 3D like hipart.SpatialLifter, at a cost that a CPU can afford
    PoseFormer   lifts the centre of T frames (Tables 6 and 10)
    MixSTE       lifts all of T frames (Tables 6 and 10)
    Regressor    densifies a sparse pose like hipart.HiPART, without tokens, in one step
    OneLevel     a lifter that sees the dense or the fine points alone (Table 5)
    ThirdLevel   an MLPLifter that sees 192 true points, too (Table 5)
    JointOrder   generates parts like hipart.HiARM, but in the order of joint numbers (Table 4)
    NextToken    generates tokens like hipart.HiARM, one at a time (Table 4)
    Classifier   the same, all parts at once (Table 4)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from generation import LeanBlock, linear, norm
from hipart import (
    J_D,
    J_F,
    J_S,
    PART_JOINT,
    Block,
    Config,
    HiARM,
    HiPART,
    J,
    Lifter,
    R,
    SpatialLifter,
    detected_pelvis,
    from_model_frame,
    hide_missing,
    run_blocks,
    to_model_frame,
    visible_joints,
)

J_T = 192  # points of the coarsening's level below the fine one


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
    """The field's simple baseline, after Martinez et al. 2017: n_points is 17 or 161. more: how
    many numbers a subclass adds to the features."""

    def __init__(self, n_points: int = J + J_D + J_F, width: int = 1024, blocks: int = 2,
                 more: int = 0):
        super().__init__(n_points)
        n_in = J * 3 + (J_D * 6 + J_F * 2 if n_points > J else 0) + more
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


class OneLevel(nn.Module):
    """A lifter of 161 points that sees one of the two levels alone (Table 5). "dense": every fine
    point becomes its dense point, and so tells nothing. "fine": every dense point becomes the mean
    of its two fine points. The network and its cost stay the same."""

    def __init__(self, lifter: Lifter, levels: str):
        super().__init__()
        self.lifter, self.levels = lifter, levels

    def seen(self, x: Tensor) -> Tensor:
        """x [B, 161, 2] -> what the lifter is given, [B, 161, 2]."""
        x_s, x_d, x_f = x.split((J, J_D, J_F), 1)
        if self.levels == "dense":
            x_f = x_d.repeat_interleave(2, 1)
        else:
            x_d = x_f.unflatten(1, (J_D, 2)).mean(2)
        return torch.cat([x_s, x_d, x_f], 1)

    def standardize(self, x: Tensor, y: Tensor, conf: Tensor | None = None) -> None:
        self.lifter.standardize(self.seen(x), y, conf)

    def forward(self, x: Tensor, conf: Tensor | None = None) -> Tensor:
        return self.lifter(self.seen(x), conf)


class ThirdLevel(MLPLifter):
    """An MLPLifter of 353 points: after the 161, the 192 of the coarsening's next level (Table 5).
    Each is seen as its offset from the fine point that is nearest on average, mostly the one that
    it belongs to, which data sets do not tell. levels: "dense+fine+192"; or "192", where the
    nearest of the 192 stands for each fine point, and the mean of two for a dense one."""

    def __init__(self, levels: str, width: int = 1024, blocks: int = 2):
        super().__init__(width=width, blocks=blocks, more=J_T * 2)
        self.levels = levels
        self.register_buffer("fine_of", torch.zeros(J_T, dtype=torch.int64))
        self.register_buffer("third_of", torch.zeros(J_F, dtype=torch.int64))
        self.register_buffer("mean_third", torch.zeros(J_T, 2))
        self.register_buffer("std_third", torch.ones(J_T, 2))

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 353, 2] -> what stands for the 161 points, [B, 161, 2], and the offsets of the
        192, [B, 192, 2]."""
        x_s, x_d, x_f, x_t = x.split((J, J_D, J_F, J_T), 1)
        if self.levels == "192":
            x_f = x_t[:, self.third_of]
            x_d = x_f.unflatten(1, (J_D, 2)).mean(2)
        return torch.cat([x_s, x_d, x_f], 1), x_t - x_f[:, self.fine_of]

    def standardize(self, x: Tensor, y: Tensor, conf: Tensor | None = None) -> None:
        distance = torch.cdist(x[:512, -J_T:], x[:512, J + J_D : -J_T]).mean(0)  # [192, 96]
        self.fine_of.copy_(distance.argmin(1))
        self.third_of.copy_(distance.argmin(0))
        x, third = self.seen(x)
        super().standardize(x, y, conf)
        self.mean_third.copy_(third.mean(0))
        self.std_third.copy_(third.std(0, correction=0).clamp_min(1e-6))

    def features(self, x: Tensor, conf: Tensor | None) -> dict[str, Tensor]:
        x, third = self.seen(x)
        f, third = super().features(x, conf), (third - self.mean_third) / self.std_third
        return f | dict(fine=torch.cat([f["fine"], third], 1))


class TemporalLifter(SpatialLifter):
    """What PoseFormer and MixSTE share: T frames of a sequence come in together, and each of them
    becomes a token per point like a frame of `SpatialLifter`.

    `over_time` are the blocks in which frames see one another. `every` says whether a lifter gives
    the pose of every frame, or that of the centre alone.
    """

    every: bool

    def __init__(self, n_points: int, frames: int, width: int, blocks: int, heads: int,
                 width_t: int):
        super().__init__(n_points, width, blocks, heads)
        if frames < 1 or frames % 2 == 0:
            raise ValueError(f"frames must be an odd number, or there is no centre, found {frames}")
        self.frames = frames
        nn.init.normal_(self.position)  # ours: from zeros, joints stay alike for too many steps
        self.time = nn.Parameter(torch.zeros(frames, width_t))
        self.over_time = nn.ModuleList(
            [Block(width_t, heads, 2, drop_path=b.drop_path, eps=1e-6) for b in self.blocks])

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
                 blocks: int = 4, heads: int = 8):
        super().__init__(n_points, frames, width, blocks, heads, J * width)
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
                 blocks: int = 8, heads: int = 8):
        super().__init__(n_points, frames, width, blocks, heads, width)

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


# The choices of train.py --lifter
LIFTERS = dict(spatial=SpatialLifter, mlp=MLPLifter, poseformer=PoseFormer, mixste=MixSTE)


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


# --------------------------------------------------------------------------------------------------
# Other ways to generate (Table 4), with HiARM's parts and its interface


class JointOrder(HiARM):
    """The parts in the order of joint numbers, and not from the centre to the periphery. What is
    learned about a place in the order is learned for its part there."""

    GENERATES = "sparse-to-dense"

    def __init__(self, config: Config):
        super().__init__(config)
        order = torch.tensor(sorted(range(J_S), key=PART_JOINT.__getitem__))
        self.register_buffer("order", order, persistent=False)

    def arranged(self, x: Tensor, back: bool = False) -> Tensor:
        """x [B, 16 n, ...], n rows for each part -> its parts in this order, or from it back."""
        order = self.order.argsort() if back else self.order
        return x.unflatten(1, (J_S, -1))[:, order].flatten(1, 2)

    def forward(self, x_s: Tensor, q_s: Tensor, q_d: Tensor,
                conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `HiARM.forward`."""
        logits = super().forward(x_s, self.arranged(q_s), self.arranged(q_d), conf)
        return tuple(self.arranged(of, back=True) for of in logits)

    def rollout(self, x_s: Tensor, conf: Tensor | None = None) -> dict[str, Tensor]:
        """As `HiARM.rollout`."""
        return {k: self.arranged(v, back=True) for k, v in super().rollout(x_s, conf).items()}

    def generate(self, *args) -> tuple[Tensor, Tensor]:
        """As `HiARM.generate`."""
        return tuple(self.arranged(zh, back=True) for zh in super().generate(*args))

    def one_pass(self, *args) -> dict[str, Tensor]:
        """As `HiARM.one_pass`."""
        return {k: self.arranged(v, back=True) for k, v in super().one_pass(*args).items()}


class NextToken(HiARM):
    """The 64 tokens one after another, each given all before it: part after part, and in a part the
    sparse token before its R dense ones. The blocks of LSAB, GCSAB and PH are one causal stack
    here, so that there are as many parameters as in HiARM."""

    GENERATES = "centre-to-periphery"

    def __init__(self, config: Config):
        super().__init__(config)
        mask = torch.ones(J_S * (1 + R), J_S * (1 + R), dtype=torch.bool).tril()
        self.register_buffer("mask_t", mask, persistent=False)

    def places(self, x_s: Tensor, conf: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_s [B, 17, 2] -> the SOS token g^0 [B, 1, W], and what is added at the place of every
        token [B or 1, 64, W], in the order of generation."""
        g_0, position = self.begin(x_s, conf)
        return g_0, (position[:, :, None] + self.slot_p).flatten(1, 2)

    def stack(self, x: Tensor, mask: Tensor | None = None, caches=(None, None, None)) -> Tensor:
        """x [B, T, W] through all blocks -> [B, T, W], ready for the heads."""
        h = self.remember(run_blocks(self.LSAB, x, mask, caches[0]), mask, caches[1])
        return self.predict(h, mask, caches[2])

    def forward(self, x_s: Tensor, q_s: Tensor, q_d: Tensor,
                conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `HiARM.forward`. A token sees only the tokens before it."""
        sparse, dense = self.in_s(self.C_s[q_s])[:, :, None], self.in_d(self.C_d[q_d])
        x = torch.cat([sparse, dense.unflatten(1, (J_S, R))], 2) + self.slot_l  # [B, 16, 1 + R, W]
        g_0, place = self.places(x_s, conf)
        x = torch.cat([g_0, x.flatten(1, 2)[:, :-1]], 1) + place  # [B, 64, W]
        p = self.stack(x, self.mask_t).unflatten(1, (J_S, 1 + R))
        return self.head_s(p[:, :, 0]), self.head_d(p[:, :, 1:]).flatten(1, 2)

    def rollout(self, x_s: Tensor, conf: Tensor | None = None) -> dict[str, Tensor]:
        """As `HiARM.rollout`, in 64 steps."""
        caches = [[[] for _ in blocks] for blocks in (self.LSAB, self.GCSAB, self.PH)]
        layers = self.in_s, self.in_d, self.head_s, self.head_d
        made, logits = self._one_by_one(
            x_s, conf, lambda x: self.stack(x[:, None], caches=caches)[:, 0], layers, self.pick)
        return dict(logits_s=logits[0], logits_d=logits[1], zh_s=made[0], zh_d=made[1])

    def generate(self, x_s: Tensor, conf: Tensor | None, pick: Callable | None = None
                 ) -> tuple[Tensor, Tensor]:
        """As `HiARM.generate`: the steps of `rollout`, made fast as in generation.py."""
        stacks = [([LeanBlock(block) for block in blocks], norm(last) if last else None)
                  for blocks, last in ((self.LSAB, None), (self.GCSAB, self.norm_h),
                                       (self.PH, self.norm_p))]
        past = [[[] for _ in blocks] for blocks, _ in stacks]

        def step(x: Tensor) -> Tensor:
            for (blocks, last), tokens in zip(stacks, past, strict=True):
                for block, before in zip(blocks, tokens, strict=True):
                    x = block(x, 1, before)
                x = last(x) if last else x
            return x

        layers = [linear(of) for of in (self.in_s, self.in_d, self.head_s, self.head_d)]
        return self._one_by_one(x_s, conf, step, layers, pick or self.pick)[0]

    def _one_by_one(self, x_s: Tensor, conf: Tensor | None, step: Callable, layers, pick: Callable
                    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The embeddings and the logits of both levels. step: the stack, [B, W] -> [B, W]; layers:
        what in_s, in_d, head_s and head_d are."""
        in_s, in_d, head_s, head_d = layers
        kinds = [(in_s, head_s, self.C_s)] + R * [(in_d, head_d, self.C_d)]
        made, said = ([], []), ([], [])
        g_0, place = self.places(x_s, conf)
        x = g_0[:, 0]
        for t, here in enumerate(place.unbind(1)):
            slot = t % (1 + R)
            embed, head, C = kinds[slot]
            logits = head(step(x + here))
            zh = pick(logits, C)
            made[slot > 0].append(zh)
            said[slot > 0].append(logits)
            x = embed(zh) + self.slot_l[slot]
        return tuple(tuple(torch.stack(of, 1) for of in both) for both in (made, said))


class Classifier(HiARM):
    """The tokens of all parts at once, as PCT (Geng et al. 2023) classifies them: every part sees
    every other, but there is no past to see. Within a part, dense tokens still see the sparse one.
    LSAB and the embeddings of dense tokens have no use here."""

    GENERATES = "classification"

    def __init__(self, config: Config):
        super().__init__(config)
        self.mask_h.fill_(True)
        del self.LSAB, self.in_d, self.slot_l

    def summarize(self, zh_s: Tensor, zh_d: Tensor) -> Tensor:
        """No past: 0, [B, n, W]."""
        return zh_s.new_zeros(*zh_s.shape[:2], self.config.width)

    def rollout(self, x_s: Tensor, conf: Tensor | None = None) -> dict[str, Tensor]:
        """As `HiARM.rollout`, in one step."""
        return self.one_pass(x_s, conf)

    def generate(self, x_s: Tensor, conf: Tensor | None, pick: Callable | None = None
                 ) -> tuple[Tensor, Tensor]:
        """As `HiARM.generate`."""
        o = self.one_pass(x_s, conf, pick)
        return o["zh_s"], o["zh_d"]


class JointOrderNextToken(JointOrder, NextToken):
    """Both: the joints' numbers give the order, and every token is a step."""

    GENERATES = "next-token"


KINDS = {kind.GENERATES: kind
         for kind in (HiARM, JointOrder, NextToken, JointOrderNextToken, Classifier)}


def new_hipart(config: Config) -> HiPART:
    """An untrained HiPART with the transformer that config.generation asks for."""
    return HiPART(config, KINDS[config.generation])
