"""Which tokenizer a model belongs to, and its files in transformers' format."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from recipes.data.manifest import MANIFEST, Manifest, tokenizer_sha256
from recipes.engine.checkpoint import Checkpoint
from recipes.engine.layout import read_json
from recipes.errors import UserError
from recipes.files import write_atomic, write_json
from recipes.run import RUN_FILE, Run

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
"""Where neither a recipe nor a tokenizer_config.json names the token: SmolLM2's."""
PADDING = 128
"""Embeddings without a token from which on a tokenizer that nothing vouches for is taken for another model's.
chosen: vocabularies are padded to multiples of 128 at most."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that a model was trained with."""

    file: Path
    """A tokenizer.json."""
    end_of_text: str
    entries: int
    last_id: int
    end_of_text_id: int
    vouched: bool
    """Whether it came with the model, and not from the command line."""

    @classmethod
    def of(cls, source: Checkpoint, given: Path | None) -> Vocabulary:
        """The tokenizer of a checkpoint: its run's, its own, or the one `given` if it has neither.

        Raises:
            UserError: there is none, `given` is another, or the data was made with another.
        """
        if given is not None and not given.is_file():
            raise UserError("there is no such file", "name a tokenizer.json", given)
        run = next((Run(p) for p in source.folder.resolve().parents if (p / RUN_FILE).is_file()), None)
        own = run.tokenizer if run else source.folder / TOKENIZER
        file = own if own.is_file() else given
        if file is None:
            fix = "name the tokenizer.json it was trained with"
            raise UserError("this checkpoint lies in no run: its tokenizer is unknown", fix, source.folder)
        if given is not None and tokenizer_sha256(given) != tokenizer_sha256(file):
            fix = f"leave the tokenizer out, or name {file}"
            raise UserError(f"not the tokenizer that {source.folder} was trained with", fix, given)
        if run is not None:
            _check_data(run)
        end_of_text = run.recipe.tokenizer.end_of_text if run else _end_of_text(file)
        return cls.load(file, end_of_text, vouched=file == own)

    @classmethod
    def beside(cls, model: Path) -> Vocabulary:
        """The tokenizer in a transformers model's folder.

        Raises:
            UserError: there is none.
        """
        return cls.load(model / TOKENIZER, _end_of_text(model / TOKENIZER), vouched=True)

    @classmethod
    def load(cls, file: Path, end_of_text: str, *, vouched: bool) -> Vocabulary:
        """Raises UserError if `file` is no tokenizer.json, or lacks the token `end_of_text`."""
        try:
            ids: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab()
        except Exception as error:  # the library raises nothing more exact
            raise UserError(f"cannot be read as a tokenizer ({error})", "name a tokenizer.json", file) from None
        if end_of_text not in ids:
            fix = f"name the model's own tokenizer, with a {TOKENIZER_CONFIG} beside it that says its eos_token"
            raise UserError(f"no token {end_of_text!r}, which ends a text", fix, file)
        return cls(file, end_of_text, len(ids), max(ids.values()), ids[end_of_text], vouched)

    def check_size(self, vocab_size: int) -> None:
        """Raises UserError if a model of `vocab_size` embeddings cannot have been trained with this tokenizer."""
        if self.last_id >= vocab_size:
            found = f"token ids up to {self.last_id:,}, but the checkpoint has {vocab_size:,} embeddings"
            raise UserError(found, "name the tokenizer that the model was trained with", self.file)
        if not self.vouched and vocab_size - self.entries >= PADDING:
            found = f"{self.entries:,} tokens for a checkpoint of {vocab_size:,} embeddings"
            raise UserError(found, "name the tokenizer that the model was trained with", self.file)

    def write(self, folder: Path, max_length: int) -> None:
        """tokenizer.json as it is, and tokenizer_config.json without a chat template."""
        write_atomic(folder / TOKENIZER, self.file.read_bytes())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.end_of_text, "eos_token": self.end_of_text,
            "model_max_length": max_length, "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        write_json(folder / TOKENIZER_CONFIG, config)


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copies a model's tokenizer."""
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


def _end_of_text(file: Path) -> str:
    """The token that the tokenizer_config.json beside a tokenizer.json ends texts with."""
    config = file.with_name(TOKENIZER_CONFIG)
    content = read_json(config) if config.is_file() else {}
    token = content.get("eos_token") or END_OF_TEXT
    return str(token["content"] if isinstance(token, dict) else token)


def _check_data(run: Run) -> None:
    """Raises UserError if data of the run, as far as it is there, was made with another tokenizer than it has now."""
    sha256 = tokenizer_sha256(run.tokenizer)
    for folder in map(run.data, run.recipe.sources):
        if (folder / MANIFEST).is_file():
            Manifest.load(folder).check_tokenizer(sha256, run.recipe.tokenizer.name)
