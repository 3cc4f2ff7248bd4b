"""A network whose faces are bright rectangles on a dark picture: detections can be checked exactly."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from layers.anchors import encode_boxes, encode_landmarks, make_anchors
from utils.config import ModelConfig

POINTS = np.array([[0.3, 0.4], [0.7, 0.4], [0.45, 0.6], [0.35, 0.8], [0.65, 0.8]])  # of the box, image-left first
BRIGHT = 60  # network input above this is face; padding (0) is not


class SquareNetwork(nn.Module):
    """Puts one face on every bright rectangle; the brighter, the higher its score (220 -> 0.5)."""

    def __init__(self):
        super().__init__()
        self.cfg = ModelConfig()
        self.batches = []  # shapes seen

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        return make_anchors(height, width, self.cfg.strides, self.cfg.anchors, device)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert not self.training
        self.batches.append(tuple(images.shape))
        anchors = self.anchors(*images.shape[2:], images.device)
        count = len(anchors)
        logits = torch.full((len(images), count), -10.0)
        boxes, landmarks = torch.zeros(len(images), count, 4), torch.zeros(len(images), count, 10)
        for i, image in enumerate(images.mean(1).numpy()):
            labels, _ = ndimage.label(image > BRIGHT)
            for k, (rows, cols) in enumerate(ndimage.find_objects(labels)):
                box = np.array([cols.start, rows.start, cols.stop, rows.stop], np.float32)
                centre, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
                cost = (anchors[:, :2] - torch.tensor(centre)).abs().sum(1) + (anchors[:, 2] - side.max().item()).abs()
                best = cost.argmin()
                points = torch.tensor(box[:2] + POINTS * side, dtype=torch.float32)
                boxes[i, best] = encode_boxes(torch.tensor(box), anchors[best], self.cfg.variances)
                landmarks[i, best] = encode_landmarks(points, anchors[best], self.cfg.variances)
                brightness = image[labels == k + 1].max() + 114.7  # mean of the three channel means
                logits[i, best] = float(brightness - 220) / 5
        return {"logits": logits, "boxes": boxes, "landmarks": landmarks}


def picture(height: int, width: int, *boxes: tuple[int, int, int, int], value: int = 255) -> np.ndarray:
    """A dark RGB picture ``[height, width, 3]`` with bright ``boxes`` (xyxy)."""
    image = np.full((height, width, 3), 20, np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = value
    return image


def points_of(box: tuple[int, int, int, int]) -> np.ndarray:
    """Where :class:`SquareNetwork` puts the landmarks of a box: ``[5, 2]``."""
    box = np.asarray(box, np.float32)
    return box[:2] + POINTS * (box[2:] - box[:2])
