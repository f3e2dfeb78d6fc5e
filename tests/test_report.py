"""The report of a run: all scores in one file that needs nothing but a browser, whatever a model has answered.

    pytest tests/test_report.py
"""

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import dummy_paper
import numpy as np
import pytest
from PIL import Image
from test_official import Oracle

import data
import evaluate
import train
from data import Sample, Stage, substitute
from evaluate import Questions

ATTACK = '</style></dd><script>alert(1)</script><img src="https://example.org/x" onerror=alert(1)>&lt; "\'\ud800\x00'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
           "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]  # fmt: skip


class Model(Oracle):
    """Right, in another room, and hostile answers in turn."""

    def generate(self, groups, max_new_tokens):
        write = lambda s, place: substitute(s.answer, lambda i: evaluate.object_to_text(place, i))  # noqa: E731
        asked = [(s, place) for place, samples in groups for s in samples]
        return [[write(s, place), "[1.00, 9000.00, 0.50]", ATTACK][k % 3] for k, (s, place) in enumerate(asked)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a finished run leaves it: trained and drawn by the trainer, scored in two rooms, also of 6 things."""
    out = tmp_path_factory.mktemp("runs") / "dummy <1>"
    args = train.parse(["--model=dummy", "--no-eval", "--workers=0", "--seed=3", f"--out={out}"])
    train.run(args, dummy_paper, (dummy_paper.fake_scenes(11), dummy_paper.fake_scenes(3, 50)))
    rooms = [data.room(seed, views=2, size=32, points=400) for seed in (900_000, 900_001)]
    stage = Stage("IV", dict.fromkeys(("ground", "count", "what", "coordinate", "caption", "distance"), 1.0), ())
    done = SimpleNamespace(args=SimpleNamespace(seed=3, model="dummy", data="rooms", out=out), model=Model(),
                           stages=[stage], train=[data.room(5, views=0)], test=rooms,
                           prepare=lambda scenes: None)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "java", lambda: False)
        patch.setitem(sys.modules, "train", SimpleNamespace(load_run=lambda folder: done))
        evaluate.main(["--run", str(out)])
        evaluate.main(["--run", str(out), "--objects", "6", "--benchmark", "rooms/grounding", "--failures", "2"])
    return out


class Page(HTMLParser):
    """What a browser would see: text, tables by their headings' ids, pictures, all that is referred to, open tags."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.links, self.pictures, self.rows, self.ids = [], [], [], {}, []
        self.open, self.closed, self.heading, self.others = [], set(), "", set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster", "background")]
        self.others |= {k for k in given if k.startswith("on")} | ({tag} & {"script", "link", "iframe", "base"})
        self.ids += [given["id"]] if "id" in given else []
        self.pictures += [given] if tag == "img" else []
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "h3":
            self.heading = given.get("id", "")
        if tag == "tr":
            self.rows.setdefault(self.heading, []).append([])
        if tag in ("th", "td"):
            self.rows[self.heading][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.text.append(text)
        if {"td", "th"} & set(self.open):
            self.rows[self.heading][-1][-1] += text


@pytest.fixture(scope="module")
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_every_score_stands_in_the_report_with_its_baselines_and_count(run, page):
    """Each number of metrics.json, also those of parts and of the rooms of six things, in the row of its name."""
    checked = 0
    for place, file in (("own", run / "metrics.json"), ("objects-6", run / "objects-6/metrics.json")):
        entries = json.loads(file.read_text())
        assert entries.pop("provenance") and "rooms/grounding" in entries
        for name, key, entry in ((n, k, e) for n, e in entries.items() for k in e if "/" in k):
            head, *rows = page.rows[f"{place}/{name}"]
            (row,) = [dict(zip(head, row, strict=True)) for row in rows if row[0] == key]
            part = key.split("/")[2:]
            assert row["model"] == evaluate.show(entry[key])
            assert row["questions"] == str(entry["counts"][part[0]] if part else entry["count"])
            for column, scores in entry["columns"].items():
                assert key not in scores or row[column] == evaluate.show(scores[key])
            checked += 1
    assert checked > 50


def test_a_score_says_how_far_above_blind_it_is_also_where_less_is_better():
    entry = {"acc/x": 0.75, "mae_m/x": 1.0, "n/count": 3, "rouge/x": None, "em/x": 0.25,
             "columns": {"blind": {"acc/x": 0.5, "mae_m/x": 3.0, "n/count": 1}, "chance": {"em/x": 0.5}}}  # fmt: skip
    said = {k: re.sub("<.*?>", "", evaluate.against_blind(entry, k)) for k in entry if "/" in k}
    assert said == {"acc/x": "0.250 better", "mae_m/x": "2.000 better", "n/count": "", "rouge/x": "",
                    "em/x": "0.250 worse than chance"}  # fmt: skip


def test_nothing_outside_the_file_is_referenced_and_every_tag_is_closed(page):
    """Links lead to places in the page, pictures are in it, and nothing in it is a program."""
    assert page.open == [] and page.others == set() and len(page.ids) == len(set(page.ids))
    assert not [v for v in page.links if not v.startswith("data:image/png;base64,") and v[1:] not in page.ids]
    text = evaluate.STYLE
    assert "url(" not in text and "@import" not in text
    assert not [i for i in page.ids if re.search(r"\s", i)], "an id with a space is no id"


def test_every_picture_is_whole_has_words_and_a_bounded_size(run, page):
    """The loss and two rooms; a real run's report must stay below 8 MB."""
    assert len(page.pictures) == 3
    for picture in page.pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2])))
        image.load()
        assert image.size == (int(picture["width"]), int(picture["height"])) and max(image.size) <= 2 * evaluate.WIDE
        assert len(picture["alt"]) > 10
    assert (run / "report.html").stat().st_size < 2_000_000


def test_whatever_a_model_answers_is_shown_as_text(run, page):
    """Also what a browser would run, and what UTF-8 cannot hold."""
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source and "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert any("<script>alert(1)</script>" in t for t in page.text)
    assert html.escape(run.name) in source, "the folder's name is text too"


def test_it_says_what_the_run_is_and_how_it_was_made(run, page):
    said = "".join(page.text)
    facts = json.loads((run / "metrics.json").read_text())["provenance"]
    for words in ("dummy", "tiny", "rooms", facts["code"], facts["date"]):
        assert words in said
    command = next(t for t in page.text if t.startswith("torchrun train.py"))
    words = shlex.split(command)[2:]
    again, first = train.parse(words), json.loads((run / "config.json").read_text())
    assert again.out == run and {k: getattr(again, k) for k in train.SAME} == {k: first[k] for k in train.SAME}
    stages = [row[:2] for rows in page.rows.values() for row in rows if row[0] in ("encoder", "answers")]
    assert stages == [["encoder", "3"], ["answers", "7"]]


def test_questions_are_drawn_without_a_look_at_the_answers(run):
    """Other answers to the same questions change no choice, and every benchmark has its share."""
    entries = [n for n in json.loads((run / "metrics.json").read_text()) if n != "provenance"]
    answered = evaluate.read_answered(run, entries)
    silent = {n: ([replace(c, text="") for c in cases], [0.0] * len(cases)) for n, (cases, _) in answered.items()}
    drawn = evaluate.draw_at_random(answered)
    assert drawn == evaluate.draw_at_random(silent)
    chosen = [pair for pairs in drawn.values() for pair in pairs]
    assert len(set(chosen)) == len(chosen) == sum(min(evaluate.ASKED, len(c)) for c, _ in answered.values())


def test_the_failures_listed_are_the_worst(run, page):
    """Two of each were asked for; an answer that is right is none of them."""
    entries = json.loads((run / "metrics.json").read_text())
    source = (run / "report.html").read_text(encoding="utf-8").split('<h2 id="Failures">')[1].split("<section>")[0]
    parts = re.split("<h3>", source)[1:]
    assert [p.partition(":")[0] for p in parts] == [n for n in entries if n != "provenance"]
    assert all(p.count("<li>") == 2 and "✓" not in p for p in parts)


def test_an_object_named_by_its_identifier_is_named_in_words_too():
    scene = data.room(3, views=0)
    thing = scene.objects[0]
    scene = replace(scene, identifiers={thing.id: 7})
    words = f"{thing.colour} {thing.category}"
    assert evaluate.named("<OBJ007> or OBJ009", scene) == f"<OBJ007> ({words}) or OBJ009"


def test_only_places_near_enough_are_drawn():
    """One far away would make the room a dot; the true box stands beside an answer in numbers."""
    scene = replace(data.room(3, views=0), identifiers={o.id: o.id for o in data.room(3, views=0).objects})
    asked = Sample("1", scene.name, "ground", "find it.", f"<obj {scene.objects[0].id}>", targets=[scene.objects[0].id])
    case = evaluate.Case(asked, "[0.00, 0.00, 0.50, 1.00, 1.00, 1.00]", scene, scene)
    assert data.listed(scene.objects[0].box) in evaluate.truth_of(case) and evaluate.places_of(case)
    for text in ("[0, 0, 9000, 1, 1, 1]", "[0, 0, nan, 1, 1, 1]", "<OBJ001>", ""):
        assert evaluate.places_of(replace(case, text=text)) == ""


def test_papers_own_rows_stand_beside_ours_with_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "java", lambda: False)
    asked = [Sample("1", "a", "qa", "what is it?", "chair", answers=["chair"], kind="object")]
    entry = evaluate.score("scanqa", Questions(asked, {"a": data.Scene("a", "scannet", [])}), {"1": "chair"})
    (tmp_path / "metrics.json").write_text(evaluate.to_json({"scanqa": entry, "provenance": {"code": "c"}}))
    evaluate.write_report(tmp_path, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in page.rows["own/scanqa"]}
    assert "0.917" in rows["Fase3D, Vicuna-7B"] and rows["this run"]
    assert any("not comparable" in t for t in page.text)


def test_of_several_processes_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "rank_and_world", lambda: (1, 2))
    evaluate.write_report(tmp_path, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_training_ends_with_a_report_and_a_new_run_begins_without_the_old_one(tmp_path, monkeypatch):
    """Nor with scores of rooms that the old model was asked in, which the new report would list as its own."""
    command = ["--model=dummy", "--workers=0", f"--out={tmp_path / 'run'}"]
    scenes = dummy_paper.fake_scenes(11), dummy_paper.fake_scenes(3, 50)
    monkeypatch.setattr(train, "evaluate_run", lambda *a: None)  # it has no words to answer with
    train.run(train.parse(command), dummy_paper, scenes)
    page = Page((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    assert len(page.pictures) == 1 and "Loss" in page.ids and page.open == []
    aside = tmp_path / "run/objects-50/metrics.json"
    aside.parent.mkdir()
    aside.write_text("{}")
    train.run(train.parse([*command, "--overwrite", "--no-eval"]), dummy_paper, scenes)
    assert not aside.exists() and not (tmp_path / "run/report.html").exists()


# ---- in a browser ----------------------------------------------------------------------------------------------------


def browse(path: Path, folder: Path, *flags: str) -> str:
    """What headless Chromium prints for a file, with no network to reach."""
    command = [CHROMIUM, *OFFLINE, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-500:]
    return ran.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here to open it with")
def test_a_browser_opens_it_from_disk_with_no_network(run, tmp_path):
    """A copy with a probe says what the browser made of it: scores, pictures that are there, nothing wider than a
    phone. The picture of the file itself has the colours of a room, so it is no blank page."""
    probe = """<script>addEventListener("load", () => {
        for (const i of document.images) i.dataset.natural = i.naturalWidth;
        document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;
        document.body.dataset.asked = performance.getEntriesByType("resource")
            .filter(r => !r.name.startsWith("data:")).length; })</script></body>"""
    source = (run / "report.html").read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(source.replace("</body>", probe), encoding="utf-8")
    dom = browse(tmp_path / "probed.html", tmp_path, "--dump-dom", "--window-size=500,900")
    page = Page(dom.replace(probe[: probe.index("</body>")], ""))
    assert re.search(r'data-asked="0"', dom) and int(re.search(r'data-over="(-?\d+)"', dom)[1]) <= 0
    assert [p["data-natural"] for p in page.pictures] == [p["width"] for p in page.pictures] and len(page.pictures) == 3
    entry = json.loads((run / "metrics.json").read_text())["rooms/grounding"]
    row = next(r for r in page.rows["own/rooms/grounding"] if r[0] == "acc@0.5/scanrefer")
    assert row[1] == evaluate.show(entry["acc@0.5/scanrefer"]) and row[-1] == str(entry["count"])
    browse(run / "report.html", tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,3000")
    seen = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    assert len(seen) == 1200 * 3000 and len(np.unique(seen, axis=0)) > 500
