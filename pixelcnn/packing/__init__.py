"""An exact likelihood as bits: pictures packed without loss (docs/packing.md), and ranked (docs/ranking.md)."""

from pixelcnn.packing.pack import Packed, pack, unpack
from pixelcnn.packing.ranking import Ranking, rank

__all__ = ["Packed", "Ranking", "pack", "rank", "unpack"]
