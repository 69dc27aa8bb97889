"""CIFAR-10 and CIFAR-100 in their three forms, the cache, and the augmentation."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from papers.models import imagenet_resnet18, imagenet_resnet50, resnet, wide_resnet
from papers.tasks import CifarModel
from training.cifar import Cifar, cache_name, load_cifar
from training.recipe import Recipe
from training.tasks import ByteTransformer, DigitsConvnet, make_task

RECIPE = Recipe("sgd", 0.1, (0.1,), epochs=1)


@pytest.fixture
def records():
    """Labels and pixels of five training batches and one test batch of three images each."""
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 10, 3, np.uint8), random.integers(0, 256, (3, 3072), np.uint8))
        for _ in range(6)
    ]


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_pickles(folder, records):
    folder.mkdir(parents=True)
    for name, (labels, pixels) in zip(NAMES, records, strict=True):
        content = pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2)
        # As the published files have it, which numpy 1 wrote.
        content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        (folder / name).write_bytes(content)


def write_binaries(folder, records):
    folder.mkdir(parents=True)
    for name, (labels, pixels) in zip(NAMES, records, strict=True):
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")


def assert_equal(data, records):
    labels = np.concatenate([part for part, _ in records[:5]])
    pixels = np.concatenate([part for _, part in records[:5]])
    assert data.train_labels.tolist() == labels.tolist()
    assert torch.equal(data.train_images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
    assert data.test_labels.tolist() == records[5][0].tolist()
    assert torch.equal(data.test_images, torch.from_numpy(records[5][1].reshape(-1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("write", "folder"),
    [(write_pickles, "cifar-10-batches-py"), (write_binaries, "cifar-10-batches-bin")],
)
def test_published_files_are_read(tmp_path, records, write, folder):
    write(tmp_path / folder, records)
    assert_equal(load_cifar(tmp_path, 10), records)
    assert_equal(load_cifar(tmp_path / folder, 10, tmp_path / "other.npy"), records)


def write_jpegs(root, count=2):
    from PIL import Image

    names = [f"class-{i}" for i in range(2, 10)]
    colours = {"airplane": (200, 0, 0), "bird": (0, 200, 0), **dict.fromkeys(names, (9, 9, 9))}
    for split in ("train", "test"):
        for name, colour in colours.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(c + 20 * i for c in colour)
                Image.new("RGB", (32, 32), shade).save(root / split / name / f"{i:04}.jpg")


def test_jpegs_are_read_with_classes_in_alphabetical_order(tmp_path):
    write_jpegs(tmp_path)
    data = load_cifar(tmp_path, 10)
    labels = [label for label in range(10) for _ in range(2)]
    assert data.train_labels.tolist() == data.test_labels.tolist() == labels
    # JPEG keeps a flat colour to within 2 of 255: it rounds chroma and luma once each.
    red, brighter, green, _ = (image.double().mean(dim=(1, 2)) for image in data.train_images[:4])
    for seen, wanted in ((red, (200, 0, 0)), (brighter, (220, 20, 20)), (green, (0, 200, 0))):
        assert (seen - torch.tensor(wanted)).abs().max() <= 2


def test_the_cache_is_one_array_and_is_used(tmp_path, records):
    write_binaries(tmp_path / "data", records)
    load_cifar(tmp_path / "data", 10)
    cache = np.load(tmp_path / "data" / cache_name(10))
    assert cache.dtype == np.uint8 and cache.shape == (18, 3074)
    for file in (tmp_path / "data").glob("*.bin"):
        file.unlink()
    assert_equal(load_cifar(tmp_path / "data", 10), records)
    assert not list((tmp_path / "data").glob("*.part"))


def test_a_pickle_cannot_run_code(tmp_path, records):
    write_pickles(tmp_path / "data", records)

    class Harmful:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "data" / "data_batch_3").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"holds no builtins\.print"):
        load_cifar(tmp_path / "data", 10)


def test_wrong_data_is_named(tmp_path, records):
    with pytest.raises(FileNotFoundError, match="found none of them"):
        load_cifar(tmp_path, 10)
    write_binaries(tmp_path / "short", records)
    (tmp_path / "short" / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: expected records of 3073 bytes"):
        load_cifar(tmp_path / "short", 10)
    write_pickles(tmp_path / "other", records)
    (tmp_path / "other" / "test_batch").write_bytes(pickle.dumps({b"data": [1]}))
    with pytest.raises(ValueError, match="test_batch: expected a dict"):
        load_cifar(tmp_path / "other", 10)
    np.save(tmp_path / "cache.npy", np.zeros((2, 5), np.uint8))
    with pytest.raises(ValueError, match=r"cache\.npy: expected uint8 \[n, 3074\]"):
        load_cifar(tmp_path, 10, tmp_path / "cache.npy")
    write_binaries(tmp_path / "part", records)
    for i in (2, 3, 4, 5):
        (tmp_path / "part" / f"data_batch_{i}.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no data_batch_2\.bin, data_batch_3"):
        load_cifar(tmp_path / "part", 10)
    write_jpegs(tmp_path / "named")
    (tmp_path / "named" / "test" / "bird").rename(tmp_path / "named" / "test" / "birds")
    with pytest.raises(ValueError, match="same classes in train and test, got bird, birds in one"):
        load_cifar(tmp_path / "named", 10)
    write_jpegs(tmp_path / "jpegs")
    from PIL import Image

    Image.new("RGB", (31, 32)).save(tmp_path / "jpegs" / "test" / "bird" / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg: expected 32 x 32 pixels"):
        load_cifar(tmp_path / "jpegs", 10)
    assert not (tmp_path / "jpegs" / cache_name(10)).exists()


# ---- tasks ----------------------------------------------------------------------------------


def cifar_task(n=40, **options):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), generator=random, dtype=torch.uint8)
    labels = torch.arange(n) % 10
    data = Cifar(images, labels, images[:20], labels[:20], 10)

    def build(classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, classes))

    return CifarModel(build, RECIPE, data, device=torch.device("cpu"), **options), images


def test_augmentation_moves_and_mirrors_whole_images():
    """Every augmented image is one of the 9 x 9 x 2 cuts of its padded original, and all occur."""
    task, _ = cifar_task(batch=8)
    padded = torch.nn.functional.pad(task._images[5, :, 4:-4, 4:-4], (4, 4, 4, 4))
    cuts = [
        cut.flip(-1) if mirror else cut
        for down in range(9)
        for right in range(9)
        for mirror in (False, True)
        for cut in [padded[:, down : down + 32, right : right + 32]]
    ]
    known = {cut.numpy().tobytes() for cut in cuts}
    assert len(known) == 162
    # 2,000 draws of 162 cuts: one is missing with probability 7e-4, and the seed is fixed.
    drawn = task._augmented(torch.full((2000,), 5), torch.Generator().manual_seed(1))
    pixels = (drawn * task._std + task._mean).round().to(torch.uint8)
    assert {image.numpy().tobytes() for image in pixels} == known


def test_an_epoch_sees_every_image_once():
    task, _ = cifar_task(batch=16)
    assert task.steps_per_epoch == 3  # 16, 16 and 8 images
    random = torch.Generator().manual_seed(0)
    batches = []
    task._augmented = lambda chosen, random: (
        batches.append(chosen) or torch.zeros(len(chosen), 3, 32, 32)
    )
    task.start_epoch(random)
    model = task.model()
    for _ in range(3):
        task.loss(model, random)
    assert sorted(torch.cat(batches).tolist()) == list(range(40))
    assert [len(batch) for batch in batches] == [16, 16, 8]


def test_error_is_the_share_of_wrong_answers():
    task, _ = cifar_task(batch=8)

    class Always3(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    assert task.scores(Always3()).error == 90.0  # 2 of 20 test images are of class 3


def test_validation_data_is_taken_from_the_training_data(monkeypatch):
    task, images = cifar_task(validation=True, batch=8)
    assert len(task._test_images) == 8 and len(task._images) == 32
    kept = torch.cat([task._images[:, :, 4:-4, 4:-4], task._test_images]).flatten(1)
    assert {tuple(i.tolist()) for i in kept} == {tuple(i.tolist()) for i in images.flatten(1)}
    small, _ = cifar_task(subset=10, batch=8)
    assert len(small._images) == 10 and len(small._test_images) == 10
    digits, held = DigitsConvnet(), DigitsConvnet(validation=True)
    assert (digits.steps_per_epoch, held.steps_per_epoch) == (1198 // 8, 958 // 8)
    assert held._test_images.shape == (240, 1, 8, 8)
    assert torch.equal(held._test_images[1, 0], digits._images[5, 1:-1, 1:-1])
    files = [bytes([i]) * 100 for i in range(20)]
    monkeypatch.setattr("demo.text._sources", lambda root: files)
    text, held_text = ByteTransformer(), ByteTransformer(validation=True)
    assert torch.equal(torch.cat([held_text._train, held_text._held_out]), text._train)
    assert len(held_text._held_out) == 360  # a fifth of nine tenths of 2,000 bytes


def test_make_task_refuses_what_does_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="expected one of digits-convnet"):
        make_task("vgg")
    with pytest.raises(ValueError, match="cifar10-resnet18 needs the folder of cifar10"):
        make_task("cifar10-resnet18")
    with pytest.raises(ValueError, match="small task"):
        make_task("digits-convnet", subset=3)
    with pytest.raises(ValueError, match="batch: expected 1 to 40"):
        cifar_task(batch=41)


# Parameter counts: 11.17, 21.28 and 36.5 million as published for ten classes, 55.8 million for
# WRN-40-10, and 641 more for each further class; torchvision's models have 11,689,512 and
# 25,557,032.
@pytest.mark.parametrize(
    ("model", "side", "classes", "parameters"),
    [
        (lambda: resnet((2, 2, 2, 2)), 32, 10, 11_173_962),
        (lambda: resnet((3, 4, 6, 3)), 32, 10, 21_282_122),
        (lambda: wide_resnet(28, 10), 32, 10, 36_479_194),
        (lambda: resnet((3, 4, 6, 3), 100), 32, 100, 21_328_292),
        (lambda: wide_resnet(40, 10, 100), 32, 100, 55_841_754 + 90 * 641),
        (imagenet_resnet18, 224, 1000, 11_689_512),
        (imagenet_resnet50, 224, 1000, 25_557_032),
    ],
)
def test_image_models_have_their_papers_size(model, side, classes, parameters):
    with torch.device("meta"):
        built = model()
        assert built(torch.empty(2, 3, side, side)).shape == (2, classes)
    assert sum(p.numel() for p in built.parameters()) == parameters
    convolutions = [m for m in built.modules() if isinstance(m, torch.nn.Conv2d)]
    if side == 32:
        assert convolutions[0].kernel_size == (3, 3) and convolutions[0].stride == (1, 1)
    assert sum(m.stride == (2, 2) for m in convolutions if m.kernel_size == (3, 3)) in (2, 3)


def test_wide_resnet_refuses_other_depths():
    with pytest.raises(ValueError, match=r"depth: expected 6 n \+ 4"):
        wide_resnet(27, 10)
