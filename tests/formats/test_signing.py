"""Keys, thresholds, envelopes."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sdlora_edge.errors import InputError, LimitError, StorageError, TrustError, UsageError
from sdlora_edge.formats import signing
from sdlora_edge.formats.canonical import dump_json, sha256


def make(folder: Path, *names: str) -> tuple[list[Path], tuple[signing.Key, ...]]:
    pairs = [signing.new_key(name, folder) for name in names]
    return [private for private, _ in pairs], tuple(
        signing.load_public(public) for _, public in pairs
    )


def envelope(*keys: Path, payload: bytes = b'{"a":1}') -> bytes:
    return signing.sign(payload, [signing.load_signer(key) for key in keys])


def test_a_signed_payload_comes_back_and_the_key_is_private(tmp_path: Path) -> None:
    private, public = make(tmp_path, "factory")
    assert signing.verify(envelope(*private), signing.Trust(public, 1)) == b'{"a":1}'
    assert stat.S_IMODE(private[0].stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="never overwritten"):
        signing.new_key("factory", tmp_path)
    for name in ("", "../factory", "a/b", ".hidden"):
        with pytest.raises(UsageError, match="plain word"):
            signing.new_key(name, tmp_path / "more")


def test_unknown_key_and_too_few_signatures_are_refused(tmp_path: Path) -> None:
    private, public = make(tmp_path, "a", "b", "c")
    with pytest.raises(TrustError, match="signature refused"):
        signing.verify(envelope(private[2]), signing.Trust(public[:2], 1))
    with pytest.raises(TrustError, match="2 good"):
        signing.verify(envelope(private[0], private[2]), signing.Trust(public[:2], 2))
    assert signing.verify(envelope(*private[:2]), signing.Trust(public, 2))
    with pytest.raises(TrustError, match="trusts no key"):
        signing.verify(envelope(private[0]), signing.Trust((), 1))


def test_one_key_never_counts_twice(tmp_path: Path) -> None:
    private, public = make(tmp_path, "a")
    twice = json.loads(envelope(private[0]))
    twice["signatures"] *= 2
    with pytest.raises(InputError, match="malformed"):
        signing.verify(dump_json(twice), signing.Trust(public, 1))
    entry = public[0].to_dict()
    with pytest.raises(InputError, match="digest of the key"):
        signing.Trust.from_dict(
            {"version": 1, "threshold": 2, "keys": {public[0].keyid: entry, "ab" * 32: entry}}
        )
    with pytest.raises(InputError, match="cannot be met"):
        signing.Trust(public, 2)
    with pytest.raises(InputError, match="cannot be met"):
        signing.Trust(public, 0)


def test_a_payload_for_another_purpose_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = make(tmp_path, "a")
    with monkeypatch.context() as other:
        other.setattr(signing, "PAYLOAD_TYPE", "application/other")
        foreign = envelope(private[0])
    with pytest.raises(TrustError, match="another purpose"):
        signing.verify(foreign, signing.Trust(public, 1))


def test_verification_needs_no_cryptography(tmp_path: Path) -> None:
    """On a device securesystemslib verifies in pure Python: good ones pass, bad ones do not."""
    private, public = make(tmp_path, "a")
    (tmp_path / "good").write_bytes(envelope(private[0]))
    forged = json.loads(envelope(private[0]))
    forged["payload"] = "eyJhIjoyfQ=="
    (tmp_path / "forged").write_bytes(dump_json(forged))
    (tmp_path / "other").write_bytes(envelope(*make(tmp_path / "other keys", "b")[0]))
    (tmp_path / "trust.json").write_bytes(dump_json(signing.Trust(public, 1).to_dict()))
    program = """
import sys; sys.modules["cryptography"] = None
import json, pathlib
from sdlora_edge.formats import signing
from sdlora_edge.errors import SdloraError
folder = pathlib.Path(sys.argv[1])
trust = signing.Trust.from_dict(json.loads((folder / "trust.json").read_text()))
print(signing.verify((folder / "good").read_bytes(), trust))
for name in ("other", "forged"):
    try:
        signing.verify((folder / name).read_bytes(), trust)
    except SdloraError as error:
        print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["b'{\"a\":1}'", "TrustError", "TrustError"]


def test_only_ed25519_keys_are_taken(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    with pytest.raises(InputError, match="Ed25519"):
        signing.load_signer(tmp_path / "rsa.key")
    (tmp_path / "text.key").write_text("hello")
    with pytest.raises(InputError, match="PEM"):
        signing.load_signer(tmp_path / "text.key")
    (tmp_path / "endless.pub").write_bytes(bytes(signing.KEY_FILE_LIMIT + 1))
    with pytest.raises(LimitError):
        signing.load_public(tmp_path / "endless.pub")
    (tmp_path / "text.pub").write_text("{}")
    with pytest.raises(InputError, match="public key"):
        signing.load_public(tmp_path / "text.pub")


def test_find_key_takes_names_files_and_the_only_one(tmp_path: Path) -> None:
    assert signing.find_key(None, ".pub", tmp_path) is None
    make(tmp_path, "a")
    assert (
        signing.find_key(None, ".pub", tmp_path)
        == tmp_path / "a.pub"
        == signing.find_key("a", ".pub", tmp_path)
    )
    make(tmp_path, "b")
    with pytest.raises(UsageError, match="several"):
        signing.find_key(None, ".key", tmp_path)
    with pytest.raises(InputError, match="no key 'c'"):
        signing.find_key("c", ".key", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"keyid": 5},
        {"keyid": None},
        {"keyid": "\x1b[31m"},
        {"sig": "AAAA"},
        {"sig": 7},
        {"evil": {}},
    ],
)
def test_a_signature_carries_nothing_but_itself(tmp_path: Path, change: dict[str, object]) -> None:
    private, public = make(tmp_path, "a")
    value = json.loads(envelope(private[0]))
    value["signatures"][0] |= change
    with pytest.raises(InputError, match="malformed") as caught:
        signing.verify(dump_json(value), signing.Trust(public, 1))
    assert "\x1b" not in str(caught.value)


def test_a_signature_cannot_be_written_another_way(tmp_path: Path) -> None:
    """Ed25519 without the check S < L has a second valid form of every signature."""
    private, public = make(tmp_path, "a")
    value = json.loads(envelope(private[0]))
    good = base64.b64decode(value["signatures"][0]["sig"])
    scalar = int.from_bytes(good[32:], "little") + 2**252 + 27742317777372353535851937790883648493
    value["signatures"][0]["sig"] = base64.b64encode(
        good[:32] + scalar.to_bytes(32, "little")
    ).decode()
    with pytest.raises(InputError, match="Ed25519"):
        signing.verify(dump_json(value), signing.Trust(public, 1))


def test_many_signatures_and_a_key_written_another_way_are_refused(tmp_path: Path) -> None:
    private, public = make(tmp_path, "a")
    value = json.loads(envelope(private[0]))
    junk = [{"keyid": f"{i:064x}", "sig": value["signatures"][0]["sig"]} for i in range(16)]
    with pytest.raises(InputError, match="17 signatures"):
        signing.verify(
            dump_json({**value, "signatures": value["signatures"] + junk}), signing.Trust(public, 1)
        )
    entry = public[0].to_dict()
    upper = entry["keyval"]["public"].upper()
    for keytype, hexadecimal, word in (
        ("ed25519", upper, "lower case"),
        ("rsa", upper.lower(), "is not Ed25519"),
    ):
        other = {"keytype": keytype, "scheme": keytype, "keyval": {"public": hexadecimal}}
        named = sha256(dump_json({"keytype": keytype, "scheme": keytype, "public": hexadecimal}))
        with pytest.raises(InputError, match=word):  # else one key would stand under two names
            signing.Trust.from_dict(
                {"version": 1, "threshold": 2, "keys": {public[0].keyid: entry, named: other}}
            )
    for threshold in ("1", 1.5, True, None):
        with pytest.raises(InputError):
            signing.Trust.from_dict(
                {
                    "version": 1,
                    "threshold": threshold,
                    "keys": {public[0].keyid: public[0].to_dict()},
                }
            )
    for version in ("1", 1.5, True, None, 0):
        with pytest.raises(InputError):
            signing.Trust.from_dict(
                {"threshold": 1, "version": version, "keys": {public[0].keyid: entry}}
            )


def test_a_private_key_is_never_written_through_what_lay_there(tmp_path: Path) -> None:
    (tmp_path / "stolen").touch(mode=0o666)
    (tmp_path / ".tmp-k.key").symlink_to(tmp_path / "stolen")
    private, _ = signing.new_key("k", tmp_path)
    assert (tmp_path / "stolen").read_bytes() == b""
    assert not private.is_symlink()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_a_private_key_that_every_user_may_change_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor a key in a folder where every user may replace it, such as /tmp without sticky bit."""
    (key,), _ = make(tmp_path / "keys", "a")
    link = tmp_path / "links" / "a.key"
    link.parent.mkdir()
    link.symlink_to(key)
    assert signing.load_signer(link).public_key == signing.load_signer(key).public_key
    assert not caplog.records
    for changed, mode in ((key, 0o602), (key, 0o666), (key.parent, 0o777), (link.parent, 0o777)):
        good = stat.S_IMODE(changed.stat().st_mode)
        changed.chmod(mode)
        with pytest.raises(TrustError, match=r"every user may write to .*: run chmod o-w"):
            signing.load_signer(link)
        changed.chmod(good)
    key.parent.chmod(0o1777)
    signing.load_signer(link)
    assert not caplog.records
    for mode in (0o640, 0o604):
        key.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            signing.load_signer(key)
        assert f"chmod 600 {key}" in caplog.text


def test_new_keys_are_their_owners_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        private, _ = signing.new_key("a", tmp_path / "keys")
        (tmp_path / "open").mkdir()
    finally:
        os.umask(old)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (private, private.parent)] == [0o600, 0o700]
    with pytest.raises(TrustError, match="every user may write to"):
        signing.new_key("a", tmp_path / "open")
    assert not list((tmp_path / "open").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be made"):
        signing.new_key("a", tmp_path / "file")


def test_an_encrypted_key_opens_with_its_passphrase_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "grüne Brücken im Nebel".encode()
    private, public = signing.new_key("a", tmp_path, secret)
    assert private.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    signer = signing.load_signer(private, lambda path: secret)
    assert signer.public_key == signing.load_public(public)
    assert (
        signing.verify(signing.sign(b"{}", [signer]), signing.Trust((signer.public_key,), 1))
        == b"{}"
    )
    for wrong in (secret + b"x", b"", b"\0", b"x" * 5000):
        with pytest.raises(
            InputError, match=r"a\.key cannot be decrypted: give the right passphrase"
        ) as caught:
            signing.load_signer(private, lambda path, given=wrong: given)  # type: ignore[misc]
        assert "xx" not in str(caught.value)
    monkeypatch.delenv(signing.PASSPHRASE, raising=False)
    with pytest.raises(UsageError, match=f"a.key is encrypted: set {signing.PASSPHRASE}"):
        signing.load_signer(private)
    monkeypatch.setenv(signing.PASSPHRASE, secret.decode())
    assert signing.load_signer(private).public_key == signer.public_key
    private.write_bytes(private.read_bytes().replace(b"\nM", b"\nN", 1))
    with pytest.raises(InputError, match="or an undamaged copy"):
        signing.load_signer(private)
    for short in (b"", b"eleven char", bytes(1024)):
        with pytest.raises(UsageError, match="between 12 and 1023"):
            signing.new_key("b", tmp_path, short)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.key", "a.pub"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_key_that_openssl_encrypted_more_slowly_is_read(tmp_path: Path) -> None:
    """As SECURITY.md advises, for passphrases that people can remember."""
    (private,), (public,) = make(tmp_path, "a")
    command = [
        "openssl",
        "pkcs8",
        "-topk8",
        "-scrypt",
        "-in",
        str(private),
        "-out",
        str(tmp_path / "b.key"),
        "-passout",
        "env:P",
    ]
    subprocess.run(command, check=True, env={**os.environ, "P": "a good one"})
    assert signing.load_signer(tmp_path / "b.key", lambda path: b"a good one").public_key == public


def test_a_public_key_holds_nothing_else(tmp_path: Path) -> None:
    _, (key,) = make(tmp_path, "a")
    good = key.to_dict()
    for entry in (
        good | {"more": 1},
        good | {"keyid": key.keyid},
        good | {"keyval": good["keyval"] | {"private": ""}},
    ):
        with pytest.raises(InputError, match=f"key {key.keyid[:12]}: it has more fields than"):
            signing.Trust.from_dict({"version": 1, "threshold": 1, "keys": {key.keyid: entry}})
        (tmp_path / "b.pub").write_bytes(dump_json({**entry, "keyid": key.keyid}))
        if "keyid" not in entry:  # that is where a .pub file has it
            with pytest.raises(InputError, match=r"b.pub: key .* more fields than"):
                signing.load_public(tmp_path / "b.pub")
    for entry in (
        {},
        [],
        None,
        "ed25519",
        good | {"keyval": []},
        good | {"keyval": {"public": 5}},
        {"keyval": good["keyval"]},
    ):
        with pytest.raises(InputError):
            signing.Trust.from_dict({"version": 1, "threshold": 1, "keys": {key.keyid: entry}})
    many = {f"{number:064x}": good for number in range(17)}
    with pytest.raises(InputError, match="17 keys"):
        signing.Trust.from_dict({"version": 1, "threshold": 1, "keys": many})
    with pytest.raises(InputError, match="17 keys"):
        signing.Trust((key,) * 17, 1)
