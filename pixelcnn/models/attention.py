"""Causal attention over blocks of the rows above, after PixelSNAIL, Chen et al. 2018, arXiv:1712.09763."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelcnn.models.layers import Block, Pointwise, masked_1x1
from pixelcnn.models.maps import NEVER_WAITS, Map, check_cells, check_window, row_matrix
from pixelcnn.models.masks import colour_groups, device_of_numbers

BLOCK = 2  # rows and columns of a block
NUM_FREQUENCIES = 4  # of the position code, per axis


def position_code(rows: int, columns: int, height: int, width: int, step: int) -> Tensor:
    """Return where each cell's centre lies, as sines and cosines: (1, 4 * NUM_FREQUENCIES, rows, columns) float32.

    Cells are `step` pixels apart; `height` and `width`, in pixels, are a quarter of the slowest wave.
    """
    # Made in float64: rounded, it is the same on every machine.
    y = (torch.arange(rows, dtype=torch.float64) * step + (step - 1) / 2) / height
    x = (torch.arange(columns, dtype=torch.float64) * step + (step - 1) / 2) / width
    waves = math.pi / 2 * 2 ** torch.arange(NUM_FREQUENCIES)
    at_y = (y[:, None] * waves)[:, None].expand(rows, columns, -1)
    at_x = (x[:, None] * waves)[None].expand(rows, columns, -1)
    code = torch.cat([at_y.sin(), at_y.cos(), at_x.sin(), at_x.cos()], dim=-1)
    return code.permute(2, 0, 1)[None].float().contiguous()


def _of_positions(layer: Pointwise, positions: Tensor) -> Tensor:
    """Return what a layer makes of positions, (maps, rows, columns), the same on every machine: by way of float64."""
    weight = layer.weight[:, :, 0, 0]
    return torch.einsum("mp,pyx->myx", weight.double(), positions[0].double()).to(weight.dtype)


@dataclass(eq=False, kw_only=True)
class Attention:
    """The weights of an attention block, channels in a sampler's order; an engine keeps all keys and values so far."""

    heads: int
    key_features: int  # channels of each head's queries, keys and values
    null: Tensor  # (2 * heads * key_features,), the key and the value that every pixel sees
    matrices: list[Tensor]  # per row of a block, (BLOCK * channels, 2 * heads * key_features), to keys and values
    table: Tensor  # (block rows, block columns, 2 * heads * key_features), the bias where each block lies

    @property
    def num_blocks(self) -> int:
        return self.table.shape[0] * self.table.shape[1]


class BlockAttention(Block):
    """Attention from each pixel to the 2x2 blocks that lie in rows wholly above it, and to one learned constant.

    A pixel of row y sees the blocks of rows 0 to 2 * (y // 2) - 1. Queries of a colour are made of the horizontal
    features of that colour and earlier ones; keys and values of the vertical stack's, which encode rows above alone.
    """

    positions: Tensor
    block_positions: Tensor
    visible: Tensor

    def __init__(
        self, num_features: int, num_groups: int, num_heads: int, key_features: int, height: int, width: int
    ) -> None:
        super().__init__()
        self.heads, self.key_features = num_groups * num_heads, key_features
        maps = self.heads * key_features
        features = colour_groups(num_features, num_groups)
        self.query = masked_1x1("B", features, colour_groups(maps, num_groups))
        self.query_position = Pointwise(4 * NUM_FREQUENCIES, maps, bias=False)
        self.keys_values = nn.Conv2d(num_features, 2 * maps, BLOCK, stride=BLOCK)
        self.key_position = Pointwise(4 * NUM_FREQUENCIES, maps, bias=False)
        self.null_key = nn.Parameter(nn.init.normal_(torch.empty(maps)))
        self.null_value = nn.Parameter(torch.zeros(maps))
        block_rows, block_columns = height // BLOCK, -(-width // BLOCK)
        with device_of_numbers():
            num_seen = torch.arange(height) // BLOCK * block_columns  # blocks that the pixels of each row see, (H,)
            seen = torch.arange(1 + block_rows * block_columns) <= num_seen[:, None]  # the constant comes first
            self.register_buffer("visible", torch.where(seen, 0.0, -math.inf), persistent=False)
            self.register_buffer("positions", position_code(height, width, height, width, 1), persistent=False)
            blocks = position_code(block_rows, block_columns, height, width, BLOCK)
            self.register_buffer("block_positions", blocks, persistent=False)

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """Return what each pixel found, (B, heads * key_features, H, W), the heads in colour groups.

        `v` are the vertical stack's features, (B, p, H, W): row r encodes rows up to and including r; `h` are the
        horizontal stack's, in colour groups.
        """
        batch, _, height, width = h.shape
        query = self.query(h) + self.query_position(self.positions)
        whole = F.pad(v, (0, width % BLOCK))[:, :, : height - height % BLOCK]
        if whole.shape[2]:
            key, value = self.keys_values(whole).chunk(2, dim=1)
            key = key + self.key_position(self.block_positions)
        else:  # an image of a single row has nothing above
            key = value = v.new_zeros(batch, self.heads * self.key_features, 0, 0)

        # In float32 it is faster than in bfloat16, on CPUs.
        wide = torch.promote_types(h.dtype, torch.float32)

        def by_head(x: Tensor) -> Tensor:  # (B, heads * d, ...) -> (B, heads, cells, d)
            return x.flatten(2).unflatten(1, (self.heads, self.key_features)).transpose(2, 3).to(wide)

        def with_null(x: Tensor, null: Tensor) -> Tensor:
            null = null.to(wide).view(1, self.heads, 1, self.key_features).expand(batch, -1, -1, -1)
            return torch.cat([null, by_head(x)], dim=2)

        with torch.autocast(h.device.type, enabled=False):
            found = F.scaled_dot_product_attention(
                by_head(query),
                with_null(key, self.null_key),
                with_null(value, self.null_value),
                attn_mask=self.visible.to(wide)[:, None].expand(-1, width, -1).flatten(0, 1),
            )  # (B, heads, H * W, d)
        return found.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)).to(h.dtype)

    def described(self, v: Map, h: Map) -> Map:
        check_window(v)
        for map_ in (v, h):
            check_cells(map_)
        maps = self.heads * self.key_features
        query = self.query(h) + Map("constant", (), self.query_positions, maps, NEVER_WAITS)
        # Queries that see rows above alone are known before the pixel's first turn.
        turns = torch.zeros(maps, dtype=torch.int64) if query.turns is None else query.turns
        by_head = turns.view(self.heads, -1)
        if (query.turns is None and query.lead > -1) or bool((by_head != by_head[:, :1]).any()):
            raise ValueError("the queries of an attention head must be known at the same turn of their pixel.")
        return Map("attend", (query, v), self, maps, 0, turns)

    def query_positions(self) -> Tensor:
        """Return what its position adds to each query: (heads * key_features, H, W)."""
        return _of_positions(self.query_position, self.positions)

    def weights(self, order: Tensor, source_order: Tensor) -> Attention:
        """Return what samplers need: keys and values in this order of channels, made of a map in that order."""
        both = torch.cat([order, order + len(order)])
        assert self.keys_values.bias is not None
        weight = self.keys_values.weight.detach()[both][:, source_order]  # (2 * maps, channels, BLOCK, BLOCK)
        key = _of_positions(self.key_position, self.block_positions).detach()[order].permute(1, 2, 0)
        return Attention(
            heads=self.heads,
            key_features=self.key_features,
            null=torch.cat([self.null_key, self.null_value]).detach()[both],
            matrices=[row_matrix(weight[:, :, row]) for row in range(BLOCK)],
            table=torch.cat([key, torch.zeros_like(key)], dim=-1) + self.keys_values.bias.detach()[both],
        )
