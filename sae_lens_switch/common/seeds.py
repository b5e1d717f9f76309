"""Seeds mixed from several integers, the same on every interpreter: a resumed run draws what it would have drawn."""

_PRIME_1, _PRIME_2, _PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
_WORD = (1 << 64) - 1
_INT_MODULUS = (1 << 61) - 1


def mixed_seed(*parts: int) -> int:
    """A seed of 63 bits for ``torch.Generator``.

    xxHash's mix of 64-bit lanes, as CPython hashes a tuple of integers on 64-bit machines: checkpoints of earlier
    versions, which called ``hash``, resume in the same order.
    """
    mixed = _PRIME_5
    for part in parts:
        mixed = (mixed + _lane(part) * _PRIME_2) & _WORD
        mixed = (mixed << 31 | mixed >> 33) & _WORD
        mixed = mixed * _PRIME_1 & _WORD
    mixed = (mixed + (len(parts) ^ _PRIME_5 ^ 3527539)) & _WORD
    return 1546275796 if mixed == _WORD else mixed & (_WORD >> 1)


def _lane(part: int) -> int:
    reduced = abs(part) % _INT_MODULUS
    return reduced if part >= 0 else -(2 if reduced == 1 else reduced)
