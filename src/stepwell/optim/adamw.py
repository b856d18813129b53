"""AdamW: torch's, and for parameters under a method the update, the penalty, the rounded copy and the new weight in one pass over memory.

Without a method it is `torch.optim.AdamW(fused=True)`: the same code, the same bits, the same state. A Run that knows the optimizer hands
it a `Task` per parameter and step instead of working around it; the kernels follow the order of operations of torch's fused AdamW, fused
multiply-adds included. (torch's default implementation differs from the fused one in a few last bits: it takes its square roots from a
vector library that does not always round them correctly.)
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stepwell.optim import engines
from stepwell.optim.engines import Arrays
from stepwell.optim.task import Cache, Task


class AdamW(torch.optim.AdamW):
    """AdamW in one pass. Arguments, state and state dictionaries are those of `torch.optim.AdamW`, which is always fused here.

    On the CPU, float32 parameters under `ste`, `lotion` and `ste + lotion` on symmetric and full integer grids with float32 scales are
    stepped in one pass, in C where a compiler is found (compiled at first use, kept in the user's cache directory), else in numba (extra
    `fast`). Everything else is stepped by torch, with the method's passes around it. The environment variable STEPWELL_KERNEL chooses
    "c", "numba" or "none", or "triton" for the same on a GPU, which nobody has measured yet.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in `torch.optim.AdamW`; parameters under amsgrad are stepped by torch.
        foreach, capturable, differentiable, fused: there for torch's signature; only what a fused step on the CPU can do is accepted.

    Raises:
        ValueError: `foreach`, `capturable` or `differentiable` is true, or `fused` is False.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        for name, value, wrong in (
            ("foreach", foreach, True), ("capturable", capturable, True), ("differentiable", differentiable, True), ("fused", fused, False),
        ):  # fmt: skip
            if value is wrong:
                raise ValueError(
                    f"`{name}` must not be {wrong}: got {name}={value} for an optimizer whose step is fused. Use torch.optim.AdamW."
                )
        self._tasks: dict[Tensor, Task] = {}
        self._counts: dict[Tensor, tuple[Tensor, int, float]] = {}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, fused=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take back a state; one that another implementation saved goes on fused."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tasks, self._counts = {}, {}
        for group in self.param_groups:
            group.update(fused=True, foreach=None, capturable=False, differentiable=False)

    @property
    def kernel(self) -> str | None:
        """What steps parameters under a method in one pass: "c" or "numba", "triton" where it was asked for, or None."""
        engine = engines.best()
        return None if engine is None else engine.name

    def serves(self, parameter: nn.Parameter, group: Mapping[str, Any], block: int = 1) -> bool:
        """Whether this optimizer can take a `Task` with blocks of this length for a parameter of one of its groups, as both are now."""
        plain = type(parameter) is nn.Parameter and parameter.dtype == torch.float32  # no shards, no subclasses
        laid_out = plain and parameter.layout == torch.strided and parameter.is_contiguous() and parameter.numel() > 0
        if not laid_out or group["amsgrad"] or parameter.device.type not in ("cpu", "cuda"):
            return False
        engine = engines.best()
        return engine is not None and parameter.device.type in engine.devices and (engine.longest is None or block <= engine.longest)

    def assign(self, tasks: dict[Tensor, Task]) -> None:
        """Set what the next step does for parameters that it serves; an empty dictionary takes back what was set."""
        self._tasks = tasks

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # under torch.compile as well: kernels cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters with a task in one pass, the others as torch does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]  # parameters, gradients, two moments, the largest second one, step counts
            self._init_group(group, *lists)  # type: ignore[no-untyped-call]
            rest = [k for k, parameter in enumerate(lists[0]) if parameter not in self._tasks]
            if len(rest) < len(lists[0]):
                self._step_in_one_pass(group, [both for both in zip(*lists[:2], strict=True) if both[0] in self._tasks])
                lists = [[found[k] for k in rest] if found else found for found in lists]
            parameters, gradients, first, second, largest, counts = lists
            adamw(
                parameters,
                gradients,
                first,
                second,
                largest,
                counts,
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                amsgrad=group["amsgrad"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
        return loss

    def _step_in_one_pass(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Step parameters, each with its gradient, as their tasks say."""
        engine, written = engines.best(), []
        assert engine is not None
        states, numbers = [self.state[parameter] for parameter, _ in pairs], Cache(group)
        torch._foreach_add_([state["step"] for state in states], 1)
        for (parameter, gradient), state in zip(pairs, states, strict=True):
            task = self._tasks.pop(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].contiguous()  # as made here they are; what is loaded may be laid out otherwise
            first, second = state["exp_avg"], state["exp_avg_sq"]
            shown, weight = (None, parameter) if task.latent is None else (parameter, task.latent)
            arrays = Arrays(shown, weight, gradient.contiguous(), first, second, task.scales)
            engines.run(engine, arrays, task.block, numbers.of(self._count(parameter, state["step"]), task))
            written += [weight, first, second] if shown is None else [shown, weight, first, second]
        torch.autograd.graph.increment_version(written)

    def _count(self, parameter: Tensor, step: Tensor) -> float:
        """Return a parameter's step count, which was just increased; one that lies on a GPU is read once and then counted along."""
        if step.is_cpu:
            return step.item()
        known = self._counts.get(parameter)
        along = known is not None and known[0] is step and known[1] + 1 == step._version
        count = known[2] + 1 if known is not None and along else step.item()
        self._counts[parameter] = (step, step._version, count)
        return count
