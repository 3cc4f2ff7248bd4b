"""Pictures from detections: boxes drawn, faces cut out and aligned, faces made unrecognisable."""

from __future__ import annotations

import cv2
import numpy as np

BOX_COLOUR = (0, 220, 80)
POINT_COLOURS = ((255, 60, 60), (60, 120, 255), (255, 220, 0), (255, 0, 220), (0, 220, 255))
# Where ArcFace (Deng et al. 2019) and most recognition networks expect the five landmarks in a 112 x 112 crop.
TEMPLATE_SIDE = 112
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
MAX_OVERSAMPLING = 32
BLUR_MARGIN = 0.15  # of the box's sides; a box ends at chin and forehead, hair and ears still identify
BLUR_CELLS = 6  # what is left of a face, per side, before smoothing: too little to be restored


def draw_detections(image: np.ndarray, boxes: np.ndarray, scores: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """A copy of the picture with boxes, landmarks and scores; line widths follow the sizes of picture and faces.

    Args:
        image: ``[H, W, 3]`` RGB uint8.
        boxes, scores, landmarks: ``[N, 4]`` xyxy, ``[N]``, ``[N, 5, 2]`` in pixels.
    """
    image = image.copy()
    line = max(1, round(max(image.shape[:2]) / 500))
    for box, score, points in zip(boxes, scores, landmarks):
        x1, y1, x2, y2 = (round(v) for v in box.tolist())
        width = x2 - x1
        x2, y2 = min(x2, image.shape[1] - 1), min(y2, image.shape[0] - 1)  # the pixels that the border still has
        cv2.rectangle(image, (x1, y1), (x2, y2), BOX_COLOUR, min(line, max(1, width // 20)))
        for (x, y), colour in zip(points.tolist(), POINT_COLOURS):
            cv2.circle(image, (round(x), round(y)), max(0, min(2 * line, width // 25)), colour, -1, cv2.LINE_AA)
        if width >= 16 * line:  # a label wider than its face would hide the neighbours
            size = min(0.45 * line, width / 60)
            origin = (x1, y1 - 3 if y1 > 25 * size else y1 + round(25 * size))
            for colour, thickness in (((0, 0, 0), line + 2), ((255, 255, 255), line)):
                cv2.putText(image, f"{score:.2f}", origin, cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness)
    return image


def align_face(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Cut out one face, turned and scaled so that its landmarks lie on :data:`TEMPLATE`.

    Args:
        image: ``[H, W, 3]`` RGB uint8.
        landmarks: ``[5, 2]`` in pixels.

    Returns:
        ``[112, 112, 3]``; black where the face reaches beyond the picture.
    """
    step = np.hypot(*similarity(landmarks, TEMPLATE)[:, 0])
    # warpAffine does not average: a large face is cut out larger, then shrunk, or the crop would be aliased
    over = int(np.clip(round(1 / max(step, 1e-9)), 1, MAX_OVERSAMPLING))
    matrix = similarity(landmarks, TEMPLATE * over)
    matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5  # ours are at 0.5 in the first pixel's centre, OpenCV's at 0
    crop = cv2.warpAffine(image, matrix, (TEMPLATE_SIDE * over, TEMPLATE_SIDE * over), flags=cv2.INTER_LINEAR)
    return cv2.resize(crop, (TEMPLATE_SIDE, TEMPLATE_SIDE), interpolation=cv2.INTER_AREA) if over > 1 else crop


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rotation, uniform scale and shift ``[2, 3]`` that best map points ``[N, 2]`` on others (least squares).

    With points as complex numbers this is linear regression, target = a * source + b; no mirroring can occur
    (Umeyama 1991 in the plane). Coinciding source points give a pure shift.
    """
    s, t = (p.astype(np.float64) @ [1, 1j] for p in (source, target))
    s0, t0 = s.mean(), t.mean()
    spread = (np.abs(s - s0) ** 2).sum()
    a = ((s - s0).conj() @ (t - t0)) / spread if spread > 1e-9 else 1.0 + 0j
    b = t0 - a * s0
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def blur_faces(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """A copy with every face reduced to a few smooth patches of colour; pixels outside the faces stay as they are.

    Args:
        image: ``[H, W, 3]`` RGB uint8.
        boxes: ``[N, 4]`` xyxy pixels; each is widened by :data:`BLUR_MARGIN` on every side.
    """
    result = image.copy()
    height, width = image.shape[:2]
    for box in boxes:
        margin = (box[2:] - box[:2]) * BLUR_MARGIN
        x1, y1 = np.floor(np.maximum(box[:2] - margin, 0)).astype(int).tolist()
        x2, y2 = np.ceil(np.minimum(box[2:] + margin, [width, height])).astype(int).tolist()
        if x2 <= x1 or y2 <= y1:
            continue
        cells = (min(BLUR_CELLS, x2 - x1), min(BLUR_CELLS, y2 - y1))
        coarse = cv2.resize(image[y1:y2, x1:x2], cells, interpolation=cv2.INTER_AREA)
        smooth = cv2.resize(coarse, (x2 - x1, y2 - y1), interpolation=cv2.INTER_CUBIC)
        # a rounded box (superellipse) that holds the whole detected box
        (cx, cy), (rx, ry) = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 + margin
        y, x = np.ogrid[y1 + 0.5 : y2, x1 + 0.5 : x2]
        mask = ((x - cx) / rx) ** 4 + ((y - cy) / ry) ** 4 < 1
        result[y1:y2, x1:x2][mask] = smooth[mask]
    return result
