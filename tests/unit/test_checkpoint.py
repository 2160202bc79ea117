"""Checkpoints that are damaged, or would run code: none is loaded, each is told in one line."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.engine.checkpoint import DEMO_PATH, CheckpointError, resolve
from serve_app.engine.reference import ReferenceEngine
from serve_app.engine.tokenizer import Tokenizer
from serve_app.engine.weights import WeightSource, read_shape


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    return Path(shutil.copytree(DEMO_PATH, tmp_path / "model"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there once code of a checkpoint has run."""
    return tmp_path / "mark"


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_trap_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()


def test_the_bundled_model_is_the_one_its_checksum_says() -> None:
    [line] = (DEMO_PATH / "model.safetensors.sha256").read_text().splitlines()
    digest = hashlib.sha256((DEMO_PATH / "model.safetensors").read_bytes()).hexdigest()
    assert line == f"{digest}  model.safetensors"
    assert resolve("demo").revision == digest[:12]


def test_weights_that_are_not_those_of_the_checksum_are_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # still a model that loads and answers
    weights.write_bytes(content)
    said = refused(model)
    assert "model.safetensors is damaged or not the one it was" in said
    assert hashlib.sha256(content).hexdigest() in said
    # A folder need not have checksums.
    (model / "model.safetensors.sha256").unlink()
    assert resolve(str(model)).revision == hashlib.sha256(content).hexdigest()[:12]


def test_each_file_of_several_has_a_checksum_of_its_own(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors.sha256").unlink()
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, half in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in half}, model / f"model-{number}.safetensors")
    second = (model / "model-2.safetensors").read_bytes()
    checksum = model / "model-2.safetensors.sha256"
    checksum.write_text(f"{hashlib.sha256(second).hexdigest()}  model-2.safetensors\n")
    first = (model / "model-1.safetensors").read_bytes()
    assert resolve(str(model)).revision == hashlib.sha256(first + second).hexdigest()[:12]
    checksum.write_text("")
    assert "model-2.safetensors.sha256 has" in refused(model)


def test_a_model_of_pickles_is_refused_and_not_read(model: Path, mark: Path) -> None:
    for file in model.glob("model.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    assert "no *.safetensors weights (pickles are not read)" in refused(model)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pickle", "empty", "cut off", "torch"])
def test_what_only_has_the_name_of_safetensors_is_refused(
    model: Path, mark: Path, kind: str
) -> None:
    weights = model / "model.safetensors"
    (model / "model.safetensors.sha256").unlink()
    if kind == "torch":
        torch.save({"shared.weight": Trap(mark)}, weights)
    else:
        content = {
            "pickle": pickle.dumps(Trap(mark)),
            "empty": b"",
            "cut off": weights.read_bytes()[:100_000],
        }[kind]
        weights.write_bytes(content)
    assert "model.safetensors is no safetensors file" in refused(model)
    assert not mark.exists()


def test_code_and_pickles_beside_the_weights_are_not_run(model: Path, mark: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: ...\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (model / name).write_text(code)
    config = json.loads((model / "config.json").read_text())
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForSeq2SeqLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    (model / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    # Without tokenizer.json it is transformers that makes the tokenizer.
    (model / "tokenizer.json").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer = {"AutoTokenizer": classes["AutoTokenizer"]}
    said = {**settings, "tokenizer_class": "T5Tokenizer", "auto_map": tokenizer}
    (model / "tokenizer_config.json").write_text(json.dumps(said))

    checkpoint = resolve(str(model))
    assert Tokenizer(checkpoint).encode("A small web server.").ids
    assert WeightSource(checkpoint, read_shape(checkpoint.config)).embedding().shape[0] > 0
    ReferenceEngine(checkpoint, lambda _events: None, threads=1).close()
    assert not mark.exists()
