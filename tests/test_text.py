"""Tokenizers and batches: what is written is read back, and what is packed stays apart."""

import numpy as np
import pytest
import torch
from papers import refused, save_tokenizer

from data import (
    BINS,
    IGNORE,
    NUMBERS,
    PROMPT,
    SCENE,
    HubText,
    Sample,
    Scene,
    TinyText,
    collate,
    load_text,
    tuples,
    vocabulary,
    write_whole,
)


@pytest.fixture(scope="module")
def text():
    return TinyText(vocabulary())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return HubText(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


# ---- the tiny tokenizer ----------------------------------------------------------------------------------------------


def test_one_token_per_word_identifier_number_and_mark(text):
    """Small models copy single tokens; what falls into several must be put together again."""
    ids = text.encode("Is <OBJ012> 2.5 meters from [1.25, -0.80, 0.45], or x-3.0? 17.")
    pieces = " ".join(text.pieces[i] for i in ids)
    assert pieces == "is <obj012> l#40 meters from x#148 y#115 z#23 , or x#80 ? 17 ."


@pytest.mark.parametrize("axis", NUMBERS)
def test_a_number_is_read_back_within_half_a_bin_and_clipped_to_its_axis(text, axis):
    """Rounded to the nearest 1/16 m; what lies outside becomes the end of its range, not <unk>."""
    low, high = NUMBERS[axis]
    for value in (*np.linspace(low, high, 101), high + 0.7):
        (token,) = text.encode(f"{axis}{value:.3f}".removeprefix("l"))
        name, back = text.number[token]
        assert name == axis and abs(back - min(value, high)) <= 0.5 / BINS + 5e-4


def test_what_is_read_back_is_what_was_written(text):
    """Identifiers in the capitals that scoring looks for; numbers of a calculation name their axes: "x1.25" is not a
    point."""
    identifiers = " ".join(f"<OBJ{i:03d}>" for i in range(100))
    assert len(text.encode(identifiers)) == 100
    for written in (
        identifiers,
        "x1.25 y-0.50 = x1.75, 2.50 meters",
        "[1.00, 2.00, 0.50] [0.00, 1.00, 0.50]",
        "[-2.00, 0.25, 1.00, 2.00, 0.50, 0.75]",
    ):
        assert text.decode(text.encode(written)) == written


def test_reading_ends_at_eos_and_skips_padding(text):
    """A batch of answers is padded on the right after <eos>, sometimes with anything."""
    words = text.encode("the red chair.")
    assert text.decode([text.pad, *words, text.eos, *words]) == "the red chair."
    assert text.decode(torch.tensor(words)) == "the red chair."
    assert text.decode([]) == text.decode([text.eos]) == ""


def test_unknown_words_are_unk_and_are_listed(text):
    """So that a data set with other words says so; a vocabulary may hold the words of more texts."""
    assert text.encode("zebra") == text.encode("301") == [text.unk] != text.encode("300")
    assert text.unknown("the Zebra on 3 chairs.") == ["zebra"]
    own = TinyText(vocabulary(more=["A Zebra's stripes", "near <OBJ003> at [0.10, 0.20, 0.30]"]))
    assert own.unknown("zebra's stripes NEAR a at otter") == ["otter"]


def test_a_vocabulary_has_no_piece_twice_and_survives_its_state(text):
    """A checkpoint stores the state; the same words must get the same tokens, whatever their order."""
    assert len(text) == len(set(text.pieces))
    for other in (load_text(text.state()), TinyText(reversed(text.state()["words"]))):
        assert other.pieces == text.pieces


def test_tuples_are_lists_of_finite_numbers_of_the_wanted_length():
    """A model's answer may hold anything; nothing else is a place."""
    found = tuples("[1, 2, 3] [1 2] [a, b, c] [1; -2; .5] [1, 2, inf]", 3)
    assert [None if f is None else f.tolist() for f in found] == [[1, 2, 3], None, [1, -2, 0.5], None]


# ---- a loaded tokenizer ----------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    """A name with a typing error, or no network: the libraries say it in pages."""
    with refused(r"nothing: not a whole pre-trained model: give its folder[^\n]*$"):
        HubText(str(tmp_path / "nothing"))


def test_numbers_stay_text_for_a_loaded_tokenizer(hub):
    """A pre-trained model knows digits; nothing may be rounded to 1/16 m."""
    written = "<OBJ012> at [1.23, -0.80, 0.45], 2.5 m."
    assert hub.decode([*hub.encode(written), hub.eos]) == written and hub.unknown("zebra") == []
    again = load_text(hub.state())
    assert again.encode(written) == hub.encode(written) and len(again) == len(hub)


def test_a_model_without_chat_vision_tokens_or_padding_still_gets_a_prompt(tmp_path):
    """Plain language models: the literature's "### human" form, and <eos> in the place of padding."""
    plain = HubText(save_tokenizer(tmp_path, chat=None, special=(), pad=None))
    assert plain.template == ("### human: ", "\n", " ### assistant: ")
    assert plain.pad == plain.eos


def test_a_prompt_begins_as_the_tokenizer_itself_begins_a_text(tmp_path):
    """Llama was never trained on a text without <s>; Vicuna answers behind its own words."""
    folder = tmp_path / "vicuna-7b"
    vicuna = HubText(save_tokenizer(folder, chat=None, special=(), start="<s>"))
    assert vicuna.template == ("<s>USER: ", "\n", " ASSISTANT: ")
    own = vicuna.tokenizer("USER: chair ASSISTANT: ").input_ids
    before, _, after = map(vicuna.encode, vicuna.template)
    assert [*before, *vicuna.encode("chair"), *after] == own


# ---- batches ---------------------------------------------------------------------------------------------------------


def question(text, answer, **more):
    return Sample("", "", "task", text, answer, **more)


@pytest.fixture(scope="module")
def groups():
    a, b = Scene("a", "rooms", []), Scene("b", "rooms", [])
    where = question("where is <OBJ050>?", "[1.00, 2.00, 0.50]", prompt=np.ones(3))
    what = question("what is <OBJ099>?", "a table.", prompt=np.arange(6.0))
    many = question("how many chairs are there?", "2", reasoning="<OBJ099> 2 =")
    return [
        (a, [question("find the red chair.", "<OBJ007>"), where]),
        (b, [many, what, question("is there a bed?", "no")]),
        (a, []),
    ]


def spell(text, ids):
    """Ids as readable pieces."""
    special = {SCENE: "S", PROMPT: "P"}
    return " ".join(special.get(i) or text.pieces[i] for i in ids.tolist() if i != text.pad)


def test_a_row_is_the_scene_once_and_then_every_question_with_its_answer(text, groups):
    """A question's own click or box gets a placeholder in front; reasoning is written where asked for."""
    batch = collate(groups, text, [3, 2, 1])
    assert [spell(text, row) for row in batch["ids"]] == [
        "S S S find the red chair . <obj007> P where is <obj050> ? x#144 y#160 z#24",
        "S S how many chairs are there ? 2 P what is <obj099> ? a table . is there a bed ? no",
        "S",
    ]
    assert batch["prompts"].tolist() == [[1, 1, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert [s.name for s in batch["scenes"]] == ["a", "b", "a"]
    assert [len(s) for s in batch["samples"]] == [2, 3, 0]
    steps = collate(groups[1:2], text, [2], reasoning=True)["ids"][0]
    assert spell(text, steps).startswith("S S how many chairs are there ? <obj099> 2 = 2 P")


def test_the_models_own_chat_surrounds_scene_and_question(hub, groups):
    """Shared: all up to the scene's end, tokens where an image would stand. Own: the question and the turn to the
    assistant, none of it scored."""
    before, between, after = hub.template
    assert before == "<|im_start|>user\n<|vision_start|>" and between == "<|vision_end|>\n"
    assert after == "<|im_end|>\n<|im_start|>assistant\n"
    batch = collate(groups[:1], hub, [3])
    ids, block, labels = (batch[k][0] for k in ("ids", "block", "labels"))
    shared = [*hub.encode(before), SCENE, SCENE, SCENE, *hub.encode(between)]
    assert ids[block == 0].tolist() == shared
    # the answer is predicted from the template's last token on
    scored = (block == 1) & (labels != IGNORE)
    asked = hub.encode("find the red chair." + after)
    assert ids[(block == 1) & ~scored].tolist() == asked[:-1]
    assert hub.decode(labels[scored].tolist()) == "<OBJ007>"


def test_a_file_is_whole_or_absent(tmp_path):
    """Ranks share a cache folder: half a file under the final name would be read by another."""
    old, new = tmp_path / "folder/old", tmp_path / "folder/new"
    write_whole(old, lambda file: file.write(b"whole"))
    for path in (old, new):
        with pytest.raises(ZeroDivisionError):
            write_whole(path, lambda file: file.write(b"half") / 0)
    assert old.read_bytes() == b"whole" and not new.exists()
