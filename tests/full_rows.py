"""Generation without a shared prefix: a left-padded row per question, each with the whole scene, answered by the
library's own `generate`. What the models do is compared and timed against it."""

from __future__ import annotations

import torch

import data


def unpack(batch: dict, text) -> dict:
    """One row per question of a packed batch, ending where its answer would begin: ids [Q, T], positions [Q, T],
    attention [Q, T] bool, scene [Q] (which scene of the batch each row belongs to)."""
    rows, owners = [], []
    for s in range(len(batch["ids"])):
        ids, block, labels = (batch[k][s].tolist() for k in ("ids", "block", "labels"))
        shared = [i for i, b in zip(ids, block, strict=True) if b == 0]
        for q in range(1, len(batch["samples"][s]) + 1):
            own = [(i, target) for i, b, target in zip(ids, block, labels, strict=True) if b == q]
            first = next(t for t, (_, target) in enumerate(own) if target != data.IGNORE)  # predicts the first token
            rows.append(shared + [i for i, _ in own[: first + 1]])
            owners.append(s)
    T = max(len(r) for r in rows)
    ids = torch.tensor([[text.pad] * (T - len(r)) + r for r in rows])
    attention = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows]).bool()
    return {"ids": ids, "attention": attention, "positions": (attention.long().cumsum(1) - 1).clamp(min=0),
            "scene": torch.tensor(owners)}  # fmt: skip


@torch.no_grad()
def answer(model, batch: dict, limit: int, **settings):
    """The texts that `model.generate` should give, for any of the three papers. With settings of the library's
    `generate`, what that returns."""
    rows, seen = unpack(batch, model.text), model.encode(batch["scenes"])
    ids, scene = rows["ids"], rows["scene"]
    if isinstance(seen, dict):  # Fase3D
        tokens, valid, more = seen["tokens"], seen["valid"], [model.prompt_tokens(batch, seen)]
    else:
        (tokens, valid), more = seen, []
    inputs = {"inputs_embeds": model.embed(ids, tokens[scene], valid[scene], *more)}
    if hasattr(model.llm.model, "language_model"):  # Qwen2.5-VL keeps positions from call to call
        model.llm.model.rope_deltas = None
        inputs["position_ids"] = rows["positions"].expand(3, -1, -1)
    common = dict(max_new_tokens=limit, do_sample=False, repetition_penalty=1.0, pad_token_id=model.text.pad,
                  eos_token_id=model.text.eos)  # fmt: skip
    with model.router.routed(ids < 0) if hasattr(model, "router") else torch.no_grad():
        out = model.llm.generate(attention_mask=rows["attention"].long(), **inputs, **common, **settings)
    return out if settings else [model.text.decode(row) for row in out.tolist()]


def vary(decoder: torch.nn.Module) -> None:
    """Weights for a tiny model that nobody trained: its own repeat the last word, these give answers that differ."""
    g = torch.Generator().manual_seed(3)
    for p in decoder.parameters():
        if p.dim() == 2:
            p.data = torch.randn(p.shape, generator=g) * 2 * p.shape[1] ** -0.5


def compare(model, groups: list, limit: int = 6) -> None:
    """What `generate` promises, for groups of scenes of which the first is asked ten questions."""
    (scene, ten), *others = groups
    assert len(ten) == 10 and len({model.scene_length(s) for s, _ in groups}) == len(groups)
    ask = lambda groups, kept=None: model.generate(model.batch(groups), limit, kept)  # noqa: E731
    alone = lambda groups, ask: [ask([(s, [q])])[0] for s, samples in groups for q in samples]  # noqa: E731
    expected = alone(groups, lambda group: answer(model, model.batch(group), limit))
    assert len(set(expected)) > len(expected) / 2
    assert ask(groups) == expected
    assert alone(groups, ask) == expected

    kept, encoded, read_tokens, encode, read = {}, [], [], model.encode, model.read
    model.encode = lambda scenes: encoded.extend(scenes) or encode(scenes)
    model.read = lambda ids, *rest, **more: read_tokens.append(ids == data.SCENE) or read(ids, *rest, **more)
    assert ask([(scene, ten[:1])], kept) == expected[:1]
    _, seen, states = kept[id(scene)]
    before = [x.clone() for x in (*seen.values(), *states)]
    assert ask(groups, kept) == expected
    assert ask([(scene, ten)], kept) == expected[:10]
    assert alone([*others, (scene, ten)], lambda group: ask(group, kept)) == expected[10:] + expected[:10]
    assert [id(s) for s in encoded] == [id(s) for s, _ in groups], "each scene once"
    assert sum(int(x.sum()) for x in read_tokens) == sum(model.scene_length(s) for s, _ in groups)
    assert all(torch.equal(x, y) for x, y in zip(before, (*seen.values(), *states), strict=True))
