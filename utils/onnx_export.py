"""A network as an ONNX graph, in two forms.

- raw: normalised BGR float ``images [B, 3, H, W]`` -> ``logits [B, N]``, ``boxes [B, N, 4]``, ``landmarks [B, N, 10]``
  (encoded), exactly what the PyTorch module returns; any height and width. For a teacher also its neck's features,
  ``neck_p3``, ``neck_p4`` and ``neck_p5``, each ``[B, C, h, w]``.
- end-to-end: RGB ``images [B, 3, H, W]`` in 0..255 -> ``boxes [M, 4]``, ``scores [M]``, ``landmarks [M, 5, 2]`` in
  pixels and ``batch_index [M]``, the picture each face is in; faces of a picture stand together, best first. Inside:
  normalisation, padding, anchors, decoding, NMS, clipping. Two optional inputs ``score_threshold [1]`` and
  ``nms_threshold [1]`` replace the stored thresholds.

The TorchScript exporter is used (``dynamo=False``): the newer one cannot solve the size arithmetic of the pyramid
(``ceil(H / 8)``, ``ceil(H / 16)``, ...) for dynamic heights and widths, in torch 2.11 and 2.12 alike.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from data.preprocess import STRIDE, normalise, pad_to_stride
from layers.anchors import decode_boxes, decode_landmarks
from models.featherface import FeatherFace
from models.fuse import fuse_for_inference
from models.heads import OUTPUTS
from models.image_pyramid import ImagePyramid, network_anchors
from utils.command import Problem
from utils.config import ConfigError, ModelConfig, to_dict
from utils.files import whole

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 17
DEFORM_OPSET = 19  # the first with DeformConv
MAX_OPSET = 20  # of the TorchScript exporter
FEATURES = ("neck_p3", "neck_p4", "neck_p5")  # what a teacher's file has besides
METADATA = "featherface"  # key of the JSON that makes a file self-describing
FORMAT = "featherface-onnx-1"
KEEP = 750  # faces per picture at most, as FaceDetector's keep_k

ImageType = Literal["uint8", "float"]


class ExportError(Problem, RuntimeError):
    """The model cannot be exported or written; its text is one line."""


class RawOutputs(nn.Module):
    """The network for inference, batch norms folded, its outputs as a tuple in the order of :data:`OUTPUTS`, with
    ``features`` followed by :data:`FEATURES`."""

    def __init__(self, model: FeatherFace | ImagePyramid, features: bool = False):
        super().__init__()
        self.model = fuse_for_inference(model)
        self.features = features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.model(images, features=True) if self.features else self.model(images)
        return (*(out[key] for key in OUTPUTS), *(out["neck"] if self.features else ()))


def export_raw(model: FeatherFace | ImagePyramid, opset: int | None = None, features: bool = False) -> ModelProto:
    """The raw form; ``opset`` defaults to 17, or 19 for deformable convolutions (V1); ``features``: for a teacher.

    Raises:
        ConfigError: an opset that cannot express the model.
        ImportError: onnx is not installed.
    """
    least = DEFORM_OPSET if model.cfg.ssh == "deformable" else OPSET
    opset = opset or least
    if not least <= opset <= MAX_OPSET:
        why = ": its deformable convolutions need DeformConv" if least == DEFORM_OPSET else ""
        raise ConfigError(f"opset {opset}: this model needs {least} to {MAX_OPSET}{why}")
    if least == DEFORM_OPSET:
        torch.onnx.register_custom_op_symbolic("torchvision::deform_conv2d", _deform_conv, DEFORM_OPSET)
    device = next(model.parameters()).device
    example = torch.zeros(2, 3, 96, 64, device=device)
    axes = {name: {0: "batch", 1: "anchors"} for name in OUTPUTS}
    axes["images"] = {0: "batch", 2: "height", 3: "width"}
    more = FEATURES if features else ()
    axes |= {name: {0: "batch", 2: f"{name}_height", 3: f"{name}_width"} for name in more}
    return _trace(RawOutputs(model, features), (example,), ["images"], [*OUTPUTS, *more], axes, opset)


def export_end_to_end(
    raw: ModelProto,
    model: FeatherFace | ImagePyramid,
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
    image_type: ImageType = "uint8",
) -> ModelProto:
    """The end-to-end form around a raw one, float or int8.

    Args:
        raw: from :func:`export_raw`, perhaps quantised since.
        model: what it was made of, for its anchors and variances.
        score_threshold, nms_threshold: stored in the graph as defaults of the optional inputs.
        image_type: of the input's samples, 0..255 either way.
    """
    import onnx
    from onnx import compose, helper, numpy_helper

    opset = next(o.version for o in raw.opset_import if o.domain in ("", "ai.onnx"))
    frame = torch.zeros(2, 3, 50, 70, dtype=torch.uint8 if image_type == "uint8" else torch.float32)
    spatial = {0: "batch", 2: "height", 3: "width"}
    padded = {0: "batch", 2: "padded_height", 3: "padded_width"}
    before = _trace(_Prepare(), (frame,), ["images"], ["padded"], {"images": spatial, "padded": padded}, opset)
    example = (frame, torch.zeros(2, 3, 64, 96), *_blank(model, 64, 96), torch.tensor([0.5]), torch.tensor([0.4]))
    limits = ["score_threshold", "nms_threshold"]
    results = ["boxes", "scores", "landmarks", "batch_index"]
    axes = {"images": spatial, "padded": padded, **{n: {0: "batch", 1: "anchors"} for n in OUTPUTS}}
    renamed = {"raw_boxes": axes.pop("boxes"), "raw_landmarks": axes.pop("landmarks")}
    inputs = ["images", "padded", "logits", "raw_boxes", "raw_landmarks", *limits]
    after = _trace(_Finish(model), example, inputs, results, axes | renamed | {n: {0: "faces"} for n in results}, opset)

    parts = [compose.add_prefix(p, f"{name}/") for name, p in zip(("before", "net", "after"), (before, raw, after))]
    links = [("images", "before/images"), ("images", "after/images")]
    links += [("before/padded", "net/images"), ("before/padded", "after/padded")]
    links += [
        ("net/logits", "after/logits"),
        ("net/boxes", "after/raw_boxes"),
        ("net/landmarks", "after/raw_landmarks"),
    ]
    links += [(name, f"after/{name}") for name in limits]
    wires = {end: helper.make_node("Identity", [start], [end], name=f"{start}->{end}") for start, end in links}
    nodes = []
    for part in parts:
        nodes += [wires[i.name] for i in part.graph.input if i.name in wires]
        nodes += part.graph.node
    nodes += [helper.make_node("Identity", [f"after/{n}"], [n], name=n) for n in results]
    ports = {v.name: v for v in (*before.graph.input, *after.graph.input, *after.graph.output)}
    graph = helper.make_graph(
        nodes,
        "featherface",
        [ports[name] for name in ("images", *limits)],
        [ports[name] for name in results],
        [i for part in parts for i in part.graph.initializer]
        # an initializer of an input's name is its default
        + [
            numpy_helper.from_array(torch.tensor([v]).numpy(), n)
            for n, v in zip(limits, (score_threshold, nms_threshold))
        ],
    )
    domains = {o.domain: o for part in parts for o in part.opset_import}
    version = max(part.ir_version for part in parts)
    model = helper.make_model(graph, opset_imports=list(domains.values()), ir_version=version)
    onnx.checker.check_model(model)
    return model


def describe(proto: ModelProto, cfg: ModelConfig, name: str, **more: Any) -> None:
    """Store what :mod:`utils.onnx_backend` needs to know in a graph: architecture, name and ``more`` plain values."""
    from onnx import helper

    helper.set_model_props(
        proto, {METADATA: json.dumps({"format": FORMAT, "name": name, "model": to_dict(cfg), **more})}
    )


def write(path: str | Path, content: bytes) -> None:
    """Write a whole file or nothing. Raises ExportError."""
    try:
        with whole(path) as part:
            part.write_bytes(content)
    except OSError as e:
        raise ExportError(f"{path}: cannot write the file ({e.strerror or e})") from None


def torch_script(model: FeatherFace | ImagePyramid) -> torch.jit.ScriptModule:
    """The fused network as TorchScript: images ``[B, 3, H, W]`` of any size -> a tuple of :data:`OUTPUTS`."""
    device = next(model.parameters()).device
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer warnings: sizes are traced symbolically; parity is checked instead
        return torch.jit.trace(RawOutputs(model).eval(), torch.zeros(2, 3, 96, 64, device=device))


def torch_export(model: FeatherFace) -> torch.export.ExportedProgram:
    """The fused network through ``torch.export``: batch from 1, height and width multiples of 32 from 64."""
    device = next(model.parameters()).device
    height, width = (STRIDE * torch.export.Dim(n, min=2, max=512) for n in ("rows", "columns"))
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024), 2: height, 3: width},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(
            RawOutputs(model).eval(), (torch.zeros(2, 3, 96, 160, device=device),), dynamic_shapes=shapes
        )


class _Prepare(nn.Module):
    """RGB ``[B, 3, H, W]`` -> network input, zero-padded right and bottom to multiples of 32."""

    def forward(self, images: Tensor) -> Tensor:
        return pad_to_stride(normalise(images))


class _Finish(nn.Module):
    """Raw outputs -> faces of the whole batch in one list; the steps of layers/postprocess.py and FaceDetector."""

    def __init__(self, model: FeatherFace | ImagePyramid):
        super().__init__()
        self.cfg, self.pyramid = model.cfg, getattr(model, "pyramid", None)

    def forward(
        self,
        images: Tensor,
        padded: Tensor,
        logits: Tensor,
        boxes: Tensor,
        landmarks: Tensor,
        score_threshold: Tensor,
        nms_threshold: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cfg = self.cfg
        # not the model's own: its cache would put the anchors of one size into the graph
        anchors = network_anchors(cfg, self.pyramid, padded.shape[2], padded.shape[3])
        scores = logits.sigmoid()
        decoded = decode_boxes(boxes, anchors, cfg.variances)
        picks = _NonMaxSuppression.apply(
            decoded, scores.unsqueeze(1), torch.tensor([KEEP]), nms_threshold, score_threshold
        )
        image, anchor = picks[:, 0], picks[:, 2]
        flat = image * logits.shape[1] + anchor
        found = decoded.reshape(-1, 4).index_select(0, flat)
        points = landmarks.reshape(-1, 10).index_select(0, flat)
        points = decode_landmarks(points, anchors.index_select(0, anchor), cfg.variances)
        height, width = torch.as_tensor(images.shape[2]), torch.as_tensor(images.shape[3])
        found = torch.minimum(found.clamp(min=0), torch.stack([width, height, width, height]).float())
        inside = ((found[:, 2:] - found[:, :2]) > 0).all(1).nonzero().squeeze(1)
        score = scores.reshape(-1).index_select(0, flat)
        return tuple(t.index_select(0, inside) for t in (found, score, points, image))


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's NonMaxSuppression: boxes ``[B, N, 4]``, scores ``[B, 1, N]`` -> picks ``[M, 3]`` (image, class, anchor).

    Corner order does not matter to it as long as both corners have the same. It exists for tracing only.
    """

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, keep: Tensor, iou: Tensor, score: Tensor) -> Tensor:
        return torch.zeros(1, 3, dtype=torch.int64)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, keep: Any, iou: Any, score: Any) -> Any:
        return g.op("NonMaxSuppression", boxes, scores, keep, iou, score)


def _trace(
    module: nn.Module, args: tuple, inputs: list[str], outputs: list[str], axes: dict[str, dict], opset: int
) -> ModelProto:
    import onnx

    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer and deprecation warnings; what matters is checked by numbers
        torch.onnx.export(
            module.eval(),
            args,
            buffer,
            dynamo=False,
            opset_version=opset,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    onnx.checker.check_model(model)
    return model


def _blank(model: FeatherFace | ImagePyramid, height: int, width: int) -> Sequence[Tensor]:
    """Raw outputs of zeros for a batch of two."""
    n = len(model.anchors(height, width))
    return torch.zeros(2, n), torch.zeros(2, n, 4), torch.zeros(2, n, 10)


def _deform_conv(g: Any, x: Any, weight: Any, offset: Any, mask: Any, bias: Any, *rest: Any) -> Any:
    """``torchvision::deform_conv2d`` as DeformConv: both order offsets y, x per tap."""
    from torch.onnx import symbolic_helper

    values = [symbolic_helper._maybe_get_const(v, "i") for v in rest[:8]]
    stride, padding, dilation = values[0:2], values[2:4], values[4:6]
    return g.op(
        "DeformConv",
        *(x, weight, offset, bias, mask),
        strides_i=stride,
        pads_i=padding * 2,
        dilations_i=dilation,
        group_i=values[6],
        offset_group_i=values[7],
    )
