"""A cast to bf16 or fp16 that keeps small updates: dithered, not rounded to nearest.

Rounding to nearest would lose most of an update: a bf16 weight moves only if it is changed by more than 1/512
of itself, and a short fine-tuning changes most weights by less. Here a fixed pattern decides which weights of
many are rounded up and which down, in proportion to the remainder. Each is off by less than one unit in the
last place, and their mean is right (Roberts, 1962, for images; Gupta et al., 2015, for weights). A number
that the smaller format holds exactly does not change.
"""

import torch

# Bits of a float32's fraction that the smaller formats do not have.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13}


def dithered(values: torch.Tensor, first_row: int, dtype: torch.dtype) -> torch.Tensor:
    """Change float32 ``values`` in place into numbers that ``dtype`` holds: each into one of its neighbours.

    Which of the two is decided by a pattern of row and column that is spread evenly over all fractions
    (Roberts' R2 sequence).

    Args:
        values: (rows, columns), float32.
        first_row: the number of the first row within its whole matrix.
        dtype: bfloat16 or float16; any other changes nothing.
    """
    spare = _SPARE_BITS.get(dtype, 0)
    if spare:
        steps = [
            (torch.arange(start, start + size, device=values.device) * factor & 0xFFFF).int()
            for start, size, factor in zip((first_row, 0), values.shape, (49471, 37345))
        ]
        pattern = (steps[0][:, None] + steps[1]).bitwise_and_(0xFFFF)
        if spare < 16:
            pattern.bitwise_right_shift_(16 - spare)
        values.view(torch.int32).add_(pattern).bitwise_and_(-(2**spare))
    return values
