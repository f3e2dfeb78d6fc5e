"""Small models of the three papers, from nothing and as loaded from disk, for the tests that hold for all of them."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for programs that import this first
import data

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PAPERS = ("proxy3d", "fase3d", "spatial3dllm")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

# a paper's own sizes, for either kind of model
SIZES = {
    "proxy3d": dict(budget=24, grid=(6, 6), frames=3),
    "fase3d": dict(points=608, dim=24, hidden=20, heads=4, window=16, tokens=14, prompt_neighbors=5, rank=4, alpha=4,
                   filter_heads=8, adapted_layers=2, no_color=0.0),
    "spatial3dllm": dict(feature=16, points=300, centers=(64, 32, 16, 8), samples=(8, 8, 8, 8), referents=12, fourier=8,
                         context_heads=2, ball=3.0),
}  # fmt: skip

# the language model's sizes where it is made from nothing
FROM_NOTHING = {
    "proxy3d": dict(reader=(32, 2, 4, 64), vision_width=16, vision_layers=1),
    "fase3d": dict(reader=(32, 3, 2, 48)),
    "spatial3dllm": dict(reader=(32, 2, 4, 64)),
}
LOADED = {"proxy3d": dict(symbol=16), "fase3d": dict(dtype="float32"), "spatial3dllm": dict(lora_rank=4)}


def rows(path):
    """Read a file with an object of JSON per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_tokenizer(
    folder, chat=CHAT, special=("<|vision_start|>", "<|vision_end|>"), pad="<|endoftext|>", start=""
):
    """A byte-level tokenizer without merges, in the form in which pre-trained models bring theirs: a token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    chosen = {"pad_token": pad} if pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", **chosen,
                                        additional_special_tokens=["<|im_start|>", *special])  # fmt: skip
    tokenizer.chat_template = chat
    if start:
        tokenizer.add_special_tokens({"bos_token": start})
        pair = (start, tokenizer.bos_token_id)
        front = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[pair])
        tokenizer.backend_tokenizer.post_processor = front
    tokenizer.save_pretrained(folder)
    return str(folder)


def paper_of(name):
    """Import a paper and register its question types."""
    paper = importlib.import_module(name)
    data.adopt(paper)
    return paper


def stages_of(name, kind="tiny"):
    """Give the stages of a preset: of "tiny" from nothing, of "loaded" the paper's."""
    paper = paper_of(name)
    preset = "tiny" if kind == "tiny" else "paper"
    config = getattr(paper.Config, preset)()
    return paper.recipe(config, paper.STAGES[preset])


def make(name, folder=None, stage=None, **changes):
    """Build a small model from nothing, or around the language model in a folder; at its last stage or another."""
    paper = paper_of(name)
    torch.manual_seed(0)
    if folder is None:
        config = paper.Config.tiny(**{**SIZES[name], **FROM_NOTHING[name], **changes})
        model = paper.build(config, data.TinyText(data.vocabulary()))
        vary(model.llm)
    else:
        config = paper.Config(llm=str(folder), **{**SIZES[name], **LOADED[name], **changes})
        model = paper.build(config, data.HubText(str(folder)))
    model.configure_stage(stage or stages_of(name, "tiny" if folder is None else "loaded")[-1])
    return model


def vary(llm):
    """Draw a decoder's matrices anew: a tiny model that nobody trained repeats one word, this one's answers differ."""
    generator = torch.Generator().manual_seed(3)
    for name, p in llm.get_decoder().named_parameters():
        if p.dim() == 2 and "embed" not in name and "lora" not in name:
            p.data = torch.randn(p.shape, generator=generator) * 2 * p.shape[1] ** -0.5


@torch.no_grad()
def wake(model):
    """Move adapters and filters as training does: they start at B = 0 and at the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora." in name and name.endswith(".1.weight"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        if name.endswith(".gain"):
            p.copy_(1 + torch.randn(p.shape, generator=generator))
    return model


def plain_weights(module):
    """Give the weights that a language model has without adapters and filters, under the names they have then."""
    found = {}
    for name, tensor in module.state_dict().items():
        if "lora" not in name and not name.endswith(".gain"):
            name = name.replace(".base_layer.", ".").replace(".base.", ".")
            found[name.replace(".mlp.1.", ".mlp.")] = tensor
    return found


def qwen_vl(window_size=48, depth=1, **language):
    """A small Qwen2.5-VL whose tower merges patches of 8 pixels; language: its language model's sizes."""
    import transformers as hf

    language = {"num_attention_heads": 4, "num_key_value_heads": 4} | language
    pairs = language["hidden_size"] // language["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2, 1, 1]}
    vision = dict(depth=depth, hidden_size=16, intermediate_size=32, num_heads=4, patch_size=4, spatial_merge_size=2,
                  out_hidden_size=language["hidden_size"], temporal_patch_size=2, window_size=window_size,
                  fullatt_block_indexes=[depth - 1])  # fmt: skip
    config = hf.Qwen2_5_VLConfig(text_config={**language, "rope_parameters": rope}, vision_config=vision,
                                 image_token_id=0, video_token_id=0, vision_start_token_id=0,
                                 vision_end_token_id=0)  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def save_llm(name, folder):
    """Save a small language model with its tokenizer, as the pre-trained one of that paper lies on disk; or an OPT."""
    import transformers as hf

    size = len(data.HubText(save_tokenizer(folder)))
    same = dict(vocab_size=size, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    if name == "proxy3d":
        llm = qwen_vl(**same)
    elif name == "fase3d":
        llm = hf.Qwen2ForCausalLM(hf.Qwen2Config(tie_word_embeddings=True, **same))
    elif name == "opt":
        sizes = dict(ffn_dim=40, word_embed_proj_dim=32)
        llm = hf.OPTForCausalLM(hf.OPTConfig(**sizes, **same))
    else:
        llm = hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=False, **same))
    vary(llm)
    llm.generation_config.repetition_penalty, llm.generation_config.do_sample = 1.5, True  # as real ones come
    llm.save_pretrained(folder)
    return folder


def rooms():
    """Three rooms with frames and points, of different numbers of objects, mirrored or transposed."""
    rng = np.random.default_rng(0)
    made = [data.room(seed, objects=n, views=4, size=48, points=700) for seed, n in ((0, 9), (1, 12), (4, 7))]
    turned = [data.augment(scene, rng) for scene in made]
    assert len({scene.turn.tobytes() for scene in turned}) > 1
    return turned


def refused(line):
    """Expect an error that says so in one line."""
    import pytest

    return pytest.raises(data.DataError, match=line)


def alike(a, b, atol=1e-5):
    """Whether two tensors are equal but for rounding."""
    return torch.allclose(a, b, atol=atol)


def start_as_reader(model):
    """Let a model start from an untrained language model that reads rooms in words."""
    model.start_from(data.named_weights(data.Reader(model.config, model.text)))


def questions_of(scenes, mix, count=3):
    """Ask `count` questions of a mix about each scene: [(scene, samples)]."""
    rng = np.random.default_rng(0)
    return [(scene, data.questions(scene, mix, count, rng)) for scene in scenes]


@torch.no_grad()
def answer_logits(model, groups):
    """Logits [A, vocabulary] of every answer token in the order of the questions, and what forward returned."""
    seen = []
    hook = model.llm.lm_head.register_forward_hook(lambda module, given, out: seen.append(out))
    out = model(model.batch(groups))
    hook.remove()
    return seen[0].float(), out
