"""Small tokenizers of the two families that LLaVA checkpoints use, made on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "Is there a red circle? Yes, two of them.",
    "naïve café – 東京 😀👍🏽",
    "the the there",
    "two:\n        spaces in one token",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
DEMO_CHECKPOINT = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"


@cache
def byte_level() -> Any:
    """Like GPT-2's and Llama 3's: every token is a run of bytes; a word begins with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer)


@cache
def sentence_piece() -> Any:
    """Like Llama 2's: a word begins with a mark for its space; unknown characters become bytes."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        ["Is there a red circle? Yes, two of them.", "the the there"] * 3,
        BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False),
    )
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)[1:]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(tokenizer)


@cache
def of_demo_checkpoint() -> Any:
    """The demo checkpoint's own, as the server loads it."""
    return AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)


def _wrapped(tokenizer: Tokenizer) -> Any:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
