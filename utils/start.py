"""What the weights of a new run begin as: another network's, as far as it fits."""

from __future__ import annotations

from torch import nn

from layers.distillation import ProgressiveDistillation
from models.inherit import InheritError, inherit
from utils.checkpoint import CheckpointError, load_checkpoint, load_model
from utils.config import TrainConfig
from utils.convert import load_backbone
from utils.weights import find_weights

REFINEMENT = "landmark_refinement."  # prefix of its tensors


def start_weights(model: nn.Module, cfg: TrainConfig) -> str:
    """Load ``init_weights`` (the whole model), else ``inherit_weights``, else ``backbone_weights``, as the config says.

    The landmark refinement, which begins by changing next to nothing and never more than landmarks, may be missing on
    either side of ``init_weights``.

    Returns:
        What there is to tell: which tensors got nothing, or what was left out; "" = nothing.

    Raises:
        CheckpointError: a file is missing or does not fit.
    """
    if cfg.init_weights:
        path = find_weights(cfg.init_weights)
        told, content = "", load_checkpoint(path)
        try:
            state = content["state_dict"]
            theirs, ours = (
                {key: value for key, value in tensors.items() if key.startswith(REFINEMENT)}
                for tensors in (state, model.state_dict())
            )
            if ours and not theirs:
                state, told = state | ours, f"started from {cfg.init_weights}: the landmark refinement is new"
            elif theirs and not ours:
                state = {key: value for key, value in state.items() if key not in theirs}
                told = f"started from {cfg.init_weights}, without its landmark refinement"
            model.load_state_dict(state)
        except (KeyError, RuntimeError) as e:
            reason = str(e).strip().splitlines()[-1].strip()
            raise CheckpointError(f"{path}: does not fit this model, cannot start from it: {reason}") from None
        return told
    elif cfg.inherit_weights:
        path = find_weights(cfg.inherit_weights)
        try:
            fresh = inherit(model, load_model(path)[0])
        except InheritError as e:
            raise CheckpointError(f"{path}: {e}") from None
        rest = f"all but {', '.join(fresh)}" if fresh else "everything"
        return f"inherited from {cfg.inherit_weights}: {rest}"
    elif cfg.backbone_weights:
        load_backbone(model.backbone, find_weights(cfg.backbone_weights))
    return ""


def start_mimics_from(distiller: ProgressiveDistillation, file: str) -> None:
    """Take over the mimics of another run's ``last.pth``.

    Raises:
        CheckpointError: it is missing, or has no mimics that fit.
    """
    path = find_weights(file)
    try:
        distiller.take_mimics((load_checkpoint(path).get("training") or {}).get("distiller") or {})
    except ValueError as e:
        raise CheckpointError(f"{path}: cannot start from its mimics: {e}") from None
