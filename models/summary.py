"""Parameters and multiply-adds of a configured model, component by component, beside what the plan foresaw.

    python -m models.summary --config v2_ultra [--opts model.acf=true] [--size 640x480] [--json]

Parameters are true counts, ``sum(p.numel())``. MACs are multiply-adds of all convolutions (deformable ones included:
their sampling is not counted, their kernels, offsets and modulators are) and matrix products of one image.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.featherface import FeatherFace, build_model
from models.modules_v2_ultra import stop_skipping
from utils.command import FINISHED, command
from utils.config import add_opts, load_config

# component -> which parts of the model belong to it; the first match wins
COMPONENTS = {
    "backbone": r"backbone\.",
    "CBAM": r"(backbone_attention|attention\.(cbams\.)?\d|neck\.(bifpn\.)?lateral_attention)\.",
    "BiFPN": r"neck\.(?!acf|dca|pfr)",
    "SSH + shuffle": r"(context\.\d\.(?!slope|bias)|shuffle)",
    "heads": r"heads\.",
    "innovations": r"",
}

# parameters the plan foresaw (design of FeatherFace V2 Ultra); V1's column sums to 504K although it says 487K
PLANNED = {
    "v1": dict(zip(COMPONENTS, (213_000, 22_000, 114_000, 148_000, 7_000, 0)), total=487_000),
    "v2": dict(zip(COMPONENTS, (213_000, 1_200, 18_000, 12_000, 12_000, 0)), total=256_000),
    "v2_ultra": dict(zip(COMPONENTS, (213_000, 600, 14_000, 8_000, 10_000, 1_000)), total=246_000),
}
PLANNED |= dict.fromkeys(("v2_ultra_plan", "v2_ultra_full"), PLANNED["v2_ultra"])


def summarize(model: FeatherFace, name: str, size: tuple[int, int]) -> dict:
    """Count a model.

    Args:
        name: of its config, which decides the planned column.
        size: (width, height) of the input in pixels.

    Returns:
        ``total`` (parameters), ``macs``, and ``components``: name -> ``plan`` (or None), ``parameters``, ``macs``.
    """
    plan = PLANNED.get(name, {})
    rows = {c: {"plan": plan.get(c), "parameters": 0, "macs": 0} for c in COMPONENTS}
    for key, parameter in model.named_parameters():
        rows[_component(key)]["parameters"] += parameter.numel()
    for key, macs in count_macs(model, size).items():
        rows[_component(key)]["macs"] += macs
    return {
        "name": name,
        "total": sum(row["parameters"] for row in rows.values()),
        "plan": plan.get("total"),
        "macs": sum(row["macs"] for row in rows.values()),
        "size": list(size),
        "components": rows,
    }


def count_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of one ``(width, height)`` image by the module that does them, parents not counted twice."""
    model = stop_skipping(copy.deepcopy(model)).eval()
    x = torch.zeros(1, 3, size[1], size[0], device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_flops})
    with counter, torch.no_grad():
        model(x)
    root = type(model).__name__
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.startswith(root)}
    own = dict(flops)
    for name in flops:
        parent = name.rpartition(".")[0]
        while parent and parent not in flops:
            parent = parent.rpartition(".")[0]
        if parent:
            own[parent] -= flops[name]
    return {name.removeprefix(root).lstrip("."): count // 2 for name, count in own.items() if count}


def _component(key: str) -> str:
    return next(name for name, pattern in COMPONENTS.items() if re.match(pattern, f"{key}."))


def _deform_flops(x: torch.Size, weight: torch.Size, *args, out_shape: torch.Size, **kwargs) -> int:
    """Of a deformable convolution's kernel: the same as of a plain one (two per multiply-add)."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _table(summary: dict) -> str:
    lines = [f"{'component':<14} {'planned':>9} {'true':>9} {'MMACs':>9}"]
    total = {"plan": summary["plan"], "parameters": summary["total"], "macs": summary["macs"]}
    for name, row in [*summary["components"].items(), ("total", total)]:
        plan = "-" if row["plan"] is None else f"{row['plan']:,}"
        lines.append(f"{name:<14} {plan:>9} {row['parameters']:>9,} {row['macs'] / 1e6:>9.1f}")
    return "\n".join(lines)


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(int(v) for v in match.groups()) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT in pixels")
    return int(match[1]), int(match[2])


@command("models.summary")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.summary", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, or the name of one in configs/")
    add_opts(parser, "overrides, e.g. model.acf=true")
    parser.add_argument(
        "--size", type=parse_size, default=(640, 480), help="input WIDTHxHEIGHT for MACs (default 640x480)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.opts)
    summary = summarize(build_model(config.model), config.name, args.size)
    print(f"{config.name} at {args.size[0]}x{args.size[1]}")
    print(_table(summary))
    if args.json:
        print(json.dumps(summary))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
