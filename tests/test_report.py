"""The report of a run: tables, worst answers and pictures in one file that a browser opens from disk.

pytest tests/test_report.py
"""

import json

from test_evaluate import RECORD, STAGE, Echo, needs_java, questions

import evaluate

ATTACK = "</pre><script>alert(1)</script>\ud800"


def run(out, answer):
    model = Echo(answer)
    model.stage = STAGE
    evaluate.evaluate_questions(model, [questions("rooms/qa"), questions("rooms/multi")], out, RECORD)
    return (out / "metrics.json").read_text()


def test_the_report_holds_every_score_the_worst_answers_and_links_to_pictures(tmp_path):
    """Whatever a model answers is shown as text; nothing outside the folder is referred to."""
    metrics = json.loads(run(tmp_path, lambda s, place: ATTACK if s.id == "q2" else "white"))
    (tmp_path / "pictures").mkdir()
    for name in ("loss.png", "pictures/room.png"):
        (tmp_path / name).touch()
    evaluate.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    for title, entry in metrics.items():
        assert all(f"{value:.3f}" in page for key, value in entry.items() if "/" in key), title
    assert "prediction: &lt;/pre&gt;&lt;script&gt;" in page and "<script" not in page
    assert 'src="loss.png"' in page and 'src="pictures/room.png"' in page and "http" not in page


def test_of_several_processes_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rank_and_world", lambda: (1, 2))
    evaluate.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@needs_java
def test_a_run_scored_again_has_the_very_same_file(tmp_path):
    """Nothing in the scores depends on when, or on the order of a set."""
    assert run(tmp_path / "one", lambda s, place: s.answer) == run(
        tmp_path / "two", lambda s, place: s.answer
    )
