"""What an ablation trains: the rows of each study, as config overrides on a common start.

Four studies: ``innovations`` (each module of plan A and plan B alone on a base without any, or taken away from a
network with all of them), ``ladder`` (the plan's steps, each on top of the one before), ``family`` (V1, V1 compact,
V2, V2 Ultra under one budget) and ``recipe`` (one network, each loss, schedule and way to choose crops in turn).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from utils.config import Config, ConfigError, load_config

log = logging.getLogger(__name__)

BUDGET = 250_000  # parameters: the law for V2 Ultra
PLAIN_ANCHORS = [[16, 32], [64, 128], [256, 512]]
SMART_AUGMENT = {
    "auto_augment_prob": 0.3,
    "mixup_prob": 0.1,
    "cutmix_prob": 0.1,
    "erase_prob": 0.1,
}
STUDIES = ("innovations", "ladder", "family", "recipe")
MODES = ("add-one", "leave-one-out")

# Every innovation switched off: the base of the innovations study.
OFF: dict[str, Any] = {
    "model.feature_reuse": False,
    "model.feature_reuse_before_heads": False,
    "model.attention_multiply": 1,
    "model.progressive_enhancement": 0,
    "model.multiscale_fusion": False,
    "model.dynamic_sharing": False,
    "model.sharing_skip_below": 0.0,
    "model.acf": False,
    "model.dca": False,
    "model.pfr": False,
    "model.cbam_cascade": False,
    "model.smart_head": False,
    "model.cascade_refinement": False,
    "model.multipath": False,
    "model.landmark_refinement": False,
    "model.anchors": PLAIN_ANCHORS,
    "loss.assigner": "iou",
    "distill.teachers": [],
    "distill.self_teacher": False,
    "distill.self_best": False,
}
# What the recipe study changes, one row each; the network stays as it is (DropBlock is gone after training).
RECIPE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("box_smooth_l1", "box loss: smooth L1", {"loss.box": "smooth_l1"}),
    ("box_giou", "box loss: GIoU", {"loss.box": "giou"}),
    ("box_diou", "box loss: DIoU", {"loss.box": "diou"}),
    ("box_ciou", "box loss: CIoU", {"loss.box": "ciou"}),
    ("box_eiou", "box loss: EIoU", {"loss.box": "eiou"}),
    ("class_ohem", "class loss: cross-entropy, hard negatives", {"loss.classification": "ohem_ce"}),
    ("class_focal", "class loss: focal", {"loss.classification": "focal"}),
    ("class_quality", "class loss: quality focal", {"loss.classification": "quality_focal"}),
    ("landmark_smooth_l1", "landmark loss: smooth L1", {"loss.landmark": "smooth_l1"}),
    ("landmark_wing", "landmark loss: wing", {"loss.landmark": "wing"}),
    ("adaptive_weighting", "AdaptiveLossWeighting by difficulty", {"loss.adaptive_weighting": True}),
    ("scale_weighting", "loss weighted by face size", {"loss.scale_weighting": True}),
    ("curriculum", "curriculum, easy to hard", {"data.curriculum": True}),
    ("balanced_events", "events drawn alike", {"data.balanced_events": True}),
    ("crops", "crops of 0.3 to 1.0: none that shrink", {"data.augment.crop_scales": [0.3, 0.45, 0.6, 0.8, 1.0]}),
    ("no_photometric", "no photometric distortion", {"data.augment.photometric_prob": 0.0}),
    ("auto_augment", "AutoAugment 0.3", {"data.augment.auto_augment_prob": 0.3}),
    ("mixup", "MixUp 0.1", {"data.augment.mixup_prob": 0.1}),
    ("cutmix", "CutMix 0.1", {"data.augment.cutmix_prob": 0.1}),
    ("mosaic", "mosaic 0.3", {"data.augment.mosaic_prob": 0.3}),
    ("erase", "RandomErase 0.1", {"data.augment.erase_prob": 0.1}),
    ("multiscale", "multi-scale batches", {"train.multiscale": [0.75, 1.0, 1.25]}),
    ("dropblock", "DropBlock 0.05", {"model.dropblock": 0.05}),
    ("cosine", "cosine instead of one cycle", {"train.schedule": "cosine"}),
    ("no_ema", "no EMA", {"train.ema_decay": 0.0}),
)
# What members of the family share with the study's config; losses, distillation and augmentation stay their own.
SHARED_TRAIN = (
    *("epochs", "stages", "multiscale", "ema_decay", "amp", "channels_last", "backbone_weights"),
    *("val_every", "val_scale", "val_images", "save_every", "log_every", "pictures"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. ``opts`` are overrides on ``config``, after the user's; ``predicted`` is in AP points."""

    name: str
    label: str
    plan: str
    config: str
    opts: tuple[str, ...]
    predicted: float | None = None
    tta: bool = False
    trained_as: str = ""  # the row whose training it shares; "" = its own

    @property
    def run(self) -> str:
        """Name of its training run, without the seed."""
        return self.trained_as or self.name


@dataclass(frozen=True)
class Study:
    """Rows to train and compare; the first one is what the others are compared with.

    ``sign`` is -1 where the rows lack what the reference has: the gain is then the reference's AP minus the row's.
    """

    name: str
    mode: str
    config: str
    opts: tuple[str, ...]
    rows: tuple[Row, ...]
    sign: int = 1

    @property
    def stem(self) -> str:
        """Of the report's file names."""
        return self.name if self.mode == MODES[0] else f"{self.name}_{self.mode}"

    def overrides(self, row: Row, seed: int) -> list[str]:
        """All overrides of one run, in the order in which they apply."""
        return [*self.opts, *row.opts, f"train.seed={seed}"]

    def load(self, row: Row, seed: int) -> Config:
        """The config of one run. Raises ConfigError."""
        try:
            return load_config(row.config, self.overrides(row, seed))
        except ConfigError as e:
            raise ConfigError(f"row {row.name}: {e}") from None


@dataclass(frozen=True)
class Innovation:
    """A module and the settings that switch it on; ``stacks`` = part of the network with everything on."""

    name: str
    label: str
    plan: str
    predicted: float | None
    on: dict[str, Any]
    stacks: bool = True


def build_study(
    name: str, config: str | Path, opts: Sequence[str] = (), mode: str = "add-one", only: Sequence[str] = ()
) -> Study:
    """The rows of a study.

    Args:
        name: of :data:`STUDIES`.
        config: YAML file or its bare name.
        opts: the user's overrides (budget, data); they apply to every row, before the row's own.
        mode: of :data:`MODES`; only the innovations study knows ``leave-one-out``.
        only: keep these rows (and the reference); a name asks for rows that are left out by default, too.

    Raises:
        ConfigError: an impossible config, unknown row, or nothing to measure AP on.
    """
    if mode != MODES[0] and name != "innovations":
        raise ConfigError(f"--mode {mode}: only the innovations study has it")
    cfg = load_config(config, list(opts))
    if not cfg.data.select_images and not cfg.data.val_labels:
        raise ConfigError(f"{config}: 'data.select_images' is 0: nothing is held out to measure AP on")
    if cfg.train.only:
        raise ConfigError(f"{config}: 'train.only' must be empty: rows differ in parts that it would not train")
    optional: tuple[str, ...] = ()
    if name == "innovations":
        rows = _leave_one_out(cfg, str(config)) if mode == MODES[1] else _add_one(cfg, str(config))
    elif name == "ladder":
        rows = _ladder(cfg, str(config))
    elif name == "recipe":
        rows = _recipe(cfg, str(config))
    else:
        rows, optional = _family(cfg, str(config), list(opts)), ("v1",)
    known = [row.name for row in rows]
    unknown = [n for n in only if n not in known]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: no such row in study {name} (known: {', '.join(known)})")
    rows = [r for r in rows if r.name in only or (r.name not in optional and (not only or r is rows[0]))]
    study = Study(name, mode, str(config), tuple(opts), tuple(rows), -1 if mode == MODES[1] else 1)
    for row in rows:
        study.load(row, cfg.train.seed)  # an impossible row is found before the first one trains
    return study


def innovations(cfg: Config) -> list[Innovation]:
    """Plan B, then plan A, with the settings ``cfg`` has for them, or the plan's where it has them off."""
    distill = cfg.distill
    if distill.enabled:
        teach = {f"distill.{k}": getattr(distill, k) for k in ("teachers", "self_teacher", "self_best")}
    else:
        teach = {"distill.teachers": ["v1"], "distill.self_teacher": cfg.distill.own_weights_act}
    assigner = "atss" if cfg.loss.assigner == "iou" else cfg.loss.assigner
    small = min(cfg.model.anchors[0]) < PLAIN_ANCHORS[0][0]
    eight = cfg.model.anchors if small else [[8, *PLAIN_ANCHORS[0]], *PLAIN_ANCHORS[1:]]
    neck = {"model.acf": True, "model.dca": True, "model.pfr": True}
    sharing = {"model.dynamic_sharing": True, "model.sharing_skip_below": cfg.model.sharing_skip_below}
    amplified, enhanced = cfg.model.attention_multiply, cfg.model.progressive_enhancement
    amplified = amplified if amplified > 1 else 3
    found = [
        Innovation("feature_recycling", "FeatureRecycling", "B", 1.0, {"model.feature_reuse": True}),
        Innovation(
            "feature_recycling_heads",
            "FeatureRecycling before the heads",
            "B",
            None,
            {"model.feature_reuse_before_heads": True},
        ),
        Innovation(
            "attention_amplification", "AttentionAmplification", "B", 0.8, {"model.attention_multiply": amplified}
        ),
        Innovation(
            "progressive_enhancement",
            "progressive_enhancement",
            "B",
            0.7,
            {"model.progressive_enhancement": enhanced or 3},
        ),
        Innovation("multiscale_fusion", "smart_multiscale_fusion", "B", None, {"model.multiscale_fusion": True}),
        Innovation("contextual_sharing", "ContextualSharing", "B", 0.5, sharing),
        Innovation("ultra_distillation", "UltraDistillation", "B", 1.5, teach),
        Innovation("acf", "AdaptiveContextFusion", "A", None, {"model.acf": True}),
        Innovation("dca", "DynamicChannelAllocation", "A", None, {"model.dca": True}),
        Innovation("pfr", "ProgressiveFeatureRefinement", "A", None, {"model.pfr": True}),
        Innovation("bifpn_ultra", "BiFPN_Ultra (ACF + DCA + PFR)", "A", None, neck),
        Innovation("cbam_cascade", "CBAM_Cascade", "A", None, {"model.cbam_cascade": True}),
        Innovation("smart_head", "SmartHead_Fusion", "A", None, {"model.smart_head": True}),
        Innovation("cascade_refinement", "CascadeRefinement (EDS)", "A", None, {"model.cascade_refinement": True}),
    ]
    for name in ("atss", "simota"):
        label = f"AdaptiveAnchors (EDS): {'ATSS' if name == 'atss' else 'SimOTA'}"
        found.append(Innovation(f"anchors_{name}", label, "A", None, {"loss.assigner": name}, name == assigner))
    found.append(Innovation("anchors_8px", "AdaptiveAnchors (EDS): 8 px", "A", None, {"model.anchors": eight}, small))
    found.append(Innovation("multipath", "MultiPath", "A", None, {"model.multipath": True}))
    return found


def common_start(cfg: Config, inherits: bool = True) -> dict[str, Any]:
    """Rows differ in shape, so weights of a whole network cannot start them all: only its backbone does.

    Args:
        inherits: whether the rows can inherit from ``train.inherit_weights``, being as wide in the neck.
    """
    source = cfg.train.init_weights or ("" if inherits else cfg.train.inherit_weights)
    start = {"distill.init_mimics": ""}  # they read the features of the network that they were trained with
    if source:
        start |= {"train.init_weights": "", "train.inherit_weights": "", "train.backbone_weights": source}
    return start


def _add_one(cfg: Config, config: str) -> list[Row]:
    start = {**OFF, **common_start(cfg)}
    rows = [Row("base", "base: every innovation off", "", config, changes(cfg, start))]
    for i in innovations(cfg):
        rows.append(Row(i.name, i.label, i.plan, config, changes(cfg, {**start, **i.on}), i.predicted))
    return rows


def _leave_one_out(cfg: Config, config: str) -> list[Row]:
    known = innovations(cfg)
    full = {**OFF, **common_start(cfg)}
    for i in known:
        full.update(i.on if i.stacks else {})
    rows = [Row("all_on", "all innovations on", "", config, changes(cfg, full))]
    for i in known:
        if i.stacks:
            without = {**full, **{key: OFF[key] for key in i.on}}
            rows.append(Row(f"no_{i.name}", f"without {i.label}", i.plan, config, changes(cfg, without), i.predicted))
    return rows


def _ladder(cfg: Config, config: str) -> list[Row]:
    """The plan's order; a rung keeps everything below it, and is left out where it adds nothing to that.

    TTA needs no training of its own.
    """
    by_name = {i.name: i for i in innovations(cfg)}
    last = cfg.train.stages[-1]
    own = {k: getattr(cfg.data.augment, k) for k in SMART_AUGMENT}
    # Mosaic is not of the plan, but where a config has it, it belongs to this rung.
    smart = {**(own if any(own.values()) else SMART_AUGMENT), "mosaic_prob": cfg.data.augment.mosaic_prob}
    smart = {f"data.augment.{k}": v for k, v in smart.items()}
    settings = {
        **OFF,
        **common_start(cfg, inherits=False),
        **dict.fromkeys(smart, 0.0),
        "loss.assigner": cfg.loss.assigner,  # not a rung: the whole ladder stands on the config's recipe
        "model.anchors": cfg.model.anchors,
        "model.out_channels": 32,
        "model.cbam_reduction": 32,
        "model.ssh_groups": 4,
        "train.stages": [stage(1.0, last.size, last.batch_size)],
    }
    teachers = cfg.distill.teachers or ["v1"]
    cut = {f"model.{k}": getattr(cfg.model, k) for k in ("out_channels", "cbam_reduction", "ssh_groups")}
    itself = cfg.distill.own_weights_act
    best = itself and bool(cfg.train.val_every)  # without validation none is best
    many = {"distill.teachers": teachers, "distill.self_teacher": itself, "distill.self_best": best}
    several = f"several teachers{', own EMA and best too' if best else ', own EMA too' if itself else ''}"
    rungs: list[tuple[str, str, str, dict[str, Any]]] = [
        ("channel_cut", f"channel cut: 32 -> {cfg.model.out_channels}", "core", cut),
        ("feature_reuse", "feature reuse", "core", by_name["feature_recycling"].on),
        ("attention", "attention amplification", "core", by_name["attention_amplification"].on),
        ("distillation", "distillation: one teacher", "core", {"distill.teachers": teachers[:1]}),
        ("enhancement", "progressive enhancement", "intelligence", by_name["progressive_enhancement"].on),
        ("dynamic_sharing", "dynamic sharing", "intelligence", by_name["contextual_sharing"].on),
        ("fusion", "multi-scale fusion", "intelligence", by_name["multiscale_fusion"].on),
        ("augmentation", "smart augmentation", "intelligence", smart),
        ("progressive_training", "progressive resizing", "final", {"train.stages": progressive_stages(cfg)}),
        ("multi_teacher", several, "final", many),
        ("tta", "test-time augmentation", "final", {}),
        ("multi_path", "multi-path", "final", by_name["multipath"].on),
    ]
    predicted = {
        "feature_reuse": 1.0,
        "attention": 0.8,
        "distillation": 1.5,
        "enhancement": 0.7,
        "dynamic_sharing": 0.5,
    }
    rows = [Row("v2_base", "V2 base: 32 channels, no innovation", "", config, changes(cfg, settings))]
    tta = False
    for name, label, plan, on in rungs:
        if name != "tta" and {**settings, **on} == settings:
            log.warning("%s: rung '%s' would train what the one before it trains; left out", config, name)
            continue
        settings = {**settings, **on}
        tta = tta or name == "tta"
        shared = rows[-1].name if name == "tta" else ""
        rows.append(Row(name, label, plan, config, changes(cfg, settings), predicted.get(name), tta, shared))
    return rows


def _recipe(cfg: Config, config: str) -> list[Row]:
    """The network stays as it is, so every row starts from the weights that the config names."""
    changed = [(name, label, changes(cfg, on)) for name, label, on in RECIPE]
    rows = [Row(name, label, "", config, on) for name, label, on in changed if on]  # else the config has it
    return [Row("as_is", "the config as it is", "", config, ()), *rows]


def _family(cfg: Config, config: str, opts: list[str]) -> list[Row]:
    data = {f"data.{k}": v for k, v in vars(cfg.data).items() if k != "augment"}
    train = {f"train.{k}": getattr(cfg.train, k) for k in SHARED_TRAIN}
    members = (("v1_compact", "V1 compact"), ("v1", "V1"), ("v2", "V2"))
    rows = []
    for name, label in members:
        settings = {**data, **train, **common_start(cfg, inherits=False)}
        if not load_config(name).distill.enabled:  # teachers that the user names are for the members that have some
            settings |= {key: value for key, value in OFF.items() if key.startswith("distill.")}
        rows.append(Row(name, label, "", name, changes(load_config(name, opts), settings)))
    name = f"{cfg.name}_config" if cfg.name in dict(members) else cfg.name
    return [*rows, Row(name, cfg.name, "", config, changes(cfg, common_start(cfg)))]


def stage(until: float, size: int, batch_size: int) -> dict[str, Any]:
    """A stage of progressive resizing as the config writes it."""
    return {"until": until, "size": size, "batch_size": batch_size}


def progressive_stages(cfg: Config) -> list[dict[str, Any]]:
    """The config's own stages; where it has one size only, half and three quarters of it come first."""
    if len(cfg.train.stages) > 1:
        return [vars(s) for s in cfg.train.stages]
    last = cfg.train.stages[-1]
    sizes = [max(64, round(last.size * part / 32) * 32) for part in (0.5, 0.75, 1.0)]
    return [stage(until, size, last.batch_size) for until, size in zip((0.375, 0.75, 1.0), sizes)]


def changes(cfg: Config, settings: dict[str, Any]) -> tuple[str, ...]:
    """The settings that differ from the config's own values, as overrides."""
    return tuple(f"{k}={json.dumps(_plain(v))}" for k, v in settings.items() if _plain(attrgetter(k)(cfg)) != _plain(v))


def _plain(value: Any) -> Any:
    """Dataclasses in lists (stages) as dicts, so that they compare with what YAML would give."""
    return [vars(v) if is_dataclass(v) else v for v in value] if isinstance(value, list) else value
