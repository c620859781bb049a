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
_MAX_WIDENED = 1 << 22
_MAX_ADDED = 1 << 20
"""Products of 16-bit halves and columns that add up in 53 bits."""


class CheckKey:
    """Secret columns of one direction of one layer, and what the weights make of them.

    They are as good after any number of honest products; after a wrong one they must not be used.
    """

    def __init__(self, weight: FieldWeight, transpose: bool) -> None:
        """Draw the columns and multiply once by the weights, which are not kept."""
        span = weight.span(transpose)
        self.num_inputs, self.num_products = span.num_inputs, span.num_products
        columns_MC = _small(span.num_products, _NUM_COLUMNS, _COLUMN_BITS)
        seen_KC = torch.zeros(span.num_inputs, _NUM_COLUMNS, dtype=torch.float64)
        rows = columns_MC.split(span.num_outputs)
        for number, matrix_Mk in enumerate(weight.pieces(transpose)):
            start = number % span.num_blocks * span.block
            width = matrix_Mk.shape[1]
            height = max(1, _MAX_WIDENED // width)
            pieces = zip(matrix_Mk.split(height), rows[number].split(height), strict=True)
            for some_Mk, some_MC in pieces:
                # 16 + 9 bits and less than 2^28 outputs: exact.
                seen_KC[start : start + width] += some_Mk.double().mT @ some_MC
        # Turned: a product with few columns is fastest along memory.
        self._columns_CM = columns_MC.mT.contiguous()
        self._seen_DK = _halves(torch.remainder(seen_KC, PRIME), dim=1).mT.contiguous()

    def check(self, inputs_JK: Tensor, products_JM: Tensor, sender: str) -> None:
        """Compare both sides of joined rows.

        Args:
            inputs_JK: float64, less than 2^32 in size.
            products_JM: alike, of what is claimed to be their product.
            sender: of the products, for the error.

        Raises:
            PeerMisbehaved: it is not their product.
        """
        expected = _times(inputs_JK, self._seen_DK)
        found = _times(products_JM, self._columns_CM)
        # What the weights make of a column has 31 bits: its two halves lie side by side.
        wrong = [
            (row[column] << 16) + row[column + _NUM_COLUMNS] - found[place][column]
            for place, row in enumerate(expected)
            for column in range(_NUM_COLUMNS)
        ]
        if any(number % PRIME for number in wrong):
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
        self._inputs.add(self._join_JN[:, start : start + levels_NK.shape[0]], levels_NK)

    def add_products(self, start: int, products_NM: Tensor) -> None:
        """As `add_inputs`, for what came back."""
        self._products.add(self._join_JN[:, start : start + products_NM.shape[0]], products_NM)

    def finish(self, input_offset: int, product_offset: int, sender: str) -> None:
        """Check the rows.

        Args:
            input_offset: by how much every input is too large.
            product_offset: by how much every product is.
            sender: of the products, for the error.

        Raises:
            PeerMisbehaved: the products are not those of the inputs.
        """
        joined_J = [int(total) for total in self._join_JN.sum(dim=1).tolist()]
        inputs_JK = self._inputs.less([total * input_offset for total in joined_J])
        products_JM = self._products.less([total * product_offset for total in joined_J])
        self._key.check(inputs_JK, products_JM, sender)


class _JoinedRows:
    """A sum of rows times coefficients, exact modulo p."""

    def __init__(self, num_rows: int, width: int) -> None:
        self._total = torch.zeros(num_rows, width, dtype=torch.float64)
        self._wide = torch.empty(0, width, dtype=torch.float64)
        self._summed = 0

    def add(self, coefficients: Tensor, piece: Tensor) -> None:
        num_rows = piece.shape[0]
        assert num_rows < _MAX_SUMMED - 2
        if self._summed + num_rows >= _MAX_SUMMED:
            _reduce(self._total)
            # What remains is less than two rows of residues.
            self._summed = 2
        self._summed += num_rows
        if self._wide.shape[0] < num_rows:
            self._wide = torch.empty(piece.shape, dtype=torch.float64)
        wide = self._wide[:num_rows].copy_(piece)
        torch.addmm(self._total, coefficients, wide, out=self._total)

    def less(self, taken_J: list[int]) -> Tensor:
        """The sums less these numbers, mod p, less than 2^32 in size."""
        taken = torch.tensor([number % PRIME for number in taken_J], dtype=torch.float64)
        return _reduce(self._total.sub_(taken[:, None]))


def _reduce(values: Tensor) -> Tensor:
    """Bring exact float64 integers near [0, p), in place: three passes where a remainder has ten.

    The quotient may be one off, so what is left lies in [-p, 2p).
    """
    quotients = torch.mul(values, 1 / PRIME).floor_()
    return values.sub_(quotients, alpha=PRIME)


def _small(rows: int, columns: int, bits: int) -> Tensor:
    """Secret uniform integers of so many bits, at most 16."""
    drawn = np.frombuffer(os.urandom(2 * rows * columns), dtype=np.uint16) >> (16 - bits)
    return torch.from_numpy(drawn.astype(np.float64)).view(rows, columns)


def _halves(values: Tensor, dim: int) -> Tensor:
    """High part and 16 low bits of integers, side by side."""
    high = torch.mul(values, 2**-16).floor_()
    return torch.cat([high, torch.sub(values, high, alpha=2**16)], dim=dim)


def _times(rows_JK: Tensor, columns_DK: Tensor) -> list[list[int]]:
    """Rows times columns; exact, because both are in halves or small."""
    pieces = zip(
        _halves(rows_JK, dim=0).split(_MAX_ADDED, dim=1),
        columns_DK.split(_MAX_ADDED, dim=1),
        strict=True,
    )
    products = [(rows @ columns.mT).to(torch.int64) for rows, columns in pieces]
    sums: list[list[int]] = torch.stack(products).sum(dim=0).tolist()
    pairs = zip(sums[: rows_JK.shape[0]], sums[rows_JK.shape[0] :], strict=True)
    return [[(high << 16) + low for high, low in zip(*pair, strict=True)] for pair in pairs]
