"""HiPART: Hierarchical Pose AutoRegressive Transformer for occluded 3D human pose estimation
(CVPR 2025, arXiv 2503.23331), in one file that is read from top to bottom.

    python hipart.py       # walks random poses through an untrained model: symbols and shapes

    stage 1  MSST            a fine 2D pose <-> 16 sparse and 48 dense tokens   section 4.1, Eq. 1-6
    stage 2  HiARM           a detector's sparse 2D pose -> those tokens       section 4.2, Eq. 7-12
             HiPART          both together: sparse 2D -> dense and fine 2D     Alg. 1
    stage 3  SpatialLifter   17 (+ 48 + 96) 2D points -> 17 joints in 3D       Fig. 11

Symbols are the paper's. A name that ends in _s, _d or _f is sparse, dense or fine; zh_s is z-hat_s
and zp_d is z'_d. Sizes: B poses in a batch, J = 17 joints, J_S = 16 of them own a token and R = 3
dense points each, J_D = 48 dense and J_F = 96 fine points, D the width of a code, W that of HiARM.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import from_first_, sum_, world_size
from generation import generate, lean_mode, poses_at_once
from kernels import code_statistics, ema_apply_, nearest_code

# --------------------------------------------------------------------------------------------------
# Skeleton: the 17 joints of Human3.6M. x_s and y keep all 17; all but the pelvis own a token.

JOINT_NAMES = (
    "pelvis", "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "spine", "thorax", "neck/nose", "head", "left shoulder", "left elbow", "left wrist",
    "right shoulder", "right elbow", "right wrist",
)  # fmt: skip
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
LEFT, RIGHT = (4, 5, 6, 11, 12, 13), (1, 2, 3, 14, 15, 16)

# A *part* is one sparse joint with its R dense points. Parts are numbered from the centre of the
# body to its periphery: by the number of bones from the pelvis, and ties by the number of the
# joint. PART_JOINT[i] is the joint of part i. This order is also the order of generation.
PART_JOINT = (1, 4, 7, 2, 5, 8, 3, 6, 9, 11, 14, 10, 12, 15, 13, 16)
J, J_S, J_D, J_F = 17, 16, 48, 96
# Dense points of a part: rows 3i, 3i + 1 and 3i + 2 of a dense array belong to part i. Fine rows
# 2k and 2k + 1 refine dense point k.
R = J_D // J_S


# How tokens may be generated (Table 4). "both" is HiARM, and baselines.py has the others.
GENERATIONS = ("both", "sparse-to-dense", "centre-to-periphery", "next-token", "classification")


@dataclass(frozen=True)
class Config:
    """What the model is made of. The defaults are the paper's (section 5.1, appendix C) unless a
    comment says "ours". How it is trained stands in `train.Training`."""

    # Stage 1: MSST (section 4.1)
    D: int = 128  # width of embeddings and codes
    K_s: int = 2048  # codes in the sparse codebook C_s
    K_d: int = 2048  # codes in the dense codebook C_d
    shared_codebook: bool = False  # True: C_d is C_s, one codebook for both levels (Table 3)
    encoder_blocks: int = 4  # Mixer blocks of E_f and of E_d
    encoder_width: int = 128
    decoder_blocks: int = 1  # Mixer blocks of D_s, of D_d and of D_f
    decoder_width: int = 96
    token_hidden: int = 64  # hidden width of token mixing (PCT's)
    n_actions: int = 15  # action labels of Human3.6M
    beta: float = 0.25  # weight of the commitment terms, Eq. 6
    lambda_l: float = 1.0  # weight of L_local, Eq. 6
    lambda_g: float = 0.3  # weight of L_global, Eq. 6
    tau: float = 0.07  # temperature of L_local, Eq. 3
    cosine_local: bool = True  # ours: L_local compares directions; False is Eq. 3 to the letter
    lambda_r: float = 20.0  # ours: weight of the two reconstruction terms, Eq. 6
    ema_decay: float = 0.99  # ours: memory of the codebooks' running means
    restart_below: float = 0.01  # ours: a code with less than this part of a fair share is dead
    # Stage 2: HiARM (section 4.2)
    width: int = 128  # W
    heads: int = 8  # ours
    mlp_ratio: int = 4  # ours
    lsab_blocks: int = 1  # Eq. 9
    gcsab_blocks: int = 12  # Eq. 10
    ph_blocks: int = 4  # Eq. 11
    dropout: float = 0.25
    lambda_d: float = 1.5  # weight of the dense tokens, Eq. 12
    generation: str = "both"  # "both" is HiARM; for other ways see ablate.py --list (Table 4)
    condition: str = "sos"  # "sos": x_s is g^0 alone; "every" (ours): it reaches every position
    soft: bool = False  # ours: True hands on expected embeddings instead of the likeliest code
    soft_targets: float = 0.0  # ours: how far the target of Eq. 12 spreads over near codes
    history_dropout: float = 0.0  # ours: share of g^1..g^15 that is 0 in training
    lambda_p: float = 100.0  # ours: weight of the pose error when training in one pass

    def __post_init__(self):
        for name, value in vars(self).items():
            most = 1 if name.endswith(("dropout", "ema_decay", "restart_below")) else 1e6
            kind = type(getattr(Config, name))
            if kind is int and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
            if kind is float and not 0 <= value <= most:
                raise ValueError(f"{name} must be from 0 to {most:g}, found {value}")
        if self.condition not in ("sos", "every"):
            raise ValueError(f"condition must be one of sos, every, found {self.condition!r}")
        if self.shared_codebook and self.K_s != self.K_d:
            raise ValueError(f"one codebook for both levels (shared_codebook) needs equal K_s and "
                             f"K_d, found {self.K_s} and {self.K_d}")
        if self.generation not in GENERATIONS:
            raise ValueError(f"generation must be one of {', '.join(GENERATIONS)}, "
                             f"found {self.generation!r}")
        if self.history_dropout and self.generation not in GENERATIONS[:2]:
            raise ValueError(f"history_dropout must be 0 with generation {self.generation}, "
                             f"found {self.history_dropout}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, found {self.width}, {self.heads}")


# --------------------------------------------------------------------------------------------------
# Coordinates. Poses come in VideoPose3D's *normalised image coordinates*: x runs from -1 to 1 over
# the width of the image, and y has the same scale. MSST and HiARM work in the *model frame*: minus
# the detected pelvis, divided by SCALE, which leaves about unit variance.

SCALE = 0.125


def normalize_screen(x: Tensor, w: int, h: int) -> Tensor:
    """Pixels [..., 2] of an image w x h -> normalised image coordinates (as VideoPose3D)."""
    return x * (2 / w) - x.new_tensor([1, h / w])


def to_pixels(x: Tensor, w: int, h: int) -> Tensor:
    """The inverse of `normalize_screen`."""
    return (x + x.new_tensor([1, h / w])) * (w / 2)


def visible_joints(x_s: Tensor, conf: Tensor | None) -> Tensor:
    """x_s [B, 17, 2], conf [B, 17] or None (all visible, the paper's form) -> [B, 17], 1 or 0."""
    return torch.ones_like(x_s[..., 0]) if conf is None else (conf > 0).to(x_s)


def hide_missing(x_s: Tensor, visible: Tensor) -> Tensor:
    """x_s [B, n, 2], but 0 wherever visible [B, n] is 0, whatever a detector left there (NaN too,
    which a product with 0 would keep)."""
    return x_s.masked_fill(visible[..., None] == 0, 0.0)


def detected_pelvis(x_s: Tensor, conf: Tensor | None = None) -> Tensor:
    """Where the detector sees the pelvis, x_s [B, 17, 2] -> [B, 1, 2]; without a visible pelvis,
    the mean of the visible joints."""
    visible = visible_joints(x_s, conf)
    n = visible.sum(1).clamp_min(1)[:, None, None]
    mean = hide_missing(x_s, visible).sum(1, keepdim=True) / n
    return torch.where(visible[:, :1, None] > 0, x_s[:, :1], mean)


def to_model_frame(x: Tensor, pelvis: Tensor) -> Tensor:
    """Normalised image coordinates [B, n, 2] and a detected pelvis [B, 1, 2] -> model frame."""
    return (x - pelvis) / SCALE


def from_model_frame(x: Tensor, pelvis: Tensor) -> Tensor:
    """The inverse of `to_model_frame`."""
    return x * SCALE + pelvis


# --------------------------------------------------------------------------------------------------
# Stage 1: Multi-Scale Skeletal Tokenization (section 4.1, Fig. 10, Alg. 2)


def mlp(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    """The two-layer perceptron of Mixer and transformer blocks."""
    return nn.Sequential(nn.Linear(n_in, hidden), nn.GELU(), nn.Linear(hidden, n_out))


class MixerBlock(nn.Module):
    """An MLP-Mixer block (Tolstikhin et al. 2021; sizes of PCT, Geng et al. 2023): an MLP over the
    tokens, then one over the channels, each pre-norm and with a residual."""

    def __init__(self, tokens: int, width: int, token_hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix_tokens = mlp(tokens, token_hidden, tokens)
        self.mix_channels = mlp(width, width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, tokens, width]
        x = x + self.mix_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm2(x))


def mixer(tokens: int, width: int, blocks: int, c: Config) -> nn.Sequential:
    """Mixer blocks, with a LayerNorm after the last one as in PCT."""
    stack = [MixerBlock(tokens, width, c.token_hidden) for _ in range(blocks)]
    return nn.Sequential(*stack, nn.LayerNorm(width))


def joint_map(n_in: int, n_out: int) -> nn.Linear:
    """The linear map along the joint axis, n_in joints -> n_out joints.

    Nothing in the paper says which output row belongs to which part. So the map starts as the
    skeleton's own hierarchy: a coarse row is the mean of its fine rows, and a fine row is a copy
    of its coarse row. Sparse row i thus begins as the mean of its own three dense rows.
    """
    layer = nn.Linear(n_in, n_out)
    fine, coarse = max(n_in, n_out), min(n_in, n_out)
    member = torch.eye(coarse).repeat_interleave(fine // coarse, dim=1)  # [coarse, fine]
    start = member / member.sum(1, keepdim=True) if n_in >= n_out else member.T
    with torch.no_grad():
        layer.weight.mul_(0.1).add_(start)  # a little of PyTorch's noise, to break the symmetry
    return layer


class Encoder(nn.Module):
    """E_f and E_d (Fig. 10): a linear map per joint, Mixer blocks, a linear map along the joint
    axis, and a linear map to the width of a code."""

    def __init__(self, c_in: int, n_in: int, n_out: int, c: Config):
        super().__init__()
        self.embed = nn.Linear(c_in, c.encoder_width)
        self.mixer = mixer(n_in, c.encoder_width, c.encoder_blocks, c)
        self.joints = joint_map(n_in, n_out)
        self.out = nn.Linear(c.encoder_width, c.D)

    def forward(self, x: Tensor) -> Tensor:  # [B, n_in, c_in]
        x = self.mixer(self.embed(x))  # [B, n_in, width]
        return self.out(self.joints(x.transpose(1, 2)).transpose(1, 2))  # [B, n_out, D]


class Decoder(nn.Module):
    """D_s, D_d and D_f: the encoder turned round. The joint axis is mapped first, so that the
    Mixer blocks work at the finer level."""

    def __init__(self, c_in: int, n_in: int, n_out: int, c_out: int, c: Config):
        super().__init__()
        self.joints = joint_map(n_in, n_out)
        self.embed = nn.Linear(c_in, c.decoder_width)
        self.mixer = mixer(n_out, c.decoder_width, c.decoder_blocks, c)
        self.out = nn.Linear(c.decoder_width, c_out)

    def forward(self, x: Tensor) -> Tensor:  # [B, n_in, c_in]
        x = self.embed(self.joints(x.transpose(1, 2)).transpose(1, 2))  # [B, n_out, width]
        return self.out(self.mixer(x))  # [B, n_out, c_out]


class Quantizer(nn.Module):
    """Q(z; C) of Eq. 1 and 2: the nearest code, and a codebook that follows the encoder as an
    exponential moving average (EMA; van den Oord et al. 2017, appendix A.1).

    The codebook is a buffer: the optimiser never sees it.
    - It is *initialised* by k-means on encoder outputs, after some steps without quantization.
      Until then `active` is False and z passes unchanged.
    - It is *updated* after each training step by `update`, and never in eval mode.
    - A code that has become unused *restarts* as a random encoder output of the batch.
    """

    def __init__(self, K: int, D: int, decay: float, restart_below: float):
        super().__init__()
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("codebook", torch.randn(K, D))
        self.register_buffer("count", torch.ones(K))  # EMA of the rows per code in a step
        self.register_buffer("total", self.codebook.clone())  # EMA of the sum of those rows
        self.register_buffer("active", torch.tensor(False))
        self.known_active = False

    def is_active(self) -> bool:
        """`active`, for Python. To read it from a GPU is to wait for the GPU; True is read once."""
        self.known_active = self.known_active or bool(self.active)
        return self.known_active

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, n, D] -> quantized z-hat [B, n, D] and token ids q [B, n] int64."""
        q = nearest_code(z.detach().float().flatten(0, 1), self.codebook).view(z.shape[:2])
        if not self.is_active():
            return z, q
        # The straight-through estimator: the value is the code's, the gradient goes on to z as if
        # nothing had been rounded. A plain look-up would leave the encoder without a gradient.
        return z + (self.codebook[q] - z).detach(), q

    @torch.no_grad()
    def update(self, z: Tensor, q: Tensor) -> None:
        """One EMA step from the rows z [B, n, D] that were quantized to q [B, n]."""
        if self.training and self.is_active():
            rows, K = z.detach().float().flatten(0, 1), len(self.codebook)
            # Code k would restart as row spare[k]. No two of these rows are the same, unless there
            # are more codes than rows.
            spare = torch.randperm(max(len(rows), K), device=rows.device)[:K] % len(rows)
            self._follow(rows, q.flatten(), spare, self.decay,
                         restart_below=self.restart_below * len(rows) * world_size() / K)

    @torch.no_grad()
    def initialize(self, z: Tensor, rows_per_step: int, iterations: int = 10) -> None:
        """k-means on encoder outputs z [N, D], and on as many of every other process. The counts
        become what training steps of `rows_per_step` rows, those of all processes, would leave.
        ValueError if there are fewer rows than codes."""
        K, z = len(self.codebook), z.float()
        if len(z) < K:
            raise ValueError(
                f"k-means needs at least as many encoder outputs as codes ({K}), found {len(z)}")
        self.codebook.copy_(z[torch.randperm(len(z), device=z.device)[:K]])
        from_first_(self.codebook)
        for _ in range(iterations):
            # An iteration of k-means is the EMA update without memory; an empty cluster restarts.
            spare = torch.randperm(len(z), device=z.device)[:K]
            q = nearest_code(z, self.codebook)
            self._follow(z, q, spare, decay=0.0, eps=0.0, restart_below=1.0)
        # No count starts below a tenth of a fair share, so that no code is dead at once.
        n = len(z) * world_size()
        self.count.mul_(rows_per_step / n).clamp_min_(rows_per_step / K * 0.1)
        # total / count must be the codebook, or all codes would jump at the first update.
        self.total.copy_(self.codebook * self.count[:, None])
        self.active.fill_(True)

    def _follow(self, rows: Tensor, q: Tensor, spare: Tensor, decay: float, eps: float = 1e-5,
                restart_below: float = 0.0) -> None:
        """Move the codebook by the rows [N, D] of all processes that chose the codes q [N]. A dead
        code k restarts as row spare[k] of the first process, so that all codebooks stay the
        same."""
        n, s = code_statistics(rows, q, len(self.codebook))
        candidates = rows[spare]
        sum_(n, s)
        from_first_(candidates)
        ema_apply_(self.codebook, self.count, self.total, n, s, decay, eps, restart_below,
                   candidates)


class MSST(nn.Module):
    """Multi-Scale Skeletal Tokenization: a VQ-VAE of two levels (section 4.1, Alg. 2).

    All poses are in the model frame. The codebook term of Eq. 6 is not optimised, since the EMA
    takes its place; its value is that of the commitment terms, which are reported.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.E_f = Encoder(2, J_F, J_D, c)
        self.E_d = Encoder(c.D, J_D, J_S, c)
        self.D_s = Decoder(c.D, J_S, J_D, c.D, c)
        self.D_d = Decoder(c.D, J_D, J_D, 2, c)
        self.D_f = Decoder(2 * c.D, J_D, J_F, 2, c)
        self.fuse = nn.Linear(2 * c.D, c.D)
        self.Q_s = Quantizer(c.K_s, c.D, c.ema_decay, c.restart_below)
        self.Q_d = (self.Q_s if c.shared_codebook
                    else Quantizer(c.K_d, c.D, c.ema_decay, c.restart_below))
        self.P_A = nn.Sequential(
            nn.Linear(2 * c.D, c.encoder_width),
            *[MixerBlock(J_D, c.encoder_width, c.token_hidden) for _ in range(2)])
        self.action = nn.Linear(c.encoder_width, c.n_actions)

    def tokenize(self, x_f: Tensor) -> dict[str, Tensor]:
        """x_f [B, 96, 2] -> embeddings, quantized embeddings and tokens (Eq. 1, 2), by name."""
        z_d = self.E_f(x_f)  # [B, 48, D]
        z_s = self.E_d(z_d)  # [B, 16, D]
        zh_s, q_s = self.Q_s(z_s)  # Eq. 1
        # The dense tokens need not repeat what the sparse ones say already: as in VQ-VAE-2, they
        # see the decoded sparse level beside their own.
        up_s = self.D_s(zh_s)  # z-hat'_s [B, 48, D]
        zp_d = self.fuse(torch.cat([z_d, up_s], -1))  # z'_d [B, 48, D]
        zh_d, q_d = self.Q_d(zp_d)  # Eq. 2
        return dict(z_s=z_s, zp_d=zp_d, zh_s=zh_s, zh_d=zh_d, q_s=q_s, q_d=q_d, up_s=up_s)

    def forward(self, x_f: Tensor) -> dict[str, Tensor]:
        """x_f [B, 96, 2] -> the output of `tokenize`, the decoded poses x_d [B, 48, 2] and
        x_f [B, 96, 2], and the action logits p_A [B, actions] (Eq. 4)."""
        o = self.tokenize(x_f)
        both = torch.cat([o["zh_d"], o["up_s"]], -1)  # [B, 48, 2D]
        x_d, x_f = self.D_d(o["zh_d"]), self.D_f(both)
        return o | dict(x_d=x_d, x_f=x_f, p_A=self.action(self.P_A(both).mean(1)))

    def encode(self, x_f: Tensor) -> tuple[Tensor, Tensor]:
        """x_f [B, 96, 2] -> q_s [B, 16], q_d [B, 48] int64."""
        o = self.tokenize(x_f)
        return o["q_s"], o["q_d"]

    def decode(self, q_s: Tensor, q_d: Tensor) -> tuple[Tensor, Tensor]:
        """q_s [B, 16], q_d [B, 48] -> x_d [B, 48, 2], x_f [B, 96, 2]."""
        return self.decode_embeddings(self.Q_s.codebook[q_s], self.Q_d.codebook[q_d])

    def decode_embeddings(self, zh_s: Tensor, zh_d: Tensor) -> tuple[Tensor, Tensor]:
        """The same from embeddings [B, 16, D] and [B, 48, D]. x_d depends on zh_d alone, as in
        Alg. 1 and 2."""
        return self.D_d(zh_d), self.D_f(torch.cat([zh_d, self.D_s(zh_s)], -1))

    def loss(self, x_f: Tensor, x_d: Tensor, a: Tensor) -> tuple[Tensor, dict, dict]:
        """L_1 (Eq. 6) for targets x_f [B, 96, 2], x_d [B, 48, 2] and action labels a [B] (-1 means
        unknown) -> the loss, its terms (detached, unweighted) and the output of `forward`.

        The reductions are ours: a squared norm is the mean, over points or tokens, of the squared
        length; L_local is a mean over parts.
        """
        c, o = self.config, self(x_f)
        terms = dict(
            fine=(o["x_f"] - x_f).pow(2).sum(-1).mean(),
            dense=(o["x_d"] - x_d).pow(2).sum(-1).mean(),
            commit_s=(o["z_s"] - o["zh_s"].detach()).pow(2).sum(-1).mean(),
            commit_d=(o["zp_d"] - o["zh_d"].detach()).pow(2).sum(-1).mean(),
            local=local_alignment(o["zh_s"], o["zh_d"], c.tau, c.cosine_local),
            action=global_alignment(o["p_A"], a),
        )
        loss = (c.lambda_r * (terms["fine"] + terms["dense"])
                + c.beta * (terms["commit_s"] + terms["commit_d"])
                + c.lambda_l * terms["local"] + c.lambda_g * terms["action"])
        return loss, {name: t.detach() for name, t in terms.items()}, o

    def update_codebooks(self, o: dict[str, Tensor]) -> None:
        """The EMA step of both codebooks, from the output of `forward`. Call it after the
        optimiser's step: codes must not move between quantization and the loss."""
        if self.config.shared_codebook:  # one step, from the rows of both levels
            rows, q = torch.cat([o["z_s"], o["zp_d"]], 1), torch.cat([o["q_s"], o["q_d"]], 1)
            return self.Q_s.update(rows, q)
        self.Q_s.update(o["z_s"], o["q_s"])
        self.Q_d.update(o["zp_d"], o["q_d"])

    @torch.no_grad()
    def initialize_codebooks(self, x_f: Tensor, batch: int) -> None:
        """k-means on the encoder outputs of x_f [N, 96, 2], for training steps of `batch` poses:
        first C_s, then C_d on what C_s has left to tell; one codebook for both, on all outputs."""
        z_d = torch.cat([self.E_f(some) for some in x_f.split(1024)])
        z_s, shared = self.E_d(z_d), self.config.shared_codebook
        if not shared:
            self.Q_s.initialize(z_s.flatten(0, 1), batch * J_S)
        zp_d = self.fuse(torch.cat([z_d, self.D_s(self.Q_s(z_s)[0])], -1))
        rows = torch.cat([z_s, zp_d], 1) if shared else zp_d
        self.Q_d.initialize(rows.flatten(0, 1), batch * rows.shape[1])


def local_alignment(zh_s: Tensor, zh_d: Tensor, tau: float, cosine: bool = True) -> Tensor:
    """L_local (Eq. 3): InfoNCE between each sparse token zh_s [B, 16, D] and the mean of its own
    part's dense tokens zh_d [B, 48, D], against the other parts of the same pose."""
    mean_d = zh_d.unflatten(1, (J_S, R)).mean(2)  # [B, 16, D]
    if cosine:
        # Plain dot products grow with the embeddings, and at tau = 0.07 they overwhelm all else.
        zh_s, mean_d = F.normalize(zh_s, dim=-1), F.normalize(mean_d, dim=-1)
    logits = zh_s @ mean_d.transpose(1, 2) / tau  # [B, 16, 16]: sparse token i, part k
    own = torch.arange(J_S, device=zh_s.device).repeat(len(zh_s))
    return F.cross_entropy(logits.flatten(0, 1), own)


def global_alignment(p_A: Tensor, a: Tensor) -> Tensor:
    """L_global (Eq. 5): cross-entropy of the logits p_A [B, actions] and the labels a [B]. Poses
    of unknown action (-1) do not count."""
    known = (a >= 0).sum().clamp_min(1)  # PyTorch's own mean is NaN where no action is known
    return F.cross_entropy(p_A, a, ignore_index=-1, reduction="sum") / known


# --------------------------------------------------------------------------------------------------
# Stage 2: Hierarchical AutoRegressive Modelling (section 4.2, Alg. 1 and 3)


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, then an MLP, each with a residual. It serves
    HiARM and the lifter."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, dropout: float = 0.0,
                 drop_path: float = 0.0, eps: float = 1e-5):
        super().__init__()
        self.heads, self.p, self.drop_path = heads, dropout, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, mlp_ratio * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None,
                cache: list[Tensor] | None = None) -> Tensor:
        """x [B, T, W] -> [B, T, W]. mask [T, T]: True where a row may look at a column. `cache`
        holds the keys and values of earlier tokens, to which those of x are added."""
        x = x + self._drop(self.proj(self._attend(self.norm1(x), mask, cache)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor | None, cache: list[Tensor] | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, W / heads]
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)  # [B, T, W]

    def _drop(self, x: Tensor) -> Tensor:
        if self.p:
            x = F.dropout(x, self.p, self.training)
        if self.drop_path and self.training:  # the whole residual branch of a sample
            keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
            x = x * keep / (1 - self.drop_path)
        return x


def run_blocks(blocks: nn.ModuleList, x: Tensor, mask: Tensor | None = None,
               caches: list[list[Tensor]] | None = None) -> Tensor:
    """x [B, T, W] through a stack of blocks, which have a cache each, or none."""
    for i, block in enumerate(blocks):
        x = block(x, mask, caches[i] if caches else None)
    return x


class HiARM(nn.Module):
    """The pose-aware generative transformer, P(q_d, q_s | x_s): part after part, and in a part the
    sparse token before its R dense ones (Eq. 7, 8).

    x_s [B, 17, 2] is in the model frame; conf [B, 17] is 0 for missing joints (None: all visible,
    the paper's form). C_s and C_d are frozen copies of the tokenizer's codebooks.

    `forward` is *teacher-forced*: it sees the true tokens of all parts at once, and masks hide
    what lies ahead. `rollout` is *free-running*: it goes part by part on its own choices, and needs
    no mask, since its caches hold the past alone. Both are made of the same four steps:
    `begin`, `summarize`, `remember` and `predict`.

    Three switches of Config change the paper's method. condition="every": one SOS token is a narrow
    door for a whole pose, so an MLP of x_s also adds to every position. soft=True: a step hands on
    the *expected* embedding, softmax(logits) @ C, instead of the likeliest code. history_dropout:
    training forgets some parts of the past, so that the model learns to see them in x_s as well,
    and `one_pass` can do without any. soft and history_dropout together let training go on through
    the poses that one pass makes (`HiPART.loss`). A fourth, soft_targets, is told in `token_loss`.
    """

    GENERATES = "both"  # of GENERATIONS

    def __init__(self, config: Config):
        super().__init__()
        c, W = config, config.width
        if c.generation != self.GENERATES:
            raise ValueError(f"{type(self).__name__} generates {self.GENERATES}, found "
                             f"{c.generation}: baselines.new_hipart makes what is for it")
        self.config = c
        self.register_buffer("C_s", torch.randn(c.K_s, c.D))
        self.register_buffer("C_d", torch.randn(c.K_d, c.D))
        # The mean squared distances of the tokenizer's embeddings to their own codes.
        self.register_buffer("m_s", torch.ones(()))
        self.register_buffer("m_d", torch.ones(()))
        self.P_c = nn.Linear(J * 2, W)  # the SOS token
        # Column j is the learned token that stands in for a missing joint j, as in PCT.
        self.missing = nn.Linear(J, W, bias=False)
        if c.condition == "every":
            self.P_e = nn.Sequential(
                nn.Linear(J * 3, 4 * W), nn.GELU(), nn.Linear(4 * W, 4 * W), nn.GELU(),
                nn.Linear(4 * W, J_S * W))
        self.in_s, self.in_d = nn.Linear(c.D, W), nn.Linear(c.D, W)
        # Ours: without these, a part would not know where in the body it is, LSAB would not know
        # the order of its dense tokens, and in PH the R dense slots would all be the same.
        self.part = nn.Parameter(0.02 * torch.randn(J_S, W))  # the 16 positions of GCSAB
        self.slot_l = nn.Parameter(0.02 * torch.randn(1 + R, W))  # the 1 + R slots of LSAB
        self.slot_p = nn.Parameter(0.02 * torch.randn(1 + R, W))  # and those of PH
        self.LSAB, self.GCSAB, self.PH = (
            nn.ModuleList([Block(W, c.heads, c.mlp_ratio, c.dropout) for _ in range(n)])
            for n in (c.lsab_blocks, c.gcsab_blocks, c.ph_blocks))
        self.norm_h, self.norm_p = nn.LayerNorm(W), nn.LayerNorm(W)
        self.head_s, self.head_d = nn.Linear(W, c.K_s), nn.Linear(W, c.K_d)
        # PH (Eq. 11): the sparse slot sees only itself, since its token is chosen first; the dense
        # slots see it and one another.
        mask_p = torch.ones(1 + R, 1 + R, dtype=torch.bool)
        mask_p[0, 1:] = False
        self.register_buffer("mask_p", mask_p, persistent=False)
        # GCSAB (Eq. 10): a position sees itself and the parts before it.
        mask_h = torch.ones(J_S, J_S, dtype=torch.bool).tril()
        self.register_buffer("mask_h", mask_h, persistent=False)

    @torch.no_grad()
    def set_codebooks(self, msst: MSST, x_f: Tensor) -> None:
        """Copy the codebooks of a trained tokenizer, and measure how far embeddings of the poses
        x_f [N, 96, 2] lie from their codes."""
        self.C_s.copy_(msst.Q_s.codebook)
        self.C_d.copy_(msst.Q_d.codebook)
        o = msst.tokenize(x_f)
        self.m_s.copy_((o["z_s"] - o["zh_s"]).pow(2).sum(-1).mean())
        self.m_d.copy_((o["zp_d"] - o["zh_d"]).pow(2).sum(-1).mean())

    def begin(self, x_s: Tensor, conf: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_s [B, 17, 2] -> the SOS token g^0 = P_c(x_s) [B, 1, W], and what is added at every
        position [B or 1, 16, W]."""
        visible = visible_joints(x_s, conf)
        x = hide_missing(x_s, visible).flatten(1)
        g_0, position = self.P_c(x) + self.missing(1 - visible), self.part[None]
        if self.config.condition == "every":
            position = position + self.P_e(torch.cat([x, visible], 1)).unflatten(1, (J_S, -1))
        return g_0[:, None], position

    def summarize(self, zh_s: Tensor, zh_d: Tensor) -> Tensor:
        """Eq. 9: g^i = mean(LSAB(zh_s^i, zh_d^(i,1..R))), one vector for what a part has become.
        n parts at once: zh_s [B, n, D], zh_d [B, n, R, D] -> g [B, n, W]."""
        x = torch.cat([self.in_s(zh_s)[:, :, None], self.in_d(zh_d)], 2) + self.slot_l
        x = run_blocks(self.LSAB, x.flatten(0, 1))  # [B n, 1 + R, W]
        g, p = x.mean(1).unflatten(0, zh_s.shape[:2]), self.config.history_dropout
        return g * (torch.rand_like(g[..., :1]) >= p) if p and self.training else g

    def remember(self, g: Tensor, mask: Tensor | None = None, caches=None) -> Tensor:
        """Eq. 10: h^0..h^i = GCSAB(g^0..g^i), all that has been generated so far, as seen from
        each part. g [B, n, W] -> h [B, n, W]."""
        return self.norm_h(run_blocks(self.GCSAB, g, mask, caches))

    def predict(self, slots: Tensor, mask: Tensor | None = None, caches=None) -> Tensor:
        """Eq. 11: PH, in the slots of one part, [B, 1..1 + R, W] -> the same shape. The sparse
        slot holds h^i; a dense slot holds the part's own sparse token, as Eq. 8 says (by the
        index in Eq. 11 it would be that of the part before)."""
        return self.norm_p(run_blocks(self.PH, slots, mask, caches))

    def forward(self, x_s: Tensor, q_s: Tensor, q_d: Tensor,
                conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits for the true tokens q_s [B, 16] and q_d [B, 48]:
        logits_s [B, 16, K_s] and logits_d [B, 48, K_d]. A part sees only the parts before it, and
        its dense logits also see its own true sparse token."""
        zh_s, zh_d = self.C_s[q_s], self.C_d[q_d].unflatten(1, (J_S, R))
        g_0, position = self.begin(x_s, conf)
        g = self.summarize(zh_s[:, :-1], zh_d[:, :-1])  # g^1..g^15: nothing follows the last part
        h = self.remember(torch.cat([g_0, g], 1) + position, self.mask_h)  # [B, 16, W]
        # We count parts from 0, the paper from 1: h^i predicts our part i, which is its pair i + 1.
        dense = self.in_s(zh_s)[:, :, None].expand(-1, -1, R, -1)
        slots = torch.cat([h[:, :, None], dense], 2) + self.slot_p  # [B, 16, 1 + R, W]
        p = self.predict(slots.flatten(0, 1), self.mask_p).unflatten(0, (-1, J_S))
        return self.head_s(p[:, :, 0]), self.head_d(p[:, :, 1:]).flatten(1, 2)

    def log_prob(self, x_s: Tensor, q_s: Tensor, q_d: Tensor, conf: Tensor | None = None) -> Tensor:
        """log P(q_s, q_d | x_s) [B], the natural logarithm, summed over the 64 tokens (Eq. 7, 8).
        The R dense tokens of a part are drawn side by side: given its sparse token and the past,
        they do not depend on one another."""
        logits = self(x_s, q_s, q_d, conf)
        return sum(token_log_prob(of, q).sum(1) for of, q in zip(logits, (q_s, q_d), strict=True))

    def rollout(self, x_s: Tensor, conf: Tensor | None = None) -> dict[str, Tensor]:
        """Free-running generation (Alg. 1), in 16 steps that keep their keys and values.

        Returns logits_s [B, 16, K_s] and logits_d [B, 48, K_d], and the embeddings zh_s [B, 16, D]
        and zh_d [B, 48, D] that the steps handed on. The tokens are the argmax of the logits.
        """
        past = [[] for _ in self.GCSAB]  # keys and values of all parts so far
        g, position = self.begin(x_s, conf)
        steps = []
        for i in range(J_S):
            h = self.remember(g + position[:, i : i + 1], caches=past)  # [B, 1, W]
            here = [[] for _ in self.PH]  # those of this part's slots
            logits_s = self.head_s(self.predict(h + self.slot_p[:1], caches=here))  # [B, 1, K_s]
            zh_s = self.pick(logits_s, self.C_s)
            # One vector becomes R slots: only the slots' embeddings tell them apart.
            logits_d = self.head_d(self.predict(self.in_s(zh_s) + self.slot_p[1:], caches=here))
            zh_d = self.pick(logits_d, self.C_d)  # [B, R, D]
            g = self.summarize(zh_s, zh_d[:, None])
            steps.append(dict(logits_s=logits_s, logits_d=logits_d, zh_s=zh_s, zh_d=zh_d))
        return {name: torch.cat([step[name] for step in steps], 1) for name in steps[0]}

    def generate(self, x_s: Tensor, conf: Tensor | None, pick=None) -> tuple[Tensor, Tensor]:
        """zh_s [B, 16, D] and zh_d [B, 48, D] of `rollout`, the fast way. `pick` may stand in for
        the method of that name; it gets logits [B n, K] of n tokens of every pose."""
        return generate(self, x_s, conf, pick)

    def one_pass(self, x_s: Tensor, conf: Tensor | None = None, pick=None) -> dict[str, Tensor]:
        """As `rollout`, but all parts at once, with no past: g^1..g^15 are 0. `pick` as above."""
        pick, (g_0, position) = pick or self.pick, self.begin(x_s, conf)
        h = self.remember(F.pad(g_0, (0, 0, 0, J_S - 1)) + position, self.mask_h)  # [B, 16, W]
        here = [[] for _ in self.PH]  # keys and values of the sparse slots
        slots = self.predict(h.reshape(-1, 1, h.shape[-1]) + self.slot_p[:1], caches=here)
        logits_s = self.head_s(slots).flatten(0, 1)  # [B 16, K_s]
        zh_s = pick(logits_s, self.C_s)
        slots = self.predict(self.in_s(zh_s)[:, None] + self.slot_p[1:], caches=here)
        logits_d = self.head_d(slots).flatten(0, 1)  # [B 16 R, K_d]
        o = dict(logits_s=logits_s, logits_d=logits_d, zh_s=zh_s, zh_d=pick(logits_d, self.C_d))
        return {name: of.unflatten(0, (len(x_s), -1)) for name, of in o.items()}

    def pick(self, logits: Tensor, C: Tensor) -> Tensor:
        """What a step hands on: logits [B, n, K], codebook C [K, D] -> [B, n, D]."""
        return logits.softmax(-1) @ C if self.config.soft else C[logits.argmax(-1)]


def token_log_prob(logits: Tensor, q: Tensor) -> Tensor:
    """logits [..., K] and tokens q [...] -> log P(q) [...]."""
    return logits.log_softmax(-1).gather(-1, q[..., None]).squeeze(-1)


class HiPART(nn.Module):
    """Stages 1 and 2 together: a sparse 2D pose in, dense and fine 2D poses out. `generator` makes
    the transformer; baselines.py has others than HiARM."""

    def __init__(self, config: Config, generator=HiARM):
        super().__init__()
        self.config = config
        self.msst, self.hiarm = MSST(config), generator(config)

    def loss(self, x_s: Tensor, conf: Tensor | None, x_d: Tensor, x_f: Tensor, z_s: Tensor,
             zp_d: Tensor, q_s: Tensor, q_d: Tensor, in_one_pass: bool = False
             ) -> tuple[Tensor, dict]:
        """L_2 (Eq. 12) for the tokens q_s [B, 16] and q_d [B, 48] of the true poses x_d [B, 48, 2]
        and x_f [B, 96, 2], given x_s [B, 17, 2], all in the model frame -> the loss, and its terms
        with the accuracies of both kinds of token (detached, unweighted). z_s [B, 16, D] and
        zp_d [B, 48, D] are the embeddings that the tokens stand for.

        in_one_pass (ours): the same on `HiARM.one_pass` in the place of teacher forcing, plus
        lambda_p times the error of the poses that the frozen tokenizer decodes from what it made.
        config.soft is what makes that differentiable.
        """
        c, hiarm = self.config, self.hiarm
        if in_one_pass:
            o = hiarm.one_pass(x_s, conf)
            xh_d, xh_f = self.msst.decode_embeddings(o["zh_s"], o["zh_d"])
            pose = dict(pose=(xh_d - x_d).norm(dim=-1).mean() + (xh_f - x_f).norm(dim=-1).mean())
        else:
            logits_s, logits_d = hiarm(x_s, q_s, q_d, conf)
            o, pose = dict(logits_s=logits_s, logits_d=logits_d), {}
        terms = pose | dict(
            sparse=token_loss(o["logits_s"], q_s, z_s, hiarm.C_s, hiarm.m_s, c.soft_targets),
            dense=token_loss(o["logits_d"], q_d, zp_d, hiarm.C_d, hiarm.m_d, c.soft_targets),
            acc_s=(o["logits_s"].argmax(-1) == q_s).float().mean(),
            acc_d=(o["logits_d"].argmax(-1) == q_d).float().mean(),
        )
        loss = terms["sparse"] + c.lambda_d * terms["dense"]
        if in_one_pass:
            loss = loss + c.lambda_p * terms["pose"]
        return loss, {name: t.detach() for name, t in terms.items()}

    def densify(self, x_s: Tensor, conf: Tensor | None = None, memory: int = 512,
                history: bool = True) -> tuple[Tensor, Tensor]:
        """x_s [N, 17, 2] and conf [N, 17] (0: missing; None: all visible) -> x_d [N, 48, 2] and
        x_f [N, 96, 2] (Alg. 1), all in normalised image coordinates, without dropout. N may be any
        number: poses are made in chunks, in `memory` MB at most beside input and output. Without
        history, all tokens come from `HiARM.one_pass`."""
        x_d, x_f = x_s.new_empty(len(x_s), J_D, 2), x_s.new_empty(len(x_s), J_F, 2)
        n = poses_at_once(self.config, memory, history)
        with lean_mode():
            for rows in (slice(i, i + n) for i in range(0, len(x_s), n)):
                x, c = x_s[rows], None if conf is None else conf[rows]
                pelvis = detected_pelvis(x, c)
                x = to_model_frame(x, pelvis)
                if history:
                    zh_s, zh_d = self.hiarm.generate(x, c)
                else:
                    zh_s, zh_d = map(self.hiarm.one_pass(x, c).get, ("zh_s", "zh_d"))
                made = self.msst.decode_embeddings(zh_s, zh_d)
                x_d[rows], x_f[rows] = (from_model_frame(y, pelvis) for y in made)
        return x_d, x_f

    def sample(self, x_s: Tensor, conf: Tensor | None, n: int, temperature: float = 1.0,
               top_k: int | None = None, generator: torch.Generator | None = None,
               memory: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """n hypotheses of each pose, drawn token by token from P(q_d, q_s | x_s): coordinates and
        `memory` as in `densify`, x_s [B, 17, 2] -> x_d [B, n, 48, 2], x_f [B, n, 96, 2] and
        log_prob [B, n]. What a step hands on is the code that was drawn, also if config.soft.

        Tokens are drawn at a temperature, from the top_k likeliest codes (None: from all), with a
        generator on the device of x_s. log_prob is always that of `HiARM.log_prob`: what the model
        itself, at temperature 1 and with all codes, thinks of the tokens. ValueError for options
        that mean nothing.
        """
        K = min(self.config.K_s, self.config.K_d)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, found {temperature}")
        if n < 1 or (top_k is not None and not 1 <= top_k <= K):
            raise ValueError(f"n must be at least 1 and top_k from 1 to {K}, found {n} and {top_k}")
        N = len(x_s) * n
        x_d, x_f, log_prob = (x_s.new_empty(N, *of) for of in ((J_D, 2), (J_F, 2), ()))

        def draw(logits: Tensor, C: Tensor) -> Tensor:
            scores = (logits - logits.amax(-1, keepdim=True)) / temperature  # the best is 0
            if top_k is not None:
                scores[scores < scores.topk(top_k).values[:, -1:]] = -torch.inf
            # By the cumulated probabilities, as torch.multinomial takes long. In float64, a number
            # below 1 times their sum stays below it, so that no code of probability 0 is drawn.
            cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
            at = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]
            q = torch.searchsorted(cdf, at, right=True).squeeze(-1)
            log_prob[rows] += token_log_prob(logits, q).view(len(x), -1).sum(1)
            return C[q]

        at_once = poses_at_once(self.config, memory)
        with lean_mode():
            log_prob.zero_()
            for i in range(0, N, at_once):
                rows = torch.arange(i, min(i + at_once, N), device=x_s.device)
                x, c = x_s[rows // n], None if conf is None else conf[rows // n]
                pelvis = detected_pelvis(x, c)
                made = self.hiarm.generate(to_model_frame(x, pelvis), c, draw)
                made = self.msst.decode_embeddings(*made)
                x_d[rows], x_f[rows] = (from_model_frame(y, pelvis) for y in made)
        return tuple(y.unflatten(0, (-1, n)) for y in (x_d, x_f, log_prob))


def token_loss(logits: Tensor, q: Tensor, z: Tensor, C: Tensor, m: Tensor, spread: float
               ) -> Tensor:
    """A cross-entropy of Eq. 12: logits [B, n, K] for tokens q [B, n] of embeddings z [B, n, D].

    With a spread (ours), the target is not the nearest code alone, but every code k in proportion
    to exp(-|z - C_k|^2 / (spread m)): an embedding lies between codes, and those near it are nearly
    as right. m is the mean squared distance of embeddings to their own codes.
    """
    if not spread:
        return F.cross_entropy(logits.flatten(0, 1), q.flatten())
    # |z|^2 is the same for all codes, and drops out.
    targets = ((2 * z @ C.T - C.pow(2).sum(-1)) / (spread * m).clamp_min(1e-9)).softmax(-1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))


# --------------------------------------------------------------------------------------------------
# Stage 3: lifting (Fig. 11)


def lifting_features(x: Tensor, conf: Tensor | None = None) -> dict[str, Tensor]:
    """What a lifter sees of x [B, 17 or 161, 2] (normalised image coordinates): offsets down the
    hierarchy. Raw coordinates train far worse: a network would spend itself on these differences.

    sparse [B, 17, 2]  the pelvis' place in the image, then every joint minus the pelvis; lifters
                       put what stands for a missing joint in the place of a missing pelvis, too
    dense [B, 48, 6]   the mean of the point's part minus the pelvis, that mean minus the part's
                       sparse joint, and the point minus that mean
    fine [B, 96, 2]    the point minus its dense point
    dense and fine are absent for 17 points. ValueError for any other number of points.
    """
    if x.shape[1:] not in ((J, 2), (J + J_D + J_F, 2)):
        raise ValueError("a lifter takes [B, 17, 2] or [B, 161, 2] (17 + 48 + 96 points), "
                         f"found {list(x.shape)}")
    x_s = x[:, :J]
    visible, pelvis = visible_joints(x_s, conf), detected_pelvis(x_s, conf)
    sparse = torch.cat([pelvis, hide_missing(x_s - pelvis, visible)[:, 1:]], 1)
    if x.shape[1] == J:
        return dict(sparse=sparse)
    x_d, x_f = x[:, J : J + J_D], x[:, J + J_D :]
    mean = x_d.unflatten(1, (J_S, R)).mean(2)  # [B, 16, 2]
    # An index would be copied to a GPU in every step, and waited for.
    own, seen = (torch.stack([t[:, j] for j in PART_JOINT], 1) for t in (x_s, visible))
    gap = hide_missing(mean - own, seen)
    mean, gap = mean.repeat_interleave(R, 1), gap.repeat_interleave(R, 1)  # [B, 48, 2]
    dense = torch.cat([mean - pelvis, gap, x_d - mean], -1)
    return dict(sparse=sparse, dense=dense, fine=x_f - x_d.repeat_interleave(2, 1))


class Lifter(nn.Module):
    """What all lifters share: features and targets are standardised with the training set's
    statistics, which are kept as buffers. n_points is 17, or 161 = 17 + 48 + 96."""

    def __init__(self, n_points: int):
        super().__init__()
        self.n_points = n_points
        for name, shape in dict(sparse=(J, 2), dense=(J_D, 6), fine=(J_F, 2), y=(J, 3)).items():
            self.register_buffer(f"mean_{name}", torch.zeros(shape))
            self.register_buffer(f"std_{name}", torch.ones(shape))

    @torch.no_grad()
    def standardize(self, x: Tensor, y: Tensor, conf: Tensor | None = None) -> None:
        """Take the statistics from training samples x [N, n_points, 2] and y [N, 17, 3] mm."""
        for name, t in (lifting_features(x, conf) | dict(y=y)).items():
            getattr(self, f"mean_{name}").copy_(t.mean(0))
            getattr(self, f"std_{name}").copy_(t.std(0, correction=0).clamp_min(1e-6))
        # One scale for all joints, as MPJPE weighs the millimetres of all joints alike.
        self.std_y.fill_(float(y.std(correction=0)))

    def features(self, x: Tensor, conf: Tensor | None) -> dict[str, Tensor]:
        """The standardised `lifting_features`. ValueError for another number of points."""
        if x.shape[1] != self.n_points:
            raise ValueError(
                f"this lifter was made for {self.n_points} points, found x {list(x.shape)}")
        return {name: (t - getattr(self, f"mean_{name}")) / getattr(self, f"std_{name}")
                for name, t in lifting_features(x, conf).items()}


class SpatialLifter(Lifter):
    """The vanilla spatial transformer of PoseFormer and MixSTE (Fig. 11): a token per point, and
    the head reads the first 17 of them.

    With 17 points it has the paper's 0.9M parameters, and a learned token for a missing joint.
    """

    def __init__(self, n_points: int = J + J_D + J_F, width: int = 96, blocks: int = 12,
                 heads: int = 6):
        super().__init__(n_points)
        self.embed_s = nn.Linear(2, width)
        if n_points > J:
            self.embed_d, self.embed_f = nn.Linear(6, width), nn.Linear(2, width)
        self.missing = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(n_points, width))
        rates = torch.linspace(0, 0.1, blocks, device="cpu").tolist()  # of drop path, rising
        self.blocks = nn.ModuleList(
            [Block(width, heads, 2, drop_path=p, eps=1e-6) for p in rates])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))

    def tokens(self, x: Tensor, conf: Tensor | None = None) -> Tensor:
        """x [B, n_points, 2], conf [B, 17] -> what the blocks are given, [B, n_points, width]."""
        f, visible = self.features(x, conf), visible_joints(x[:, :J], conf)
        tokens = torch.where(visible[..., None] > 0, self.embed_s(f["sparse"]), self.missing)
        if self.n_points > J:
            tokens = torch.cat([tokens, self.embed_d(f["dense"]), self.embed_f(f["fine"])], 1)
        return tokens + self.position

    def forward(self, x: Tensor, conf: Tensor | None = None) -> Tensor:
        """x [B, n_points, 2] in normalised image coordinates, conf [B, 17] -> y [B, 17, 3] in mm,
        relative to the pelvis, in the camera's axes."""
        tokens = run_blocks(self.blocks, self.tokens(x, conf))  # [B, n_points, width]
        # Two LayerNorms in a row, as in PoseFormer: one ends the blocks, one begins the head.
        return self.head(self.norm(tokens[:, :J])) * self.std_y + self.mean_y


# --------------------------------------------------------------------------------------------------


def main() -> None:
    """Walk random poses through an untrained model of the paper's sizes, and print each step."""
    model, lifter = HiPART(Config()).eval(), SpatialLifter().eval()
    x_s, conf = torch.rand(1, J, 2) - 0.5, torch.ones(1, J)
    conf[0, 16] = 0  # the detector missed the right wrist
    o = model.msst(torch.randn(1, J_F, 2))
    x = to_model_frame(x_s, detected_pelvis(x_s, conf))
    g_0, _ = model.hiarm.begin(x, conf)
    r = model.hiarm.rollout(x, conf)
    x_d, x_f = model.densify(x_s, conf)
    y = lifter(torch.cat([x_s, x_d, x_f], 1), conf)
    for name, value, text in (
        ("z_s", o["z_s"], "stage 1: sparse embeddings of a fine pose, E_d(E_f(x_f))"),
        ("q_s", o["q_s"], "their tokens, Eq. 1"),
        ("up_s", o["up_s"], "the quantized sparse level, decoded: D_s"),
        ("zp_d", o["zp_d"], "dense embeddings beside it: z'_d"),
        ("q_d", o["q_d"], "their tokens, Eq. 2"),
        ("p_A", o["p_A"], "action logits, Eq. 4"),
        ("x_d", o["x_d"], "decoded dense points, D_d"),
        ("x_f", o["x_f"], "decoded fine points, D_f"),
        ("x_s", x_s, "stage 2: a detection without its right wrist"),
        ("g_0", g_0, "SOS, P_c(x_s); then 16 steps of Eq. 10, 11 and 9"),
        ("logits_s", r["logits_s"], "the sparse token of each part, Eq. 11"),
        ("logits_d", r["logits_d"], "and its dense tokens, Eq. 11"),
        ("zh_s", r["zh_s"], "the sparse embeddings that were chosen, Alg. 1"),
        ("zh_d", r["zh_d"], "and the dense ones"),
        ("x_d", x_d, "generated dense points"),
        ("x_f", x_f, "generated fine points"),
        ("y", y, "stage 3: joints in 3D, mm relative to the pelvis, Fig. 11"),
    ):
        print(f"{name:10}{list(value.shape)!s:17}{text}")


if __name__ == "__main__":
    main()
