"""Mask types A and B as pure functions, with the dependence between colours at the centre tap.

Kernels are stored *cropped*: the rows below the centre are always masked, so they are left out. A 7x7 kernel is kept
as 4x7, a 3x3 one as 2x3, a horizontal 1xn one as 1 x (n // 2 + 1); the function is that of the full masked kernel.

Source: van den Oord et al. 2016, arXiv:1601.06759, section 3.4 and figure 2 (right).
"""

import torch
from torch import Tensor


def device_of_numbers() -> torch.device:
    """Return where a network's tables are made: on the default device, but not where it has no memory.

    There, on torch's device `meta`, their arithmetic would import torch's compiler, for more than a second.
    """
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def colour_groups(num_maps: int, num_colours: int) -> Tensor:
    """Return the colour of each map, (num_maps,) int64, in equal runs: 6 maps, 3 colours -> 0 0 1 1 2 2."""
    if num_maps % num_colours:
        raise ValueError(f"{num_maps} maps do not divide into {num_colours} colours: take a multiple of that.")
    return torch.arange(num_colours, device=device_of_numbers()).repeat_interleave(num_maps // num_colours)


def centre_mask(mask_type: str, in_groups: Tensor, out_groups: Tensor) -> Tensor:
    """Return which input maps the centre tap of each output map may see: (out, in) float, 1 where allowed.

    Mask A: strictly earlier colours only. Mask B: the same colour too.
    """
    if mask_type not in ("A", "B"):
        raise ValueError(f"a mask is of type 'A' or 'B', got {mask_type!r}.")
    if torch.get_default_device().type == "meta":
        return torch.empty(len(out_groups), len(in_groups))
    out, in_ = out_groups[:, None], in_groups[None, :]
    return (out > in_ if mask_type == "A" else out >= in_).float()


def raster_mask(mask_type: str, kernel_size: int, in_groups: Tensor, out_groups: Tensor) -> Tensor:
    """Return the mask of a cropped k x k kernel: the rows above in full, the current row up to the centre.

    It is (out, in, k // 2 + 1, k) float, 1 where allowed; the centre is the last row's middle tap.
    """
    half = kernel_size // 2
    mask = torch.ones(len(out_groups), len(in_groups), half + 1, kernel_size)
    mask[:, :, half, half] = centre_mask(mask_type, in_groups, out_groups)
    mask[:, :, half, half + 1 :] = 0
    return mask


def row_mask(mask_type: str, kernel_size: int, in_groups: Tensor, out_groups: Tensor) -> Tensor:
    """Return the last row of `raster_mask`, up to the centre: (out, in, 1, k // 2 + 1) float, 1 where allowed."""
    return raster_mask(mask_type, kernel_size, in_groups, out_groups)[:, :, -1:, : kernel_size // 2 + 1].contiguous()
