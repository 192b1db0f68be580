"""The passphrases of private keys: from a variable, a file or the terminal.

A passphrase is never an argument, which other users could see, and never part of a message.
"""

from __future__ import annotations

import getpass
import os
import warnings
from pathlib import Path

from ..errors import UsageError
from ..formats.signing import LONGEST, PASSPHRASE, passphrase_from_environment
from ..storage import atomic


def known(key: Path) -> bytes:
    """The passphrase of a key that exists."""
    return (
        passphrase_from_environment(key)
        if os.environ.get(PASSPHRASE)
        else _hidden(f"passphrase of {key}: ")
    )


def chosen(name: str, file: Path | None) -> bytes:
    """The passphrase for a new key. Raises UsageError if two entries differ."""
    if file is not None:
        # the file may be a pipe: then the passphrase lies on no disk
        with atomic.reading(file), open(file, "rb") as opened:
            return opened.read(LONGEST + 3).rstrip(b"\r\n")
    if os.environ.get(PASSPHRASE):
        return passphrase_from_environment(Path(name))
    first = _hidden(f"new passphrase of {name}: ")
    if _hidden("the same again: ") != first:
        raise UsageError("the two passphrases differ: run the command again")
    return first


def _hidden(prompt: str) -> bytes:
    with warnings.catch_warnings():
        # without the filter getpass would read on, and show what is typed
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return os.fsencode(getpass.getpass(prompt))
        except (getpass.GetPassWarning, EOFError, UnicodeError) as error:
            raise UsageError(
                f"no passphrase was given: use a terminal, or set {PASSPHRASE}"
            ) from error
