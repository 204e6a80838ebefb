"""Vision transformers and other models that read images, written anew in the manner of their reference code."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs
from zoo.spelled import BATCH, DIM, HEAD, HEADS, Register, image

_zoo = Register("image")
SIDE = 4
PATCHES = SIDE * SIDE


def entries() -> list[Entry]:
    return _zoo.entries


def patches() -> Inputs:
    return (torch.randn(BATCH, PATCHES, DIM),), {}


def _offsets(side: int) -> Tensor:
    """Index of the relative position of every pair of cells of a square, [side**2, side**2]."""
    axes = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    relative = (axes[:, :, None] - axes[:, None, :]).permute(1, 2, 0) + side - 1
    return relative[..., 0] * (2 * side - 1) + relative[..., 1]


@_zoo.add(inputs=patches, attention=1, layer_norm=2)
class CosineWindows(nn.Module):
    """Swin v2: cosine scores, a clamped learned scale a head, a bias by a small network, norms after the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(inplace=True), nn.Linear(16, HEADS, bias=False))
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)
        span = torch.arange(1 - SIDE, SIDE) / (SIDE - 1)
        self.register_buffer("table", torch.stack(torch.meshgrid(span, span, indexing="ij"), -1)[None])
        self.register_buffer("index", _offsets(SIDE))

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        table = self.cpb_mlp(self.table).view(-1, HEADS)
        bias = table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = attn + (16 * torch.sigmoid(bias)).unsqueeze(0)
        return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attend(x))
        return x + self.norm2(self.fc2(F.gelu(self.fc1(x))))


@_zoo.add(inputs=patches, attention=1, layer_norm=2)
class ScaledBranches(nn.Module):
    """BEiT: queries scaled first, a table of relative biases, learned scales of the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))
        self.register_buffer("k_bias", torch.zeros(DIM), persistent=False)
        self.table = nn.Parameter(torch.zeros((2 * SIDE - 1) ** 2, HEADS))
        self.register_buffer("index", _offsets(SIDE))
        self.gamma_1, self.gamma_2 = nn.Parameter(0.1 * torch.ones(DIM)), nn.Parameter(0.1 * torch.ones(DIM))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)
        self.scale = HEAD**-0.5

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attend(self.norm1(x))
        return x + self.gamma_2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


@_zoo.add(inputs=patches, attention=1, layer_norm=4, swiglu=1, rope=2)
class RotatedPatches(nn.Module):
    """EVA-02: a rotation by both axes that spares the class token, sub-norms, a gated unit with a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=False)
        self.v_proj, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.norm1, self.norm2, self.inner = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.w1, self.w2, self.w3 = nn.Linear(DIM, 48), nn.Linear(DIM, 48), nn.Linear(48, DIM)
        self.ffn_ln = nn.LayerNorm(48)
        self.cls = nn.Parameter(torch.zeros(1, 1, DIM))
        bands = 100.0 ** -torch.arange(0, 1, 4 / HEAD)
        at = torch.arange(SIDE)[:, None] * bands
        grid = torch.cat((at[:, None].expand(SIDE, SIDE, -1), at[None].expand(SIDE, SIDE, -1)), -1)
        grid = grid.reshape(PATCHES, -1).repeat_interleave(2, -1)
        self.register_buffer("sin", grid.sin(), persistent=False)
        self.register_buffer("cos", grid.cos(), persistent=False)

    def rot(self, x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)

    def turn(self, x: Tensor) -> Tensor:
        rest = x[:, :, 1:, :]
        turned = rest * self.cos + self.rot(rest) * self.sin
        return torch.cat((x[:, :, :1, :], turned), dim=2).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1)
        b, n, c = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).reshape(b, n, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        x = x + self.proj(self.inner(y.transpose(1, 2).reshape(b, n, c)))
        y = self.norm2(x)
        return x + self.w3(self.ffn_ln(F.silu(self.w1(y)) * self.w2(y)))


@_zoo.add(inputs=image, attention=1, layer_norm=1)
class GridAttention(nn.Module):
    """MaxViT: a dilated grid of a channels-last map, heads of a fixed width, a bias that is made once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.bias = nn.Parameter(torch.zeros(HEADS, 4, 4))
        self.scale = HEAD**-0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        y = self.norm(x)
        b, h, w, c = y.shape
        y = y.view(b, 2, h // 2, 2, w // 2, c).permute(0, 2, 4, 1, 3, 5).contiguous().view(-1, 2, 2, c)
        windows, n = y.shape[0], 4
        q, k, v = self.qkv(y).view(windows, n, HEADS, 3 * HEAD).transpose(1, 2).chunk(3, dim=3)
        attn = (q * self.scale) @ k.transpose(-2, -1) + self.bias
        y = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, 2, 2, c)
        y = self.proj(y).view(b, h // 2, w // 2, 2, 2, c).permute(0, 3, 1, 4, 2, 5).contiguous().view(b, h, w, c)
        return (x + y).permute(0, 3, 1, 2)


@_zoo.add(inputs=patches, attention=1, layer_norm=1)
class ClassQueries(nn.Module):
    """CaiT: only the class token asks."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm, self.cls = nn.LayerNorm(DIM), nn.Parameter(torch.zeros(1, 1, DIM))
        self.gamma = nn.Parameter(1e-1 * torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        cls = self.cls.expand(x.shape[0], -1, -1)
        y = self.norm(torch.cat((cls, x), dim=1))
        b, n, c = y.shape
        q = self.q(y[:, 0]).unsqueeze(1).reshape(b, 1, HEADS, c // HEADS).permute(0, 2, 1, 3) * HEAD**-0.5
        k = self.k(y).reshape(b, n, HEADS, c // HEADS).permute(0, 2, 1, 3)
        v = self.v(y).reshape(b, n, HEADS, c // HEADS).permute(0, 2, 1, 3)
        out = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return cls + self.gamma * self.proj(out.transpose(1, 2).reshape(b, 1, c))


@_zoo.add(inputs=patches, attention=1, layer_norm=1)
class AcrossChannels(nn.Module):
    """XCiT: channels attend to channels by their cosine over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.norm, self.qkv, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return x + self.proj((attn @ v).permute(0, 3, 1, 2).reshape(b, n, c))


@_zoo.add(inputs=patches, attention=2, layer_norm=5, swiglu=2)
class SelfDistilled(nn.Module):
    """DINOv2: packed projection, layer scale by a multiplication in place, packed gated unit."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
            self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
            self.w12, self.w3 = nn.Linear(DIM, 96), nn.Linear(48, DIM)
            self.ls1, self.ls2 = nn.Parameter(0.1 * torch.ones(DIM)), nn.Parameter(0.1 * torch.ones(DIM))

        def attn(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0] * HEAD**-0.5, qkv[1], qkv[2]
            attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
            return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))

        def mlp(self, x: Tensor) -> Tensor:
            x1, x2 = self.w12(x).chunk(2, dim=-1)
            return self.w3(F.silu(x1) * x2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.norm1(x)).mul_(self.ls1)
            return x + self.mlp(self.norm2(x)).mul_(self.ls2)

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(self.Block() for _ in range(2)), nn.LayerNorm(DIM, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


@_zoo.add(inputs=image, attention=1, layer_norm=2)
class SegmentAnything(nn.Module):
    """SAM's encoder: channels last, scores with a bias of rows and one of columns that depend on the query."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * SIDE - 1, HEAD))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * SIDE - 1, HEAD))
        self.lin1, self.lin2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)

    def attn(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * HEADS, h * w, -1).unbind(0)
        attn = (q * HEAD**-0.5) @ k.transpose(-2, -1)
        at = torch.arange(h)[:, None] - torch.arange(h)[None, :] + h - 1
        rq = q.reshape(b * HEADS, h, w, HEAD)
        rel_h = torch.einsum("bhwc,hkc->bhwk", rq, self.rel_pos_h[at.long()])
        rel_w = torch.einsum("bhwc,wkc->bhwk", rq, self.rel_pos_w[at.long()])
        attn = (attn.view(-1, h, w, h, w) + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).view(-1, h * w, h * w)
        x = (attn.softmax(dim=-1) @ v).view(b, HEADS, h, w, -1).permute(0, 2, 3, 1, 4).reshape(b, h, w, -1)
        return self.proj(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        return x + self.lin2(F.gelu(self.lin1(self.norm2(x))))


@_zoo.add(inputs=image)
class ChannelsFirstNorm(nn.Module):
    """SAM's neck and ConvNeXt's stem: a norm over the channels of a map, which are not the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, bias=False)
        self.weight, self.bias = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


@_zoo.add(inputs=image, layer_norm=1)
class ConvolutionBlock(nn.Module):
    """ConvNeXt v2: depthwise convolution, a norm over channels, a response norm that is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.LayerNorm(DIM, eps=1e-6)
        self.pw1, self.pw2 = nn.Linear(DIM, 64), nn.Linear(64, DIM)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, 64)), nn.Parameter(torch.zeros(1, 1, 1, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.pw1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        gx = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        y = self.gamma * (y * nx) + self.beta + y
        return x + self.pw2(y).permute(0, 3, 1, 2)


@_zoo.add(inputs=patches, attention=2, layer_norm=5)
class Contrastive(nn.Module):
    """open_clip's text tower: sequence first, torch's attention with a mask of -inf, norms cast to their dtype."""

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            dtype = x.dtype
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(dtype)

    class Block(nn.Module):
        def __init__(self, norm: Callable[[int], nn.Module]) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(DIM, HEADS)
            self.ln_1, self.ln_2 = norm(DIM), norm(DIM)
            self.c_fc, self.c_proj = nn.Linear(DIM, 64), nn.Linear(64, DIM)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask.to(x.dtype))[0]
            y = self.c_fc(self.ln_2(x))
            return x + self.c_proj(y * torch.sigmoid(1.702 * y))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(self.Norm) for _ in range(2))
        self.ln_final = self.Norm(DIM)
        mask = torch.empty(PATCHES, PATCHES).fill_(float("-inf")).triu_(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(1, 0, 2)
        for block in self.blocks:
            x = block(x, self.mask)
        x = self.ln_final(x.permute(1, 0, 2))
        return F.normalize(x[torch.arange(x.shape[0]), -1], dim=-1)


@_zoo.add(inputs=image, layer_norm=1)
class SimpleGates(nn.Module):
    """NAFNet: halves multiplied without an activation, attention over channels by a pooled scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.conv1, self.conv2 = nn.Conv2d(DIM, 2 * DIM, 1), nn.Conv2d(2 * DIM, 2 * DIM, 3, padding=1, groups=2 * DIM)
        self.sca, self.conv3 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(DIM, DIM, 1)), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        a, b = self.conv2(self.conv1(y)).chunk(2, dim=1)
        y = a * b
        return x + self.conv3(y * self.sca(y))


@_zoo.add(inputs=image)
class SqueezedChannels(nn.Module):
    """EfficientNet's gate of a pooled vector, and an inverted bottleneck: nothing of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.reduce, self.widen = nn.Conv2d(DIM, 64, 1), nn.Conv2d(64, 8, 1), nn.Conv2d(8, 64, 1)
        self.project, self.bn = nn.Conv2d(64, DIM, 1), nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.expand(x)))
        pooled = y.mean((2, 3), keepdim=True)
        y = y * self.widen(F.silu(self.reduce(pooled))).sigmoid()
        return x + self.project(y)


@_zoo.add(inputs=patches)
class SeparableAttention(nn.Module):
    """MobileViT v2: a softmax over tokens weighs the keys into one vector; no attention of pairs, no gate of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 1 + 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = torch.split(self.qkv(x), [1, DIM, DIM], dim=-1)
        scores = F.softmax(query, dim=1)
        context = (key * scores).sum(dim=1, keepdim=True)
        return self.out(value.relu() + context.expand_as(value))
