"""Pictures (data.py, section 10): none is blank, and what an answer names is on it."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import data


@pytest.fixture
def scene(rng):
    made = data.room(3, objects=9, views=3, size=48, points=600)
    made.identifiers = data.number_objects(made, rng)
    return made


def pixels(path):
    return np.array(Image.open(path).convert("RGB"), int)


@pytest.mark.parametrize("changes", [{}, dict(frames=None), dict(frames=None, objects=[], colors=None)])
def test_a_scene_with_and_without_frames_and_colors_gives_a_picture_that_is_not_blank(
    scene, changes, tmp_path
):
    path = tmp_path / "new/x.png"
    shown = replace(scene, **changes)
    data.draw_scene(shown, path, ["$1 a line", "another"], tokens=np.zeros((2, 3)))
    colors = np.unique(pixels(path).reshape(-1, 3), axis=0)
    assert len(colors) > 200


def test_what_answers_name_is_drawn_each_answer_in_its_color(scene, tmp_path):
    """An object by its identifier, a box, and a point; unknown ones leave the picture as it is."""
    identifier = next(iter(scene.identifiers.values()))
    drawn = {
        f"It is <OBJ{identifier:03}>.": (220, 20, 60),
        "[0, 0, 1, 1, 1, 2]": (65, 105, 225),
        "at [0.5, 0.5, 1.0]": (46, 139, 87),
    }
    path = tmp_path / "x.png"
    shown = []
    for answers in (["<OBJ999> [1, x, 2]", ""], drawn):
        data.draw_scene(replace(scene, frames=None), path, answers=list(answers))
        shown.append(pixels(path))

    before, after = shown
    changed = after[(after != before).any(-1)]
    for color in drawn.values():
        off = np.abs(changed - color).max(1)
        assert (off < 10).sum() > 20


def test_a_box_is_drawn_at_its_place(tmp_path):
    """From above, on an axis of 10 x 10 meters that fills 500 x 500 pixels."""
    axis = Figure(figsize=(5, 5), dpi=100).add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(0, 10))
    data.draw_boxes(axis, [np.array([3.0, 6.0, 1.0, 2.0, 4.0, 2.0])], color="red", lw=1)
    path = tmp_path / "x.png"
    axis.figure.savefig(path)
    red = np.argwhere((pixels(path) == [255, 0, 0]).all(-1))
    corners = [[100, 100], [300, 200]]
    assert np.allclose([red.min(0), red.max(0)], corners, atol=3)
