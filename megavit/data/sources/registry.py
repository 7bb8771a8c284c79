"""The table of data sources; `DataConfig.check` reads it, so that it imports no source.

To add a source, write a file and add a row (see docs/extending.md).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceSpec:
    """One row: where a source is opened, and which settings of the data group it reads.

    Attributes:
        opener: `module:name` of a class or function that is called with (config, split) and returns a `Source`.
        takes_path: data.path is required, and data.val_fraction is allowed.
        is_local: data.path names files of this machine; False for the id of a hub.
        reads_urls: data.path may be a URL.
        multi_label: the source implements `labels(index)`, for data.multi_label=true.
        takes_size: data.num_classes and data.num_samples are required.
        caches_index: the opener takes a third argument, the folder in which it caches its list of samples.
    """

    opener: str
    takes_path: bool = False
    is_local: bool = True
    reads_urls: bool = False
    multi_label: bool = False
    takes_size: bool = False
    caches_index: bool = False


_FOLDER = "megavit.data.sources"

SOURCES: dict[str, SourceSpec] = {
    "digits": SourceSpec(f"{_FOLDER}.digits:open_digits"),
    "synthetic": SourceSpec(f"{_FOLDER}.synthetic:Synthetic", takes_size=True),
    "folder": SourceSpec(f"{_FOLDER}.image_folder:open_folder", takes_path=True, caches_index=True),
    "csv": SourceSpec(f"{_FOLDER}.csv_file:open_csv", takes_path=True, reads_urls=True, multi_label=True),
    "images": SourceSpec(f"{_FOLDER}.image_folder:open_images", takes_path=True, caches_index=True),
    "tar": SourceSpec(f"{_FOLDER}.webdataset:open_tars", takes_path=True, reads_urls=True, caches_index=True),
    "parquet": SourceSpec(f"{_FOLDER}.hf_dataset:open_parquet", takes_path=True, multi_label=True),
    "arrow": SourceSpec(f"{_FOLDER}.hf_dataset:open_arrow", takes_path=True, multi_label=True),
    "hub": SourceSpec(f"{_FOLDER}.hf_dataset:open_hub", takes_path=True, is_local=False, multi_label=True),
}
