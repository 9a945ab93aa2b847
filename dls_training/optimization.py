"""Optimizers and learning-rate schedules of the papers, beside transformers' own."""

import math
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler


def make_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`"sgd"` (momentum 0.9), `"adam"` or `"adamw"`, each in its fused form: one pass over all parameters."""
    options = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **options)


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
