"""Each transform moves boxes and landmarks with the pixels: painted faces must be found where the labels say."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import pixels
from data import plan as plan_module
from data.augmentations_smart import (
    GEOMETRIC,
    Erase,
    Mix,
    draw_colour,
    draw_cutmix,
    draw_erase,
    draw_mixup,
    draw_mosaic,
    draw_policy,
    mix_faces,
    mosaic_faces,
)
from data.dataset import load_dataset
from data.geometry import affine_matrix, draw_crop, finish_faces, move_faces, warp_faces
from data.labels import Faces
from data.pipeline import build_pipeline
from data.plan import plan_sample
from data.preprocess import denormalise
from tests.face_data import BACKGROUND, FACE, POINT_COLOURS, POINTS, make_config, make_folder, paint
from utils.config import AugmentConfig

SIZE = 160
MIRRORED = [1, 0, 2, 4, 3]  # image-left eye first, also after flipping


@pytest.fixture
def data(tmp_path):
    pictures = {
        "e/a.png": (300, 220, [(60, 60, 60, 60), (180, 100, 48, 48)]),
        "e/b.png": (200, 280, [(70, 150, 72, 72)]),
    }
    return load_dataset(make_config(make_folder(tmp_path, pictures)).data)


def faces_of(boxes, ignore=None) -> Faces:
    n = len(boxes)
    boxes = np.array(boxes, np.float32).reshape(n, 4)
    points = np.repeat(((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None], 5, axis=1)
    return Faces(boxes, points, np.ones(n, bool), np.zeros(n, bool) if ignore is None else np.array(ignore, bool))


def draw(data, index: int, seed: int, **augment):
    """-> RGB float [3, S, S] as in the batch, and its plan."""
    cfg = AugmentConfig(**{"photometric_prob": 0.0, "min_face": 4.0, **augment})
    plan = plan_sample(data, cfg, index, SIZE, np.random.default_rng([seed, index]))

    stored = torch.from_numpy(np.array(Image.open(data.paths[index]).convert("RGB")))
    square = pixels.blank_squares(1, SIZE, torch.device("cpu"))
    pixels.cut_and_resize(stored, plan.crop, square[0])
    image = square[0].float()
    return (pixels.warp(image, plan.warp) if plan.warp is not None else image), plan


def is_colour(image: torch.Tensor, x: float, y: float, colour) -> bool:
    """Whether the pixel at (x, y) looks like the colour, up to resampling."""
    pixel = image[:, int(y), int(x)]
    return bool((pixel - torch.tensor(colour, dtype=torch.float32)).abs().max() < 90)


def check_faces(image: torch.Tensor, plan, flipped: bool, edge: float) -> int:
    """Box edges and landmarks of every large learnable face are where the paint is; -> faces checked."""
    checked = 0
    for box, points, has in zip(plan.faces.boxes, plan.faces.landmarks, plan.faces.has_landmarks & ~plan.faces.ignore):
        x0, y0, x1, y1 = box
        if min(x1 - x0, y1 - y0) < 24:
            continue
        checked += 1
        cx, cy = (x0 + x1) / 2, y0 + 0.12 * (y1 - y0)
        for x, y, dx in ((x0, cy, -1), (x1, cy, 1)):
            if edge < x < SIZE - edge and plan.warp is None and y0 > 0:
                assert is_colour(image, x - dx * edge, y, FACE), "inside the box"
                assert not is_colour(image, x + dx * edge, y, FACE), "outside the box"
        if edge < y0 < SIZE - edge and plan.warp is None and x0 > 0 and x1 < SIZE:
            assert is_colour(image, cx, y0 + edge, FACE) and not is_colour(image, cx, y0 - edge, FACE)
        if has:
            colours = POINT_COLOURS[MIRRORED] if flipped else POINT_COLOURS
            for (x, y), colour in zip(points, colours):
                if 1 < x < SIZE - 1 and 1 < y < SIZE - 1:
                    beyond = plan.warp is not None and is_colour(image, x, y, pixels.PAD_RGB)  # within LANDMARK_MARGIN
                    assert beyond or is_colour(image, x, y, colour), "landmark"
    return checked


def test_crops_show_a_face_to_learn_from_not_one_to_ignore(data):
    data.labels.ignore[0] = True  # of the first photo's two
    for seed in range(40):
        _, plan = draw(data, 0, seed, crop_scales=[0.4], whole_image_prob=0.0)
        assert not plan.faces.ignore.all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scales", [[0.4], [0.7], [1.0], [1.5]])
def test_crop_and_flip_move_labels_with_pixels(data, scales, flip):
    checked = 0
    for seed in range(15):
        for index in (0, 1):
            image, plan = draw(data, index, seed, crop_scales=scales, flip_prob=flip)
            assert plan.crop.flip == bool(flip)
            checked += check_faces(image, plan, plan.crop.flip, edge=2.5)
    assert checked > 15


def test_whole_image_fits_the_square(data):
    image, plan = draw(data, 0, 1, whole_image_prob=1.0, flip_prob=0.0)
    assert plan.crop.source == (0, 0, 300, 220) and len(plan.faces) == 2
    assert check_faces(image, plan, False, edge=2.5) == 2
    x0, y0, x1, y1 = plan.crop.target
    assert (x0, x1) == (0, SIZE) and y1 - y0 == round(220 * SIZE / 300)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    padding = image[:, ~inside]
    assert padding.numel() and (padding == torch.tensor(pixels.PAD_RGB)[:, None]).all()


def test_transform_maps_original_to_square(data):
    for seed in range(5):
        _, plan = draw(data, 0, seed, crop_scales=[0.8, 1.7], flip_prob=0.5)
        ax, bx, ay, by, flip, inexact = plan.transform
        original = data.labels.faces(0)
        x = original.landmarks[..., 0] * ax + bx
        y = original.landmarks[..., 1] * ay + by
        x = SIZE - x if flip else x
        moved = move_faces(original, plan.transform, SIZE)
        order = MIRRORED if flip else list(range(5))
        assert np.allclose(moved.landmarks[..., 0], x[:, order]) and np.allclose(moved.landmarks[..., 1], y[:, order])
        assert inexact == 0 and flip == plan.crop.flip


def test_flipping_twice_is_nothing():
    faces = faces_of([[10, 20, 50, 70]])
    faces.landmarks = np.random.default_rng(0).uniform(0, 100, (1, 5, 2)).astype(np.float32)
    mirror = np.array([1, 0, 1, 0, 1, 0], np.float64)
    twice = move_faces(move_faces(faces, mirror, 100), mirror, 100)
    assert np.allclose(twice.boxes, faces.boxes) and np.allclose(twice.landmarks, faces.landmarks)
    assert not np.allclose(move_faces(faces, mirror, 100).landmarks, faces.landmarks)


def test_warped_crops_show_the_faces_they_teach(data):
    """What a crop cuts off does not come back as padding when the square is turned."""
    pad = torch.tensor(pixels.PAD_RGB)[:, None, None]
    checked = 0
    for seed in range(300):
        for index in (0, 1):
            image, plan = draw(data, index, seed, crop_scales=[0.4, 0.6], auto_augment_prob=1.0)
            if plan.warp is None:
                continue
            checked += check_faces(image, plan, plan.crop.flip, edge=2.5)
            for box in plan.faces.boxes[~plan.faces.ignore]:
                x0, y0, x1, y1 = np.clip(np.round(box), 0, SIZE).astype(int)
                empty = ((image[:, y0:y1, x0:x1] - pad).abs() < 1).all(dim=0)
                assert empty.float().mean() < 0.4
    assert checked > 50


def test_a_face_of_which_a_crop_shows_little_is_not_learnt_once_turned(tmp_path, monkeypatch):
    """Turning makes its box a smaller one, of which the crop would show half."""
    data = load_dataset(make_config(make_folder(tmp_path, {"e/a.png": (300, 300, [(200, 200, 60, 60)])})).data)
    data.labels.boxes[:] = [[262, 262, 332, 332]]  # a quarter of it is in the photo
    monkeypatch.setattr(plan_module, "draw_policy", lambda rng: [("rotate", 0.3)])
    augment = AugmentConfig(crop_scales=[1.0], auto_augment_prob=1.0, flip_prob=0.0)
    plan = plan_sample(data, augment, 0, SIZE, np.random.default_rng(0))
    assert plan.faces.ignore.tolist() == [True]


@pytest.mark.parametrize("path", ["loader", "device"])
def test_padding_is_zero_to_the_network(tmp_path, path):
    cfg = make_config(make_folder(tmp_path), {"crop_scales": [2.0], "photometric_prob": 0.0}, pipeline=path)
    for batch in build_pipeline(cfg, "cpu").batches(0):
        assert ((batch["images"].abs() < 0.51).all(1).float().mean((1, 2)) > 0.2).all()


def test_posterising_keeps_bits_and_solarising_turns_the_bright():
    ramp = torch.arange(256.0).expand(3, 256, 256)
    assert pixels.apply_operation(ramp, "posterize", 3, 0).unique().tolist() == [32.0 * i for i in range(8)]
    solarized = pixels.apply_operation(ramp, "solarize", 200, 0)[0, 0]
    assert torch.equal(solarized[:200], ramp[0, 0, :200]) and torch.equal(solarized[200:], 255 - ramp[0, 0, 200:])


def test_gamma_after_a_warp_of_black_is_finite():
    """Interpolation about the padding's colour left -1e-6 where the photo is black; its power was NaN."""
    warped = pixels.warp(torch.zeros(3, SIZE, SIZE), affine_matrix(7.0, 0.05))
    assert warped.min() >= 0 and warped.max() <= 255
    assert pixels.apply_operation(warped, "gamma", 1.65, seed=0).isfinite().all()


@pytest.mark.parametrize(("degrees", "shear"), [(15, 0), (-15, 0), (0, 0.12), (8, -0.1)])
def test_rotation_and_shear_move_labels_with_pixels(degrees, shear):
    image = torch.from_numpy(paint(SIZE, SIZE, [(40, 50, 72, 72)])).permute(2, 0, 1).float()

    faces = faces_of([[40, 50, 112, 122]])
    faces.landmarks = (POINTS * 72 + (40, 50))[None].astype(np.float32)
    matrix = affine_matrix(degrees, shear)
    turned, moved = pixels.warp(image, matrix), warp_faces(faces, matrix, SIZE)
    for (x, y), colour in zip(moved.landmarks[0], POINT_COLOURS):
        assert is_colour(turned, x, y, colour)
    # The box fits the ellipse that the warp makes of the one inscribed in the old box.
    moved = warp_faces(faces_of([[30, 60, 130, 110]]), matrix, SIZE)
    yy, xx = np.mgrid[:SIZE, :SIZE] + 0.5
    disc = ((xx - 80) / 50) ** 2 + ((yy - 85) / 25) ** 2 < 1
    shown = (pixels.warp(torch.from_numpy(disc * np.float32(255)).repeat(3, 1, 1), matrix)[0] > 190).nonzero()
    true = [shown[:, 1].min(), shown[:, 0].min(), shown[:, 1].max() + 1, shown[:, 0].max() + 1]
    assert np.abs(moved.boxes[0] - np.array([float(v) for v in true])).max() < 1.5


def test_faces_cut_off_small_or_outside():
    faces = faces_of(
        [
            [10, 10, 40, 40],  # inside
            [-10, 10, 20, 40],  # cut, centre inside
            [-20, 10, 10, 40],  # cut, centre outside, a third shows
            [-28, 10, 1, 40],  # a sliver
            [200, 10, 240, 40],  # outside
            [50, 50, 53, 53],  # too small
        ]
    )
    done = finish_faces(faces, 100, min_face=4.0)
    assert done.boxes.tolist() == [[10, 10, 40, 40], [0, 10, 20, 40], [0, 10, 10, 40], [50, 50, 53, 53]]
    assert done.ignore.tolist() == [False, False, True, True]


def test_a_tenth_of_a_face_is_enough_to_be_ignored():
    done = finish_faces(faces_of([[-34, 10, 6, 50], [-37, 10, 3, 50]]), 100, min_face=4.0)  # 15% and 7.5%
    assert done.boxes.tolist() == [[0, 10, 6, 50]] and done.ignore.tolist() == [True]


def test_a_face_thinner_than_a_pixel_is_ignored():
    assert finish_faces(faces_of([[10, 50, 90, 50.5]]), 100, min_face=4.0).ignore.tolist() == [True]


def test_landmarks_far_outside_are_dropped():
    faces = faces_of([[0, 10, 40, 50], [0, 10, 40, 50]])
    faces.landmarks[0, 0] = (-5, 20)
    faces.landmarks[1, 0] = (-15, 20)
    assert finish_faces(faces, 100, 4.0).has_landmarks.tolist() == [True, False]


def test_crops_nearly_always_show_a_face():
    rng = np.random.default_rng(0)
    cfg = AugmentConfig(crop_scales=[0.3, 0.6])
    face = np.array([[900.0, 20.0, 930.0, 50.0]])
    seen = 0
    for _ in range(200):
        x0, y0, x1, y1 = draw_crop(rng, (1000, 700), face, cfg, 320).source
        assert 0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 700
        seen += x0 <= 915 < x1 and y0 <= 35 < y1
    assert seen == 200


def test_a_large_face_of_which_little_shows_is_still_learnt():
    faces = Faces(np.array([[-2.0, 10, 3, 15]], np.float32), np.zeros((1, 5, 2)), np.zeros(1, bool), np.zeros(1, bool))
    assert not finish_faces(faces, 100, min_face=4.0).ignore.any()  # 5 px, of which 3 x 5 show


def test_crops_look_for_a_face_that_is_large_enough_in_them():
    """Only the smaller crop shows the 20-px face at 10 px or more."""
    cfg = AugmentConfig(crop_scales=[0.2, 1.0], min_face=10.0)
    face = np.array([[490.0, 490, 510, 510]])
    crops = [draw_crop(np.random.default_rng(i), (1000, 1000), face, cfg, 100).source for i in range(40)]
    sides = [x1 - x0 for x0, _, x1, _ in crops]
    assert sides.count(1000) < 5 + sides.count(200) and set(sides) <= {200, 1000}


def test_crops_that_show_no_face_by_chance_are_aimed_at_the_larger_ones():
    centres = np.array([[150, 150], [500, 150], [850, 150], [150, 850], [500, 850], [850, 850]])
    half = np.array([3, 3, 3, 6, 6, 6])[:, None]
    faces, cfg = np.concatenate([centres - half, centres + half], axis=1), AugmentConfig(crop_scales=[0.02])
    crops = [draw_crop(np.random.default_rng(i), (1000, 1000), faces, cfg, 100).source for i in range(50)]
    shown = np.array([[(c >= k[:2]).all() and (c < k[2:]).all() for c in centres] for k in crops])
    assert shown.any(axis=1).all() and shown[:, 3:].any(axis=1).mean() > 0.8


def test_a_crop_larger_than_the_photo_lies_anywhere_around_it():
    rng = np.random.default_rng(0)
    cfg = AugmentConfig(crop_scales=[2.0], min_face=10.0)  # aimed: the face is too small in every crop
    face = np.array([[50.0, 50.0, 55.0, 55.0]])
    corners = {draw_crop(rng, (100, 100), face, cfg, 100).target[:2] for _ in range(100)}
    assert len(corners) > 20 and all(0 <= x <= 50 and 0 <= y <= 50 for x, y in corners)


def test_colour_map_is_what_it_says():
    grey = torch.full((1, 3, 4, 4), 114.0)
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(40):
        matrix = draw_colour(rng)
        out = pixels.recolour(grey, torch.from_numpy(matrix[None].astype(np.float32)))
        assert 0 <= out.min() and out.max() <= 255
        assert out.std(dim=1).max() < 1.5  # grey stays grey: only brightness moves it
        changed += not np.allclose(matrix, np.eye(3, 4))
    assert changed > 25
    image = torch.rand(1, 3, 4, 4) * 255
    assert torch.allclose(pixels.recolour(image, torch.eye(3, 4)[None]), image, atol=1e-3)


def test_each_part_of_the_colour_map_comes_in_half_of_the_draws():
    """Brightness, contrast about the mean, saturation and hue, told apart in YIQ, where each acts by itself."""
    rng = np.random.default_rng(0)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    drawn = []
    for _ in range(300):
        matrix = draw_colour(rng)
        luma, *chroma = (to_yiq @ matrix[:, :3] @ np.linalg.inv(to_yiq)).T
        contrast, (across, along) = luma[0], chroma[0][1:]
        hue = np.degrees(np.arctan2(along, across))
        drawn.append([matrix[0, 3] - (1 - contrast) * 114, contrast, np.hypot(across, along) / contrast, hue])
    neutral, reach = np.array([0, 1, 1, 0]), np.array([32, 0.5, 0.5, 18])
    away = (np.array(drawn) - neutral) / reach
    used = np.abs(away) > 1e-6
    assert (np.abs(used.mean(axis=0) - 0.5) < 0.1).all()
    assert (np.abs(away) < 1 + 1e-6).all() and (away.min(axis=0) < -0.9).all() and (away.max(axis=0) > 0.9).all()


def test_sub_policies_turn_and_shear(data):
    kinds = set()
    for seed in range(100):
        _, plan = draw(data, 0, seed, auto_augment_prob=1.0)
        if plan.warp is not None:
            (a, b), (c, d) = plan.warp
            kinds.add(("turned" if abs(c) > 0.01 else "", "sheared" if abs(a * b + c * d) > 0.01 else ""))
    assert kinds == {("turned", ""), ("", "sheared")}  # no policy has both


# ---- mixing and erasing


def crowd(rng, count) -> Faces:
    corner = rng.uniform(0, SIZE - 30, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(6, 30, (count, 1))], axis=1)
    return faces_of(boxes, rng.random(count) < 0.2)


def crossed(rect, boxes) -> np.ndarray:
    x0, y0, x1, y1 = rect
    touch = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    inside = (boxes[:, 0] >= x0) & (boxes[:, 2] <= x1) & (boxes[:, 1] >= y0) & (boxes[:, 3] <= y1)
    return touch & ~inside


def test_a_policy_turns_before_it_changes_colours():
    drawn = [[name in GEOMETRIC for name, _ in draw_policy(np.random.default_rng(seed))] for seed in range(100)]
    assert [True, False] in drawn and [False, True] not in drawn


def test_cutmix_never_cuts_a_face():
    rng = np.random.default_rng(0)
    made = 0
    for _ in range(150):
        first, second = crowd(rng, 5), crowd(rng, 4)
        second = finish_faces(second, SIZE, 4.0)
        mix = draw_cutmix(rng, first, second, SIZE)
        if mix is None:
            continue
        made += 1
        assert not crossed(mix.source, second.boxes).any() and not crossed(mix.target, first.boxes).any()
        size = [(r[2] - r[0], r[3] - r[1]) for r in (mix.source, mix.target)]
        assert size[0] == size[1] and min(mix.source + mix.target) >= 0 and max(mix.source + mix.target) <= SIZE
        together = mix_faces(first, second, mix)
        brought = together.boxes[-1]
        tx0, ty0, tx1, ty1 = mix.target
        assert tx0 <= brought[0] and ty0 <= brought[1] and brought[2] <= tx1 + 1e-3 and brought[3] <= ty1 + 1e-3
        assert (~together.ignore).any()
    assert made > 60


def test_cutmix_leaves_faces_at_the_border_alone():
    rng = np.random.default_rng(0)
    cut_by_border = finish_faces(faces_of([[-10, 40, 30, 80]]), SIZE, 4.0)
    assert all(draw_cutmix(rng, faces_of([]), cut_by_border, SIZE) is None for _ in range(20))
    assert draw_cutmix(rng, faces_of([]), faces_of([]), SIZE) is None


def test_cutmix_brings_no_piece_of_a_face_that_the_border_cuts():
    rng = np.random.default_rng(0)
    there = finish_faces(faces_of([[-10, 40, 30, 80], [42, 50, 62, 70]]), SIZE, 4.0)
    mixes = [draw_cutmix(rng, faces_of([]), there, SIZE) for _ in range(20)]
    assert sum(mix is not None for mix in mixes) > 5
    assert all(mix.source[0] >= 30 or mix.source[1] >= 80 or mix.source[3] <= 40 for mix in mixes if mix)


def test_cutmix_covers_no_face_where_there_is_another_place():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(2, 80, 8), np.arange(2, SIZE, 8)), axis=-1).reshape(-1, 2)
    left, there = faces_of(np.concatenate([grid, grid + 1], axis=1)), faces_of([[60, 60, 72, 72]])
    for _ in range(40):
        mix = draw_cutmix(rng, left, there, SIZE)
        assert mix_faces(left, there, mix).boxes[:-1].tolist() == left.boxes.tolist()


def test_cutmix_brings_pixels_and_labels_together():
    first = torch.zeros(3, SIZE, SIZE)
    second = torch.from_numpy(paint(SIZE, SIZE, [(40, 60, 36, 36)])).permute(2, 0, 1).float()
    there, here = faces_of([[40, 60, 76, 96]]), faces_of([[100, 100, 110, 110]])
    mix = draw_cutmix(np.random.default_rng(3), here, there, SIZE)
    pixels.mix_images(first, second, mix)
    x0, y0, x1, y1 = mix_faces(here, there, mix).boxes[-1]
    assert is_colour(first, x0 + 1, y0 + 1, FACE) and is_colour(first, x1 - 1, y1 - 1, FACE)
    assert not is_colour(first, x0 - 1, y0 - 1, FACE) and not is_colour(first, x1 + 1, y1 + 1, FACE)


def test_cutmix_removes_the_faces_it_covers():
    mix = Mix(1.0, (0, 0, 50, 50), (60, 60, 110, 110))
    first, second = faces_of([[70, 70, 80, 80], [10, 10, 20, 20]]), faces_of([[5, 5, 25, 25], [60, 60, 70, 70]])
    assert mix_faces(first, second, mix).boxes.tolist() == [[10, 10, 20, 20], [65, 65, 85, 85]]


def test_mixup_keeps_all_faces_visible():
    rng = np.random.default_rng(0)
    first, second, none = faces_of([[0, 0, 9, 9]]), faces_of([[5, 5, 20, 20]]), faces_of([])
    for _ in range(50):
        mix = draw_mixup(rng, first, second, SIZE)
        assert 0.35 <= mix.keep <= 0.65
        assert draw_mixup(rng, first, none, SIZE).keep >= 0.5 >= draw_mixup(rng, none, second, SIZE).keep
    assert mix_faces(first, second, mix).boxes.tolist() == [[0, 0, 9, 9], [5, 5, 20, 20]]
    a, b = torch.full((3, 4, 4), 100.0), torch.full((3, 4, 4), 200.0)
    pixels.mix_images(a, b, Mix(0.6))
    assert torch.allclose(a, torch.full_like(a, 140.0))


def test_mosaic_covers_the_square_once_and_shows_faces():
    rng = np.random.default_rng(0)
    shown, corners = 0, set()
    for _ in range(60):
        others = [crowd(rng, 3) for _ in range(3)]
        stays, mixes = draw_mosaic(rng, others, SIZE)
        corners.add((stays[0] > 0, stays[1] > 0))
        painted = np.zeros((SIZE, SIZE), int)
        for x0, y0, x1, y1 in (stays, *(mix.target for mix in mixes)):
            painted[y0:y1, x0:x1] += 1
        assert (painted == 1).all()
        for faces, mix in zip(others, mixes):
            (sx0, sy0, sx1, sy1), (tx0, ty0, tx1, ty1) = mix.source, mix.target
            assert (sx1 - sx0, sy1 - sy0) == (tx1 - tx0, ty1 - ty0) and min(tx1 - tx0, ty1 - ty0) >= 0.3 * SIZE
            assert min(mix.source) >= 0 and max(mix.source) <= SIZE
            learnt = faces.boxes[~faces.ignore]
            shown += bool(((learnt[:, :2] >= (sx0, sy0)) & (learnt[:, 2:] <= (sx1, sy1))).all(axis=1).any())
    assert shown > 160 and len(corners) == 4  # of 180; any part may stay
    assert len(draw_mosaic(rng, [faces_of([])] * 3, SIZE)[1]) == 3


def test_mosaic_brings_pixels_and_labels_together():
    there = [(20, 30, 36, 36), (100, 24, 40, 40), (60, 100, 44, 44)]
    others = [faces_of([[x, y, x + w, y + h]]) for x, y, w, h in there]
    first = torch.from_numpy(paint(SIZE, SIZE, [(4, 4, 20, 20), (136, 136, 20, 20)])).permute(2, 0, 1).float()
    own = faces_of([[4, 4, 24, 24], [136, 136, 156, 156]])
    checked = 0
    for seed in range(20):
        stays, mixes = draw_mosaic(np.random.default_rng(seed), others, SIZE)
        image = first.clone()
        for face, mix in zip(there, mixes):
            other = torch.from_numpy(paint(SIZE, SIZE, [face])).permute(2, 0, 1).float()
            pixels.mix_images(image, other, mix)
        found = mosaic_faces(
            [(own, stays, stays), *((f, mix.source, mix.target) for f, mix in zip(others, mixes))], 4.0
        )
        for box in found.boxes[~found.ignore]:
            if 20 <= (box[2:] - box[:2]).min() and box.min() > 1 and box.max() < SIZE - 1:
                x0, y0, x1, y1 = box
                assert is_colour(image, x0 + 1, y0 + 1, FACE) and is_colour(image, x1 - 2, y1 - 2, FACE)
                checked += 1
    assert checked > 40


def test_mosaic_ignores_what_is_mostly_cut_off():
    stays, square = (0, 0, 80, 160), faces_of([[60, 20, 90, 50], [70, 60, 86, 76], [64, 100, 100, 140], [90, 0, 99, 9]])
    window = Mix(1.0, (10, 0, 90, 160), (80, 0, 160, 160))
    other = faces_of([[20, 20, 40, 40], [88, 90, 98, 100], [12, 4, 15, 7]])
    found = mosaic_faces([(square, stays, stays), (other, window.source, window.target)], 4.0)
    # learnt: two thirds and 10/16 of two; ignored: 16/36 of the third, the other's small one; gone: all else
    assert found.boxes.tolist() == [
        [60, 20, 80, 50],
        [70, 60, 80, 76],
        [64, 100, 80, 140],
        [90, 20, 110, 40],
        [158, 90, 160, 100],
        [82, 4, 85, 7],
    ]
    assert found.ignore.tolist() == [False, False, True, False, True, True]
    assert found.landmarks[3, 0].tolist() == [100, 30]
    assert found.has_landmarks.tolist() == [True, True, True, True, False, True]  # the fifth's are 3 of its 10 px out
    face = faces_of([[54, 134, 78, 158]])  # its landmarks may lie 6 px, a quarter of its side, out of the part
    for point, kept in (((83, 150), True), ((92, 150), False), ((60, 163), True), ((60, 170), False)):
        face.landmarks[0, 2] = point
        assert mosaic_faces([(face, stays, stays)], 4.0).has_landmarks.tolist() == [kept]
    # its centre is inside, but 29% of it, less than half, shows past a corner
    corner = mosaic_faces([(faces_of([[50, 50, 106, 106]]), (0, 0, 80, 80), (0, 0, 80, 80))], 4.0)
    assert corner.boxes.tolist() == [[50, 50, 80, 80]] and corner.ignore.tolist() == [True]
    # the square's own border counts too: 70% of the first shows, 40% of the second
    edge = mosaic_faces([(faces_of([[20, -18, 60, 42], [-30, 50, 20, 90]]), stays, stays)], 4.0)
    assert edge.boxes.tolist() == [[20, 0, 60, 42], [0, 50, 20, 90]] and edge.ignore.tolist() == [False, True]


def test_erase_avoids_faces():
    rng = np.random.default_rng(0)
    made = 0
    for _ in range(100):
        faces = crowd(rng, 6)
        for patch in draw_erase(rng, faces.boxes, SIZE):
            x0, y0, x1, y1 = patch.rect
            touch = (faces.boxes[:, 0] < x1) & (faces.boxes[:, 2] > x0)
            assert not (touch & (faces.boxes[:, 1] < y1) & (faces.boxes[:, 3] > y0)).any()
            assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
            made += 1
    assert made > 80
    image = torch.zeros(3, 8, 8)
    pixels.erase(image, [Erase((2, 3, 5, 6), (10, 20, 30))])
    assert image.sum() == 9 * 60 and image[:, 3, 2].tolist() == [10, 20, 30]


MIXING = ["mixup_prob", "cutmix_prob", "mosaic_prob"]
SWITCHES = ["flip_prob", "photometric_prob", "auto_augment_prob", *MIXING, "erase_prob"]


@pytest.mark.parametrize("switch", [*SWITCHES, "whole_image_prob"])
def test_each_switch_changes_the_batch_and_nothing_else_is_needed(tmp_path, switch):
    make_folder(tmp_path)
    off = {**dict.fromkeys(SWITCHES, 0.0), "crop_scales": [1.0]}
    train = {"stages": [{"size": 64, "batch_size": 6}]}
    plain = next(iter(build_pipeline(make_config(tmp_path, off, train), "cpu").batches(0)))
    changed = next(iter(build_pipeline(make_config(tmp_path, {**off, switch: 1.0}, train), "cpu").batches(0)))
    assert plain["names"] == [n.split(" + ")[0] for n in changed["names"]]
    assert not torch.equal(plain["images"], changed["images"])
    if switch != "auto_augment_prob":  # it may or may not rotate; mixing brings in faces that no transform maps back
        assert bool(changed["transform"][:, 5].any()) == (switch in MIXING)
    if switch in ("photometric_prob", "erase_prob"):
        assert torch.equal(plain["boxes"], changed["boxes"]) and torch.equal(plain["landmarks"], changed["landmarks"])


def test_everything_off_is_a_plain_crop(tmp_path):
    make_folder(tmp_path, {"e/a.png": (64, 64, [(10, 12, 24, 24)])})
    augment = {**dict.fromkeys(SWITCHES, 0.0), "crop_scales": [1.0]}
    train = {"stages": [{"size": 64, "batch_size": 1}]}
    batch = next(iter(build_pipeline(make_config(tmp_path, augment, train), "cpu").batches(0)))
    expected = torch.from_numpy(paint(64, 64, [(10, 12, 24, 24)])).permute(2, 0, 1)
    assert torch.equal(denormalise(batch["images"][0]), expected)
    assert batch["boxes"].tolist() == [[[10, 12, 34, 36]]] and batch["transform"].tolist() == [[1, 0, 1, 0, 0, 0]]
    assert denormalise(batch["images"])[0, :, 0, 0].tolist() == list(BACKGROUND)
