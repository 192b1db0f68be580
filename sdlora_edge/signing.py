"""Keys, thresholds and envelopes: who may update a device. securesystemslib does the cryptography (Ed25519, DSSE)."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key, Signature, SSlibKey

from . import files
from .canonical import dump_json, is_sha256, parse_json, sha256
from .errors import InputError, NothingToDo, TrustError, UsageError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

MAX_SIGNATURES = 16
_ORDER = 2**252 + 27742317777372353535851937790883648493
"""of Ed25519's group: RFC 8032 wants S below it, and not every verifier looks"""
PAYLOAD_TYPE = "application/vnd.sdlora-edge.packet+json"
KEY_FILE_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Trust:
    """The keys a device obeys, how many of them must have signed, and the version: each change of keys has a higher one."""

    keys: tuple[Key, ...]
    threshold: int
    version: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= max(1, len(self.keys)):
            raise InputError(f"trust: a threshold of {self.threshold} cannot be met by {len(self.keys)} keys")

    def to_dict(self) -> dict[str, Any]:
        return {"version": self.version, "threshold": self.threshold, "keys": {key.keyid: key.to_dict() for key in self.keys}}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Trust:
        """Raises InputError unless every key is Ed25519 and named by its own digest (so no key counts twice)."""
        try:
            keys = tuple(_public(keyid, entry) for keyid, entry in value["keys"].items())
            threshold, version = value["threshold"], value.get("version", 1)
            if (
                type(threshold) is not int
                or type(version) is not int
                or version < 1
                or set(value) - {"keys", "threshold", "version"}
            ):
                raise ValueError(f"threshold {threshold!r}, version {version!r}, or more than these")
            return cls(keys, threshold, version)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"trust.json does not hold keys and a threshold: {error!r}") from error


def _public(keyid: str, entry: dict[str, Any]) -> Key:
    key = SSlibKey.from_dict(keyid, dict(entry))
    if (key.keytype, key.scheme) != ("ed25519", "ed25519"):
        raise InputError(f"key {keyid[:12]}: {key.keytype}/{key.scheme} is not Ed25519")
    if not is_sha256(key.keyval["public"]):
        raise InputError(f"key {keyid[:12]}: an Ed25519 public key is 64 hexadecimal digits, lower case")
    if keyid != _keyid(key):
        raise InputError(f"key {keyid[:12]}: its name is not the digest of the key")
    return key


def _keyid(key: Key) -> str:
    return sha256(dump_json({"keytype": key.keytype, "scheme": key.scheme, "public": key.keyval["public"]}))


def new_key(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `<name>.key` (PKCS#8 PEM, mode 0600) and `<name>.pub` (JSON). Raises UsageError where one exists."""
    signer_class = _signer_class()
    if not name or name != Path(name).name or name.startswith("."):
        raise UsageError(f"key name {name!r}: use a plain word, such as factory")
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise UsageError(f"{path} exists already: choose another name (a key is never overwritten)")
    folder.mkdir(parents=True, exist_ok=True)
    signer = signer_class.generate_ed25519()
    keyid = _keyid(signer.public_key)
    files.write(private, signer.private_bytes, mode=0o600)
    files.write(public, dump_json({"keyid": keyid, **signer.public_key.to_dict()}) + b"\n")
    return private, public


def load_public(path: Path) -> Key:
    """A `.pub` file. Raises InputError."""
    value = parse_json(files.read(path, KEY_FILE_LIMIT), str(path))
    try:
        return _public(value.pop("keyid"), value)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a public key of ours: {error!r}") from error


def load_signer(path: Path) -> CryptoSigner:
    """A `.key` file. Raises InputError, UsageError where `cryptography` (extra `host`) is not installed."""
    signer_class = _signer_class()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(files.read(path, KEY_FILE_LIMIT), password=None)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not a private key in PEM form: {error}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(f"{path} is not an Ed25519 key: packets are signed with Ed25519 only")
    key = SSlibKey.from_crypto(private.public_key())
    return signer_class(private, SSlibKey(_keyid(key), key.keytype, key.scheme, key.keyval))


def _signer_class() -> type[CryptoSigner]:
    try:
        import cryptography  # noqa: F401
        from securesystemslib.signer import CryptoSigner
    except ImportError as error:
        raise UsageError("keys and signing need the host install: pip install 'sdlora-edge[host]'") from error
    return CryptoSigner


def find_key(name: str | None, suffix: str, folder: Path = Path("keys")) -> Path | None:
    """The key file meant by `name`: a path, or NAME for keys/NAME`suffix`; with no name, the only key in keys/, or None."""
    if name is not None:
        for path in (Path(name), folder / f"{name}{suffix}"):
            if path.is_file():
                return path
        raise InputError(f"no key {name!r}: neither a file of that name nor {folder / (name + suffix)} exists")
    found = sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []
    if len(found) > 1:
        option = "--key" if suffix == ".key" else "--trust"
        raise UsageError(f"{folder} holds several keys ({', '.join(p.stem for p in found)}): name the one you mean with {option}")
    return found[0] if found else None


def sign(payload: bytes, signers: list[CryptoSigner]) -> bytes:
    """A DSSE envelope around `payload`, as canonical JSON."""
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    for signer in signers:
        envelope.sign(signer)
    return dump_json(envelope.to_dict())


def countersign(envelope_json: bytes, signers: list[CryptoSigner]) -> bytes:
    """The same envelope with more signatures. Raises InputError where it is none, NothingToDo where a key has signed it."""
    envelope = _unverified(envelope_json)
    for signer in signers:
        if signer.public_key.keyid in envelope.signatures:
            raise NothingToDo(f"key {signer.public_key.keyid[:12]} has signed it already")
        envelope.sign(signer)
    return dump_json(envelope.to_dict())


def good_signatures(envelope_json: bytes, trust: Trust) -> int:
    """How many of the trusted keys have signed. Raises InputError where it is no envelope."""
    return len([key for key in trust.keys if _signed_by(envelope_json, key)])


def _signed_by(envelope_json: bytes, key: Key) -> bool:
    try:
        verify(envelope_json, Trust((key,), 1))
    except TrustError:
        return False
    return True


def unsigned(payload: bytes) -> bytes:
    """An envelope as large as one with a signature, for measuring: its signature is of zeros, and no device takes it."""
    empty = Signature("0" * 64, "0" * 128)
    return dump_json(Envelope(payload, PAYLOAD_TYPE, {empty.keyid: empty}).to_dict())


def verify(envelope_json: bytes, trust: Trust) -> bytes:
    """The payload of an envelope that enough trusted keys have signed; nothing in it is looked at before that.

    Raises InputError where it is no canonical envelope, TrustError where the signatures do not suffice.
    """
    value = parse_json(envelope_json, "the envelope")
    try:
        for signature in value["signatures"]:
            sig = base64.b64decode(signature["sig"])
            whole = len(sig) == 64 and int.from_bytes(sig[32:], "little") < _ORDER
            if set(signature) != {"keyid", "sig"} or not is_sha256(signature["keyid"]) or not whole:
                raise ValueError("a signature is not one of Ed25519, or carries more than itself")
        if not 1 <= len(value["signatures"]) <= MAX_SIGNATURES:
            raise ValueError(f"{len(value['signatures'])} signatures")
        envelope = Envelope.from_dict(value)
        canonical = dump_json(envelope.to_dict())
    except Exception as error:  # securesystemslib raises many kinds on malformed input
        raise InputError(f"the envelope is malformed: {error!r}") from error
    if canonical != envelope_json:
        raise InputError("the envelope is not in canonical form")
    if envelope.payload_type != PAYLOAD_TYPE:
        raise TrustError(f"signed for another purpose: {envelope.payload_type!r} is not {PAYLOAD_TYPE!r}")
    if not trust.keys:
        raise TrustError("this bundle trusts no key: flash the device with a bundle exported with --trust")
    try:
        envelope.verify(list(trust.keys), trust.threshold)
    except VerificationError as error:
        signed_by = ", ".join(sorted(k[:12] for k in envelope.signatures)) or "nobody"
        trusted = ", ".join(sorted(k.keyid[:12] for k in trust.keys))
        raise TrustError(
            f"signature refused: signed by {signed_by}, but {trust.threshold} good signature(s) of {trusted} are needed; "
            "sign it with more of these keys, or get an undamaged copy"
        ) from error
    return envelope.payload


def unverified_payload(envelope_json: bytes) -> bytes:
    """The payload of an envelope WITHOUT any check, for showing to a person. Raises InputError where there is none."""
    payload: bytes = _unverified(envelope_json).payload
    return payload


def unverified_keyids(envelope_json: bytes) -> list[str]:
    """Whose signatures an envelope claims to carry; none of them is checked. Raises InputError."""
    return sorted(keyid for keyid in _unverified(envelope_json).signatures if is_sha256(keyid))


def _unverified(envelope_json: bytes) -> Envelope:
    try:
        return Envelope.from_dict(parse_json(envelope_json, "the envelope"))
    except InputError:
        raise
    except Exception as error:  # securesystemslib raises many kinds on malformed input
        raise InputError(f"the envelope is malformed: {error!r}") from error
