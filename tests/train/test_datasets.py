"""Named datasets and domains: on small trees laid out as the published ones, and on real files."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_images, shared

from sdlora_edge.errors import InputError, UsageError
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.train import datasets, splits
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.source import SeedSplit, Source

PREPARE = Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3)
FACES = ("msu-mfsd", "casia-mfsd", "replay-attack", "oulu-npu")


def counts(source: Source) -> dict[str, tuple[int, int]]:
    return {c: (len(source.train[c]), len(source.test[c])) for c in source.classes}


def by_domain(source: Source) -> dict[str, dict[str, tuple[int, int]]]:
    """The counts of each domain's task, one task a domain."""
    parts = splits.parts(source, Settings().changed(protocol="domain", tasks=len(source.domains)))
    return {p.name: {c: (len(p.train[c]), len(p.test[c])) for c in p.classes} for p in parts}


def names(images: list[splits.ImageFile]) -> list[str]:
    return [Path(p.name).name for p in images]


def load(name: str, root: Path, seed: int = 0) -> Source:
    return splits.load(name, SeedSplit(0.2, seed), str(root))


def zipped(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path(folder.name) / path.relative_to(folder))


# ---- sets of class folders


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a"])
def test_the_imagenets_are_split_by_the_seed_or_as_the_authors_cut_them(
    tmp_path: Path, name: str
) -> None:
    make_images(tmp_path / name, ["n01443537", "n01484850"], 10)
    (tmp_path / name / "README.txt").write_text("n01443537 goldfish")
    source = load(name, tmp_path)
    assert source.name == name
    assert source.domains == ()
    assert counts(source) == {"n01443537": (8, 2), "n01484850": (8, 2)}
    for split, count in (("train", 4), ("test", 3)):
        make_images(tmp_path / "cut" / name / split, ["n01443537", "n01484850"], count)
    assert counts(load(name, tmp_path / "cut")) == {"n01443537": (4, 3), "n01484850": (4, 3)}


def test_caltech_is_read_without_its_background_and_in_any_case_of_letters(tmp_path: Path) -> None:
    make_images(tmp_path / "101_objectcategories", ["BACKGROUND_Google", "accordion", "Faces"], 5)
    assert counts(load("caltech101", tmp_path)) == {"Faces": (4, 1), "accordion": (4, 1)}


def test_pacs_has_a_class_of_all_domains_and_every_domain_has_test_images(tmp_path: Path) -> None:
    domains = ["art_painting", "cartoon", "photo", "sketch"]
    make_images(tmp_path / "PACS", [f"{d}/{c}" for d in domains for c in ("dog", "elephant")], 5)
    for extra in range(
        30
    ):  # so many sketches of dogs that a cut of the class alone would take hardly anything else
        (tmp_path / "PACS" / "sketch" / "dog" / f"x{extra}.png").write_bytes(
            (tmp_path / "PACS/sketch/dog/00.png").read_bytes()
        )
    source = load("pacs", tmp_path)
    assert source.domains == ("photo", "art_painting", "cartoon", "sketch")
    assert counts(source) == {"dog": (40, 10), "elephant": (16, 4)}
    assert Counter(p.domain for p in source.test["dog"]) == {
        "art_painting": 1,
        "cartoon": 1,
        "photo": 1,
        "sketch": 7,
    }
    zipped(tmp_path / "PACS", tmp_path / "zip.zip")
    (tmp_path / "z").mkdir()
    (tmp_path / "zip.zip").rename(tmp_path / "z" / "pacs_128px.zip")
    assert counts(load("pacs", tmp_path / "z")) == counts(source)


def test_a_missing_domain_is_named(tmp_path: Path) -> None:
    make_images(
        tmp_path / "PACS",
        [f"{d}/{c}" for d in ("art_painting", "photo") for c in ("dog", "elephant")],
        3,
    )
    with pytest.raises(
        InputError, match=r"art_painting, photo instead of .*cartoon.*PACS/<domain>/<class>/"
    ):
        load("pacs", tmp_path)


# ---- sets with lists


def domainnet(root: Path) -> Path:
    """Two classes in six domains, of four images: three on the training list, one on the other."""
    folder = root / "domainnet"
    for domain in datasets.DOMAINNET:
        make_images(folder / domain, ["axe", "zebra"], 4)
        lines = [
            f"{domain}/{c}/{i:02d}.png {label}"
            for label, c in enumerate(("axe", "zebra"))
            for i in range(4)
        ]
        (folder / f"{domain}_test.txt").write_text("\n".join(lines[3::4]) + "\n")
        (folder / f"{domain}_train.txt").write_text(
            "\r\n".join(line for i, line in enumerate(lines) if i % 4 != 3)
        )
    return folder


def test_domainnet_joins_its_domains_as_its_own_lists_say(tmp_path: Path) -> None:
    domainnet(tmp_path)
    source = load("domainnet", tmp_path)
    assert source.domains == ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    assert counts(source) == {"axe": (18, 6), "zebra": (18, 6)}
    assert {(p.domain, Path(p.name).name) for p in source.test["zebra"]} == {
        (d, "03.png") for d in source.domains
    }
    assert len(splits.decode(source.train, source.classes, PREPARE, need=True)) == 36


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("real/axe/00.png", "line 1 has 1 fields instead of 2"),
        ("../axe/00.png 0", "not an image in 2 folder"),
        ("/etc/passwd 0", "not an image in 2 folder"),
        ("real/00.png 0", "not an image in 2 folder"),
        ("nowhere/axe/00.png 0", "nowhere"),
    ],
)
def test_a_bad_line_of_a_list_is_a_typed_error(tmp_path: Path, line: str, message: str) -> None:
    (domainnet(tmp_path) / "real_train.txt").write_text(line)
    with pytest.raises(InputError, match=message):
        load("domainnet", tmp_path)


def test_a_missing_list_of_domainnet_is_named(tmp_path: Path) -> None:
    (domainnet(tmp_path) / "sketch_test.txt").unlink()
    with pytest.raises(InputError, match=r"sketch_test\.txt"):
        load("domainnet", tmp_path)


def cub(root: Path, flags: str = "10100") -> Path:
    folder = root / "CUB_200_2011"
    make_images(folder / "images", ["001.Black_footed_Albatross", "002.Laysan_Albatross"], 3)
    files = [
        "001.Black_footed_Albatross/00.png",
        "001.Black_footed_Albatross/01.png",
        "001.Black_footed_Albatross/02.png",
    ]
    files += ["002.Laysan_Albatross/00.png", "002.Laysan_Albatross/01.png"]
    (folder / "images.txt").write_text("".join(f"{i} {f}\n" for i, f in enumerate(files, 1)))
    (folder / "classes.txt").write_text("1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    (folder / "train_test_split.txt").write_text(
        "".join(f"{i} {flag}\n" for i, flag in enumerate(flags, 1))
    )
    return folder


def test_cub_keeps_its_own_split(tmp_path: Path) -> None:
    cub(tmp_path, "10110")
    source = load("cub200", tmp_path)
    assert counts(source) == {"001.Black_footed_Albatross": (2, 1), "002.Laysan_Albatross": (1, 1)}
    assert names(source.train["001.Black_footed_Albatross"]) == ["00.png", "02.png"]
    assert names(source.test["002.Laysan_Albatross"]) == ["01.png"]
    assert len(splits.decode(source.test, source.classes, PREPARE, need=True)) == 2


@pytest.mark.parametrize("flags", ["1011", "10112"])
def test_a_image_of_cub_that_is_in_no_split_is_an_error(tmp_path: Path, flags: str) -> None:
    cub(tmp_path, flags)
    with pytest.raises(InputError, match=r"image 5 .*train_test_split\.txt"):
        load("cub200", tmp_path)
    (cub(tmp_path / "other") / "classes.txt").write_text("1 001.Black_footed_Albatross\n")
    with pytest.raises(InputError, match=r"image 4 .*classes\.txt"):
        load("cub200", tmp_path / "other")


# ---- CIFAR-100


def cifar(root: Path) -> Path:
    """Ten training and four test images of two classes.

    Image i is (i, 2 i, 255 - i) everywhere except for a blue pixel in row 0, column 3.
    """
    folder = root / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    (folder / "coarse_label_names.txt").write_text("fruit\nfish\n")
    for split, count in (("train", 10), ("test", 4)):
        pixels = np.zeros((count, 3, 32, 32), np.uint8)
        index = np.arange(count)[:, None, None]
        pixels[:, 0], pixels[:, 1], pixels[:, 2] = index, 2 * index, 255 - index
        pixels[:, :, 0, 3] = (0, 0, 255)
        records = [bytes([9, i % 2]) + pixels[i].tobytes() for i in range(count)]
        (folder / f"{split}.bin").write_bytes(b"".join(records))
    return folder


def test_cifar_is_read_from_its_binary_version(tmp_path: Path) -> None:
    cifar(tmp_path)
    source = load("cifar100", tmp_path)
    assert counts(source) == {"apple": (5, 2), "aquarium_fish": (5, 2)}
    found = splits.decode(source.train, source.classes, PREPARE, need=True)
    assert found.targets.tolist() == [0] * 5 + [1] * 5
    assert found.pixels[6, 5, 5].tolist() == [
        3,
        6,
        252,
    ]  # the second image of the second class is record 3
    assert found.pixels[6, 0, 3].tolist() == [0, 0, 255]


def test_a_truncated_or_mislabelled_cifar_is_a_typed_error(tmp_path: Path) -> None:
    train = cifar(tmp_path) / "train.bin"
    whole = train.read_bytes()
    train.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"train\.bin is truncated"):
        load("cifar100", tmp_path)
    train.write_bytes(b"\0\x02" + whole[2:])
    with pytest.raises(InputError, match="image 0 is of class 2"):
        load("cifar100", tmp_path)
    train.unlink()
    with pytest.raises(InputError, match=r"train\.bin"):
        load("cifar100", tmp_path)


def test_the_pickled_cifar_is_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(
            f"cos\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode()
        )  # a pickle that makes a folder
    with pytest.raises(InputError, match="binary version"):
        load("cifar100", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_cifar_and_cub_may_be_class_folders(tmp_path: Path) -> None:
    for place in ("cifar100", "cub"):
        make_images(tmp_path / place / "train", ["a", "b"], 4)
        make_images(tmp_path / place / "test", ["a", "b"], 2)
    assert (
        counts(load("cifar100", tmp_path))
        == counts(load("cub200", tmp_path))
        == {"a": (4, 2), "b": (4, 2)}
    )


# ---- face anti-spoofing


def faces(root: Path, place: str, live: str, spoof: str) -> None:
    for split, count in (("train", 3), ("test", 2)):
        make_images(
            root / place / split,
            [f"{live}/client001", f"{spoof}/fixed/client001", f"{spoof}/hand/client001"],
            count,
        )


def test_faces_are_live_or_spoof_whatever_their_folders_are_called(tmp_path: Path) -> None:
    faces(tmp_path, "Replay-Attack", "real", "attack")
    make_images(tmp_path / "Replay-Attack", ["devel/real"], 1)
    source = load("replay-attack", tmp_path)
    assert counts(source) == {"live": (3, 2), "spoof": (6, 4)}
    assert source.domains == ("replay-attack",)
    assert {p.domain for side in (source.train, source.test) for c in side for p in side[c]} == {
        "replay-attack"
    }


def test_fas_is_the_four_sets_in_sequence(tmp_path: Path) -> None:
    for place, live, spoof in (
        ("MSU-MFSD", "real", "fake"),
        ("CASIA-FASD", "live", "spoof"),
        ("oulu_npu", "Live", "SPOOF"),
    ):
        faces(tmp_path, place, live, spoof)
    with pytest.raises(InputError, match=r"^replay-attack is not below .*idiap"):
        load("fas", tmp_path)
    faces(tmp_path, "replayattack", "real", "attack")
    source = load("fas", tmp_path)
    assert source.domains == FACES
    assert counts(source) == {"live": (12, 8), "spoof": (24, 16)}
    assert list(by_domain(source).values()) == [{"live": (3, 2), "spoof": (6, 4)}] * 4
    assert [name for name, named in datasets.SETS.items() if named.binary] == [*FACES, "fas"]


def test_a_face_set_without_live_test_frames_is_an_error(tmp_path: Path) -> None:
    make_images(tmp_path / "msu-mfsd", ["train/live", "train/spoof", "test/spoof"], 2)
    with pytest.raises(InputError, match="no images in test/live"):
        load("msu-mfsd", tmp_path)


# ---- what is missing


@pytest.mark.parametrize("name", datasets.NAMES)
def test_a_missing_set_says_where_to_get_it_and_how_it_must_lie(tmp_path: Path, name: str) -> None:
    missing = (datasets.SETS[name].parts or (name,))[0]
    for root in (tmp_path, tmp_path / "no such folder"):
        with pytest.raises(InputError) as caught:
            splits.load(name, SeedSplit(0.2, 0), str(root), kind=datasets.SETS[name].kind)
        named = datasets.SETS[missing]
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(missing)
        assert named.site.startswith("http")
        assert named.site in message
        assert named.layout in message
        assert str(root) in message
        assert "--data-root" in message


def test_a_folder_wins_where_it_is_written_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "pacs", ["a", "b"], 2)
    assert splits.load("./pacs", SeedSplit(0.5, 0)).classes == ("a", "b")
    make_images(tmp_path / "imagenet-r", ["n1", "n2"], 2)
    assert (
        splits.load("imagenet-r", SeedSplit(0.5, 0)).name == "imagenet-r"
    )  # no root: the folder one is in


def test_a_class_name_that_no_packet_could_carry_is_an_error(tmp_path: Path) -> None:
    (cifar(tmp_path) / "fine_label_names.txt").write_text("apple\n../fish\n")
    with pytest.raises(InputError, match="path separator"):
        load("cifar100", tmp_path)


# ---- domains of any folder


def test_the_outermost_folder_is_the_domain_and_the_rest_the_class(tmp_path: Path) -> None:
    folder = make_images(
        tmp_path / "p", ["day/dog", "day/cat/tabby", "night/dog", "night/cat/tabby"], 5
    )
    source = splits.load(str(folder), SeedSplit(0.2, 0), domains=True)
    assert source.domains == ("day", "night")
    assert counts(source) == {"cat.tabby": (8, 2), "dog": (8, 2)}
    assert sorted(p.domain for p in source.test["dog"]) == ["day", "night"]
    assert splits.load(str(folder), SeedSplit(0.2, 0)).classes == (
        "day.cat.tabby",
        "day.dog",
        "night.cat.tabby",
        "night.dog",
    )
    zipped(folder, tmp_path / "p.zip")
    assert counts(splits.load(str(tmp_path / "p.zip"), SeedSplit(0.2, 0), domains=True)) == counts(
        source
    )


def test_train_and_test_may_lie_around_the_domains(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        make_images(tmp_path / "p" / split, ["day/dog", "day/cat", "night/dog"], count)
    source = splits.load(str(tmp_path / "p"), SeedSplit(0.2, 0), domains=True)
    assert source.domains == ("day", "night")
    assert counts(source) == {"cat": (3, 2), "dog": (6, 4)}


def test_class_folders_without_domains_are_an_error(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["dog", "day/cat"], 3)
    with pytest.raises(InputError, match="<domain>/<class>/"):
        splits.load(str(folder), SeedSplit(0.2, 0), domains=True)
    for split in ("train", "test"):
        make_images(tmp_path / "q" / split, ["dog", "cat"], 3)
    with pytest.raises(InputError, match="<domain>/<class>/"):  # and train is no domain
        splits.load(str(tmp_path / "q"), SeedSplit(0.2, 0), domains=True)


def test_a_domains_task_has_the_classes_that_the_domain_has(tmp_path: Path) -> None:
    make_images(tmp_path / "p" / "train", ["day/dog", "day/cat", "night/dog"], 3)
    make_images(tmp_path / "p" / "test", ["day/dog", "night/dog", "night/cat"], 2)
    source = splits.load(str(tmp_path / "p"), SeedSplit(0.2, 0), domains=True)
    assert by_domain(source) == {"day": {"cat": (3, 0), "dog": (3, 2)}, "night": {"dog": (3, 2)}}
    (both,) = splits.parts(source, Settings().changed(protocol="domain", tasks=1))
    assert (both.name, both.domains, len(both.train["dog"])) == ("day+night", ("day", "night"), 6)
    with pytest.raises(UsageError, match="digits has 0 domain"):
        splits.parts(
            splits.load("digits", SeedSplit(0.3, 0)), Settings().changed(protocol="domain", tasks=2)
        )


# ---- the real files


def test_the_real_sets_open_by_name() -> None:
    root = shared("omniglot_small1.zip").parent
    omniglot = splits.load("omniglot", SeedSplit(0.3, 1993), str(root))
    assert len(omniglot.classes) == 136
    assert set(counts(omniglot).values()) == {(14, 6)}
    shared("caltech101_128px_max50.zip")
    caltech = load("caltech101", root)
    assert len(caltech.classes) == 101
    assert all(test >= 1 for _, test in counts(caltech).values())


def test_the_real_pacs_is_seven_classes_in_four_domains() -> None:
    source = load("pacs", shared("pacs_128px.zip").parent)
    assert source.classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    totals = {d: sum(map(sum, c.values())) for d, c in by_domain(source).items()}
    assert list(totals.items()) == [
        ("photo", 1670),
        ("art_painting", 2048),
        ("cartoon", 2344),
        ("sketch", 3929),
    ]
    assert all(test for c in by_domain(source).values() for _, test in c.values())
