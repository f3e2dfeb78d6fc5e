"""The report of a run: tables, worst answers and pictures in one file that a browser opens from disk.

pytest tests/test_report.py
"""

import json

from test_evaluate import RECORD, Echo, questions

import evaluate

ATTACK = "</pre><script>alert(1)</script>\ud800"


def test_the_report_holds_every_score_the_worst_answers_and_links_to_pictures(tmp_path):
    """Whatever a model answers is shown as text; nothing outside the folder is referred to."""
    model = Echo(lambda s, place: ATTACK if s.id == "q2" else "white")
    asked = [questions("rooms/qa"), questions("rooms/multi")]
    evaluate.evaluate_questions(model, asked, tmp_path, RECORD)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "pictures").mkdir()
    for name in ("loss.png", "pictures/room.png"):
        (tmp_path / name).touch()
    evaluate.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    for title, entry in metrics.items():
        assert all(f"{value:.3f}" in page for key, value in entry.items() if "/" in key), title
    assert "prediction: &lt;/pre&gt;&lt;script&gt;" in page and "<script" not in page
    assert 'src="loss.png"' in page and 'src="pictures/room.png"' in page and "http" not in page
