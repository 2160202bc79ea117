"""Make the demo model's vocabulary: a SentencePiece Unigram model, and its `tokenizer.json`."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece as spm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

from training import COPY_PREFIX, PREFIX, WORK
from training.data import load
from training.passages import load_passages

VOCABULARY = 8192
SPECIAL = ["<pad>", "</s>", "<unk>"]


def train(folder: Path = WORK / "tokenizer") -> Path:
    """Train the vocabulary on texts and passages; returns the folder with its files."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    with corpus.open("w", encoding="utf-8") as file:
        for example in load("train"):
            text = " ".join(example.text.split())
            file.write(f"{PREFIX}{text}\n{example.synopsis}\n{COPY_PREFIX}\n")
        for passage in load_passages():
            file.write(passage.text + "\n")
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="nmt_nfkc",
        num_threads=2,
        minloglevel=1,
    )
    convert(folder / "spiece.model").save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def convert(model: Path) -> Tokenizer:
    """The same vocabulary for the `tokenizers` library, which is all that serving needs."""
    processor = spm.SentencePieceProcessor(model_file=str(model))
    pieces = [
        (processor.id_to_piece(i), processor.get_score(i))
        for i in range(processor.get_piece_size())
    ]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(_charsmap(model)),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def _charsmap(model: Path) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    return proto.normalizer_spec.precompiled_charsmap


if __name__ == "__main__":
    print(train())
