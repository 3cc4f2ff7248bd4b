"""Typed configuration: YAML file + ``key=value`` overrides -> nested dataclasses.

Every key of a YAML file in ``configs/`` is a field below, but for ``base`` (see :func:`load_config`); an unknown key,
a wrong type or an impossible value raises :class:`ConfigError` with one line that names the file and the key.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from utils.command import UsageError
from utils.scale import RANGE, Scale, in_range

ROOT = Path(__file__).resolve().parent.parent
CONFIG_DIR = ROOT / "configs"


class ConfigError(UsageError, ValueError):
    """A configuration mistake; its text is one line naming the file and the key."""


def _below(section: Any, low: int, *keys: str) -> dict[str, str]:
    """What is wrong of these keys of a section, which must be at least ``low``."""
    return {key: f"must be >= {low}" for key in keys if getattr(section, key) < low}


def _outside(section: Any, *keys: str) -> dict[str, str]:
    """The same, of those that are shares or probabilities."""
    return {key: "must be in [0, 1]" for key in keys if not 0 <= getattr(section, key) <= 1}


def _unordered(section: Any) -> dict[str, str]:
    """The same, of ``stages``, each of which ends at a share of training."""
    ends = [stage.until for stage in section.stages]
    ordered = ends and ends == sorted(ends) and ends[-1] == 1.0
    return {} if ordered else {"stages": "their until must rise to exactly 1.0"}


@dataclass
class ModelConfig:
    """Architecture. Everything that decides parameter names or shapes lives here and is stored in checkpoints."""

    backbone_last_blocks: int = 2  # blocks of the backbone's last stage; 1 pays for a wider neck
    backbone_last_channels: int = 256  # of P5; fewer pay for a wider neck as well
    out_channels: int = 28
    neck: Literal["bifpn", "fpn"] = "bifpn"
    bifpn_repeats: int = 2
    extra_laterals: bool = False  # V1: P4 and P5 get a second lateral for the bottom-up path
    cbam: Literal["none", "neck", "laterals+neck", "backbone+neck"] = "neck"  # where CBAMs sit (V1: backbone+neck)
    cbam_reduction: int = 64
    ssh: Literal["plain", "grouped", "separable", "deformable"] = "grouped"
    ssh_groups: int = 8
    shuffle: bool = True
    class_outputs: int = 1  # channels per anchor of the class head; 2 = softmax pair as published (logit = l1 - l0)
    anchors: list[list[int]] = field(default_factory=lambda: [[16, 32], [64, 128], [256, 512]])
    strides: list[int] = field(default_factory=lambda: [8, 16, 32])
    variances: list[float] = field(default_factory=lambda: [0.1, 0.2])
    # Plan B: near-zero-parameter modules
    feature_reuse: bool = False
    feature_reuse_before_heads: bool = False
    attention_multiply: int = 1  # 1 = plain CBAM
    progressive_enhancement: int = 0  # 0 = off
    multiscale_fusion: bool = False
    dynamic_sharing: bool = False
    sharing_skip_below: float = 0.0  # of its gate: such images skip the block at inference (not in exports); 0 = none
    # Plan A
    acf: bool = False
    dca: bool = False
    pfr: bool = False
    cbam_cascade: bool = False
    smart_head: bool = False
    cascade_refinement: bool = False
    multipath: bool = False
    landmark_refinement: bool = False  # landmarks corrected by what the features at their places say
    dropblock: float = 0.0  # final DropBlock probability in the neck, ramped up over training

    def check(self) -> dict[str, str]:
        bad = {}
        if self.out_channels < 4 or self.out_channels % 4:
            bad["out_channels"] = "must be a positive multiple of 4"
        bad |= _below(self, 1, "bifpn_repeats", "cbam_reduction", "ssh_groups", "attention_multiply")
        bad |= _below(self, 0, "progressive_enhancement")
        if self.backbone_last_blocks not in (1, 2):
            bad["backbone_last_blocks"] = "must be 1 or 2"
        if not 1 <= self.backbone_last_channels <= 256:
            bad["backbone_last_channels"] = "must be 1 to 256"
        if self.class_outputs not in (1, 2):
            bad["class_outputs"] = "must be 1 or 2"
        if not 0 <= self.sharing_skip_below < 1:
            bad["sharing_skip_below"] = "must be in [0, 1)"
        elif self.sharing_skip_below and not self.dynamic_sharing:
            bad["sharing_skip_below"] = "needs dynamic_sharing"
        if not 0 <= self.dropblock < 1:
            bad["dropblock"] = "must be in [0, 1)"
        if self.strides != [8, 16, 32]:
            bad["strides"] = "must be [8, 16, 32], the strides of the backbone"
        if len(self.anchors) != len(self.strides) or any(not a or min(a) <= 0 for a in self.anchors):
            bad["anchors"] = "needs one non-empty list of positive sizes per stride"
        if len(self.variances) != 2 or min(self.variances) <= 0:
            bad["variances"] = "needs two positive numbers"
        if self.cbam == "none":
            if self.attention_multiply > 1:
                bad["attention_multiply"] = "above 1 needs a cbam"
            if self.cbam_cascade:
                bad["cbam_cascade"] = "needs a cbam"
        if self.multipath and self.bifpn_repeats < 2:
            bad["multipath"] = "needs bifpn_repeats >= 2"
        if self.cbam == "laterals+neck" and self.neck == "fpn":
            bad["cbam"] = "laterals+neck needs neck: bifpn"
        if self.neck == "fpn":
            for key in ("acf", "dca", "pfr", "multipath"):
                if getattr(self, key):
                    bad[key] = "needs neck: bifpn"
        return bad


@dataclass
class AugmentConfig:
    """Augmentation switches; every ``*_prob`` of 0 switches its transform off."""

    crop_scales: list[float] = field(default_factory=lambda: [0.3, 0.45, 0.6, 0.8, 1.0, 1.4, 2.0])
    whole_image_prob: float = 0.0  # instead of a crop: the whole image, its long side fitted to the square
    flip_prob: float = 0.5
    photometric_prob: float = 0.5
    auto_augment_prob: float = 0.0
    mixup_prob: float = 0.0
    cutmix_prob: float = 0.0
    mosaic_prob: float = 0.0  # four photos share the square
    erase_prob: float = 0.0
    min_face: float = 4.0  # px, root of the resized area; smaller faces are ignored (no face, no background)

    def check(self) -> dict[str, str]:
        bad = {}
        if not self.crop_scales or min(self.crop_scales) <= 0 or max(self.crop_scales) > 4:
            bad["crop_scales"] = "needs at least one number, each in (0, 4]"
        bad |= _outside(self, *(f.name for f in dataclasses.fields(self) if f.name.endswith("_prob")))
        bad |= _below(self, 0, "min_face")
        if self.mixup_prob + self.cutmix_prob + self.mosaic_prob > 1:
            others = f"mixup_prob {self.mixup_prob:g} + cutmix_prob {self.cutmix_prob:g} + mosaic_prob"
            bad.setdefault("mosaic_prob", f"they exclude each other: {others} must be at most 1")
        return bad


@dataclass
class DataConfig:
    """Where images and labels are, and how batches are made."""

    root: str = "data/widerface"
    labels: list[str] = field(default_factory=lambda: ["train/label.txt"])  # images in <folder>/images
    machine_labels: str = ""  # detections by another model: fill in missing landmarks, never boxes; "" = off
    machine_ignore: float = 0.6  # with machine_labels: surer detections that no label covers are ignored; 0 = off
    machine_boxes: list[str] = field(default_factory=list)  # folders with loose boxes: take the machine's there
    repeat: int = 1  # passes over the images in one epoch; more where a GPU is done with them in a few seconds
    select_images: int = 300  # held out of train for choosing (train_select); 0 = none
    select_labels: str = "train/label.txt"  # which label file train_select is drawn from
    val_labels: str = ""  # "" = validate on train_select
    pipeline: Literal["loader", "device"] = "loader"
    cache: str = ""  # file for decoded uint8 images (device pipeline keeps them in memory); "" = none
    cache_side: int = 1024  # longer images are shrunk to this long side in the cache
    workers: int = 2
    on_bad_label: Literal["skip", "fail"] = "skip"  # skip: with its image, where a face cannot be read
    on_bad_image: Literal["skip", "fail"] = "skip"
    curriculum: bool = False  # easy -> hard over the first third of training
    balanced_events: bool = False  # stratified sampling over events
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def check(self) -> dict[str, str]:
        bad = {} if self.labels else {"labels": "needs at least one label file"}
        bad |= _outside(self, "machine_ignore") | _below(self, 1, "repeat")
        return bad | _below(self, 0, "select_images", "workers") | _below(self, 64, "cache_side")


@dataclass
class LossConfig:
    """Assignment and loss terms; a weight of 0 switches a term off."""

    assigner: Literal["iou", "atss", "simota"] = "atss"
    iou_threshold: float = 0.35
    atss_topk: int = 9
    simota_radius: float = 2.5
    classification: Literal["ohem_ce", "focal", "quality_focal"] = "quality_focal"
    negative_ratio: int = 7  # ohem_ce only
    box: Literal["smooth_l1", "iou", "giou", "diou", "ciou", "eiou"] = "diou"
    landmark: Literal["smooth_l1", "wing"] = "smooth_l1"
    class_weight: float = 1.0
    box_weight: float = 2.0
    landmark_weight: float = 0.1
    adaptive_weighting: bool = False  # by sample difficulty, normalised and clipped
    scale_weighting: bool = False  # by face size: small faces count more
    image_balance: float = 0.0  # an image of n matched anchors is weighted by n^-this; at 1 all images count the same
    refine_weight: float = 1.0  # of the stages before the last: cascade_refinement's coarse one, multipath's paths

    def check(self) -> dict[str, str]:
        bad = {}
        if not 0 < self.iou_threshold < 1:
            bad["iou_threshold"] = "must be in (0, 1)"
        bad |= _outside(self, "image_balance")
        bad |= _below(self, 0, "class_weight", "box_weight", "landmark_weight", "refine_weight")
        bad |= _below(self, 1, "atss_topk", "negative_ratio")
        if not 0 < self.simota_radius <= 100:  # in strides; that is any image
            bad["simota_radius"] = "must be above 0 and at most 100"
        return bad


TERMS = ("score", "box", "dense", "feature", "attention", "cross_scale", "temporal")


@dataclass
class DistillStage:
    """One stage of ProgressiveDistillation: ``until`` is the fraction of training at which it ends."""

    until: float = 1.0
    terms: dict[str, float] = field(default_factory=dict)  # term name -> weight inside the distillation sum
    gradient_balance: bool = False
    only_where_better: bool = False  # follow the teacher only where it beats the student

    @property
    def active(self) -> dict[str, float]:
        """The terms that take part: those with a weight above 0."""
        return {name: weight for name, weight in self.terms.items() if weight > 0}

    def check(self) -> dict[str, str]:
        bad = {}
        if not 0 < self.until <= 1:
            bad["until"] = "must be in (0, 1]"
        for name, weight in self.terms.items():
            if name not in TERMS:
                bad["terms"] = f"unknown term '{name}' (known: {', '.join(TERMS)})"
            elif weight < 0:
                bad["terms"] = f"'{name}' must be >= 0"
        return bad


def _default_stages() -> list[DistillStage]:
    return [
        DistillStage(0.375, {"feature": 1.0, "attention": 1.0, "score": 0.5, "box": 0.5}, True, False),
        DistillStage(0.75, {"score": 1.0, "box": 1.0, "feature": 0.25}, False, False),
        DistillStage(1.0, {"score": 1.0, "box": 1.0, "temporal": 0.5, "cross_scale": 0.1}, False, True),
    ]


@dataclass
class DistillConfig:
    """Knowledge distillation. ``teachers`` are checkpoint paths; empty and no self-teacher = no distillation."""

    teachers: list[str] = field(default_factory=list)
    ensemble: Literal["mean", "confidence"] = "mean"
    matching: Literal["auto", "anchor", "iou"] = "auto"  # auto = by anchor if anchors and assigner agree, else by IoU
    split_batch: bool = False  # each teacher sees its share of the batch, so two cost what one does; 'dense' only
    init_mimics: str = ""  # last.pth of a run whose first teachers were these: their mimics go on from there
    landmark_weight: float = 0.1  # beside the box, in the terms 'box', 'dense' and the EMA's 'temporal'
    self_teacher: bool = False  # the student's own weight EMA joins the teachers (in the last stage)
    self_best: bool = False  # the student's own best checkpoint joins the teachers (in the last stage)
    feature_attention: bool = True  # the feature term weighs places by the teacher's attention maps
    temporal_source: Literal["memory", "ema"] = "memory"  # past predictions of the image, or the EMA's present ones
    memory_boxes: int = 16  # remembered per image
    memory_images: int = 16384  # images remembered; 16384 x 16 boxes are 5 MB
    until: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])  # ends of the T/alpha steps
    temperature: list[float] = field(default_factory=lambda: [6.0, 4.0, 2.0, 1.0])
    alpha: list[float] = field(default_factory=lambda: [0.9, 0.7, 0.5, 0.3])
    stages: list[DistillStage] = field(default_factory=_default_stages)

    def check(self) -> dict[str, str]:
        bad = {}
        n = len(self.until)
        if not n or self.until != sorted(self.until) or self.until[-1] != 1.0 or self.until[0] <= 0:
            bad["until"] = "must rise from above 0 to exactly 1.0"
        for key in ("temperature", "alpha"):
            if len(getattr(self, key)) != n:
                bad[key] = f"needs {n} values, one per entry of until"
        bad |= _below(self, 0, "landmark_weight") | _below(self, 1, "memory_boxes", "memory_images")
        if any(t <= 0 for t in self.temperature):
            bad["temperature"] = "must be > 0"
        if any(not 0 <= a <= 1 for a in self.alpha):
            bad["alpha"] = "must be in [0, 1]"
        bad |= _unordered(self)
        used = {name for stage in self.stages for name in stage.active}
        if self.split_batch and used - {"dense"}:
            bad["split_batch"] = "serves the term 'dense' alone: the others need every teacher on every image"
        if self.init_mimics and not (self.teachers and "dense" in used):
            bad["init_mimics"] = "without effect: only the term 'dense' of loaded teachers has mimics"
        alone = not self.teachers and used & {"temporal", "cross_scale"}  # need no teacher, but must be switched on
        for key in ("self_teacher", "self_best"):
            if getattr(self, key) and not (self.own_weights_act or alone):
                bad[key] = "without effect: it teaches 'score' and 'box' of the last stage, which has neither"
        return bad

    @property
    def own_weights_act(self) -> bool:
        """Whether ``self_teacher`` and ``self_best`` teach anything: scores and boxes, in the last stage."""
        return bool(self.stages) and not self.stages[-1].active.keys().isdisjoint(("score", "box"))

    @property
    def enabled(self) -> bool:
        return bool(self.teachers) or self.self_teacher or self.self_best

    def schedule(self, progress: float) -> tuple[float, float, DistillStage]:
        """Temperature, alpha and stage at ``progress``, the share of training done: (epoch - 1) / epochs and up."""
        step = _step(self.until, progress)
        stage = self.stages[_step([s.until for s in self.stages], progress)]
        return self.temperature[step], self.alpha[step], stage


def _step(ends: list[float], progress: float) -> int:
    """Index of the first entry that ``progress`` has not reached; the last one from there on."""
    return next((i for i, end in enumerate(ends) if progress < end), len(ends) - 1)


@dataclass
class SizeStage:
    """One stage of progressive resizing: ``until`` is the fraction of training at which it ends."""

    until: float = 1.0
    size: int = 640
    batch_size: int = 32

    def check(self) -> dict[str, str]:
        bad = {}
        if not 0 < self.until <= 1:
            bad["until"] = "must be in (0, 1]"
        if self.size < 64 or self.size % 32:
            bad["size"] = "must be a multiple of 32, at least 64"
        if self.batch_size < 1:
            bad["batch_size"] = "must be >= 1"
        return bad


@dataclass
class TrainConfig:
    """Schedule, optimiser and bookkeeping of one run."""

    epochs: int = 350
    stages: list[SizeStage] = field(default_factory=lambda: [SizeStage()])
    multiscale: list[float] = field(default_factory=lambda: [1.0])  # size factors drawn per batch, rounded to 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 5e-4
    momentum: float = 0.9
    schedule: Literal["onecycle", "cosine"] = "onecycle"
    warmup: float = 0.05  # fraction of all steps
    final_lr: float = 0.01  # fraction of lr at the end
    clip_norm: float = 10.0
    ema_decay: float = 0.9998
    amp: Literal["auto", "off", "bf16"] = "auto"  # auto: see utils.engine.uses_bf16
    channels_last: bool = True
    sync_bn: bool = False
    backbone_weights: str = ""  # "imagenet", or a checkpoint whose backbone is taken; "" = random
    init_weights: str = ""  # whole-model start (fine-tuning); "" = none
    inherit_weights: str = ""  # a bigger trained network, taken over as far as it fits (models/inherit.py); "" = none
    freeze_stages: int = 0  # 1 = backbone stage1 frozen (weights and BN statistics), 2 = stage1+2, 3 = all
    unfreeze_at: float = 1.0  # fraction of training at which frozen stages thaw; 1.0 = never
    only: Literal["", "landmark_refinement"] = ""  # train this part of the network alone; "" = all of it
    freeze_bn_at: float = 1.0  # fraction of training from which BN statistics stand still; 1.0 = never
    backbone_lr: float = 1.0  # factor on lr for the backbone
    seed: int = 0
    deterministic: bool = False
    val_every: int = 10  # epochs; 0 = only at the end
    patience: int = 0  # stop early after so many validations without a better AP; 0 = never
    val_scale: Scale = "original"  # as test_widerface.py's --scale
    val_images: int = 0  # validate on so many of the held-out images, evenly spread; 0 = all
    save_every: int = 0  # extra checkpoint each so many steps, so that a kill in a long epoch loses little; 0 = off
    log_every: int = 20  # steps
    pictures: int = 4  # sample pictures to TensorBoard at each validation

    def check(self) -> dict[str, str]:
        bad = _unordered(self) | _below(self, 1, "epochs", "log_every")
        bad |= _below(self, 0, "val_every", "save_every", "pictures", "val_images", "patience")
        bad |= _below(self, 0, "weight_decay", "backbone_lr")
        bad |= _outside(self, "warmup", "final_lr", "unfreeze_at", "freeze_bn_at", "ema_decay", "momentum")
        for key in ("lr", "clip_norm"):
            if getattr(self, key) <= 0:
                bad[key] = "must be > 0"
        if not 0 <= self.freeze_stages <= 3:
            bad["freeze_stages"] = "must be 0, 1, 2 or 3"
        if not 0 <= self.seed <= 2**31:  # NumPy takes 32 bits, and processes add their rank
            bad["seed"] = "must be 0 to 2147483648"
        if isinstance(self.val_scale, float) and not in_range(self.val_scale):
            bad["val_scale"] = RANGE
        if not self.multiscale or min(self.multiscale) <= 0:
            bad["multiscale"] = "needs at least one number, each above 0"
        return bad


@dataclass
class Config:
    """One experiment: architecture, data, losses, distillation, training."""

    name: str = "v2_ultra"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check_together(self) -> dict[str, str]:
        """What is wrong of settings of several sections: asked of what a user wants, not of what a run stored."""
        bad = {}
        if self.model.cascade_refinement and not self.loss.refine_weight:
            bad["loss.refine_weight"] = "must be > 0 with model.cascade_refinement, whose heads learn from it alone"
        validates = self.train.val_every and (self.data.select_images or self.data.val_labels)
        needed = "(train.val_every, and data.select_images or data.val_labels)"
        if self.distill.self_best and self.distill.own_weights_act and not validates:
            bad["distill.self_best"] = f"without effect: which is best shows only where training validates {needed}"
        if self.train.patience and not validates:
            bad["train.patience"] = f"without effect: nothing is validated meanwhile {needed}"
        return bad


def load_config(path: str | Path, opts: list[str] | None = None) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides (values are YAML).

    A file whose ``base`` names another one, by its path from there, holds only what differs from that: mappings are
    merged, anything else is replaced. A base must be valid by itself.

    Args:
        path: a YAML file, or the bare name of one in ``configs/`` (``"v2_ultra"``).
        opts: overrides such as ``["train.epochs=10", "model.acf=true"]``.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type, impossible value.
    """
    file = Path(path)
    if not file.suffix and (not file.exists() or file.is_dir()):
        file = CONFIG_DIR / f"{file}.yaml"
    config = apply_opts(from_dict(Config, _read_tree(file, ()), str(file)), opts or [])
    for key, why in config.check_together().items():
        source = f"{file} with --opts" if opts else file
        raise ConfigError(f"{source}: '{key}' {why} (got {attrgetter(key)(config)!r})")
    return config


def apply_opts(config: Config, opts: list[str]) -> Config:
    """Change a config in place by ``section.key=value`` overrides, and return it; errors as :func:`load_config`."""
    touched = {}
    for opt in opts:
        node = _override(config, opt)
        touched[id(node)] = (node, opt)
    for node, opt in touched.values():  # after all of them: some values only fit together
        for key, why in node.check().items() if hasattr(node, "check") else ():
            raise ConfigError(f"--opts {opt}: '{key}' {why} (got {getattr(node, key)!r})")
    return config


def _read_tree(file: Path, above: tuple[Path, ...]) -> dict:
    """The nested dict of a YAML file, its ``base`` merged in; ``above``: the files that led here."""
    if file.resolve() in (f.resolve() for f in above):
        raise ConfigError(f"{above[-1]}: 'base' leads back to {file}")
    try:
        tree = yaml.safe_load(file.read_text("utf-8"))
    except OSError as e:
        if above:
            raise ConfigError(f"{above[-1]}: cannot read 'base' {file} ({e.strerror})") from None
        known = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
        raise ConfigError(f"{file}: cannot read the config ({e.strerror}); known names: {known}") from None
    except (yaml.YAMLError, ValueError) as e:  # the latter of text that is not UTF-8, and of dates that are none
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping of keys at the top, got {type(tree).__name__}")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str) or not base.isprintable() or not base:
        raise ConfigError(f"{file}: 'base' must be the path of another config (got {base!r})")
    under = _read_tree(file.parent / base, (*above, file))
    from_dict(Config, under, str(file.parent / base))  # its mistakes are reported with its name
    return _merged(under, tree)


def _merged(under: dict, over: dict) -> dict:
    """``over`` on top of ``under``: dicts are merged key by key, any other value is replaced."""
    both = [k for k in over if isinstance(over[k], dict) and isinstance(under.get(k), dict)]
    return under | over | {k: _merged(under[k], over[k]) for k in both}


def from_dict(cls: type, tree: Any, source: str, prefix: str = "") -> Any:
    """Build dataclass ``cls`` from nested dicts, checking keys, types and values; ``source`` names the file."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: {prefix.rstrip('.') or 'top level'}: expected keys, got {tree!r}")
    hints = typing.get_type_hints(cls)
    unknown = [k for k in tree if k not in hints]
    if unknown:
        raise ConfigError(f"{source}: unknown key '{prefix}{unknown[0]}' (known: {', '.join(hints)})")
    made = cls(**{k: _coerce(hints[k], v, source, f"{prefix}{k}") for k, v in tree.items()})
    if hasattr(made, "check"):
        for key, why in made.check().items():
            raise ConfigError(f"{source}: '{prefix}{key}' {why} (got {getattr(made, key)!r})")
    return made


def to_dict(config: Any) -> dict:
    """The plain nested dict of a config dataclass, as stored in checkpoints and read back by :func:`from_dict`."""
    return dataclasses.asdict(config)


def _coerce(hint: Any, value: Any, source: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{source}: '{key}' must be {expected} (got {value!r})")

    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, source, f"{key}.")
    if origin is Literal:
        if isinstance(value, bool) and "off" in args:  # YAML reads a bare off as false
            value = "off" if not value else value
        if isinstance(value, int) and not isinstance(value, bool) and str(value) in args:
            value = str(value)  # 1600 and "1600" mean the same
        if value not in args:
            raise wrong("one of " + ", ".join(map(str, args)))
        return value
    if origin is list:
        if not isinstance(value, list):
            raise wrong("a list")
        return [_coerce(args[0], v, source, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a mapping")
        return {_coerce(args[0], k, source, key): _coerce(args[1], v, source, f"{key}.{k}") for k, v in value.items()}
    if origin in (Union, types.UnionType):
        if typing.get_origin(args[0]) is not Literal or args[1:] != (float,):
            raise TypeError(f"unsupported field type {hint} of {key}")
        for either in args:
            with contextlib.suppress(ConfigError):
                return _coerce(either, value, source, key)
        raise wrong(f"one of {', '.join(typing.get_args(args[0]))}, or a number")
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("an integer")
        return value
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-3 as a string
            try:
                value = float(value)
            except ValueError:
                raise wrong("a number") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise wrong("a number")
        try:
            value = float(value)
        except OverflowError:  # an int may be larger than any float
            value = math.inf
        if math.isinf(value):
            raise wrong("a finite number")
        return value
    if not isinstance(value, hint):
        raise wrong(f"a {hint.__name__}")
    return value


def _override(config: Config, opt: str) -> Any:
    """Set one value, not yet checked against the others; returns the section it belongs to."""
    path, eq, text = opt.partition("=")
    if not eq:
        raise ConfigError(f"--opts {opt}: expected key=value")
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--opts {opt}: '{text}' is not a valid YAML value") from None
    *parents, last = path.split(".")
    node: Any = config
    for name in parents:
        node = getattr(node, name, None)
        if not dataclasses.is_dataclass(node):
            raise ConfigError(f"--opts {opt}: unknown key '{path}'")
    hints = typing.get_type_hints(type(node))
    if last not in hints:
        raise ConfigError(f"--opts {opt}: unknown key '{path}' (known here: {', '.join(hints)})")
    setattr(node, last, _coerce(hints[last], value, "--opts", path))
    return node


def add_opts(parser: argparse.ArgumentParser, text: str = "overrides, e.g. train.epochs=10") -> None:
    """The option ``--opts``; given several times, all of it counts."""
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)
