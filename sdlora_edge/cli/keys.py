"""`sdlora-edge keys`: the keys that packets are signed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..formats import signing
from .output import Json, emit, output
from .passphrase import chosen

app = typer.Typer(no_args_is_help=True, help="Make the keys that packets are signed with.")


@app.callback()
def _group() -> None:
    pass


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="A plain word, such as factory.")],
    out: Annotated[
        Path,
        typer.Option(callback=output, help="Folder for NAME.key (keep it secret) and NAME.pub."),
    ] = Path("keys"),
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help=f"Encrypt NAME.key: ask for a passphrase twice, or take that in {signing.PASSPHRASE}.",
        ),
    ] = False,
    passphrase_file: Annotated[
        Optional[Path], typer.Option(help="Encrypt NAME.key with the passphrase in this file.")
    ] = None,
    json: Json = False,
) -> None:
    """Make an Ed25519 key pair: NAME.key signs packets, NAME.pub goes into bundles."""
    encrypted = passphrase or passphrase_file is not None
    private, public = signing.new_key(
        name, out, chosen(name, passphrase_file) if encrypted else None
    )
    keyid = signing.load_public(public).keyid
    value = {"private": str(private), "public": str(public), "keyid": keyid, "encrypted": encrypted}
    secret = (
        "encrypted: keep its passphrase, and a copy of both"
        if encrypted
        else "keep it secret, and a copy safe"
    )
    lines = [
        f"private key: {private} ({secret})",
        f"public key:  {public}",
        f"its name in messages: {keyid}",
    ]
    emit(value, json, lambda: lines)
