"""The whole loop in Python: python examples/loop.py IMAGES NEW_IMAGES PHOTO

IMAGES and NEW_IMAGES hold a folder of images for each class. Everything is written into loop/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdlora_edge import Device, Settings, add_task, build_packets, export_bundle, new_key, train


def main(settings: Settings, new_images: str, photo: str, out: Path) -> Device:
    # the workstation, once: train, make a key, export
    run = train(settings, out / "run")
    private, public = new_key("factory", out / "keys")
    export_bundle(run, out / "bundle", trust=[str(public)])

    # the device, once: flash it
    device = Device.init(out / "bundle", out / "store")
    print("with the bundle:", device.predict(photo).top)

    # the workstation, every week: learn one more task, build its packet
    run = add_task(out / "run", new_images)
    packets = build_packets(run, out / "bundle", private, out=out / "packets")

    # the device, every week: apply what has come
    for packet in packets:
        device.apply(packet.file)  # raises, and changes nothing, if anything is wrong
    print("with the packet:", device.predict(photo, top=3).top)
    return device


if __name__ == "__main__":
    images, new_images, photo = sys.argv[1:]
    main(Settings.of(data=images, tasks=2), new_images, photo, Path("loop"))
