"""Paired folders: every layout on a small tree of its own, and what is said of folders with faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drsformer.data import LAYOUTS, find_pairs, pair_folders
from runtime.errors import InputError


def write(path: Path, size: tuple[int, int] = (6, 4), colour: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def plant(root: Path, *files: str) -> Path:
    for name in files:
        write(root / name)
    return root


def found(root: Path, folder: str = ".") -> list[tuple[str, ...]]:
    """Name, input and target of each pair, the files relative to `root`."""
    return [
        (pair.name, *(path.relative_to(root).as_posix() for path in (pair.input, pair.target)))
        for pair in find_pairs(root / folder)
    ]


# Files of a data set, which folder of it is given, and its pairs: name, input, target.
TREES = {
    "plain": (
        ["input/1.png", "input/2.png", "input/10.png", "target/1.png", "target/2.png", "target/10.png"],
        ".",
        [(n, f"input/{n}.png", f"target/{n}.png") for n in ("1", "2", "10")],
    ),
    "plain, other suffixes": (["input/a.jpg", "target/a.png"], ".", [("a", "input/a.jpg", "target/a.png")]),
    "Rain200L": (
        [f"{split}/{kind}" for split in ("rain_data_train_Light", "rain_data_test_Light")
         for kind in ("rain/norain-1x2.png", "rain/norain-2x2.png", "norain/norain-1.png", "norain/norain-2.png")],
        "rain_data_train_Light",
        [("norain-1x2", "rain_data_train_Light/rain/norain-1x2.png", "rain_data_train_Light/norain/norain-1.png"),
         ("norain-2x2", "rain_data_train_Light/rain/norain-2x2.png", "rain_data_train_Light/norain/norain-2.png")],
    ),
    "Rain200H": (
        ["test/rain/X2/norain-1x2.png", "test/norain/norain-1.png"],
        "test",
        [("norain-1x2", "test/rain/X2/norain-1x2.png", "test/norain/norain-1.png")],
    ),
    "Rain200, x2 taken away": (["rain/norain-1.png", "norain/norain-1.png"], ".",
                               [("norain-1", "rain/norain-1.png", "norain/norain-1.png")]),
    "Rain200, renamed": (["rain/rain-7.png", "norain/norain-7.png"], ".",
                         [("rain-7", "rain/rain-7.png", "norain/norain-7.png")]),
    "Rain100, training": (
        ["RainTrainL/rain-2.png", "RainTrainL/norain-2.png", "RainTrainL/rain-10.png", "RainTrainL/norain-10.png"],
        "RainTrainL",
        [(f"rain-{n}", f"RainTrainL/rain-{n}.png", f"RainTrainL/norain-{n}.png") for n in (2, 10)],
    ),
    "Rain100, test": (
        [f"Rain100H/{name}.png" for name in ("rainy/rain-001", "rainy/rain-002", "norain-001", "norain-002")],
        "Rain100H",
        [(f"rain-{n}", f"Rain100H/rainy/rain-{n}.png", f"Rain100H/norain-{n}.png") for n in ("001", "002")],
    ),
    "Rain100, test in two folders": (["rainy/rain-001.png", "gt/norain-001.png"], ".",
                                     [("rain-001", "rainy/rain-001.png", "gt/norain-001.png")]),
    "Rain12": (["test12/rainy/1.png", "test12/groundtruth/1.png"], "test12",
               [("1", "test12/rainy/1.png", "test12/groundtruth/1.png")]),
    **{
        f"Outdoor-Rain, {folder}": (
            [*(f"{folder}/im_0601_s{s}_a0{a}.png" for s in (80, 100) for a in (4, 5)), "gt/im_0601.png"], ".",
            [(f"im_0601_s{s}_a0{a}", f"{folder}/im_0601_s{s}_a0{a}.png", "gt/im_0601.png")
             for s in (80, 100) for a in (4, 5)],
        )
        for folder in ("in", "input", "data")
    },
    "DID-Data, training": (
        [f"DID-MDN-training/Rain_{density}/train2018new/{n}.jpg" for density in ("Heavy", "Light") for n in (2, 10)],
        "DID-MDN-training",
        [(f"Rain_{density}/{n}", *[f"DID-MDN-training/Rain_{density}/train2018new/{n}.jpg"] * 2)
         for density in ("Heavy", "Light") for n in (2, 10)],
    ),
    "DID-Data, one density": (["Rain_Medium/train2018new/0.jpg"], "Rain_Medium/train2018new",
                              [("0", *["Rain_Medium/train2018new/0.jpg"] * 2)]),
    "DID-Data, test": (["DID-MDN-test/9.jpg", "DID-MDN-test/11.jpg"], "DID-MDN-test",
                       [("9", *["DID-MDN-test/9.jpg"] * 2), ("11", *["DID-MDN-test/11.jpg"] * 2)]),
    "DDN-Data": (
        [*(f"testing/rainy_image/{b}_{n}.jpg" for b in (901, 1000) for n in (1, 2, 14)),
         "testing/ground_truth/901.jpg", "testing/ground_truth/1000.jpg"],
        "testing",
        [(f"{b}_{n}", f"testing/rainy_image/{b}_{n}.jpg", f"testing/ground_truth/{b}.jpg")
         for b in (901, 1000) for n in (1, 2, 14)],
    ),
    "DDN-Data, packed with a target for every input": (
        ["input/901_1.jpg", "input/901_2.jpg", "target/901_1.jpg", "target/901_2.jpg", "target/901.jpg"], ".",
        [("901_1", "input/901_1.jpg", "target/901_1.jpg"), ("901_2", "input/901_2.jpg", "target/901_2.jpg")],
    ),
    "SPA-Data, test": (["real_test_1000/rain/000.png", "real_test_1000/gt/000gt.png"], "real_test_1000",
                       [("000", "real_test_1000/rain/000.png", "real_test_1000/gt/000gt.png")]),
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_layout(tmp_path, tree):
    files, folder, expected = TREES[tree]
    assert found(plant(tmp_path, *files), folder) == expected


def test_current_folder_by_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(plant(tmp_path, "DID-MDN-test/0.jpg") / "DID-MDN-test")
    assert [pair.name for pair in find_pairs(".")] == ["0"]


SPA = ["real_world/000/000-1/000-1_0_0.png", "real_world/000/000-2/000-2_0_0.png", "real_world_gt/000/000_0_0.png"]


def test_spa_list(tmp_path):
    plant(tmp_path, *SPA)
    lines = [f"/{rainy} /{SPA[2]}" for rainy in (SPA[1], SPA[0])]
    (tmp_path / "real_world.txt").write_text("\n".join(lines) + "\n\n")
    assert found(tmp_path) == [(rainy[:-4], rainy, SPA[2]) for rainy in (SPA[1], SPA[0])]


def test_spa_list_of_the_test_set(tmp_path):
    plant(tmp_path, "real_test_1000/rain/000.png", "real_test_1000/gt/000gt.png")
    (tmp_path / "real_test_1000.txt").write_text("/real_test_1000/rain/000.png /real_test_1000/gt/000gt.png")
    assert found(tmp_path) == [
        ("real_test_1000/rain/000", "real_test_1000/rain/000.png", "real_test_1000/gt/000gt.png")
    ]


def test_spa_input_unpacked_as_a_folder(tmp_path):
    inside = "real_world/274/274-14/274-14_0_3.png/rain_s208_resize-14_0_3.png"
    plant(tmp_path, inside, "real_world_gt/274/274_0_3.png")
    (tmp_path / "real_world.txt").write_text("/real_world/274/274-14/274-14_0_3.png /real_world_gt/274/274_0_3.png\n")
    assert found(tmp_path) == [("real_world/274/274-14/274-14_0_3", inside, "real_world_gt/274/274_0_3.png")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/real_world/000/000-1/000-1_0_0.png", "line 2: expected two paths .* found"),
        ("a b c", "line 2: expected two paths"),
        (f"\n/{SPA[0]} /{SPA[2]}", "line 3: expected each rainy image once, found real_world/.* again"),
        ("/../secret.png /real_world_gt/000/000_0_0.png", "line 2: expected two paths below"),
        (f"/{SPA[0]} /real_world_gt/000/nowhere.png", "line 2: expected .*nowhere.png, found no such file"),
    ],
)
def test_fault_in_a_list(tmp_path, line, message):
    plant(tmp_path, *SPA)
    (tmp_path / "real_world.txt").write_text(f"/{SPA[0]} /{SPA[2]}\n{line}\n")
    with pytest.raises(InputError, match=message):
        find_pairs(tmp_path)


def test_list_that_is_no_text(tmp_path):
    (tmp_path / "real_world.txt").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match="line 1: expected two paths"):
        find_pairs(tmp_path)


def test_load_two_files(tmp_path):
    write(tmp_path / "input/a.png", (7, 3), (1, 2, 3))
    write(tmp_path / "target/a.png", (7, 3), (4, 5, 6))
    rainy, clean = find_pairs(tmp_path)[0].load()
    assert rainy.shape == clean.shape == (3, 7, 3)
    assert rainy.dtype == clean.dtype == np.uint8
    assert rainy[2, 6].tolist() == [1, 2, 3]
    assert clean[0, 0].tolist() == [4, 5, 6]


def test_load_side_by_side(tmp_path):
    """The rainy image is the left half."""
    folder = tmp_path / "DID-MDN-test"
    folder.mkdir()
    both = np.zeros((3, 10, 3), dtype=np.uint8)
    both[:, :5], both[:, 5:] = 200, 50
    Image.fromarray(both).save(folder / "0.png")
    rainy, clean = find_pairs(folder)[0].load()
    assert rainy.shape == clean.shape == (3, 5, 3)
    assert (rainy == 200).all()
    assert (clean == 50).all()


def test_load_side_by_side_of_odd_width(tmp_path):
    folder = tmp_path / "DID-MDN-test"
    write(folder / "0.png", (9, 4))
    with pytest.raises(InputError, match=r"0\.png: expected two images side by side, found an odd width of 9 pixels"):
        find_pairs(folder)[0].load()


def test_load_unequal_sizes(tmp_path):
    write(tmp_path / "input/a.png", (6, 4))
    write(tmp_path / "target/a.png", (4, 6))
    with pytest.raises(InputError, match=r"target/a\.png: expected 6x4 pixels as .*input/a\.png has, found 4x6"):
        find_pairs(tmp_path)[0].load()


def test_load_damaged_file(tmp_path):
    plant(tmp_path, "input/a.png", "target/a.png")
    whole = (tmp_path / "target/a.png").read_bytes()
    (tmp_path / "target/a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"target/a\.png"):
        find_pairs(tmp_path)[0].load()


def test_missing_target(tmp_path):
    """The rule that fits the most images is the one that the message goes by."""
    plant(tmp_path, *(f"rain/norain-{n}x2.png" for n in (1, 2, 3)), "norain/norain-1.png", "norain/norain-3.png")
    with pytest.raises(
        InputError, match=r"rain/norain-2x2\.png: expected its counterpart .*norain/norain-2\.\*, found"
    ):
        find_pairs(tmp_path)


def test_near_names_are_no_partners(tmp_path):
    """One image without a partner does not get another's by some other rule."""
    plant(tmp_path, "input/1.png", "input/1_2.png", "input/2.png", "target/1.png", "target/2.png")
    with pytest.raises(InputError, match=r"input/1_2\.png: expected its counterpart .*target/1_2\.\*"):
        find_pairs(tmp_path)


def ddn(*more):
    names = [f"rainy_image/{b}_{n}.jpg" for b in (901, 902) for n in range(1, 15)]
    return [*names, "ground_truth/901.jpg", "ground_truth/902.jpg", *more]


def numbers(rainy="norain-{}x2", clean="norain-{}", **odd):
    """Twelve pairs, of which the seventh may have another name."""
    return [
        f"{folder}/{name if n != 7 else odd.get(folder, name)}.png".format(n)
        for folder, name in (("rain", rainy), ("norain", clean))
        for n in range(1, 13)
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (ddn("rainy_image/901_1 - Copy.jpg"), r"rainy_image/901_1 - Copy\.jpg: .* as 901_1\.jpg and 901\.jpg have"),
        (ddn("rainy_image/901_14 (1).jpg"), r"rainy_image/901_14 \(1\)\.jpg: "),
        (
            ddn("rainy_image/901_1_1.jpg"),
            r"rainy_image/901_1_1\.jpg: expected its counterpart .*ground_truth/901_1\.\*",
        ),
        (ddn("rainy_image/Copy of 901_1.jpg"), r"rainy_image/Copy of 901_1\.jpg: "),
        (ddn("rainy_image/a.jpg"), r"rainy_image/a\.jpg: "),
        (numbers(rain="norain-07x2"), r"rain/norain-07x2\.png: .* found norain-7\.png with other zeros"),
        (
            numbers(norain="norain-07"),
            r"norain/norain-07\.png: expected norain-7\.\* for .*rain/norain-7x2\.png, found other",
        ),
        (numbers("{:03}", "{:03}", rain="7"), r"/rain/7\.png: .* found 007\.png with other zeros"),
        (
            numbers("{:03}", "{:03}", norain="7"),
            r"/norain/7\.png: expected 007\.\* for .*/rain/007\.png, found other zeros",
        ),
        (numbers("{:03}", "{}"), r"/rain/001\.png: .* found 1\.png with other zeros"),
    ],
)
def test_the_odd_file_is_named(tmp_path, files, message):
    with pytest.raises(
        InputError, match=f"{tmp_path}/{message}" if message[0] != "/" else f"{tmp_path}{message}"
    ) as error:
        find_pairs(plant(tmp_path, *files))
    assert str(error.value).startswith(str(tmp_path))


def test_no_partner_at_all(tmp_path):
    plant(tmp_path, "input/a.png", "target/b.png")
    with pytest.raises(InputError, match=r"input/a\.png: expected its counterpart .*target/a\.\*"):
        find_pairs(tmp_path)


def test_folder_against_itself(tmp_path):
    pair = pair_folders(plant(tmp_path, "a.png"), tmp_path)[0]
    assert [image.shape for image in pair.load()] == [(4, 6, 3)] * 2


def test_targets_may_be_left_over(tmp_path):
    plant(tmp_path, "restored/1.png", "target/1.png", "target/2.png")
    assert [pair.name for pair in pair_folders(tmp_path / "restored", tmp_path / "target")] == ["1"]


@pytest.mark.parametrize("empty", ["input", "target"])
def test_empty_folder(tmp_path, empty):
    plant(tmp_path, "input/a.png", "target/a.png")
    (tmp_path / empty / "a.png").rename(tmp_path / empty / "a.txt")
    with pytest.raises(InputError, match=rf"{empty}: expected images ending in \.png.* found none"):
        find_pairs(tmp_path)


def test_two_images_of_a_name(tmp_path):
    plant(tmp_path, "input/a.png", "target/a.jpg", "target/a.png")
    with pytest.raises(InputError, match=r"target: expected one image of a name, found a\.jpg and a\.png"):
        find_pairs(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere: expected a folder of pairs, found no such folder"):
        find_pairs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        ([], "nothing"),
        (["train/input/1.png", "train/target/1.png", "test/input/1.png"], "test/, train/"),
        ([f"{n}.png" for n in (1, 2, 3, 4, 5, 10)], r"1\.png, 2\.png, 3\.png, 4\.png, 5\.png, \.\.\."),
    ],
)
def test_unknown_layout(tmp_path, files, listed):
    plant(tmp_path, *files)
    with pytest.raises(InputError, match=f"found {listed}$") as caught:
        find_pairs(tmp_path)
    assert all(layout.looks in str(caught.value) for layout in LAYOUTS)
    assert "\n" not in str(caught.value)
