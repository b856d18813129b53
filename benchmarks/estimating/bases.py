"""Bases: what a plain byte-level transformer may start from, one detail or one habit changed at a time. Running it does nothing.

The trial that the goals come from says: 3 layers of width 64 with 4 heads, 64 bytes, about 0.19 million parameters of which 0.147 in the
blocks, AdamW(.9, .95) with decay .1, 1600 steps of 16 sequences at 3e-3, the standard library as text. It does not say what the initial
weights, biases, norms, activation, positions and warm-up are, whether gradients are clipped and whether the text includes the library's
tests. The count of parameters leaves no room for an embedding tied to the head (0.17) or for positions that are not learned (0.18).

Every name says all of what differs from ours, which is torch's own initial weights of Linear, embeddings and positions from a normal of
.02, LayerNorm before each part and at the end, biases, GELU, decay on everything, the whole library.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from estimating.lab import LENGTH, Base
from stepwell.train.transformer import Block, byte_transformer

LAYERS = 3
Change = Callable[[nn.Module], None]


class Rectified(Block):
    """A block with ReLU in the place of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, length, width)` for the same."""
        x = x + attention(self, self.norm1(x))
        added: Tensor = self.down(functional.relu(self.up(self.norm2(x))))
        return x + added


class PostNorm(Block):
    """A block that norms what it has added up, as the first transformers did."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, length, width)` for the same."""
        x = self.norm1(x + attention(self, x))
        y: Tensor = self.norm2(x + self.down(functional.gelu(self.up(x))))
        return y


def attention(block: Block, x: Tensor) -> Tensor:
    """Return what a block's attention adds."""
    query, key, value = block.qkv(x).view(*x.shape[:2], 3, block.heads, -1).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    added: Tensor = block.out(mixed.transpose(1, 2).reshape(x.shape))
    return added


def changed(*changes: Change) -> Callable[[int], nn.Module]:
    """Return a builder of our network that changes it before training."""

    def build(seed: int) -> nn.Module:
        model = byte_transformer(length=LENGTH, seed=seed, layers=LAYERS)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed + 1)
            for change in changes:
                change(model)
        return model

    return build


def normal(model: nn.Module, *, spread: float = 0.02, residual: bool = False) -> None:
    """Draw Linear weights from a normal, biases zero, as GPT-2 does; on request less where a residual is written."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            less = (2 * LAYERS) ** 0.5 if residual and name.endswith(("out", "down")) else 1
            nn.init.normal_(layer.weight, std=spread / less)
    zero_biases(model)


def fan_in(model: nn.Module) -> None:
    """Draw Linear weights from a normal of variance 1 / inputs, biases zero."""
    for layer in linears(model):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    zero_biases(model)


def xavier(model: nn.Module, *, only: str = "", fill: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_) -> None:
    """Draw Linear weights by Glorot's rule, biases zero; on request those of one kind alone."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(only):
            fill(layer.weight)
            nn.init.zeros_(layer.bias)


def xavier_matrices(model: nn.Module) -> None:
    """Draw every matrix by Glorot's rule, embeddings and positions as well, and leave the rest."""
    for one in model.parameters():
        if one.dim() > 1:
            nn.init.xavier_uniform_(one)


def packed_attention(model: nn.Module) -> None:
    """Start the attention as torch's own MultiheadAttention: packed projection by Glorot's rule, its biases and those after it zero."""
    xavier(model, only="qkv")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith("out"):
            nn.init.zeros_(layer.bias)


def zero_biases(model: nn.Module) -> None:
    """Start all biases of Linear layers at zero."""
    for layer in linears(model):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def wide_embedding(model: nn.Module) -> None:
    """Draw embeddings and positions from the unit normal, as torch does."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight)


def wide_bytes(model: nn.Module, *, positions: float) -> None:
    """Draw embeddings from the unit normal, as torch does, and positions, as a parameter, from one of another spread."""
    nn.init.normal_(model.embed.weight)
    nn.init.normal_(model.position.weight, std=positions)


def sinusoids(model: nn.Module) -> None:
    """Hold positions at sines and cosines of frequencies from 1 down to 1e-4; embeddings are unit normal."""
    table = model.position.weight
    length, width = table.shape
    angles = torch.arange(length)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    nn.init.normal_(model.embed.weight)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    table.requires_grad_(False)


def bare(model: nn.Module, *, only: str = "") -> None:
    """Take the biases away; on request those of one kind alone."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(only):
            layer.bias = None


def rms_norm(model: nn.Module) -> None:
    """Put RMSNorm in the place of LayerNorm."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.LayerNorm):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.RMSNorm(layer.normalized_shape[0]))


def no_last_norm(model: nn.Module) -> None:
    """Leave the norm before the head out."""
    model.norm = nn.Identity()


def blocks_of(kind: type[Block], model: nn.Module) -> None:
    """Put blocks of another kind, with the same weights, in the place of ours."""
    for place, old in enumerate(model.blocks):
        model.blocks[place] = kind(old.out.in_features, old.heads)
        model.blocks[place].load_state_dict(old.state_dict())


def linears(model: nn.Module) -> list[nn.Linear]:
    """Return all Linear layers."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def matrices_decay(model: nn.Module, rate: float) -> Optimizer:
    """Return AdamW that decays matrices alone."""
    groups = [
        {"params": [one for one in model.parameters() if (one.dim() > 1) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    return AdamW(groups, lr=rate, betas=(0.9, 0.95))


def variants() -> dict[str, Base]:
    """Return the bases by name, ours first."""
    gpt2, smaller = partial(normal, spread=0.02), partial(normal, residual=True)
    built: dict[str, tuple[Change, ...]] = {
        "embeddings N(0, 1)": (wide_embedding,),
        "linear N(0, .02)": (gpt2,),
        "linear N(0, .02), residual smaller": (smaller,),
        "linear N(0, 1 over inputs)": (fan_in,),
        "no biases": (bare,),
        "no biases, RMSNorm": (bare, rms_norm),
        "linear N(0, .04), between ours and GPT-2's": (partial(normal, spread=0.04),),
        "linear N(0, .03), between ours and GPT-2's": (partial(normal, spread=0.03),),
        "embeddings N(0, 1), positions N(0, .02)": (partial(wide_bytes, positions=0.02),),
        "embeddings N(0, 1), positions zero": (partial(wide_bytes, positions=0.0),),
        "embeddings N(0, 1), no biases": (wide_embedding, bare),
        "embeddings N(0, 1), positions N(0, .02), no biases": (partial(wide_bytes, positions=0.02), bare),
        "embeddings N(0, 1), no biases, RMSNorm": (wide_embedding, bare, rms_norm),
        "linear N(0, .02), no biases, RMSNorm": (gpt2, bare, rms_norm),
        "linear N(0, .02), no biases": (gpt2, bare),
        "linear xavier uniform, biases zero": (xavier,),
        "all matrices xavier uniform": (xavier_matrices,),
        "embeddings N(0, 1), positions N(0, .02), linear xavier uniform, biases zero": (partial(wide_bytes, positions=0.02), xavier),
        "linear xavier normal, biases zero": (partial(xavier, fill=nn.init.xavier_normal_),),
        "attention as nn.MultiheadAttention": (packed_attention,),
        "embeddings N(0, 1), attention as nn.MultiheadAttention": (wide_embedding, packed_attention),
        "biases zero": (zero_biases,),
        "no biases in qkv": (partial(bare, only="qkv"),),
        "ReLU": (partial(blocks_of, Rectified),),
        "ReLU, attention as nn.MultiheadAttention": (partial(blocks_of, Rectified), packed_attention),
        "ReLU, embeddings N(0, 1), positions N(0, .02)": (partial(blocks_of, Rectified), partial(wide_bytes, positions=0.02)),
        "linear N(0, .02), ReLU, no biases in qkv": (gpt2, partial(blocks_of, Rectified), partial(bare, only="qkv")),
        "norm after, no last norm": (partial(blocks_of, PostNorm), no_last_norm),
        "no last norm": (no_last_norm,),
        "embeddings N(0, 1), sinusoidal positions": (sinusoids,),
    }
    shorter: dict[str, tuple[Change, ...]] = {
        "text without tests, linear N(0, .02)": (gpt2,),
        "text without tests, linear N(0, .02), residual smaller": (smaller,),
        "text without tests, embeddings N(0, 1)": (wide_embedding,),
        "text without tests, embeddings N(0, 1), positions N(0, .02)": (partial(wide_bytes, positions=0.02),),
        "text without tests, embeddings N(0, 1), positions N(0, .02), no biases": (partial(wide_bytes, positions=0.02), bare),
        "text without tests, no biases, RMSNorm": (bare, rms_norm),
    }
    named = [
        Base(),
        Base("text without tests", whole=False),
        *(Base(name, changed(*changes)) for name, changes in built.items()),
        *(Base(name, changed(*changes), whole=False) for name, changes in shorter.items()),
        Base("matrices alone decay", optimizer=matrices_decay),
        Base("warm-up of 100 steps", warmup=100),
        Base("gradients clipped at 1", clip=1.0),
        Base(
            "linear N(0, .02), residual smaller, no biases, matrices alone decay, clipped at 1, warm-up of 100 steps",
            changed(smaller, bare),
            optimizer=matrices_decay,
            warmup=100,
            clip=1.0,
        ),
    ]
    return {base.name: base for base in named}
