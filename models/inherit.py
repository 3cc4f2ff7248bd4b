"""Start a small network from a bigger trained one: what has a counterpart is taken over, shrunk to fit.

What a teacher learnt from images the student never sees stays in its weights, so a student that begins as a compressed
teacher has less to learn than one that begins at random. Module by module:

- equal shapes (backbone, laterals, BiFPN repeats, CBAM, shuffle, the Ultra modules) are copied, all or nothing;
- a narrower last backbone stage keeps the channels that the next layer weighs most (Li et al. 2017, by L1 norm, times
  the batch norm's scale);
- a 3x3 convolution, deformable or not, becomes depthwise x pointwise: for each input channel the best rank-1
  approximation of its kernels (truncated SVD, as Jaderberg et al. 2014);
- heads: a softmax pair becomes one logit, and an anchor the teacher lacks predicts what its nearest one does.

What fits none of these stays as it was initialised, and is named.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.blocks import ConvBN, DeformableConv2d, SeparableConv
from models.featherface import FeatherFace
from models.heads import Heads
from models.heads_ultra import CBAM_Cascade
from models.mobilenet import MobileNetV1
from models.modules_v2_ultra import AttentionAmplification, ContextualSharing

log = logging.getLogger("featherface")

SSH_CONVOLUTIONS = ("conv3", "conv5_1", "conv5_2", "conv7_2", "conv7_3")


class InheritError(RuntimeError):
    """A student cannot take over this teacher's weights; one line."""


@torch.no_grad()
def inherit(student: FeatherFace, teacher: FeatherFace) -> list[str]:
    """Take over a teacher's weights, in place; both on the CPU.

    Args:
        student: as wide as the teacher in the neck, with at most as many BiFPN repeats; the rest may be smaller.
        teacher: trained, of any configuration with the same neck.

    Where V1's unused third fusion weight of P5 is not 0, the student's P5 starts too strong: that is logged.

    Returns:
        Names of the student's tensors that are still as they were initialised.

    Raises:
        InheritError: the networks differ in the neck's kind or width, or the student has the bigger backbone, more
            repeats or more class outputs.
    """
    ours, theirs = student.cfg, teacher.cfg
    for key in ("neck", "out_channels", "variances"):
        if getattr(ours, key) != getattr(theirs, key):
            raise InheritError(
                f"cannot inherit: model.{key} is {getattr(theirs, key)!r} there and {getattr(ours, key)!r} here"
            )
    before = {name: tensor.clone() for name, tensor in student.state_dict().items() if tensor.is_floating_point()}
    kept = inherit_backbone(student.backbone, teacher.backbone)
    same_depth = len(student.backbone.stage3) == len(teacher.backbone.stage3)
    for level, pair in enumerate(zip(student.backbone_attention, teacher.backbone_attention)):
        if level < 2 or same_depth:
            _copy(*pair)
    if same_depth:
        _copy(student.complexity, teacher.complexity)
    _inherit_neck(student.neck, teacher.neck, kept if same_depth else None)
    _inherit_attention(student.attention, teacher.attention)
    for pair in zip(student.context, teacher.context):
        _inherit_context(*pair)
    for pair in zip(student.shuffle, teacher.shuffle):
        _copy(*pair)
    for name in ("smart_head", "refinement", "multipath", "landmark_refinement"):
        _copy(getattr(student, name), getattr(teacher, name))
    _inherit_heads(student.heads, teacher.heads, ours.anchors, theirs.anchors, ours.variances)
    after = student.state_dict()
    return [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


@torch.no_grad()
def inherit_backbone(student: MobileNetV1, teacher: MobileNetV1) -> Tensor:
    """Copy stages 1 and 2; of stage 3 take the blocks the student has and the channels that matter most.

    Returns:
        Which channels of the teacher's last common block the student's P5 has.

    Raises:
        InheritError: the student's last stage is bigger than the teacher's.
    """
    if len(student.stage3) > len(teacher.stage3) or student.channels[2] > teacher.channels[2]:
        raise InheritError("cannot inherit: the last backbone stage is smaller there than here")
    student.stage1.load_state_dict(teacher.stage1.state_dict())
    student.stage2.load_state_dict(teacher.stage2.state_dict())
    inputs = torch.arange(student.channels[1])
    for i, (mine, other) in enumerate(zip(student.stage3, teacher.stage3)):
        importance = other[1].bn.weight.abs()
        if i + 1 < len(teacher.stage3):
            importance = importance * teacher.stage3[i + 1][0].conv.weight.abs().sum((1, 2, 3))
        kept = importance.topk(student.channels[2]).indices.sort().values
        _take(mine[0], other[0], outputs=inputs)
        _take(mine[1], other[1], outputs=kept, inputs=inputs)
        inputs = kept
    return inputs


def _inherit_neck(student: nn.Module, teacher: nn.Module, p5: Tensor | None) -> None:
    """``p5``: which of the teacher's P5 channels the student has; None = others, its lateral starts anew."""
    for name in ("acf", "dca", "pfr"):
        _copy(getattr(student, name, None), getattr(teacher, name, None))
    student, teacher = getattr(student, "bifpn", student), getattr(teacher, "bifpn", teacher)
    everything = torch.arange(student.laterals[0].conv.out_channels)
    for kind, first in (("laterals", 0), ("extra_laterals", 1)):
        pairs = zip(getattr(student, kind, ()), getattr(teacher, kind, ()))
        for level, (mine, other) in enumerate(pairs, first):
            if level < 2:
                _copy(mine, other)
            elif p5 is not None:
                _take(mine, other, outputs=everything, inputs=p5)
    for name in ("merge_p3", "merge_p4"):  # FPN
        _copy(getattr(student, name, None), getattr(teacher, name, None))
    if not hasattr(student, "repeats"):
        return
    mine, other = student.repeats, teacher.repeats
    if len(mine) > len(other):
        raise InheritError(f"cannot inherit: {len(other)} BiFPN repeats there, {len(mine)} here")
    for place, repeat in enumerate(mine):  # the first and the last keep their roles
        wanted = repeat.state_dict()
        state = other[round(place * (len(other) - 1) / max(len(mine) - 1, 1))].state_dict()
        # V1's last node carries a third weight that nothing uses; it is 0, as good as none, in the published weights
        for key in (k for k in state if k.startswith("fuse")):
            weight = torch.cat([state[key], torch.zeros(3)])
            state[key], cut = weight[: len(wanted[key])], weight[len(wanted[key]) :].relu().sum()
            gain = 1 + cut / state[key].relu().sum().clamp(min=1e-4)
            if gain > 1.01:
                log.warning(
                    "repeat %d, %s: an unused weight is not 0 there; P5 starts %.2f times as strong", place, key, gain
                )
        repeat.load_state_dict(state)
    for pair in zip(student.lateral_attention, teacher.lateral_attention):
        _copy(*pair)


def _inherit_attention(student: nn.Module, teacher: nn.Module) -> None:
    """The neck's CBAMs, plain, amplified or in a cascade; a cascade's other stages only from a cascade."""
    if _copy(student, teacher):
        return
    mine, other = (m.cbams if isinstance(m, CBAM_Cascade) else m for m in (student, teacher))
    for a, b in zip(mine, other):
        uses, known = (list(m.uses) if isinstance(m, AttentionAmplification) else [m.cbam] for m in (a, b))
        for i, use in enumerate(uses):
            _copy(use, known[min(i, len(known) - 1)])


def _inherit_context(student: nn.Module, teacher: nn.Module) -> None:
    """One level's SSH, inside its ContextualSharing gate if it has one."""
    if isinstance(student, ContextualSharing) and isinstance(teacher, ContextualSharing):
        student.slope.copy_(teacher.slope)
        student.bias.copy_(teacher.bias)
    student, teacher = (m.block if isinstance(m, ContextualSharing) else m for m in (student, teacher))
    for name in SSH_CONVOLUTIONS:
        mine, other = getattr(student, name), getattr(teacher, name)
        if _copy(mine, other) or isinstance(other, SeparableConv):
            continue
        if isinstance(mine, SeparableConv):
            depthwise, pointwise = separate(plain_kernel(other.conv))
            mine.depthwise.weight.copy_(depthwise)
            mine.pointwise.conv.weight.copy_(pointwise)
            _copy(mine.pointwise.bn, other.bn)
        elif mine.conv.groups == 1:
            mine.conv.weight.copy_(plain_kernel(other.conv))
            _copy(mine.bn, other.bn)


def plain_kernel(conv: nn.Conv2d) -> Tensor:
    """The dense kernel ``[out, in, k, k]`` of a convolution; a grouped one's is zero between groups, a deformable one's
    without offsets, its taps weighted by their modulators at rest (where the input says nothing)."""
    if isinstance(conv, DeformableConv2d):
        rest = 2 * torch.sigmoid(conv.modulator.bias)
        return conv.weight * rest.view(1, 1, *conv.kernel_size)
    width = conv.in_channels // conv.groups
    kernel = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.kernel_size)
    for g, part in enumerate(conv.weight.chunk(conv.groups)):
        kernel[g * len(part) : (g + 1) * len(part), g * width : (g + 1) * width] = part
    return kernel


def separate(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The depthwise ``[in, 1, k, k]`` and pointwise ``[out, in, 1, 1]`` kernels whose product is the best rank-1
    approximation of ``[out, in, k, k]``, input channel by input channel (Frobenius norm)."""
    out, channels, *size = kernel.shape
    u, s, v = torch.linalg.svd(kernel.transpose(0, 1).reshape(channels, out, -1), full_matrices=False)
    share = s[:, :1].sqrt()  # the two factors equally large, so that both learn at the same pace
    return (v[:, 0] * share).view(channels, 1, *size), (u[:, :, 0] * share).t().reshape(out, channels, 1, 1)


def _inherit_heads(
    student: Heads,
    teacher: Heads,
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    variances: Sequence[float],
) -> None:
    for level, (sizes, known) in enumerate(zip(ours, theirs)):
        nearest = [min(range(len(known)), key=lambda i, s=s: abs(math.log(known[i] / s))) for s in sizes]
        # Of one pixel box, the deltas against an anchor r times as small are r times as large (log sides: + log r).
        ratio = torch.tensor([known[n] / s for n, s in zip(nearest, sizes)])
        for kind in ("classes", "boxes", "landmarks"):
            mine, other = getattr(student, kind)[level], getattr(teacher, kind)[level]
            weight = other.weight.unflatten(0, (len(known), -1))[nearest]
            bias = other.bias.unflatten(0, (len(known), -1))[nearest]
            if kind == "classes" and teacher.class_outputs > student.class_outputs:
                weight, bias = weight[:, 1:] - weight[:, :1], bias[:, 1:] - bias[:, :1]
            elif kind == "classes" and teacher.class_outputs < student.class_outputs:
                raise InheritError("cannot inherit: one class output there, two here")
            elif kind != "classes":
                scaled = slice(0, 2) if kind == "boxes" else slice(None)
                weight[:, scaled] *= ratio.view(-1, 1, 1, 1, 1)
                bias[:, scaled] *= ratio.view(-1, 1)
                if kind == "boxes":
                    bias[:, 2:] += ratio.log().view(-1, 1) / variances[1]
            mine.weight.copy_(weight.flatten(0, 1))
            mine.bias.copy_(bias.flatten())


def _take(student: ConvBN, teacher: ConvBN, outputs: Tensor, inputs: Tensor | None = None) -> None:
    """Take over the given output channels, and of a dense convolution only the given input channels."""
    weight = teacher.conv.weight[outputs]
    student.conv.weight.copy_(weight if inputs is None else weight[:, inputs])
    if student.conv.bias is not None:
        student.conv.bias.copy_(teacher.conv.bias[outputs])
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(student.bn, name).copy_(getattr(teacher.bn, name)[outputs])
    student.bn.num_batches_tracked.copy_(teacher.bn.num_batches_tracked)


def _copy(student: nn.Module | None, teacher: nn.Module | None) -> bool:
    """Copy a module whose tensors all fit, by name and shape, else leave it alone; whether it was copied."""
    if student is None or teacher is None:
        return False
    mine, other = ({k: v.shape for k, v in m.state_dict().items()} for m in (student, teacher))
    if mine == other:
        student.load_state_dict(teacher.state_dict())
    return mine == other
