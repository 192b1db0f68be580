"""Write the test vectors of docs/packet.md, the same bytes every time: make vectors.

bundles/NAME/           what devices are flashed with
packets/NAME.sdlora     what they are given
images/                 an image, and the tensors that a model gets of it
vectors.json            the packets of each device in order, its exit codes, and its states

network.py holds the model and the runs, book.py what packets are made with, lives.py and faults.py
the vectors, images.py the images, texts.py the texts.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from book import Book
from faults import content, form, signatures
from images import write as write_images
from lives import bounds, bundles, changes, exports, keys, order, tasks, texts
from texts import write as write_texts

from sdlora_edge.formats.container import FORMAT
from sdlora_edge.formats.packet import SUFFIX


def main(folder: Path) -> None:
    """Into this folder; what was there of vectors goes."""
    book = Book(exports())
    for write in (tasks, texts, changes, bundles, order, keys, bounds, signatures, form, content):
        write(book)
    for name in ("bundles", "packets", "images"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "packets").mkdir(parents=True)
    for name, export in book.exports.items():
        export.write(folder / "bundles" / name)
    for name, data in book.packets.items():
        (folder / "packets" / f"{name}{SUFFIX}").write_bytes(data)
    images = write_images(folder / "images")
    (folder / "vectors.json").write_text(index(book, images, write_texts()))


def index(book: Book, images: list[dict[str, Any]], texts: list[dict[str, Any]]) -> str:
    """JSON, a line for each step and each state: what changes can be seen in a diff."""
    vectors = []
    for v in book.vectors:
        steps = ",\n".join(f"    {json.dumps(step)}" for step in v.steps)
        about = json.dumps({"name": v.name, "about": v.about, "bundle": v.bundle})[:-1]
        vectors.append(f'  {about}, "steps": [\n{steps}\n  ]}}')
    states = [f'  "{digest}": {json.dumps(state)}' for digest, state in book.states.items()]
    shown = [f"  {json.dumps(image)}" for image in images]
    read = [f"  {json.dumps(batch)}" for batch in texts]
    vectors, states, images, texts = (",\n".join(lines) for lines in (vectors, states, shown, read))
    return (
        f'{{"format": "{FORMAT}",\n "vectors": [\n{vectors}\n ],\n "states": {{\n{states}\n }},\n'
        f' "images": [\n{images}\n ],\n "texts": [\n{texts}\n ]}}\n'
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
