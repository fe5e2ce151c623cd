"""Heads on the tower over records: images read ahead by threads, predicted in batches, handed on in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from PIL import Image

from finetune.data.images import load_image
from finetune.errors import DataFormatError
from finetune.inference.evidence.prefetch import prefetch
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query, batched
from finetune.schema import Prediction, Record


def predict_records(
    predictor: Predictor, records: Iterable[Record], batch_size: int, num_workers: int
) -> Iterator[tuple[Record, list[Image.Image], list[Prediction]]]:
    """Each record with its images and the predictions for them, without text.

    Args:
        batch_size: records at once.
        num_workers: threads that read images ahead; 0 reads them here.

    Raises:
        DataFormatError: an image that cannot be read.
    """

    def opened(record: Record) -> list[Image.Image]:
        return [load_image(image, record.id, record.source) for image in record.images]

    for batch in batched(prefetch(records, opened, num_workers), batch_size):
        pictures = []
        for _, loaded in batch:
            if isinstance(loaded, DataFormatError):
                raise loaded
            pictures.append(loaded)
        queries = [Query(record.id, record.images, ()) for record, _ in batch]
        found = predictor.predict_batch(queries, pictures, with_text=False)
        yield from zip((record for record, _ in batch), pictures, found, strict=True)
