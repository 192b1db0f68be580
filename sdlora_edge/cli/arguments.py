"""How every command spells what it works on, declared once.

The rule: what a command reads, shows or changes piece by piece is an argument (packets, images, the
folder that is watched, an adapter, the name of a key). The place where it works is an option with
one name everywhere: --run, --bundle, --store, --key, --after, --data, --out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..inputs.sizes import MAX_PIXELS, PILLOW_MAX_PIXELS
from .output import output

PASSPHRASE = "SDLORA_EDGE_PASSPHRASE"  # noqa: S105
"""The variable that `formats.signing` reads. Importing that module would slow down every --help."""
ENCODINGS = "fp32|fp16|int8|int4"
"""The encodings of `formats.encoding`, as usage lines show them."""

Run = Annotated[
    Optional[Path],
    typer.Option("--run", metavar="RUN", help="Folder of the run. Default: runs/latest."),
]
Bundle = Annotated[
    Path,
    typer.Option(
        "--bundle", metavar="BUNDLE", help="Folder of the bundle that devices start from."
    ),
]
Store = Annotated[
    Path, typer.Option("--store", metavar="STORE", help="Folder that holds the device's state.")
]
NewStore = Annotated[
    Path,
    typer.Option("--store", metavar="STORE", callback=output, help="New folder for the device."),
]
Keys = Annotated[
    Optional[list[str]],
    typer.Option(
        "--key",
        metavar="KEY",
        help="Private key to sign with: a file, or NAME for keys/NAME.key; repeat it for several. "
        "Default: the only one in keys/. The passphrase of an encrypted key is asked for, or taken "
        f"from {PASSPHRASE}.",
    ),
]
Trust = Annotated[
    Optional[list[str]],
    typer.Option(
        "--trust",
        metavar="PUBLIC_KEY",
        help="Public key to trust: a file, or NAME for keys/NAME.pub; repeat it for several. "
        "Default: the only one in keys/.",
    ),
]
After = Annotated[
    Optional[list[Path]],
    typer.Option(
        "--after",
        metavar="PACKET",
        help="Trust packet that the devices have applied; repeat it for several, in order.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="DATA", help="Folder or ZIP with a folder of images for each class."
    ),
]
Packet = Annotated[Path, typer.Argument(metavar="PACKET", help="File of the packet.")]
Packets = Annotated[list[Path], typer.Argument(metavar="PACKET", help="Files of the packets.")]
NewPacket = Annotated[
    Path, typer.Option("--out", metavar="PACKET", callback=output, help="File to write.")
]
MaxMegapixels = Annotated[
    int,
    typer.Option(
        "--max-megapixels",
        metavar="N",
        min=1,
        max=PILLOW_MAX_PIXELS // 10**6,
        help="Refuse images with more megapixels than this.",
    ),
]
RunMegapixels = Annotated[
    Optional[int],
    typer.Option(
        "--max-megapixels",
        metavar="N",
        min=1,
        max=PILLOW_MAX_PIXELS // 10**6,
        help="Skip images with more megapixels than this. Default: the run's setting.",
    ),
]
MEGAPIXELS = MAX_PIXELS // 10**6
Tolerance = Annotated[
    Optional[float],
    typer.Option(
        "--tolerance",
        metavar="X",
        min=0,
        help="Largest difference of a logit to torch. Default: the precision's.",
    ),
]
MinAgreement = Annotated[
    Optional[float],
    typer.Option(
        "--min-agreement",
        metavar="SHARE",
        min=0,
        max=1,
        help="Share of test images that get the same class as in torch. Default: the precision's.",
    ),
]
All = Annotated[bool, typer.Option("--all", help="Show every entry, not only a summary.")]
Provider = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="cpu|cuda|tensorrt|openvino|coreml|qnn",
        help="Execution provider of ONNX Runtime. Default: that of SDLORA_EDGE_ONNX_PROVIDER in "
        "the environment, else cpu.",
        show_default=False,
    ),
]
Unproved = Annotated[
    bool,
    typer.Option(
        "--unproved",
        help="Skip the canary check, on devices without the ExecuTorch Python runtime. "
        "The program that loads the model then runs the check.",
    ),
]
ACCESS = "Access"
TlsCert = Annotated[
    Optional[Path],
    typer.Option(metavar="FILE", rich_help_panel=ACCESS, help="Certificate of this server (PEM)."),
]
TlsKey = Annotated[
    Optional[Path],
    typer.Option(metavar="FILE", rich_help_panel=ACCESS, help="Its private key (PEM)."),
]
