"""One epoch of training. Reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils.command import Problem
from utils.config import Config
from utils.distributed import World
from utils.logger import RunLogger
from utils.optim import EMA

BACKBONE_STAGES = ("stage1", "stage2", "stage3")


class NonFiniteLoss(Problem, RuntimeError):
    """The loss or its gradient is NaN or infinite; the text is one line naming the batch's files."""


@dataclass
class Run:
    """Everything a training step touches."""

    cfg: Config
    world: World
    model: nn.Module
    ema: EMA
    criterion: nn.Module
    distiller: nn.Module | None
    optimizer: Optimizer
    scheduler: LRScheduler
    total_steps: int
    step: int = 0  # optimiser steps done
    progress: float = 0.0  # share of training that had been done when the last step began
    logger: RunLogger | None = None  # opened last, when the step to start from is known
    guard: FiniteGuard = field(default_factory=lambda: FiniteGuard())  # defined below


def train_one_epoch(
    run: Run, batches: Iterable[dict], epoch: int, first: int, steps: int, after_step: Callable[[int], bool]
) -> None:
    """Train on the rest of an epoch.

    Args:
        run: changed in place; ``run.step`` counts the optimiser steps.
        batches: of this epoch, from number ``first`` on; see :meth:`data.pipeline.Pipeline.batches`.
        epoch: from 0.
        first, steps: the number of the first batch, and how many batches the whole epoch has.
        after_step: called with the number of this epoch's finished steps; True ends the epoch early.

    Raises:
        NonFiniteLoss: before the weights are touched on a CPU, one step later on a GPU.
    """
    cfg, model, device = run.cfg.train, run.model, run.world.device
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    set_train_mode(model, frozen_stages(run.cfg, epoch), still_norms(run.cfg, epoch), cfg.only)
    meter = Meter()
    amp = mixed_precision(cfg.amp, device)

    for number, batch in enumerate(meter.timed(batches), first):
        images = batch["images"].to(memory_format=torch.channels_last) if cfg.channels_last else batch["images"]
        run.progress = (epoch + number / steps) / cfg.epochs
        model.set_progress(run.progress)
        distiller = run.distiller

        with amp:
            out = model(images, features=distiller is not None and distiller.needs_features(run.progress))
        anchors = model.anchors(*images.shape[-2:], device)
        matched = run.criterion.assign(out, batch, anchors)
        losses = run.criterion(out, batch, anchors, matched)
        total, extra = losses["total"], {}
        if distiller is not None:
            with amp:
                total, extra = distiller.combine(total, out, batch, matched, run.progress, run.ema.module)

        run.optimizer.zero_grad(set_to_none=True)
        total.backward()
        run.world.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        run.guard.check(total.detach() + norm, total.detach(), batch["names"], run.step + 1)
        lr = learning_rate(run.optimizer)
        run.optimizer.step()
        run.scheduler.step()
        if not cfg.only:  # what stands still shall do so to the last bit
            run.world.average_buffers(model)
        run.ema.update_parameters(model)

        run.step += 1
        meter.add({**losses, **extra, "total": total, "grad_norm": norm}, len(images) * run.world.size)
        shown = {}
        if run.step % cfg.log_every == 0 or number + 1 == steps:
            line = meter.summary()
            shown = {"loss": f"{line['total']:.3f}", "lr": f"{lr:.1e}"}
            batch_size = len(images) * run.world.size
            head = {"step": run.step, "epoch": epoch + 1, "size": images.shape[-1], "batch": batch_size, "lr": lr}
            if device.type == "cuda":  # the peak since the start, decoded photos on the GPU included
                head["gpu_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
            run.logger.write("train", {**head, **line})
            if gates := gate_values(model):
                run.logger.write("gates", {"step": run.step, **gates})
        run.logger.advance(**shown)
        if after_step(number + 1):
            break
    run.guard.flush()


def mixed_precision(amp: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass under ``train.amp``: bf16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(amp, device) else nullcontext()


def uses_bf16(amp: str, device: torch.device) -> bool:
    """What ``train.amp`` means on a device; ``auto`` takes bf16 on GPUs and x86 CPUs that compute in it themselves.

    Other CPUs imitate it: with AVX2 alone a step then takes 14 times as long as in float32.
    """
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def frozen_stages(cfg: Config, epoch: int) -> int:
    """How many backbone stages are frozen in ``epoch``: the thaw comes with the first epoch at ``unfreeze_at``."""
    return 0 if epoch >= cfg.train.unfreeze_at * cfg.train.epochs else cfg.train.freeze_stages


def still_norms(cfg: Config, epoch: int) -> bool:
    """Whether BatchNorm statistics stand still in ``epoch``: from the first epoch at ``freeze_bn_at``."""
    return cfg.train.freeze_bn_at < 1 and epoch >= cfg.train.freeze_bn_at * cfg.train.epochs


def set_train_mode(model: nn.Module, frozen: int, still: bool = False, only: str = "") -> None:
    """Training mode, but the first ``frozen`` backbone stages take no gradient and keep their BatchNorm statistics.

    With ``still`` all BatchNorm statistics stay as they are; scales and shifts go on learning. With ``only``, the name
    of a submodule, that alone learns and the rest is in eval mode, so that its outputs are what they are in use.
    """
    if only:
        model.requires_grad_(False).eval()
        model.get_submodule(only).requires_grad_(True).train()
        return
    model.train()
    if still:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    for i, name in enumerate(BACKBONE_STAGES):
        stage = getattr(model.backbone, name)
        stage.requires_grad_(i >= frozen)
        if i < frozen:
            stage.eval()


def learning_rate(optimizer: Optimizer) -> float:
    """The rate of the parameters outside the backbone."""
    return next(g["lr"] for g in optimizer.param_groups if not g["name"].startswith("backbone"))


def gate_values(model: nn.Module) -> dict[str, float]:
    """What the gates did in the last batch: ``{"module.path/key": value}`` of all modules with ``monitor()``."""
    return {
        f"{name}/{key}": round(float(value), 6)
        for name, module in model.named_modules()
        if hasattr(module, "monitor")
        for key, value in module.monitor().items()
    }


class FiniteGuard:
    """Stops the run on a non-finite loss. On a GPU it looks at each value one step later, so that nothing waits."""

    def __init__(self) -> None:
        self.pending: tuple | None = None

    def check(self, value: Tensor, loss: Tensor, names: list[str], step: int) -> None:
        """Look at ``value`` (loss plus gradient norm: not finite if either is not) now or, on a GPU, soon."""
        self.flush()
        both = torch.stack([value, loss])
        if both.is_cuda:
            host = torch.empty(2, pin_memory=True)
            host.copy_(both, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self.pending = (host, done, names, step)
        else:
            self._judge(both, names, step)

    def flush(self) -> None:
        """Look at what is still pending; call before weights are saved."""
        if self.pending is not None:
            host, done, names, step = self.pending
            self.pending = None
            done.synchronize()
            self._judge(host, names, step)

    @staticmethod
    def _judge(both: Tensor, names: list[str], step: int) -> None:
        value, loss = both.tolist()
        if not np.isfinite(value):
            what = "loss" if not np.isfinite(loss) else "gradient"
            raise NonFiniteLoss(f"non-finite {what} ({loss:g}) at step {step}; files of the batch: {', '.join(names)}")


class Meter:
    """Means of what was logged since the last summary; values stay on the device until then."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def timed(self, batches: Iterable[dict]) -> Iterable[dict]:
        """Pass batches on, measuring how long they were waited for."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, values: dict[str, Tensor | float], images: int) -> None:
        """Add the scalars of one step that saw so many images."""
        self.images += images
        for key, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def summary(self) -> dict[str, float]:
        """Means, ``images_per_s`` and ``data_wait`` (share of the time spent waiting for data); starts anew."""
        keys = list(self.sums)
        tensors = [k for k in keys if isinstance(self.sums[k], Tensor)]
        moved = dict(zip(tensors, torch.stack([self.sums[k] for k in tensors]).tolist())) if tensors else {}
        line = {k: round(moved.get(k, self.sums[k]) / self.counts[k], 6) for k in keys}
        seconds = max(time.perf_counter() - self.started, 1e-9)
        line["images_per_s"] = round(self.images / seconds, 2)
        line["data_wait"] = round(self.waited / seconds, 4)
        self._reset()
        return line
