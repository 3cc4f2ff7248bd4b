"""Static int8 quantisation of an exported network with onnxruntime, calibrated on real photos."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.images import shrink
from data.preprocess import normalise, pad_to_stride
from utils.image import read_image
from utils.onnx_backend import import_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto

CALIBRATION_SIDE = 640  # longer photos are shrunk to this long side
# Quantised are convolutions and what stands between them; gates and sums keep their float range. Left in float too:
# the heads and the landmark refinement, whose errors are the errors of the result, and the backbone's first stage: its
# few channels have ranges so different that one scale fits none of them, and quantising it costs four times as much
# score error as all the rest.
QUANTISED = ("Conv", "LeakyRelu", "Relu")
FLOAT_SCOPES = re.compile(r"/(stage1|classes\.\d|boxes\.\d|landmarks\.\d|landmark_refinement|spatial|task_spatial)/")


def quantise(raw: ModelProto, photos: Sequence[str | Path]) -> ModelProto:
    """Raw form in float -> raw form with int8 convolutions (QDQ, weights per channel).

    Args:
        raw: from :func:`utils.onnx_export.export_raw`; its metadata is not kept.
        photos: ordinary photos with and without faces; a few dozen are enough. Their activations set the ranges.

    Raises:
        ImageReadError: a photo cannot be read.
        ValueError: no photos.
        ImportError: onnxruntime or onnx is not installed.
    """
    import_onnxruntime()
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not photos:
        raise ValueError("int8 needs photos to calibrate on")

    class Photos(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs: Iterator = ({"images": network_input(read_image(p))} for p in photos)

        def get_next(self) -> dict | None:
            return next(self.inputs, None)

    level = logging.getLogger().level
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (str(Path(folder, f"{n}.onnx")) for n in ("source", "prepared", "int8"))
        onnx.save(raw, source)
        logging.getLogger().setLevel(logging.ERROR)  # onnxruntime logs advice on the root logger
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            nodes = onnx.load(prepared).graph.node
            quantize(
                prepared,
                target,
                Photos(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                nodes_to_exclude=[n.name for n in nodes if FLOAT_SCOPES.search(n.name)],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        finally:
            logging.getLogger().setLevel(level)
        return onnx.load(target)


def network_input(picture: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` RGB uint8 -> ``[1, 3, H', W']`` as the detector feeds it, at most :data:`CALIBRATION_SIDE` long."""
    image = normalise(torch.from_numpy(shrink(picture, CALIBRATION_SIDE)).permute(2, 0, 1))[None]
    return pad_to_stride(image).numpy()
