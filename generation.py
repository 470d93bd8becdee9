"""Free-running generation as `HiPART.densify` runs it: the steps of `HiARM.rollout`, made fast.

hipart.py is written to be read beside the paper. To generate a single pose takes thousands of
operations on a few numbers each, and most of the time goes into what is around them. Here are the
same 16 steps with less of that, in about half of the time for a single pose; the tests compare the
two. Layers become functions that have their weights at hand. Tokens are rows, so that a linear
layer is one `addmm`: [B T, W] are T tokens of B sequences. There is neither dropout nor a gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def lean_mode() -> Iterator[None]:
    """Without gradients, and without oneDNN: on a CPU its GELU takes 5 to 15 us to begin with."""
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def poses_at_once(c, memory: int, history: bool = True) -> int:
    """How many poses a model of the `hipart.Config` c makes at once in `memory` MB. Counted are the
    floats of a pose, generously: the allocator needs room, too (benchmarks/memory.py). Where a part
    is not a single step, or there is no history, four times as many tokens are kept, or are made at
    once."""
    tokens = 1 if history and c.generation in ("both", "sparse-to-dense") else 4
    keys_and_values, hidden = 48 * c.width * (c.gcsab_blocks + 2), 12 * c.width * c.mlp_ratio
    keys_and_values, logits = tokens * keys_and_values, tokens * 24 * c.K_d
    decoders = c.decoder_width * (6 * 96 + 2 * c.token_hidden) + 48 * 14 * c.D
    return max(1, memory * 2**18 // (keys_and_values + hidden + logits + decoders))


def linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight.t(), layer.bias[None]  # one row: this takes PyTorch 1 us less
    return lambda x: torch.addmm(bias, x, weight)


def added(layer: nn.Linear) -> Callable[[Tensor, Tensor], Tensor]:
    """x, y -> x + layer(y)."""
    weight, bias = layer.weight.t(), layer.bias[None]
    return lambda x, y: torch.addmm(x + bias, y, weight)


def norm(layer: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    settings = layer.normalized_shape, layer.weight, layer.bias, layer.eps
    return lambda x: torch.layer_norm(x, *settings)


class LeanBlock:
    """A `hipart.Block`."""

    def __init__(self, block: nn.Module):
        self.heads, self.qkv, self.proj = block.heads, linear(block.qkv), added(block.proj)
        self.norm1, self.norm2 = norm(block.norm1), norm(block.norm2)
        self.mlp_1, self.mlp_2 = linear(block.mlp[0]), added(block.mlp[2])

    def __call__(self, x: Tensor, T: int, past: list[Tensor] | None = None) -> Tensor:
        """x [B T, W] -> [B T, W]. `past` holds queries, keys and values of earlier tokens; x looks
        at them, too, and those of x are added."""
        n, W = x.shape
        qkv = self.qkv(self.norm1(x)).view(n // T, T, 3, self.heads, W // self.heads)
        if past:
            qkv = torch.cat((past.pop(), qkv), 1)
        if past is not None:
            past.append(qkv)
        if qkv.shape[1] == 1:  # a token that is alone sees itself: its value
            y = qkv[:, 0, 2].reshape(n, W)
        else:
            q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, heads, past and T, W / heads]
            y = F.scaled_dot_product_attention(q.narrow(2, -T, T), k, v)
            y = y.transpose(1, 2).reshape(n, W)
        x = self.proj(x, y)
        return self.mlp_2(x, F.gelu(self.mlp_1(self.norm2(x))))


def generate(hiarm: nn.Module, x_s: Tensor, conf: Tensor | None, pick: Callable | None = None
             ) -> tuple[Tensor, Tensor]:
    """The embeddings zh_s [B, 16, D] and zh_d [B, 48, D] of `HiARM.rollout`, from x_s [B, 17, 2] in
    the model frame and conf [B, 17] or None. `pick` may stand in for `HiARM.pick`; it gets logits
    [B, K_s] and [B R, K_d] in turns. Call it in `lean_mode`."""
    pick = pick or hiarm.pick
    LSAB, GCSAB, PH = ([LeanBlock(block) for block in blocks]
                       for blocks in (hiarm.LSAB, hiarm.GCSAB, hiarm.PH))
    norm_h, norm_p = norm(hiarm.norm_h), norm(hiarm.norm_p)
    in_s, in_d = linear(hiarm.in_s), linear(hiarm.in_d)
    head_s, head_d = linear(hiarm.head_s), linear(hiarm.head_d)
    slot_l, slot_s, slot_d = hiarm.slot_l, hiarm.slot_p[:1], hiarm.slot_p[1:]
    (R, W), C_s, C_d, made_s, made_d = slot_d.shape, hiarm.C_s, hiarm.C_d, [], []
    past = [[] for _ in GCSAB]  # of all parts so far
    g_0, position = hiarm.begin(x_s, conf)
    g = g_0[:, 0]
    for position_i in position.unbind(1):
        h = g + position_i  # [B, W]
        for block, tokens in zip(GCSAB, past, strict=True):  # Eq. 10
            h = block(h, 1, tokens)
        slots, here = norm_h(h) + slot_s, [[] for _ in PH]
        for block, tokens in zip(PH, here, strict=True):  # Eq. 11, the sparse slot [B, W]
            slots = block(slots, 1, tokens)
        zh_s = pick(head_s(norm_p(slots)), C_s)  # [B, D]
        e_s = in_s(zh_s)[:, None]  # [B, 1, W]
        slots = (e_s + slot_d).view(-1, W)
        for block, tokens in zip(PH, here, strict=True):  # Eq. 11, the dense slots [B R, W]
            slots = block(slots, R, tokens)
        zh_d = pick(head_d(norm_p(slots)), C_d)  # [B R, D]
        made_s.append(zh_s)
        made_d.append(zh_d.view(len(x_s), R, -1))
        if len(made_s) == position.shape[1]:
            break  # nothing follows the last part
        x = (torch.cat([e_s, in_d(zh_d).view(-1, R, W)], 1) + slot_l).view(-1, W)
        for block in LSAB:  # Eq. 9, [B (1 + R), W]
            x = block(x, 1 + R)
        g = x.view(-1, 1 + R, W).mean(1)
    return torch.stack(made_s, 1), torch.cat(made_d, 1)
