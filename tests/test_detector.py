"""FaceDetector: input kinds, scales, batches, test-time augmentation, checkpoints."""

import os
import pickle
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image, ImageCms

from data.images import image_size
from models import FaceDetector
from models.detector import Detections, DeviceError, _to_picture, _View, pick_device
from models.featherface import build_model
from tests.squares import SquareNetwork, picture, points_of
from utils import weights
from utils.checkpoint import CheckpointError, inference_content, load_checkpoint, save_checkpoint
from utils.config import ROOT, ModelConfig, load_config
from utils.draw import TEMPLATE, align_face, blur_faces, draw_detections, similarity
from utils.image import ImageReadError, as_rgb, further_frames, read_image, resize, write_image

BOX = (30, 20, 70, 76)


@pytest.fixture
def detector() -> FaceDetector:
    return FaceDetector(SquareNetwork(), "cpu")


def check_one(found, box=BOX, tolerance=0.01):
    assert len(found.boxes) == 1
    np.testing.assert_allclose(found.boxes[0], box, atol=tolerance)
    np.testing.assert_allclose(found.landmarks[0], points_of(box), atol=tolerance)


# ---- what goes in -------------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_faces(detector, tmp_path):
    image = picture(100, 120, BOX)
    Image.fromarray(image).save(tmp_path / "a.png")
    kinds = [
        image,
        image[:, :, 0],
        image[:, :, :1],
        image.astype(np.uint16) * 257,
        np.dstack([image, np.full((100, 120), 255, np.uint8)]),
        Image.fromarray(image),
        torch.from_numpy(image).permute(2, 0, 1),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ]
    for kind in kinds:
        found = detector(kind)
        check_one(found)
        assert [a.dtype for a in found] == [np.float32] * 3
        assert found.scores[0] > 0.99


@pytest.mark.parametrize("bad", [np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8), np.zeros((2, 3, 4, 5), np.uint8)])
def test_arrays_that_are_no_pictures(detector, bad):
    with pytest.raises(ValueError, match="expected"):
        detector(bad)


def test_other_types(detector):
    with pytest.raises(TypeError, match="int"):
        detector(3)


def test_rgb_becomes_the_networks_bgr_minus_mean():
    seen = []

    class Spy(SquareNetwork):
        def forward(self, images):
            seen.append(images.clone())
            return super().forward(images)

    image = np.zeros((4, 5, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 200, 100, 50
    FaceDetector(Spy(), "cpu")(image)
    assert seen[0].shape == (1, 3, 32, 32)
    assert seen[0][0, :, 0, 0].tolist() == [50 - 104, 100 - 117, 200 - 123]
    assert seen[0][0, :, 4:].abs().max() == 0 and seen[0][0, :, :, 5:].abs().max() == 0


def test_one_pixel(detector):
    for scale in ("auto", "original", "vga", "1600"):
        found = detector(np.zeros((1, 1, 3), np.uint8), scale=scale)
        assert [a.shape for a in found] == [(0, 4), (0,), (0, 5, 2)]


# ---- reading files ------------------------------------------------------------------------------------------------


def test_truncated_jpeg_and_text_are_unreadable(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 90, 3), np.uint8)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("this is not a picture\n")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg", "folder.jpg"):
        with pytest.raises(ImageReadError) as e:
            read_image(tmp_path / name)
        assert str(e.value).startswith(str(tmp_path / name)) and "\n" not in str(e.value)
    assert read_image(data, "bytes").shape == (90, 90, 3)
    with pytest.raises(ImageReadError, match=r"cut\.jpg: cannot read the picture \(.*truncated"):
        as_rgb(Image.open(tmp_path / "cut.jpg"))


def test_exif_rotation_gives_displayed_coordinates(detector, tmp_path):
    shown = picture(100, 160, BOX)
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, back in turns.items():
        stored = Image.fromarray(shown).transpose(back)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "turned.png", exif=exif)
        assert read_image(tmp_path / "turned.png").shape == shown.shape
        check_one(detector(tmp_path / "turned.png"))


def test_an_odd_exif_tag_leaves_no_picture_sideways(tmp_path):
    """Pillow's own exif_transpose writes all tags anew and fails here: a resolution as text instead of a fraction."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 282, 2, 3, b"72")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    Image.new("RGB", (30, 20)).save(tmp_path / "odd.jpg", exif=exif)
    assert read_image(tmp_path / "odd.jpg").shape[1::-1] == image_size(tmp_path / "odd.jpg") == (20, 30)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_colour_profile_is_heeded(tmp_path, suffix):
    """sRGB's own with red and blue exchanged, under another name; a damaged one leaves the picture as it is stored."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    other = other.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    for profile, shown in (
        (srgb, (200, 80, 40)),
        (other, (40, 80, 200)),
        (b"none", (200, 80, 40)),
        (None, (200, 80, 40)),
    ):
        for mode in ("RGB", "RGBA") if suffix != "jpg" else ("RGB",):
            image = Image.new(mode, (16, 16), (200, 80, 40))
            image.save(tmp_path / f"a.{suffix}", icc_profile=profile)
            found = read_image(tmp_path / f"a.{suffix}").mean((0, 1))
            assert found == pytest.approx(shown, abs=6), (profile, mode)


def test_sixteen_bit_and_float_files_are_scaled(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "f.tif")
    Image.fromarray(ramp.astype(np.int32) * 257).save(tmp_path / "32.tif")
    for name in ("16.png", "f.tif", "32.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name), np.dstack([ramp] * 3), err_msg=name)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = [10, 20, 30, 255]
    rgba[0, 1] = [10, 20, 30, 0]
    rgba[1, 0] = [0, 0, 0, 128]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert (
        image[0, 0].tolist() == [10, 20, 30] and image[0, 1].tolist() == [255] * 3 and image[1, 0].tolist() == [127] * 3
    )
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0, 1].tolist() == [255] * 3


def test_palette_bilevel_and_cmyk(tmp_path):
    image = Image.fromarray(picture(40, 40, (10, 10, 30, 30)))
    image.convert("P").save(tmp_path / "p.gif")
    image.convert("1").save(tmp_path / "1.png")
    image.convert("CMYK").save(tmp_path / "c.jpg")
    for name in ("p.gif", "1.png", "c.jpg"):
        read = read_image(tmp_path / name)
        assert read.shape == (40, 40, 3) and read.dtype == np.uint8
        assert read[20, 20].min() > 230 and read[2, 2].max() < 60, name
    clear = image.quantize(2)
    clear.save(tmp_path / "t.png", transparency=clear.getpixel((2, 2)))
    assert read_image(tmp_path / "t.png")[2, 2].tolist() == [255] * 3


def test_a_matrix_is_a_grey_picture():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy would rather not have them
        assert (as_rgb(np.asmatrix(grey)) == grey[:, :, None]).all()


def test_frames_beside_the_first_are_counted(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert further_frames(tmp_path / name) == 2 and read_image(tmp_path / name)[0, 0, 0] > 250, name
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.jpg")
    (tmp_path / "c.gif").write_text("no picture")
    assert [further_frames(tmp_path / name) for name in ("phone.jpg", "b.jpg", "c.gif", "none.png")] == [0] * 4


def test_pictures_too_large_are_called_so(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ImageReadError, match=r"large\.png: too large, more than \d+ megapixels"):
        read_image(tmp_path / "large.png")


def test_written_pictures_look_like_what_they_show(tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = np.array(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC))
    for suffix, error in ((".png", 0), (".bmp", 0), (".jpg", 4), (".webp", 4)):
        write_image(tmp_path / f"a{suffix}", image)
        assert np.abs(read_image(tmp_path / f"a{suffix}") - image.astype(float)).mean() <= error, suffix


def test_shrinking_averages():
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[:, ::2] = 200
    assert (resize(stripes, 20, 20) == 100).all()


def test_samples_that_are_no_numbers_are_black():
    samples = np.array([[0.0, 0.2, 1.0], [np.nan, np.inf, -np.inf]], np.float32)
    assert as_rgb(Image.fromarray(samples))[..., 0].tolist() == [[0, 51, 255], [0, 0, 0]]


def test_shrinking_by_more_than_half_averages_too():
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[:, ::4] = 200
    assert (resize(stripes, 10, 10) == 50).all()


def test_a_dark_picture_of_16_bit_stays_dark():
    assert (as_rgb(np.full((2, 2), 200, np.uint16)) == 1).all()


def test_unreadable_exif_costs_no_picture(tmp_path):
    Image.new("RGB", (30, 20), "white").save(tmp_path / "a.png", exif=b"Exif\0\0no tiff header")
    assert read_image(tmp_path / "a.png").shape == (20, 30, 3)


def test_pixels_are_writable(tmp_path):
    for image in (Image.new("RGB", (3, 3)), np.asarray(Image.new("RGB", (3, 3)))):  # views of Pillow's are read-only
        as_rgb(image)[0, 0] = 1
    with pytest.raises(ValueError, match="with pixels, got one of 0x10"):
        as_rgb(Image.new("RGB", (0, 10)))


# ---- scales -------------------------------------------------------------------------------------------------------


def test_scales_map_back_to_the_original(detector):
    image = picture(300, 400, (100, 60, 180, 160))
    sizes = {
        "original": (320, 416),
        "vga": (480, 640),
        "1600": (1600, 2144),
        0.5: (160, 224),
        np.float32(1.4): (448, 576),
    }
    for scale, size in sizes.items():
        detector.network.batches.clear()
        check_one(detector(image, scale=scale), (100, 60, 180, 160), 0.6)
        assert detector.network.batches == [(1, 3, *size)], scale
    check_one(detector(picture(900, 1200, (300, 180, 540, 480)), scale="vga"), (300, 180, 540, 480), 2)
    for scale in ("big", 0.0, 1600, float("nan"), None):
        with pytest.raises(ValueError, match="scale"):
            detector(image, scale=scale)


def test_1600_limits_the_long_side(detector):
    detector(picture(100, 1000), scale="1600")
    assert detector.network.batches == [(1, 3, 224, 2176)]  # 215 x 2150, padded


def test_without_padding_the_input_keeps_its_size(detector):
    check_one(detector(picture(100, 121, BOX), pad=False))
    assert detector.network.batches == [(1, 3, 100, 121)]


def test_boxes_are_clipped_and_padding_holds_no_faces():
    class Padding(SquareNetwork):
        """Sees a face across the right border, and one wholly in the padding."""

        def forward(self, images):
            images = images.clone()
            images[:, :, 10:30, 80:110] = 140
            images[:, :, 104:124, 20:40] = 140
            return super().forward(images)

    found = FaceDetector(Padding(), "cpu")(picture(100, 100))
    np.testing.assert_allclose(found.boxes, [[80, 10, 100, 30]], atol=0.01)


def test_huge_pictures_are_shrunk_and_their_large_faces_found(detector, tmp_path):
    assert detector.max_side == 4096
    detector.max_side = 800  # the same at the size of a test
    Image.fromarray(picture(6000, 8000, (2000, 1000, 5000, 4600))[:, :, 0]).save(tmp_path / "huge.jpg")
    image = read_image(tmp_path / "huge.jpg")
    found = detector(image)
    assert len(found.boxes) == 1
    np.testing.assert_allclose(found.boxes[0], (2000, 1000, 5000, 4600), atol=20)
    assert detector.network.batches == [(1, 3, 704, 928), (1, 3, 480, 640)]  # 693 x 924 px, as many as 800 x 800
    detector.network.batches.clear()
    detector(image, scale="original")
    detector(image, scale="1600")
    assert detector.network.batches == [(1, 3, 704, 928)] * 2
    detector.network.batches.clear()
    detector.max_side = 300
    detector(image)
    assert detector.network.batches == [(1, 3, 288, 352)]  # the look at VGA size is no larger, and the same
    detector.max_side = 800
    detector.network.batches.clear()
    detector(picture(100, 6000), scale="original")  # long, but not large
    assert detector.network.batches == [(1, 3, 128, 6016)]


def test_parts_of_a_large_face_are_no_faces():
    class Parts(SquareNetwork):
        """At full size it sees, of a face of 1,300 px, only an eye of 420 px."""

        def forward(self, images):
            images = images.clone()
            if images.shape[3] > 640:
                images[:, :, :, :1650] = 0
                images[:, :, 600:1020, 500:920] = 140
            return super().forward(images)

    detector = FaceDetector(Parts(), "cpu")
    image = picture(1600, 2000, (300, 200, 1600, 1400), (1700, 100, 1770, 180))
    for tta in (False, True):
        found = detector(image, tta=tta)
        order = np.argsort(found.boxes[:, 0])
        np.testing.assert_allclose(found.boxes[order], [(300, 200, 1600, 1400), (1700, 100, 1770, 180)], atol=6)
    alone = detector(image, scale="original").boxes  # as it says: no other size
    assert sorted(alone[:, 2] - alone[:, 0]) == pytest.approx([70, 420], abs=0.1)


def test_the_look_at_vga_size_is_for_large_faces():
    class Spots(SquareNetwork):
        """At VGA size it also sees a face of 58 px, 91 px of the picture, where there is none."""

        def forward(self, images):
            images = images.clone()
            if images.shape[3] == 640:
                images[:, :, 400:458, 500:558] = 140
            return super().forward(images)

    detector = FaceDetector(Spots(), "cpu")
    large, small = (100, 100, 500, 560), (700, 100, 760, 180)
    found = detector(picture(1000, 1000, large, small))
    np.testing.assert_allclose(found.boxes[np.argsort(found.boxes[:, 0])], [large, small], atol=3)
    assert [size[3] for size in detector.network.batches] == [1024, 640]
    detector.network.batches.clear()
    detector(picture(640, 640, (100, 100, 500, 560)))
    assert [size[3] for size in detector.network.batches] == [640]  # already that size


def test_of_a_large_picture_the_look_at_vga_size_counts_every_face():
    class Far(SquareNetwork):
        """It sees faces at VGA size alone."""

        def forward(self, images):
            return super().forward(images if images.shape[3] == 640 else torch.zeros_like(images))

    assert len(FaceDetector(Far(), "cpu")(picture(1100, 1100, (100, 100, 250, 260))).boxes) == 1


def test_large_pictures_go_through_the_network_one_by_one(detector):
    for size, parts in (((4096, 4096), 4), ((4096, 2048), 2), ((64, 64), 1)):
        assert len(list(detector._parts([None] * 4, size))) == parts


def test_plain_numbers_keep_hundredths_of_a_pixel_and_four_digits_of_a_score():
    boxes, points = np.array([[1.234, 2.5, 30.25, 40.75]], np.float32), np.full((1, 5, 2), 7.128, np.float32)
    (face,) = Detections(boxes, np.array([0.98763], np.float32), points).as_dicts()
    assert face == {"box": [1.23, 2.5, 30.25, 40.75], "score": 0.9876, "landmarks": [[7.13, 7.13]] * 5}


def test_tta_takes_its_sizes_from_the_scale_asked_for(detector):
    detector(picture(300, 400, (100, 60, 180, 160)), scale="vga", tta=True)
    assert sorted(batch[2:] for batch in detector.network.batches) == [(256, 320), (480, 640), (736, 960)]


def faces_at(*boxes):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return {"boxes": boxes, "scores": torch.full((len(boxes),), 0.9), "landmarks": torch.zeros(len(boxes), 5, 2)}


def test_boxes_are_clipped_at_the_left_and_above(detector):
    found = detector._finish([faces_at((-5, -3, 20, 30))], picture(100, 120), 0.4)
    assert found.boxes.tolist() == [[0, 0, 20, 30]]


def test_views_are_merged_with_the_threshold_of_the_call(detector):
    views = [faces_at((10, 10, 50, 50)), faces_at((10, 20, 50, 60))]  # IoU 0.6
    assert [len(detector._finish(views, picture(100, 120), nms).boxes) for nms in (0.4, 0.9)] == [1, 2]


def test_thresholds_of_zero_are_thresholds(detector):
    image = picture(64, 64, (10, 10, 40, 50))
    every = len(detector(image, score=0.0).scores)
    assert every > 1 and 1 <= len(detector(image, score=0.0, nms=0.0).scores) < every


def test_each_axis_of_a_view_has_a_factor_of_its_own():
    """Of a strip of 10 px, a view has 6 rows where exactly 6.4 belong."""
    view = _View(0, 6, 640, False, (0.0, float("inf")))
    found = _to_picture(faces_at((64, 0, 128, 6)), view, picture(10, 1000))
    np.testing.assert_allclose(found["boxes"], [[100, 0, 200, 10]], rtol=1e-6)


def test_a_checkpoint_needs_no_suffix(tmp_path):
    (tmp_path / "best").touch()
    assert weights.find_weights(tmp_path / "best") == tmp_path / "best"


def test_the_backbones_start_is_looked_for_in_weights_first(tmp_path, monkeypatch):
    for name in ("WEIGHTS_DIR", "PUBLISHED_DIR"):
        monkeypatch.setattr(weights, name, tmp_path / name)
        (tmp_path / name).mkdir()
        (tmp_path / name / weights.IMAGENET_FILE).touch()
    assert weights.find_weights("imagenet").parent.name == "WEIGHTS_DIR"
    (tmp_path / "WEIGHTS_DIR" / weights.IMAGENET_FILE).unlink()
    assert weights.find_weights("imagenet").parent.name == "PUBLISHED_DIR"


def test_the_cache_is_where_the_user_says_or_where_it_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temp"))
    asked = []

    def write(path):
        asked.append(path)
        if full:
            full.pop()
            raise CheckpointError("full")

    full = []
    assert weights.write_cached("a.pth", write) == tmp_path / "cache" / "featherface" / "a.pth"
    full = [True]
    assert weights.write_cached("a.pth", write) == asked[-1] == tmp_path / "temp" / "featherface" / "a.pth"


# ---- thresholds, batches ------------------------------------------------------------------------------------------


def test_score_threshold(detector):
    image = np.maximum(picture(100, 200, BOX), picture(100, 200, (120, 20, 160, 70), value=215))
    assert len(detector(image).scores) == 1
    found = detector(image, score=0.02)
    assert len(found.scores) == 2 and found.scores[0] > found.scores[1]
    assert found.boxes[0].tolist() == pytest.approx(BOX, abs=0.01)


def test_keep_k(detector):
    detector.keep_k = 1
    for tta in (False, True):
        assert len(detector(picture(100, 200, BOX, (120, 20, 160, 70)), tta=tta).scores) == 1


def test_a_batch_equals_one_by_one_and_keeps_its_order(detector):
    images = [
        picture(100, 120, BOX),
        picture(64, 64),  # no face
        picture(101, 125, (40, 30, 90, 90), (5, 5, 25, 30)),  # same padded size as the first
        picture(200, 60, (10, 100, 50, 150)),
        picture(1, 1),
    ]
    together = detector(images)
    assert (2, 3, 128, 128) in detector.network.batches
    for image, found in zip(images, together):
        for one, other in zip(detector(image), found):
            np.testing.assert_array_equal(one, other)
    assert [len(f.scores) for f in together] == [1, 0, 2, 1, 0]
    assert together[1].boxes.shape == (0, 4) and together[1].landmarks.shape == (0, 5, 2)
    assert detector([]) == []


def test_forward_passes_are_limited(detector):
    detector.batch_size = 2
    detector([picture(32, 32)] * 5)
    assert [b[0] for b in detector.network.batches] == [2, 2, 1]


def test_a_network_switched_to_training_is_switched_back(detector):
    detector.network.train()
    check_one(detector(picture(100, 120, BOX)))


# ---- test-time augmentation ---------------------------------------------------------------------------------------


def test_flip_mirrors_boxes_and_swaps_landmarks():
    """With one size, plain and mirrored views must agree: votes of both leave the exact face."""
    network = SquareNetwork()
    symmetric = FaceDetector(network, "cpu", tta_factors=(1.0,))
    found = symmetric(picture(100, 121, BOX), tta=True)
    assert len(network.batches) == 1 and network.batches[0][0] == 2
    np.testing.assert_allclose(found.boxes, [BOX], atol=0.01)
    expected = points_of(BOX)
    expected[2, 0] = (BOX[0] + BOX[2]) / 2  # the nose is off-centre to one side in each view: their mean is central
    np.testing.assert_allclose(found.landmarks[0], expected, atol=0.01)


def test_tta_merges_sizes_into_one_face(detector):
    found = detector(picture(300, 400, (100, 60, 180, 160)), tta=True)
    assert sorted(detector.network.batches) == [(2, 3, 160, 224), (2, 3, 320, 416), (2, 3, 480, 608)]
    np.testing.assert_allclose(found.boxes, [(100, 60, 180, 160)], atol=1)
    assert detector(picture(64, 64), tta=True).boxes.shape == (0, 4)


# ---- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained V2 Ultra as an inference checkpoint."""
    torch.manual_seed(0)
    config = load_config("v2_ultra").model
    path = tmp_path_factory.mktemp("weights") / "ultra.pth"
    save_checkpoint(path, inference_content("v2_ultra", config, build_model(config).state_dict()))
    return path


def test_from_pretrained_path(checkpoint):
    """The real network: a batch gives what its pictures give alone, under inference_mode or not."""
    detector = FaceDetector.from_pretrained(checkpoint, "cpu", config="v2_ultra", batch_size=2)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (64, 90, 3), np.uint8) for _ in range(2)] + [np.zeros((40, 33, 3), np.uint8)]
    with torch.inference_mode():
        together = detector(images, score=0.0, nms=1.0)
    for image, found in zip(images, together):
        alone = detector(image, score=0.0, nms=1.0)
        assert len(found.scores) == len(alone.scores) > 20
        # untrained scores are nearly equal, so rounding may order them differently: compare them as sets
        for one, other in zip(alone, found):
            one, other = (np.sort(a.reshape(len(a), -1).sum(1)) for a in (one, other))
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=0.01)


def test_training_still_works_after_detection(checkpoint):
    """Anchors cached under inference_mode must not poison a later training step of the same model."""
    detector = FaceDetector.from_pretrained(checkpoint, "cpu")
    with torch.inference_mode():
        detector(np.zeros((64, 64, 3), np.uint8))
    anchors = detector.network.anchors(64, 64, torch.device("cpu"))
    deltas = torch.zeros(len(anchors), 4, requires_grad=True)
    (deltas * anchors).sum().backward()
    assert deltas.grad is not None


def test_wrong_architecture_names_both(checkpoint):
    with pytest.raises(CheckpointError, match=r"ultra\.pth.*'v2_ultra'.*'v1'"):
        FaceDetector.from_pretrained(checkpoint, "cpu", config="v1")


def test_weights_that_do_not_fit_their_architecture_are_one_line(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    del content["state_dict"]["heads.boxes.0.weight"]
    save_checkpoint(tmp_path / "part.pth", content)
    with pytest.raises(CheckpointError, match=r"part\.pth: weights do not fit 'v2_ultra': .*heads\.boxes\.0\.weight"):
        FaceDetector.from_pretrained(tmp_path / "part.pth", "cpu")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "featherface-1", "x": Harmful()}, "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(CheckpointError, match=name) as e:
            FaceDetector.from_pretrained(tmp_path / name, "cpu")
        assert "\n" not in str(e.value)
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_no_checkpoints_are_not_called_code(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.pth").touch()
    for name in ("picture.png", "page.pth", "empty.pth"):
        with pytest.raises(CheckpointError, match=rf"{name}: damaged or not a checkpoint$"):
            FaceDetector.from_pretrained(tmp_path / name, "cpu")


def test_what_was_exported_is_no_checkpoint_and_called_so(tmp_path):
    for name in ("a.onnx", "a.torchscript.pt", "a.pt2"):
        (tmp_path / name).write_bytes(b"a network")
        with pytest.raises(CheckpointError, match=f"{name}: an exported network; give the checkpoint"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "b.onnx")


def test_a_config_alone_picks_its_own_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "WEIGHTS_DIR", tmp_path)
    for name in ("v2", "v2_ultra"):
        config = load_config(name).model
        content = inference_content(name, config, build_model(config).state_dict())
        save_checkpoint(tmp_path / f"featherface_{name}.pth", content)
    assert FaceDetector.from_pretrained(config="v2", device="cpu").network.cfg == load_config("v2").model
    assert FaceDetector.from_pretrained(device="cpu").network.cfg == load_config("v2_ultra").model


def test_shipped_weights_find_the_face_of_a_photo():
    photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    detector = FaceDetector.from_pretrained(device="cpu", config="v2_ultra")  # whose weights are those of its name
    assert sum(p.numel() for p in detector.network.parameters()) < 250_000
    assert weights.find_weights("v2_ultra").stat().st_size < 1.2e6
    assert len(detector(photo, scale=1.4).scores) == 1
    found = detector(photo)
    assert len(found.boxes) == 1
    points = [(222, 189), (304, 187), (268, 236), (229, 279), (310, 276)]  # read off the photo
    off = np.linalg.norm(found.landmarks[0] - points, axis=1) / 82  # of the eyes' distance
    assert off.max() < 0.15, off  # without the landmark refinement 0.18


def test_the_look_at_large_faces_leaves_a_strip_a_short_side():
    """Its long side at 640 px would make a face that fills a panorama 20 px high."""
    detector = FaceDetector(SquareNetwork(), "cpu")
    for size, looks in (
        ((1080, 2880), [(1088, 2880), (256, 640)]),
        ((1080, 5400), [(1088, 5408), (256, 1216)]),
        ((200, 3000), [(224, 3008)]),  # no face in it is too large for the first look
    ):
        detector.network.batches.clear()
        detector(np.zeros((*size, 3), np.uint8))
        assert [batch[2:] for batch in detector.network.batches] == looks
    face = (300, 100, 1100, 1000)  # of which the first look would count no more than parts
    check_one(detector(picture(1080, 5400, face)), face, 5)


def test_a_strip_that_is_looked_at_once_keeps_its_small_faces():
    face = (100, 50, 140, 100)
    check_one(FaceDetector(SquareNetwork(), "cpu")(picture(200, 1000, face)), face, 2)


def test_of_a_small_picture_the_look_at_vga_size_counts_from_200_px_on():
    class Far(SquareNetwork):
        """It sees faces at VGA size alone."""

        def forward(self, images):
            return super().forward(images if images.shape[3] == 640 else torch.zeros_like(images))

    detector = FaceDetector(Far(), "cpu")
    assert len(detector(picture(1000, 1000, (100, 100, 350, 360))).boxes) == 1
    assert not len(detector(picture(1000, 1000, (100, 100, 280, 280))).boxes)


def test_close_ups_show_one_face_at_any_size():
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).crop((146, 105, 380, 339))
    detector = FaceDetector.from_pretrained("v2_ultra", "cpu")
    for side in (640, 800, 1024, 1500):
        found = detector(photo.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(found.boxes / side, [(0.12, 0.08, 0.87, 0.97)], atol=0.04, err_msg=str(side))


def test_dropblock_is_no_other_architecture(checkpoint):
    config = load_config("v2_ultra", ["model.dropblock=0.1"])
    assert FaceDetector.from_pretrained(checkpoint, "cpu", config=config).network.cfg.out_channels == 64


def test_third_party_weights_point_to_the_converter(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth.*python -m utils\.convert"):
        FaceDetector.from_pretrained(tmp_path / "other.pth", "cpu")


def test_weights_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "WEIGHTS_DIR", tmp_path)
    monkeypatch.setattr(weights, "PUBLISHED_DIR", tmp_path / "none")
    for name in ("v2_ultra", "v1"):
        with pytest.raises(CheckpointError, match=f"no weights of '{name}'") as missing:
            weights.find_weights(name)
        assert ("utils.convert" in str(missing.value)) == (name == "v1")  # no others are published
    with pytest.raises(CheckpointError, match="v3"):
        weights.find_weights("v3")
    with pytest.raises(CheckpointError, match=r"mobilenetV1X0.25_pretrain.tar: not there.*backbone_weights="):
        weights.find_weights("imagenet")
    v1 = tmp_path / "featherface_v1.pth"
    v1.touch()
    with pytest.raises(CheckpointError, match="no weights of 'v2_ultra'"):  # V1 is no answer
        FaceDetector.from_pretrained(device="cpu")
    ultra = tmp_path / "featherface_v2_ultra.pth"
    ultra.touch()
    assert weights.find_weights("v2_ultra") == ultra and weights.find_weights("v1") == v1


def test_published_v1_is_converted_on_the_fly(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "WEIGHTS_DIR", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    detector = FaceDetector.from_pretrained("v1", "cpu", config="v1")
    assert (tmp_path / "featherface" / "featherface_v1.pth").is_file()
    assert detector(np.zeros((64, 64, 3), np.uint8)).boxes.shape == (0, 4)


def test_hub_says_whose_package_hides_ours(tmp_path):
    """A caller's own utils.py, imported before."""
    (tmp_path / "utils.py").touch()
    code = f"import utils, torch; torch.hub.load({str(ROOT)!r}, 'featherface', pretrained=False, source='local')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "ImportError: FeatherFace has a package 'utils' too" in last
    assert str(tmp_path / "utils.py") in last


def test_hub_entry_points(checkpoint):
    import hubconf

    assert {"torch", "torchvision"} <= set(hubconf.dependencies)
    network = hubconf.featherface("v2_ultra", pretrained=False)
    assert not network.training and isinstance(network.cfg, ModelConfig)
    assert hubconf.featherface(checkpoint).cfg == network.cfg
    with pytest.raises(DeviceError, match="nonsense"):
        hubconf.featherface(checkpoint, device="nonsense")
    detector = hubconf.detector(checkpoint, device="cpu", score_threshold=0.3)
    assert isinstance(detector, FaceDetector) and detector.score_threshold == 0.3


def test_devices():
    assert pick_device("cpu").type == "cpu"
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(DeviceError, match=name) as e:
            pick_device(name)
        assert "\n" not in str(e.value)
    for name in ("meta", "cpu:1"):  # PyTorch has them, but they are of no use
        with pytest.raises(DeviceError, match=name):
            pick_device(name)


def test_thresholds_are_between_0_and_1(checkpoint):
    detector, photo = FaceDetector.from_pretrained(checkpoint), np.zeros((32, 32, 3), np.uint8)
    for value in (-0.1, 50, float("nan"), "0.5"):
        for name in ("score", "nms"):
            with pytest.raises(ValueError, match=f"{name} must be a number between 0 and 1"):
                detector(photo, **{name: value})
            with pytest.raises(ValueError, match=f"{name}_threshold must be"):
                FaceDetector(detector.network, **{f"{name}_threshold": value})


@pytest.mark.parametrize("name", ["top_k", "keep_k", "max_side", "batch_size", "second_look"])
def test_counts_and_sides_are_at_least_1(checkpoint, name):
    for value in (0, -1, 2.5, float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1, got {value}"):
            FaceDetector.from_pretrained(checkpoint, **{name: value})


@pytest.mark.parametrize("factors", [(), (0.5, 0.0), (-1.0,), (float("inf"),)])
def test_there_are_views_of_some_size(checkpoint, factors):
    with pytest.raises(ValueError, match="tta_factors must be numbers above 0"):
        FaceDetector.from_pretrained(checkpoint, tta_factors=factors)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_a_program_of_another_default_precision_finds_the_same(checkpoint, default):
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    options = {"score_threshold": 0.0, "keep_k": 50, "pyramid": 1.5}
    before = FaceDetector.from_pretrained(checkpoint, **options)
    usual = before(photo)
    torch.set_default_dtype(default)
    try:
        for detector in (before, FaceDetector.from_pretrained(checkpoint, **options)):
            found = detector(photo, scale=1.0)
            assert all(part.dtype == np.float32 for part in found)
            np.testing.assert_allclose(found.boxes, usual.boxes, atol=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- drawing ------------------------------------------------------------------------------------------------------


def test_the_template_is_a_face_seen_from_the_front():
    """Its mirror image is about itself: a wrong number would turn or shift every aligned face."""
    mirrored = ([112, 0] + TEMPLATE * [-1, 1])[[1, 0, 2, 4, 3]]
    np.testing.assert_allclose(mirrored, TEMPLATE, atol=0.3)
    left_eye, right_eye, nose, left_mouth, _ = TEMPLATE
    assert left_eye[0] < nose[0] < right_eye[0] and left_eye[1] < nose[1] < left_mouth[1]


def test_alignment_puts_landmarks_on_the_template():
    """A face turned by 30 degrees and four times as large comes out upright, at every size."""
    angle, centre = np.deg2rad(30), np.array([500.0, 400.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    for zoom in (0.5, 4.0):
        points = (TEMPLATE - 56) @ turn.T * zoom + centre
        matrix = similarity(points, TEMPLATE)
        np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], TEMPLATE, atol=1e-9)
        image = np.zeros((800, 1000, 3), np.uint8)
        yy, xx = np.mgrid[:800, :1000]
        for i, (x, y) in enumerate(points):
            image[np.hypot(xx - x, yy - y) < 4 * zoom, i % 3] = 255
        crop = align_face(image, points)
        assert crop.shape == (112, 112, 3)
        for i, (x, y) in enumerate(TEMPLATE):
            assert crop[round(y), round(x), i % 3] > 150


@pytest.mark.parametrize("zoom", [0.25, 0.5, 1, 3])
def test_alignment_is_exact_to_a_tenth_of_a_pixel(zoom):
    """Coordinates are those of detections: the first pixel reaches from 0 to 1."""
    points = TEMPLATE * zoom + 30
    image = np.zeros((440, 440, 3), np.uint8)
    y, x = np.mgrid[:440, :440] + 0.5
    spread = max(2 * zoom, 1.0)
    image[..., 0] = 255 * np.exp(-((x - points[2, 0]) ** 2 + (y - points[2, 1]) ** 2) / spread**2)
    weight = align_face(image, points)[..., 0].astype(float)
    y, x = np.mgrid[:112, :112] + 0.5
    centre = [(x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()]
    np.testing.assert_allclose(centre, TEMPLATE[2], atol=0.1)


def test_alignment_of_degenerate_landmarks():
    assert align_face(np.zeros((50, 50, 3), np.uint8), np.full((5, 2), 20.0)).shape == (112, 112, 3)


def test_blur_hides_the_face_and_leaves_the_rest():
    image = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    before = image.copy()
    blurred = blur_faces(image, np.array([[60.0, 50, 120, 130], [-20, -20, 10, 15]]))
    np.testing.assert_array_equal(image, before)
    inside = blurred[70:110, 75:105].astype(float)
    assert (
        np.abs(np.diff(inside, axis=0)).mean() < 3 < np.abs(np.diff(image[70:110, 75:105].astype(float), axis=0)).mean()
    )
    outside = np.ones((200, 200), bool)
    outside[50 - 13 : 130 + 13, 60 - 10 : 120 + 10] = False
    outside[:21, :16] = False
    np.testing.assert_array_equal(blurred[outside], image[outside])
    assert (blurred[50:130, 60:120] != image[50:130, 60:120]).any(2).all()  # to the corners of the box
    assert (blurred[85:95, 53:127] != image[85:95, 53:127]).any(2).all()  # and beyond its sides: ears identify, too


def test_drawing_leaves_its_input_alone():
    image = picture(100, 120, BOX)
    before = image.copy()
    drawn = draw_detections(image, np.array([BOX], np.float32), np.array([0.9]), points_of(BOX)[None])
    np.testing.assert_array_equal(image, before)
    assert (drawn[20, 30:70] == (0, 220, 80)).all()
    cut = np.array([[60, 50, 120, 100]], np.float32)  # by the right and the lower border
    drawn = draw_detections(image, cut, np.array([0.9]), points_of(cut[0])[None])
    assert (drawn[60:100, 119] == (0, 220, 80)).all() and (drawn[99, 60:] == (0, 220, 80)).all()
    assert draw_detections(image, np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))).shape == image.shape


def test_scores_are_written_at_faces_that_have_room_for_them():
    image = np.full((400, 400, 3), 128, np.uint8)

    def written(x: float, y: float, side: float) -> np.ndarray:
        """Where something is drawn around and inside the box: rows above it, rows in it."""
        box = np.array([[x, y, x + side, y + side]], np.float32)
        drawn = draw_detections(image, box, np.array([0.9]), points_of(box[0])[None])
        black = (drawn == 0).all(2)  # the figures' outline
        return black[: int(y)].any(), black[int(y) :].any()

    assert written(100, 150, 200) == (True, False)  # above the face
    assert written(100, 4, 200) == (False, True)  # no room above: inside
    assert written(100, 150, 12) == (False, False)  # wider than the face


def test_a_large_face_is_averaged_not_sampled():
    noise = np.random.default_rng(0).integers(0, 256, (896, 896, 3), np.uint8)
    assert align_face(noise, TEMPLATE * 8).std() < 15  # of 74; 64 pixels make one


def test_a_face_beyond_the_lower_right_border_is_blurred():
    image = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    blurred = blur_faces(image, np.array([[160.0, 150, 230, 240]]))
    assert (blurred[175:, 180:] != image[175:, 180:]).any(2).mean() > 0.9
    np.testing.assert_array_equal(blurred[:130], image[:130])
