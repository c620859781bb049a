"""A member's signature counts for that member alone, and only while its certificate does."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.identity.authority import approve, revoke
from cutlayer.identity.certificates import MemberKind
from cutlayer.identity.install import install
from cutlayer.identity.keys import load_key, save_key
from cutlayer.identity.request import request
from cutlayer.identity.revocation import install_revocations
from cutlayer.identity.signing import CertificateVerifier, KitSigner
from tests.unit.identity.conftest import Clock, Federation

_DATA = b"keys of round 3"


def _signer(folder: Path) -> KitSigner:
    return KitSigner(folder / "certificate.pem", folder / "key.pem")


def _verifier(folder: Path, clock: Clock | None = None) -> CertificateVerifier:
    files = folder / "authority.pem", folder / "revoked.pem"
    return CertificateVerifier(*files, now=clock) if clock else CertificateVerifier(*files)


def _check(verifier: CertificateVerifier, name: str, signer: KitSigner) -> None:
    verifier.verify(name, signer.certificate, _DATA, signer.sign(_DATA))


def test_other_members_accept_a_signature(federation: Federation) -> None:
    mercy, hope = federation.join("mercy"), federation.join("hope")
    _check(_verifier(hope), "mercy", _signer(mercy))


def test_rsa_keys_sign_as_well(federation: Federation, tmp_path: Path) -> None:
    folder, key_file = tmp_path / "rsa", tmp_path / "rsa-key.pem"
    save_key(key_file, rsa.generate_private_key(65537, 2048))
    asked = request(folder, "mercy", MemberKind.CLIENT, (), key_file)
    kit = approve(federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint)
    install(kit, folder, federation.authority.fingerprint)
    signer, verifier = KitSigner(folder / "certificate.pem", key_file), _verifier(folder)
    _check(verifier, "mercy", signer)
    with pytest.raises(PermissionRefused, match="not mercy's"):
        verifier.verify("mercy", signer.certificate, _DATA + b"!", signer.sign(_DATA))


def test_other_data_or_another_signature_is_refused(federation: Federation) -> None:
    mercy = federation.join("mercy")
    signer, verifier = _signer(mercy), _verifier(mercy)
    signature = signer.sign(_DATA)
    for data, forged in [(b"other", signature), (_DATA, b""), (_DATA, signature[:-1] + b"\0")]:
        with pytest.raises(PermissionRefused, match="forged or changed"):
            verifier.verify("mercy", signer.certificate, data, forged)


def test_a_signature_without_our_label_is_refused(federation: Federation) -> None:
    mercy = federation.join("mercy")
    key = load_key(mercy / "key.pem")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    bare = key.sign(_DATA, ec.ECDSA(SHA256()))
    with pytest.raises(PermissionRefused, match="forged"):
        _verifier(mercy).verify("mercy", _signer(mercy).certificate, _DATA, bare)


def test_another_members_certificate_is_refused(federation: Federation) -> None:
    mercy, hope = federation.join("mercy"), federation.join("hope")
    with pytest.raises(PermissionRefused, match="mercy showed the certificate of hope"):
        _check(_verifier(mercy), "mercy", _signer(hope))


def test_another_members_key_is_refused(federation: Federation) -> None:
    mercy, hope = federation.join("mercy"), federation.join("hope")
    signature = _signer(hope).sign(_DATA)
    with pytest.raises(PermissionRefused, match="not mercy's"):
        _verifier(mercy).verify("mercy", _signer(mercy).certificate, _DATA, signature)


def test_the_servers_own_certificate_signs_for_no_member(federation: Federation) -> None:
    server, mercy = federation.join("trunk", "server"), federation.join("mercy")
    with pytest.raises(PermissionRefused, match="lacks the role train"):
        _check(_verifier(mercy), "trunk", _signer(server))


def test_a_certificate_of_another_authority_is_refused(
    make_federation: Callable[[str], Federation],
) -> None:
    ours, theirs = make_federation("ours"), make_federation("theirs")
    mercy, false_mercy = ours.join("mercy"), theirs.join("mercy")
    with pytest.raises(PermissionRefused, match="not issued by this federation's authority"):
        _check(_verifier(mercy), "mercy", _signer(false_mercy))


def test_a_member_cannot_issue_for_others(federation: Federation) -> None:
    mercy, hope = federation.join("mercy"), federation.join("hope")
    verifier = CertificateVerifier(mercy / "certificate.pem")
    with pytest.raises(PermissionRefused, match="not issued"):
        _check(verifier, "hope", _signer(hope))


@pytest.mark.parametrize("certificate", [b"", b"no certificate", bytes(20_000)])
def test_what_is_no_certificate_is_refused(federation: Federation, certificate: bytes) -> None:
    mercy = federation.join("mercy")
    with pytest.raises(PermissionRefused, match="certificate"):
        _verifier(mercy).verify("mercy", certificate, _DATA, b"")


def test_an_expired_certificate_is_refused(federation: Federation, clock: Clock) -> None:
    mercy = federation.join("mercy", days=10)
    verifier, signer = _verifier(mercy, clock), _signer(mercy)
    _check(verifier, "mercy", signer)
    clock.offset = timedelta(days=11)
    with pytest.raises(PermissionRefused, match="not valid at this time"):
        _check(verifier, "mercy", signer)
    clock.offset = timedelta(days=-1)
    with pytest.raises(PermissionRefused, match="clock is wrong"):
        _check(verifier, "mercy", signer)


def test_a_revocation_counts_at_the_next_check(federation: Federation) -> None:
    mercy, hope = federation.join("mercy"), federation.join("hope")
    verifier, unaware = _verifier(hope), CertificateVerifier(hope / "authority.pem")
    _check(verifier, "mercy", _signer(mercy))
    revoke(federation.authority, "mercy")
    install_revocations(federation.authority.folder / "revoked.pem", hope)
    with pytest.raises(PermissionRefused, match="is revoked"):
        _check(verifier, "mercy", _signer(mercy))
    _check(unaware, "mercy", _signer(mercy))


def test_a_key_of_another_certificate_is_refused_at_once(federation: Federation) -> None:
    mercy, hope = federation.join("mercy"), federation.join("hope")
    with pytest.raises(ConfigError, match="not the private key of"):
        KitSigner(mercy / "certificate.pem", hope / "key.pem")


def test_missing_files_are_named(federation: Federation, tmp_path: Path) -> None:
    mercy = federation.join("mercy")
    with pytest.raises(StorageError, match=r"absent\.pem"):
        KitSigner(tmp_path / "absent.pem", mercy / "key.pem")
    with pytest.raises(StorageError, match=r"absent\.pem"):
        CertificateVerifier(mercy / "authority.pem", tmp_path / "absent.pem")
