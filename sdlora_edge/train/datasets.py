"""Named datasets: where to get each, how to lay it out below the data root, and how it is read.

Nothing is downloaded: most of these datasets ask for an agreement, and all have a site of their
own. A dataset that its authors have split keeps that split; the seed splits the others. A dataset
of your own needs no name: give its folder or ZIP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..errors import InputError
from ..formats.packet import name_problem
from ..inputs.image_files import open_image
from ..inputs.modality import IMAGE, TEXT
from ..storage import atomic
from .files import shown
from .images import ImageFile, image_files, images_in
from .items import Item
from .source import SeedSplit, Source, source_of
from .texts import texts_in

log = logging.getLogger("sdlora_edge")
Split = dict[str, list[Item]]
"""Images under "train" and "test", or all under "" if the dataset has no split of its own."""
Reader = Callable[[Path], Split]

LIVE, SPOOF = "live", "spoof"
_KINDS = dict.fromkeys(("live", "real", "genuine", "bonafide"), LIVE) | dict.fromkeys(
    ("spoof", "attack", "fake"), SPOOF
)
_LIST_LIMIT = 1 << 26
_CIFAR_SIDE = 32
_CIFAR_RECORD = 2 + 3 * _CIFAR_SIDE**2
"""Bytes of an image: coarse label, fine label, then all red, all green, all blue."""


@dataclass(frozen=True)
class NamedSet:
    """How a dataset is found and read.

    Attributes:
        site: Where its authors offer it.
        layout: What must lie below the data root.
        places: Names of folders or ZIP files below the root, in upper or lower case, each with its
            reader. The first one that exists is read.
        domains: In the order in which they are learned.
        parts: The datasets that it is made of, instead of places.
        binary: True if its classes are live and spoof, which HTER scores.
        kind: Of its items.
    """

    site: str
    layout: str
    places: Mapping[str, Reader] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    binary: bool = False
    kind: str = IMAGE


def load(name: str, root: Path, split: SeedSplit) -> Source:
    """Open the dataset `name`, one of NAMES, below `root`. Its source is called `name` too.

    Raises:
        InputError: if it is missing, incomplete or damaged. The message says where to get it and
            how to lay it out.
    """
    named = SETS[name]
    by_split: Split = {}
    for part in named.parts or (name,):
        for side, images in _read(part, root).items():
            by_split.setdefault(side, []).extend(images)
    everything = [image for images in by_split.values() for image in images if not image.problem]
    for label in {image.label for image in everything}:
        if problem := name_problem(label):
            raise InputError(
                f"{name}: the class name {label!r} {problem}: get the dataset again at {named.site}"
            )
    found = {image.domain for image in everything if image.domain}
    if named.domains and found != set(named.domains):
        have, want = (", ".join(sorted(domains)) for domains in (found, named.domains))
        raise InputError(
            f"{name} has the domains {have} instead of {want}: lay it out as {named.layout}"
        )
    return source_of(name, by_split, split, named.domains)


def _texts(inner: str, domain: str, path: Path) -> Split:
    """A folder of tables inside `path`, as texts of one domain."""
    found = texts_in(path / inner)
    return {side: [replace(item, domain=domain) for item in own] for side, own in found.items()}


def _read(name: str, root: Path) -> Split:
    named = SETS[name]
    try:
        there = {path.name.casefold(): path for path in root.iterdir()}
    except OSError:
        there = {}
    for place, read in named.places.items():
        if path := there.get(place.casefold()):
            return read(path)
    raise InputError(
        f"{name} is not below the data root {root.resolve()}: get it at {named.site},"
        f" lay it out as {named.layout}, and name the folder that holds it with --data-root"
    )


def _lines(path: Path, columns: int) -> Iterator[list[str]]:
    """Yield the fields of each line of a list; blanks separate them.

    Raises:
        InputError: if a line has another number of fields than `columns`.
    """
    try:
        text = atomic.read(path, _LIST_LIMIT).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: get it again") from error
    for number, line in enumerate(text.split("\n"), 1):
        row = line.split()
        if row and len(row) != columns:
            raise InputError(
                f"{path}: line {number} has {len(row)} fields instead of {columns}:"
                " get the list again"
            )
        if row:
            yield row


def _listed(path: Path, name: str, depth: int) -> PurePosixPath:
    """Return an image's relative path in a list. Raises InputError unless it has `depth` parts."""
    found = PurePosixPath(name)
    if len(found.parts) != depth or found.is_absolute() or ".." in found.parts:
        raise InputError(
            f"{path} names {name!r}, not an image in {depth - 1} folder(s): get the list again"
        )
    return found


def _domainnet(path: Path) -> Split:
    """Read DomainNet's lists <domain>_train.txt and <domain>_test.txt.

    Each line is "domain/class/image label".
    """
    by_split: Split = {"train": [], "test": []}
    for domain in DOMAINNET:
        for split, images in by_split.items():
            listed = path / f"{domain}_{split}.txt"
            for name, _ in _lines(listed, 2):
                relative = _listed(listed, name, 3)
                file = str(path / relative)
                images.append(
                    ImageFile(file, relative.parts[1], partial(open_image, file), relative.parts[0])
                )
    return by_split


def _cub(path: Path) -> Split:
    """Read CUB's split.

    images.txt numbers the images; train_test_split.txt has 1 for training and 0 for testing.
    """
    side = {
        number: {"1": "train", "0": "test"}.get(flag)
        for number, flag in _lines(path / "train_test_split.txt", 2)
    }
    classes = {name for _, name in _lines(path / "classes.txt", 2)}
    by_split: Split = {"train": [], "test": []}
    for number, name in _lines(path / "images.txt", 2):
        label = _listed(path / "images.txt", name, 2).parts[0]
        if not (split := side.get(number)) or label not in classes:
            raise InputError(
                f"{path}: image {number} of images.txt is missing from train_test_split.txt or"
                " classes.txt: get the dataset again"
            )
        file = str(path / "images" / name)
        by_split[split].append(ImageFile(file, label, partial(open_image, file)))
    return by_split


def _cifar(path: Path) -> Split:
    """Read CIFAR-100's binary version. The Python version holds pickles, which can run any code."""
    names = [name for (name,) in _lines(path / "fine_label_names.txt", 1)]
    return {split: list(_cifar_images(path / f"{split}.bin", names)) for split in ("train", "test")}


def _cifar_images(path: Path, names: list[str]) -> Iterator[ImageFile]:
    try:
        records = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if not records.size or records.size % _CIFAR_RECORD:
        raise InputError(
            f"{path} is truncated: {records.size} bytes are not a multiple of {_CIFAR_RECORD}:"
            " get it again"
        )
    for index, label in enumerate(records.reshape(-1, _CIFAR_RECORD)[:, 1].tolist()):
        if label >= len(names):
            raise InputError(
                f"{path}: image {index} is of class {label}, but fine_label_names.txt has"
                f" {len(names)} names: get it again"
            )
        yield ImageFile(f"{path}, image {index}", names[label], partial(_cifar_image, path, index))


def _cifar_image(path: Path, index: int) -> Image.Image:
    with open(path, "rb") as file:
        file.seek(index * _CIFAR_RECORD + 2)
        pixels = np.frombuffer(file.read(_CIFAR_RECORD - 2), np.uint8)
    if pixels.size != _CIFAR_RECORD - 2:
        raise OSError("the file is shorter than when it was opened")
    return Image.fromarray(
        np.ascontiguousarray(pixels.reshape(3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(1, 2, 0))
    )


def _caltech(path: Path) -> Split:
    """Read all images but those of BACKGROUND_Google, which are of no class."""
    return {
        split: [p for p in found if p.label != "BACKGROUND_Google"]
        for split, found in images_in(path).items()
    }


def _frames(domain: str, path: Path) -> Split:
    """Read frames of faces in {train,test}/{live,spoof}/ and any folders below.

    Synonyms of live and spoof, such as real and attack, stand in `_KINDS`.
    """
    by_split: Split = {"train": [], "test": []}
    for file in image_files(path):
        split, *folders = [part.casefold() for part in file.path.parts[:-1]] or [""]
        kind = next((_KINDS[part] for part in folders if part in _KINDS), "")
        problem = file.problem or (
            "" if kind and split in by_split else "outside {train,test}/{live,spoof}"
        )
        image = ImageFile(shown(f"{path}/{file.path}"), kind, file.open, domain, problem)
        by_split.get(split, by_split["train"]).append(image)
    for split, images in by_split.items():
        if lacking := {LIVE, SPOOF} - {image.label for image in images if not image.problem}:
            lacks = f"{split}/{min(lacking)}"
            raise InputError(
                f"{domain}: {path} has no images in {lacks}:"
                f" lay its frames out as {SETS[domain].layout}"
            )
    return by_split


def _antispoofing(name: str, site: str, *places: str) -> NamedSet:
    """Declare a dataset of videos, of which the frames have been extracted."""
    layout = (
        f"{name}/{{train,test}}/{{live,spoof}}/ with the frames of its videos in any folders below"
    )
    return NamedSet(
        site, layout, dict.fromkeys((name, *places), partial(_frames, name)), (name,), binary=True
    )


_by_domain: Reader = partial(images_in, domains=True)
DOMAINNET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
FACES = {
    "msu-mfsd": _antispoofing(
        "msu-mfsd", "https://sites.google.com/site/huhanhomepage/download", "msu_mfsd"
    ),
    "casia-mfsd": _antispoofing(
        "casia-mfsd",
        "http://www.cbsr.ia.ac.cn/english/FaceAntiSpoofDatabases.asp",
        "casia_mfsd",
        "casia-fasd",
    ),
    "replay-attack": _antispoofing(
        "replay-attack",
        "https://www.idiap.ch/en/scientific-research/data/replayattack",
        "replay_attack",
        "replayattack",
    ),
    "oulu-npu": _antispoofing(
        "oulu-npu", "https://sites.google.com/site/oulunpudatabase", "oulu_npu"
    ),
}
CL_SITE = "https://github.com/cmnfriend/O-LoRA"
STANDARD_CL = (
    ("dbpedia", "amazon", "yahoo", "agnews"),
    ("dbpedia", "amazon", "agnews", "yahoo"),
    ("yahoo", "amazon", "agnews", "dbpedia"),
)
"""orders 1 to 3 of Wang et al., "Orthogonal Subspace Learning" (O-LoRA), EMNLP 2023"""
CL_SETS = {
    name: NamedSet(
        CL_SITE,
        f"CL_Benchmark/{group}/{name}/{{train,test}}.json or {name}/{{train,test}}.csv",
        {"CL_Benchmark": partial(_texts, f"{group}/{name}", name), name: partial(_texts, "", name)},
        kind=TEXT,
    )
    for group, names in (("SC", ("amazon", "yelp")), ("TC", ("agnews", "dbpedia", "yahoo")))
    for name in names
}
SETS: dict[str, NamedSet] = {
    "imagenet-r": NamedSet(
        "https://github.com/hendrycks/imagenet-r",
        "imagenet-r/<class>/ or imagenet-r/{train,test}/<class>/",
        dict.fromkeys(("imagenet-r", "imagenetr", "imagenet-r.zip"), images_in),
    ),
    "imagenet-a": NamedSet(
        "https://github.com/hendrycks/natural-adv-examples",
        "imagenet-a/<class>/ or imagenet-a/{train,test}/<class>/",
        dict.fromkeys(("imagenet-a", "imageneta", "imagenet-a.zip"), images_in),
    ),
    "domainnet": NamedSet(
        "https://ai.bu.edu/M3SDA",
        "domainnet/<domain>/<class>/ with domainnet/<domain>_train.txt and"
        " domainnet/<domain>_test.txt",
        {"domainnet": _domainnet},
        DOMAINNET,
    ),
    "cifar100": NamedSet(
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar-100-binary/{train.bin,test.bin,fine_label_names.txt} (the binary version, not that"
        " for Python) or cifar100/{train,test}/<class>/",
        {"cifar-100-binary": _cifar}
        | dict.fromkeys(("cifar100", "cifar-100", "cifar100.zip"), images_in),
    ),
    "cub200": NamedSet(
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        "CUB_200_2011/{images/,images.txt,train_test_split.txt,classes.txt} or"
        " cub200/{train,test}/<class>/",
        {"CUB_200_2011": _cub} | dict.fromkeys(("cub200", "cub", "cub200.zip"), images_in),
    ),
    "caltech101": NamedSet(
        "https://data.caltech.edu/records/mzrjq-6wc02",
        "101_ObjectCategories/<class>/, a ZIP of it, or caltech101/<class>/",
        dict.fromkeys(
            (
                "101_ObjectCategories",
                "101_ObjectCategories.zip",
                "caltech101",
                "caltech101.zip",
                "caltech101_128px_max50.zip",
            ),
            _caltech,
        ),
    ),
    "omniglot": NamedSet(
        "https://github.com/brendenlake/omniglot",
        "images_background_small1.zip or images_background_small1/<alphabet>/<character>/"
        " (or images_background, the complete dataset)",
        dict.fromkeys(
            (
                *("omniglot", "omniglot.zip", "images_background", "images_background.zip"),
                *(
                    "images_background_small1",
                    "images_background_small1.zip",
                    "omniglot_small1.zip",
                ),
            ),
            images_in,
        ),
    ),
    "pacs": NamedSet(
        "https://domaingeneralization.github.io",
        "PACS/<domain>/<class>/ or a ZIP of it",
        dict.fromkeys(("PACS", "PACS.zip", "pacs_128px.zip"), _by_domain),
        ("photo", "art_painting", "cartoon", "sketch"),
    ),
    **CL_SETS,
    **{
        f"standard-cl-{number}": NamedSet(
            CL_SITE,
            "CL_Benchmark/{TC/{agnews,dbpedia,yahoo},SC/amazon}/{train,test}.json or"
            " {agnews,dbpedia,yahoo,amazon}/{train,test}.csv",
            domains=order,
            parts=order,
            kind=TEXT,
        )
        for number, order in enumerate(STANDARD_CL, 1)
    },
    **FACES,
    "fas": NamedSet(
        "the sites of its four sets",
        "{msu-mfsd,casia-mfsd,replay-attack,oulu-npu}/{train,test}/{live,spoof}/",
        domains=tuple(FACES),
        parts=tuple(FACES),
        binary=True,
    ),
}
NAMES: tuple[str, ...] = tuple(SETS)
