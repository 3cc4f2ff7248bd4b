#!/usr/bin/env python3
"""Export trained weights, and prove that the files compute what PyTorch computes.

    python export.py --weights v2_ultra --out exported                      # ONNX, raw and end-to-end
    python export.py --weights v2_ultra --out exported --int8 photos/       # and both again in int8
    python export.py --weights my.pth --out exported --form end2end --check a.jpg b.jpg
    python export.py --weights v1 --out exported --torchscript --torch-export

Writes OUT/NAME.onnx (raw heads: for `detect.py`, `test_widerface.py --weights NAME.onnx`), NAME_end2end.onnx (picture
in, faces out), NAME_int8.onnx, NAME_int8_end2end.onnx, NAME_features.onnx (raw heads and features: a teacher),
NAME.torchscript.pt and NAME.pt2; with --pyramid 1.5 all begin with NAME_pyramid1.5. See utils/onnx_export.py for inputs
and outputs.

Exit code: 0 = every float file agrees with PyTorch; 1 = one does not, or something could not be read or written;
2 = mistake on the command line.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models.detector import FaceDetector
from models.image_pyramid import ImagePyramid
from models.modules_v2_ultra import stop_skipping
from utils.arguments import above_zero, fraction, given, positive
from utils.checkpoint import load_model
from utils.command import FAILED, FINISHED, UsageError, command
from utils.image import ImageReadError, read_image, resize, sample_photo
from utils.inputs import add_pyramid, find_inputs
from utils.onnx_backend import fingerprint, import_onnxruntime, open_session
from utils.onnx_check import Parity, check_end_to_end, check_raw
from utils.onnx_export import (
    describe,
    export_end_to_end,
    export_raw,
    torch_export,
    torch_script,
    write,
)
from utils.weights import DEFAULT, find_weights

SMALL_PICTURE = 120, 100  # px, of the sample with small faces


def build_parser() -> argparse.ArgumentParser:
    title, _, usage = __doc__.partition("\n")
    p = argparse.ArgumentParser(
        description=title, epilog=usage.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--weights", default=DEFAULT, help="checkpoint file or name: v2_ultra (default), v1, ...")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the exported files")
    p.add_argument(
        "--form", choices=["raw", "end2end", "both"], default="both", help="of the ONNX files (default: both)"
    )
    p.add_argument("--features", action="store_true", help="raw form of a teacher: the neck's features as outputs too")
    p.add_argument("--opset", type=int, help="ONNX operator set (default: 17; 19 with deformable convolutions)")
    p.add_argument(
        "--input", choices=["uint8", "float"], help="samples of the end-to-end form, 0..255 (default: uint8)"
    )
    p.add_argument("--score", type=fraction, help="the end-to-end form's own score threshold (default: 0.5)")
    p.add_argument("--nms", type=fraction, help="the end-to-end form's own NMS overlap (IoU) (default: 0.4)")
    p.add_argument("--int8", metavar="DIR", help="also static int8, calibrated on the photos in this folder")
    p.add_argument("--int8-photos", type=positive, metavar="N", help="photos used of it, spread evenly (default: 64)")
    add_pyramid(p)
    p.add_argument("--torchscript", action="store_true", help="also TorchScript")
    p.add_argument("--torch-export", action="store_true", help="also torch.export (sizes: multiples of 32 from 64)")
    p.add_argument("--check", nargs="+", metavar="IMAGE", help="pictures for the parity check (default: a portrait)")
    p.add_argument("--tolerance-px", type=above_zero, default=0.05, help="largest error of places (default: 0.05)")
    p.add_argument("--tolerance-score", type=above_zero, default=1e-4, help="largest score error (default: 0.0001)")
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return p


class Exporter:
    """Writes the files of one model and compares each with PyTorch."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        import_onnxruntime()  # say so before the work if it is missing
        weights = find_weights(args.weights)
        if weights.suffix == ".onnx":
            raise UsageError(f"{weights}: exported already; --weights takes a checkpoint")
        if args.features and (args.form != "raw" or args.int8 or args.torchscript or args.torch_export):
            raise UsageError("--features: only for the ONNX file of --form raw")
        if args.pyramid and (args.features or args.torch_export):
            raise UsageError(f"--pyramid: not with {'--features' if args.features else '--torch-export'}")
        if (useless := given(args, input="uint8", score=0.5, nms=0.4)) and args.form == "raw":
            raise UsageError(f"{useless[0]}: only for the end-to-end form")
        if given(args, int8_photos=64) and not args.int8:
            raise UsageError("--int8-photos needs --int8")
        self.pictures = [read_image(p) for p in args.check or [sample_photo()]]
        self.photos = _photos(args.int8, args.int8_photos) if args.int8 else []
        self.model, self.info = load_model(weights)
        stop_skipping(self.model)  # no file does, so what they are compared with must not
        self.source = fingerprint(weights)
        if args.pyramid:
            self.model = ImagePyramid(self.model, args.pyramid)
            # small faces too, or the second look would not be compared
            self.pictures += [np.tile(resize(p, *SMALL_PICTURE), (3, 3, 1)) for p in self.pictures]
        self.stem = Path(args.out) / f"{weights.stem}{f'_pyramid{args.pyramid}' if args.pyramid else ''}"
        self.files: list[dict] = []

    def run(self) -> bool:
        """Everything that was asked for; False if a float file disagrees with PyTorch."""
        raw = export_raw(self.model, self.args.opset, self.args.features)
        self._onnx(raw, "fp32", "_features" if self.args.features else "")
        if self.photos:
            from utils.onnx_quantise import quantise

            self._onnx(quantise(raw, self.photos), "int8", "_int8")
        if self.args.torchscript:
            buffer = io.BytesIO()
            torch.jit.save(torch_script(self.model), buffer)
            write(f"{self.stem}.torchscript.pt", buffer.getvalue())
            loaded = torch.jit.load(f"{self.stem}.torchscript.pt")
            self._note(f"{self.stem}.torchscript.pt", "raw", "fp32", check_raw(loaded, self.model, self.pictures))
        if self.args.torch_export:
            buffer = io.BytesIO()
            torch.export.save(torch_export(self.model), buffer)
            write(f"{self.stem}.pt2", buffer.getvalue())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PyTorch about its own reading of the file
                loaded = torch.export.load(f"{self.stem}.pt2").module()
            self._note(f"{self.stem}.pt2", "raw", "fp32", check_raw(loaded, self.model, self.pictures, any_size=False))
        return all(f["ok"] for f in self.files)

    def _onnx(self, raw: object, precision: str, suffix: str) -> None:
        args, cfg = self.args, self.model.cfg
        facts = {
            "precision": precision,
            "source": self.source if precision == "fp32" else "",
            "meta": self.info["meta"],
            "pyramid": str(args.pyramid or ""),
        }
        if args.form in ("raw", "both"):
            path = f"{self.stem}{suffix}.onnx"
            describe(raw, cfg, self.info["name"], form="raw", **facts)
            write(path, raw.SerializeToString())
            session = open_session(path)
            parity = check_raw(lambda x: session.run(None, {"images": x.numpy()}), self.model, self.pictures)
            self._note(path, "raw", precision, parity)
        if args.form in ("end2end", "both"):
            path = f"{self.stem}{suffix}_end2end.onnx"
            whole = export_end_to_end(raw, self.model, args.score, args.nms, args.input)
            describe(whole, cfg, self.info["name"], form="end2end", **facts)
            write(path, whole.SerializeToString())
            detector = FaceDetector(self.model, "cpu", nms_threshold=args.nms)
            self._note(path, "end2end", precision, check_end_to_end(_runner(path, args.input), detector, self.pictures))

    def _note(self, path: str, form: str, precision: str, parity: Parity) -> None:
        # int8 is another model on purpose: its errors are shown, its AP decides
        ok = precision == "int8" or parity.within(self.args.tolerance_px, self.args.tolerance_score)
        # early checkpoints find nothing; the raw form, which every file is made from, has been or can be compared
        nothing = form == "end2end" and not parity.compared and not parity.unmatched
        ok = ok or nothing
        size = Path(path).stat().st_size
        facts = {"path": path, "form": form, "precision": precision, "bytes": size}
        self.files.append({**facts, "parity": parity.as_dict(), "ok": ok})
        print(
            f"{path}: {size / 1e6:.2f} MB; against PyTorch: boxes {parity.box_px:.2g} px, landmarks "
            f"{parity.landmark_px:.2g} px, scores {parity.score:.2g} at most, over {parity.compared} "
            f"{'faces' if form == 'end2end' else 'predictions'} in {parity.inputs} inputs"
            + (f", {parity.unmatched} unmatched" if parity.unmatched else "")
            + ("" if ok else " -- NOT EQUAL")
            + (": neither finds a face to compare; name pictures with faces with --check" if nothing else "")
        )


@command("export.py")
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    exporter = Exporter(args)
    equal = exporter.run()
    if not equal:
        print("export.py: an exported file does not compute what PyTorch computes", file=sys.stderr)
    if args.json:
        print(json.dumps({"name": exporter.info["name"], "files": exporter.files, "ok": equal}))
    return FINISHED if equal else FAILED


def _runner(path: str, image_type: str) -> Callable[[np.ndarray, float], list[np.ndarray]]:
    session = open_session(path)

    def run(batch: np.ndarray, score: float) -> list[np.ndarray]:
        images = np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.uint8 if image_type == "uint8" else np.float32)
        return session.run(None, {"images": images, "score_threshold": np.float32([score])})

    return run


def _photos(folder: str, count: int) -> list[str]:
    if not Path(folder).is_dir():
        raise UsageError(f"--int8 {folder}: not a folder")
    found, readable = find_inputs([folder]).pictures, []
    for place in np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int):
        path = found[place]
        try:
            read_image(path)
            readable.append(path)
        except ImageReadError as e:
            print(f"export.py: {e}; not calibrated on", file=sys.stderr)
    if not readable:
        raise UsageError(f"--int8 {folder}: no photos to calibrate on")
    return readable


if __name__ == "__main__":
    sys.exit(main())
