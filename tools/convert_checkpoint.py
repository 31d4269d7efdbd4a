#!/usr/bin/env python
"""Convert a model from one format into another.

    python tools/convert_checkpoint.py --from megayoco --to hf --load runs/quickstart --save model --check

Formats: `megayoco`, a run directory, a checkpoint of one, or an export; `hf`, a folder for transformers, with its code
for YOCO and as LlamaForCausalLM for LLaMA; `llama`, LlamaForCausalLM alone; `yoco`, checkpoint.pth and params.json of
the official code, read also from its training checkpoints; `fla`, the YOCO of flash-linear-attention; `longllama`, a
LLaMA with memory as the released LongLLaMA has it, with its code; `easylm`, streaming_params and llama_config.json of
EasyLM, where LongLLaMA was trained.

--memory-layers 6,12,18 --memory-window 2048 makes a LongLLaMA of a LLaMA, --memory-layers none the reverse; no tensor
changes.

Tensors are read, converted and written one at a time. Names that do not match are listed, and nothing is written. SAVE
appears complete or not at all. Nothing that is read can run code.

--check loads SAVE again and compares its logits in fp32 with those of the source, rounded to --dtype if that is given:
those of `hf`, `llama` and `longllama` by transformers' own model of the folder, others by our reader. It fails above
1e-4 of the largest logit.
"""

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megayoco.convert.canonical import EXPORT_FOLDER
from megayoco.convert.formats import FORMATS, read_weights, write_weights
from megayoco.convert.longllama import with_memory
from megayoco.convert.weights import Cast, LazyTensors, Weights
from megayoco.data.command import dashed, run_command
from megayoco.data.tokenizer import Tokenizer, build_tokenizer
from megayoco.data.tokenizer.base import SAVED_NAME
from megayoco.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of logits that --check accepts, relative to the largest logit."""
CHECKED_TOKENS = 256
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_TEXT = """The harbour of Marseille had been quiet for three days when the ship came in. Nobody had expected her before
the end of March, and the customs officer, who was asleep (as usual), did not see the flag: yellow, torn, upside down.
"Quarantine!" shouted the pilot. « Quarantaine ? » answered the captain; il n'avait rien compris. By 7:45 pm, 1,250
people stood on the quay, and def count(people): return len(people) is how a programmer would put it. 船は静かだった。
"""


class _Progress(Mapping[str, Tensor]):
    """Tensors of `source`; a bar of bytes moves when one is read."""

    def __init__(self, source: LazyTensors, bar: tqdm) -> None:
        self._source, self._bar = source, bar

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source[name]
        self._bar.update(tensor.numel() * tensor.element_size())
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    add("--to", dest="target", required=True, choices=FORMATS, metavar="FORMAT", help="the same choices")
    add("--load", required=True, metavar="PATH", help="what to convert")
    add("--save", required=True, metavar="DIR", help="folder to write")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights; as they are unless told")
    add("--shard-size", default="5GB", metavar="SIZE", help="the most data in one file, such as 500MB: 5GB")
    add("--tokenizer", metavar="PATH", help="file or folder; in place of the one that comes with the weights, if any")
    add(
        "--memory-layers",
        metavar="LIST",
        help="numbers of a LLaMA's layers that get a memory, such as 6,12,18, or none",
    )
    add("--memory-window", type=int, metavar="TOKENS", help="tokens of a window, with --memory-layers")
    add("--check", action="store_true", help="load the result and compare its logits with the source's")
    add("--check-text", metavar="FILE", help=f"UTF-8 text for --check, the first {CHECKED_TOKENS} tokens of it count")
    add("--overwrite", action="store_true", help="replace an older conversion in DIR")
    options = parser.parse_args(dashed(arguments))
    if options.check_text and not options.check:
        raise UserError("--check-text is used only by --check: add that, or leave it out.")
    if options.memory_layers not in (None, "none") and options.memory_window is None:
        raise UserError("--memory-layers needs --memory-window, the tokens of a window, such as 2048.")
    if options.memory_window is not None and options.memory_layers in (None, "none"):
        raise UserError("--memory-window is used only with --memory-layers: give some, or leave it out.")
    return options


def shard_bytes(size: str) -> int:
    """Bytes of a size such as 5GB."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--shard-size {size} is no size. Say 5GB, or 500MB.")
    return int(match[1]) * _UNITS[match[2].upper()]


def memory_layers(layers: str) -> list[int]:
    """Numbers of layers such as 6,12,18; none of them."""
    if layers == "none":
        return []
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise UserError(f"--memory-layers {layers} is no list of numbers. Say 6,12,18, or none.") from None


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a file or folder: one that we saved, of transformers, SentencePiece or tiktoken."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"--tokenizer {path} does not exist.")
    if (place / SAVED_NAME).exists():
        return Tokenizer.from_dir(place)
    kind = "TiktokenTokenizer" if place.suffix == ".tiktoken" else "HuggingFaceTokenizer"
    return build_tokenizer(kind, path)


def check_tokens(weights: Weights, text_file: str | None) -> Tensor:
    """(1, T) int64: the text as tokens, random ones where there is no tokenizer."""
    if weights.tokenizer is None:
        if text_file is not None:
            raise UserError("--check-text needs a tokenizer: name one by --tokenizer, or leave it out.")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(weights.model.vocab_size, (1, CHECKED_TOKENS), generator=generator)
    text = _TEXT if text_file is None else read_text(text_file)
    tokens = weights.tokenizer.encode(text)[:CHECKED_TOKENS]
    if len(tokens) < 2:
        raise UserError(f"--check-text {text_file} gives {len(tokens)} tokens. Give a longer text.")
    return torch.tensor([tokens])


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--check-text {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--check-text {path} is not UTF-8 (byte {error.start}). Convert it first.") from error


def our_logits(weights: Weights, tokens: Tensor) -> Tensor:
    """(T, V) fp32, by our decoder."""
    # slow: the layers bring megatron-core along. This package first, which keeps it quiet.
    import megayoco.parallel  # noqa: F401
    from megayoco.generate.loading import load_weights

    model = load_weights(weights, dtype=torch.float32)
    with torch.no_grad():
        return model.advance(tokens, model.empty_context(), last_only=False)[0][0]


def logits_of_folder(folder: Path, target: str, tokens: Tensor, window: int | None) -> tuple[Tensor, str]:
    """(T, V) fp32 of a written folder, and by what; window: that of memory layers, which decides where text is cut."""
    if target not in ("hf", "llama", "longllama"):
        return our_logits(read_weights(folder, target), tokens), "our reader"
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"--check of {target} needs transformers, version 5: pip install transformers.") from error
    # our decoder cuts at multiples of the window, and keeps a memory as the weights are
    memory = {} if window is None else {"last_context_length": window, "mem_dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **memory)
    with torch.no_grad():
        return model.eval()(tokens).logits[0], type(model).__name__ + " of transformers"


def as_long_as_comparable(tokens: Tensor, weights: Weights, target: str) -> Tensor:
    """(1, T): whole windows of a memory, as the released code cuts them elsewhere; without, what fits one window."""
    window, length = weights.model.memory_window, tokens.shape[1]
    if window is not None and length > window:
        return tokens[:, : length // window * window]
    if window is None and target == "longllama":
        return tokens[:, : weights.facts.get("sequence_length")]
    return tokens


def check(weights: Weights, folder: Path, options: argparse.Namespace) -> None:
    """Compare the logits of both sides. Raises UserError if they differ."""
    window = weights.model.memory_window
    tokens = as_long_as_comparable(check_tokens(weights, options.check_text), weights, options.target)
    if options.dtype is not None:  # what rounding changes is no fault of the conversion
        weights = weights._replace(tensors=Cast(weights.tensors, getattr(torch, options.dtype)))
    expected = our_logits(weights, tokens)
    found, by = logits_of_folder(folder, options.target, tokens, window)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:  # also where it is no number
        raise UserError(
            f"--check: logits of {folder} by {by} differ from the source's by {difference:.1e} of the largest, over"
            f" {TOLERANCE:.0e}. The conversion is wrong; please report it with both config files."
        )
    what = "tokens of text" if weights.tokenizer is not None else "random tokens"
    print(f"check: logits by {by} on {tokens.shape[1]} {what} differ by {difference:.1e} of the largest")


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    load, save = Path(options.load), Path(options.save)
    size = shard_bytes(options.shard_size)
    layers = None if options.memory_layers is None else memory_layers(options.memory_layers)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    if options.check_text is not None:
        read_text(options.check_text)  # before anything is written
    if save.name == EXPORT_FOLDER and (save.parent / "checkpoints").is_dir() and options.target != "megayoco":
        raise UserError(f"--save {save} is where its run keeps its own export: --resume would refuse another format.")
    weights = read_weights(load, options.source, tokenizer)
    if layers is not None:
        weights = with_memory(weights, layers, options.memory_window)
    model, tensors = weights.model, weights.tensors
    stored = sum(torch.Size(tensors.shape(name)).numel() * tensors.dtype(name).itemsize for name in tensors)
    with tqdm(total=stored, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        write_weights(
            save,
            options.target,
            weights._replace(tensors=_Progress(tensors, bar)),
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            shard_bytes=size,
            overwrite=options.overwrite,
        )
    files = [path for path in save.rglob("*") if path.is_file()]
    dtype = options.dtype or ", ".join(sorted({str(tensors.dtype(name)).removeprefix("torch.") for name in tensors}))
    print(
        f"{save}: {model.parameter_count()['total']:,} parameters of a {model.pattern} model in {len(tensors)} tensors,"
        f" {dtype}; {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes"
    )
    if weights.tokenizer is None:
        print("no tokenizer came with the weights, so the folder has none; --tokenizer adds one")
    if options.check:
        check(weights, save, options)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.exit(run_command(main))
