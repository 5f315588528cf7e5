"""Folders of images are packed, or what is wrong with them is reported."""

import cv2
import numpy as np

from convstem_jax.data import pack, sources


def test_folders_of_images_are_packed(tmp_path, capsys):
    def put(split, name, grey):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        image = np.full((40, 50, 3), grey, np.uint8)
        cv2.imwrite(str(folder / f"{grey}.PNG"), image)

    flags = ["--images", str(tmp_path / "photos"), "--dataset", "photos", "--output"]
    flags += [str(tmp_path / "data")]
    for split, name, grey in (("train", "b", 10), ("train", "a", 20), ("test", "b", 30)):
        put(split, name, grey)
    assert pack.main(flags) == 0
    assert "2 classes, 2 in train, 1 in test" in capsys.readouterr().out
    split = sources.open_split(str(tmp_path / "data"), "photos", "train")
    assert split.class_names == ["a", "b"]
    found = {(int(x["label"]), int(x["image"][0, 0, 0])) for x in map(split.__getitem__, range(2))}
    assert found == {(0, 20), (1, 10)}, "classes are numbered in the order of their names"
    for grey in range(40):
        put("many", "ab"[grey // 20], grey)
    assert pack.main([*flags, "--splits", "many"]) == 0
    for part in ("many[:50%]", "many[50%:]"):
        half = sources.open_split(str(tmp_path / "data"), "photos", part)
        assert {int(record["label"]) for record in half.records} == {0, 1}, "not shuffled"
    capsys.readouterr()
    for hidden in (".cache/1.jpg", "a/.2.jpg"):  # of file managers
        path = tmp_path / "photos/train" / hidden
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert pack.main(flags) == 0
    assert "2 classes, 2 in train, 1 in test" in capsys.readouterr().out
    file = tmp_path / "file"
    file.touch()
    assert pack.main([*flags[:-1], str(file / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {file}/x cannot be written: ")
    (tmp_path / "photos/test/b/folder.jpg").mkdir()
    assert pack.main(flags) == 2
    assert "b/folder.jpg cannot be read: Is a directory" in capsys.readouterr().err
    (tmp_path / "photos/test/b/folder.jpg").rmdir()
    (tmp_path / "photos/train/empty").mkdir()
    assert pack.main(flags) == 2
    assert "without images: " in (error := capsys.readouterr().err) and "train/empty\n" in error
    (tmp_path / "photos/train/empty").rmdir()
    (tmp_path / "photos/train/stray.jpg").touch()
    assert pack.main(flags) == 2
    assert "move into a class's folder" in (error := capsys.readouterr().err)
    assert "train/stray.jpg\n" in error
    (tmp_path / "photos/train/stray.jpg").unlink()
    put("alone", "b", 10)
    assert pack.main([*flags, "--splits", "alone"]) == 2
    assert "/alone has one class, b: " in capsys.readouterr().err
    for name in ("caf\udce9", "a\nb"):
        (tmp_path / "photos/train/b").rename(unprintable := tmp_path / "photos/train" / name)
        assert pack.main(flags) == 2
        assert f"{name!r}: that is no printable name".lstrip("'") in capsys.readouterr().err
        unprintable.rename(tmp_path / "photos/train/b")
    put("test", "c", 40)
    for name in ("notes.txt", "more.webp"):
        (tmp_path / "photos/train/b" / name).write_text("x")
    for splits, message in (
        ("test,train", "a is of a class that test does not have"),
        ("train", "b/notes.txt\n"),
        ("train", "take away what is none of *.jpg, *.jpeg, *.png: "),
        ("train", "b/more.webp, "),
        ("validation", "validation holds no CLASS/*.jpg"),
        ("test[:1]", "letters and digits"),
        ("test[:1],test[1:]", "names a split twice"),
    ):
        assert pack.main([*flags, "--splits", splits]) == 2
        assert message in capsys.readouterr().err
    for file in ("b/30.PNG", "c/40.png"):
        (tmp_path / "photos/test" / file).write_bytes(b"\x89PNG, cut off")
    assert pack.main([*flags, "--splits", "test"]) == 3
    error = capsys.readouterr().err
    assert "cannot be decoded as an image: " in error
    assert "b/30.PNG, " in error and "c/40.png\n" in error
