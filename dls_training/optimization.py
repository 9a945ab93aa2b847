"""Optimizers and learning-rate schedules of the papers, beside transformers' own."""

import inspect
import math
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter] | Iterable[tuple[str, torch.nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """`"sgd"` (momentum 0.9), `"adam"` or `"adamw"`, each in its fused form: one pass over all parameters.

    Of parameters with names, the state that it saves has the names, too.
    """
    options = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **options)


def check_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Makes sure that a state is one of this optimizer's own: fused optimizers write wherever a state leads them.

    Args:
        optimizer: Of parameters with names.
        saved: What `state_dict` gave after a step.

    Raises:
        ValueError: saying what differs: names, shapes or types, or what is missing.
    """
    probe = torch.nn.Parameter(torch.zeros(1))
    accepted = inspect.signature(type(optimizer)).parameters  # of the defaults some are not for callers
    other = type(optimizer)([probe], **{name: v for name, v in optimizer.defaults.items() if name in accepted})
    probe.grad = torch.zeros(1)
    other.step()
    expected = other.state[probe]
    names, theirs = (
        [name for group in groups for name in group["param_names"]]
        for groups in (optimizer.param_groups, saved["param_groups"])
    )
    if names != theirs:
        raise ValueError(f"it is of other parameters: {len(theirs)} instead of {len(names)}, or with other names")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        state = saved["state"].get(number, {})
        if set(state) != set(expected):
            raise ValueError(f"{name} has {', '.join(sorted(state)) or 'nothing'}, not {', '.join(sorted(expected))}")
        for what, like in expected.items():
            shape = parameter.shape if like.ndim else like.shape
            value = state[what]
            if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (shape, like.dtype):
                found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value)
                raise ValueError(f"{what} of {name} is {found}, not {tuple(shape)} {like.dtype}")


def multistep(step: int, total_steps: int) -> float:
    """A tenth of the rate from 60 % of the steps on, a hundredth from 80 % (NPID)."""
    return 0.1 ** sum(step >= share * total_steps for share in (0.6, 0.8))


def esresnet(epoch: int) -> float:
    """Five cold epochs at a tenth, linear warm-up over ten, then x 0.985 per epoch (ESResNet)."""
    cold, warm_up = 5, 10
    if epoch < cold:
        return 0.1
    if epoch < cold + warm_up:
        return 0.1 + 0.9 * (epoch - cold) / warm_up
    return 0.985 ** (epoch - cold - warm_up)


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: int, warmup_steps: float = 0
) -> LRScheduler:
    """A schedule that is stepped once per optimizer step.

    Args:
        name: `"multistep"`, `"esresnet"`, or one of transformers' (`"constant"`, `"linear"`, `"cosine"`).
        optimizer: The bare optimizer.
        total_steps: Of the whole run.
        steps_per_epoch: Optimizer steps.
        warmup_steps: Optimizer steps, or, below 1, their share of all steps; only transformers' schedules warm up.
    """
    if name == "multistep":
        return LambdaLR(optimizer, lambda step: multistep(step, total_steps))
    if name == "esresnet":
        return LambdaLR(optimizer, lambda step: esresnet(step // steps_per_epoch))
    warmup_steps = math.ceil(warmup_steps * total_steps if warmup_steps < 1 else warmup_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
