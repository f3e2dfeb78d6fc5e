"""Numbers of short runs, pinned: a change of ideas must not move them (python tests/golden.py lists differences)."""

import json

import golden
import papers
import pytest

import data

THEN = json.loads(golden.GOLDEN.read_text())


def test_a_seed_makes_the_same_room_everywhere():
    assert golden.room_digest() == THEN["room"]


@pytest.mark.parametrize("model", papers.PAPERS)
def test_short_runs_of_a_paper_repeat_their_losses_and_answers(model, tmp_path, monkeypatch):
    """20 steps of every stage; another CPU may round differently, so losses are compared to 1 %. The vocabulary is
    pinned too: its size decides what the first weights are drawn to be."""
    monkeypatch.setattr(data, "vocabulary", lambda *_: THEN["words"])
    now, then = golden.short_run(model, tmp_path / model), THEN["runs"][model]
    assert now["losses"].keys() == then["losses"].keys()
    for stage, losses in then["losses"].items():
        assert now["losses"][stage] == pytest.approx(losses, rel=1e-2), stage
    assert len(then["answers"]) >= 6
    same = [key for key, text in then["answers"].items() if now["answers"].get(key) == text]
    assert len(same) >= len(then["answers"]) - 2


def test_official_files_keep_their_scores(tmp_path):
    for name, scores in golden.official_scores(tmp_path).items():
        then = {key: value for key, value in THEN["official"][name].items() if key in scores}
        assert len(then) >= 10
        assert {key: scores[key] for key in then} == pytest.approx(then, abs=1e-6)
