"""Start a small network from a bigger trained one: every weight that has a counterpart is taken over, shrunk to fit.

What a teacher learnt from images the student never sees stays in its weights, so a student that begins as a compressed
teacher has less to learn than one that begins at random. Four ways of shrinking, each of a layer at a time:

- equal shapes (backbone, laterals, BiFPN repeats, CBAM, shuffle) are copied;
- a narrower last backbone stage keeps the channels that the next layer weighs most (Li et al. 2017, by L1 norm, times
  the batch norm's scale);
- a 3x3 convolution, deformable or not, becomes depthwise x pointwise: for each input channel the best rank-1
  approximation of its kernels (truncated SVD, as Jaderberg et al. 2014);
- heads: a softmax pair becomes one logit, and an anchor the teacher lacks predicts what its nearest one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.blocks import ConvBN, DeformableConv2d, SeparableConv
from models.featherface import FeatherFace
from models.heads import Heads
from models.mobilenet import MobileNetV1

SSH_CONVOLUTIONS = ("conv3", "conv5_1", "conv5_2", "conv7_2", "conv7_3")


class InheritError(RuntimeError):
    """A student cannot take over this teacher's weights; one line."""


@torch.no_grad()
def inherit(student: FeatherFace, teacher: FeatherFace) -> list[str]:
    """Take over a teacher's weights, in place.

    Args:
        student: as wide as the teacher in the neck, with at most as many BiFPN repeats; the rest may be smaller.
        teacher: trained, of any configuration with the same neck and strides.

    Returns:
        Names of the student's tensors that found no counterpart and stay as they were initialised.

    Raises:
        InheritError: the networks differ in the neck's kind or width.
    """
    ours, theirs = student.cfg, teacher.cfg
    for key in ("neck", "out_channels", "strides", "variances"):
        if getattr(ours, key) != getattr(theirs, key):
            raise InheritError(
                f"cannot inherit: model.{key} is {getattr(theirs, key)!r} there and {getattr(ours, key)!r} here"
            )
    before = {name: tensor.clone() for name, tensor in student.state_dict().items() if tensor.is_floating_point()}
    inherit_backbone(student.backbone, teacher.backbone)
    _copy_equal(student.backbone_attention, teacher.backbone_attention)
    _inherit_neck(student, teacher)
    _copy_equal(student.attention, teacher.attention)
    for mine, other in zip(student.context, teacher.context):
        _inherit_context(mine, other)
    _copy_equal(student.shuffle, teacher.shuffle)
    _inherit_heads(student.heads, teacher.heads, ours.anchors, theirs.anchors, ours.variances)
    after = student.state_dict()
    return [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


@torch.no_grad()
def inherit_backbone(student: MobileNetV1, teacher: MobileNetV1) -> None:
    """Copy stages 1 and 2; of stage 3 take the blocks the student has and the channels that matter most.

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


def _inherit_neck(student: FeatherFace, teacher: FeatherFace) -> None:
    mine, other = (getattr(m.neck, "bifpn", m.neck) for m in (student, teacher))
    same_p5 = student.backbone.channels == teacher.backbone.channels
    same_p5 = same_p5 and len(student.backbone.stage3) == len(teacher.backbone.stage3)
    for level, (a, b) in enumerate(zip(mine.laterals, other.laterals)):
        if level < 2 or same_p5:  # another P5 has other channels
            a.load_state_dict(b.state_dict())
    if not hasattr(mine, "repeats"):  # FPN
        _copy_equal(mine, other)
        return
    if len(mine.repeats) > len(other.repeats):
        raise InheritError(f"cannot inherit: {len(other.repeats)} BiFPN repeats there, {len(mine.repeats)} here")
    for place, repeat in enumerate(mine.repeats):  # the first and the last keep their roles
        source = round(place * (len(other.repeats) - 1) / max(len(mine.repeats) - 1, 1))
        state = other.repeats[source].state_dict()
        # the published last node carries a third, unused weight
        wanted = repeat.state_dict()
        repeat.load_state_dict({k: v[: len(wanted[k])] if k.startswith("fuse") else v for k, v in state.items()})
    _copy_equal(mine.lateral_attention, other.lateral_attention)


def _inherit_context(student: nn.Module, teacher: nn.Module) -> None:
    """One level's SSH, inside its ContextualSharing gate if it has one."""
    student, teacher = getattr(student, "block", student), getattr(teacher, "block", teacher)
    for name in SSH_CONVOLUTIONS:
        mine, other = getattr(student, name), getattr(teacher, name)
        if not isinstance(mine, SeparableConv):
            _copy_equal(mine, other)
            continue
        if isinstance(other, SeparableConv):
            mine.load_state_dict(other.state_dict())
            continue
        depthwise, pointwise = separate(plain_kernel(other.conv))
        mine.depthwise.weight.copy_(depthwise)
        mine.pointwise.conv.weight.copy_(pointwise)
        mine.pointwise.bn.load_state_dict(other.bn.state_dict())


def plain_kernel(conv: nn.Conv2d) -> Tensor:
    """The dense kernel ``[out, in, 3, 3]`` of a convolution; a deformable one's without offsets, its taps weighted by
    their modulators at rest (where the input says nothing)."""
    if not isinstance(conv, DeformableConv2d):
        return conv.weight
    rest = 2 * torch.sigmoid(conv.modulator.bias)
    return conv.weight * rest.view(1, 1, *conv.kernel_size)


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
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(student.bn, name).copy_(getattr(teacher.bn, name)[outputs])
    student.bn.num_batches_tracked.copy_(teacher.bn.num_batches_tracked)


def _copy_equal(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the tensors that have the same name and shape on both sides."""
    theirs = teacher.state_dict()
    mine = student.state_dict()
    student.load_state_dict(
        {k: theirs[k] if k in theirs and theirs[k].shape == v.shape else v for k, v in mine.items()}
    )
