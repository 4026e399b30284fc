"""Tokens on their way to the disk, with a journal, so that a process that ends at any moment loses seconds of work.

The journal says how much of the two growing files counts, and where in the source the next document is. It is written
whole, after what it vouches for has reached the disk. What lies beyond it in the files is cut off and made again.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moxe.data.encoding import Encoded
from moxe.data.tokens import write_index
from moxe.errors import PassingError
from moxe.files import sync

# Between two entries; reaching the disk can take a good part of a second.
SECONDS_BETWEEN_ENTRIES = 2.0
JOURNAL = "journal.json"
LENGTHS = "lengths.bin"


class TokenJournal:
    """Appends tokenised documents to a folder, from where an earlier process left it.

    Args:
        folder: made where it is not there.
        vocab_size: of the tokens.

    Attributes:
        place: in the source, after the last document that is here, as it was given to `append`; None: its beginning.
        num_documents, num_tokens: that are here.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.place: Any = None
        self.num_documents = 0
        self.num_tokens = 0
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
        self._files = {name: (folder / name).open("a+b") for name in ("tokens.bin", LENGTHS)}
        self._digests = {name: hashlib.sha256() for name in self._files}
        if not self._pick_up():
            self.place, self.num_documents, self.num_tokens = None, 0, 0
            self._digests = {name: hashlib.sha256() for name in self._files}
            for file in self._files.values():
                file.truncate(0)
                file.seek(0)
        self._last_entry = time.monotonic()

    def __enter__(self) -> "TokenJournal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, encoded: Encoded, place: Any) -> None:
        """Adds documents; `place`, which JSON can say, is the source's after them."""
        tokens, lengths = encoded
        for (name, file), array in zip(self._files.items(), (tokens, lengths), strict=True):
            data = array.tobytes()
            file.write(data)
            self._digests[name].update(data)
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)
        self.place = place
        if time.monotonic() - self._last_entry >= SECONDS_BETWEEN_ENTRIES:
            self.enter()

    def enter(self) -> None:
        """Makes all that was appended count."""
        entry: dict[str, Any] = {"place": self.place, "documents": self.num_documents, "tokens": self.num_tokens}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            entry[name] = {"bytes": file.tell(), "sha256": self._digests[name].hexdigest()}
        temporary = self.folder / f".{JOURNAL}"
        temporary.write_text(json.dumps(entry), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, self.folder / JOURNAL)
        sync(self.folder)
        self._last_entry = time.monotonic()

    def finish(self) -> None:
        """Completes what `TokenDocuments` maps; the journal stays, for whoever says that all of it is finished.

        Raises:
            PassingError: if another process wrote to the files; the next journal begins them anew.
        """
        self.enter()
        for name, digest in self._digests.items():
            with (self.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").digest() != digest.digest():
                    raise PassingError(
                        f"{self.folder / name} is not what was written to it, as if another process wrote there too; "
                        "the same command makes it again."
                    )
        write_index(self.folder, np.fromfile(self.folder / LENGTHS, dtype=np.int64), self.vocab_size)

    def _pick_up(self) -> bool:
        """Whether the files are as the last entry says, up to where it says; what is beyond is cut off."""
        try:
            entry = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            for name, file in self._files.items():
                left = entry[name]["bytes"]
                file.seek(0)
                while left and (data := file.read(min(left, 2**20))):
                    self._digests[name].update(data)
                    left -= len(data)
                if left or self._digests[name].hexdigest() != entry[name]["sha256"]:
                    return False
                file.truncate(entry[name]["bytes"])
                file.seek(0, os.SEEK_END)
            self.place, self.num_documents, self.num_tokens = entry["place"], entry["documents"], entry["tokens"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        return True
