"""What every score means, in numbers small enough to check by hand, and what no answer may ever do: raise one."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from papers import refused
from torch.multiprocessing import start_processes

import data
import evaluate
from data import Sample, Scene, Stage, Thing
from evaluate import BENCHMARKS, Questions

needs_java = pytest.mark.skipif(
    not shutil.which("java"), reason="no Java: the PTB tokenizer and METEOR cannot run here"
)


def moved(x):
    """The unit box moved along x."""
    return np.array([x, 0, 0, 1, 1, 1.0])


def scene(name="a"):
    """Four things; identifiers differ from object ids, so mixing the two up shows."""
    things = [
        Thing(1, "chair", "red", moved(0)),
        Thing(2, "chair", "blue", moved(3)),
        Thing(3, "table", "white", moved(6)),
        Thing(4, "lamp", "red", moved(9)),
    ]
    return Scene(name, "rooms", things, identifiers={1: 17, 2: 3, 3: 99, 4: 0})


def sample(id, task, question, answer, **more):
    return Sample(id, "a", task, question, answer, **more)


# one question of every kind; its truth answers it perfectly
BED = sample("m0", "multi", "find all beds.", "no.", targets=[], kind="zt_wo_d")
POINT = sample("c1", "coordinate", "where is <obj 2>?", "[3.00, 0.00, 0.00]", point=np.array([3, 0, 0.0]))
LENGTH = sample("d1", "distance", "how far is it?", "3.00", value=3.0, reasoning="<obj 3> x6.00 =")
SAMPLES = [
    sample("g1", "ground", "find the red chair.", "<obj 1>", targets=[1], kind="multiple"),
    sample("g2", "ground", "find the lamp.", "<obj 4>", targets=[4], kind="unique"),
    BED,
    sample("m2", "multi", "find all chairs.", "yes. <obj 1> <obj 2>", targets=[1, 2], kind="mt"),
    sample("q1", "color", "what color is the table?", "white"),
    sample("q2", "count", "how many chairs are there?", "2", value=2.0),
    sample("q3", "exist", "is there a bed?", "no"),
    sample("i1", "id_category", "what is <obj 2>?", "chair"),
    POINT,
    LENGTH,
    sample("t1", "caption", "describe <obj 1>.", "a red chair.", answers=["a red chair."], targets=[1]),
    sample("t2", "caption", "describe <obj 4>.", "a red lamp.", answers=["a red lamp."], targets=[4]),
    sample("v1", "vsi_counting", "how many chairs?", "2", value=2.0),
    sample("v2", "vsi_rel_distance", "which is closest?", "B", options=["A. table", "B. lamp", "C. bed"]),
]


def questions(name, samples=SAMPLES, **changes):
    """Those of the samples that belong to a benchmark of generated questions."""
    benchmark = evaluate.choose_dialects(BENCHMARKS[name], ())
    own = [s for s in samples if s.task in benchmark.tasks]
    scenes = {s.scene: scene(s.scene) for s in own}
    return Questions(name, benchmark, own, scenes, scenes, **changes)


def truth(sample, place):
    return evaluate.plain(sample.answer, place)


STAGE = Stage("IV", {"ground": 1.0, "count": 1.0}, (), iterations=1)


class Echo(data.SceneLanguageModel):
    """A model that answers with the truth, or with what `answer(sample, scene)` says."""

    device = torch.device("cpu")

    def __init__(self, answer=truth):
        super().__init__(None, data.TinyText(["how", "far", "is", "it"]))
        self.answer, self.stage, self.asked = answer, STAGE, 0

    def configure_stage(self, stage):
        self.stage = stage

    def cache_features(self, *_):
        pass

    def batch(self, groups):
        self.asked += sum(len(samples) for _, samples in groups)
        return groups

    def generate(self, groups, max_new_tokens):
        return [self.answer(s, place) for place, samples in groups for s in samples]

    def token_centers(self, place):
        return np.zeros((1, 3))


RECORD = {
    "model": "proxy3d",
    "seed": 3,
    "dtype": "float32",
    "data": "rooms",
    "root": None,
    "scene_options": {},
    "scene_counts": {"train": 4, "test": 2},
}


# ---- reading an answer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "  The Red Chair. ": "red chair",
        "2": "two",
        "none": "zero",
        "TV": "TV",
        "a 23": "twenty-three",
        "on the letf of a desk": "on left of desk",
        "mat2": "mat",
        "9 oclock": "nine o'clock",
        "the": "the",
        "go backwards": "go backward",
        "21": "21",
        "brown, wooden": "brown, wooden",
    }.items(),
)
def test_the_cleaner_follows_the_one_of_the_literature(text, expected):
    """One rule more or less moves every cleaned score: articles go only before a word, 21 is not a
    word, 23 is."""
    assert evaluate.clean(text) == expected


@pytest.mark.parametrize(
    ("text", "official", "words"),
    [
        ("2.5m", np.nan, 2.5),
        ("nan", np.nan, np.nan),
        ("one apple, room 2", np.nan, 1),
        ("twenty-one", np.nan, 21),
        ("two thousand and three hundred", np.nan, 2300),
    ],
)
def test_numbers_are_read_as_vsi_bench_and_as_lmms_eval_do(text, official, words):
    found = [evaluate.official_number(text), evaluate.number(text)]
    assert found == pytest.approx([official, words], nan_ok=True)


def test_identifiers_become_the_boxes_they_mean_and_those_of_no_object_are_dropped():
    text = evaluate.with_boxes("Yes. <OBJ017>, <OBJ055> [1, 2, 3] [9 0 0 1 1 1] OBJ003", scene())
    assert np.array_equal(evaluate.boxes(text), [moved(0), moved(9)])


@pytest.mark.parametrize("entry", ["nan", "-1", "0", "x"])
def test_a_box_with_nan_or_without_volume_hits_nothing(entry):
    """It stays an answer: for "find all beds" it must not count as silence."""
    assert evaluate.boxes_f1(f"[0, 0, 0, 1, 1, {entry}]", BED, scene(), 0.25) == 0


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


def test_boxes_are_assigned_by_the_sum_of_iou_and_not_by_the_number_of_hits():
    """Multi3DRefer's rule: two possible hits at 0.25 can be one."""
    place = Scene("a", "", [Thing(1, "", "", moved(0)), Thing(2, "", "", moved(0.53))])
    asked = sample("1", "multi", "", "", targets=[1, 2])
    text = f"{moved(0).tolist()} {moved(-0.53).tolist()}"
    assert evaluate.boxes_f1(text, asked, place, 0.25) == 0.5


def test_the_error_of_a_point_is_capped_and_charged_for_silence():
    """A mean over answered questions only would improve when a hard question is not answered."""
    assert evaluate.point_error("it is at [3, 3, 4].", POINT) == 5
    for text in ("", "3, 0, 0", "[nan, 0, 0]", "[99, 0, 0]"):
        assert evaluate.point_error(text, POINT) == evaluate.MAX_ERROR_M


def test_kinds_of_one_task_count_alike_whatever_their_size():
    samples = [sample("", "vsi_rel_direction", "", "", kind=kind) for kind in ("easy", "easy", "hard")]
    scored = [{"m/p": value} for value in (1, 1, 0)]
    assert evaluate.summarize(BENCHMARKS["rooms/vsi"], samples, scored)["m/p"] == 0.5


# ---- text ------------------------------------------------------------------------------------------------------------


WORDS = [["a chair"], ["a bed"]]  # answers and references
SETS = {"/ptb": (WORDS, WORDS, True), "/raw": (WORDS, WORDS, False)}


def test_without_java_scores_are_not_available_and_never_zero(no_java):
    scores, _ = evaluate.text_scores(SETS)
    assert scores["cider/ptb"] is None and scores["meteor/raw"] is None and scores["cider/raw"] > 0
    entry = evaluate.score(questions("rooms/caption"), {}, {})
    assert "n/a" in evaluate.table({"rooms/caption": entry}) and entry["meteor@0.5/ll3da"] is None


@needs_java
def test_a_java_that_fails_costs_no_other_score_and_stays_nowhere(monkeypatch, tmp_path):
    """A stub named java must not end a long run, and no Java process outlives the scoring."""
    assert evaluate.text_scores(SETS)[0]["meteor/ptb"] > 0
    running = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args"], capture_output=True, text=True)
    assert "meteor-1.5.jar" not in running.stdout
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    scores, _ = evaluate.text_scores(SETS)
    assert scores["cider/ptb"] is None and scores["meteor/raw"] is None and scores["bleu1/raw"] > 0


# ---- scoring ---------------------------------------------------------------------------------------------------------

NAMES = "grounding multi qa identifier coordinate distance caption vsi"


@pytest.mark.parametrize("name", [f"rooms/{name}" for name in NAMES.split()])
def test_the_truth_is_best_and_garbage_is_worst(name, no_java):
    asked = questions(name)
    best = evaluate.score(asked, evaluate.predict(Echo(), asked), {})
    assert best["count"] == len(asked.samples) == len(best["rows"])
    keys = [key for key in best if "/" in key and best[key] is not None and "bleu" not in key]
    for text in ("", "?", "<OBJ055>", "[nan, 0, 0]", "\x00\ud800 |||", "9" * 400):
        worst = evaluate.score(asked, {s.id: text for s in asked.samples}, {})
        json.dumps(worst)
        for key in keys:
            sign = -1 if "mae" in key else 1
            assert sign * best[key] >= sign * worst[key], (key, text)


def test_chance_and_blind_stand_beside_every_score():
    """For the very questions scored; where nothing says what a guess would be drawn from, there is
    none."""
    known = [replace(s, answer="3", value=3.0) if s.id == "q2" else s for s in SAMPLES]
    asked = questions("rooms/qa", blind=data.Blind(known))
    entry = evaluate.score(asked, {}, {"other": evaluate.predict(Echo(), asked)})
    assert entry["blind"] == pytest.approx(2 / 3) and entry["em/strict"] == 0 and entry["other"] == 1
    assert entry["rows"][1]["blind"] == "3" and entry["columns"]["chance"]["em/strict/exist"] == 0.5
    grounding = evaluate.score(questions("rooms/grounding"), {}, {})
    assert grounding["chance"] == 0.25 and grounding["blind"] is None
    assert evaluate.score(questions("rooms/coordinate"), {}, {})["chance"] is None


# ---- asking a model --------------------------------------------------------------------------------------------------


def test_reasoning_is_cut_off():
    model = Echo(lambda s, place: "x6.00 x9.00 3.00 = 3.00")
    model.stage = replace(STAGE, reasoning=True)
    assert evaluate.predict(model, questions("rooms/distance"))["d1"] == "3.00"


def ask_all(model, out):
    """Ask about three scenes."""
    samples = [replace(s, id=f"{name}/{s.id}", scene=name) for name in "cab" for s in SAMPLES]
    asked = [questions(name, samples) for name in ("rooms/qa", "rooms/multi")]
    return evaluate.evaluate_questions(model, asked, out, RECORD)


def one_of_two(rank, folder):
    """A process that answers its scenes; the first alone scores and writes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = Echo()
    assert bool(ask_all(model, folder / "two")) == (rank == 0)
    assert model.asked in (5, 10)
    dist.destroy_process_group()


def test_two_processes_give_the_scores_of_one(tmp_path, no_java):
    """The real thing over gloo: nothing is answered twice, nothing left out."""
    start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    ask_all(Echo(), tmp_path / "one")
    one, two = (
        {file.relative_to(folder): file.read_text() for file in folder.rglob("*.json*")}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 3


def test_with_other_proposals_marks_are_asked_about_the_best_fitting_one(tmp_path):
    """The truth keeps its own boxes; only what the model is shown and asked about changes, under
    another name."""
    (tmp_path / "found.json").write_text(json.dumps({"a": [moved(x).tolist() for x in (9.4, 3.2, 0.3)]}))
    asked = evaluate.with_proposals(questions("rooms/grounding"), str(tmp_path / "found.json"))
    shown = asked.shown["a"]
    assert (asked.name, shown.name) == ("rooms/grounding@found", "a@found")
    assert shown.identifiers == {1: 0, 2: 1, 3: 2}
    assert evaluate.as_shown(POINT, scene(), shown).question == "where is <obj 2>?"
    assert evaluate.as_shown(LENGTH, scene(), shown).reasoning == "<obj 1> x6.00 ="
    entry = evaluate.score(asked, evaluate.predict(Echo(), asked), {})
    recall = [value for key, value in entry["remarks"].items() if key.startswith("recall")]
    assert entry["acc@0.5/scanrefer"] == 0.5 and recall == [1, 0.5]
    with refused(r"--proposals masks: neither .*, nor one of gt, segments"):
        evaluate.with_proposals(questions("rooms/grounding"), "masks", Echo())


def test_a_proposal_counts_for_the_object_that_it_fits_best():
    """LL3DA's rule: one box around two things is no box of the smaller."""
    large, small, around = (Thing(i, "", "", moved(0)) for i in (1, 2, 1))
    small.box[[0, 3]] = 0.8, 0.5
    around.box[[0, 3]] = 0.25, 1.5
    place, shown = Scene("a", "", [large, small]), Scene("a@x", "", [around], identifiers={1: 0})
    fits = [evaluate.proposal_fit(place, shown, i) for i in (1, 2, 9)]
    assert fits == pytest.approx([2 / 3, 0, 0])


def written(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_stage_is_scored_in_what_it_trained_or_what_is_named(tmp_path, capsys):
    """Questions come from scenes it never saw, blind answers from training scenes."""
    scenes = [data.room(seed, views=0, points=0) for seed in (900_000, 900_001, 5)]
    score = partial(evaluate.evaluate_scenes, Echo(), scenes[:2], tmp_path, record=RECORD)
    entries = score(blind_scenes=scenes[2:])
    grounding, qa = entries["rooms/grounding"], entries["rooms/qa"]
    assert list(entries) == ["rooms/grounding", "rooms/qa"] and list(qa["counts"]) == ["count"]
    assert grounding["acc@0.5/scanrefer"] == 1 == qa["em/strict"] and grounding["blind"] is not None
    assert "rooms/grounding" in capsys.readouterr().out

    # scores of the same run stand together in one file, those of another replace them
    assert score(names=["rooms/coordinate"])["rooms/coordinate"]["count"] == 60
    assert list(written(tmp_path)) == [*entries, "rooms/coordinate", "provenance"]
    assert written(tmp_path)["provenance"]["stage"] == "IV"
    score(record=RECORD | {"seed": 4}, names=["rooms/qa"])
    assert list(written(tmp_path)) == ["rooms/qa", "provenance"]
    with refused("benchmark 'rooms/q' is unknown: choose one of rooms/grounding, "):
        score(names=["rooms/q"])


def test_a_run_of_none_of_the_papers_is_refused_before_its_module_is_imported(tmp_path, capsys):
    """A state.json from elsewhere must not run code of its choice."""
    (tmp_path / "checkpoint").mkdir()
    state = {"position": {"total": 0}, "run": {"model": "antigravity"}, "processes": 1, "sha256": {}}
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps(state))
    assert evaluate.main(["--run", str(tmp_path)]) == 2
    assert "paper 'antigravity' is unknown: choose one of proxy3d, " in capsys.readouterr().err
    assert "antigravity" not in sys.modules


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command about a finished run, whose answers are all 2.50."""
    model = Echo(lambda s, place: "x1.00 = 2.50")
    monkeypatch.setattr(evaluate, "load_run", lambda folder: (model, RECORD))
    return ["--run", str(tmp_path)]


def test_rooms_of_any_number_of_objects_are_scored_apart(run, tmp_path):
    assert evaluate.main([*run, "--objects", "20", "--benchmark", "rooms/grounding"]) == 0
    entry = written(tmp_path / "objects-20")["rooms/grounding"]
    assert entry["chance"] == pytest.approx(1 / 20) and not (tmp_path / "metrics.json").exists()
    assert evaluate.main([*run, "--objects", "1"]) == 2


# ---- asking about a scene of one's own -------------------------------------------------------------------------------


@pytest.fixture
def own(run, monkeypatch):
    """A scene, and a command that asks about it."""
    place = data.room(3, views=0, points=500)
    monkeypatch.setattr(data, "open_scene", lambda path, **options: place)
    return place, [*run, "--scene", "x.ply"]


def test_questions_may_be_typed_until_an_empty_line(own, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("how far is it?\nis it?\n\nfar\n"))
    assert evaluate.main(own[1]) == 0
    assert capsys.readouterr().out.count("2.50") == 2
    assert evaluate.main(own[1]) == 0  # what is left
    assert evaluate.main(own[1]) == 2  # nothing is


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
    assert evaluate.main([*own[1], "--ask", question, *more]) == status
    found = capsys.readouterr()
    assert said in (found.err if status else found.out) and found.err.count("\n") == bool(status)


@pytest.mark.parametrize("arguments", ["--benchmark scanqa", "--frobnicate", "--at 1,2 --run x"])
def test_wrong_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(arguments.split())
