"""A run from start to end: set-up, stages, validation, checkpoints, resume."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from data.dataset import select_dataset
from data.pipeline import build_pipeline
from layers.distillation import ProgressiveDistillation
from layers.losses import MultiBoxLoss
from layers.teachers import load_teachers
from models.featherface import build_model
from utils.checkpoint import CheckpointError, inference_content, last_progress, load_checkpoint, save_checkpoint
from utils.command import FINISHED
from utils.config import Config, ConfigError, TrainConfig, from_dict, to_dict
from utils.distributed import World
from utils.engine import Run, train_one_epoch, uses_bf16
from utils.files import whole
from utils.logger import RunLogger
from utils.optim import EMA, build_optimizer, build_scheduler
from utils.resume import AP_KEYS, ResumeError, first_difference, rng_state, set_rng_state
from utils.start import start_mimics_from, start_weights
from utils.validation import Validator
from utils.weights import find_weights

log = logging.getLogger(__name__)

LAST, BEST = "last.pth", "best.pth"
TIME_UP = 1  # why fit() returned, beside FINISHED and 128 + a signal


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs of one picture size; ``batch_size`` counts the pictures of all processes."""

    size: int
    batch_size: int
    first_epoch: int
    end_epoch: int
    steps: int  # per epoch


def plan_stages(cfg: TrainConfig, steps_of: Callable[[int, int], int]) -> list[Stage]:
    """Turn fractions of training into epochs; a stage too short for one epoch is left out.

    Args:
        cfg: ``epochs`` and ``stages``.
        steps_of: ``(size, batch_size)`` -> steps per epoch.
    """
    stages, first = [], 0
    for stage in cfg.stages:
        end = round(stage.until * cfg.epochs)
        if end > first:
            stages.append(Stage(stage.size, stage.batch_size, first, end, steps_of(stage.size, stage.batch_size)))
            first = end
    return stages


class Trainer:
    """Trains one network as a config says, in the folder ``out``.

    ``out`` receives ``last.pth`` (everything needed to continue; as an inference checkpoint it holds the EMA weights),
    ``best.pth`` (EMA weights of the best validation), ``config.yaml``, ``log.jsonl`` and ``tensorboard/``.

    Args:
        cfg: the experiment.
        out: the run's folder, made if needed.
        world: this process and its device, see :func:`utils.distributed.start_world`.
        resume: continue from ``out/last.pth`` where there is one.
        max_minutes: stop with a checkpoint after so many minutes; None = never.

    Raises:
        ConfigError, CheckpointError, DataError, LogError, ResumeError: each one line.
    """

    def __init__(
        self, cfg: Config, out: str | Path, world: World, resume: bool = False, max_minutes: float | None = None
    ):
        started = time.monotonic()
        self.deadline = None if max_minutes is None else started + 60 * max_minutes
        self.cfg, self.out, self.world = cfg, Path(out), world
        self.code = FINISHED  # agreed by all processes
        self.signal = 0  # what this process received
        self.on_step: Callable[[], None] = lambda: None  # called after every step
        if cfg.train.only and not cfg.model.landmark_refinement:
            raise ConfigError("'train.only': landmark_refinement needs model.landmark_refinement")
        if cfg.train.only and cfg.distill.enabled:
            raise ConfigError(
                "'train.only': a part alone learns from the labels: needs distill.teachers [] and no self_*"
            )
        saved = self._find_checkpoint(resume)
        make_reproducible(cfg.train)
        self.epoch, self.done = 0, 0  # epoch in progress, its finished steps
        self.best = {"ap": -1.0, "epoch": 0}  # epochs counted from 1, as in the log
        self.stale = 0  # validations since the best one

        model = build_model(cfg.model)
        told = start_weights(model, cfg.train) if saved is None else ""
        self._place(model)
        if cfg.train.sync_bn and world.size > 1 and world.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        distiller = None
        if cfg.distill.enabled:
            teachers = load_teachers([find_weights(p) for p in cfg.distill.teachers], world.device)
            distiller = ProgressiveDistillation(cfg.distill, cfg.model, teachers, cfg.loss)
            distiller.start_mimics(model.heads)
            if saved is None and cfg.distill.init_mimics:
                start_mimics_from(distiller, cfg.distill.init_mimics)
            self._place(distiller)
        # after the weights: that one of them is missing should show before all photos are decoded
        self.pipeline = build_pipeline(cfg, world.device, world.rank, world.size)
        self.stages = plan_stages(cfg.train, self._steps_of)
        total = sum(s.steps * (s.end_epoch - s.first_epoch) for s in self.stages)
        self.validator = self._build_validator()
        world.same_start(model, *([distiller] if distiller else []))
        criterion = MultiBoxLoss(cfg.loss, cfg.model.variances).to(world.device)
        optimizer = build_optimizer(cfg.train, model, distiller.parameters() if distiller else ())
        self.run = Run(
            cfg=cfg,
            world=world,
            model=model,
            ema=EMA(model, cfg.train.ema_decay),
            criterion=criterion,
            distiller=distiller,
            optimizer=optimizer,
            scheduler=build_scheduler(cfg.train, optimizer, total),
            total_steps=total,
        )
        torch.manual_seed(cfg.train.seed + world.rank)  # from here on: DropBlock
        if saved is not None:
            told = self._restore(saved)
        self.run.logger = RunLogger(self.out, self.run.step, total, world.main, validated=not self.done)
        self._introduce(resume, saved is None, told)

    def fit(self) -> int:
        """Train to the end, to the time limit or to a signal; returns FINISHED, TIME_UP or 128 + the signal.

        Whatever the reason, ``last.pth`` then holds the state of the last finished step.

        Raises:
            NonFiniteLoss, CheckpointError, DataError, LogError: ``last.pth`` is then the last good one.
        """
        logger = self.run.logger
        with self._signals():
            try:
                while self.epoch < self.cfg.train.epochs and not self._out_of_patience():
                    if not self._train_epoch() or not self._validate_if_due():
                        self.save()
                        logger.say(f"stopped at step {self.run.step} of {self.run.total_steps}; --resume continues")
                        return self.code
                    self.epoch, self.done = self.epoch + 1, 0
                    self.save()
            finally:
                logger.close()
        return FINISHED

    def save(self) -> None:
        """Write ``last.pth``; all processes must call it together."""
        self.run.guard.flush()
        states = self.world.gather(rng_state(self.world.device))
        memories = self.world.gather(self._memory())
        if not self.world.main:
            return
        run = self.run
        content = self._inference_content()
        content["training"] = {
            "config": to_dict(self.cfg),
            "model": run.model.state_dict(),
            "ema_updates": int(run.ema.n_averaged),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "distiller": run.distiller.state_dict() if run.distiller else None,
            "rng": states,
            "memories": memories,
            "epoch": self.epoch,
            "done": self.done,
            "step": run.step,
            "progress": run.progress,
            "total_steps": run.total_steps,
            "data": self.pipeline.dataset.fingerprint,
            "best": self.best,
            "stale": self.stale,
        }
        save_checkpoint(self.out / LAST, content)

    def _memory(self) -> dict | None:
        """What this process remembers of its own images; of the only process, ``distiller`` holds it already."""
        memory = self.run.distiller.memory if self.run.distiller and self.world.size > 1 else None
        return None if memory is None else {key: value.cpu() for key, value in memory.state_dict().items()}

    def _introduce(self, resume: bool, new: bool, told: str) -> None:
        """Tell what is about to happen; a new run also writes it down. ``told``: what there is to say of its start."""
        run, logger = self.run, self.run.logger
        precision = "bf16" if uses_bf16(self.cfg.train.amp, self.world.device) else "float32"
        if resume:
            found = "nothing to resume, starting anew" if new else f"continuing at step {run.step}"
            logger.say(f"{self.out}: {found} ({run.total_steps} steps in all, {precision})")
        if self.cfg.train.sync_bn and self.world.device.type != "cuda":
            logger.say("train.sync_bn is without effect: torch has it for GPUs only")
        if told:
            logger.say(told)
        if not new or not self.world.main:
            return
        first = {
            "step": 0,
            "name": self.cfg.name,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "images": len(self.pipeline.dataset),
            "total_steps": run.total_steps,
            "processes": self.world.size,
            "device": str(self.world.device),
            "precision": precision,
            "torch": torch.__version__,
        }
        logger.write("start", first)
        try:
            with whole(self.out / "config.yaml") as part:
                part.write_text(yaml.safe_dump(to_dict(self.cfg), sort_keys=False))
        except OSError as e:
            raise CheckpointError(f"{self.out / 'config.yaml'}: cannot write ({e.strerror})") from None

    def _out_of_patience(self) -> bool:
        patience = self.cfg.train.patience
        if not patience or self.stale < patience:
            return False
        self.run.logger.say(f"stopped early: no better AP in {self.stale} validations")
        return True

    def _train_epoch(self) -> bool:
        """The rest of the current epoch; False = stopped before its end."""
        stage = next(s for s in self.stages if self.epoch < s.end_epoch)
        if self.done < stage.steps:
            self.pipeline.set_stage(stage.size, stage.batch_size // self.world.size)
            train_one_epoch(self.run, self._batches(), self.epoch, self.done, stage.steps, self._after_step)
        return self.code == FINISHED

    def _batches(self) -> Iterator[dict]:
        batches = self.pipeline.batches(self.epoch, self.done, self.cfg.train.epochs)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError:
                if self.signal:  # it reached the DataLoader's workers too
                    self._should_stop()
                    return
                raise
            if batch is None:
                return
            yield batch

    def _after_step(self, done: int) -> bool:
        self.done = done
        self.on_step()
        if self._should_stop():
            return True
        every = self.cfg.train.save_every
        stage = next(s for s in self.stages if self.epoch < s.end_epoch)
        if every and self.run.step % every == 0 and done < stage.steps:  # an epoch's end is saved anyway
            self.save()
        return False

    def _should_stop(self) -> bool:
        """Whether any process was told to stop or is out of time; all processes must ask together."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        self.code = self.world.max(self.signal or (TIME_UP if late else FINISHED))
        return self.code != FINISHED

    def _validate_if_due(self) -> bool:
        """Validate after the epochs that ask for it and at each stage's end; False = stopped meanwhile."""
        cfg, run = self.cfg.train, self.run
        last = self.epoch + 1 == cfg.epochs
        due = cfg.val_every and (
            (self.epoch + 1) % cfg.val_every == 0 or any(self.epoch + 1 == s.end_epoch for s in self.stages)
        )
        if not (due or last):
            return True
        if self.validator is None:
            if last and self.world.main:
                save_checkpoint(self.out / BEST, self._inference_content())
            return True
        self.save()  # whatever happens now, the epoch is not lost
        started = time.perf_counter()
        result = self.validator(run.ema.module, self.world, self._should_stop)
        if result is None:
            return False
        figures, pictures = result
        seconds = round(time.perf_counter() - started, 1)
        run.logger.write("val", {"step": run.step, "epoch": self.epoch + 1, **figures, "seconds": seconds})
        for i, picture in enumerate(pictures):
            run.logger.picture(f"val/{i}", picture, run.step)
        aps = " ".join(f"{k[3:]} {v:.4f}" for k, v in figures.items() if k.startswith("ap_"))
        better = figures["ap"] > self.best["ap"]
        run.logger.say(
            f"epoch {self.epoch + 1}: AP {figures['ap']:.4f}{' (best)' if better else ''}: {aps}, {seconds} s"
        )
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = {"epoch": self.epoch + 1, **figures}
            if self.world.main:
                save_checkpoint(self.out / BEST, self._inference_content())
            if run.distiller is not None:
                run.distiller.set_own_best(run.ema.module)
        return True

    def _inference_content(self) -> dict:
        begun = self.epoch + (self.done > 0)
        meta = {"step": self.run.step, "epoch": begun, "best": self.best, "config": to_dict(self.cfg)}
        return inference_content(self.cfg.name, self.cfg.model, self.run.ema.module.state_dict(), meta)

    def _place(self, module: nn.Module) -> None:
        """Move a module to the device and memory format of the run; another format would round differently."""
        module.to(self.world.device)
        if self.cfg.train.channels_last:
            module.to(memory_format=torch.channels_last)

    def _steps_of(self, size: int, batch_size: int) -> int:
        if batch_size % self.world.size:
            raise ConfigError(
                f"'train.stages': batch_size {batch_size} cannot be shared by {self.world.size} processes equally"
            )
        self.pipeline.set_stage(size, batch_size // self.world.size)
        return self.pipeline.steps_per_epoch

    def _build_validator(self) -> Validator | None:
        if not self.cfg.data.select_images and not self.cfg.data.val_labels:
            return None
        cfg = self.cfg.train
        dataset = select_dataset(self.cfg.data)
        shared = dataset.shared_with(self.pipeline.dataset) if self.cfg.data.val_labels else 0
        if shared and self.world.main:
            log.warning("%d of the %d photos to validate on are trained on too: AP will flatter", shared, len(dataset))
        validator = Validator(dataset, cfg.val_images, cfg.val_scale, cfg.pictures, self.cfg.data.on_bad_image)
        if validator.faces:
            return validator
        if self.world.main:
            log.warning("no face in the %d photos to validate on, so nothing is validated", len(validator.indices))
        return None

    def _find_checkpoint(self, resume: bool) -> dict | None:
        """The checkpoint to continue from, checked against the config; None = start anew."""
        path = self.out / LAST
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CheckpointError(f"{self.out}: cannot make the run's folder ({e.strerror})") from None
        if not os.access(self.out, os.W_OK):
            raise CheckpointError(f"{self.out}: the run's folder is not writable")
        if not path.exists():
            return None
        if not resume:
            raise ResumeError(f"{self.out}: holds a run already; add --resume to continue it, or choose another --out")
        content = load_checkpoint(path)
        if "training" not in content:
            raise ResumeError(f"{path}: holds weights only, nothing to resume; use --weights to start from it")
        try:
            saved = to_dict(from_dict(Config, content["training"]["config"], str(path)))
        except ConfigError as e:
            raise ResumeError(f"{e}: made by another version") from None
        difference = first_difference(saved, to_dict(self.cfg))
        if difference:
            key, old, new = difference
            raise ResumeError(f"{path}: was made with {key}={old!r}, now it is {new!r}; resume needs the same config")
        return content

    def _restore(self, content: dict) -> str:
        """Continue from a checkpoint; returns what there is to tell, "" = nothing."""
        run, state = self.run, content["training"]
        if state["total_steps"] != run.total_steps:
            raise ResumeError(
                f"{self.out / LAST}: its run had {state['total_steps']} steps, this one has {run.total_steps}: "
                "other data or another number of images"
            )
        try:
            run.model.load_state_dict(state["model"])
            run.ema.module.load_state_dict(content["state_dict"])
            run.ema.n_averaged.fill_(state["ema_updates"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.scheduler.load_state_dict(state["scheduler"])
            if run.distiller is not None:
                run.distiller.load_state_dict(state["distiller"])
                self._place(run.distiller)  # also the own-best teacher, which it has just rebuilt
            run.step, self.epoch, self.done = state["step"], state["epoch"], state["done"]
            run.progress = last_progress(state, self.cfg.train.epochs)
            self.best, self.stale = state["best"], state.get("stale", 0)
            if len(state["rng"]) == self.world.size:  # another number of processes draws other numbers anyway
                set_rng_state(state["rng"][self.world.rank], self.world.device)
                memory = state.get("memories", [None] * self.world.size)[self.world.rank]
                if memory is not None:
                    run.distiller.memory.load_state_dict(memory)
        except (KeyError, ValueError, RuntimeError) as e:
            raise ResumeError(f"{self.out / LAST}: cannot be resumed: {str(e).strip().splitlines()[-1]}") from None
        if self.epoch >= self.cfg.train.epochs:  # a finished run keeps what it found
            return ""
        told = []
        data = self.pipeline.dataset.fingerprint
        if state.get("data", data) != data:
            told.append("photos or labels have changed since it was saved: it goes on with the new ones")
        before = from_dict(Config, state["config"], LAST)
        changed = [key for key in AP_KEYS if attrgetter(key)(before) != attrgetter(key)(self.cfg)]
        if changed:
            self.best, self.stale = {"ap": -1.0, "epoch": 0}, 0
            told.append(f"{', '.join(changed)} changed: the APs so far no longer count, the next one is the best")
        return "; ".join(told)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for a clean stop; a second one does what it usually does."""

        def ask(number: int, _frame: Any) -> None:
            self.signal = 128 + number
            signal.signal(number, previous[number])

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def make_reproducible(cfg: TrainConfig) -> None:
    """Seed every generator; with ``deterministic`` also insist on algorithms that repeat bit by bit."""
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)  # noqa: NPY002 - our own code uses Generators, libraries may not
    torch.manual_seed(cfg.seed)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = cfg.deterministic
    torch.backends.cudnn.benchmark = not cfg.deterministic
    torch.set_float32_matmul_precision("highest" if cfg.deterministic else "high")
