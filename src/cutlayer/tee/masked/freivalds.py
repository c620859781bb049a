"""Is it really the product? Freivalds' check modulo p, at a few multiply-adds per element.

It computes no products and decodes nothing. Rows are first joined by random coefficients that are
drawn for the call and never leave; the few joined rows then meet secret columns of the layer. The
numbers are small enough for float64 to add them exactly. A wrong product passes with a chance of
at most 2^-42 + 2^-48 < 2^-40.

Shapes: N = tokens of a piece, K = inputs, M = products per token, J = joined rows, C = columns.

Source: Freivalds, Probabilistic machines can use less running time (IFIP 1977).
"""

import os

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import PeerMisbehaved
from cutlayer.tee.masked.field import PRIME
from cutlayer.tee.masked.quantise import FieldWeight

__all__ = ["CheckKey", "ProductCheck"]

NUM_JOINED = 3
_JOIN_BITS = 14
_NUM_COLUMNS = 3
_COLUMN_BITS = 16
_MAX_SUMMED = 1 << 8
"""Rows of 31-bit residues that 14-bit coefficients may add up in 53 bits."""
_MAX_PRODUCTS = 1 << 21
"""Products of 16-bit halves and columns that add up in 53 bits."""


class CheckKey:
    """Secret columns of one direction of one layer, and what the weights make of them.

    They are as good after any number of honest products; after a wrong one they must not be used.
    """

    def __init__(self, weight: FieldWeight, transpose: bool) -> None:
        """Draw the columns and multiply once by the weights, which are not kept."""
        span = weight.span(transpose)
        assert span.num_products <= _MAX_PRODUCTS
        self.num_inputs, self.num_products = span.num_inputs, span.num_products
        columns_MC = _small(span.num_products, _NUM_COLUMNS, _COLUMN_BITS)
        seen_KC = torch.zeros(span.num_inputs, _NUM_COLUMNS, dtype=torch.float64)
        rows = columns_MC.split(span.num_outputs)
        for number, matrix_Mk in enumerate(weight.pieces(transpose)):
            start = number % span.num_blocks * span.block
            width = matrix_Mk.shape[1]
            # 16 + 9 bits and at most 2^21 outputs: exact.
            seen_KC[start : start + width] += matrix_Mk.double().mT @ rows[number]
        self._columns_MC = columns_MC
        self._seen_KD = _halves(torch.remainder(seen_KC, PRIME), dim=1)

    def check(self, inputs_JK: Tensor, products_JM: Tensor, sender: str) -> None:
        """Compare both sides of joined rows.

        Args:
            inputs_JK: float64 residues.
            products_JM: float64 residues of what is claimed to be their product.
            sender: of the products, for the error.

        Raises:
            PeerMisbehaved: it is not their product.
        """
        expected = _times(inputs_JK, self._seen_KD, num_halves=2)
        found = _times(products_JM, self._columns_MC, num_halves=1)
        if expected != found:
            raise PeerMisbehaved(
                f"{sender} returned a wrong product; nothing of it was used, and it is not asked "
                "again: find out whether the machine is broken or hostile"
            )


class ProductCheck:
    """One call: joins its rows while they are at hand, then checks."""

    def __init__(self, key: CheckKey, num_tokens: int) -> None:
        """
        Args:
            key: of the layer and direction.
            num_tokens: rows of the call; few are checked as they are.
        """
        self._key = key
        self._join_JN = (
            _small(NUM_JOINED, num_tokens, _JOIN_BITS)
            if num_tokens > NUM_JOINED
            else torch.eye(num_tokens, dtype=torch.float64)
        )
        num_rows = self._join_JN.shape[0]
        self._inputs = _JoinedRows(num_rows, key.num_inputs)
        self._products = _JoinedRows(num_rows, key.num_products)

    def add_inputs(self, start: int, levels_NK: Tensor) -> None:
        """Join rows from `start` on: integers of at most 31 bits, of any type."""
        self._inputs.add(self._join_JN[:, start : start + len(levels_NK)], levels_NK)

    def add_products(self, start: int, products_NM: Tensor) -> None:
        """As `add_inputs`, for what came back."""
        self._products.add(self._join_JN[:, start : start + len(products_NM)], products_NM)

    def finish(self, input_offset: int, product_offset: int, sender: str) -> None:
        """Check the rows.

        Args:
            input_offset: by how much every input is too large.
            product_offset: by how much every product is.
            sender: of the products, for the error.

        Raises:
            PeerMisbehaved: the products are not those of the inputs.
        """
        joined_J = self._join_JN.sum(dim=1).to(torch.int64)
        inputs_JK = self._inputs.less(joined_J, input_offset)
        products_JM = self._products.less(joined_J, product_offset)
        self._key.check(inputs_JK, products_JM, sender)


class _JoinedRows:
    """A sum of rows times coefficients, exact modulo p."""

    def __init__(self, num_rows: int, width: int) -> None:
        self._total = torch.zeros(num_rows, width, dtype=torch.float64)
        self._summed = 0

    def add(self, coefficients: Tensor, piece: Tensor) -> None:
        assert len(piece) < _MAX_SUMMED
        if self._summed + len(piece) >= _MAX_SUMMED:
            self._total.remainder_(PRIME)
            self._summed = 1
        self._summed += len(piece)
        torch.addmm(self._total, coefficients, piece.to(torch.float64), out=self._total)

    def less(self, joined_J: Tensor, offset: int) -> Tensor:
        """The residues if every number were smaller by `offset`."""
        taken_J = (joined_J.remainder(PRIME) * (offset % PRIME)).remainder(PRIME)
        reduced = self._total.remainder_(PRIME).sub_(taken_J.to(torch.float64)[:, None])
        return reduced.remainder_(PRIME)


def _small(rows: int, columns: int, bits: int) -> Tensor:
    """Secret uniform integers of so many bits, at most 16."""
    drawn = np.frombuffer(os.urandom(2 * rows * columns), dtype=np.uint16) >> (16 - bits)
    return torch.from_numpy(drawn.astype(np.float64)).view(rows, columns)


def _halves(values: Tensor, dim: int) -> Tensor:
    """Residues as 16 high and 16 low bits side by side."""
    high = torch.floor(values / 2**16)
    return torch.cat([high, values - high * 2**16], dim=dim)


def _times(rows_JK: Tensor, columns: Tensor, num_halves: int) -> list[int]:
    """Rows times columns mod p, where columns may be in halves; exact."""
    products = _halves(rows_JK, dim=0) @ columns
    wide = products.to(torch.int64).remainder(PRIME)
    high, low = wide.chunk(2, dim=0)
    total = (high << 16).remainder(PRIME) + low
    if num_halves == 2:
        upper, lower = total.remainder(PRIME).chunk(2, dim=1)
        total = (upper << 16).remainder(PRIME) + lower
    found: list[int] = total.remainder(PRIME).flatten().tolist()
    return found
