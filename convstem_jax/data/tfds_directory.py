"""Records of a tfds directory in ArrayRecord, with random access. Needs no TensorFlow."""

from collections.abc import Sequence
import concurrent.futures
import os
import pathlib
import re
import resource

from array_record.python import array_record_module
import tensorflow_datasets as tfds

from convstem_jax.errors import ConfigError, DataError, first_line, reading

# Open files besides those of a split: what a process has in any case, and what it may have with
# another split and 9 for each worker (Grain 0.2).
LEAST_FILES, MOST_FILES = 200, 4000


def read(data_dir: str, dataset: str, split: str) -> tuple[Sequence[dict], list[str]]:
    """Reads `split` of `data_dir/dataset/<highest version>` and checks it against its description.

    Args:
        data_dir: folder of data sets.
        dataset: name of one.
        split: name of one of its splits, or a part as tfds writes it: `train[:90%]`.

    Returns:
        The records, each with `image`, encoded, and `label`; and the names of the classes.

    Raises:
        ConfigError: there is no such folder or split, it is not in ArrayRecord, or this machine
            allows too few open files or does not allow reading one.
        DataError: a file does not hold the number of records that `dataset_info.json` says.
    """
    if "+" in split:
        raise ConfigError(f"'{split}' is not a split or a part of one, such as train[:90%]")
    path = _find_version(data_dir, dataset)
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # tfds raises anything from KeyError to a JSON error
        raise ConfigError(
            f"{path} cannot be read as a tfds directory: {first_line(error)}"
        ) from error
    whole = split.partition("[")[0]
    try:
        splits = builder.info.splits
        is_empty = whole not in splits or splits[split].num_examples < 1  # -1000 in [90%:80%]
    except ValueError as error:  # the part in brackets
        raise ConfigError(f"'{split}' is not a part of the split '{whole}': {error}") from error
    if is_empty:
        raise ConfigError(f"{path} has no split '{split}': it has {', '.join(sorted(splits))}")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ConfigError(
            f"{path} is in {builder.info.file_format.value}, and random access needs ArrayRecord: "
            "convert it into another folder with 'tfds convert_format' (needs the package "
            f"apache-beam), or build it anew there ({_preparation(dataset, 'FOLDER')}), and set "
            "config.data_dir to that folder"
        )
    features = builder.info.features
    for key in ("image", "label"):
        if key not in features:
            raise ConfigError(f"{path} has no feature '{key}': it has {', '.join(features)}")
    if not isinstance(features["label"], tfds.features.ClassLabel):
        raise ConfigError(f"{path}: the feature 'label' is {features['label']}, not a ClassLabel")
    _let_be_open(len(splits[whole].filepaths), path)
    _check_counts(splits[whole])
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return records, features["label"].names


def _let_be_open(num_files: int, path: str) -> None:
    """Raises this process's limit of open files, and with it that of its workers.

    Random access keeps all files of a split open: ImageNet's splits have 1,024 and 64, and many
    machines allow 1,024 by default.

    Raises:
        ConfigError: the machine allows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < num_files + LEAST_FILES:  # negative: no limit
        raise ConfigError(
            f"{path} has {num_files} files to keep open, and this machine allows {hard} in all: "
            f"raise the hard limit to {num_files + MOST_FILES} (ulimit -Hn, or limits.conf)"
        )
    wanted = num_files + MOST_FILES
    if 0 <= soft < wanted:
        soft = wanted if hard < 0 else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _find_version(data_dir: str, dataset: str) -> str:
    root = os.path.join(data_dir, dataset)
    try:
        versions = [name for name in os.listdir(root) if re.fullmatch(r"\d+\.\d+\.\d+", name)]
        for version in versions:
            os.listdir(os.path.join(root, version))  # raises where it may not be read
    except FileNotFoundError:
        versions = []
    except OSError as error:
        raise ConfigError(
            f"cannot read {error.filename}: {error.strerror}; set config.data_dir, or allow it"
        ) from error
    found = {path.parts[-3] for path in pathlib.Path(root).glob("*/*/dataset_info.json")}
    if found and not versions:
        names = ", ".join(f"{dataset}/{name}" for name in sorted(found))
        raise ConfigError(f"{root} has configurations: set config.dataset to one, {names}")
    if not versions:
        raise ConfigError(
            f"data set '{dataset}' is not in {data_dir} (config.data_dir), neither as a folder of "
            f"tfds nor as {dataset}.npz: {_preparation(dataset, data_dir)}, or pack your own "
            "images (python -m convstem_jax.data.pack --help); meanwhile there is python -m "
            "convstem_jax.main --config configs/quickstart.py, which brings its data"
        )
    return os.path.join(root, max(versions, key=lambda name: list(map(int, name.split(".")))))


def _preparation(dataset: str, data_dir: str) -> str:
    if dataset == "imagenet2012":
        return (
            "prepare it with 'python launch/prepare_imagenet.py "
            f"--manual_dir FOLDER_OF_THE_TWO_TAR_FILES --data_dir {data_dir}'"
        )
    try:
        tfds.builder_cls(dataset.partition("/")[0])
    except ValueError:  # no such data set, or no name of one
        return f"tfds does not know it, so it must be there as {dataset}/VERSION/dataset_info.json"
    return (
        "prepare it with "
        f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{dataset}', "
        f"data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
    )


def _check_counts(info: tfds.core.SplitInfo) -> None:
    # A file cut in half reads as 0 records with no error, so each file is counted.
    def count(path):
        # To ArrayRecord a file that it may not open has 0 records too, so it is opened first.
        with reading(path, "copy or build it again"), open(path, "rb"):
            return array_record_module.ArrayRecordReader(str(path)).num_records()

    # In parallel, since a mounted bucket takes its time over each file.
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        counts = pool.map(count, info.filepaths)
        for path, found, expected in zip(info.filepaths, counts, info.shard_lengths, strict=True):
            if found != expected:
                raise DataError(
                    f"{path} holds {found} records, but dataset_info.json says {expected}: "
                    "the file is damaged or incomplete; copy or build it again"
                )
