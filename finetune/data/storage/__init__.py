"""Data sets on disk as JSONL with files beside it or Parquet with images inside: one schema, written and read back.

Without torch; pyarrow is imported when the first Parquet file is opened.
"""

from finetune.data.storage.encoding import EncodedRecord, ImageOptions, prepare_payload
from finetune.data.storage.manifest import SetInfo, read_manifest
from finetune.data.storage.reading import is_stored, iter_stored, stored_files, stored_hash, stored_splits
from finetune.data.storage.serialization import json_text, record_to_json
from finetune.data.storage.writer import SplitWriter, open_writer

__all__ = [
    "EncodedRecord",
    "ImageOptions",
    "SetInfo",
    "SplitWriter",
    "is_stored",
    "iter_stored",
    "json_text",
    "open_writer",
    "prepare_payload",
    "read_manifest",
    "record_to_json",
    "stored_files",
    "stored_hash",
    "stored_splits",
]
