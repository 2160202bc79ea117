"""Write the demo model into the package: `python -m training.export`.

The averaged weights of the last run, in float16 safetensors, in the layout that
`transformers` reads: `config.json`, `generation_config.json`, `model.safetensors`, `tokenizer.json`
and the SentencePiece model it was made from, with a model card and the weights' checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import T5ForConditionalGeneration

from training import EXPORTED, PREFIX, WORK
from training.model import config as shape
from training.net import to_transformers

# Greedy, so that it streams. Synopses have a median of 11 tokens; nothing asks for more than 64.
SUMMARIZATION = {
    "prefix": PREFIX,
    "num_beams": 1,
    "min_length": 4,
    "max_length": 65,
    "no_repeat_ngram_size": 3,
    "length_penalty": 1.0,
    "early_stopping": True,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: summarization
---

# The t5-serve demo model

A small T5 (v1.0 architecture, {parameters:.1f} million parameters, vocabulary of {vocabulary})
trained from scratch to summarize **descriptions of software** in a line, and to pick the sentence
that stands for other English prose, so that t5-serve runs and can be tried with no download. It is
a demo: for real use start t5-serve with `--model google-t5/t5-small`
or any other T5 checkpoint.

Trained on the long descriptions and synopses of Debian's packages, on manuals and books that
Debian ships, and on gensim's test articles (each text under its package's licence), which are not
part of this folder. `docs/demo-model.md` in the repository tells
how it was made, how it was judged and what it scores.

Input: `{prefix}` and the text. Output: one sentence or phrase.
"""


def averaged(run: Path) -> T5ForConditionalGeneration:
    """The model with the averaged weights that `training.train` has left in `run`."""
    state = torch.load(run / "averaged.pt", weights_only=True)
    model = T5ForConditionalGeneration(shape(len(state["embedding"])))
    missing, unexpected = model.load_state_dict(to_transformers(state, model.config), strict=False)
    if unexpected or any("embed_tokens" not in n and n != "lm_head.weight" for n in missing):
        raise ValueError(f"{run}: not this model's weights: {missing or unexpected}")
    model.tie_weights()
    return model.eval()


def export(model: T5ForConditionalGeneration, folder: Path = EXPORTED) -> None:
    """Write `model` and its tokenizer to `folder`, replacing what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Tied: the decoder and the output layer read the one shared embedding.
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    weights = {
        name: value.to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name not in tied
    }
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} does not fit into float16")
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")

    config = model.config.to_dict()
    config["architectures"] = ["T5ForConditionalGeneration"]
    config["n_positions"] = 512
    config["dtype"] = "float16"
    config["task_specific_params"] = {"summarization": SUMMARIZATION}
    _write_json(folder / "config.json", config)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    _write_json(folder / "generation_config.json", ids)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(WORK / "tokenizer" / name, folder / name)
    card = _CARD.format(
        parameters=sum(value.numel() for value in model.parameters()) / 1e6,
        vocabulary=model.config.vocab_size,
        prefix=PREFIX,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Parse arguments and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=WORK / "run", help="folder of the checkpoint")
    parser.add_argument("--folder", type=Path, default=EXPORTED)
    arguments = parser.parse_args()
    export(averaged(arguments.run), arguments.folder)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir())
    print(f"{arguments.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
