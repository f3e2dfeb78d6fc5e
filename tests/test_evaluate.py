"""What every score means, in numbers small enough to check by hand, and what no answer may ever do: raise one."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
from data import DataError, Sample, Scene, Stage, Thing
from evaluate import BENCHMARKS, Questions

UNIT = np.array([0, 0, 0, 1, 1, 1.0])
needs_java = pytest.mark.skipif(
    not shutil.which("java"), reason="no Java: the PTB tokenizer and METEOR cannot run here"
)


def moved(x: float) -> np.ndarray:
    """The unit box moved along x."""
    return UNIT + np.array([x, 0, 0, 0, 0, 0])


def scene(name: str = "a") -> Scene:
    """Four things; identifiers differ from object ids, so mixing the two up shows."""
    names = (("chair", "red", 0), ("chair", "blue", 3), ("table", "white", 6), ("lamp", "red", 9))
    things = [Thing(i, category, color, moved(x)) for i, (category, color, x) in enumerate(names, start=1)]
    return Scene(name, "rooms", things, identifiers={1: 17, 2: 3, 3: 99, 4: 0})


# one question of every kind; its truth answers it perfectly
CHOICE = ["A. table", "B. lamp", "C. bed"]
SAMPLES = [
    Sample("g1", "a", "ground", "find the red chair.", "<obj 1>", targets=[1], kind="multiple"),
    Sample("g2", "a", "ground", "find the lamp.", "<obj 4>", targets=[4], kind="unique"),
    Sample("m0", "a", "multi", "find all beds.", "no.", targets=[], kind="zt_wo_d"),
    Sample("m2", "a", "multi", "find all chairs.", "yes. <obj 1> <obj 2>", targets=[1, 2], kind="mt"),
    Sample("q1", "a", "color", "what color is the table?", "white"),
    Sample("q2", "a", "count", "how many chairs are there?", "2", value=2.0),
    Sample("q3", "a", "exist", "is there a bed?", "no"),
    Sample("i1", "a", "id_category", "what is <obj 2>?", "chair"),
    Sample("c1", "a", "coordinate", "where is <obj 2>?", "[3.00, 0.00, 0.00]", point=np.array([3, 0, 0.0])),
    Sample("d1", "a", "distance", "how far is it?", "3.00", value=3.0, steps="<obj 3> x6.00 ="),
    Sample(
        "t1",
        "a",
        "caption",
        "describe <obj 1>.",
        "this is a red chair.",
        ["this is a red chair."],
        targets=[1],
    ),
    Sample(
        "t2", "a", "caption", "describe <obj 4>.", "this is a red lamp.", ["this is a red lamp."], targets=[4]
    ),
    Sample("v1", "a", "vsi_counting", "how many chairs?", "2", value=2.0),
    Sample("v2", "a", "vsi_rel_distance", "which is closest?", "B", options=CHOICE),
]


def questions(name: str, samples: list[Sample] = SAMPLES, **changes) -> Questions:
    """Those of the samples that belong to a benchmark of generated questions."""
    benchmark = evaluate.choose_dialects(BENCHMARKS[name], ())
    own = [s for s in samples if s.task in benchmark.tasks]
    scenes = {s.scene: scene(s.scene) for s in own}
    return Questions(name, benchmark, own, scenes, scenes, **changes)


def truth(sample: Sample, place: Scene) -> str:
    return evaluate.plain(sample.answer, place)


class Echo(data.SceneLanguageModel):
    """A model that answers with the truth, or with what `answer(sample, scene)` says."""

    device = torch.device("cpu")

    def __init__(self, answer=truth):
        torch.nn.Module.__init__(self)
        self.answer, self.asked, self.cached, self.feature_folder = answer, [], [], None
        self.text = data.TinyText(["how", "far", "is", "it"])

    def configure_stage(self, stage):
        self.stage = stage

    def cache_features(self, scenes, folder=None, rank=0, world=1):
        self.cached += [s.name for s in scenes]

    def batch(self, groups):
        self.asked.append([(place.name, len(samples)) for place, samples in groups])
        return groups

    def generate(self, groups, max_new_tokens=64):
        steps = self.stage.steps
        return [
            f"{s.steps} {self.answer(s, place)}" if steps and s.steps else self.answer(s, place)
            for place, samples in groups
            for s in samples
        ]

    def token_centers(self, place):
        return np.zeros((1, 3))


STAGE = Stage("IV", {"ground": 1.0, "count": 1.0}, (), iterations=1)
RECORD = {
    "model": "proxy3d",
    "seed": 3,
    "dtype": "float32",
    "data": "rooms",
    "root": None,
    "scene_options": {},
    "scene_counts": {"train": 4, "test": 2},
}


@pytest.fixture
def no_java(monkeypatch):
    """Captions without Java: the same scores minus what needs it, and much faster."""
    monkeypatch.setattr(evaluate.shutil, "which", lambda name: None)


# ---- reading an answer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Red Chair. ", "red chair"),
        ("2", "two"),
        ("none", "zero"),
        ("TV", "TV"),
        ("a 23", "twenty-three"),
        ("on the letf of a desk", "on left of desk"),
        ("mat2", "mat"),
        ("9 oclock", "nine o'clock"),
        ("the", "the"),
        ("go backwards", "go backward"),
        ("21", "21"),
        ("brown, wooden", "brown, wooden"),
    ],
)
def test_the_cleaner_follows_the_one_of_the_literature(text, expected):
    """One rule more or less moves every cleaned score: articles go only before a word, 21 is not a
    word, 23 is."""
    assert evaluate.clean(text) == expected


@pytest.mark.parametrize(
    ("text", "official", "words"),
    [
        ("2. chairs", 2, 2),
        ("2.5m", None, 2.5),
        ("1,200", None, 1),
        ("nan", None, None),
        ("about 2", None, 2),
        ("one apple, room 2", None, 1),
        ("twenty-one", None, 21),
        ("two thousand and three hundred", None, 2300),
        ("", None, None),
        ("far", None, None),
        ("-3", -3, -3),
    ],
)
def test_numbers_are_read_as_vsi_bench_and_as_lmms_eval_do(text, official, words):
    for read, expected in ((evaluate.official_number, official), (evaluate.number, words)):
        assert np.isnan(read(text)) if expected is None else read(text) == expected


def test_identifiers_become_the_boxes_they_mean_and_those_of_no_object_are_dropped():
    found = evaluate.boxes(
        evaluate.with_boxes("Yes. <OBJ017>, <OBJ055> [1, 2, 3] [9 0 0 1 1 1] OBJ003", scene())
    )
    assert [b.tolist() for b in found] == [UNIT.tolist(), moved(9).tolist()]


@pytest.mark.parametrize("entry", ["nan", "inf", "-1", "0", "x"])
def test_a_box_with_nan_or_without_volume_hits_nothing(entry):
    """It stays an answer: for "find all beds" it must not count as silence."""
    sample = SAMPLES[2]
    assert evaluate.boxes_f1(f"[0, 0, 0, 1, 1, {entry}]", sample, scene(), 0.25) == 0


@pytest.mark.parametrize(
    "garbage", ["9" * 10**6, "[" * 10**6, "[1" + " " * 10**6, "OBJ" * 10**6, "\x00\ud800" * 10**5]
)
def test_a_megabyte_of_garbage_is_read_in_linear_time_and_holds_nothing(garbage):
    """A pattern that backtracks would not come back from this."""
    assert evaluate.boxes(evaluate.with_boxes(garbage, scene())) == []
    assert not np.isfinite(evaluate.official_number(garbage))
    assert evaluate.number(garbage) in (np.inf, 1) or np.isnan(evaluate.number(garbage))
    evaluate.one_line(garbage).encode()


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_iou_carries_the_benchmark_epsilon():
    """Two unit boxes a third apart have IoU 0.5; 1e-8 in the denominator makes it 0.499999996.
    ScanRefer compares that in float64 and fails it, Multi3DRefer stores it in float32 and passes
    it."""
    place = Scene("a", "", [Thing(1, "", "", UNIT)], identifiers={1: 0})
    asked, text = Sample("1", "a", "ground", "", "", targets=[1]), str(moved(1 / 3).tolist())
    assert data.box_iou(UNIT[None], moved(1 / 3)[None])[0, 0] == pytest.approx(0.499999996, abs=2e-9)
    assert evaluate.first_box_fits(text, asked, place, 0.5) == 0
    assert evaluate.first_box_fits(text, asked, place, 0.25) == 1
    assert evaluate.boxes_f1(text, asked, place, 0.5) == 1


@pytest.mark.parametrize(
    ("found", "true", "f1"),
    [
        ([0, -0.53], [0, 0.53], 0.5),
        ([0, 0], [0], 2 / 3),
        ([0, 5], [5, 0], 1),
        ([], [], 1),
        ([0], [], 0),
        ([], [0], 0),
    ],
)
def test_f1_of_several_boxes(found, true, f1):
    """Multi3DRefer's rule: the assignment maximises the sum of IoU and not the number of hits, so
    two possible hits at 0.25 can be one; a box given twice costs precision; with nothing to find,
    silence is right."""
    place = Scene("a", "", [Thing(i, "", "", moved(x)) for i, x in enumerate(true)])
    asked = Sample("1", "a", "multi", "", "", targets=list(range(len(true))))
    text = " ".join(str(moved(x).tolist()) for x in found)
    assert evaluate.boxes_f1(text, asked, place, 0.25) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("found", "true", "mra"), [(3, 2, 0.1), (3, 4, 0.6), (1.9, 2, 1), (2.2, 2, 0.9), (100, 120, 0.7)]
)
def test_relative_accuracy_has_ten_thresholds_and_reaches_them(found, true, mra):
    asked = Sample("1", "a", "vsi", "", "", value=float(true))
    assert evaluate.spatial_score(str(found), asked, scene(), evaluate.official_number) == pytest.approx(mra)
    assert evaluate.spatial_score("", asked, scene(), evaluate.official_number) == 0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("A", 1),
        ("A.", 1),
        ("A. chair", 1),
        ("a", 1),
        ("A) chair", 0),
        ("(A)", 0),
        ("The answer is A", 0),
        ("", 0),
    ],
)
def test_a_choice_is_its_letter_as_the_first_word(text, right):
    asked = Sample("1", "a", "vsi", "", "A", options=["A. chair", "B. bed"])
    assert evaluate.spatial_score(text, asked, scene(), evaluate.number) == right


def test_errors_in_meters_are_capped_and_charged_for_silence():
    """A mean over answered questions only would improve when a hard question is not answered."""
    length, point = SAMPLES[9], SAMPLES[8]
    assert evaluate.length_error("2.5 m", length) == 0.5
    assert (
        evaluate.length_error("", length) == evaluate.length_error("9" * 30, length) == evaluate.MAX_ERROR_M
    )
    assert evaluate.point_error("it is at [3, 3, 4].", point) == 5
    assert (
        evaluate.point_error("3, 0, 0", point)
        == evaluate.point_error("[nan, 0, 0]", point)
        == evaluate.MAX_ERROR_M
    )


# ---- text ------------------------------------------------------------------------------------------------------------


def of_words(said: list[str]) -> dict:
    return evaluate.text_scores({"": ([[text] for text in said], [[text] for text in said], False)})[0]


def test_cider_depends_on_the_set_it_is_computed_over(no_java):
    """Its word weights come from the references of this very set: one sample gives 0, a single word
    at most 2.5."""
    assert of_words(["a red chair"])["cider"] == 0
    assert of_words(["chair", "lamp", "bed"])["cider"] == pytest.approx(2.5)


def test_without_java_scores_are_not_available_and_never_zero(no_java, monkeypatch):
    both = {"/raw": ([["a chair"], ["a bed"]], [["a chair"], ["a bed"]], False)}
    scores, _ = evaluate.text_scores(both | {"/ptb": (*both["/raw"][:2], True)})
    assert scores["cider/ptb"] is None and scores["meteor/raw"] is None and scores["cider/raw"] > 0
    entry = evaluate.score(questions("rooms/caption"), {}, {})
    assert "n/a" in evaluate.table({"rooms/caption": entry}) and entry["meteor@0.5/ll3da"] is None


@needs_java
def test_a_java_that_fails_costs_no_other_score_and_stays_nowhere(monkeypatch, tmp_path):
    """A stub named java must not end a long run, and no Java process outlives the scoring."""
    sets = {"/ptb": ([["a chair"], [""]], [["a chair"], ["a bed"]], True)}
    assert evaluate.text_scores(sets)[0]["meteor/ptb"] > 0
    running = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    assert not [
        line
        for line in running.splitlines()
        if "meteor-1.5.jar" in line and str(os.getpid()) in line.split()[0]
    ]
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    scores, _ = evaluate.text_scores(sets | {"/raw": (*sets["/ptb"][:2], False)})
    assert scores["cider/ptb"] is None and scores["meteor/raw"] is None and scores["bleu1/raw"] > 0


# ---- scoring ---------------------------------------------------------------------------------------------------------

GENERATED = [name for name, benchmark in BENCHMARKS.items() if not benchmark.files]


@pytest.mark.parametrize("name", GENERATED)
def test_the_truth_is_best_and_garbage_is_worst(name, no_java):
    asked = questions(name)
    if not asked.samples:
        pytest.skip("no such question here")
    best = evaluate.score(asked, {s.id: truth(s, scene()) for s in asked.samples}, {})
    for text in ("", "?", "<OBJ055>", "[nan, 0, 0]", "\x00\ud800 |||", "9" * 400):
        worst = evaluate.score(asked, {s.id: text for s in asked.samples}, {})
        json.dumps(worst)
        for key in (key for key in best if "/" in key and best[key] is not None and "bleu" not in key):
            low, high = sorted((worst[key], best[key]))
            assert (best[key], worst[key]) == ((low, high) if "mae" in key else (high, low)), (key, text)
    assert best["count"] == len(asked.samples) and {row["id"] for row in best["rows"]} == {
        s.id for s in asked.samples
    }


def test_chance_and_blind_stand_beside_every_score():
    """For the very questions scored; where nothing says what a guess would be drawn from, there is
    none."""
    known = [replace(s, answer="3", value=3.0) if s.id == "q2" else s for s in SAMPLES]
    asked = questions("rooms/qa", blind=data.Blind(known))
    entry = evaluate.score(asked, {}, {"other": {s.id: truth(s, scene()) for s in asked.samples}})
    assert entry["blind"] == pytest.approx(2 / 3) and entry["em/strict"] == 0 and entry["other"] == 1
    assert entry["rows"][1]["blind"] == "3" and entry["columns"]["chance"]["em/strict/exist"] == 0.5
    grounding = evaluate.score(questions("rooms/grounding"), {}, {})
    assert grounding["chance"] == 0.25 and grounding["blind"] is None
    assert evaluate.score(questions("rooms/coordinate"), {}, {})["chance"] is None


def test_a_macro_score_counts_tasks_alike_and_kinds_of_one_task_as_one():
    row = BENCHMARKS["rooms/vsi"]
    samples = [Sample("", "a", "vsi_rel_direction", "", "", kind=k) for k in ("easy", "easy", "hard")]
    samples += [Sample("", "a", "vsi_counting", "", "")] * 3
    means = evaluate.summarize(row, samples, [{"m/p": v} for v in (1, 1, 0, 0, 0, 0)])
    assert means["m/p/rel_direction/easy"] == 1 and means["m/p/rel_direction"] == 0.5 and means["m/p"] == 0.25


def test_silence_is_right_where_nothing_is_to_be_found_and_stands_apart():
    entry = evaluate.score(questions("rooms/multi"), {"m2": "<OBJ017>"}, {})
    assert entry["f1@0.5/multi3drefer/zero_target"] == 1 and entry["remarks"]["empty answers"] == 1
    assert entry["f1@0.5/multi3drefer/with_target"] == pytest.approx(2 / 3)


# ---- asking a model --------------------------------------------------------------------------------------------------


def many() -> list[Sample]:
    return [replace(s, id=f"{name}/{s.id}", scene=name) for name in "cab" for s in SAMPLES]


def test_questions_are_grouped_by_scene_and_steps_are_cut_off():
    """A scene's questions stand together, however they came; "x6.00 x9.00 3.00 = 3.00" is scored as
    "3.00"."""
    model = Echo()
    model.stage = replace(STAGE, steps=True)
    answers = evaluate.predict(model, questions("rooms/qa", many()), batch=4)
    assert sorted(answers) == sorted(s.id for s in many() if s.id[2] == "q")
    assert model.asked == [[("a", 3), ("b", 1)], [("b", 2), ("c", 2)], [("c", 1)]]
    assert evaluate.predict(model, questions("rooms/distance"))["d1"] == "3.00"


def two_processes(script: str, *arguments: str) -> None:
    """Run a script as rank 0 and rank 1 of a gloo group, from the repository's root."""
    root = Path(__file__).parents[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", script, *arguments]
    ranks = [
        subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, env=environment | {"RANK": str(rank)})
        for rank in range(2)
    ]
    said = [r.communicate(timeout=120)[1].decode() for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0], said


def test_two_processes_give_the_scores_of_one(tmp_path, no_java):
    """The real thing over gloo: each rank answers its scenes, rank 0 alone scores and writes,
    nothing is twice."""
    script = (
        "import sys, pathlib, torch.distributed as dist, evaluate, test_evaluate as t\n"
        "evaluate.shutil.which = lambda name: None; dist.init_process_group('gloo'); model = t.Echo()\n"
        "model.stage = t.STAGE; asked = [t.questions(n, t.many()) for n in ('rooms/qa', 'rooms/multi')]\n"
        "out = evaluate.evaluate_questions(model, asked, pathlib.Path(sys.argv[1]), t.RECORD)\n"
        "assert bool(out) == (dist.get_rank() == 0); assert sum(n for b in model.asked for _, n in b) in (5, 10)\n"
        "dist.destroy_process_group()"
    )
    two_processes(script, str(tmp_path / "two"))
    model = Echo()
    model.stage = STAGE
    asked = [questions(name, many()) for name in ("rooms/qa", "rooms/multi")]
    evaluate.evaluate_questions(model, asked, tmp_path / "one", RECORD)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.json*"))
    assert len(files) == 3
    assert all((tmp_path / "one" / f).read_text() == (tmp_path / "two" / f).read_text() for f in files)


def test_with_other_proposals_marks_are_asked_about_the_best_fitting_one(tmp_path):
    """The truth keeps its own boxes; only what the model is shown and asked about changes, under
    another name."""
    (tmp_path / "found.json").write_text(json.dumps({"a": [moved(x).tolist() for x in (9.4, 3.2, 0.3)]}))
    asked = evaluate.with_proposals(questions("rooms/grounding"), str(tmp_path / "found.json"))
    shown = asked.shown["a"]
    assert (
        asked.name == "rooms/grounding@found"
        and shown.name == "a@found"
        and shown.identifiers == {1: 0, 2: 1, 3: 2}
    )
    assert evaluate.as_shown(SAMPLES[8], scene(), shown).question == "where is <obj 2>?"
    assert evaluate.as_shown(SAMPLES[9], scene(), shown).steps == "<obj 1> x6.00 ="
    model = Echo()
    model.stage = STAGE
    entry = evaluate.score(asked, evaluate.predict(model, asked), {})
    recall = [value for key, value in entry["remarks"].items() if key.startswith("recall")]
    assert entry["acc@0.5/scanrefer"] == 0.5 and recall == [1, 0.5]
    with pytest.raises(DataError, match="--proposals masks: neither a file of boxes nor one of gt, segments"):
        evaluate.with_proposals(questions("rooms/grounding"), "masks", Echo())


def test_a_proposal_counts_for_the_object_that_it_fits_best():
    """LL3DA's rule: one box around two things is no box of the smaller."""
    both = Thing(1, "", "", np.array([0.25, 0, 0, 1.5, 1, 1]))
    place = Scene("a", "", [Thing(1, "", "", UNIT), Thing(2, "", "", np.array([0.8, 0, 0, 0.5, 1, 1]))])
    shown = Scene("a@x", "", [both], identifiers={1: 0})
    assert evaluate.proposal_fit(place, shown, 1) == pytest.approx(2 / 3)
    assert evaluate.proposal_fit(place, shown, 2) == 0 == evaluate.proposal_fit(place, shown, 9)


def test_a_stage_is_scored_in_what_it_trained_or_what_is_named(tmp_path, capsys):
    """Questions come from scenes it never saw, blind answers from training scenes; identifiers
    never change."""
    model, scenes = Echo(), [data.room(seed, views=0, points=0) for seed in (900_000, 900_001)]
    known = [data.room(5, views=0, points=0)]
    entries = evaluate.evaluate_scenes(model, scenes, STAGE, tmp_path, record=RECORD, blind_scenes=known)
    assert list(entries) == ["rooms/grounding", "rooms/qa"] and entries["rooms/qa"]["counts"].keys() == {
        "count"
    }
    assert entries["rooms/grounding"]["acc@0.5/scanrefer"] == 1 == entries["rooms/qa"]["em/strict"]
    assert entries["rooms/grounding"]["blind"] is not None and model.cached == [s.name for s in scenes]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["provenance"]["stage"] == "IV" and "rooms/grounding" in capsys.readouterr().out
    row = json.loads((tmp_path / "predictions/rooms/qa.jsonl").read_text().splitlines()[0])
    assert (
        list(row) == ["id", "scene", "question", "prediction", "answer", "score", "blind"]
        and row["score"] == 1
    )
    named = evaluate.evaluate_scenes(
        model, scenes, STAGE, tmp_path, record=RECORD, names=["rooms/coordinate"]
    )
    assert list(named) == ["rooms/coordinate"] and named["rooms/coordinate"]["count"] == 60
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == [
        *entries,
        "rooms/coordinate",
        "provenance",
    ]
    other = RECORD | {"seed": 4}
    evaluate.evaluate_scenes(model, scenes, STAGE, tmp_path, record=other, names=["rooms/qa"])
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["rooms/qa", "provenance"]
    with pytest.raises(DataError, match="unknown benchmark rooms/q; known: rooms/grounding, "):
        evaluate.evaluate_scenes(model, scenes, STAGE, tmp_path, record=RECORD, names=["rooms/q"])


def test_rooms_of_any_number_of_objects_are_scored_apart(tmp_path, monkeypatch):
    model = Echo()
    model.stage = STAGE
    monkeypatch.setattr(evaluate, "load_run", lambda folder: (model, RECORD))
    command = ["--run", str(tmp_path), "--objects", "20", "--benchmark", "rooms/grounding"]
    assert evaluate.main(command) == 0
    entry = json.loads((tmp_path / "objects-20/metrics.json").read_text())["rooms/grounding"]
    assert entry["chance"] == pytest.approx(1 / 20) and not (tmp_path / "metrics.json").exists()
    assert evaluate.main([*command[:3], "1"]) == 2


def test_a_paper_s_own_benchmarks_are_rows(monkeypatch):
    monkeypatch.setattr(evaluate, "BENCHMARKS", dict(BENCHMARKS))
    paper = type(sys)("paper")
    evaluate.adopt(paper)
    paper.BENCHMARKS = {
        "rooms/new": dict(tasks=("count",), metrics={"right/x": lambda text, s, place: 1.0}, tokens=9)
    }
    evaluate.adopt(paper)
    assert evaluate.BENCHMARKS["rooms/new"].score("", SAMPLES[0], scene()) == {"right/x": 1.0}


@pytest.mark.parametrize("held", ["{", "[]", "3", '{"a": 1}', '{"provenance": 3}'])
def test_a_metrics_file_that_holds_anything_else_is_replaced(tmp_path, held):
    """The scores are made by then: nothing may stop them from being written."""
    (tmp_path / "m.json").write_text(held)
    evaluate.save(tmp_path / "m.json", {"rooms/qa": evaluate.score(questions("rooms/qa"), {}, {})}, seed=1)
    assert set(json.loads((tmp_path / "m.json").read_text())) == {"rooms/qa", "provenance"}


# ---- asking about a scene of one's own -------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A command that asks about a cloud, whose answers are `said`."""
    place = replace(data.room(3, views=0, points=500), notes=["made here"])
    model = Echo(lambda s, place: "x1.00 = 2.50")
    model.stage = STAGE
    monkeypatch.setattr(evaluate, "load_run", lambda folder: (model, RECORD))
    monkeypatch.setattr(data, "open_scene", lambda path, **options: place)
    command = ["--run", str(tmp_path), "--scene", str(tmp_path / "x.ply"), "--ask"]
    return place, command, tmp_path / "ask.png"


def test_questions_about_a_scene_are_answered_and_drawn(own, capsys):
    _, command, picture = own
    assert evaluate.main([*command, "how far is it?", "--ask", "is <obj 1> far?"]) == 0
    said = capsys.readouterr().out
    assert (
        "note: made here" in said
        and "how far is it?  2.50" in said
        and str(picture) in said
        and picture.exists()
    )


def test_questions_may_be_typed_until_an_empty_line(own, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("how far is it?\nis it?\n\nfar\n"))
    assert evaluate.main(own[1][:-1]) == 0
    assert capsys.readouterr().out.count("2.50") == 2
    assert evaluate.main(own[1][:-1]) == 0  # what is left
    assert evaluate.main(own[1][:-1]) == 2  # nothing is


@pytest.mark.parametrize(
    ("question", "more", "status", "said"),
    [
        ("how far is it?", [], 0, "no known scale"),
        ("is <obj 99> it?", [], 2, "<obj 99>: room000003 has no such object"),
        ("is it?", ["--at=1,2,3"], 2, "--at: proxy3d takes no places; fase3d does"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(own, capsys, question, more, status, said):
    own[0].metric = False
    assert evaluate.main([*own[1], question, *more]) == status
    found = capsys.readouterr()
    assert said in (found.err if status else found.out) and found.err.count("\n") == bool(status)


@pytest.mark.parametrize(
    "arguments", [["--benchmark", "scanqa"], ["--frobnicate"], ["--at", "1,2", "--run", "x"]]
)
def test_wrong_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as error:
        evaluate.main(arguments)
    assert error.value.code == 2
