"""Merging the mimics of the distillation term ``dense`` into the student's heads."""

import pytest
import torch

from layers.distillation import ProgressiveDistillation
from layers.teachers import load_teachers
from models.featherface import build_model
from utils.checkpoint import inference_content, load_checkpoint, load_model, save_checkpoint
from utils.config import Config, DistillConfig, DistillStage, ModelConfig, to_dict
from utils.merge_mimics import main

SMALL = {"out_channels": 8, "bifpn_repeats": 1, "ssh_groups": 2}
TEACHER = ModelConfig(**SMALL, class_outputs=2)
DENSE = [DistillStage(1.0, {"dense": 1.0})]


def training_checkpoint(folder, stages=DENSE, **model) -> tuple[ModelConfig, ProgressiveDistillation]:
    """``folder/last.pth`` of a student with 8-px anchors whose heads and mimics are random."""
    torch.manual_seed(0)
    save_checkpoint(folder / "teacher.pth", inference_content("t", TEACHER, build_model(TEACHER).state_dict()))
    sizes = [[8, 16, 32], [64, 128], [256, 512]]
    cfg = Config(model=ModelConfig(**SMALL, anchors=sizes, **model))
    cfg.distill = DistillConfig(teachers=[str(folder / "teacher.pth")], stages=stages)
    distiller = ProgressiveDistillation(cfg.distill, cfg.model, load_teachers(cfg.distill.teachers), cfg.loss)
    student = build_model(cfg.model)
    for heads in (student.heads, distiller.mimics[0]):
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    content = inference_content("s", cfg.model, student.state_dict())
    content["training"] = {"config": to_dict(cfg), "distiller": distiller.state_dict()}
    content["training"] |= {"epoch": cfg.train.epochs, "done": 0, "progress": 1 - 1e-4}
    save_checkpoint(folder / "last.pth", content)
    return cfg.model, distiller


@pytest.mark.parametrize("outputs", [1, 2])
def test_merged_heads_say_the_mean_of_student_and_mimic(tmp_path, outputs, capsys):
    cfg, distiller = training_checkpoint(tmp_path, class_outputs=outputs)
    argv = [str(tmp_path / "last.pth"), "--share", "0.25", "--box-share", "0.5", "--out", str(tmp_path / "merged.pth")]
    assert main(argv) == 0
    assert "6 anchor sizes" in capsys.readouterr().out
    content = load_checkpoint(tmp_path / "merged.pth")
    assert "training" not in content and content["meta"]["mimics"] == {"share": 0.25, "box_share": 0.5}

    (before, _), (after, _) = (load_model(tmp_path / name) for name in ("last.pth", "merged.pth"))
    images = torch.randn(1, 3, 64, 96) * 50
    with torch.no_grad():
        ours, merged = before(images, features=True), after(images)
        theirs = distiller.mimics[0](*[ours["context"]] * 3)
    sizes, known = (build_model(c).anchors(64, 96)[:, 2] for c in (cfg, ModelConfig(**SMALL)))
    shared = sizes != 8  # the teacher has no such anchors
    assert sizes[shared].tolist() == known.tolist()
    for key, share in {"logits": 0.25, "boxes": 0.5, "landmarks": 0.5}.items():
        assert torch.equal(merged[key][:, ~shared], ours[key][:, ~shared])
        torch.testing.assert_close(merged[key][:, shared], (1 - share) * ours[key][:, shared] + share * theirs[key])


def test_what_cannot_be_merged_is_one_line(tmp_path, capsys, monkeypatch):
    training_checkpoint(tmp_path)
    out = ["--out", str(tmp_path / "x.pth")]
    assert main([str(tmp_path / "teacher.pth"), *out]) == 1
    assert "teacher.pth: no mimics" in capsys.readouterr().err
    for share in (["--share", "1.5"], ["--box-share", "-0.1"]):
        assert main([str(tmp_path / "last.pth"), *share, *out]) == 2
        assert "--share and --box-share must be" in capsys.readouterr().err
    training_checkpoint(tmp_path, smart_head=True)
    assert main([str(tmp_path / "last.pth"), *out]) == 1
    error = capsys.readouterr().err
    assert "smart_head" in error and error.count("\n") == 1
    training_checkpoint(tmp_path, [DistillStage(0.5, {"dense": 1.0}), DistillStage(1.0, {"score": 1.0})])
    assert main([str(tmp_path / "last.pth"), *out]) == 1
    assert "stopped learning" in capsys.readouterr().err
    training_checkpoint(tmp_path)
    content = load_checkpoint(tmp_path / "last.pth")
    content["training"]["config"]["distill"]["alpha"][-1] = 0.0
    save_checkpoint(tmp_path / "other.pth", content)
    assert main([str(tmp_path / "other.pth"), *out]) == 1
    assert "stopped learning" in capsys.readouterr().err
    content = load_checkpoint(tmp_path / "last.pth")
    content["training"]["distiller"]["_extra_state"]["mimicked"][0]["model"]["variances"] = [0.2, 0.2]
    save_checkpoint(tmp_path / "other.pth", content)
    assert main([str(tmp_path / "other.pth"), *out]) == 1
    assert "no teacher has an anchor" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for same in (str(tmp_path / "last.pth"), "last.pth"):
        assert main([str(tmp_path / "last.pth"), "--out", same]) == 1
        assert "would overwrite" in capsys.readouterr().err and "training" in load_checkpoint(tmp_path / "last.pth")
    assert not (tmp_path / "x.pth").exists()


def test_several_mimics_count_equally_and_yunet_s_outputs_are_left_out(tmp_path, capsys):
    training_checkpoint(tmp_path)
    content = load_checkpoint(tmp_path / "last.pth")
    learnt = content["training"]["distiller"]
    mimicked = learnt["_extra_state"]["mimicked"]
    teachers = content["training"]["config"]["distill"]["teachers"]
    teachers += ["second", "yunet"]
    for i, per_size in ((1, True), (2, False)):
        mimicked.append({**mimicked[0], "per_size": per_size})
        learnt |= {k.replace(".0.", f".{i}.", 1): v + i for k, v in learnt.items() if k.startswith("mimics.0.")}
    save_checkpoint(tmp_path / "three.pth", content)
    assert main([str(tmp_path / "three.pth"), "--share", "1", "--out", str(tmp_path / "merged.pth")]) == 0
    merged = load_checkpoint(tmp_path / "merged.pth")["state_dict"]
    torch.testing.assert_close(merged["heads.boxes.1.weight"], learnt["mimics.0.boxes.1.weight"] + 0.5)
    one = ["--teachers", "second", "--share", "1", "--out", str(tmp_path / "merged.pth")]
    assert main([str(tmp_path / "three.pth"), *one]) == 0
    merged = load_checkpoint(tmp_path / "merged.pth")["state_dict"]
    assert torch.equal(merged["heads.boxes.1.weight"], learnt["mimics.1.boxes.1.weight"])
    assert main([str(tmp_path / "three.pth"), "--teachers", "third", *one[2:]]) == 2
    assert "--teachers third" in capsys.readouterr().err
    for teacher in mimicked:
        teacher["per_size"] = False
    save_checkpoint(tmp_path / "three.pth", content)
    assert main([str(tmp_path / "three.pth"), "--out", str(tmp_path / "merged.pth")]) == 1
    assert "no teacher has an anchor" in capsys.readouterr().err


def test_a_landmark_refinement_must_learn_again(tmp_path, caplog):
    training_checkpoint(tmp_path)
    assert main([str(tmp_path / "last.pth"), "--out", str(tmp_path / "x.pth")]) == 0
    assert not caplog.messages
    training_checkpoint(tmp_path, landmark_refinement=True)
    assert main([str(tmp_path / "last.pth"), "--out", str(tmp_path / "x.pth")]) == 0
    assert "last.pth: its landmark refinement has not seen the merged landmarks" in caplog.text


@pytest.mark.parametrize(
    ("until", "state", "code"),
    [
        (0.5, {"epoch": 0, "progress": 0.0}, 0),
        (0.5, {"epoch": 175, "progress": 0.4999}, 0),  # of 350
        (0.5, {"epoch": 175, "progress": 0.5}, 1),
        (0.4985, {"epoch": 174, "progress": 0.4984}, 0),
        (0.4985, {"epoch": 174, "progress": 0.4986}, 1),  # switched off in mid-epoch
        (0.5, {"epoch": 175, "done": 0}, 0),  # as earlier versions wrote it
        (0.5, {"epoch": 175, "done": 1}, 1),
        (0.499, {"epoch": 175, "done": 0}, 1),
    ],
)
def test_a_run_that_was_stopped_while_its_mimics_learnt_can_be_merged(tmp_path, until, state, code):
    training_checkpoint(tmp_path, [DistillStage(until, {"dense": 1.0}), DistillStage(1.0, {"score": 1.0})])
    content = load_checkpoint(tmp_path / "last.pth")
    del content["training"]["progress"]
    content["training"] |= state
    save_checkpoint(tmp_path / "last.pth", content)
    assert main([str(tmp_path / "last.pth"), "--out", str(tmp_path / "merged.pth")]) == code
