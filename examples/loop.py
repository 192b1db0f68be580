"""The whole loop in Python: python examples/loop.py IMAGES NEW_IMAGES PHOTO

IMAGES and NEW_IMAGES hold a folder of images for each class. Everything is written into loop/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdlora_edge.export.packets import build_packets

from sdlora_edge import Device, Settings, add_task, export_bundle
from sdlora_edge.formats.signing import new_key
from sdlora_edge.train.loop import train


def main(settings: Settings, new_images: str, photo: str, out: Path) -> Device:
    # the workstation, once: train, make a key, export
    run = train(settings, out / "run")
    private, public = new_key("factory", out / "keys")
    export_bundle(run, out / "bundle", trust=[str(public)])

    # the device, once: flash it
    device = Device.init(out / "bundle", out / "store")
    print("with the bundle:", device.predict([photo])[0].top)

    # the workstation, every week: learn one more task, build its packet
    add_task(out / "run", new_images)
    build_packets(out / "run", out / "bundle", private, out=out / "packets")

    # the device, every week: apply what has come
    for packet in sorted((out / "packets").glob("*.sdlora")):
        device.apply(packet)  # raises, and changes nothing, if anything is wrong
    print("with the packet:", device.predict([photo], top=3)[0].top)
    return device


if __name__ == "__main__":
    images, new_images, photo = sys.argv[1:]
    main(Settings.of(data=images, tasks=2), new_images, photo, Path("loop"))
