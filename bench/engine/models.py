"""The models measured: T5's shapes with random weights (speed does not depend on what they say),
and such a one that copies its input, for lookup speculation."""

from __future__ import annotations

from pathlib import Path

from bench.engine.workloads import VOCABULARY

# Raffel et al. 2020, section 3.1.2 and the published configs; v1.0: ReLU and a tied head.
SHAPES = {
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
NAMES = (*SHAPES, "copying", "demo")


def build(name: str, folder: Path, seed: int) -> Path:
    """The checkpoint's folder; a random one is saved into `folder`."""
    from serve_app.engine.checkpoint import DEMO_PATH

    if name == "demo":
        return DEMO_PATH
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from training.model import write_copy_circuit

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_kv=64, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        feed_forward_proj="relu", **SHAPES["small" if name == "copying" else name],
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    if name == "copying":
        write_copy_circuit(model)
    path = folder / name
    model.save_pretrained(path)
    return path


def convert(checkpoint: Path, folder: Path) -> Path:
    """The same model as CTranslate2 has it, float32: types are chosen when it is loaded."""
    from ctranslate2.converters import TransformersConverter

    path = folder / f"{checkpoint.name}-ct2"
    TransformersConverter(str(checkpoint)).convert(str(path))
    return path
