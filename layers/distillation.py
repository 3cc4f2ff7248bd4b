"""ProgressiveDistillation: what is distilled when, from whom, and how it joins the task loss.

    total = (1 - a) * task + a * distillation

with the temperature T and the weight a falling in steps, and the terms changing by stage (``DistillConfig``).
T^2 multiplies the score term, the only one that T softens (Hinton et al. 2015: it undoes the 1/T^2 of the softened
gradient); multiplying boxes and features by 36 as well would only distort their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers import distillation_terms as terms
from layers.anchors import cells
from layers.distillation_memory import PredictionMemory, find_again
from layers.losses import earlier_stages
from layers.matching import IGNORED, aligned_iou
from layers.teachers import Prediction, Target, Teacher, UltraDistillation, as_target, decode
from models.heads import Heads, before_heads, merge_heads
from utils.checkpoint import part_of
from utils.config import ConfigError, DistillConfig, DistillStage, LossConfig, ModelConfig, from_dict, to_dict


class ProgressiveDistillation(nn.Module):
    """Distillation of one or several teachers, and of the student's own past, into the student.

    Its parameters serve training only: the 1x1 adapters from the student's neck to each teacher's, and for the
    ``dense`` term one set of heads per teacher, which say from the student's last features what that teacher says on
    its own anchors (after CrossKD, Wang et al. 2024: the student's scores then need not contradict its labels). Give
    them to the optimiser. Its state dict (these, memory of past predictions, own-best weights) belongs in training
    checkpoints. Teachers are neither parameters nor state, and ``train()`` does not reach them.

    Args:
        cfg: schedule, stages and switches.
        student: the student's architecture.
        teachers: frozen networks, the primary one first; see :func:`layers.teachers.load_teachers`.
        loss: the student's assigner and kind of classification; must be the task loss's.

    Raises:
        ConfigError: a stage wants features and no teacher has them, or ``dense`` and there is no loaded teacher, or
            scores and boxes are matched by anchor and a teacher has others.
    """

    def __init__(
        self, cfg: DistillConfig, student: ModelConfig, teachers: Sequence[Teacher] = (), loss: LossConfig | None = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.student = student
        self.loss = loss or LossConfig()
        self.teachers = UltraDistillation(teachers, student, self.loss, cfg.ensemble, cfg.matching)
        used = {name for stage in cfg.stages for name in stage.active}
        if teachers and not used.isdisjoint(("feature", "attention")) and not any(t.has_features for t in teachers):
            raise ConfigError(
                "'distill.stages': 'feature' and 'attention' need a teacher with features: a checkpoint, or an .onnx "
                "file made by export.py --form raw --features"
            )
        if cfg.matching == "anchor" and not used.isdisjoint(("score", "box")):
            for teacher in teachers:
                if teacher.config.anchors != student.anchors:
                    raise ConfigError(
                        f"'distill.matching': 'anchor' needs equal anchors, but {teacher.name} has "
                        f"{teacher.config.anchors} and the student {student.anchors}: use 'auto' or 'iou'"
                    )
        self.adapters = nn.ModuleList()  # [teacher with features][level]
        if "feature" in used:
            self.adapters.extend(_adapters(student, t.config) for t in self.teachers.frozen if t.has_features)
        self.mimics = nn.ModuleList()  # [teacher]
        if "dense" in used:
            if not teachers:
                raise ConfigError("'distill.stages': the term 'dense' needs one of 'distill.teachers'")
            self.mimics.extend(
                Heads(student.out_channels, [len(a) for a in t.config.anchors]) for t in self.teachers.frozen
            )
        remembers = "temporal" in used and cfg.temporal_source == "memory"
        self.memory = PredictionMemory(cfg.memory_images, cfg.memory_boxes) if remembers else None

    def start_mimics(self, heads: Heads) -> None:
        """Mimics begin as the student's own heads on anchors that both have, since a trained student's know most
        already; not where their outputs would mean another thing (YuNet's, a softmax pair, heads on other features)."""
        if heads.class_outputs > 1 or before_heads(self.student):
            return
        for mimic, teacher in zip(self.mimics, self.teachers.frozen):
            if teacher.per_size and teacher.config.variances == self.student.variances:
                own = [(self.student.anchors, heads.state_dict())]
                merge_heads(mimic.state_dict(), teacher.config.anchors, own, share=1.0, box_share=1.0)

    def take_mimics(self, state: dict) -> None:
        """Mimics go on from those that another run's distiller had for its first teachers.

        Args:
            state: its state dict, ``training.distiller`` of a ``last.pth``.

        Raises:
            ValueError: it has fewer mimics than this one, or others. One line.
        """
        known = (state.get("_extra_state") or {}).get("mimicked") or []
        if len(known) < len(self.mimics):
            raise ValueError(f"has {len(known)} mimics, {len(self.mimics)} are needed")
        for i, (mimic, teacher, before) in enumerate(zip(self.mimics, self.teachers.frozen, known)):
            try:
                mimic.load_state_dict(part_of(state, f"mimics.{i}."))
            except RuntimeError as e:
                raise ValueError(f"mimic {i + 1} does not fit: {str(e).strip().splitlines()[-1].strip()}") from None
            learnt_from = from_dict(ModelConfig, before["model"], "its teacher"), before["per_size"]
            if learnt_from != (teacher.config, teacher.per_size):
                raise ValueError(f"mimic {i + 1} is another teacher's than {teacher.name!r}")

    def needs_features(self, progress: float) -> bool:
        """Whether the student must be called with ``features=True`` at this point of training."""
        stage = self.cfg.schedule(progress)[2]
        return stage.gradient_balance or not stage.active.keys().isdisjoint(
            ("feature", "attention", "cross_scale", "dense")
        )

    def needs_ema(self, progress: float) -> bool:
        """Whether ``ema_model`` would be used at this point of training."""
        stage = self.cfg.schedule(progress)[2]
        own = self.cfg.self_teacher and self.cfg.own_weights_act and stage is self.cfg.stages[-1]
        return own or (self.cfg.temporal_source == "ema" and "temporal" in stage.active)

    def set_own_best(self, model: nn.Module) -> None:
        """Hand over the student whenever it is the best so far; with ``self_best`` it teaches in the last stage."""
        if self.cfg.self_best:
            self.teachers.set_own_best(model)

    def forward(
        self,
        student_out: dict,
        batch: dict,
        matched: Tensor,
        progress: float,
        ema_model: nn.Module | None = None,
    ) -> tuple[dict[str, Tensor], float]:
        """The distillation loss of a batch.

        Args:
            student_out: the student's outputs, with features where :meth:`needs_features` says so.
            batch: ``images``, ``boxes``, ``valid``, ``ignore``; for the memory also ``index`` and ``transform``.
            matched: ``[B, N]``, what the task loss has the anchors predict.
            progress: share of training done, 0..1.
            ema_model: the student's weight EMA, for ``self_teacher`` and ``temporal_source: ema``.

        Returns:
            ``total`` (differentiable: the weighted sum of the active terms, T^2 included) and each term, unweighted
            and detached; and alpha, which is 0 where no term is active (no teacher yet), so that the task loss then
            keeps its full weight.
        """
        temperature, alpha, stage = self.cfg.schedule(progress)
        active, images = stage.active, batch["images"]
        if not active or not alpha:
            return {"total": student_out["logits"].sum() * 0.0}, 0.0
        copies = not active.keys().isdisjoint(("score", "box"))
        aligns = not active.keys().isdisjoint(("feature", "attention"))
        asks = copies or "dense" in active
        if copies or "temporal" in active:  # the others do without the student's boxes
            anchors = self.teachers.anchors(*images.shape[-2:], images.device)
            student = decode(student_out, anchors, self.student.variances)
        ema_out = None
        if ema_model is not None and self.needs_ema(progress):
            ema_out = self.teachers.run(ema_model, images)
        shares = self._shares(len(images))
        frozen = self.teachers.run_frozen(images, shares, aligns, asks) if asks or aligns else []
        own = []
        if copies and stage is self.cfg.stages[-1]:
            own = self.teachers.run_own(images, ema_out if self.cfg.self_teacher else None)

        values: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):  # the terms need float32
            if copies and (frozen or own):
                target = self.teachers.targets(frozen, own, student_out, batch, matched)
                values |= self._copy_terms(student, target, batch, matched, temperature, stage)
                for outs in earlier_stages(student_out, self.loss).values():
                    each = [decode(out, anchors, self.student.variances) for out in outs]
                    copied = [self._copy_terms(e, target, batch, matched, temperature, stage) for e in each]
                    for name in values:
                        extra = torch.stack([c[name] for c in copied]).mean()
                        values[name] = values[name] + self.loss.refine_weight * extra
            if aligns and frozen:
                values |= self._alignment_terms(student_out, frozen, active)
            if "dense" in active and frozen:
                values["dense"] = self._dense_term(student_out["context"], frozen, images, shares)
            if "cross_scale" in active:
                values["cross_scale"] = terms.cross_scale_term(student_out["neck"])
            if "temporal" in active:
                if self.memory is not None:
                    values["temporal"] = self._memory_term(student, batch)
                elif ema_out is not None:
                    past = as_target(decode(ema_out, anchors, self.student.variances))
                    values["temporal"] = self._consistency(student, past, images)
        values = {name: value for name, value in values.items() if name in active}
        if not values:
            return {"total": student_out["logits"].sum() * 0.0}, 0.0
        total = torch.stack([active[name] * value for name, value in values.items()]).sum()
        return {"total": total} | {name: value.detach() for name, value in values.items()}, alpha

    def combine(
        self,
        task: Tensor,
        student_out: dict,
        batch: dict,
        matched: Tensor,
        progress: float,
        ema_model: nn.Module | None = None,
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """(1 - a) * task + a * distillation, with the gradient-flow balance where the stage asks for it.

        The balance keeps the distillation gradient on the neck, as it enters the sum, no longer than the task
        gradient there. It costs two extra backward passes from the losses to the neck (no weight gradients, no
        backbone).

        Args:
            task: the task loss, a scalar with its graph; the others as in :meth:`forward`.

        Returns:
            The loss to call ``backward`` on, and what to log: ``task``, ``distill``, ``distill_<term>``,
            ``temperature``, ``alpha`` and ``balance`` (the factor <= 1 put on distillation).
        """
        losses, alpha = self(student_out, batch, matched, progress, ema_model)
        temperature, _, stage = self.cfg.schedule(progress)
        log = {f"distill_{name}": value for name, value in losses.items() if name != "total"}
        log |= {"task": task.detach(), "distill": losses["total"].detach(), "temperature": temperature, "alpha": alpha}
        if alpha == 0:
            return task, log
        task, distilled = (1 - alpha) * task, alpha * losses["total"]
        if stage.gradient_balance:
            log["balance"] = balance_factor(task, distilled, student_out["neck"])
            distilled = log["balance"] * distilled
        return task + distilled, log

    def get_extra_state(self) -> dict:
        """Own-best weights, so that a resumed run needs no other file, and whose predictions the mimics repeat."""
        best = self.teachers.own_best
        mimicked = [{"model": to_dict(t.config), "per_size": t.per_size} for t in self.teachers.frozen]
        return {"own_best": None if best is None else best.state_dict(), "mimicked": mimicked if self.mimics else []}

    def set_extra_state(self, state: dict) -> None:
        self.teachers.own_best = None
        if state["own_best"] is not None:
            from models.featherface import build_model  # models import layers

            model = build_model(self.student)
            model.load_state_dict(state["own_best"])
            self.teachers.set_own_best(model)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.teachers.apply_to_models(fn)
        return self

    def _cells(self, images: Tensor) -> list[tuple[int, int, int]]:
        height, width = images.shape[-2:]
        return [(cells(height, s), cells(width, s), len(a)) for s, a in zip(self.student.strides, self.student.anchors)]

    def _copy_terms(
        self,
        student: Prediction,
        target: Target,
        batch: dict,
        matched: Tensor,
        temperature: float,
        stage: DistillStage,
    ) -> dict[str, Tensor]:
        """Scores and boxes, on positives, their neighbourhood and hard negatives."""
        mask = terms.build_mask(student.logits, target.logits, matched >= 0, self._cells(batch["images"]))
        score_weight = box_weight = mask.weight
        if stage.only_where_better:
            graded = self.loss.classification == "quality_focal"
            score_better, box_better = _teacher_better(student, target, mask, batch["boxes"], matched, graded)
            score_weight, box_weight = score_weight * score_better, box_weight * box_better
        return self._copy(student, target, mask, score_weight, box_weight, temperature)

    def _copy(
        self,
        student: Prediction,
        target: Target,
        mask: terms.Mask,
        score_weight: Tensor,
        box_weight: Tensor,
        temperature: float,
    ) -> dict[str, Tensor]:
        logits, score_weight = mask.pick(target.logits), score_weight * mask.pick(target.known)
        score = terms.score_term(mask.pick(student.logits), logits, score_weight, temperature)
        places = [mask.pick(x) for x in (student.boxes, student.landmarks, target.boxes, target.landmarks)]
        box = terms.box_term(*places, box_weight, mask.pick(target.trust), self.cfg.landmark_weight)
        return {"score": score, "box": box}

    def _alignment_terms(self, student_out: dict, frozen: list[dict], active: dict[str, float]) -> dict[str, Tensor]:
        """Neck features and attention maps, averaged over the loaded teachers that have them."""
        neck, values = student_out["neck"], {}
        frozen = [out for out in frozen if "neck" in out]
        if "feature" in active:
            each = []
            for adapter, out in zip(self.adapters, frozen):
                adapted = [conv(x.float()) for conv, x in zip(adapter, neck)]
                weights = out.get("attention") if self.cfg.feature_attention else None
                each.append(terms.feature_term(adapted, out["neck"], weights))
            values["feature"] = torch.stack(each).mean()
        if "attention" in active:
            each = []
            for out in frozen:
                each.append(terms.attention_term(neck, out["neck"]))
                if "attention" in out and "attention" in student_out:
                    each.append(terms.attention_term(student_out["attention"], out["attention"]))
            values["attention"] = torch.stack(each).mean()
        return values

    def _shares(self, images: int) -> list[slice]:
        """Which images of a batch each loaded teacher sees: all, or dealt out in turn (as far as they go round)."""
        count = len(self.teachers.frozen)
        deal = self.cfg.split_batch and images >= count
        return [slice(i, None, count) if deal else slice(None) for i in range(count)]

    def _dense_term(
        self, context: Sequence[Tensor], frozen: list[dict], images: Tensor, shares: Sequence[slice]
    ) -> Tensor:
        """The mimics' predictions against their teachers' on every anchor, averaged over the teachers: scores
        everywhere, boxes and landmarks where the teacher is confident."""
        each = []
        for mimic, teacher, theirs, share in zip(self.mimics, self.teachers.frozen, frozen, shares):
            levels = [x[share].float() for x in context]
            ours = mimic(levels, levels, levels)
            score = terms.dense_score_term(ours["logits"], theirs["logits"].float())
            image, anchor = (theirs["logits"].sigmoid() >= terms.CONFIDENT).nonzero(as_tuple=True)
            # Only these are decoded: all of them would cost a tenth of a step.
            anchors = teacher.anchors(*images.shape[-2:], images.device)[anchor]
            variances = teacher.config.variances
            said, heard = ({k: out[k][image, anchor] for k in ours} for out in (ours, theirs))
            mine, wanted = decode(said, anchors, variances), decode(heard, anchors, variances)
            sure = wanted.logits.sigmoid()
            places = (mine.boxes, mine.landmarks, wanted.boxes, wanted.landmarks)
            box = terms.box_term(*places, torch.ones_like(sure), sure, self.cfg.landmark_weight)
            each.append(score + terms.DENSE_BOX_WEIGHT * box)
        return torch.stack(each).mean()

    def _memory_term(self, student: Prediction, batch: dict) -> Tensor:
        """Pull towards what was predicted for the same faces before, then remember the present."""
        boxes, scores = self.memory.recall(batch)
        image, anchor, column, overlap = find_again(boxes, scores, student, batch["images"].shape[-1])
        weight, score = scores[image, column] * overlap, scores[image, column]
        past = torch.logit(score, eps=1e-6)
        term = terms.score_term(student.logits[image, anchor], past, weight, temperature=1.0)
        points = student.landmarks[image, anchor].detach()  # landmarks are not remembered: any weight will do
        places = (student.boxes[image, anchor], points, boxes[image, column], points)
        term = term + terms.box_term(*places, weight, score, landmark_weight=0.0)
        if self.training:
            self.memory.remember(batch, student)
        return term

    def _consistency(self, student: Prediction, past: Target, images: Tensor) -> Tensor:
        """Pull towards the EMA model's prediction, which averages the student's past over training."""
        mask = terms.build_mask(student.logits, past.logits, past.trust >= terms.CONFIDENT, self._cells(images))
        return torch.stack(list(self._copy(student, past, mask, mask.weight, mask.weight, 1.0).values())).sum()


def balance_factor(task: Tensor, distilled: Tensor, neck: Sequence[Tensor]) -> Tensor:
    """Factor <= 1 after which the gradient of ``distilled`` on the neck is no longer than that of ``task``.

    Args:
        task, distilled: scalars, already weighted as they enter the sum.
        neck: neck outputs that both losses are computed from.

    Raises:
        RuntimeError: ``neck`` is not part of the task loss's graph, so there is nothing to balance against.
    """

    def length(loss: Tensor) -> Tensor | None:
        if not loss.requires_grad:
            return None
        grads = torch.autograd.grad(loss, list(neck), retain_graph=True, allow_unused=True)
        found = [g.float().square().sum() for g in grads if g is not None]
        return torch.stack(found).sum().sqrt() if found else None

    of_task, of_distilled = length(task), length(distilled)
    if of_task is None:
        raise RuntimeError("gradient balance: the task loss does not depend on the neck features it was given")
    if of_distilled is None:
        return task.new_ones(())
    return torch.where(of_distilled > of_task, of_task / of_distilled.clamp(min=1e-30), 1.0)


def _teacher_better(
    student: Prediction, target: Target, mask: terms.Mask, boxes: Tensor, matched: Tensor, graded: bool
) -> tuple[Tensor, Tensor]:
    """Masked anchors ``[P]`` where, against the labels, the teacher's score (box) beats the student's.

    Anchors on ignored faces have no label to judge by and count as not better; boxes are judged on positives. A
    positive's score should be 1, or where scores are ``graded`` (quality focal loss) the IoU of the student's box.
    """
    face = mask.pick(matched)
    label = mask.positive.float()
    box_better = torch.zeros_like(mask.positive)
    row = mask.positive.nonzero()[:, 0]
    image, anchor = mask.image[row], mask.anchor[row]
    faces = boxes[image, face[row]].float()
    iou_theirs = aligned_iou(target.boxes[image, anchor], faces)
    iou_ours = aligned_iou(student.boxes[image, anchor].detach(), faces)
    box_better[row] = iou_theirs > iou_ours
    if graded:
        label[row] = iou_ours.clamp(0, 1)
    theirs, ours = mask.pick(target.logits).sigmoid(), mask.pick(student.logits).detach().sigmoid()
    return ((theirs - label).abs() < (ours - label).abs()) & (face != IGNORED), box_better


def _adapters(student: ModelConfig, teacher: ModelConfig) -> nn.ModuleList:
    """One 1x1 convolution per level, starting as the identity as far as the channels go."""
    convs = nn.ModuleList(nn.Conv2d(student.out_channels, teacher.out_channels, 1) for _ in student.strides)
    if student.out_channels == teacher.out_channels:
        for conv in convs:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
    return convs
