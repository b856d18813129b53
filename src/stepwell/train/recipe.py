"""Recipe: everything that settles one training run of a language model, as one frozen record.

Two runs of one recipe on the same tokens are the same run: weights, order of the data, learning rates and draws depend on nothing else.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from stepwell.methods.base import Method
from stepwell.quantizers import Quantizer
from stepwell.schedules import cosine, linear

Builder = Callable[[Quantizer, int, int], Method]  # (grid, steps, loss terms per step) -> method


class Architecture(NamedTuple):
    """A decoder with rotary positions, RMS norms and gated Linear layers, built by transformers.

    Attributes:
        family: "llama", or "olmo2": norms after the layers and on queries and keys.
        width: of the residual stream.
        layers: blocks.
        heads: of the attention; they divide the width.
        hidden: width inside the gated layers.
        vocabulary: rows of the embedding; a tokenizer may have fewer tokens, not more.
        tied: whether the head is the embedding.
    """

    family: Literal["llama", "olmo2"]
    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    tied: bool


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        name: of the run's kind.
        architecture: of the model; where the run starts from a folder, that folder's counts.
        quantizer: the grid that is trained for, or, in full precision, rounded to at the end.
        method: makes the method from the grid, the steps and the loss terms of a step; None trains in full precision.
        steps: optimizer steps.
        rows: sequences per optimizer step, over all processes and micro-batches.
        length: tokens that a sequence predicts; it holds one more.
        micro: sequences that one process runs through the model at once.
        lr: largest learning rate.
        warmup: steps in which it rises from 0.
        decay: how it falls from there to `floor` times its largest value at the last step.
        floor: share of `lr` at the end.
        betas, weight_decay: of AdamW; norms and other vectors do not decay.
        clip: largest norm of the gradient.
        precision: "bf16" runs the model under autocast, with float32 weights; "fp32" does not.
        compile: whether the model goes through `torch.compile`.
        cooldown: whether the run goes on from a finished model, which `--start` names.
        evaluate_every, save_every: steps between two looks at held-out text, between two checkpoints.
        evaluate_rows: held-out sequences to look at, or as many as there are.
        draws: randomized roundings to average over at the end.
        seed: of the initial weights, the order of the data and every draw.
        skip: parameters left in float: the untied head, as in the experiments that the methods were compared on.
    """

    name: str
    architecture: Architecture
    quantizer: Quantizer
    method: Builder | None
    steps: int
    rows: int
    length: int
    micro: int
    lr: float
    warmup: int
    decay: Literal["cosine", "linear"] = "cosine"
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    cooldown: bool = False
    evaluate_every: int = 500
    save_every: int = 500
    evaluate_rows: int = 256
    draws: int = 4
    seed: int = 0
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have.

        Raises:
            ValueError: a count below one, or a rate, share or schedule out of its range.
        """
        for key in ("steps", "rows", "length", "micro", "evaluate_every", "save_every", "evaluate_rows", "draws"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{key}` of a recipe must be a whole number, 1 or more: got {value!r}.")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"`warmup` must be 0 to `steps` ({self.steps}) steps: got {self.warmup!r}.")
        if not (0 < self.lr < 1 and 0 <= self.floor <= 1 and self.clip > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"a recipe needs 0 < `lr` < 1, 0 <= `floor` <= 1, `clip` > 0 and `weight_decay` >= 0: got lr={self.lr!r}, "
                f"floor={self.floor!r}, clip={self.clip!r}, weight_decay={self.weight_decay!r}."
            )

    @property
    def loss_terms(self) -> int:
        """Loss terms that an optimizer step averages, over all processes and micro-batches."""
        return self.rows * self.length

    def made_method(self) -> Method | None:
        """Return the method of a run, or None in full precision."""
        return None if self.method is None else self.method(self.quantizer, self.steps, self.loss_terms)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the optimizer step that `step` steps were done before."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        fall = cosine if self.decay == "cosine" else linear
        return fall(self.lr, self.floor * self.lr, steps=max(1, self.steps - self.warmup), begin=self.warmup)(step)

    def described(self) -> dict[str, Any]:
        """Return the recipe as names and plain values, for files and comparisons."""
        method = self.made_method()
        plain = {key: value for key, value in asdict(self).items() if key not in ("method", "quantizer", "architecture")}
        plain |= {"betas": list(self.betas), "skip": list(self.skip)}
        return plain | {
            "method": "full precision" if method is None else method.name,
            "quantizer": str(self.quantizer),
            "architecture": self.architecture._asdict(),
        }
