"""A chain is believed only if every link, flag, date and list of it holds at the asked time."""

from datetime import timedelta

import pytest
from cryptography import x509

from cutlayer.errors import AttestationError
from cutlayer.tee.certificate_chain import (
    check_chain,
    fingerprint,
    load_certificates,
    load_revocation_list,
    root_fingerprints,
)
from tests.unit.tee.authorities import AT, Authority, Wish, ec_key, issue, revocation_list

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def root() -> Authority:
    return issue("root", ec_key())


def chain_of(root: Authority, middle: Wish | None = None, leaf: Wish | None = None) -> list:
    between = issue("between", ec_key(), root, middle)
    end = issue("end", ec_key(), between, leaf or Wish(is_authority=False))
    return [end.certificate, between.certificate, root.certificate]


def check(chain: list[x509.Certificate], root: Authority, at=AT, lists=()) -> None:
    check_chain(
        chain,
        at=at,
        roots={fingerprint(root.certificate)},
        what="the test's chain",
        revocation_lists=[load_revocation_list(der, "crl") for der in lists],
    )


def refusal(chain: list[x509.Certificate], root: Authority, at=AT, lists=()) -> str:
    with pytest.raises(AttestationError) as caught:
        check(chain, root, at, lists)
    return caught.value.refusal


def test_a_good_chain_passes_in_pem_and_der(root: Authority) -> None:
    chain = chain_of(root, Wish(path_length=0))
    check(chain, root)
    assert load_certificates(root.der, "root") == load_certificates(root.pem, "root")
    assert root_fingerprints(root.pem) == {fingerprint(root.certificate)}


@pytest.mark.parametrize(
    ("middle", "what"),
    [
        (Wish(is_authority=False), "no authority"),
        (Wish(has_constraints=False), "no authority"),
        (Wish(may_sign=False), "may not sign"),
        (Wish(extensions={"1.2.3.4": b"\x05\x00"}, is_critical=True), "critical"),
    ],
)
def test_who_may_not_sign_is_no_link(root: Authority, middle: Wish, what: str) -> None:
    with pytest.raises(AttestationError, match=what) as caught:
        check(chain_of(root, middle), root)
    assert caught.value.refusal == "bad-chain"


def test_unknown_extensions_that_are_not_critical_pass(root: Authority) -> None:
    check(chain_of(root, Wish(extensions={"1.2.3.4": b"\x05\x00"})), root)


def test_a_path_longer_than_its_authority_allows_is_refused() -> None:
    short = issue("short", ec_key(), None, Wish(path_length=0))
    assert refusal(chain_of(short), short) == "bad-chain"


def test_a_certificate_of_another_chain_breaks_it(root: Authority) -> None:
    chain, other = chain_of(root), chain_of(root)
    assert refusal([other[0], *chain[1:]], root) == "bad-chain"
    assert refusal([chain[0], chain[2]], root) == "bad-chain"
    assert refusal(chain[::-1], root) == "bad-chain"
    assert refusal([], root) == "bad-chain"
    assert refusal([root.certificate] * 17, root) == "bad-chain"


def test_a_stranger_of_the_same_name_is_not_the_root(root: Authority) -> None:
    stranger = issue("root", ec_key())
    assert refusal(chain_of(stranger), root) == "wrong-root"


def test_a_chain_without_its_root_is_refused(root: Authority) -> None:
    assert refusal(chain_of(root)[:2], root) == "bad-chain"


def test_dates_are_those_of_the_verdict_not_of_a_clock(root: Authority) -> None:
    chain = chain_of(root, Wish(begin=AT - 3 * DAY, end=AT + 3 * DAY))
    check(chain, root, AT + 2 * DAY)
    assert refusal(chain, root, AT + 4 * DAY) == "expired"
    assert refusal(chain, root, AT - 4 * DAY) == "not-yet-valid"


def test_what_a_list_names_is_revoked_and_nothing_else(root: Authority) -> None:
    chain = chain_of(root, Wish(serial=77))
    check(chain, root, lists=[revocation_list(root, [76])])
    assert refusal(chain, root, lists=[revocation_list(root, [77])]) == "revoked"


def test_a_serial_counts_for_the_lists_of_its_own_issuer_alone(root: Authority) -> None:
    chain = chain_of(root, leaf=Wish(is_authority=False, serial=77))
    check(chain, root, lists=[revocation_list(root, [77])])


def test_old_and_foreign_lists_are_refused(root: Authority) -> None:
    chain, stranger = chain_of(root), issue("root", ec_key())
    old = revocation_list(root, [], AT - 9 * DAY)
    coming = revocation_list(root, [], AT + DAY)
    assert refusal(chain, root, lists=[old]) == "expired"
    assert refusal(chain, root, lists=[coming]) == "not-yet-valid"
    assert refusal(chain, root, lists=[revocation_list(stranger, [])]) == "bad-chain"


def test_a_chain_under_a_leaf_that_is_checked_elsewhere_counts_it(root: Authority) -> None:
    signer = issue("signer", ec_key(), root, Wish(path_length=0))
    roots = {fingerprint(root.certificate)}
    chain = [signer.certificate, root.certificate]
    check_chain(chain, at=AT, roots=roots, what="chain", num_below=1)
    with pytest.raises(AttestationError, match="stand 2 above"):
        check_chain(chain, at=AT, roots=roots, what="chain", num_below=2)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x30\x03\x02\x01\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"],
)
def test_what_is_no_certificate_is_malformed(data: bytes) -> None:
    for load in (load_certificates, load_revocation_list):
        with pytest.raises(AttestationError) as caught:
            load(data, "it")
        assert caught.value.refusal == "malformed"


def test_a_thousand_certificates_are_not_read(root: Authority) -> None:
    with pytest.raises(AttestationError, match="more than 16"):
        load_certificates(root.pem * 1000, "chain")


def test_a_name_cannot_write_lines_into_our_logs(root: Authority) -> None:
    forged = issue("x\nERROR all is well\x1b[2J" + "y" * 30, ec_key(), root)
    chain = [issue("end", ec_key(), forged).certificate, forged.certificate, root.certificate]
    with pytest.raises(AttestationError) as caught:
        check(chain, root, AT + 40 * DAY)
    assert str(caught.value).isprintable()
