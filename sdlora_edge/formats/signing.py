"""Key files and envelopes: who may update a device.

securesystemslib does the cryptography (Ed25519, DSSE).
"""

from __future__ import annotations

import base64
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signature, SSlibKey

from ..errors import InputError, NothingToDo, StorageError, TrustError, UsageError, naming
from ..shortage import verdict
from ..storage import atomic
from . import ed25519
from .canonical import dump_json, is_sha256, parse_exact_json
from .limits import LIMITS
from .trust import Trust as Trust
from .trust import key_name, public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import CryptoSigner

    Signers = Sequence[Path | str | CryptoSigner | Callable[[], CryptoSigner]]

log = logging.getLogger("sdlora_edge")
PAYLOAD_TYPE = "application/vnd.sdlora-edge.packet+json"
KEY_FILE_LIMIT = 64 * 1024
PASSPHRASE = "SDLORA_EDGE_PASSPHRASE"  # noqa: S105 - the name of a variable
SHORTEST, LONGEST = 12, 1023
"""Bytes of a passphrase. PKCS#8 as OpenSSL writes it slows guessing little, so it must not be
short. It takes no more than LONGEST."""


def new_key(name: str, folder: Path | str, passphrase: bytes | None = None) -> tuple[Path, Path]:
    """Write a new key pair: `<name>.key` (PKCS#8 PEM, mode 0600) and `<name>.pub` (JSON).

    Args:
        name: A plain word.
        folder: Made if it does not exist.
        passphrase: Encrypts the private key.

    Returns:
        (private, public): the two files.

    Raises:
        UsageError: One of the files exists, or the passphrase is too short or too long.
        StorageError: A file cannot be written.
        TrustError: Every user may write to the folder.
    """
    _signer_class()
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not name or name != Path(name).name or name.startswith("."):
        raise UsageError(f"key name {name!r}: use a plain word, such as factory")
    folder = Path(folder)
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise UsageError(
                f"{path} exists already: choose another name (a key is never overwritten)"
            )
    if passphrase is not None and not SHORTEST <= len(passphrase) <= LONGEST:
        raise UsageError(
            f"a passphrase of {len(passphrase)} bytes: use between {SHORTEST} and {LONGEST}"
        )
    secret = Ed25519PrivateKey.generate()
    cipher = pem.NoEncryption() if passphrase is None else pem.BestAvailableEncryption(passphrase)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise verdict(error, StorageError(f"{folder} cannot be made: {error.strerror}")) from error
    _refuse_shared(folder)
    atomic.write(
        private, secret.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, cipher), mode=0o600
    )
    key = _own(secret)
    atomic.write(public, dump_json({"keyid": key.keyid, **key.to_dict()}) + b"\n")
    return private, public


def load_public(path: Path) -> Key:
    """Read a `.pub` file. Raises InputError."""
    value = parse_exact_json(atomic.read(path, KEY_FILE_LIMIT), str(path))
    try:
        with naming(path):
            return public_key(value.pop("keyid"), value)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a public key of sdlora-edge: {error!r}") from error


def passphrase_from_environment(path: Path) -> bytes:
    """Return SDLORA_EDGE_PASSPHRASE. Raises UsageError if it is not set."""
    if not (found := os.environ.get(PASSPHRASE)):
        raise UsageError(
            f"{path} is encrypted: set {PASSPHRASE} to its passphrase, or use a terminal"
        )
    return os.fsencode(found)


def load_signer(
    path: Path, passphrase: Callable[[Path], bytes] = passphrase_from_environment
) -> CryptoSigner:
    """Read a `.key` file.

    Args:
        path: The file.
        passphrase: Called with the file's name if the file is encrypted.

    Raises:
        InputError: There is no such key, or the passphrase is wrong.
        TrustError: Other users may change it.
        UsageError: `cryptography` (extra `host`) is not installed.
    """
    signer_class = _signer_class()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = atomic.read(path, KEY_FILE_LIMIT)
    _refuse_shared(path.resolve().parent, path.parent, path)
    secret = passphrase(path) if b"BEGIN ENCRYPTED PRIVATE KEY" in data else None
    try:
        private = load_pem_private_key(data, secret)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        if secret is not None:
            raise InputError(
                f"{path} cannot be decrypted: give the right passphrase, or an undamaged copy "
                f"({error})"
            ) from error
        raise InputError(f"{path} is not a private key in PEM form: {error}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(f"{path} is not an Ed25519 key: packets are signed with Ed25519 only")
    return signer_class(private, _own(private))


def signers_of(keys: Signers) -> list[CryptoSigner]:
    """Load the keys that are `.key` files, and call those that are functions.

    Passphrases come from `passphrase_from_environment`.
    """
    return [
        load_signer(Path(key)) if isinstance(key, (str, Path)) else key() if callable(key) else key
        for key in keys
    ]


def _refuse_shared(*places: Path) -> None:
    """Refuse a file that every user may change, and a folder in which every user may replace one.

    Raises:
        TrustError: One of the places is such a file or folder.
    """
    for place in places if os.name == "posix" else ():
        with atomic.reading(place):
            mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
            raise TrustError(
                f"every user may write to {place}: run chmod o-w {place}, and make sure that the "
                "key is still yours"
            )
        if stat.S_ISREG(mode) and mode & 0o077:
            log.warning(
                "other users may read %s (mode %o): run chmod 600 %s",
                place,
                stat.S_IMODE(mode),
                place,
            )


def _own(private: Ed25519PrivateKey) -> SSlibKey:
    key = SSlibKey.from_crypto(private.public_key())
    return SSlibKey(key_name(key), key.keytype, key.scheme, key.keyval)


def _signer_class() -> type[CryptoSigner]:
    try:
        import cryptography  # noqa: F401
        from securesystemslib.signer import CryptoSigner
    except ImportError as error:
        raise UsageError(
            "keys and signing need the host install: pip install 'sdlora-edge[host]'"
        ) from error
    return CryptoSigner


def find_key(name: Path | str | None, suffix: str, folder: Path = Path("keys")) -> Path | None:
    """Find the key file that a user means.

    Args:
        name: A path, or NAME for keys/NAME`suffix`. None means the only key in `folder`.
        suffix: `.key` or `.pub`.
        folder: Where keys are by default.

    Returns:
        The file, or None if `name` is None and the folder holds no key.

    Raises:
        InputError: There is no such key.
        UsageError: `name` is None and the folder holds several keys.
    """
    if name is not None:
        for path in (Path(name), folder / f"{name}{suffix}"):
            if path.is_file():
                return path
        default = folder / f"{name}{suffix}"
        raise InputError(f"no key {str(name)!r}: neither a file of that name nor {default} exists")
    found = sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []
    if len(found) > 1:
        option = "--key" if suffix == ".key" else "--trust"
        raise UsageError(
            f"{folder} holds several keys ({', '.join(p.stem for p in found)}): name the one you "
            f"mean with {option}"
        )
    return found[0] if found else None


def sign(payload: bytes, signers: list[CryptoSigner]) -> bytes:
    """Return a DSSE envelope around `payload`, as canonical JSON."""
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    for signer in signers:
        envelope.sign(signer)
    return dump_json(envelope.to_dict())


def countersign(envelope_json: bytes, signers: list[CryptoSigner]) -> bytes:
    """Return the same envelope with more signatures.

    Raises:
        NothingToDo: A key has signed it already.
        InputError, TrustError: The envelope's form is wrong, as for `verify`.
    """
    envelope = _envelope(envelope_json)
    for signer in signers:
        if signer.public_key.keyid in envelope.signatures:
            raise NothingToDo(f"key {signer.public_key.keyid[:12]} has signed it already")
        envelope.sign(signer)
    signed = dump_json(envelope.to_dict())
    _envelope(signed)  # with one signature too many, no device would read it
    return signed


def good_signatures(envelope_json: bytes, trust: Trust) -> int:
    """Count the trusted keys that have signed. Raises what `verify` raises for a wrong form."""
    return len(list(_signed_by(_envelope(envelope_json), trust)))


def _signed_by(envelope: Envelope, trust: Trust) -> Iterator[Key]:
    """Yield the trusted keys that have signed. A wrong signature does no harm."""
    signed = envelope.pae()
    for key in trust.keys:
        signature = envelope.signatures.get(key.keyid)
        if signature and is_good(key, bytes.fromhex(signature.signature), signed):
            yield key


def is_good(key: Key, signature: bytes, signed: bytes) -> bool:
    """Tell whether these 64 bytes are a signature of `signed`, in its one canonical form.

    key: a sound one (`ed25519.is_key`).
    """
    # Without `cryptography`, securesystemslib would accept an R that is not canonical.
    if not is_whole(signature) or not ed25519.is_canonical(signature[:32]):
        return False
    with suppress(UnverifiedSignatureError):
        key.verify_signature(Signature(key.keyid, signature.hex()), signed)
        return True
    return False


def is_whole(signature: bytes) -> bool:
    """Tell whether these are the bytes of an Ed25519 signature: 64, the second half below L."""
    return len(signature) == 64 and int.from_bytes(signature[32:], "little") < ed25519.ORDER


def unsigned(payload: bytes) -> bytes:
    """Return an envelope as large as one with a signature, for measuring.

    Its signature is of zeros, so no device accepts it.
    """
    empty = Signature("0" * 64, "0" * 128)
    return dump_json(Envelope(payload, PAYLOAD_TYPE, {empty.keyid: empty}).to_dict())


def verify(envelope_json: bytes, trust: Trust) -> bytes:
    """Return the payload of an envelope that enough trusted keys have signed.

    Nothing in the payload is looked at before that.

    Raises:
        InputError: It is not a canonical envelope.
        TrustError: Signatures are missing.
    """
    envelope = _envelope(envelope_json)
    if not trust.keys:
        raise TrustError(
            "this bundle trusts no key: flash the device with a bundle exported with --trust"
        )
    if len(list(islice(_signed_by(envelope, trust), trust.threshold))) < trust.threshold:
        signed_by = ", ".join(sorted(k[:12] for k in envelope.signatures)) or "nobody"
        trusted = ", ".join(sorted(k.keyid[:12] for k in trust.keys))
        raise TrustError(
            f"signature refused: signed by {signed_by}, but {trust.threshold} good signature(s) of "
            f"{trusted} are needed; sign it with more of these keys, or get an undamaged copy"
        )
    payload: bytes = envelope.payload
    return payload


def _envelope(envelope_json: bytes) -> Envelope:
    """Read an envelope in its one canonical form. Its signatures are not verified.

    Raises:
        InputError: Its form is wrong.
        TrustError: It was signed for another purpose.
    """
    value = parse_exact_json(envelope_json, "the envelope")
    try:
        for signature in value["signatures"]:
            sig = base64.b64decode(signature["sig"])
            named = set(signature) == {"keyid", "sig"} and is_sha256(signature["keyid"])
            if not named or not is_whole(sig):
                raise ValueError("a signature is not one of Ed25519, or has more fields")
        if not 1 <= len(value["signatures"]) <= LIMITS.keys:
            raise ValueError(f"{len(value['signatures'])} signatures")
        envelope = Envelope.from_dict(value)
        canonical = dump_json(envelope.to_dict())
    except Exception as error:  # securesystemslib raises many kinds on malformed input
        raise verdict(error, InputError(f"the envelope is malformed: {error!r}")) from error
    if canonical != envelope_json:
        raise InputError("the envelope is not in canonical form")
    if envelope.payload_type != PAYLOAD_TYPE:
        raise TrustError(
            f"signed for another purpose: {envelope.payload_type!r} is not {PAYLOAD_TYPE!r}"
        )
    return envelope


def unverified_payload(envelope_json: bytes) -> bytes:
    """Return the payload of an envelope WITHOUT any check, for showing to a person.

    Raises:
        InputError: There is no envelope.
    """
    payload: bytes = _unverified(envelope_json).payload
    return payload


def unverified_keyids(envelope_json: bytes) -> list[str]:
    """Return whose signatures an envelope claims to have. None is checked. Raises InputError."""
    return sorted(keyid for keyid in _unverified(envelope_json).signatures if is_sha256(keyid))


def _unverified(envelope_json: bytes) -> Envelope:
    try:
        return Envelope.from_dict(parse_exact_json(envelope_json, "the envelope"))
    except InputError:
        raise
    except Exception as error:  # securesystemslib raises many kinds on malformed input
        raise verdict(error, InputError(f"the envelope is malformed: {error!r}")) from error
