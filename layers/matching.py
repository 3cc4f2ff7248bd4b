"""Assignment of ground-truth faces to anchors: fixed IoU, ATSS, SimOTA.

Everything works on the flat list of the batch's faces and on *candidate pairs* (face, anchor), never on a full
``[B, N, M]`` matrix: anchors form regular grids, so the cells near a face are known by arithmetic. An image with
thousands of faces therefore costs memory in proportion to its faces, and there is no Python loop over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from layers.anchors import decode_boxes, to_xyxy
from utils.config import LossConfig

BACKGROUND = -1
IGNORED = -2
PAIR_BUDGET = 2_000_000  # candidate pairs held at once; about 100 MB of intermediate results
IGNORE_OVERLAP = 0.5  # share of an anchor inside an ignored face that makes the anchor no negative
MIN_SIDE = 0.1  # px; a thinner box has no usable size and is not learned
FALLBACK_ROUNDS = 4
FALLBACK_CANDIDATES = 9  # nearest anchors per level that a face without an anchor may take
FALLBACK_SHARE = 0.3  # ... if their IoU is at least this share of its best one


class Level(NamedTuple):
    """One anchor grid: anchor ``start + (row * cols + col) * len(sizes) + s``."""

    start: int
    rows: int
    cols: int
    stride: int
    sizes: tuple[float, ...]  # px


class _Faces(NamedTuple):
    image: Tensor  # [F] row of the batch
    column: Tensor  # [F] column in the padded arrays
    boxes: Tensor  # [F, 4] xyxy px


_LEVELS = WeakIdKeyDictionary()  # anchors -> their grids, as long as the tensor lives


def anchor_levels(anchors: Tensor) -> list[Level]:
    """Recover the grids of ``make_anchors`` from its ``[N, 4]`` cxcywh result (strides are powers of two).

    Done once per tensor, since a GPU has to be waited for: give the same one again (``AnchorCache``).
    """
    if anchors not in _LEVELS:
        _LEVELS[anchors] = _find_levels(anchors)
    return _LEVELS[anchors]


def _find_levels(anchors: Tensor) -> list[Level]:
    table = anchors.detach().cpu()
    x = table[:, 0].long()
    stride = 2 * (x & -x)  # a centre is an odd multiple of stride / 2, so its lowest set bit is stride / 2
    values, counts = torch.unique_consecutive(stride, return_counts=True)
    levels, start = [], 0
    for step, count in zip(values.tolist(), counts.tolist()):
        part = table[start : start + count]
        per_cell = int((part[:, :2] == part[0, :2]).all(1).sum())
        cols = int((part[:, 1] == part[0, 1]).sum()) // per_cell
        levels.append(Level(start, count // (per_cell * cols), cols, step, tuple(part[:per_cell, 2].tolist())))
        start += count
    return levels


def aligned_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU of boxes pairwise along broadcast leading dims: xyxy ``[..., 4]``, ``[..., 4]`` -> ``[...]``."""
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    return inter / (area_a + area_b - inter + eps)


def assign(
    cfg: LossConfig,
    batch: dict,
    anchors: Tensor,
    out: dict[str, Tensor] | None = None,
    variances: Sequence[float] = (0.1, 0.2),
) -> Tensor:
    """Run the assigner chosen by the configuration.

    Args:
        cfg: ``assigner`` and its settings.
        batch: ``boxes [B, M, 4]`` xyxy px, ``valid [B, M]``, ``ignore [B, M]``.
        anchors: ``[N, 4]`` cxcywh px.
        out: predictions ``logits [B, N]``, ``boxes [B, N, 4]``; read (detached) by SimOTA only.
        variances: of the box coding.

    Returns:
        ``[B, N]`` int64, what each anchor has to predict: the column of a face in the batch's ``boxes``,
        :data:`BACKGROUND` or :data:`IGNORED`.
    """
    faces = (batch["boxes"], batch["valid"], batch["ignore"])
    if cfg.assigner == "iou":
        return assign_iou(*faces, anchors, cfg.iou_threshold)
    if cfg.assigner == "atss":
        return assign_atss(*faces, anchors, cfg.atss_topk)
    if out is None:
        raise ValueError("SimOTA assigns by predictions: pass out")
    return assign_simota(*faces, anchors, out["logits"], out["boxes"], variances, cfg.simota_radius)


@torch.no_grad()
def assign_iou(
    boxes: Tensor,
    valid: Tensor,
    ignore: Tensor,
    anchors: Tensor,
    threshold: float = 0.35,
) -> Tensor:
    """Every anchor at IoU >= ``threshold`` takes its best face; every face keeps its best anchor (Liu et al. 2016).

    Args:
        boxes: ``[B, M, 4]`` xyxy px; ``valid``, ``ignore``: ``[B, M]`` bool; anchors: ``[N, 4]`` cxcywh px.
    """
    boxes, levels = boxes.float(), anchor_levels(anchors)
    faces = _compact(boxes, valid)
    # For anchors of one size, the overlap falls with the distance in x and in y: the nearest cell is the best.
    near = _near_anchors(faces.boxes, levels, 1)
    best_iou, best = _candidate_iou(faces.boxes, near, anchors).max(1)
    touched = (best_iou > 0).nonzero().squeeze(1)
    pairs = list(
        _overlapping(
            faces.boxes,
            levels,
            area_range=(threshold, 1 / threshold),
            accept=lambda inter, area, size: inter * (1 + threshold) >= threshold * (area + size),
        )
    )
    # + 1: a face's best anchor is taken from it by none but another that has the same best anchor.
    pairs.append((touched, near[touched, best[touched]], best_iou[touched] + 1))
    face, anchor, priority = (torch.cat(column) for column in zip(*pairs))
    owner = _no_owner(boxes, anchors)
    _claim(owner, face, faces.image[face] * len(anchors) + anchor, priority)
    return _finish(owner, faces, boxes, ignore, anchors, levels)


@torch.no_grad()
def assign_atss(
    boxes: Tensor,
    valid: Tensor,
    ignore: Tensor,
    anchors: Tensor,
    topk: int = 9,
) -> Tensor:
    """Adaptive training sample selection (Zhang et al. 2020).

    A face's candidates are the ``topk`` anchors per level with the nearest centres, rounded up to whole cells (the
    anchors of a cell are equally near). Positive are those whose IoU reaches mean + standard deviation over the
    candidates and whose centre lies inside the face (see :func:`_inside` for tiny ones).

    Args:
        boxes: ``[B, M, 4]`` xyxy px; ``valid``, ``ignore``: ``[B, M]`` bool; anchors: ``[N, 4]`` cxcywh px.
    """
    boxes, levels = boxes.float(), anchor_levels(anchors)
    faces = _compact(boxes, valid)
    positive, anchor, iou = _atss_pairs(faces.boxes, anchors, levels, topk)
    owner = _no_owner(boxes, anchors)
    row, column = positive.nonzero(as_tuple=True)
    flat = anchor + faces.image[:, None] * len(anchors)
    _claim(owner, row, flat[row, column], iou[row, column])
    return _finish(owner, faces, boxes, ignore, anchors, levels)


@torch.no_grad()
def assign_simota(
    boxes: Tensor,
    valid: Tensor,
    ignore: Tensor,
    anchors: Tensor,
    logits: Tensor,
    deltas: Tensor,
    variances: Sequence[float] = (0.1, 0.2),
    radius: float = 2.5,
    candidates: int = 10,
    iou_weight: float = 3.0,
) -> Tensor:
    """SimOTA (Ge et al., YOLOX, 2021): each face takes its k cheapest anchors, k following the predictions' IoU.

    Candidates are the anchors whose centre is within ``radius`` strides of the face's centre in x and y;
    cost = -log(score) + ``iou_weight`` * -log(IoU of the predicted box), and those outside the face come last.

    Args:
        boxes: ``[B, M, 4]`` xyxy px; ``valid``, ``ignore``: ``[B, M]`` bool; anchors: ``[N, 4]`` cxcywh px.
        logits: ``[B, N]`` face logits; deltas: ``[B, N, 4]`` encoded boxes. No gradient flows.
        candidates: k is the sum of this many best IoUs, at least 1.
    """
    boxes, levels = boxes.float(), anchor_levels(anchors)
    faces = _compact(boxes, valid)
    owner = _no_owner(boxes, anchors)
    reach = math.ceil(radius - 0.5)
    width = sum(min(2 * reach + 1, lv.rows) * min(2 * reach + 1, lv.cols) * len(lv.sizes) for lv in levels)
    chosen = []
    for part in torch.arange(len(faces.image), device=boxes.device).split(max(1, PAIR_BUDGET // width)):
        face = faces.boxes[part, None]
        anchor, stride = _window_anchors(faces.boxes[part], levels, reach)
        image = faces.image[part, None]
        points = anchors[anchor, :2]
        offset = (points - (face[..., :2] + face[..., 2:]) / 2).abs().amax(-1)
        inside = _inside(points, face, levels)
        predicted = decode_boxes(deltas[image, anchor].float(), anchors[anchor], variances)
        iou = aligned_iou(predicted, face).nan_to_num(0.0)
        iou = iou.masked_fill(offset > radius * stride, 0.0)
        # Scores below 1e-8 are all equally bad; the same floor keeps a zero IoU finite.
        score_cost = F.softplus(-logits[image, anchor].float()).nan_to_num(20.0).clamp(max=20.0)
        cost = score_cost - iou_weight * torch.log(iou + 1e-8) + 1e3 * ~inside
        cost = cost.masked_fill(offset > radius * stride, torch.inf)
        wanted = iou.topk(min(candidates, iou.shape[1]), dim=1).values.sum(1).int().clamp(min=1)
        cheapest, order = cost.topk(min(candidates, cost.shape[1]), dim=1, largest=False)
        rank = torch.arange(order.shape[1], device=boxes.device)
        row, column = ((rank < wanted[:, None]) & cheapest.isfinite()).nonzero(as_tuple=True)
        flat = image * len(anchors) + anchor.gather(1, order)
        chosen.append((part[row], flat[row, column], -cheapest[row, column]))
    _claim(owner, *(torch.cat(column) for column in zip(*chosen)))
    return _finish(owner, faces, boxes, ignore, anchors, levels)


def _compact(boxes: Tensor, mask: Tensor) -> _Faces:
    """The batch's usable faces as flat lists: masked in, finite, and not thinner than MIN_SIDE."""
    usable = mask & (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(-1) & boxes.isfinite().all(-1)
    image, column = usable.nonzero(as_tuple=True)
    return _Faces(image, column, boxes[image, column])


def _no_owner(boxes: Tensor, anchors: Tensor) -> Tensor:
    return torch.full((boxes.shape[0] * len(anchors),), BACKGROUND, dtype=torch.int64, device=boxes.device)


def _claim(owner: Tensor, face: Tensor, anchor: Tensor, priority: Tensor) -> None:
    """Each claimed anchor goes to the face of highest priority, of equals to the first; ``owner`` is updated."""
    top = torch.full(owner.shape, -torch.inf, device=owner.device).scatter_reduce_(0, anchor, priority, "amax")
    wins = priority == top[anchor]
    owner.scatter_reduce_(0, anchor[wins], face[wins], "amin", include_self=False)


def _axis_window(centre: Tensor, stride: int, cells: int, radius: int) -> Tensor:
    """Indices ``[F, w]`` of up to 2 * radius + 1 cells around a coordinate ``[F]``, shifted to lie in the grid."""
    width = min(2 * radius + 1, cells)
    first = (torch.floor(centre / stride) - radius).clamp(0, cells - width).long()
    return first[:, None] + torch.arange(width, device=centre.device)


def _level_window(boxes: Tensor, level: Level, radius: int) -> tuple[Tensor, Tensor]:
    """Cells ``[F, w]`` around the faces' centres and their squared distances in px. Centres count as in the image."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    x = centre[:, 0].clamp(0, level.cols * level.stride)
    y = centre[:, 1].clamp(0, level.rows * level.stride)
    cols = _axis_window(x, level.stride, level.cols, radius)
    rows = _axis_window(y, level.stride, level.rows, radius)
    dx = (cols + 0.5) * level.stride - x[:, None]
    dy = (rows + 0.5) * level.stride - y[:, None]
    cells = rows[:, :, None] * level.cols + cols[:, None, :]
    return cells.flatten(1), (dy.square()[:, :, None] + dx.square()[:, None, :]).flatten(1)


def _cell_anchors(cells: Tensor, level: Level) -> Tensor:
    """Cells ``[F, n]`` of a level -> all their anchors ``[F, n * sizes]``."""
    per_cell = len(level.sizes)
    offsets = torch.arange(per_cell, device=cells.device)
    return (level.start + cells[..., None] * per_cell + offsets).flatten(1)


def _window_anchors(boxes: Tensor, levels: list[Level], radius: int) -> tuple[Tensor, Tensor]:
    """All anchors ``[F, K]`` of the windows around the faces' centres, and their strides ``[K]``."""
    parts = [_cell_anchors(_level_window(boxes, level, radius)[0], level) for level in levels]
    columns = [level.stride for level, part in zip(levels, parts) for _ in range(part.shape[1])]
    return torch.cat(parts, 1), torch.tensor(columns, device=boxes.device)


def _near_anchors(boxes: Tensor, levels: list[Level], topk: int) -> Tensor:
    """The ``topk`` nearest anchors per level (rounded up to whole cells) of faces ``[F, 4]``: ``[F, K]``."""
    parts = []
    for level in levels:
        wanted = math.ceil(topk / len(level.sizes))
        # A square block of `side` cells around the centre holds enough; whatever is nearer than its corners
        # (side / sqrt 2 cells away) lies in a window of this radius.
        side = math.ceil(math.sqrt(wanted)) // 2 * 2 + 1
        radius = math.ceil(side / math.sqrt(2) - 0.5)
        cells, distance = _level_window(boxes, level, radius)
        nearest = distance.topk(min(wanted, distance.shape[1]), dim=1, largest=False).indices
        parts.append(_cell_anchors(cells.gather(1, nearest), level))
    return torch.cat(parts, 1)


def _inside(points: Tensor, boxes: Tensor, levels: list[Level]) -> Tensor:
    """Whether points ``[..., 2]`` lie in boxes ``[..., 4]`` whose half sides count as one finest stride at least.

    Without that least extent a 6-px face would own no cell of the finest grid, or only a lucky one of a coarse grid.
    """
    centre, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    return ((points - centre).abs() < half.clamp(min=levels[0].stride)).all(-1)


def _candidate_iou(boxes: Tensor, anchor: Tensor, anchors: Tensor) -> Tensor:
    """IoU ``[F, K]`` of faces ``[F, 4]`` with candidate anchors ``[F, K]``, in parts that fit the memory budget."""
    corners = to_xyxy(anchors)
    step = max(1, PAIR_BUDGET // max(1, anchor.shape[1]))
    parts = [aligned_iou(b[:, None], corners[a]) for b, a in zip(boxes.split(step), anchor.split(step))]
    return torch.cat(parts)


def _atss_pairs(boxes: Tensor, anchors: Tensor, levels: list[Level], topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """ATSS for faces ``[F, 4]``: positive ``[F, K]``, anchor ``[F, K]``, IoU ``[F, K]``."""
    anchor = _near_anchors(boxes, levels, topk)
    iou = _candidate_iou(boxes, anchor, anchors)
    inside = _inside(anchors[anchor, :2], boxes[:, None], levels)
    mean = iou.mean(1, keepdim=True)  # std_mean warns where there are no faces
    std = ((iou - mean).square().sum(1, keepdim=True) / max(1, iou.shape[1] - 1)).sqrt()
    return (iou >= mean + std) & inside & (iou > 0), anchor, iou


def _overlapping(
    boxes: Tensor,
    levels: list[Level],
    area_range: tuple[float, float],
    accept: Callable[[Tensor, Tensor, float], Tensor],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All pairs of faces ``[F, 4]`` and anchors that ``accept(intersection, face area, anchor area)`` lets pass.

    Only faces of ``area_range`` times the anchor's area are tried. Yields (face ``[P]``, anchor ``[P]``, IoU ``[P]``).
    """
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for level in levels:
        x = (torch.arange(level.cols, device=boxes.device) + 0.5) * level.stride
        y = (torch.arange(level.rows, device=boxes.device) + 0.5) * level.stride
        for s, size in enumerate(level.sizes):
            tried = ((area >= area_range[0] * size**2) & (area <= area_range[1] * size**2)).nonzero().squeeze(1)
            for face in tried.split(max(1, PAIR_BUDGET // (level.rows * level.cols))):
                inter = _side_overlap(boxes[face, 1], boxes[face, 3], y, size)[:, :, None]
                inter = inter * _side_overlap(boxes[face, 0], boxes[face, 2], x, size)[:, None, :]
                passed = accept(inter, area[face, None, None], size**2)
                i, row, col = passed.nonzero(as_tuple=True)
                anchor = level.start + (row * level.cols + col) * len(level.sizes) + s
                shared = inter[i, row, col]
                yield face[i], anchor, shared / (area[face[i]] + size**2 - shared)


def _side_overlap(low: Tensor, high: Tensor, centre: Tensor, size: float) -> Tensor:
    """Length ``[F, n]`` shared by intervals ``[F]`` and those of length ``size`` around centres ``[n]``."""
    return (torch.minimum(high[:, None], centre + size / 2) - torch.maximum(low[:, None], centre - size / 2)).clamp(0)


def _finish(
    owner: Tensor, faces: _Faces, boxes: Tensor, ignore: Tensor, anchors: Tensor, levels: list[Level]
) -> Tensor:
    """Give faces that came away empty an anchor, mark the ignored anchors, and make the padded result."""
    _serve_lonely(owner, faces, anchors, levels)
    taken = (owner >= 0).nonzero().squeeze(1)
    matched = torch.full_like(owner, BACKGROUND)
    ignored = _compact(boxes, ignore)
    for i, anchor in _ignored_anchors(ignored.boxes, anchors, levels):
        matched[ignored.image[i] * len(anchors) + anchor] = IGNORED
    matched[taken] = faces.column[owner[taken]]
    return matched.view(len(boxes), -1)


def _serve_lonely(owner: Tensor, faces: _Faces, anchors: Tensor, levels: list[Level]) -> None:
    """Faces without an anchor (too small, or outbid in a crowd) take the best one near them that is free, or else one
    of a face that has several. ``owner`` is updated."""
    count, flat = len(faces.image), None
    lonely = torch.arange(count, device=owner.device)
    for _ in range(FALLBACK_ROUNDS):
        owned = torch.bincount(owner[owner >= 0], minlength=count)
        still = owned[lonely] == 0
        lonely = lonely[still]
        if not len(lonely):
            return
        if flat is None:
            anchor = _near_anchors(faces.boxes[lonely], levels, FALLBACK_CANDIDATES)
            iou = _candidate_iou(faces.boxes[lonely], anchor, anchors)
            flat = anchor + faces.image[lonely, None] * len(anchors)
            near_enough = (iou > 0) & (iou >= FALLBACK_SHARE * iou.amax(1, keepdim=True))
        else:
            flat, iou, near_enough = flat[still], iou[still], near_enough[still]
        holder = owner[flat]
        free = holder < 0
        open_to_all = near_enough & (free | (owned[holder.clamp(min=0)] > 1))
        wish, pick = (iou + free.float()).masked_fill(~open_to_all, -1.0).max(1)  # free ones first
        target, victim = flat.gather(1, pick[:, None]).squeeze(1), holder.gather(1, pick[:, None]).squeeze(1)
        # A face gives up one anchor per round, so that it cannot end up with none.
        robbed = victim.clamp(min=0)
        highest = torch.full((count,), -torch.inf, device=owner.device)
        highest.scatter_reduce_(0, robbed, wish.masked_fill(victim < 0, -torch.inf), "amax")
        able = (wish >= 0) & ((victim < 0) | (wish == highest[robbed]))
        _claim(owner, lonely[able], target[able], wish[able])


def _ignored_anchors(boxes: Tensor, anchors: Tensor, levels: list[Level]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (face, anchor) of ignored faces ``[F, 4]`` and the anchors that must not learn "background" from them:
    those that ATSS would give the face, and those at least half inside it.
    """
    if not len(boxes):
        return
    positive, anchor, _ = _atss_pairs(boxes, anchors, levels, 9)
    row, column = positive.nonzero(as_tuple=True)
    yield row, anchor[row, column]
    # IoU >= 1/2 implies that half of the anchor is covered, so one condition serves both.
    for face, covered, _ in _overlapping(
        boxes,
        levels,
        area_range=(IGNORE_OVERLAP, torch.inf),
        accept=lambda inter, area, size: inter >= IGNORE_OVERLAP * size,
    ):
        yield face, covered
