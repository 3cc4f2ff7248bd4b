"""Turn published checkpoints into ours.

    python -m utils.convert SRC DST [--arch v1|retinaface_mnet025]

The mapping is strict: every published tensor is used and every tensor of our network is filled; a key that is unknown
or missing, or a tensor of another shape, is an error. Only the counters ``thop`` leaves behind are dropped.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.featherface import build_model
from models.inherit import InheritError, inherit_backbone
from models.mobilenet import MobileNetV1
from utils.checkpoint import FORMAT, CheckpointError, inference_content, load_tensors, part_of, save_checkpoint
from utils.command import FINISHED, command
from utils.config import ModelConfig, load_config

ARCHITECTURES = {"v1": "bifpn.", "retinaface_mnet025": "fpn."}  # config name -> prefix only its checkpoints have
COUNTERS = ("total_ops", "total_params")

# published name -> ours, applied in this order to every key (levels: P3, P4, P5 are 0, 1, 2)
BACKBONE = [
    (r"^stage1\.0\.0\.", "stage1.0.conv."),
    (r"^stage1\.0\.1\.", "stage1.0.bn."),
    (r"^(stage\d\.\d)\.0\.(?!conv)", r"\1.0.conv."),
    (r"^(stage\d\.\d)\.1\.", r"\1.0.bn."),
    (r"^(stage\d\.\d)\.3\.", r"\1.1.conv."),
    (r"^(stage\d\.\d)\.4\.", r"\1.1.bn."),
]
CBAM = [
    (r"^bacbkbone_(\d)_cbam\.", r"backbone_attention.\1.cbam."),
    (r"^bif_cbam_(\d)\.", r"attention.\1.cbam."),
    (r"ChannelGate\.mlp\.1\.", "squeeze."),
    (r"ChannelGate\.mlp\.3\.", "excite."),
    (r"SpatialGate\.spatial\.conv\.", "spatial."),
    (r"SpatialGate\.spatial\.bn\.", "bn."),
]
NECK = [
    *((rf"^bifpn\.0\.p{i + 3}_down_channel\.", f"neck.laterals.{i}.") for i in range(3)),
    *((rf"^bifpn\.0\.p{i + 4}_down_channel_2\.", f"neck.extra_laterals.{i}.") for i in range(2)),
    (r"(laterals\.\d)\.0\.conv\.", r"\1.conv."),
    (r"(laterals\.\d)\.1\.", r"\1.bn."),
    (r"^bifpn\.(\d)\.", r"neck.repeats.\1."),
    (r"\.p4_w1$", ".fuse_p4_up.weight"),
    (r"\.p3_w1$", ".fuse_p3.weight"),
    (r"\.p(\d)_w2$", r".fuse_p\1.weight"),
    (r"\.conv4_up\.", ".conv_p4_up."),
    (r"\.conv3_up\.", ".conv_p3."),
    (r"\.conv(\d)_down\.", r".conv_p\1."),
    (r"\.depthwise_conv\.conv\.", ".depthwise."),
    (r"\.pointwise_conv\.conv\.", ".pointwise.conv."),
    (r"(\.conv_p\w+)\.bn\.", r"\1.pointwise.bn."),
    *((rf"^fpn\.output{i + 1}\.", f"neck.laterals.{i}.") for i in range(3)),
    (r"^fpn\.merge(1|2)\.", lambda m: f"neck.merge_p{int(m[1]) + 2}."),
    (r"^(neck\.(?:laterals\.\d|merge_p\d))\.0\.", r"\1.conv."),
    (r"^(neck\.(?:laterals\.\d|merge_p\d))\.1\.", r"\1.bn."),
]
CONTEXT = [
    *((rf"^ssh{i + 1}\.", f"context.{i}.") for i in range(3)),
    *((rf"^ssh{i + 1}_cs\.", f"shuffle.{i}.") for i in range(3)),
    (r"\.conv3X3\.", ".conv3."),
    (r"\.conv([57])[Xx]\1_(\d)\.", r".conv\1_\2."),
    (r"^(context\.\d\.conv\w+)\.0\.", r"\1.conv."),
    (r"^(context\.\d\.conv\w+)\.1\.", r"\1.bn."),
    (r"\.regular_conv\.", "."),
    (r"\.offset_conv\.", ".offset."),
    (r"\.modulator_conv\.", ".modulator."),
    (r"^(shuffle\.\d)\.1\.", r"\1.reduce.conv."),
    (r"^(shuffle\.\d)\.2\.", r"\1.reduce.bn."),
    (r"^(shuffle\.\d)\.3\.", r"\1.depthwise.conv."),
    (r"^(shuffle\.\d)\.4\.", r"\1.depthwise.bn."),
    (r"^(shuffle\.\d)\.5\.", r"\1.expand.conv."),
    (r"^(shuffle\.\d)\.6\.", r"\1.expand.bn."),
]
HEADS = [
    (r"^ClassHead\.(\d)\.conv1x1\.", r"heads.classes.\1."),
    (r"^BboxHead\.(\d)\.conv1x1\.", r"heads.boxes.\1."),
    (r"^LandmarkHead\.(\d)\.conv1x1\.", r"heads.landmarks.\1."),
]


def convert_state(
    published: Mapping[str, Tensor], arch: str | None = None
) -> tuple[str, ModelConfig, dict[str, Tensor]]:
    """Rename the tensors of a published state dict to ours, strictly.

    Args:
        published: key -> tensor, as ``torch.load`` gives it (a ``module.`` prefix and thop's counters are dropped).
        arch: name of the config; ``None`` = recognised by the keys.

    Returns:
        The config's name, its model section, and the state dict of that model.

    Raises:
        ValueError: an unknown or missing key, or a tensor of another shape; the text names it.
    """
    published = {k.removeprefix("module."): v for k, v in published.items()}
    published = {k: v for k, v in published.items() if k.rpartition(".")[2] not in COUNTERS}
    if arch is None:
        found = [name for name, prefix in ARCHITECTURES.items() if any(k.startswith(prefix) for k in published)]
        if len(found) != 1:
            raise ValueError("neither a published FeatherFace V1 nor a RetinaFace-MobileNet0.25; use --arch to insist")
        arch = found[0]
    config = load_config(arch).model
    wanted = build_model(config).state_dict()
    state: dict[str, Tensor] = {}
    for key, tensor in published.items():
        ours = rename(key)
        if ours not in wanted or ours in state:
            raise ValueError(f"key '{key}' has no place in '{arch}'")
        if not isinstance(tensor, Tensor) or tensor.shape != wanted[ours].shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"key '{key}' has shape {got}, '{arch}' needs {tuple(wanted[ours].shape)}")
        state[ours] = tensor
    for ours in wanted:
        if ours not in state:
            raise ValueError(f"nothing in it fills '{ours}' of '{arch}'")
    return arch, config, {k: state[k] for k in wanted}


def convert(src: str | Path, dst: str | Path, arch: str | None = None) -> str:
    """Convert the published checkpoint ``src`` to our format in ``dst``; returns the name of its config.

    Raises:
        CheckpointError: unreadable, already ours, not of ``arch``, or ``dst`` cannot be written or is ``src``.
    """
    if Path(src).resolve() == Path(dst).resolve():
        raise CheckpointError(f"{dst}: would overwrite the published file; choose another name")
    content = load_tensors(src)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise CheckpointError(f"{src}: already a FeatherFace checkpoint")
    try:
        name, config, state = convert_state(_state_dict(content, src), arch)
    except ValueError as e:
        raise CheckpointError(f"{src}: {e}") from None
    meta = {"source": Path(src).name, "note": "converted from published weights"}
    save_checkpoint(dst, inference_content(name, config, state, meta))
    return name


def rename(key: str) -> str:
    """Our name of a published key; a key that no rule knows comes back unchanged."""
    if key.startswith("body."):
        return "backbone." + _substitute(key.removeprefix("body."), BACKBONE)
    return _substitute(key, CBAM + NECK + CONTEXT + HEADS)


def load_backbone(backbone: MobileNetV1, path: str | Path) -> None:
    """Start a :class:`~models.mobilenet.MobileNetV1` from a file, strictly: its classifier or detector is left out.

    A backbone with a smaller last stage takes over as much of the file's as it has room for.

    Args:
        path: the ImageNet file (``mobilenetV1X0.25_pretrain.tar``), a published detector, or a checkpoint of ours.

    Raises:
        CheckpointError: unreadable, or it holds no such backbone, or only a smaller one.
    """
    state = _state_dict(load_tensors(path), path)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    ours = part_of(state, "backbone.")
    published = {k.removeprefix("body."): v for k, v in state.items() if k.startswith(("stage", "body.stage"))}
    renamed = {_substitute(k, BACKBONE): v for k, v in published.items()}
    state = ours or {k: v for k, v in renamed.items() if k.rpartition(".")[2] not in COUNTERS}
    try:
        last = state.get("stage3.0.1.bn.weight")
        blocks = 2 if any(k.startswith("stage3.1.") for k in state) else 1
        whole = MobileNetV1() if last is None else MobileNetV1(blocks, len(last))
        whole.load_state_dict(state)
        inherit_backbone(backbone, whole)
    except (RuntimeError, InheritError) as e:
        raise CheckpointError(
            f"{path}: no MobileNetV1 x0.25 backbone that fits: {str(e).splitlines()[-1].strip()}"
        ) from None


def _substitute(key: str, rules: list) -> str:
    for pattern, ours in rules:
        key = re.sub(pattern, ours, key)
    return key


def _state_dict(content: object, path: str | Path) -> dict:
    """The state dict in a file's content, which may be wrapped as training scripts do."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f"{path}: holds no state dict")
    return content


@command("utils.convert")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.convert", description=__doc__.splitlines()[0])
    parser.add_argument("src", help="published checkpoint (.pth)")
    parser.add_argument("dst", help="where to write ours")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), help="what SRC is (default: recognised by its keys)")
    args = parser.parse_args(argv)
    name = convert(args.src, args.dst, args.arch)
    print(f"{args.dst}: {name}")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
