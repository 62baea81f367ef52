"""Text to tokens and back: bytes, a `tokenizer.json`, or the vocabulary in a GGUF file. Decoding streams."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from examples.llm import corpus
from jaxq import checkpoints


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]:
        """Token ids, with whatever the model wants before a text."""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as their tokens come; a character that spans tokens comes with the last of them."""


class Bytes:
    """UTF-8 bytes, after a token that begins a file: the vocabulary of the model in `pystdlib/`."""

    def encode(self, text: str) -> list[int]:
        return corpus.encode(text.encode()).tolist()

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for value in ids:
            if value < 256 and (piece := decoder.decode(bytes([value]))):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest


class Fast:
    """A tokenizer of Hugging Face's `tokenizers`."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        for value in ids:
            if piece := stream.step(self.tokenizer, value):
                yield piece


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a model: by `config.json` where it says bytes, else `tokenizer.json`, else a GGUF file's own.

    Raises:
      ValueError: none of these, or a GGUF vocabulary that is not served.
      ImportError: `tokenizers` is not installed.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    file = directory / "config.json"
    if file.exists() and json.loads(file.read_text()).get("tokenizer") == "bytes":
        return Bytes()
    if (directory / "tokenizer.json").exists():
        return Fast(_tokenizers().Tokenizer.from_file(str(directory / "tokenizer.json")))
    if path.suffix == ".gguf":
        return from_gguf(checkpoints.open(path).config)
    raise ValueError(f"tokenizer.load: {directory} has no tokenizer.json")


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("this model's tokenizer needs the package tokenizers: pip install tokenizers") from None
    return tokenizers


# How the text is cut before the merges, by `tokenizer.ggml.pre`. The patterns are those of the models' tokenizer.json.
_DIGITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL = 3  # `tokenizer.ggml.token_type` of tokens that are not text


def from_gguf(metadata: Mapping[str, Any]) -> Fast:
    """A byte-level BPE from the metadata of a GGUF file.

    Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises:
      ValueError: another kind of vocabulary, one that contradicts itself, or a way of cutting text that is not known.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _DIGITS:
        raise ValueError(
            f"tokenizer.from_gguf: vocabulary {kind!r} cut by {pre!r} is not served; put the model's tokenizer.json "
            "beside the file"
        )
    lib = _tokenizers()
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(str(merge).split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        bpe = lib.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"tokenizer.from_gguf: the file's vocabulary can't be used: {error}") from None
    tokenizer = lib.Tokenizer(bpe)
    cut = lib.pre_tokenizers.Split(lib.Regex(_PATTERN.format(digits=_DIGITS[pre])), behavior="isolated")
    to_bytes = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = lib.decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", ())
    control = [token for token, kind in zip(tokens, types, strict=False) if int(kind) == _CONTROL]
    tokenizer.add_special_tokens([lib.AddedToken(token, special=True, normalized=False) for token in control])
    _add_bos(lib, tokenizer, metadata, tokens)
    return Fast(tokenizer)


def _add_bos(lib: Any, tokenizer: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    if metadata.get("tokenizer.ggml.add_bos_token") and "tokenizer.ggml.bos_token_id" in metadata:
        index = int(metadata["tokenizer.ggml.bos_token_id"])
        template = lib.processors.TemplateProcessing
        tokenizer.post_processor = template(single=[tokens[index], "$A"], special_tokens=[(tokens[index], index)])
