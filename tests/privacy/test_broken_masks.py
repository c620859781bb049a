"""Every mask that the settings refuse, built as its advocates build it, and broken.

The victim sends rows of a public embedding; the attacker sees what an accelerator sees, and the
public weights. A last test runs the same attacks on the one-time pad, where all of them fail.

Shapes: N = tokens, V = vocabulary, D = hidden size.
"""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cutlayer.model.checkpoint import load_part
from cutlayer.model.partition import Cut, Part
from cutlayer.tee.masked.broken import BROKEN_SCHEMES
from cutlayer.tee.masked.field import PRIME, centred, residues
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.online import OFFSET
from cutlayer.tee.masked.settings import MaskedSettings
from tests.masked_worlds import HostileAccelerator, masked, pooled_place
from tests.tiny_models import tiny_model

NUM_TOKENS, WIDTH, VOCABULARY = 64, 96, 256
LEVEL = 1000.0


@pytest.fixture(scope="module")
def embedding_VD(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    folder, _ = tiny_model("llama", tmp_path_factory.mktemp("model"), hidden_size=WIDTH)
    head = load_part(folder, Cut(1, 2), Part.HEAD)
    return head.base.get_input_embeddings().weight.detach()[:VOCABULARY].double()


@pytest.fixture
def tokens_N() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)


@pytest.fixture
def weight_OD() -> Tensor:
    return torch.randn(80, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def _nearest(seen_ND: Tensor, embedding_VD: Tensor) -> Tensor:
    return torch.cdist(seen_ND, embedding_VD).argmin(dim=1)


def _share(guessed_N: Tensor, tokens_N: Tensor) -> float:
    return float((guessed_N == tokens_N).double().mean())


def _levels(embedding_VD: Tensor) -> Tensor:
    return (embedding_VD / embedding_VD.abs().max() * LEVEL).round().to(torch.int64)


def _secret(*shape: int) -> Tensor:
    return torch.randint(PRIME, shape, dtype=torch.int64)


def test_two_messages_under_one_pad_give_each_other_away(
    embedding_VD: Tensor, tokens_N: Tensor
) -> None:
    levels_VD, pad_D = _levels(embedding_VD), _secret(WIDTH)
    seen_ND = residues(levels_VD[tokens_N] + pad_D)
    # One token is known: a chat template begins every row.
    gaps_ND = centred(residues(seen_ND.to(torch.int64) - seen_ND[0]))
    guessed_N = _nearest((gaps_ND + levels_VD[tokens_N[0]]).double(), levels_VD.double())
    assert _share(guessed_N, tokens_N) == 1.0


def test_pads_from_a_fixed_basis_hide_only_their_span(
    embedding_VD: Tensor, tokens_N: Tensor
) -> None:
    basis_RD = torch.randn(16, WIDTH).double() * 100
    pads_ND = torch.randn(NUM_TOKENS, 16).double() @ basis_RD
    seen_ND = embedding_VD[tokens_N] + pads_ND
    # Strong directions of what is seen are the basis; what is orthogonal to it is the text's own.
    _, _, directions = torch.linalg.svd(seen_ND, full_matrices=True)
    rest_DE = directions[16:].mT
    guessed_N = _nearest(seen_ND @ rest_DE, embedding_VD @ rest_DE)
    assert _share(guessed_N, tokens_N) > 0.95


def test_a_rotation_is_read_off_the_rotated_public_weights(
    embedding_VD: Tensor, tokens_N: Tensor, weight_OD: Tensor
) -> None:
    rotation_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH).double())[0]
    seen_ND, given_OD = embedding_VD[tokens_N] @ rotation_DD, weight_OD @ rotation_DD
    # Two public layers have more rows than the rotation has columns.
    more_OD = torch.randn(80, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    public, rotated = torch.cat([weight_OD, more_OD]), torch.cat([given_OD, more_OD @ rotation_DD])
    found_DD = torch.linalg.lstsq(public, rotated).solution
    assert torch.allclose(found_DD, rotation_DD, atol=1e-8)
    guessed_N = _nearest(seen_ND @ found_DD.mT, embedding_VD)
    assert _share(guessed_N, tokens_N) == 1.0


def test_a_permutation_is_read_off_the_permuted_public_weights(
    embedding_VD: Tensor, tokens_N: Tensor, weight_OD: Tensor
) -> None:
    order_D = torch.randperm(WIDTH)
    seen_ND, given_OD = embedding_VD[tokens_N][:, order_D], weight_OD[:, order_D]
    found_D = torch.cdist(given_OD.mT.contiguous(), weight_OD.mT.contiguous()).argmin(dim=1)
    assert torch.equal(found_D, order_D)
    restored_ND = torch.empty_like(seen_ND)
    restored_ND[:, found_D] = seen_ND
    assert _share(_nearest(restored_ND, embedding_VD), tokens_N) == 1.0


def test_a_permuted_embedding_still_has_its_values(embedding_VD: Tensor, tokens_N: Tensor) -> None:
    orders = torch.stack([torch.randperm(WIDTH) for _ in tokens_N])
    seen_ND = embedding_VD[tokens_N].gather(1, orders)
    guessed_N = _nearest(seen_ND.sort(dim=1).values, embedding_VD.sort(dim=1).values)
    assert _share(guessed_N, tokens_N) == 1.0


def test_mixed_tokens_span_the_space_of_their_embeddings(
    embedding_VD: Tensor, tokens_N: Tensor
) -> None:
    mixing_NN = torch.randn(NUM_TOKENS, NUM_TOKENS).double()
    seen_ND = mixing_NN @ embedding_VD[tokens_N]
    _, strengths, directions = torch.linalg.svd(seen_ND, full_matrices=False)
    span_RD = directions[strengths > 1e-9 * strengths[0]]
    outside_V = (embedding_VD - embedding_VD @ span_RD.mT @ span_RD).norm(dim=1)
    guessed = set(torch.nonzero(outside_V < 1e-6).flatten().tolist())
    assert guessed == set(tokens_N.tolist())


def test_a_small_float_pad_leaves_the_nearest_token_nearest(
    embedding_VD: Tensor, tokens_N: Tensor
) -> None:
    size = float(embedding_VD.std())
    seen_ND = embedding_VD[tokens_N] + torch.randn(NUM_TOKENS, WIDTH).double() * size
    assert _share(_nearest(seen_ND, embedding_VD), tokens_N) > 0.95


def test_a_large_float_pad_rounds_the_numbers_away(
    embedding_VD: Tensor, tokens_N: Tensor, weight_OD: Tensor
) -> None:
    x_ND, weight = embedding_VD[tokens_N].float(), weight_OD.float()
    pad_ND = torch.randn(NUM_TOKENS, WIDTH) * 1e6
    y_NO = (x_ND + pad_ND) @ weight.mT - pad_ND @ weight.mT
    wanted_NO = x_ND @ weight.mT
    assert float((y_NO - wanted_NO).norm() / wanted_NO.norm()) > 0.1


def test_a_float_pad_that_keeps_the_numbers_shows_which_of_two_texts_it_hides(
    embedding_VD: Tensor,
) -> None:
    """Masked rows of one token are centred on it: their mean over uses converges to the token."""
    size = 20 * float(embedding_VD.std())
    seen_ND = embedding_VD[77] + torch.randn(20000, WIDTH).double() * size
    assert int(_nearest(seen_ND.mean(dim=0, keepdim=True), embedding_VD)) == 77


def test_a_dealer_in_the_accelerator_s_place_reads_everything(
    embedding_VD: Tensor, tokens_N: Tensor
) -> None:
    seen: dict[str, Tensor] = {}

    class Both(Multiplier):
        def multiply(self, name: str, masked_NK: Tensor, transpose: bool) -> Tensor:
            seen.setdefault("masked", masked_NK.clone())
            return super().multiply(name, masked_NK, transpose)

    pool = pooled_place(Both())
    layer = masked(nn.Linear(WIDTH, 8), pool)
    taken = pool.pads.take

    def overheard(name: str, num_tokens: int, transpose: bool):  # type: ignore[no-untyped-def]
        pad = taken(name, num_tokens, transpose)
        seen["pad"] = pad._pad_NK.clone()  # type: ignore[attr-defined]
        return pad

    vars(pool.pads)["take"] = overheard
    layer(embedding_VD[tokens_N].float())
    levels_ND = centred(residues(seen["masked"].to(torch.int64) - seen["pad"] - OFFSET))
    # Each row has a scale of its own: directions are compared.
    found = levels_ND.double() / levels_ND.double().norm(dim=1, keepdim=True)
    known = embedding_VD / embedding_VD.norm(dim=1, keepdim=True)
    assert _share(_nearest(found, known), tokens_N) == 1.0


@pytest.mark.parametrize("scheme", BROKEN_SCHEMES)
def test_the_settings_refuse_a_broken_mask_and_name_the_attack(scheme: str) -> None:
    with pytest.raises(ValidationError, match="is broken: ") as caught:
        MaskedSettings(accelerator="h:1", dealer="i:1", dealer_key="00", scheme=scheme)
    assert BROKEN_SCHEMES[scheme][:40] in str(caught.value)


def test_the_settings_refuse_one_worker_as_both() -> None:
    with pytest.raises(ValidationError, match="one worker"):
        MaskedSettings(accelerator="h:1", dealer="h:1", dealer_key="00")
    with pytest.raises(ValidationError, match="wants dealer and dealer_key"):
        MaskedSettings(accelerator="h:1")
    with pytest.raises(ValidationError, match="no masking scheme"):
        MaskedSettings(accelerator="h:1", source="precompute", scheme="rot13")


def test_the_same_attacks_learn_nothing_from_a_one_time_pad(
    embedding_VD: Tensor, tokens_N: Tensor
) -> None:
    accelerator = HostileAccelerator()
    layer = masked(nn.Linear(WIDTH, 8), pooled_place(accelerator))
    layer(embedding_VD[tokens_N].float())
    (seen,) = accelerator.seen
    levels_VD = _levels(embedding_VD).double()
    numbers_ND = centred(seen).double()
    scaled_ND = numbers_ND / numbers_ND.std() * levels_VD.std()
    gaps_ND = centred(residues(seen.to(torch.int64) - seen[0])).double() + levels_VD[tokens_N[0]]
    _, _, directions = torch.linalg.svd(scaled_ND, full_matrices=False)
    outside_V = (levels_VD - levels_VD @ directions.mT @ directions).norm(dim=1)
    guesses = [
        _nearest(scaled_ND, levels_VD),
        _nearest(gaps_ND, levels_VD)[1:],
        _nearest(scaled_ND.sort(dim=1).values, levels_VD.sort(dim=1).values),
    ]
    for guessed in guesses:
        assert _share(guessed, tokens_N[-len(guessed) :]) < 0.1
    assert int((outside_V < 1e-6 * levels_VD.norm(dim=1)).sum()) == 0
