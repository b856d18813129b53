"""Transformer: a small language model over bytes, pre-norm, with learned positions; one file so that every weight is in sight.

Quantized are the four Linear layers of each block (`blocks.*`); embeddings and the head stay in float (`skip=["head"]`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepwell.train.corpus import VALUES

SPREAD = 0.02  # standard deviation of the initial embeddings


class Block(nn.Module):
    """Causal self-attention, then two Linear layers with a GELU between, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, length, width)` for the same."""
        batch, length, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        added: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + added


class ByteTransformer(nn.Module):
    """Blocks between a byte embedding and a Linear head; made by `byte_transformer`."""

    def __init__(self, *, width: int, layers: int, heads: int, length: int) -> None:
        """Make the layers with torch's own initial weights, embeddings narrower."""
        super().__init__()
        self.embed, self.position = nn.Embedding(VALUES, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VALUES)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=SPREAD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `(batch, length, 256)` of the next byte for bytes `(batch, length)`."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def byte_transformer(*, width: int = 64, layers: int = 3, heads: int = 4, length: int = 64, seed: int) -> ByteTransformer:
    """Return a byte-level language model, initialised from `seed` alone; by default with 0.147 million block weights.

    Args:
        width: of the residual stream, a multiple of `heads`.
        layers: blocks.
        heads: of the attention.
        length: most bytes it can read at once.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        ValueError: a width that the heads do not divide.
    """
    if width % heads:
        raise ValueError(f"`heads` must divide `width`: got {heads} for {width}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteTransformer(width=width, layers=layers, heads=heads, length=length)


def byte_losses(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return the cross entropy of each sequence, in nats per byte, `(count,)`.

    Args:
        model: from bytes to logits.
        sequences: `(count, length + 1)`; the first `length` are read, each next one predicted.
    """
    logits: Tensor = model(sequences[:, :-1])
    return functional.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean(1)


def byte_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return the mean of `byte_losses`, 0-dim."""
    return byte_losses(model, sequences).mean()
