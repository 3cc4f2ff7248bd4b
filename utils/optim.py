"""Optimiser, learning-rate schedule and weight averaging of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel

from utils.config import TrainConfig

START = 25.0  # the schedules begin at lr / START


def build_optimizer(cfg: TrainConfig, model: nn.Module, extra: Iterable[nn.Parameter] = ()) -> Optimizer:
    """AdamW or SGD over the model and ``extra`` parameters (training-only adapters).

    Parameters with fewer than two dimensions - norms, biases, gates, fusion weights - are not decayed. The backbone's
    learning rate is ``backbone_lr`` times the rest's. Frozen parameters take part as soon as they get a gradient.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        groups.setdefault((name.startswith("backbone."), p.ndim > 1), []).append(p)
    for p in extra:
        groups.setdefault((False, p.ndim > 1), []).append(p)
    settings = [
        {
            "params": params,
            "lr": cfg.lr * (cfg.backbone_lr if backbone else 1.0),
            "weight_decay": cfg.weight_decay if decay else 0.0,
            "name": f"{'backbone' if backbone else 'rest'}{'' if decay else ', no decay'}",
        }
        for (backbone, decay), params in groups.items()
    ]
    if cfg.optimizer == "sgd":
        return SGD(settings, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=True)
    return AdamW(settings, fused=True)


def build_scheduler(cfg: TrainConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Learning rate over all steps of the run, to be stepped once per optimiser step.

    ``onecycle`` rises along a cosine from lr / 25 during the first ``warmup`` of the steps (Smith & Topin, 2018, as in
    torch's ``OneCycleLR`` without cycling the momentum); ``cosine`` rises linearly. Both then fall along a cosine to
    ``lr * final_lr`` (Loshchilov & Hutter, 2017). The schedule spans the stages of progressive resizing and does not
    follow their batch size: stages differ by a factor of two there, little beside what the schedule itself sweeps.
    """
    warm = round(cfg.warmup * total_steps)

    def rise(part: float) -> float:
        part = (1 - math.cos(math.pi * part)) / 2 if cfg.schedule == "onecycle" else part
        return 1 / START + (1 - 1 / START) * part

    def fall(part: float) -> float:
        return cfg.final_lr + (1 - cfg.final_lr) * (1 + math.cos(math.pi * part)) / 2

    def factor(step: int) -> float:
        return rise(step / warm) if step < warm else fall(min((step - warm) / max(total_steps - 1 - warm, 1), 1.0))

    return LambdaLR(optimizer, factor)


class EMA(AveragedModel):
    """Exponential moving average of parameters and buffers (BatchNorm statistics), always in eval mode.

    The decay rises as ``min(decay, (1 + n) / (10 + n))`` over the first updates n, so that short runs do not drag
    their random start along.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.module.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards ``model``; the first call copies it.

        The base class sends its counter to the model's device each time, and so waits for all that a GPU has to do.
        """
        n = int(self.n_averaged)  # stays on the CPU
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        averaged, current = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs = list(zip(averaged, current))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [c for _, c in floats], weight)
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        if counters:
            torch._foreach_copy_([a for a, _ in counters], [c for _, c in counters])
        self.n_averaged += 1

    def train(self, mode: bool = True) -> EMA:
        """Stays in eval mode."""
        return super().train(False)
