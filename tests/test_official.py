"""Official files: read right, asked the same as in memory, scored as their authors do, and never fooled.

pytest tests/test_official.py
"""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import official
import pytest
from official import row
from papers import refused
from test_evaluate import RECORD, Echo, needs_java

import data
import evaluate
from data import Source
from evaluate import BENCHMARKS

SHARED = Path(__file__).parents[2] / "shared/data"
PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three training and two validation scans, and official files of six benchmarks about both."""
    root, scenes, samples = tmp_path_factory.mktemp("scannet"), {}, {}
    for split, seeds in (("train", (1, 2, 3)), ("val", (900_011, 900_012))):
        scenes[split] = official.scans(root, seeds, views=3, size=96, points=2000, objects=9)
        for name in official.TASKS:
            samples[name] = official.questions(scenes[split], name)
            part = split if split == "train" else BENCHMARKS[name].split
            if part in BENCHMARKS[name].files:
                official.write(root / "files" / name, name, part, samples[name])
    return SimpleNamespace(root=root, scenes=scenes, samples=samples)


@pytest.fixture
def asked(tmp_path):
    """Questions of rows about one scene with these boxes, by objectId."""

    def ask(name, rows, boxes=(), dialects=()):
        questions, scenes = tmp_path / "asked.json", tmp_path / "boxes.json"
        questions.write_text(json.dumps(rows))
        scenes.write_text(json.dumps({"s": boxes}))
        return evaluate.load(name, questions, scenes, True, dialects)

    return ask


@pytest.fixture
def assert_printed(asked):
    """Questions with answers score what the scripts print."""

    def check(name):
        known = PEERS[name]
        rows, said = [], {}
        for i, (*values, text) in enumerate(known["rows"]):
            same = row(i, id=i, scene_name="s", situation="I sit.")
            rows.append(same | dict(zip(known["fields"], values, strict=True)))
            said[BENCHMARKS[name].read(**rows[-1]).id] = text
        scores = evaluate.measure(asked(name, rows, known.get("boxes", ()), ["all"]), said)[0]

        for part, numbers in known["printed"].items():
            for metric, number in zip(known["metrics"], numbers, strict=True):
                if number is not None:
                    assert scores[metric + part] == pytest.approx(number, abs=1e-6), metric + part

    return check


# ---- the numbers of the benchmarks' and peers' own scripts -----------------------------------------------------------


@needs_java
@pytest.mark.parametrize("name", ["scanqa", "sqa3d"])
def test_words_are_scored_as_six_groups_of_papers_do(assert_printed, name):
    """Also where answers are empty, hold two lines or a capital and a full stop; each script's
    numbers to 1e-6."""
    assert_printed(name)


@needs_java
def test_dense_captions_are_scored_as_four_groups_of_papers_do(assert_printed, monkeypatch):
    """A caption whose box does not fit, or that is empty, is "sos eos"; `>` and `>=` differ at IoU
    0.5 and 0.25."""
    overlaps = PEERS["scan2cap"]["overlaps"]
    monkeypatch.setattr(evaluate, "proposal_fit", lambda scene, shown, i: overlaps[i - 1])
    assert_printed("scan2cap")


def test_vsi_bench_is_scored_as_its_script_and_as_lmms_eval_do(assert_printed):
    assert_printed("vsibench")


def test_multi3drefer_is_scored_as_m3dref_and_chat_scene_do(assert_printed):
    """Silence is right where nothing is to be found, which stands apart; an identifier of no object is no
    answer; IoU is kept in float32, which lets an exact 0.5 pass."""
    assert_printed("multi3drefer")


def test_scanrefer_is_scored_as_chat_scene_does(assert_printed):
    """The first identifier that exists counts; unique and multiple at both thresholds; 1e-8 in the
    denominator of IoU makes an exact 0.5 fail."""
    assert_printed("scanrefer")


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason=f"no official files at {SHARED}")
@pytest.mark.parametrize(
    ("name", "scenes", "kinds"),
    [
        ("scanqa", 71, dict(object=1478, color=838, other=814, number=224)),
        (
            "sqa3d",
            67,
            {"what": 1147, "is": 652, "how": 465, "can": 338, "which": 351, "others": 566},
        ),
        ("openeqa", 152, {"object localization": 263, "object recognition": 231}),
    ],
)
def test_official_questions_are_all_read_with_their_types(name, scenes, kinds):
    """The types are those of the benchmarks' own scripts; `load` checks the number of questions; a true
    answer scores 1, and can be written with the tokens that the benchmark allows."""
    questions = evaluate.load(name, SHARED)
    count = Counter(s.kind for s in questions.samples)
    assert kinds.items() <= count.items() and len(questions.scenes) == scenes
    for s in questions.samples:
        scores = questions.benchmark.score(s.answers[0], s, None)
        assert all(value == 1 for key, value in scores.items() if key.startswith("em"))
        assert max(len(digits(answer)) for answer in s.answers) < questions.benchmark.tokens


@pytest.mark.parametrize("name", official.TASKS)
def test_rooms_in_a_benchmark_s_files_come_back_as_they_were(world, name):
    """Ids, questions, answers, targets, values and options; every question id once. Captions have no question."""
    found = evaluate.read_official(name, world.root / "files" / name)
    for s, true in zip(found, world.samples[name], strict=True):
        for field in ("id", "scene", "targets", "options"):
            assert getattr(s, field) == getattr(true, field)
        assert s.question == true.question or name == "scan2cap"
        assert s.value == true.value or name != "vsibench" or s.options
        if name in ("scanqa", "sqa3d", "scan2cap"):
            assert s.answers == (true.answers or [true.answer])


def test_unique_means_alone_of_its_class_among_annotated_objects(tmp_path):
    """Not among all instances; what is none of 17 classes shares the class "others"."""
    table = """raw_category	nyu40class
armchair	chair
office chair	chair
bed	bed
piano	otherfurniture
clock	otherprop"""
    (tmp_path / evaluate.LABELS).write_text(table)
    names = ["armchair", "office_chair", "bed", "piano", "clock", "nameless"]
    rows = [row(k, object_id=i, object_name=name) for i, name in enumerate(names) for k in range(2)]
    (tmp_path / "ScanRefer_filtered_val.json").write_text(json.dumps(rows))
    samples = evaluate.read_official("scanrefer", tmp_path)
    assert [s.id for s in samples if s.kind == "unique"] == ["s|2|0", "s|2|1"] and len(samples) == 12


NUMERICAL = dict(problem_type="numerical", problem="how many?", solution="<answer>3</answer>", path="x/s.mp4")


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("sr91k", NUMERICAL, dict(value=3.0, scene="s", answers=["3"])),
        ("sr91k", NUMERICAL | {"problem_type": "OCR"}, None),
        ("sr91k", NUMERICAL | {"data_source": "CLEVRER"}, None),
        (
            "mmscan/qa",
            dict(ID="QA_1", sub_class="QA_EQ", scan_id="x/s", question="?", answers=["a"]),
            dict(id="QA_1", scene="s", kind="QA_EQ"),
        ),
        (
            "mmscan/vg",
            dict(ID="VG_1", sub_class="", scan_id="x/s", text="it", target_id=[3]),
            dict(targets=[4], id="VG_1"),
        ),
        (
            "3dllm/planning",
            dict(scene_id="s", question="### human: clean up. ### assistant:", answers=["1. go"]),
            dict(question="clean up."),
        ),
        (
            "msqa",
            dict(
                index=7, scan_id="s", situation="I sit.", question="What?", answers=["Two"], type="counting"
            ),
            dict(id="7", question="I sit. What?", kind="counting"),
        ),
        ("scanrefer", row(0, scene_id="scene0217_00", object_id="33"), dict(targets=[3])),
    ],
)
def test_a_row_becomes_a_question(name, fields, expected):
    """Scene0217_00 lists its 31 objects twice: both listings are the same objects."""
    sample = BENCHMARKS[name].read(**fields)
    assert sample is expected or expected.items() <= vars(sample).items()


RED = row(1, answers=["red"])


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("scanqa", [row(1, answers="red")], "row 1: .*a list of answers must be text"),
        ("scanqa", [RED | {"question": " "}], "row 1: .*must be text"),
        ("scanqa", [RED, RED], "the question id 1 twice"),
        ("scanqa", [RED, {"scene_id": "s"}], "row 2: .*missing 3 required .*question_id"),
        ("scanqa", ["x"], "row 1: .*must be a mapping"),
        ("scanqa", [], "no rows of JSON"),
        (
            "vsibench",
            [row(1, id=1, scene_name="s", question_type="x", ground_truth="B")],
            "row 1: .*could not",
        ),
        ("scanrefer", [row(1, object_id="one")], "row 1: .*invalid literal"),
    ],
)
def test_a_broken_official_file_is_refused_in_one_line(asked, tmp_path, name, rows, message):
    with refused(rf"^{tmp_path}.*{message}.*\Z"):
        asked(name, rows)


def test_questions_and_scans_that_are_missing_are_an_error_or_left_out(world, capsys):
    """A file has the questions of its split, whatever it is called; nothing accepts no answer at all."""
    samples = world.samples["scanqa"]
    asked = [*samples, replace(samples[0], id="x", scene="gone")]
    path = official.write(world.root / "more", "scanqa", "val", asked)
    for name in (path.name, "mine.json"):
        path = path.rename(path.with_name(name))
        with refused("questions, not 4675; complete it, or say --partial"):
            evaluate.load("scanqa", path, world.root)
    assert len(evaluate.load("scanqa", path, world.root, partial=True).samples) == len(samples)

    # answers to other questions
    said = world.root / "said.json"
    said.write_text('{"y": "white"}')
    command = f"--annotations {path} --predictions {said} --partial --benchmark"
    assert evaluate.main([*command.split(), "scanqa"]) == 2
    assert "questions have no answer" in capsys.readouterr().err
    assert evaluate.main([*command.split(), "mmscan/qa"]) == 2


# ---- anybody's predictions -------------------------------------------------------------------------------------------

TRUTH = {"val-scene11-0": "white", "val-scene11-1": "brown", "val-scene11-2": "2"}


def lines(**fields):
    """The true answers as rows of JSON in which ID and TEXT stand for them."""
    pattern = json.dumps(fields)
    return "\n".join(pattern.replace("ID", id).replace("TEXT", text) for id, text in TRUTH.items())


def listed(**fields):
    return f"[{lines(**fields)}]".replace("\n", ",\n")


FORMS = {  # name of a file -> its text
    "lines.jsonl": lines(id="ID", prediction="TEXT"),
    "mark.jsonl": "\ufeff" + lines(id=" ID ", prediction="TEXT").replace("\n", "\r\n"),
    "list.json": listed(question_id="ID", text="TEXT"),
    "server.json": listed(question_id="ID", answer_top10=["TEXT", "TEXT"], bbox=[[0]]),
    "object.json": json.dumps(TRUTH),
    "lmms.jsonl": lines(
        doc_id=0, doc={"question_id": "ID", "answers": []}, filtered_resps=["TEXT"], target="x"
    ),
    "video.jsonl": lines(sample_id="ID", pred_response="TEXT", gt_response=["x"]),
    "tags.jsonl": lines(id="ID", response="<think>hm</think><answer> TEXT\n</answer>"),
    "chat.json": listed(scene_id="s", qid="ID", pred="TEXT", ref_captions=["x"]),
    "number.json": listed(id="ID", answer="TEXT").replace('"2"', "2"),
    "table.csv": "question_id,prediction\n" + "\n".join(map(",".join, TRUTH.items())),
}


@pytest.fixture
def white(asked):
    """The three questions of TRUTH."""
    return asked("scanqa", [row(id, answers=[text]) for id, text in TRUTH.items()])


@pytest.mark.parametrize("name", FORMS)
def test_a_predictions_file_is_read_as_what_it_is(white, tmp_path, capsys, name):
    (tmp_path / name).write_text(FORMS[name])
    assert evaluate.read_predictions(tmp_path / name, white) == TRUTH
    assert "3 rows, id = " in capsys.readouterr().out
    assert white.remarks.total() == (3 if name == "tags.jsonl" else 0)


@pytest.mark.parametrize(
    ("text", "correct", "remark"),
    [
        ('{"val-scene11-0": "white", "val-scene11-1": null, "val-scene11-2": {"a": 1}}', 1, "empty answers"),
        (FORMS["lines.jsonl"] + '\n{"id": "val-scene11-0", "prediction": "red"}', 3, "answered before"),
        (FORMS["lines.jsonl"] + '\n{"id": "x", "prediction": "y"}\nrubbish', 3, "answer no question"),
    ],
)
def test_what_is_wrong_with_answers_is_counted_beside_the_score(
    white, tmp_path, no_java, text, correct, remark
):
    (tmp_path / "said.jsonl").write_text(text)
    entry = evaluate.score(white, evaluate.read_predictions(tmp_path / "said.jsonl", white), {})
    assert entry["em/scanqa"] == pytest.approx(correct / 3)
    assert any(remark in key for key in entry["remarks"])


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "": "no rows of JSON",
        "[" * 10**5: "no rows of JSON",
        '[{"key": 1}, {"key": 1}]': 'wanted are rows like {"id": ".*", "prediction": "text"}, these have key',
        '{"x": "y"}': "3 of 3 questions have no answer",
        '{"val-scene11-0": "white"}': "2 of 3 questions have no answer",
    }.items(),
)
def test_a_predictions_file_that_is_not_understood_is_refused_with_what_is_wanted(
    white, tmp_path, text, message
):
    (tmp_path / "said.json").write_text(text)
    with refused(rf"^{tmp_path}/said.json.*{message}.*\Z"):
        evaluate.read_predictions(tmp_path / "said.json", white)


# ---- asking ----------------------------------------------------------------------------------------------------------


def oracle(sample, place):
    """Answers two of three questions with their truth, the third with nonsense."""
    return evaluate.plain(sample.answer, place) if sum(sample.id.encode()) % 3 else "<OBJ099> x"


@pytest.mark.parametrize("name", ["scanqa", "sqa3d", "scanrefer", "multi3drefer", "scan2cap"])
def test_a_run_and_a_file_of_its_answers_get_the_same_scores(
    world, tmp_path, monkeypatch, capsys, no_java, name
):
    """With identifiers of the model's own in the run and ScanNet's in the file, and with boxes in
    place of scans."""
    monkeypatch.setattr(evaluate, "load_run", lambda folder: (Echo(oracle), RECORD))
    files = f"--benchmark {name} --dialect ll3da --annotations {world.root / 'files' / name} --partial"
    out = tmp_path / "metrics.json"

    def scored(command):
        assert evaluate.main(f"{files} {command}".split()) == 0
        entry = json.loads(out.read_text())[name]
        return {key: value for key, value in entry.items() if "/" in key or key == "blind"}

    ran = scored(f"--run {tmp_path} --root {world.root}")
    assert len(ran) > 1 and ran["blind"] is not None and (tmp_path / "report.html").exists()

    # the same answers, and the scans' boxes, as files
    said = tmp_path / "said.json"
    boxes = tmp_path / "boxes.json"
    answers, objects = {}, {}
    for scan in map(evaluate.number_objects, world.scenes["val"]):
        answers |= {s.id: oracle(s, scan) for s in world.samples[name] if s.scene == scan.name}
        objects[scan.name] = {o.id - 1: o.box.tolist() for o in scan.objects}
    said.write_text(json.dumps(answers))
    boxes.write_text(json.dumps(objects))
    for root in (world.root, boxes):
        assert scored(f"--predictions {said} --root {root} --out {out}") == pytest.approx(ran, abs=2e-2)
    if name in ("scanrefer", "multi3drefer", "scan2cap"):
        assert evaluate.main(f"{files} --predictions {said}".split()) == 2
        assert "needs boxes" in capsys.readouterr().err


def digits(text):
    """Split numbers into digits and words into pieces of four letters, as large vocabularies do at
    worst."""
    return re.findall(r"\s?[A-Za-z]{1,4}|\d|[^\sA-Za-z\d]", text)


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.tasks])
def test_every_true_answer_survives_the_row_s_limit(name):
    """Also where a paper writes an object as its box and a tokenizer splits it into digits: cut at
    the limit, the truth must still be whole. (A box in digits takes 40 tokens.)"""
    tasks = [task for task in BENCHMARKS[name].tasks if task in data.TASKS]
    for seed in range(900_000, 900_020):
        scene = evaluate.number_objects(data.room(seed, views=0, points=0), 0)
        boxes = {o.id: data.listed(o.box) for o in scene.objects}
        for s in data.question_set([scene], tasks, 5, 0):
            for text in s.answers or [s.answer]:
                boxed = data.substitute(text, boxes.get)
                assert len(digits(boxed)) < BENCHMARKS[name].tokens


# ---- training --------------------------------------------------------------------------------------------------------


def test_no_room_of_an_evaluation_split_is_trained_in_and_no_target_that_no_proposal_fits(world):
    """Another scan of a validation room is that room; every accepted answer is a question of its
    own, with the prompt."""
    train, held = world.scenes["train"], world.scenes["val"][0]
    again = replace(held, name=held.name.replace("_00", "_01"))
    leak = [replace(s, scene=again.name, id=f"leak {s.id}") for s in world.samples["scanqa"]]
    folder, rows = world.root / "train files", official.questions(train, "scanqa")
    official.write(folder, "scanqa", "train", [*rows, *leak])
    official.write(folder, "scanrefer", "train", official.questions(train, "scanrefer"))
    (folder / "scannetv2_val.txt").write_text(held.name)
    boxes = json.dumps({s.name: [o.box.tolist() for o in s.objects[:4]] for s in train})
    (folder / "proposals.json").write_text(boxes)
    sources = {
        "ScanQA": Source("scanqa", 25_563),
        "ids": Source("scanrefer", 9, "id", fit=0.75, most=2),
        "words": Source("scanrefer", 9),
    }
    listed, report = evaluate.mixture(sources, folder, folder, [*train, again], [], seed=1)
    assert set(listed) <= {s.name for s in train}
    kept = list(itertools.chain(*listed.values()))
    scanqa, ids = ([s for s in kept if s.id.startswith(name)] for name in ("ScanQA/", "ids/"))
    assert len(scanqa) == sum(len(set(s.answers or [s.answer])) for s in rows)
    assert scanqa[0].question.endswith("word or phrase.")
    assert len(ids) == 2 and all(s.targets[0] <= 4 for s in ids)
    assert f"{len(leak)} of rooms for evaluation" in report[0]
    assert "without an object that fits" in report[1] and "of another form" in report[2]


def test_a_folder_that_cannot_be_trained_on_is_refused(world, tmp_path):
    sources = {"ScanQA": Source("scanqa", 1)}
    with refused("nothing says which rooms are for evaluation"):
        evaluate.mixture(sources, tmp_path, tmp_path, world.scenes["train"], [])
    listed, report = evaluate.mixture(sources, tmp_path, tmp_path, [], world.scenes["val"])
    assert not listed and "ScanQA: 0 questions kept of 0" in report[0]


def test_chat_scene_cleans_the_references_of_sqa3d_but_not_of_scanqa():
    """Its two scripts differ there."""
    sample = data.Sample("0", "s", "qa", "q", "the Table", ["the Table"])
    scores = [BENCHMARKS[name].score("table.", sample, None) for name in ("sqa3d", "scanqa")]
    assert [found["em/chat-scene"] for found in scores] == [1, 0]


def test_scenes_kept_by_the_cache_command_answer_official_questions(tmp_path):
    """A video has no scan's folder: what was kept of it is known by its name without endings."""
    rooms = [
        replace(data.room(seed, views=1, size=32, points=2000), name=f"scene000{seed}_00") for seed in (0, 1)
    ]
    for room in rooms:
        data.save_scene(room, tmp_path / f"{room.name}.mp4.npz")
    samples = official.questions(rooms, "vsibench", 1)
    path = official.write(tmp_path, "vsibench", "test", samples)
    questions = evaluate.load("vsibench", path, tmp_path, partial=True, max_frames=32)
    assert questions.scenes.keys() == {room.name for room in rooms}
    assert len(questions.samples) == len(samples) > 0
