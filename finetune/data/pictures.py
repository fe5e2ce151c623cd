"""Records as images and pixel targets alone, for runs without text: `heads.source: vision` and no text loss.

An image whose tower features are cached is not even opened, unless the noise-residual expert wants its pixels. What is
cached and where is `finetune.training.feature_cache`'s part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from finetune.data.dataset import CachedFeatures, ForensicDataset, Sample
from finetune.data.images import image_size_hw
from finetune.data.masks import load_mask
from finetune.errors import DataFormatError
from finetune.schema import ImageInput


class FeatureReader(Protocol):
    """Where cached features are looked up."""

    needs_pixels: bool
    """Whether the model reads pixels beside the features."""

    def key(self, image: ImageInput, record_id: str, source: str) -> str:
        """Name of an image's features, from its bytes."""

    def load(self, key: str) -> tuple[list[Tensor], tuple[int, int]] | None:
        """Maps (C, h, w) per tower block and the original image's (H, W), or None where nothing is cached."""


class PictureDataset(ForensicDataset):
    """A `ForensicDataset` whose samples have no ids; conversations are not looked at."""

    has_text: ClassVar[bool] = False
    heads_read_text = False
    features: FeatureReader | None = None

    def __getitem__(self, index: int) -> Sample:
        """Decode one record, or take its features from the cache.

        Raises:
            DataFormatError: unreadable image or mask.
        """
        return self._opened(index)[1] if self.features is None else self._with_features(index, self.features)

    def _with_features(self, index: int, features: FeatureReader) -> Sample:
        record = self.records[index]
        entries, images, sizes = [], [], []
        for image in record.images:
            key = features.key(image, record.id, record.source)
            found = features.load(key)
            is_decoded = found is None or features.needs_pixels
            if is_decoded:
                images.append(self.image_cache.load(image, record.id, record.source))
            sizes.append(found[1] if found is not None else (images[-1].height, images[-1].width))
            entries.append(CachedFeatures(key, None if found is None else found[0], is_decoded, sizes[-1]))
        processed = self._processed(record, sizes)
        pairs = zip(record.targets, sizes, strict=True)
        masks = [load_mask(target, size, record.id, record.source) for target, size in pairs]
        sample = self._sample(record, images, sizes, processed, masks)
        sample.features = entries
        return sample

    def without_answers_at(self, indices: Sequence[int]) -> list[Sample]:
        """The records themselves: there is no answer in them."""
        return [self[index] for index in indices]

    def check_lengths(self) -> list[DataFormatError]:
        """An error for every image whose header cannot be read or whose sides no resize fits; no tokens are counted."""
        errors = []
        for record in self.records:
            try:
                self._processed(record, [image_size_hw(image, record.id, record.source) for image in record.images])
            except DataFormatError as error:
                errors.append(error)
        return errors
