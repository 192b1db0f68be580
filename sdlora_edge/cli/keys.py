"""`sdlora-edge keys`: the keys that packets are signed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .arguments import PASSPHRASE
from .help import CONTEXT, Command, Group
from .output import Json, emit, output

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    help="Make the keys that packets are signed with.",
)


@app.callback()
def _group() -> None:
    """Without this, typer makes the only command the group."""


@app.command(cls=Command)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A plain word, such as factory.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            callback=output,
            help="Folder for NAME.key (keep it secret) and NAME.pub.",
        ),
    ] = Path("keys"),
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help=f"Encrypt NAME.key. The passphrase is asked for twice, or is in {PASSPHRASE}.",
        ),
    ] = False,
    passphrase_file: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Encrypt NAME.key with the passphrase in this file."),
    ] = None,
    json: Json = False,
) -> None:
    """Make an Ed25519 key pair: NAME.key signs packets, NAME.pub goes into bundles."""
    from ..formats import signing
    from ..results import KeyFiles
    from .passphrase import chosen

    encrypted = passphrase or passphrase_file is not None
    secret = chosen(name, passphrase_file) if encrypted else None
    private, public = signing.new_key(name, out, secret)
    keyid = signing.load_public(public).keyid
    value = KeyFiles(private, public, keyid, encrypted)
    advice = (
        "encrypted: back up the file and its passphrase"
        if encrypted
        else "keep it secret and backed up"
    )
    lines = [
        f"private key: {private} ({advice})",
        f"public key:  {public}",
        f"digest:      {keyid} (messages show its first 12 digits)",
    ]
    emit(value, json, lambda: lines)
