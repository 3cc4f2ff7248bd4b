"""FeatherFace V1, V2 and V2 Ultra (and RetinaFace-MobileNet0.25): one network assembled from a config.

backbone -> laterals -> BiFPN (+ACF, DCA, PFR) -> FeatureRecycling -> multiscale fusion -> ProgressiveEnhancement
-> CBAM (amplified / cascade) -> SSH (gated) -> shuffle -> heads (SmartHead, refinement, multi-path)
-> LandmarkRefinement
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import DropBlock2d

from layers.anchors import anchors_of
from models.bifpn import FPN, BiFPN
from models.cbam import CBAM, ResidualCBAM
from models.heads import Heads
from models.heads_ultra import CascadeRefinement, CBAM_Cascade, MultiPath, SmartHead_Fusion
from models.landmark_refinement import LandmarkRefinement
from models.mobilenet import MobileNetV1
from models.modules_v2_ultra import (
    AttentionAmplification,
    ContextualSharing,
    FeatureRecycling,
    ProgressiveEnhancement,
    SceneComplexity,
    SmartMultiscaleFusion,
)
from models.neck_ultra import BiFPN_Ultra
from models.ssh import SSH, ShuffleBlock
from utils.config import ModelConfig


class FeatherFace(nn.Module):
    """The detector; see :meth:`forward` for its outputs."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.variances = cfg.variances
        channels, levels = cfg.out_channels, range(len(cfg.strides))
        self.backbone = MobileNetV1(cfg.backbone_last_blocks, cfg.backbone_last_channels)
        widths = self.backbone.channels
        gated = cfg.cbam == "backbone+neck"
        self.backbone_attention = nn.ModuleList(
            ResidualCBAM(CBAM(c, cfg.cbam_reduction)) if gated else nn.Identity() for c in widths
        )
        self.neck = _build_neck(cfg, widths)
        needs_complexity = cfg.acf or cfg.dca or cfg.dynamic_sharing
        self.complexity = SceneComplexity(list(widths)) if needs_complexity else None
        self.dropblock = DropBlock2d(0.0, block_size=3)
        self.recycle = FeatureRecycling()
        self.fuse_scales = SmartMultiscaleFusion() if cfg.multiscale_fusion else nn.Identity()
        self.enhance = ProgressiveEnhancement(channels, cfg.progressive_enhancement)
        cbams = [_build_attention(cfg) for _ in levels if cfg.cbam != "none"]
        self.attention = CBAM_Cascade(cbams, channels) if cfg.cbam_cascade else nn.ModuleList(cbams)
        context = [SSH(channels, cfg.ssh, cfg.ssh_groups) for _ in levels]
        self.context = nn.ModuleList(
            ContextualSharing(c, cfg.sharing_skip_below or None) if cfg.dynamic_sharing else c for c in context
        )
        self.shuffle = nn.ModuleList(ShuffleBlock(channels) if cfg.shuffle else nn.Identity() for _ in levels)
        per_level = [len(sizes) for sizes in cfg.anchors]
        self.smart_head = SmartHead_Fusion(channels) if cfg.smart_head else None
        self.heads = Heads(channels, per_level, cfg.class_outputs)
        self.refinement = CascadeRefinement(channels, per_level) if cfg.cascade_refinement else None
        self.multipath = MultiPath(channels, cfg.bifpn_repeats - 1) if cfg.multipath else None
        self.landmark_refinement = None
        if cfg.landmark_refinement:
            self.landmark_refinement = LandmarkRefinement(channels, cfg.strides, cfg.anchors, cfg.variances)
        self._anchors = anchors_of(cfg)

    def forward(self, x: Tensor, features: bool = False) -> dict[str, Any]:
        """Normalised image ``[B, 3, H, W]`` (BGR minus mean) -> predictions for its N anchors.

        Returns:
            ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``, encoded against :meth:`anchors`. With
            ``features`` also lists of three ``[B, C, h, w]``: ``laterals``, ``neck``, ``context`` (what the heads
            see); ``attention``, three spatial gates ``[B, 1, h, w]`` (with CBAM); ``complexity [B]`` (with a module
            that reads it). With ``features``, and always in training, ``coarse`` (with cascade_refinement), a dict of
            the first stage's predictions, and ``paths`` (with multipath), a list of such dicts.
        """
        levels, per_repeat, seen = self._extract(x)
        context = self._add_context(levels, seen["laterals"], seen.get("complexity"))
        out, stages = self._predict(context, per_repeat[:-1])
        if self.landmark_refinement:
            out["landmarks"] = self.landmark_refinement(out["boxes"], out["landmarks"], seen["laterals"])
        if self.training or features:
            out |= stages
        if features:
            out |= {**seen, "context": context}
        return out

    def neck_features(self, x: Tensor) -> dict[str, Any]:
        """What :meth:`forward` gives with ``features``, up to attention only: ``laterals``, ``neck``, ``attention``,
        ``complexity``. Of V1 that is a fraction of the time: its deformable convolutions come later."""
        return self._extract(x)[2]

    def _extract(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]], dict[str, Any]]:
        """Backbone, neck and attention: the levels that SSH gets, the neck's levels per repeat, and the features."""
        feats = [attend(f) for attend, f in zip(self.backbone_attention, self.backbone(x))]
        complexity = self.complexity(feats) if self.complexity else None
        ultra = isinstance(self.neck, BiFPN_Ultra)
        per_repeat, laterals = self.neck(feats, complexity) if ultra else self.neck(feats)
        levels, gates = self._refine(per_repeat[-1], laterals)
        seen = {"laterals": laterals, "neck": per_repeat[-1]}
        if gates:
            seen["attention"] = gates
        if complexity is not None:
            seen["complexity"] = complexity
        return levels, per_repeat, seen

    def _refine(self, neck: list[Tensor], laterals: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What follows the neck on each level up to attention: features and spatial gates (none without CBAM)."""
        # A map smaller than a block (P5 of 64 px) stays whole: torchvision would ask for a block of even size.
        drop, least = self.dropblock, self.dropblock.block_size
        levels = [drop(f) if drop.training and min(f.shape[-2:]) >= least else f for f in neck]
        if self.cfg.feature_reuse:
            levels = self.recycle(levels, laterals)
        levels = [self.enhance(f) for f in self.fuse_scales(levels)]
        if self.cfg.cbam_cascade:
            return self.attention.attend(levels)
        if self.cfg.cbam == "none":
            return levels, []
        attended, gates = zip(*(attention.with_map(f) for attention, f in zip(self.attention, levels)))
        return list(attended), list(gates)

    def _add_context(self, levels: list[Tensor], laterals: list[Tensor], complexity: Tensor | None) -> list[Tensor]:
        """SSH, run as much as the scene needs, and shuffle: the input of the heads."""
        gate = (complexity,) if self.cfg.dynamic_sharing else ()
        levels = [shuffle(ssh(f, *gate)) for ssh, shuffle, f in zip(self.context, self.shuffle, levels)]
        return self.recycle(levels, laterals) if self.cfg.feature_reuse_before_heads else levels

    def _predict(self, context: list[Tensor], earlier: list[list[Tensor]]) -> tuple[dict, dict]:
        """Predictions, and those of the stages that need supervision of their own (``coarse``, ``paths``)."""
        tasks = self.attention.tasks(context) if self.cfg.cbam_cascade else (context, context, context)
        if self.smart_head:
            tasks = self.smart_head(*tasks)
        out, stages = self.heads(*tasks), {}
        if self.refinement:
            stages["coarse"] = out
            out = self.refinement(out, context)
        if self.multipath:
            out, stages["paths"] = self.multipath(out, earlier, self.heads)
        return dict(out), stages

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """Anchors ``[N, 4]`` (cxcywh, pixels) of an input size; the latest sizes are cached, so do not modify them."""
        return self._anchors(height, width, device)

    def set_progress(self, progress: float) -> None:
        """Tell the model how far training is (0..1): DropBlock ramps linearly to its configured probability."""
        self.dropblock.p = self.cfg.dropblock * min(max(progress, 0.0), 1.0)


def build_model(cfg: ModelConfig) -> FeatherFace:
    """The network a config describes, freshly initialised, in training mode."""
    return FeatherFace(cfg)


def _build_attention(cfg: ModelConfig) -> nn.Module:
    cbam = CBAM(cfg.out_channels, cfg.cbam_reduction)
    return AttentionAmplification(cbam, cfg.attention_multiply) if cfg.attention_multiply > 1 else ResidualCBAM(cbam)


def _build_neck(cfg: ModelConfig, widths: tuple[int, ...]) -> nn.Module:
    if cfg.neck == "fpn":
        return FPN(widths, cfg.out_channels)
    attention = None
    if cfg.cbam == "laterals+neck":
        attention = [ResidualCBAM(CBAM(cfg.out_channels, cfg.cbam_reduction)) for _ in widths]
    bifpn = BiFPN(widths, cfg.out_channels, cfg.bifpn_repeats, cfg.extra_laterals, attention)
    return BiFPN_Ultra(bifpn, cfg.out_channels, cfg.acf, cfg.dca, cfg.pfr) if cfg.acf or cfg.dca or cfg.pfr else bifpn
