"""Tiny models made from a seed, a byte-level tokenizer, and folders of both: everything the compute tests run on."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Tokens
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from registry.core.recipes import FineTune
from workers.compute.data import Row
from workers.compute.lora import Adapter, Patch, fresh
from workers.compute.model import Model, Tokenizer

BASE = "b3:" + "1" * 64
OTHER_BASE = "b3:" + "2" * 64
DATASET = "sha256:" + "3" * 64
SUITE = "sha256:" + "4" * 64
ADAPTER = "sha256:" + "5" * 64
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> Tokenizer:
    """One token per byte, `<s>` in front of what is tokenised with special tokens, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokens = Tokens(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(specials)
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def llama(seed: int = 0, tied: bool = True, **changes: Any) -> Model:
    """A Llama of about 50 000 parameters."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(sizes | {"tie_word_embeddings": tied} | changes)))
    return model.eval().requires_grad_(False)


def gpt2(seed: int = 0) -> Model:
    """A GPT-2 of about 40 000 parameters: its linear modules are Conv1D, with biases."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def saved(model: Model, folder: Path, **options: Any) -> Path:
    """The model and the tokenizer as a base folder."""
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def recipe(**changes: Any) -> FineTune:
    """A short training."""
    values: dict[str, Any] = {
        "base": BASE, "datasets": (DATASET,), "targets": ("q_proj", "v_proj"), "rank": 4, "alpha": 8.0,
        "learning_rate": 1e-2, "steps": 8, "batch_tokens": 96, "max_length": 64, "precision": "fp32", "seed": 3,
    }  # fmt: skip
    return FineTune(**(values | changes))


def random_adapter(model: Model, seed: int = 0, **changes: Any) -> Adapter:
    """An adapter that changes something: B is random, too."""
    adapter = fresh(model, recipe(**changes))
    chance = torch.Generator().manual_seed(seed)
    patches = {
        name: Patch(patch.a_RI, torch.randn(patch.b_OR.shape, generator=chance) * 0.3, patch.scale)
        for name, patch in adapter.patches.items()
    }
    return Adapter(patches, adapter.config)


def rows(count: int = 24) -> list[Row]:
    """Sums, as prompts and completions."""
    return [Row({"prompt": f"{i}+{i % 7}=", "completion": f" {i + i % 7}"}, "sums.jsonl", i + 1) for i in range(count)]


def choices(count: int = 30) -> list[Row]:
    """Odd or even, with single-token and longer choices in turn."""
    words = [["e", "o"], ["even", "odd!"]]
    return [
        Row({"prompt": f"{i} is ", "choices": words[i % 2], "answer": i // 2 % 2}, "parity.jsonl", i + 1)
        for i in range(count)
    ]


def logits(model: Model, length: int = 12) -> torch.Tensor:
    """The model's logits on two rows of ids from a seed."""
    ids = torch.randint(3, 259, (2, length), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


CUT: dict[str, Any] = {
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "whitespace": [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)],
} | {
    name: [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers +
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    for name, numbers in [("qwen2", r"\p{N}"), ("llama3", r"\p{N}{1,3}")]
}  # fmt: skip
"""Ways to cut text into words, as the tokenizers of these models have them."""


def merging_tokenizer(words: str = "gpt2", ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, `<s>` in front, one token of the user's, and a chat template."""
    specials = ["<pad>", "<s>", "</s>"]
    merges = [("h", "e"), ("o", "n"), ("Ġ", "t"), ("Ġt", "he"), ("c", "e")]
    texts = [*specials, "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    vocabulary = {text: index for index, text in enumerate(texts)}
    tokens = Tokens(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokens.pre_tokenizer = pre_tokenizers.Sequence(CUT[words])
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(specials)
    tokens.add_tokens(["<|im_end|>"])
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def piece_tokenizer(left_out: int = 0) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as tokenizers has it: bytes to fall back on, ▁ for spaces, every merge (but ``left_out``)."""
    grown = ["on", "ce", "once", "ti", "me", "time", "▁t", "▁time", "up", "▁on", "▁once", "aa", "aaa", "the", "he"]
    letters = sorted(set("▁" + "".join(grown) + "wasr"))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *grown, *letters]
    known = {*grown, *letters}
    merges = [
        (piece[:at], piece[at:])
        for piece in grown
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    left = merges[: len(merges) - left_out]
    tokens = Tokens(models.BPE(vocab=vocabulary, merges=left, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
