"""HiPART: Hierarchical Pose AutoRegressive Transformer for occluded 3D human pose estimation (CVPR 2025), in one file.

Read it top to bottom; data flows the same way. Symbols are the paper's, section and equation numbers refer to it.

  skeleton tables, Config, coordinate frame
  stage 1  MSST    tokenizes a fine 2D pose into 16 sparse + 48 dense tokens, and back          section 4.1, Eq. 1-6
  stage 2  HiARM   writes those tokens given only a detector's sparse 2D pose                  section 4.2, Eq. 7-12
           HiPART  both together: sparse 2D pose -> dense and fine 2D pose
  stage 3  lifters 17 (+ 48 + 96) 2D points -> 17 3D joints                                    Fig. 11

Sizes: B batch, J_s = 16 sparse joints that own a token, r = 3 dense points each, J_d = 48, J_f = 96, D code width.
    model = HiPART(Config()).eval(); x_d, x_f = model.densify(x_s, conf)   # [B, 17, 2] -> [B, 48, 2], [B, 96, 2]
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ema_update_, nearest_code

# ----------------------------------------------------------------------------------------------------------------------
# Skeleton: the 17 joints of Human3.6M. x_s and y keep all 17; the 16 that are not the pelvis own tokens.

JOINT_NAMES = ("pelvis", "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "spine", "thorax",
               "neck/nose", "head", "left shoulder", "left elbow", "left wrist", "right shoulder", "right elbow",
               "right wrist")
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
LEFT, RIGHT = (4, 5, 6, 11, 12, 13), (1, 2, 3, 14, 15, 16)
# A *part* is one sparse joint and its r dense points. Parts are numbered from the centre to the periphery: by bones from
# the pelvis, ties by joint number. PART_JOINT[i] is the joint of part i; this is also the order of generation.
PART_JOINT = (1, 4, 7, 2, 5, 8, 3, 6, 9, 11, 14, 10, 12, 15, 13, 16)
J, J_S, J_D, J_F = 17, 16, 48, 96
R = J_D // J_S  # dense tokens of a part: rows 3i, 3i + 1, 3i + 2 of a dense array; fine rows 2k, 2k + 1 refine dense k


@dataclass(frozen=True)
class Config:
    """Sizes and training constants. The defaults are the paper's (section 5.1, appendix C); presets shrink them."""

    # Stage 1: MSST
    D: int = 128  # width of embeddings and codes
    K_s: int = 2048  # size of the sparse codebook C_s
    K_d: int = 2048  # size of the dense codebook C_d
    encoder_blocks: int = 4  # Mixer blocks of E_f and of E_d
    encoder_width: int = 128
    decoder_blocks: int = 1  # Mixer blocks of D_s, D_d, D_f
    decoder_width: int = 96
    token_hidden: int = 64  # hidden width of token mixing (PCT)
    n_actions: int = 15
    beta: float = 0.25  # commitment weight, Eq. 6
    lambda_l: float = 1.0  # weight of L_local, Eq. 6
    lambda_g: float = 0.3  # weight of L_global, Eq. 6
    tau: float = 0.07  # temperature of L_local, Eq. 3
    cosine_local: bool = True  # L_local on L2-normalised embeddings; False: Eq. 3 to the letter, plain dot products
    lambda_r: float = 20.0  # weight of both reconstruction terms (ours: the paper states no reductions; 100 collapses)
    ema_decay: float = 0.99
    restart_below: float = 0.01  # a code whose running count is below this part of a fair share N / K is dead
    warmup_free: int = 150  # steps without quantization before the codebooks are set by k-means (ours)
    epochs_1: int = 20
    batch_1: int = 128
    lr_1: float = 1e-3
    weight_decay_1: float = 0.15
    warmup_1: int = 500  # iterations of linear learning-rate warm-up, then cosine decay
    # Stage 2: HiARM
    width: int = 128
    heads: int = 8
    mlp_ratio: int = 4
    lsab_blocks: int = 1
    gcsab_blocks: int = 12
    ph_blocks: int = 4
    dropout: float = 0.25
    lambda_d: float = 1.5  # weight of the dense tokens, Eq. 12
    condition: str = "sos"  # "sos": x_s is g^0 and no more (the paper); "every": it reaches every position (ours)
    soft: bool = False  # True: generation hands on expected embeddings instead of the most probable code (ours)
    epochs_soft: int = 0  # so many last epochs of stage 2 train on that generation itself, with a pose error (ours)
    lambda_p: float = 3.0  # its weight
    epochs_2: int = 50
    batch_2: int = 64
    lr_2: float = 5e-4
    weight_decay_2: float = 0.03
    warmup_2: int = 500
    # Stage 3: the lifter
    lifter: str = "spatial"  # "spatial" (Fig. 11) or "mlp" (after Martinez et al. 2017, for small machines)
    lifter_width: int = 96
    lifter_blocks: int = 12
    epochs_3: int = 25
    batch_3: int = 256
    lr_3: float = 1e-3  # AdamW, times 0.96 every 4 epochs
    weight_decay_3: float = 0.0  # on all parameters; 0: Adam, as in the paper
    cosine_3: bool = False  # warm-up and cosine decay instead
    turn_3: float = 0.0  # training poses turn about the ray to the pelvis: standard deviation of the angle, rad (ours)
    draws_3: int = 25  # draws of detections that HiPART densifies for training: one for each epoch
    lambda_aux: float = 0.1  # rival (e): weight of the auxiliary loss on dense and fine points
    epochs_r: int = 50  # rival (d): the plain regressor
    regressor_width: int = 1024

    def __post_init__(self):
        for name, value, choices in (("condition", self.condition, ("sos", "every")),
                                     ("lifter", self.lifter, ("spatial", "mlp"))):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, found {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, found {self.width} and {self.heads}")
        if self.epochs_soft and not self.soft:
            raise ValueError("epochs_soft trains through expected embeddings: it needs soft")
        for name, value in vars(self).items():
            if type(value) is int and value < 1 and not name.startswith(("warmup", "epochs_soft")):
                raise ValueError(f"{name} must be at least 1, found {value}")


# ----------------------------------------------------------------------------------------------------------------------
# Coordinates. Poses come in VideoPose3D's normalised image coordinates: x in [-1, 1] over the image width, y on the same
# scale. MSST and HiARM work in the *model frame*: minus the detected pelvis, divided by SCALE (about unit variance).

SCALE = 0.125


def normalize_screen(x: Tensor, w: int, h: int) -> Tensor:
    """Pixels [..., 2] -> normalised image coordinates (VideoPose3D's normalize_screen_coordinates)."""
    return x * (2 / w) - x.new_tensor([1, h / w])


def to_pixels(x: Tensor, w: int, h: int) -> Tensor:
    """Inverse of `normalize_screen`."""
    return (x + x.new_tensor([1, h / w])) * (w / 2)


def hide_missing(x_s: Tensor, seen: Tensor) -> Tensor:
    """x_s [B, 17, 2] with 0 wherever seen [B, 17] is 0, whatever a detector left there (NaN too)."""
    return x_s.masked_fill(seen[..., None] == 0, 0.0)


def detected_pelvis(x_s: Tensor, conf: Tensor | None = None) -> Tensor:
    """Where the detector puts the pelvis, [B, 17, 2] -> [B, 1, 2]: joint 0, or the mean of the visible joints without it."""
    if conf is None:
        return x_s[:, :1]
    seen = (conf > 0).to(x_s)
    mean = hide_missing(x_s, seen).sum(1, keepdim=True) / seen.sum(1).clamp_min(1)[:, None, None]
    return torch.where(conf[:, :1, None] > 0, x_s[:, :1], mean)


def to_model_frame(x: Tensor, pelvis: Tensor) -> Tensor:
    """Normalised image coordinates [B, n, 2] -> model frame, given the detected pelvis [B, 1, 2]."""
    return (x - pelvis) / SCALE


def from_model_frame(x: Tensor, pelvis: Tensor) -> Tensor:
    """Inverse of `to_model_frame`."""
    return x * SCALE + pelvis


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: Multi-Scale Skeletal Tokenization (section 4.1, Fig. 10, Alg. 2)


class MixerBlock(nn.Module):
    """MLP-Mixer block (Tolstikhin et al. 2021; PCT's sizes): mix tokens, then channels; pre-norm, residual, GELU."""

    def __init__(self, tokens: int, width: int, token_hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix_tokens = nn.Sequential(nn.Linear(tokens, token_hidden), nn.GELU(), nn.Linear(token_hidden, tokens))
        self.mix_channels = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, tokens, width]
        x = x + self.mix_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm2(x))


def joint_map(n_in: int, n_out: int) -> nn.Linear:
    """Linear map along the joint axis. It starts as the skeleton's own hierarchy (each coarse row the mean of its fine
    rows, or each fine row a copy of its coarse row), so that token (i, j) begins life as a summary of part i."""
    layer = nn.Linear(n_in, n_out)
    fine, coarse = max(n_in, n_out), min(n_in, n_out)
    member = torch.eye(coarse).repeat_interleave(fine // coarse, dim=1)  # [coarse, fine]
    with torch.no_grad():
        layer.weight.mul_(0.1).add_(member / member.sum(1, keepdim=True) if n_in >= n_out else member.T)
    return layer


class Encoder(nn.Module):
    """E_f, E_d (Fig. 10): per-joint linear, L Mixer blocks, linear along the joint axis, linear to the output width."""

    def __init__(self, c_in: int, n_in: int, n_out: int, c: Config):
        super().__init__()
        self.embed = nn.Linear(c_in, c.encoder_width)
        self.blocks = nn.Sequential(*[MixerBlock(n_in, c.encoder_width, c.token_hidden) for _ in range(c.encoder_blocks)])
        self.norm = nn.LayerNorm(c.encoder_width)
        self.joints = joint_map(n_in, n_out)
        self.out = nn.Linear(c.encoder_width, c.D)

    def forward(self, x: Tensor) -> Tensor:  # [B, n_in, c_in]
        x = self.norm(self.blocks(self.embed(x)))
        return self.out(self.joints(x.transpose(1, 2)).transpose(1, 2))  # [B, n_out, D]


class Decoder(nn.Module):
    """D_s, D_d, D_f: the encoder turned round. The joint axis is mapped first, then the Mixer blocks run."""

    def __init__(self, c_in: int, n_in: int, n_out: int, c_out: int, c: Config):
        super().__init__()
        self.joints = joint_map(n_in, n_out)
        self.embed = nn.Linear(c_in, c.decoder_width)
        self.blocks = nn.Sequential(*[MixerBlock(n_out, c.decoder_width, c.token_hidden) for _ in range(c.decoder_blocks)])
        self.norm = nn.LayerNorm(c.decoder_width)
        self.out = nn.Linear(c.decoder_width, c_out)

    def forward(self, x: Tensor) -> Tensor:  # [B, n_in, c_in]
        x = self.embed(self.joints(x.transpose(1, 2)).transpose(1, 2))
        return self.out(self.norm(self.blocks(x)))  # [B, n_out, c_out]


class Quantizer(nn.Module):
    """Q(z; C): nearest code, straight-through gradient, EMA codebook (Eq. 1, 2; van den Oord et al. 2017, appendix A.1).

    The codebook is a buffer: the optimiser never sees it. It is *initialised* by k-means on encoder outputs after some
    steps without quantization (`active` is False till then: z passes unchanged), and *updated* after each training step
    by `update`, never in eval mode. A code that has become unused restarts as a random encoder output of the batch.
    """

    def __init__(self, K: int, D: int, decay: float, restart_below: float):
        super().__init__()
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("codebook", torch.randn(K, D))
        self.register_buffer("count", torch.ones(K))  # EMA of rows per code and step
        self.register_buffer("total", self.codebook.clone())  # EMA of their sum
        self.register_buffer("active", torch.tensor(False))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, n, D] -> straight-through z_hat [B, n, D], token ids q [B, n]."""
        q = nearest_code(z.detach().float().flatten(0, 1), self.codebook).view(z.shape[:2])
        if not self.active:
            return z, q
        return z + (self.codebook[q] - z).detach(), q

    @torch.no_grad()
    def update(self, z: Tensor, q: Tensor) -> None:
        """One EMA step from the rows z that were quantized to q. Does nothing in eval mode or before initialisation."""
        if self.training and self.active:
            rows, K = z.detach().float().flatten(0, 1), len(self.codebook)
            lucky = torch.randperm(max(len(rows), K), device=rows.device)[:K] % len(rows)  # as different as they can be
            ema_update_(self.codebook, self.count, self.total, rows, q.flatten(), self.decay,
                        restart_below=self.restart_below * len(rows) / K, restart_rows=lucky)

    @torch.no_grad()
    def initialize(self, z: Tensor, rows_per_step: int, iterations: int = 10) -> None:
        """k-means on encoder outputs z [N, D]; counts are set to what training steps of `rows_per_step` rows would leave."""
        K, z = len(self.codebook), z.float()
        if len(z) < K:
            raise ValueError(f"k-means needs at least as many encoder outputs as codes ({K}), found {len(z)}")
        self.codebook.copy_(z[torch.randperm(len(z), device=z.device)[:K]])
        for _ in range(iterations):  # k-means is the same update with no memory; an empty cluster restarts
            lucky = torch.randperm(len(z), device=z.device)[:K]
            ema_update_(self.codebook, self.count, self.total, z, nearest_code(z, self.codebook), decay=0.0, eps=0.0,
                        restart_below=1.0, restart_rows=lucky)
        self.count.mul_(rows_per_step / len(z)).clamp_min_(rows_per_step / K * 0.1)
        self.total.copy_(self.codebook * self.count[:, None])  # so that total / count is the codebook: no jump at step 1
        self.active.fill_(True)


class MSST(nn.Module):
    """Multi-Scale Skeletal Tokenization: a two-level VQ-VAE over dense 2D poses (section 4.1, Alg. 2).

    All poses are in the model frame. The codebook term of Eq. 6 is not optimised, EMA replaces it; its value is
    that of the commitment terms, which are reported.
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
        self.Q_d = Quantizer(c.K_d, c.D, c.ema_decay, c.restart_below)
        self.P_A = nn.Sequential(nn.Linear(2 * c.D, c.encoder_width),
                                 *[MixerBlock(J_D, c.encoder_width, c.token_hidden) for _ in range(2)])
        self.action = nn.Linear(c.encoder_width, c.n_actions)

    def forward(self, x_f: Tensor) -> dict[str, Tensor]:
        """x_f [B, 96, 2] -> all that the loss, the logs and the figures need, by its name in the paper (z_d is z'_d)."""
        z_d = self.E_f(x_f)  # [B, 48, D]
        z_s = self.E_d(z_d)  # [B, 16, D]
        zh_s, q_s = self.Q_s(z_s)  # Eq. 1
        up_s = self.D_s(zh_s)  # [B, 48, D]
        z_d = self.fuse(torch.cat([z_d, up_s], -1))  # z'_d [B, 48, D]
        zh_d, q_d = self.Q_d(z_d)  # Eq. 2
        both = torch.cat([zh_d, up_s], -1)  # [B, 48, 2D]
        p_A = self.action(self.P_A(both).mean(1))  # Eq. 4, [B, actions]
        return dict(z_s=z_s, z_d=z_d, zh_s=zh_s, zh_d=zh_d, q_s=q_s, q_d=q_d,
                    x_d=self.D_d(zh_d), x_f=self.D_f(both), p_A=p_A)

    def encode(self, x_f: Tensor) -> tuple[Tensor, Tensor]:
        """x_f [B, 96, 2] -> q_s [B, 16], q_d [B, 48] int64 (Eq. 1, 2)."""
        z_d = self.E_f(x_f)
        zh_s, q_s = self.Q_s(self.E_d(z_d))
        return q_s, self.Q_d(self.fuse(torch.cat([z_d, self.D_s(zh_s)], -1)))[1]

    def decode(self, q_s: Tensor, q_d: Tensor) -> tuple[Tensor, Tensor]:
        """q_s [B, 16], q_d [B, 48] -> x_d [B, 48, 2], x_f [B, 96, 2]."""
        return self.decode_embeddings(self.Q_s.codebook[q_s], self.Q_d.codebook[q_d])

    def decode_embeddings(self, zh_s: Tensor, zh_d: Tensor) -> tuple[Tensor, Tensor]:
        """The same from embeddings [B, 16, D], [B, 48, D]; x_d depends on zh_d alone (Alg. 1 and 2)."""
        return self.D_d(zh_d), self.D_f(torch.cat([zh_d, self.D_s(zh_s)], -1))

    def loss(self, x_f: Tensor, x_d: Tensor, a: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """L_1 (Eq. 6) for targets x_f [B, 96, 2], x_d [B, 48, 2] and action labels a [B] (-1 = unknown).

        Returns the loss, its terms (detached, unweighted) and the output of `forward`. Reductions are ours: squared norms
        are means over points or tokens of the squared length, L_local is a mean over parts.
        """
        c, o = self.config, self(x_f)
        terms = dict(
            fine=(o["x_f"] - x_f).pow(2).sum(-1).mean(),
            dense=(o["x_d"] - x_d).pow(2).sum(-1).mean(),
            commit_s=(o["z_s"] - o["zh_s"].detach()).pow(2).sum(-1).mean(),
            commit_d=(o["z_d"] - o["zh_d"].detach()).pow(2).sum(-1).mean(),
            local=local_alignment(o["zh_s"], o["zh_d"], c.tau, c.cosine_local),
            action=global_alignment(o["p_A"], a),
        )
        loss = (c.lambda_r * (terms["fine"] + terms["dense"]) + c.beta * (terms["commit_s"] + terms["commit_d"])
                + c.lambda_l * terms["local"] + c.lambda_g * terms["action"])
        return loss, {name: t.detach() for name, t in terms.items()}, o

    def update_codebooks(self, o: dict[str, Tensor]) -> None:
        """EMA step of both codebooks from the output of `forward`; call it after the optimiser step."""
        self.Q_s.update(o["z_s"], o["q_s"])
        self.Q_d.update(o["z_d"], o["q_d"])

    @torch.no_grad()
    def initialize_codebooks(self, x_f: Tensor, batch: int) -> None:
        """k-means on the encoder outputs of x_f [N, 96, 2]: first C_s, then C_d from what C_s leaves to tell."""
        z_d = torch.cat([self.E_f(part) for part in x_f.split(1024)])
        z_s = self.E_d(z_d)
        self.Q_s.initialize(z_s.flatten(0, 1), batch * J_S)
        z_d = self.fuse(torch.cat([z_d, self.D_s(self.Q_s(z_s)[0])], -1))
        self.Q_d.initialize(z_d.flatten(0, 1), batch * J_D)


def local_alignment(zh_s: Tensor, zh_d: Tensor, tau: float, cosine: bool = True) -> Tensor:
    """L_local (Eq. 3): part-wise InfoNCE between zh_s [B, 16, D] and the part means of zh_d [B, 48, D]; mean over parts."""
    part = zh_d.unflatten(1, (J_S, R)).mean(2)  # [B, 16, D]
    if cosine:
        zh_s, part = F.normalize(zh_s, dim=-1), F.normalize(part, dim=-1)
    logits = zh_s @ part.transpose(1, 2) / tau  # [B, 16, 16]; row i: sparse token i against every part k of the pose
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(J_S, device=zh_s.device).repeat(len(zh_s)))


def global_alignment(p_A: Tensor, a: Tensor) -> Tensor:
    """L_global (Eq. 5): cross-entropy of p_A [B, actions] and labels a [B]; unknown actions (-1) do not count."""
    known = (a >= 0).sum().clamp_min(1)
    return F.cross_entropy(p_A, a, ignore_index=-1, reduction="sum") / known


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2: Hierarchical AutoRegressive Modelling (section 4.2, Alg. 1 and 3)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP, each with a residual. Serves HiARM and the lifter."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, dropout: float = 0.0, drop_path: float = 0.0,
                 eps: float = 1e-5):
        super().__init__()
        self.heads, self.p, self.drop_path = heads, dropout, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: list[Tensor] | None = None) -> Tensor:
        """x [B, T, W]; mask [T, T] bool, True = may look. `cache` holds the keys and values of earlier tokens, and grows."""
        x = x + self._drop(self.proj(self._attend(self.norm1(x), mask, cache)))
        return x + self._drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _attend(self, x: Tensor, mask: Tensor | None, cache: list[Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, W / heads]
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def _drop(self, x: Tensor) -> Tensor:
        if self.p:
            x = F.dropout(x, self.p, self.training)
        if self.drop_path and self.training:  # the whole residual branch of a sample
            x = x * (torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path) / (1 - self.drop_path)
        return x


class HiARM(nn.Module):
    """Pose-aware generative transformer: P(q_d, q_s | x_s), part by part, sparse token before its dense ones (Eq. 7, 8).

    x_s [B, 17, 2] is in the model frame; conf [B, 17] marks missing joints by 0 (None: all seen, the paper's form).
    C_s and C_d are frozen copies of MSST's codebooks (`set_codebooks`).

    Two switches go beyond the paper. condition="every": one SOS token is a narrow door for the whole pose, so an MLP of
    x_s also adds to every position. soft=True: each step hands on the *expected* embedding, softmax(logits) @ C, instead
    of the most probable code; being differentiable, it can also be trained through (`HiPART.loss`, on_rollout).
    """

    def __init__(self, config: Config):
        super().__init__()
        c, W = config, config.width
        self.config = c
        self.register_buffer("C_s", torch.randn(c.K_s, c.D))
        self.register_buffer("C_d", torch.randn(c.K_d, c.D))
        self.P_c = nn.Linear(J * 2, W)  # SOS
        self.missing = nn.Linear(J, W, bias=False)  # column j: the learned token that stands in for joint j
        if c.condition == "every":
            self.P_e = nn.Sequential(nn.Linear(J * 3, 4 * W), nn.GELU(), nn.Linear(4 * W, 4 * W), nn.GELU(),
                                     nn.Linear(4 * W, J_S * W))
        self.in_s, self.in_d = nn.Linear(c.D, W), nn.Linear(c.D, W)
        self.part = nn.Parameter(0.02 * torch.randn(J_S, W))  # the 16 positions of GCSAB
        self.slot_l = nn.Parameter(0.02 * torch.randn(1 + R, W))  # the 1 + r slots of a part in LSAB
        self.slot_p = nn.Parameter(0.02 * torch.randn(1 + R, W))  # and in PH
        self.LSAB, self.GCSAB, self.PH = (
            nn.ModuleList([Block(W, c.heads, c.mlp_ratio, c.dropout) for _ in range(n)])
            for n in (c.lsab_blocks, c.gcsab_blocks, c.ph_blocks))
        self.norm_h, self.norm_p = nn.LayerNorm(W), nn.LayerNorm(W)
        self.head_s, self.head_d = nn.Linear(W, c.K_s), nn.Linear(W, c.K_d)
        # In PH the sparse slot sees only itself; the dense slots see it and one another (Eq. 11).
        see = torch.ones(1 + R, 1 + R, dtype=torch.bool)
        see[0, 1:] = False
        self.register_buffer("mask_p", see, persistent=False)
        self.register_buffer("mask_h", torch.ones(J_S, J_S, dtype=torch.bool).tril(), persistent=False)

    def set_codebooks(self, msst: MSST) -> None:
        self.C_s.copy_(msst.Q_s.codebook)
        self.C_d.copy_(msst.Q_d.codebook)

    def _conditions(self, x_s: Tensor, conf: Tensor | None) -> tuple[Tensor, Tensor]:
        """g^0 = P_c(x_s) [B, W], a projection of the whole sparse pose where a missing joint adds its learned token, and
        what is added to each position [B or 1, 16, W]: the position's embedding, and x_s again if condition="every"."""
        seen = torch.ones_like(x_s[..., 0]) if conf is None else (conf > 0).to(x_s)
        x = hide_missing(x_s, seen).flatten(1)
        g_0, position = self.P_c(x) + self.missing(1 - seen), self.part[None]
        if self.config.condition == "every":
            position = position + self.P_e(torch.cat([x, seen], 1)).unflatten(1, (J_S, -1))
        return g_0, position

    def _local(self, zh_s: Tensor, zh_d: Tensor) -> Tensor:
        """g^i = mean(LSAB(zh_s^i, zh_d^(i,1..r))) for n parts at once (Eq. 9): [B, n, D], [B, n, r, D] -> [B, n, W]."""
        x = torch.cat([self.in_s(zh_s)[:, :, None], self.in_d(zh_d)], 2) + self.slot_l  # [B, n, 1 + r, W]
        x = x.flatten(0, 1)
        for block in self.LSAB:
            x = block(x)
        return x.mean(1).unflatten(0, zh_s.shape[:2])

    def forward(self, x_s: Tensor, q_s: Tensor, q_d: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits: logits_s [B, 16, K_s] and logits_d [B, 48, K_d]; part i sees only parts before it."""
        zh_s, zh_d = self.C_s[q_s], self.C_d[q_d].unflatten(1, (J_S, R))  # [B, 16, D], [B, 16, r, D]
        g_0, position = self._conditions(x_s, conf)
        g = self._local(zh_s[:, :-1], zh_d[:, :-1])  # g^1 .. g^15; the last pair predicts nothing
        h = torch.cat([g_0[:, None], g], 1) + position  # [B, 16, W]
        for block in self.GCSAB:  # Eq. 10
            h = block(h, self.mask_h)
        h = self.norm_h(h)
        p = torch.cat([h[:, :, None], self.in_s(zh_s)[:, :, None].expand(-1, -1, R, -1)], 2) + self.slot_p
        p = p.flatten(0, 1)  # [B * 16, 1 + r, W]: position i predicts pair i + 1 of the paper, part i here
        for block in self.PH:  # Eq. 11
            p = block(p, self.mask_p)
        p = self.norm_p(p).unflatten(0, h.shape[:2])
        return self.head_s(p[:, :, 0]), self.head_d(p[:, :, 1:]).flatten(1, 2)

    def rollout(self, x_s: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Generation, part after part (Alg. 1), in 16 steps that keep keys and values.

        Returns logits_s [B, 16, K_s], logits_d [B, 48, K_d] and the embeddings zh_s [B, 16, D], zh_d [B, 48, D] that each
        step handed on: the most probable code, or the expected one if config.soft.
        """

        def pick(logits: Tensor, C: Tensor) -> Tensor:
            return logits.softmax(-1) @ C if self.config.soft else C[logits.argmax(-1)]

        caches: list[list[Tensor]] = [[] for _ in self.GCSAB]
        g_0, position = self._conditions(x_s, conf)
        g, steps = g_0[:, None], []
        for i in range(J_S):
            h = g + position[:, i : i + 1]  # [B, 1, W]
            for block, cache in zip(self.GCSAB, caches, strict=True):
                h = block(h, cache=cache)
            slots: list[list[Tensor]] = [[] for _ in self.PH]
            logits_s = self.head_s(self._predict(self.norm_h(h) + self.slot_p[:1], slots))  # [B, 1, K_s]
            zh_s = pick(logits_s, self.C_s)
            logits_d = self.head_d(self._predict(self.in_s(zh_s) + self.slot_p[1:], slots))  # [B, r, K_d]
            zh_d = pick(logits_d, self.C_d)
            g = self._local(zh_s, zh_d[:, None])
            steps.append((logits_s, logits_d, zh_s, zh_d))
        logits_s, logits_d, zh_s, zh_d = (torch.cat(t, 1) for t in zip(*steps, strict=True))
        return logits_s, logits_d, zh_s, zh_d

    def _predict(self, p: Tensor, slots: list[list[Tensor]]) -> Tensor:
        for block, cache in zip(self.PH, slots, strict=True):
            p = block(p, cache=cache)
        return self.norm_p(p)

    @torch.no_grad()
    def generate(self, x_s: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The most probable token at every step: q_s [B, 16], q_d [B, 48] int64. (If config.soft, `HiPART.densify` decodes
        the expected embeddings instead, so its pose is not exactly that of these tokens.)"""
        logits_s, logits_d, _, _ = self.rollout(x_s, conf)
        return logits_s.argmax(-1), logits_d.argmax(-1)


def token_loss(logits_s: Tensor, logits_d: Tensor, q_s: Tensor, q_d: Tensor, lambda_d: float) -> Tensor:
    """L_2 = CE(q_s, p_s) + lambda_d CE(q_d, p_d) (Eq. 12), means over tokens."""
    return (F.cross_entropy(logits_s.flatten(0, 1), q_s.flatten())
            + lambda_d * F.cross_entropy(logits_d.flatten(0, 1), q_d.flatten()))


class HiPART(nn.Module):
    """Stages 1 and 2 together: a sparse 2D pose in, dense and fine 2D poses out."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.msst, self.hiarm = MSST(config), HiARM(config)

    def loss(self, x_s: Tensor, conf: Tensor | None, x_d: Tensor, x_f: Tensor, q_s: Tensor, q_d: Tensor,
             on_rollout: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """L_2 (Eq. 12), teacher-forced, and token accuracies; all poses in the model frame.

        on_rollout: the same loss on generation itself, so that the model learns to live with its own history, plus
        lambda_p times the error of the poses that the frozen tokenizer decodes from it (config.soft makes that
        differentiable).
        """
        if on_rollout:
            logits_s, logits_d, zh_s, zh_d = self.hiarm.rollout(x_s, conf)
            y_d, y_f = self.msst.decode_embeddings(zh_s, zh_d)
            error = (y_d - x_d).norm(dim=-1).mean() + (y_f - x_f).norm(dim=-1).mean()
        else:
            logits_s, logits_d = self.hiarm(x_s, q_s, q_d, conf)
            error = 0.0
        loss = token_loss(logits_s, logits_d, q_s, q_d, self.config.lambda_d) + self.config.lambda_p * error
        return loss, dict(acc_s=(logits_s.argmax(-1) == q_s).float().mean().detach(),
                          acc_d=(logits_d.argmax(-1) == q_d).float().mean().detach())

    @torch.no_grad()
    def densify(self, x_s: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_s [B, 17, 2] and conf [B, 17] (0 = missing; None = all seen) -> x_d [B, 48, 2], x_f [B, 96, 2] (Alg. 1), all
        in normalised image coordinates. Call `eval()` first: in training mode HiARM's dropout is at work."""
        pelvis = detected_pelvis(x_s, conf)
        _, _, zh_s, zh_d = self.hiarm.rollout(to_model_frame(x_s, pelvis), conf)
        x_d, x_f = self.msst.decode_embeddings(zh_s, zh_d)
        return from_model_frame(x_d, pelvis), from_model_frame(x_f, pelvis)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 3: lifting (Fig. 11)


def lifting_features(x: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """What a lifter sees of x [B, 17 or 161, 2] (normalised image coordinates), as offsets down the hierarchy:

    sparse [B, 17, 2]: the pelvis' place in the image, then every joint minus the pelvis;
    dense [B, 48, 6]: its part's mean minus the pelvis, that mean minus the part's sparse joint, the point minus that mean;
    fine [B, 96, 2]: the point minus its dense parent; and seen [B, 17], 0 where a joint is missing. Raw coordinates train
    far worse: the networks would spend their budget on finding these differences.
    """
    if x.shape[1:] not in ((J, 2), (J + J_D + J_F, 2)):
        raise ValueError(f"a lifter takes [B, 17, 2] or [B, 161, 2] (17 + 48 + 96 points), found {list(x.shape)}")
    x_s, seen = x[:, :J], torch.ones_like(x[:, :J, 0]) if conf is None else (conf > 0).to(x)
    pelvis = detected_pelvis(x_s, conf)
    sparse = torch.cat([pelvis, hide_missing(x_s - pelvis, seen)[:, 1:]], 1)
    if x.shape[1] == J:
        return sparse, None, None, seen
    x_d, x_f = x[:, J : J + J_D], x[:, J + J_D :]
    mean = x_d.unflatten(1, (J_S, R)).mean(2)  # [B, 16, 2]
    own = list(PART_JOINT)
    gap = hide_missing(mean - x_s[:, own], seen[:, own])
    mean, gap = mean.repeat_interleave(R, 1), gap.repeat_interleave(R, 1)  # [B, 48, 2]
    dense = torch.cat([mean - pelvis, gap, x_d - mean], -1)
    return sparse, dense, x_f - x_d.repeat_interleave(2, 1), seen


class Lifter(nn.Module):
    """What both lifters share: features and targets standardised with the statistics of the training set."""

    def __init__(self, n_points: int, auxiliary: bool):
        super().__init__()
        self.n_points, self.auxiliary = n_points, auxiliary
        for name, shape in (("sparse", (J, 2)), ("dense", (J_D, 6)), ("fine", (J_F, 2)), ("y", (J, 3))):
            self.register_buffer(f"mean_{name}", torch.zeros(shape))
            self.register_buffer(f"std_{name}", torch.ones(shape))

    @torch.no_grad()
    def standardize(self, x: Tensor, y: Tensor, conf: Tensor | None = None) -> None:
        """Take means and standard deviations from training samples x [N, J, 2], y [N, 17, 3] mm. `x` may hold all 161
        points for a lifter of 17: its auxiliary targets are standardised with them."""
        sparse, dense, fine, _ = lifting_features(x, conf)
        for name, t in (("sparse", sparse), ("dense", dense), ("fine", fine), ("y", y)):
            if t is not None:
                getattr(self, f"mean_{name}").copy_(t.mean(0))
                getattr(self, f"std_{name}").copy_(t.std(0, correction=0).clamp_min(1e-6))
        self.std_y.fill_(float(y.std(correction=0)))  # one scale for all joints: MPJPE weighs millimetres alike

    def features(self, x: Tensor, conf: Tensor | None) -> list[Tensor | None]:
        if x.shape[1] != self.n_points:
            raise ValueError(f"this lifter was made for {self.n_points} points, found x {list(x.shape)}")
        *levels, seen = lifting_features(x, conf)
        return [None if t is None else (t - getattr(self, f"mean_{n}")) / getattr(self, f"std_{n}")
                for n, t in zip(("sparse", "dense", "fine"), levels, strict=True)] + [seen]


class SpatialLifter(Lifter):
    """The vanilla spatial transformer of PoseFormer and MixSTE (Fig. 11): points [B, J, 2] -> joints [B, 17, 3] in mm.

    J is 17 or 161; the head reads the first 17 tokens. 900,003 parameters with 17 points (the paper's 0.9M), and one
    learned token of 96 numbers for a missing joint. x in normalised image coordinates; y relative to the pelvis.
    """

    def __init__(self, n_points: int = J + J_D + J_F, width: int = 96, blocks: int = 12, heads: int = 6,
                 auxiliary: bool = False):
        super().__init__(n_points, auxiliary)
        self.embed_s = nn.Linear(2, width)
        if n_points > J:
            self.embed_d, self.embed_f = nn.Linear(6, width), nn.Linear(2, width)
        self.missing = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(n_points, width))
        rates = torch.linspace(0, 0.1, blocks).tolist()
        self.blocks = nn.ModuleList([Block(width, heads, 2, drop_path=p, eps=1e-6) for p in rates])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))
        if auxiliary:
            self.aux_head = nn.Linear(J * width, J_D * 6 + J_F * 2)

    def forward(self, x: Tensor, conf: Tensor | None = None, with_auxiliary: bool = False):
        sparse, dense, fine, seen = self.features(x, conf)
        tokens = torch.where(seen[..., None] > 0, self.embed_s(sparse), self.missing)  # [B, 17, W]
        if dense is not None:
            tokens = torch.cat([tokens, self.embed_d(dense), self.embed_f(fine)], 1)  # [B, 161, W]
        tokens = tokens + self.position
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens[:, :J])
        y = self.head(tokens) * self.std_y + self.mean_y
        return (y, self.aux_head(tokens.flatten(1))) if with_auxiliary else y


class ResidualMLP(nn.Module):
    """After Martinez et al. 2017: linear, then residual blocks of two (linear, SiLU), then linear. Without their batch norm
    and dropout: both are noise on a coordinate, and on fresh detections in every epoch they only cost accuracy. SiLU
    instead of ReLU: what perspective does is smooth (README)."""

    def __init__(self, n_in: int, n_out: int, width: int, blocks: int):
        super().__init__()

        def layer(n: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(n, width), nn.SiLU())

        self.first = layer(n_in)
        self.blocks = nn.ModuleList([nn.Sequential(layer(width), layer(width)) for _ in range(blocks)])
        self.last = nn.Linear(width, n_out)

    def forward(self, x: Tensor, with_hidden: bool = False):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return (self.last(x), x) if with_hidden else self.last(x)


class MLPLifter(Lifter):
    """The field's simple baseline, after Martinez et al. 2017, for machines without a GPU. Interface of SpatialLifter."""

    def __init__(self, n_points: int = J + J_D + J_F, width: int = 1024, blocks: int = 2, auxiliary: bool = False):
        super().__init__(n_points, auxiliary)
        n_in = J * 3 + (J_D * 6 + J_F * 2 if n_points > J else 0)
        self.mlp = ResidualMLP(n_in, J * 3, width, blocks)
        if auxiliary:
            self.aux_head = nn.Linear(width, J_D * 6 + J_F * 2)

    def forward(self, x: Tensor, conf: Tensor | None = None, with_auxiliary: bool = False):
        sparse, dense, fine, seen = self.features(x, conf)
        flat = [(sparse * seen[..., None]).flatten(1), seen]  # a missing joint is its training mean, and flagged
        if dense is not None:
            flat += [dense.flatten(1), fine.flatten(1)]
        y, hidden = self.mlp(torch.cat(flat, 1), with_hidden=True)
        y = y.unflatten(1, (J, 3)) * self.std_y + self.mean_y
        return (y, self.aux_head(hidden)) if with_auxiliary else y


class Regressor(nn.Module):
    """The plain rival of tokens: an MLP from the sparse pose straight to dense and fine points, in one step.

    Same interface as `HiPART.densify`; trained on the mean distance, so it learns where a point most likely is.
    """

    def __init__(self, width: int = 1024, blocks: int = 3):
        super().__init__()
        self.mlp = ResidualMLP(J * 3, (J_D + J_F) * 2, width, blocks)

    def forward(self, x_s: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Model frame: x_s [B, 17, 2] -> x_d [B, 48, 2], x_f [B, 96, 2]."""
        seen = torch.ones_like(x_s[..., 0]) if conf is None else (conf > 0).to(x_s)
        out = self.mlp(torch.cat([hide_missing(x_s, seen).flatten(1), seen], 1)).unflatten(1, (J_D + J_F, 2))
        return out[:, :J_D], out[:, J_D:]

    @torch.no_grad()
    def densify(self, x_s: Tensor, conf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised image coordinates: x_s [B, 17, 2] -> x_d [B, 48, 2], x_f [B, 96, 2]."""
        pelvis = detected_pelvis(x_s, conf)
        x_d, x_f = self(to_model_frame(x_s, pelvis), conf)
        return from_model_frame(x_d, pelvis), from_model_frame(x_f, pelvis)
