"""Requests for activation that no TPM writes; what a TPM does is in `test_tpm_live`."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cutlayer.errors import AttestationError
from cutlayer.tee.tpm_activation import ActivationRequest, begin_activation
from cutlayer.tee.tpm_keys import parse_public
from cutlayer.tee.tpm_trust import key_pem
from tests.tpm_worlds import public_area, rsa_public_area
from tests.unit.tee.authorities import AT, rsa_key

_AES_128 = bytes.fromhex("000600800043")


@pytest.mark.parametrize("num_bits", [0, 8, 40, 512, 65535])
def test_a_size_of_cipher_that_does_not_exist_is_refused_by_name(num_bits: int) -> None:
    ek = rsa_public_area(rsa_key().public_key())
    ak = public_area(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert _AES_128 in ek
    changed = ek.replace(_AES_128, b"\0\x06" + num_bits.to_bytes(2, "big") + b"\0\x43")
    request = ActivationRequest(ek=changed, ak=ak)
    with pytest.raises(AttestationError) as caught:
        begin_activation(request, key_pem(parse_public(ek).key), AT)
    assert caught.value.refusal == "malformed"
