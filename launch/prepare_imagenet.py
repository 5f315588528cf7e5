"""Prepares ImageNet-1k for training: makes an ArrayRecord directory of the two official tar files.

    python launch/prepare_imagenet.py --manual_dir FOLDER_WITH_THE_TWO_TARS

The folder holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as downloaded from
image-net.org. Takes hours and another 155 GB.
"""

import argparse
import hashlib
import os
import re
import sys
import tarfile

# name -> MD5, pattern of its members' names, number of images in the end
TARS = {
    "ILSVRC2012_img_train.tar": ("1d675b47d978889d74fa0da5fadfb00e", r"n\d{8}\.tar", 1_281_167),
    "ILSVRC2012_img_val.tar": (
        "29b22e2961454d5413ddabcf34fc5622",
        r"ILSVRC2012_val_\d{8}\.JPEG",
        50_000,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Checks the tar files, builds the data set and counts it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manual_dir", required=True, help="folder of the two tar files")
    parser.add_argument(
        "--data_dir", default="~/tensorflow_datasets", help="where to build (default: %(default)s)"
    )
    parser.add_argument(
        "--any_content",
        action="store_true",
        help="accept tar files of the right form but other content: a subset, for a trial",
    )
    args = parser.parse_args(argv)
    for path in (args.manual_dir, args.data_dir):
        if "://" in path:
            parser.error(f"{path} is not a folder: build here, then copy to the bucket")
    manual_dir, data_dir = map(os.path.expanduser, (args.manual_dir, args.data_dir))
    import tensorflow_datasets as tfds  # loads TensorFlow when it writes

    try:
        builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
        for name, (md5, member, _) in TARS.items():
            check_tar(os.path.join(manual_dir, name), member, None if args.any_content else md5)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3

    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
    except (OSError, tarfile.TarError) as error:
        print(f"error: the data set could not be built in {data_dir}: {error}", file=sys.stderr)
        return 3
    for split, (_, _, expected) in zip(("train", "validation"), TARS.values(), strict=True):
        found = builder.info.splits[split].num_examples
        print(f"{split}: {found:,} images")
        if found != expected and not args.any_content:
            print(
                f"error: {split} should have {expected:,}: delete {builder.data_path}",
                file=sys.stderr,
            )
            return 3
    print(f"done: {builder.data_path}; train with --config.data_dir={data_dir}")
    return 0


def check_tar(path: str, member: str, md5: str | None) -> None:
    """Checks that a tar file is flat, named as expected, and has the given MD5.

    tfds reads the members in their order and trusts it: a folder entry in the validation file, for
    one, shifts every label.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: get it from https://image-net.org/download-images")
    if md5:
        from tqdm import tqdm  # --help needs only Python

        found = hashlib.md5(usedforsecurity=False)
        size = os.path.getsize(path)
        with open(path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True) as progress:
            progress.set_description(f"checking {os.path.basename(path)}")
            while chunk := file.read(1 << 24):
                found.update(chunk)
                progress.update(len(chunk))
        if found.hexdigest() != md5:
            raise ValueError(f"{path} has MD5 {found.hexdigest()}, not {md5}: download it again")
    try:
        with tarfile.open(path) as tar:
            members = list(tar)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is cut off or not a tar file ({error}): copy it again") from error
    numbers = set()
    for info in members:
        if not (info.isfile() and re.fullmatch(member, info.name)):
            raise ValueError(
                f"{path} holds '{info.name}', where only files named {member} may be, without "
                "folders: use the original file, or pack it again from inside its folder"
            )
        numbers.add(int(re.findall(r"\d+", info.name)[-1]))
    # tfds gives the labels out in order, so a gap would shift all that follow.
    if "_val" in os.path.basename(path) and numbers != set(range(1, len(numbers) + 1)):
        raise ValueError(f"{path} must hold the images from 00000001 on, without a gap")


if __name__ == "__main__":
    sys.exit(main())
