"""Byte-level BPE through the `tokenizers` library: trained here, or loaded from Hugging Face files.

Text is only text: the characters of a special token inside a document never become that token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import tokenizers
from jaxtyping import Integer, UInt32
from numpy import ndarray
from tokenizers import decoders, models, pre_tokenizers, trainers

from hakari.training.text import Document, missing

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
BYTES = 256
BATCH = 2_000_000  # characters encoded at once; the library takes about 130 bytes for each
PIECE = 250_000  # longest part of a document encoded in one go
AROUND = 64  # characters on each side that show whether a cut changes the tokens
CUT = re.compile(r"(?<=\w)\n")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the library, with the id that stands between documents.

    vocabulary: one more than the highest id. digest: SHA-256 of what `save` writes.
    """

    backend: tokenizers.Tokenizer
    end_of_text: int
    vocabulary: int
    digest: str


def train(
    documents: Iterable[Document], vocabulary: int = 4096, special: str = END_OF_TEXT
) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) learned from the documents.

    vocabulary: ids at most, of which 256 are bytes and one is `special`, the end of text; fewer
    come out if the text has no more pairs to join. Same documents, same tokenizer.
    Raises ValueError for a vocabulary without room for these.

    >>> tokenizer = train([Document("a", "to be or not to be")], vocabulary=260)
    >>> decode(tokenizer, encode(tokenizer, "to be"))
    'to be'
    """
    if vocabulary < BYTES + 1:
        raise ValueError(
            f"vocabulary = {vocabulary} is below {BYTES + 1}: {BYTES} bytes and {special!r}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((document.text for document in documents), trainer)
    return _tokenizer(backend, special)


def load(path: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """A tokenizer.json, or a Hugging Face folder that holds one.

    end_of_text: the token between documents; None: the eos token that the files beside it name
    (tokenizer_config.json, special_tokens_map.json, config.json, generation_config.json), or
    `<|endoftext|>`. Its truncation and padding are switched off: no text is lost.
    Raises FileNotFoundError; ValueError if it cannot be read, or has no such token.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise missing(file, "tokenizer")
    if file.is_dir():
        file = _in_folder(file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{file} is not a tokenizer of the tokenizers library: {error}") from None
    token = end_of_text or _end_of_text(file.parent, backend)
    if token is None:
        raise ValueError(
            f"{file} does not say which token ends a text: name one; {_specials(backend)}"
        )
    if backend.token_to_id(token) is None:
        raise ValueError(f"{file} has no token {token!r} to end a text; {_specials(backend)}")
    return _tokenizer(backend, token)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the tokenizer_config.json that names the end of text.

    `load` and transformers' AutoTokenizer both read the folder.
    """
    token = tokenizer.backend.id_to_token(tokenizer.end_of_text)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token}
    (folder / FILE).write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def encode(tokenizer: Tokenizer, text: str) -> UInt32[ndarray, " n"]:
    """The ids of a text, without any special token."""
    return next(encode_documents(tokenizer, [Document("", text)]))[1]


def decode(tokenizer: Tokenizer, ids: Iterable[int] | Integer[ndarray, " n"]) -> str:
    """The text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[Document]
) -> Iterator[tuple[Document, UInt32[ndarray, " n"]]]:
    """Each document with its ids, in order, without any special token.

    Encoded about two million characters at a time, on all cores (RAYON_NUM_THREADS); a long
    document in pieces, cut where that does not change its tokens, so that memory stays small.
    """
    for group in _groups(documents, lambda document: len(document.text)):
        pieces = [_pieces(tokenizer, document.text) for document in group]
        found = _encode(tokenizer, [piece for parts in pieces for piece in parts])
        for document, parts in zip(group, pieces, strict=True):
            yield document, np.concatenate(list(islice(found, len(parts))))


# --- encoding -----------------------------------------------------------------------------


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[UInt32[ndarray, " n"]]:
    for group in _groups(texts, len):
        for found in tokenizer.backend.encode_batch_fast(group, add_special_tokens=False):
            yield np.array(found.ids, dtype=np.uint32)


def _groups(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items, as many as make up a batch of characters."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= BATCH:
            yield group
            group, total = [], 0
    if group:
        yield group


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text cut before ends of lines, where the tokens around the cut stay as they are.

    A tokenizer that looks further than a line, such as one without pre-tokens, gets it whole.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE:
        cuts = islice(CUT.finditer(text, start + PIECE), 8)
        cut = next((c.start() for c in cuts if _harmless(tokenizer, text, c.start())), None)
        if cut is None:
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _harmless(tokenizer: Tokenizer, text: str, cut: int) -> bool:
    left, right = text[max(cut - AROUND, 0) : cut], text[cut : cut + AROUND]
    whole, *halves = (
        tokenizer.backend.encode(part, add_special_tokens=False).ids
        for part in (left + right, left, right)
    )
    return whole == halves[0] + halves[1]


# --- loading ------------------------------------------------------------------------------


def _tokenizer(backend: tokenizers.Tokenizer, special: str) -> Tokenizer:
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return Tokenizer(
        backend,
        end_of_text=cast("int", backend.token_to_id(special)),  # the callers made sure
        vocabulary=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        digest=hashlib.sha256(backend.to_str(pretty=True).encode()).hexdigest(),
    )


def _in_folder(folder: Path) -> Path:
    if (folder / FILE).is_file():
        return folder / FILE
    names = sorted(entry.name for entry in folder.iterdir())
    raise FileNotFoundError(
        f"no {FILE} in {folder} ({', '.join(names[:8]) or 'empty'}): older formats are converted "
        f"by transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _end_of_text(folder: Path, backend: tokenizers.Tokenizer) -> str | None:
    """The token that the files of a Hugging Face folder name, or the usual one, or None."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    for name in ("config.json", "generation_config.json"):
        number = _settings(folder / name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and (token := backend.id_to_token(number)) is not None:
            return token
    return END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else None


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _specials(backend: tokenizers.Tokenizer) -> str:
    added = backend.get_added_tokens_decoder().values()
    names = [token.content for token in added if token.special]
    return "its special tokens are " + ", ".join(names[:20]) if names else "it has no special token"
