"""The keys and values of all requests, in pages. Must not know who uses which page."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from nemo_engine.config import ModelConfig
from nemo_engine.model.nemo import make_kv_cache
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops.quantize import FP8

_PAGES_AT_ONCE = 64  # whose bytes are looked at together
_SAMPLED_PAGES = 64  # of a cache that is closed: 4,096 tokens by default, and some 0.3 GiB to read for NeMo
_TOLERATED_SATURATION = 1e-4  # of an FP8 cache's entries; scales from calibration saturate a few outliers of other text

_logger = logging.getLogger("nemo_engine")


class KVCache:
    """``num_pages`` pages and page 0, which is padding, of every layer.

    On the CPU the memory is reserved, and taken from the system only page by page as it is first written.
    """

    def __init__(
        self, config: ModelConfig, weights: NemoWeights, num_pages: int, page_size: int, dtype: torch.dtype
    ) -> None:
        self.page_size = page_size
        make = torch.zeros if dtype == FP8 else torch.empty  # zeros: what was never written is not counted as saturated
        self.layers = make_kv_cache(config, weights, num_pages, page_size, dtype, make)
        self._caches = [cache for kv in self.layers for cache in kv.caches]

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(cache.nbytes for cache in self._caches)

    def poison(self, pages: Tensor) -> None:
        """Fill ``pages`` with NaN; tests do this to what must not be read."""
        for cache in self._caches:
            if cache.dtype == FP8:
                cache.view(torch.uint8)[pages] = 0x7F
            else:
                cache[pages] = torch.nan

    def count_saturated(self, highest_page: int, max_pages: int | None = None) -> tuple[int, int]:
        """Count the entries of an FP8 cache at its largest number, 448, and those that are not 0: (saturated, written).

        What was larger is stored as 448, so this tells whether the scales are too small. (0, 0) of other caches. Reads
        the pages from 1 to ``highest_page`` once (on the CPU, those beyond would be taken from the system for it), or
        ``max_pages`` of them, evenly spread. The device is waited for once.
        """
        stride = 1 if max_pages is None else -(-highest_page // max_pages)
        counts = torch.zeros(2, dtype=torch.int64, device=self._caches[0].device)
        for cache in self._caches:
            if cache.dtype == FP8:
                for pages in cache[1 : highest_page + 1 : max(stride, 1)].view(torch.uint8).split(_PAGES_AT_ONCE):
                    magnitude = pages & 0x7F
                    counts += torch.stack(((magnitude == 0x7E).sum(), magnitude.count_nonzero()))
        saturated, written = counts.tolist()
        return saturated, written

    def warn_if_saturated(self, highest_page: int) -> None:
        """Log a warning if, in a sample of the pages up to ``highest_page``, too many entries are at the largest
        number.
        """
        saturated, written = self.count_saturated(highest_page, _SAMPLED_PAGES)
        if saturated > _TOLERATED_SATURATION * written:
            _logger.warning(
                "%.2g %% of the FP8 KV cache's entries are saturated: its scales are too small; calibrate them "
                "(nemo-engine quantize "
                "--kv-scales head)",
                100 * saturated / written,
            )
