"""Decoded pictures kept in memory within a budget (`data.image_cache_megabytes`), for sets that are read over and over.

Of one process: every data loading worker has its own. The picture not asked for longest is forgotten first; one that is
larger than the whole budget is not kept. Nobody may change a picture that came from here in place.
"""

from __future__ import annotations

from collections import OrderedDict

from PIL import Image

from finetune.data.images import load_image
from finetune.errors import ConfigError
from finetune.schema import ImageInput

_BYTES_PER_PIXEL = 3


class ImageCache:
    """`load_image` that remembers; a budget of 0 remembers nothing.

    Attributes:
        num_bytes: pixels held at the moment, in bytes.

    Raises:
        ConfigError: a negative budget.
    """

    def __init__(self, megabytes: int = 0) -> None:
        if megabytes < 0:
            raise ConfigError(f"data.image_cache_megabytes is {megabytes}; expected a number from 0 on")
        self.limit = megabytes * 2**20
        self.num_bytes = 0
        self._pictures: OrderedDict[str, Image.Image] = OrderedDict()

    def load(self, image: ImageInput, record_id: str | None = None, source: str | None = None) -> Image.Image:
        """As `load_image`; images that are given as bytes have no name and are decoded each time.

        Raises:
            DataFormatError: as `load_image`.
        """
        key = image.path
        if key is None or not self.limit:
            return load_image(image, record_id, source)
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        picture = load_image(image, record_id, source)
        size = _num_bytes(picture)
        if size <= self.limit:
            self._pictures[key] = picture
            self.num_bytes += size
            while self.num_bytes > self.limit:
                self.num_bytes -= _num_bytes(self._pictures.popitem(last=False)[1])
        return picture


def _num_bytes(picture: Image.Image) -> int:
    return _BYTES_PER_PIXEL * picture.width * picture.height
