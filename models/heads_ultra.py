"""Plan A of V2 Ultra behind the neck: CBAM_Cascade, SmartHead_Fusion, CascadeRefinement and MultiPath.

Levels are lists ``[P3, P4, P5]`` of ``[B, C, h, w]``; predictions are dicts ``logits [B, N]``, ``boxes [B, N, 4]``,
``landmarks [B, N, 10]`` (encoded against the anchors). Convolutions are shared by the levels, batch norms never. Every
module starts close to the identity, with a gradient for each of its parameters from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bifpn import upsample
from models.modules_v2_ultra import Monitored, area_downsample, level_norms, small_init

LEVELS = 3
TASKS = ("class", "box", "landmark")
NEUTRAL = 0.1  # scale of a gate's logits at the start

Predictions = dict[str, Tensor]
TaskLevels = tuple[list[Tensor], list[Tensor], list[Tensor]]


class CBAM_Cascade(Monitored):
    """Attention in three stages: raw feature, context-aware, task-specific.

    1. each level's own CBAM (plain or amplified);
    2. channel and spatial gates that also see the mean of the neighbouring levels;
    3. for class, box and landmark, gates of their own.

    The gates of stages 2 and 3 are ``2 sigmoid``, 1 at the start. :meth:`attend` is stages 1 and 2, :meth:`tasks`
    stage 3, so that the context module can stand between them; calling the module does all three.

    Args:
        cbams: per level, a module with ``with_map(x) -> (feature, spatial gate [B, 1, h, w])``.
        channels: C.
        rank: width of the bottlenecks behind the channel gates.
    """

    def __init__(self, cbams: Sequence[nn.Module], channels: int, rank: int = 3) -> None:
        super().__init__()
        self.cbams = nn.ModuleList(cbams)
        self.squeeze = nn.Linear(2 * channels, rank)
        self.excite = small_init(nn.Linear(rank, channels))
        self.spatial = nn.Conv2d(3, 1, 5, padding=2, bias=False)
        self.norms = level_norms(1, LEVELS, NEUTRAL)
        self.task_squeeze = nn.Linear(channels, rank)
        self.task_excite = small_init(nn.Linear(rank, len(TASKS) * channels))
        self.task_spatial = nn.Conv2d(2, len(TASKS), 3, padding=1, bias=False)
        self.task_norms = level_norms(len(TASKS), LEVELS, NEUTRAL)

    def forward(self, levels: list[Tensor]) -> TaskLevels:
        """Three ``[B, C, h, w]`` -> the class, box and landmark features, three of the same shapes each."""
        return self.tasks(self.attend(levels)[0])

    def attend(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Stages 1 and 2: three ``[B, C, h, w]`` -> the same shapes, and stage 1's spatial gates ``[B, 1, h, w]``."""
        levels, maps = zip(*(cbam.with_map(x) for cbam, x in zip(self.cbams, levels)))
        p3, p4, p5 = levels
        around = [upsample(p4, p3), (area_downsample(p3) + upsample(p5, p4)) / 2, area_downsample(p4)]
        return [self._contextual(x, n, norm) for x, n, norm in zip(levels, around, self.norms)], list(maps)

    def _contextual(self, x: Tensor, around: Tensor, norm: nn.Module) -> Tensor:
        pooled = torch.cat([x.mean((2, 3)), around.mean((2, 3))], 1)
        channel = 2 * torch.sigmoid(self.excite(F.silu(self.squeeze(pooled))))
        planes = [x.max(1, keepdim=True).values, x.mean(1, keepdim=True), around.mean(1, keepdim=True)]
        spatial = 2 * torch.sigmoid(norm(self.spatial(torch.cat(planes, 1))))
        return x * channel[..., None, None] * spatial

    def tasks(self, levels: list[Tensor]) -> TaskLevels:
        """Stage 3: three ``[B, C, h, w]`` -> the class, box and landmark features, three of the same shapes each."""
        by_level = []
        for x, norm in zip(levels, self.task_norms):
            logits = self.task_excite(F.silu(self.task_squeeze(x.mean((2, 3)))))
            channel = 2 * torch.sigmoid(logits).unflatten(1, (len(TASKS), -1))  # [B, tasks, C]
            planes = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
            spatial = 2 * torch.sigmoid(norm(self.task_spatial(planes)))  # [B, tasks, h, w]
            self.remember(**{f"{task}_gate": channel[:, t] for t, task in enumerate(TASKS)})
            by_level.append([x * channel[:, t, :, None, None] * spatial[:, t, None] for t in range(len(TASKS))])
        return tuple(map(list, zip(*by_level)))


class SmartHead_Fusion(nn.Module):
    """Tasks that help each other before their heads: class -> box -> landmark -> class.

    Each arrow adds a low-rank transfer ``up(relu(BN_level(down(source))))`` to its target; box and landmark features
    already carry the help they received when they pass it on.

    Args:
        channels: C.
        rank: width of the transfers.
    """

    def __init__(self, channels: int, rank: int = 5) -> None:
        super().__init__()
        self.class_to_box = Transfer(channels, rank)
        self.box_to_landmark = Transfer(channels, rank)
        self.landmark_to_class = Transfer(channels, rank)

    def forward(
        self,
        class_levels: list[Tensor],
        box_levels: list[Tensor] | None = None,
        landmark_levels: list[Tensor] | None = None,
    ) -> TaskLevels:
        """Three levels ``[B, C, h, w]`` for all tasks, or three for each -> class, box and landmark features."""
        box_levels = class_levels if box_levels is None else box_levels
        landmark_levels = class_levels if landmark_levels is None else landmark_levels
        box = [b + t for b, t in zip(box_levels, self.class_to_box(class_levels))]
        landmark = [m + t for m, t in zip(landmark_levels, self.box_to_landmark(box))]
        return [c + t for c, t in zip(class_levels, self.landmark_to_class(landmark))], box, landmark


class Transfer(nn.Module):
    """Low-rank 1x1 map from one task's features to another's; shared by the levels, batch norm per level."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, rank, 1, bias=False)
        self.norms = level_norms(rank, LEVELS)
        self.up = small_init(nn.Conv2d(rank, channels, 1, bias=False))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Three ``[B, C, h, w]`` -> three of the same shapes."""
        return [self.up(F.relu(norm(self.down(x)))) for x, norm in zip(levels, self.norms)]


class CascadeRefinement(nn.Module):
    """Second stage of detection: a correction of the coarse predictions that has seen them.

    For every anchor, ``hidden = relu(BN(F feature + D coarse))`` and ``refined = coarse + out(hidden)``, in encoded
    space, logit and landmarks included. F, D and ``out`` are shared by all anchors; each level and anchor size has its
    own BN. Coarse predictions are detached: they learn from their own loss alone.

    Args:
        channels: C.
        anchors_per_level: anchors per cell of each level.
        hidden: width of the hidden layer.
    """

    SIZES = {"logits": 1, "boxes": 4, "landmarks": 10}

    def __init__(self, channels: int, anchors_per_level: Sequence[int], hidden: int = 10) -> None:
        super().__init__()
        outputs = sum(self.SIZES.values())
        self.anchors_per_level = tuple(anchors_per_level)
        self.from_feature = nn.Linear(channels, hidden, bias=False)
        self.from_coarse = nn.Linear(outputs, hidden, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm1d(n * hidden) for n in anchors_per_level)
        self.out = small_init(nn.Linear(hidden, outputs))

    def forward(self, coarse: Predictions, levels: list[Tensor]) -> Predictions:
        """Predictions and the three ``[B, C, h, w]`` they came from -> refined predictions."""
        known = torch.cat([coarse["logits"][..., None], coarse["boxes"], coarse["landmarks"]], 2).detach()
        deltas, start = [], 0
        for x, norm, n in zip(levels, self.norms, self.anchors_per_level):
            cells = x.flatten(2).transpose(1, 2)  # [B, hw, C]
            end = start + cells.shape[1] * n
            anchors = known[:, start:end].unflatten(1, (-1, n))  # [B, hw, n, 15]
            hidden = self.from_feature(cells)[:, :, None] + self.from_coarse(anchors)
            hidden = F.relu(norm(hidden.flatten(2).transpose(1, 2))).transpose(1, 2).unflatten(2, (n, -1))
            deltas.append(self.out(hidden).flatten(1, 2))
            start = end
        logits, boxes, landmarks = (known + torch.cat(deltas, 1)).split(list(self.SIZES.values()), 2)
        return {"logits": logits[..., 0], "boxes": boxes, "landmarks": landmarks}


class MultiPath(Monitored):
    """One network as an ensemble: the shared heads also read the earlier BiFPN repeats, and predictions are averaged.

    An earlier repeat reaches the heads through ``relu(BN(depthwise(x)))``, depthwise shared by all of them. The average
    of logits and encoded boxes and landmarks has learned weights; the full path starts with most of the weight, so
    that paths which know nothing yet do no harm.

    Args:
        channels: C.
        extra_paths: how many earlier repeats take part (BiFPN repeats - 1).
    """

    def __init__(self, channels: int, extra_paths: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        nn.init.dirac_(self.depthwise.weight, groups=channels)
        self.norms = nn.ModuleList(level_norms(channels, LEVELS) for _ in range(extra_paths))
        self.weight = nn.Parameter(torch.tensor([0.0] * extra_paths + [3.0]))

    def forward(
        self, main: Predictions, earlier: list[list[Tensor]], heads: Callable[..., Predictions]
    ) -> tuple[Predictions, list[Predictions]]:
        """Average the full path's predictions with those of earlier repeats.

        Args:
            main: predictions of the full path.
            earlier: the levels of each earlier repeat.
            heads: class, box and landmark levels -> predictions.

        Returns:
            the weighted average, and every path's predictions (the full path last), to supervise each in training.
        """
        paths = []
        for levels, norms in zip(earlier, self.norms):
            adapted = [F.relu(norm(self.depthwise(x))) for x, norm in zip(levels, norms)]
            paths.append(heads(adapted, adapted, adapted))
        paths.append(main)
        weight = torch.softmax(self.weight, 0)
        self.remember(full_path=weight[-1])
        return {key: sum(w * path[key] for w, path in zip(weight.unbind(), paths)) for key in main}, paths
