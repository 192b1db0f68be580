"""What the command `label` asks for."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..fleet.extras import need
from ..formats.bundle import open_bundle
from ..inputs.modality import kind_in, kind_of, of_kind
from ..progress import stage
from ..train.folder import newest, require_begun
from .board import Written


@dataclass(frozen=True)
class Request:
    """The options of `label`. Without `run` and `bundle`, the model is that of the newest run."""

    folder: Path
    out: Path
    run: Path | None
    bundle: Path | None
    distance: float
    port: int


def sorted_by_hand(request: Request, tell: Callable[[str], object]) -> Written:
    """Serve the page until its user ends it. tell: gets lines for the user.

    Raises:
        UsageError: `out` exists, or a package is missing.
        InputError: The images, the run or the bundle cannot be read.
    """
    for package, extra in (("starlette", "fleet"), ("uvicorn", "fleet"), ("sklearn", "host")):
        need(package, extra)
    if request.out.exists():
        raise UsageError(f"--out {request.out} exists already: name a new folder")
    from . import eyes
    from .labelling import Place, serve

    run = request.run or (newest() if request.bundle is None else None)
    if run is not None:
        kind = kind_of(require_begun(run).backbone.backbone)
    else:
        assert request.bundle is not None
        kind = kind_in(open_bundle(request.bundle).manifest.preprocessing)
    paths = eyes.images_in(request.folder, kind)
    with stage(f"looking at {len(paths)} {of_kind(kind).noun}s"):
        if run is not None:
            seen = eyes.by_run(run, paths)
        else:
            assert request.bundle is not None
            seen = eyes.by_bundle(request.bundle, paths)
    for reason in seen.unread:
        tell(f"not used: {reason}")
    words = "sdlora-edge", "train", "--run", str(run or "RUN"), "--data", str(request.out)
    place = Place(request.out, shlex.join(words), request.port)
    return serve(seen, place, request.distance, lambda url: tell(f"label: open {url}"))
