"""A decoder-only transformer.

Shapes: B sequences, T tokens, D width, H query heads, K key/value heads, E = D / H width of a head, F width of the MLP,
V vocabulary. Weights are (out, in).

Initialisation: hidden matrices and head normal with standard deviation 1/√fan_in, the two matrices that write into
the residual stream divided by √(2 · layers) besides; embedding normal with standard deviation 1, so that the first
norm sees unit variance; norms one. A tied head shares the embedding and divides the logits by √D, which gives them
the variance of the untied head (save for the token that was just read, which meets its own embedding).
Under muP head, logits and attention scores are scaled besides: `parametrization` has the table.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import ModelConfig


class Transformer(nn.Module):
    """Pre-norm blocks of causal self-attention and MLP; token ids (B, T) to logits (B, T, V)."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parametrization = config.parametrization
        self.logit_divisor = config.parametrization.logit_divisor(config.width)
        self.embedding = nn.Embedding(config.known_vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = Norm(config.width, config.norm)
        self.head = None if config.tied_head else nn.Linear(config.width, config.known_vocab_size, bias=False)
        cosine, sine = rotary_table(config.sequence_length, config.head_width, config.rope_base)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # (B, T, D)
        length = tokens.shape[1]
        rotation = self.cosine[:length], self.sine[:length]
        for block in self.blocks:
            x = block(x, rotation)
        x = self.final_norm(x)
        if self.head is None:
            return F.linear(x, self.embedding.weight) / (self.logit_divisor * math.sqrt(x.shape[-1]))
        return cast(Tensor, self.head(x if self.logit_divisor == 1.0 else x / self.logit_divisor))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set all weights from `seed` alone, on a generator of its own."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                values = torch.empty(weight.shape).normal_(
                    0.0, self._standard_deviation(name, weight), generator=generator
                )
                weight.copy_(values)

    def _standard_deviation(self, name: str, weight: Tensor) -> float:
        if name == "embedding.weight":
            return 1.0
        if name == "head.weight":
            return self.parametrization.head_deviation_factor(weight.shape[1]) / math.sqrt(weight.shape[1])
        writes_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        depth = 2 * len(self.blocks) if writes_residual else 1
        return 1.0 / math.sqrt(weight.shape[1] * depth)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config.width, config.norm)
        self.mlp = GatedMLP(config) if config.activation == "swiglu" else MLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return cast(Tensor, x + self.mlp(self.mlp_norm(x)))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, optionally normalised queries and keys, and grouped key/value
    heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        kv_width = config.kv_heads * config.head_width
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.query_norm = Norm(config.head_width, config.norm) if config.qk_norm else nn.Identity()
        self.key_norm = Norm(config.head_width, config.norm) if config.qk_norm else nn.Identity()
        self.grouped = config.kv_heads != config.heads
        self.scale = config.parametrization.attention_scale(config.head_width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query = rotate(self.query_norm(self._heads(self.query(x))), rotation)  # (B, H, T, E)
        key = rotate(self.key_norm(self._heads(self.key(x))), rotation)  # (B, K, T, E)
        value = self._heads(self.value(x))  # (B, K, T, E)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=self.grouped
        )
        return cast(Tensor, self.output(mixed.transpose(1, 2).flatten(2)))  # (B, T, D)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_width).transpose(1, 2)


class MLP(nn.Module):
    """down(f(up(x))) with f the squared ReLU or GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)
        self.squared_relu = config.activation == "relu2"

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = F.relu(hidden).square() if self.squared_relu else F.gelu(hidden)
        return cast(Tensor, self.down(hidden))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.silu(self.gate(x)) * self.up(x)))


class Norm(nn.Module):
    """RMSNorm, or LayerNorm without bias (faster on a CPU, where it has a fused kernel); in float32 at least."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.centred = kind == "layernorm"

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return F.layer_norm(x, self.weight.shape, self.weight)
        at_least_float32 = torch.promote_types(x.dtype, torch.float32)  # as CUDA's autocast does by itself
        return F.rms_norm(x.to(at_least_float32), self.weight.shape, self.weight, eps=1e-6)


def rotary_table(length: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, (T, E / 2) each, of position × base^(−2i/E). Source: arXiv 2104.09864, section
    3.2.2.
    """
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + E/2) of each head, (…, T, E), by their positions; the paper pairs neighbours, which is
    the same up to the order of the channels.
    """
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1).to(x.dtype)
