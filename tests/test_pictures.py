"""Pictures (data.py, section 10): none is blank, and what an answer names is on it."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import data


@pytest.fixture(scope="module")
def scene():
    made = data.room(3, objects=9, views=3, size=48, points=600)
    made.identifiers = data.number_objects(made, np.random.default_rng(0))
    return made


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("changes", [{}, dict(frames=None), dict(frames=None, objects=[], colors=None)])
def test_a_scene_with_and_without_frames_and_colors_gives_a_picture_that_is_not_blank(
    scene, changes, tmp_path
):
    path = tmp_path / "new/x.png"
    data.draw_scene(replace(scene, **changes), path, ["$1 a line", "another"], tokens=np.zeros((2, 3)))
    assert len(np.unique(pixels(path).reshape(-1, 3), axis=0)) > 200


def test_what_answers_name_is_drawn_each_answer_in_its_color(scene, tmp_path):
    """An object by its identifier, a box, and a point; unknown ones leave the picture as it is."""
    identifier = next(iter(scene.identifiers.values()))
    drawn = {
        f"It is <OBJ{identifier:03}>.": (220, 20, 60),
        "[0, 0, 1, 1, 1, 2]": (65, 105, 225),
        "at [0.5, 0.5, 1.0]": (46, 139, 87),
    }
    scene = replace(scene, frames=None)
    without, answered = tmp_path / "without.png", tmp_path / "answered.png"
    data.draw_scene(scene, without, answers=["<OBJ999> [1, x, 2]", ""])
    data.draw_scene(scene, answered, answers=list(drawn))

    before, after = pixels(without), pixels(answered)
    changed = after[(after != before).any(-1)]
    for color in drawn.values():
        assert (np.abs(changed - color).max(1) < 10).sum() > 20


def test_a_box_is_drawn_at_its_place(tmp_path):
    """From above, on an axis of 10 x 10 meters that fills 500 x 500 pixels."""
    axis = Figure(figsize=(5, 5), dpi=100).add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(0, 10))
    data.draw_boxes(axis, [np.array([3.0, 6.0, 1.0, 2.0, 4.0, 2.0])], color="red", lw=1)
    axis.figure.savefig(tmp_path / "x.png")
    shown = pixels(tmp_path / "x.png")
    red = np.argwhere((shown == [255, 0, 0]).all(-1))
    assert np.allclose([red.min(0), red.max(0)], [[100, 100], [300, 200]], atol=3)
