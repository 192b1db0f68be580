"""`sdlora-edge keys`: the keys that packets are signed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import signing
from .output import Json, emit

app = typer.Typer(no_args_is_help=True, help="Make the keys that packets are signed with.")


@app.callback()
def _group() -> None:
    pass


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="A plain word, such as factory.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.key (keep it secret) and NAME.pub.")] = Path("keys"),
    json: Json = False,
) -> None:
    """Make an Ed25519 key pair: NAME.key signs packets, NAME.pub goes into bundles."""
    private, public = signing.new_key(name, out)
    keyid = signing.load_public(public).keyid
    value = {"private": str(private), "public": str(public), "keyid": keyid}
    lines = f"private key: {private} (keep it secret, and a copy safe)\npublic key:  {public}\nits name in messages: {keyid}"
    emit(value, json, lambda: lines)
