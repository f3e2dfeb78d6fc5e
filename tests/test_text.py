"""Tokenizers and batches (data.py, parts 8 and 9): what is written is read back, and what is packed stays apart."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from data import (
    BINS,
    IGNORE,
    NUMBERS,
    PROMPT,
    SCENE,
    DataError,
    HubText,
    Sample,
    Scene,
    TinyText,
    answer,
    collate,
    load_text,
    packed_mask,
    read_scenes,
    substitute,
    vocabulary,
    write_npz,
)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder, chat=CHAT, special=("<|vision_start|>", "<|vision_end|>"), pad="<|endoftext|>"):
    """A byte-level tokenizer without merges, in the form in which pre-trained models bring theirs: a token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    chosen = {"pad_token": pad} if pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", **chosen,
                                        additional_special_tokens=["<|im_start|>", *special])  # fmt: skip
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text():
    return TinyText(vocabulary())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return HubText(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    """A name with a typing error, or no network: the libraries say it in pages."""
    with pytest.raises(DataError, match=r"nothing: no pre-trained model there .*; give its folder[^\n]*$"):
        HubText(str(tmp_path / "nothing"))


# ---- the tiny tokenizer ----------------------------------------------------------------------------------------------


def test_one_token_per_word_identifier_number_and_mark(text):
    """Small models copy single tokens; what falls into several must be put together again."""
    pieces = [text.pieces[i] for i in text.encode("Is <OBJ012> 2.5 metres from [1.25, -0.80, 0.45], or x-3.0? 17.")]
    assert " ".join(pieces) == "is <obj012> l#40 metres from x#148 y#115 z#23 , or x#80 ? 17 ."


@pytest.mark.parametrize("axis", NUMBERS)
def test_a_number_is_read_back_within_half_a_bin_and_clipped_to_its_axis(text, axis):
    """Rounded to the nearest 1/16 m; what lies outside becomes the end of its range, not <unk>."""
    lo, hi = NUMBERS[axis]
    for value in [*np.linspace(lo, hi, 101), lo - 0.7, hi + 0.7]:
        if axis == "l" and value < 0:
            continue
        written = f"{value:.3f}" if axis == "l" else f"{axis}{value:.3f}"
        (token,) = text.encode(written)
        assert text.number[token][0] == axis
        assert abs(text.number[token][1] - min(max(value, lo), hi)) <= 0.5 / BINS + 5e-4


@pytest.mark.parametrize("numbers", [(1.25, -0.81, 0.44), (-7.94, 8.0, -1.0), (0.5, 0.0, 1.0, 2.0, 0.25, 3.75)])
def test_points_and_boxes_survive(text, numbers):
    """Three numbers are x y z, six are x y z w d h: one token each, and brackets again when read."""
    tokens = text.encode("[" + ", ".join(f"{n:.2f}" for n in numbers) + "]")
    assert "".join(text.number[t][0] for t in tokens) == "xyzwdh"[: len(numbers)]
    back = text.decode(tokens)
    assert back[0] == "[" and back[-1] == "]"
    assert np.allclose([float(n) for n in back[1:-1].split(",")], numbers, atol=0.5 / BINS + 0.005)


def test_numbers_of_single_axes_and_lengths_come_back_without_brackets(text):
    """Steps of a calculation name their axes: "x1.25" is not a point."""
    written = "x1.25 y-0.50 = x1.75, 2.50 metres"
    assert text.decode(text.encode(written)) == written
    assert text.decode(text.encode("[1.00, 2.00, 0.50] [0.00, 1.00, 0.50]")) == "[1.00, 2.00, 0.50] [0.00, 1.00, 0.50]"


def test_all_identifiers_are_single_tokens_that_come_back(text):
    """In the capitals that scoring looks for."""
    for i in range(100):
        tokens = text.encode(f"<OBJ{i:03d}>")
        assert len(tokens) == 1 and text.decode(tokens) == f"<OBJ{i:03d}>"


def test_reading_ends_at_eos_and_skips_padding(text):
    """A batch of answers is padded on the right after <eos>, sometimes with anything."""
    words = text.encode("the red chair.")
    assert text.decode([text.pad, *words, text.eos, *words]) == "the red chair."
    assert text.decode(torch.tensor(words)) == "the red chair." and text.decode([]) == text.decode([text.eos]) == ""


def test_unknown_words_are_unk_and_are_listed(text):
    """So that a data set with other words says so instead of training on <unk>."""
    assert text.encode("zebra") == [text.unk] and text.unknown("the Zebra on 3 chairs.") == ["zebra"]
    assert text.encode("301") == [text.unk] and text.encode("300") != [text.unk]


def test_a_trained_vocabulary_holds_the_words_of_its_texts(text):
    """Numbers, identifiers and marks are always there; capitals do not matter."""
    own = TinyText.train(["A Zebra's stripes", "near <OBJ003> at [0.10, 0.20, 0.30]"])
    assert own.unknown("zebra's stripes NEAR a at") == [] and own.unk not in own.encode("zebra's <obj003> 0.25")
    assert own.unknown("chair") == ["chair"]


def test_a_vocabulary_has_no_piece_twice_and_survives_its_state(text):
    """A checkpoint stores the state; the same words must get the same tokens, whatever their order."""
    assert len(text) == len(set(text.pieces)) == len(text.index)
    for other in (load_text(text.state()), TinyText(reversed(text.state()["words"]))):
        assert other.pieces == text.pieces
    assert [text.pieces[i] for i in (text.pad, text.eos, text.unk)] == ["<pad>", "<eos>", "<unk>"]


# ---- a loaded tokenizer ----------------------------------------------------------------------------------------------


def test_numbers_stay_text_for_a_loaded_tokenizer(hub):
    """A pre-trained model knows digits; nothing may be rounded to 1/16 m."""
    written = "<OBJ012> at [1.23, -0.80, 0.45], 2.5 m."
    assert hub.decode([*hub.encode(written), hub.eos]) == written and hub.unknown("zebra") == []
    again = load_text(hub.state())
    assert again.encode(written) == hub.encode(written) and len(again) == len(hub)


def test_scene_and_question_go_into_the_models_own_chat(hub):
    """Scene tokens where an image would stand, the question behind them, then the assistant's turn."""
    assert hub.template == (
        "<|im_start|>user\n<|vision_start|>",
        "<|vision_end|>\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    assert [len(hub.encode(t)) for t in ("<|im_start|>", "<|vision_start|>", "<|im_end|>")] == [1, 1, 1]


def test_a_model_without_chat_vision_tokens_or_padding_still_gets_a_prompt(tmp_path):
    """Plain language models: the literature's "### human" form, and <eos> in the place of padding."""
    plain = HubText(save_tokenizer(tmp_path, chat=None, special=(), pad=None))
    assert plain.template == ("### human: ", "\n", " ### assistant: ")
    assert plain.pad == plain.eos


# ---- batches ---------------------------------------------------------------------------------------------------------


def refer(scene, i):
    return f"<OBJ{scene.identifiers[i]:03d}>"


@pytest.fixture(scope="module")
def groups():
    a = Scene("a", "rooms", [], identifiers={1: 7, 2: 50})
    b = Scene("b", "rooms", [], identifiers={1: 99})
    ask = lambda *given, **more: Sample("", "", "ground", *given, **more)  # noqa: E731
    return [
        (a, [ask("find the red chair.", "<obj 1>"), ask("where is <obj 2>?", "[1.00, 2.00, 0.50]", prompt=np.ones(3))]),
        (b, [ask("how many chairs are there?", "2", steps="<obj 1> 2 ="), ask("what is <obj 1>?", "a table.",
             prompt=np.arange(6.0)), ask("is there a bed?", "no")]),
        (a, []),
    ]  # fmt: skip


def spell(text, ids):
    """Ids as a list of readable pieces."""
    special = {SCENE: "S", PROMPT: "P"}
    return " ".join(special.get(i) or text.pieces[i] for i in ids if i != text.pad)


def test_a_row_is_the_scene_once_and_then_every_question_with_its_answer(text, groups):
    """Marks become identifiers, a question's own click or box gets a placeholder in front."""
    batch = collate(groups, text, [3, 2, 1], refer)
    assert [spell(text, row) for row in batch["ids"].tolist()] == [
        "S S S find the red chair . <obj007> P where is <obj050> ? x#144 y#160 z#24",
        "S S how many chairs are there ? 2 P what is <obj099> ? a table . is there a bed ? no",
        "S",
    ]
    assert batch["prompts"].tolist() == [[1, 1, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert [s.name for s in batch["scenes"]] == ["a", "b", "a"] and [len(s) for s in batch["samples"]] == [2, 3, 0]
    assert spell(text, collate(groups[1:2], text, [2], refer, steps=True)["ids"][0].tolist()).startswith(
        "S S how many chairs are there ? <obj099> 2 = 2 P"
    )


def test_labels_are_the_answers_and_their_eos_and_nothing_else(text, groups):
    """label[t] is what position t must predict: the next token, up to <eos>, which is itself no input."""
    batch = collate(groups, text, [3, 2, 1], refer)
    for row, (scene, samples) in enumerate(groups):
        labels, block, ids = (batch[k][row].tolist() for k in ("labels", "block", "ids"))
        for q, sample in enumerate(samples, start=1):
            answer = [*text.encode(substitute(sample.answer, lambda i, s=scene: refer(s, i))), text.eos]
            places = [t for t, b in enumerate(block) if b == q]
            told = [t for t in places if labels[t] != IGNORE]
            assert [labels[t] for t in told] == answer and told == places[-len(answer) :]
            assert [ids[t + 1] for t in told[:-1]] == answer[:-1]
        assert all(label == IGNORE for label, b in zip(labels, block, strict=True) if b <= 0)


def test_positions_of_every_question_start_behind_the_scene(text, groups):
    """As if it were asked alone: a later question must not look farther from the scene than the first."""
    batch = collate(groups, text, [3, 2, 1], refer)
    for row, shared in enumerate([3, 2, 1]):
        positions, block = batch["positions"][row], batch["block"][row]
        assert positions[block == 0].tolist() == list(range(shared))
        for q in range(1, int(block.max()) + 1):
            assert positions[block == q].tolist() == list(range(shared, shared + int((block == q).sum())))
        assert (batch["ids"][row][block == -1] == text.pad).all() and (block[batch["ids"][row] == SCENE] == 0).all()


def test_the_chat_template_surrounds_scene_and_question(hub, groups):
    """Shared: all up to the scene's end. Own: the question and the turn to the assistant, none of it scored."""
    batch = collate(groups[:1], hub, [3], refer)
    ids, block, labels = (batch[k][0] for k in ("ids", "block", "labels"))
    shared, first = ids[block == 0].tolist(), ids[(block == 1) & (labels == IGNORE)].tolist()
    n = len(hub.encode(hub.template[0]))
    assert shared == [*hub.encode(hub.template[0]), SCENE, SCENE, SCENE, *hub.encode(hub.template[1])]
    # the answer is predicted from the template's last token on
    assert first == hub.encode("find the red chair." + hub.template[2])[:-1] and shared.index(SCENE) == n
    assert hub.decode(labels[(block == 1) & (labels != IGNORE)].tolist()) == "<OBJ007>"


def test_the_packed_mask_equals_a_loop_over_pairs(text, groups):
    """A question sees the scene and its own past, the scene sees its past, padding sees itself (else its row of the
    softmax is 0 / 0)."""
    block = collate(groups, text, [3, 2, 1], refer)["block"]
    mask = packed_mask(block)
    S, T = block.shape
    assert mask.shape == (S, 1, T, T) and mask.dtype == torch.bool
    for s, t, u in itertools.product(range(S), range(T), range(T)):
        a, b = int(block[s, t]), int(block[s, u])
        assert bool(mask[s, 0, t, u]) == (t == u or (u < t and b >= 0 and (b in (0, a)) and not (a == 0 != b)))


def test_the_mask_of_the_last_positions_is_the_end_of_the_whole(text, groups):
    """What is new sees what is cached as it would have seen it in one pass."""
    block = collate(groups, text, [3, 2, 1], refer)["block"]
    for new in (0, 1, 5, block.shape[1]):
        assert torch.equal(packed_mask(block, new), packed_mask(block)[:, :, block.shape[1] - new :])


class Countdown:
    """A language model that counts down: behind the identifier 5 it writes 4, 3, 2, <eos>; and that checks what a
    decoder would rely on. Its keys are the ids, so that the cache tells what was read."""

    def __init__(self, text, prefixes):
        self.text, self.prefixes, self.encoded, self.widths = text, prefixes, [], []

    def encode(self, scenes):
        self.encoded += [s.name for s in scenes]
        lengths = torch.tensor([self.prefixes[s.name] for s in scenes])
        valid = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"tokens": lengths[:, None, None] * valid[..., None], "valid": valid}

    def read(self, ids, positions, mask, tokens, valid, cache):
        S, N = ids.shape
        self.widths.append(N)
        keys, places = cache.update(ids[:, None, :, None], positions[:, None, :, None], 0)
        assert mask.shape == (S, 1, N, keys.shape[2])
        for s, n in itertools.product(range(S), range(N)):
            (order,) = mask[s, 0, n].nonzero(as_tuple=True)  # what this position sees, in the order it was read
            if ids[s, n] != self.text.pad:
                assert places[s, 0, order, 0].tolist() == list(range(len(order))), "a gap, or another's words"
                assert (keys[s, 0, order, 0] == SCENE).sum() <= valid[s].sum() == tokens[s].amax()
        return ids[..., None]

    def head(self, hidden):
        down = hidden[:, 0] - 1
        end = self.text.index["<obj002>"]
        return torch.nn.functional.one_hot(torch.where(down < end, self.text.eos, down), len(self.text))


def test_questions_of_unequal_answers_share_a_row(text):
    """Each starts behind its scene, ends for itself, and then takes no room; answers come in the batch's order."""
    name = lambda i: f"<obj{i:03d}>"  # noqa: E731
    counts = [[5], [3, 9, 2], [], [7, 4]]
    scenes = [Scene(f"s{i}", "rooms", []) for i in range(4)]
    groups = [(s, [Sample("", s.name, "id", "how about " + name(i), "no") for i in c])
              for s, c in zip(scenes, counts, strict=True)]  # fmt: skip
    lengths = [4, 6, 3, 1]
    model = Countdown(text, dict(zip(("s0", "s1", "s2", "s3"), lengths, strict=True)))
    batch = collate(groups, text, lengths, refer)
    expected = [[name(j) for j in range(i - 1, 1, -1)] for c in counts for i in c]
    seen, past = read_scenes(batch, model.encode, model.read)
    assert seen["valid"].sum(1).tolist() == lengths and (past[1] == 0).sum(1).tolist() == lengths
    said = answer(batch, text, past, partial(model.read, **seen), model.head, 20)
    assert [s.lower().split() for s in said] == expected
    assert model.widths == [6, 9, 2, 2, 1, 1, 1, 1, 1], "prefix, questions, then a token of each that goes on"
    for limit in (0, 1, 3):
        past = read_scenes(batch, model.encode, model.read)[1]
        said = answer(batch, text, past, partial(model.read, **seen), model.head, limit)
        assert [s.lower().split() for s in said] == [row[:limit] for row in expected]


def test_a_scene_is_kept_by_the_object_and_never_written_to(text):
    """A second scene of the same name is another one; what is kept of the first does not grow with its answers."""
    first, second = (Scene("s", "rooms", []) for _ in range(2))
    ask = lambda scene: collate([(scene, [Sample("", "s", "id", "how about <obj006>", "no")])], text, [3], refer)  # noqa: E731
    model, kept = Countdown(text, {"s": 3}), {}
    for scene, times in ((first, 1), (first, 1), (second, 2), (first, 2)):
        seen, past = read_scenes(ask(scene), model.encode, model.read, kept)
        assert answer(ask(scene), text, past, partial(model.read, **seen), model.head, 9)[0].count("<OBJ") == 4
        assert len(model.encoded) == times == len(kept)
        assert [len(x) for x in kept[id(first)][2]] == [3, 3]


def test_what_is_read_before_an_answer_ends_with_the_turn_of_the_chat(hub, groups):
    """The prefix ends with the scene, the question with the template; nothing of the answer is read."""
    model, read = Countdown(hub, dict(a=3, b=2)), []
    model.head = lambda hidden: read.append(hidden) or torch.nn.functional.one_hot(torch.tensor([hub.eos]), len(hub))
    for scene, samples in groups[:2]:
        for sample in samples:
            batch = collate([(scene, [sample])], hub, [model.prefixes[scene.name]], refer)
            seen, (cache, block) = read_scenes(batch, model.encode, model.read)
            answer(batch, hub, (cache, block), partial(model.read, **seen), model.head, 1)
            alone = batch["ids"][0, : int((batch["labels"][0] != IGNORE).nonzero()[0]) + 1].tolist()
            assert cache.layers[0].keys.flatten().tolist() == alone and block.shape[1] == (batch["block"] == 0).sum()
            assert alone[-len(hub.encode(hub.template[2])) :] == hub.encode(hub.template[2])
    assert len(read) == 5


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    """Ranks share a cache folder: half a file under the final name would be read by another."""
    write_npz(tmp_path / "new" / "a.npz", x=np.arange(3))
    assert np.load(tmp_path / "new" / "a.npz")["x"].tolist() == [0, 1, 2]

    def breaks(file, **arrays):
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(np, "savez", breaks)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="no space"):
            write_npz(tmp_path / "new" / f"{name}.npz", x=np.zeros(1))
    assert np.load(tmp_path / "new" / "a.npz")["x"].tolist() == [0, 1, 2] and not (tmp_path / "new" / "b.npz").exists()


def test_a_single_question_without_padding_needs_no_companions(text):
    """The smallest batch: one scene of one token, one question, one word."""
    question = Sample("", "s", "exist", "is there a bed?", "no")
    batch = collate([(Scene("s", "rooms", []), [question])], text, [1], refer)
    assert batch["prompts"].shape == (0, 6) and (batch["block"] >= 0).all()
    assert batch["ids"].shape == batch["labels"].shape == batch["positions"].shape == (1, 7)
