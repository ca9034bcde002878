"""`Patch.show`: what is drawn is what the trace says, where it says it; what cannot be drawn is refused."""

from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch
from lp_patch import show
from lp_patch.locate import locate
from lp_patch.registry import find_parts

TESTBED = Path(__file__).resolve().parent.parent / "examples" / "testbed"
GRID = 24


@pytest.fixture(scope="module")
def testbed():
    folder = TESTBED / "model"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder), Image.open(TESTBED / "demo.png").convert("RGB")


def inputs_of(processor, pictures):
    text = [" ".join(["USER:", *["<image>"] * len(row), "Where is the apple? ASSISTANT:"]) for row in pictures]
    return processor(text=text, images=pictures, padding=True, return_tensors="pt")


def test_boxes_of_a_square_grid(testbed):
    """Token i of 24 x 24 lies in row i // 24, column i % 24; the panels show the trace's tokens and scores."""
    model, processor, picture = testbed
    with lp_patch.applied(model, tokens=64) as patch, torch.no_grad():
        model(**inputs_of(processor, [[picture]]))
        (row,) = patch.panels(picture)
        trace = patch.trace
    assert [x.title for x in row] == ["Picture", "Stage 1, scores", "Stage 1", "Stage 2, scores", "Stage 2"]
    for panel, kept in ((row[2], trace.stage1[0]), (row[3], trace.stage1[0]), (row[4], trace.stage2[0])):
        want = [[i % GRID, i // GRID, i % GRID + 1, i // GRID + 1] for i in kept.tolist()]
        np.testing.assert_allclose(panel.boxes * GRID, want, atol=0.15)
    np.testing.assert_array_equal(row[1].values, trace.stage1_scores[0].numpy())
    np.testing.assert_array_equal(row[3].values, trace.stage2_scores[0].numpy())


def test_cropped_picture(testbed):
    """What the processor crops off the sides of a wide picture has no tokens."""
    model, processor, picture = testbed
    wide = Image.new("RGB", (672, 336))
    wide.paste(picture, (168, 0))
    with lp_patch.applied(model, tokens=64) as patch, torch.no_grad():
        model(**inputs_of(processor, [[wide]]))
        boxes = patch.panels(wide)[0][1].boxes
    assert boxes[:, 0].min() == pytest.approx(0.25, abs=0.01) and boxes[:, 2].max() == pytest.approx(0.75, abs=0.01)
    assert boxes[:, 1].min() < 0.01 and boxes[:, 3].max() > 0.99


def test_a_batch_and_a_file(testbed, tmp_path):
    """A row for each picture, those of other prompts apart; in the lists that the processor was given, or in one."""
    model, processor, picture = testbed
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with lp_patch.applied(model, tokens=64) as patch, torch.no_grad():
        model(**inputs_of(processor, [[picture], [other, picture]]))
        rows = patch.panels([[picture], [other, picture]])
        same = patch.panels([picture, other, picture])
        drawn = patch.show([picture, other, picture], title="Where is the apple?", path=tmp_path / "new" / "kept.png")
        trace = patch.trace
    assert [row[0].captions for row in rows] == [("prompt 1",), ("prompt 2",), ("prompt 2",)]
    assert len(rows[1][4].boxes) + len(rows[2][4].boxes) == len(trace.stage2[1])
    for a, b in zip(rows, same, strict=True):
        np.testing.assert_array_equal(a[4].boxes, b[4].boxes)
    with Image.open(tmp_path / "new" / "kept.png") as written:
        assert written.size == drawn.size and drawn.size[0] > 2000
    assert np.asarray(drawn).std() > 20


def test_what_is_kept_is_in_colour(testbed):
    """Drawn alone, a kept token's place has the picture's colours, the rest is faded."""
    picture = np.zeros((64, 64, 3), dtype=np.uint8) + np.array([255, 0, 0], dtype=np.uint8)
    panel = show.Panel("Stage 1", picture, boxes=np.array([[0.5, 0.0, 1.0, 0.5]]), colour=show.STAGE_1)
    drawn = np.asarray(show.draw([[panel]])).astype(int)
    red = (drawn[..., 0] > 200) & (drawn[..., 1] < 60)
    rows, columns = red.nonzero()
    assert len(rows) > 1000
    middle = (rows.max() + rows.min()) / 2, (columns.max() + columns.min()) / 2
    assert middle[0] < drawn.shape[0] * 0.5 < drawn.shape[1] * 0.6 < middle[1] + 80


def film(video):
    """What Qwen2-VL's processor answers for one video (T, H, W, 3): patches of 2 frames, 2 x 2 of them together."""
    frames = torch.from_numpy(np.asarray(video)).double() / 255
    t, height, width = len(frames) // 2, frames.shape[1] // 4, frames.shape[2] // 4
    cut = frames.view(t, 2, height // 2, 2, 4, width // 2, 2, 4, 3)
    patches = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * height * width, -1)
    return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[t, height, width]])}


def test_frames_of_a_video():
    """Tokens of Qwen's videos: frame by frame (of two), in rows."""
    parts = find_parts(families.make("qwen2_vl", which=(0,))[0])
    located = locate(parts.base, parts.adapter.layout, film, (6, 16, 24), 3 * 2 * 3, video=True)
    assert located.frame.tolist() == [2 * t for t in range(3) for _ in range(6)]
    want = [[c / 3, r / 2, (c + 1) / 3, (r + 1) / 2] for _ in range(3) for r in range(2) for c in range(3)]
    torch.testing.assert_close(located.box, torch.tensor(want), atol=0.03, rtol=0)


def test_a_video_is_drawn_by_frames():
    model, scene = families.make("qwen2_vl", dtype=torch.float32, which=(0,))
    video = np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3), dtype=np.uint8)
    # the scene's video has 3 x 2 x 2 merged patches
    video = video[:, :, :16]
    with lp_patch.applied(model, tokens=4) as patch, torch.no_grad():
        model(**scene.forward())
        rows = patch.panels(videos=video, processor=SimpleNamespace(video_processor=lambda x, return_tensors: film(x)))
        kept = len(patch.trace.stage2[0])
    assert [row[0].captions for row in rows] == [("frame 1",), ("frame 3",), ("frame 5",)]
    assert 0 < sum(len(row[-1].boxes) for row in rows) < kept  # the others are the image's


def test_refusals(testbed):
    model, processor, picture = testbed
    with lp_patch.applied(model, tokens=64) as patch, torch.no_grad():
        with pytest.raises(lp_patch.UnsupportedInputError, match="run the patched model on a prompt with pictures"):
            patch.show(picture)
        model(**inputs_of(processor, [[picture]]))
        with pytest.raises(lp_patch.UnsupportedInputError, match="give all of its pictures"):
            patch.show([picture, picture])
        with pytest.raises(lp_patch.UnsupportedInputError, match="saw no videos"):
            patch.show(videos=[np.zeros((2, 8, 8, 3), dtype=np.uint8)])
        with pytest.raises(lp_patch.UnsupportedInputError, match="needs the pictures"):
            patch.show()
        with pytest.raises(lp_patch.UnsupportedInputError, match="PIL image or an array"):
            patch.show(np.zeros((8, 8)))
    model, scene = make("aria", dtype=torch.float32, which=(0,))
    with lp_patch.applied(model, tokens=4) as patch, torch.no_grad():
        model(**scene.forward())
        with pytest.raises(lp_patch.UnsupportedModelError, match="Aria"):
            patch.show(picture)
    model, scene = families.make("internvl", dtype=torch.float32, which=(0,))
    with lp_patch.applied(model, tokens=4) as patch, torch.no_grad():
        model(**scene.forward())
        with pytest.raises(lp_patch.UnsupportedInputError, match="processor=processor"):
            patch.show(picture)


def test_a_missing_package_is_named():
    with pytest.raises(ImportError, match=r'pip install "lp_patch\[show\]"'):
        show.need("no_such_package")
