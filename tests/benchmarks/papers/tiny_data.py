"""Tiny data sets in the file formats in which the papers' data are published."""

from __future__ import annotations

import pickle

import numpy as np


def write_cifar100_pickles(folder, n=24):
    """As ``cifar-100-python``, which numpy 1 and Python 2 wrote; returns fine labels by split."""
    place = folder / "cifar-100-python"
    place.mkdir(parents=True)
    labels = {}
    for split, count, seed in (("train", n, 0), ("test", n // 2, 1)):
        random = np.random.default_rng(seed)
        labels[split] = random.integers(0, 100, count).tolist()
        content = pickle.dumps(
            {
                b"filenames": [b"a_s_%06d.png" % i for i in range(count)],
                b"batch_label": b"batch 1 of 1",
                b"fine_labels": labels[split],
                b"coarse_labels": [label // 5 for label in labels[split]],
                b"data": random.integers(0, 256, (count, 3072), np.uint8),
            },
            protocol=2,
        )
        content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        (place / split).write_bytes(content)
    return labels


def write_cifar100_binaries(folder, n=24):
    """As ``cifar-100-binary``: coarse label, fine label, pixels; returns fine labels by split."""
    place = folder / "cifar-100-binary"
    place.mkdir(parents=True)
    labels = {}
    for split, count, seed in (("train", n, 0), ("test", n // 2, 1)):
        random = np.random.default_rng(seed)
        fine = random.integers(0, 100, count).astype(np.uint8)
        pixels = random.integers(0, 256, (count, 3072), np.uint8)
        records = np.concatenate([fine[:, None] // 5, fine[:, None], pixels], axis=1)
        records.astype(np.uint8).tofile(place / f"{split}.bin")
        labels[split] = fine.tolist()
    return labels


def write_cifar10_binaries(folder, n=4):
    """As ``cifar-10-batches-bin``: five batches of n images, and n test images."""
    place = folder / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = random.integers(0, 10, (n, 1), np.uint8)
        pixels = random.integers(0, 256, (n, 3072), np.uint8)
        np.concatenate([labels, pixels], axis=1).tofile(place / f"{name}.bin")


def write_imagenet(folder, classes=1000, images=1):
    """``train/nXXXXXXXX/*.JPEG`` and ``val/...``; small images of sizes that differ."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            place = folder / split / f"n{label:08}"
            place.mkdir(parents=True)
            for i in range(images):
                shade = tuple(random.integers(0, 256, 3).tolist())
                size = (20 + label % 7, 18 + label % 5)
                Image.new("RGB", size, shade).save(place / f"{split}_{label:04}_{i}.JPEG")


_WORDS = (
    ("der", "the"),
    ("Hund", "dog"),
    ("Katze", "cat"),
    ("schläft", "sleeps"),
    ("läuft", "runs"),
    ("heute", "today"),
    ("nicht", "not"),
    ("groß", "big"),
)


def write_parallel_text(folder, n=40):
    """``train``, ``valid`` and ``test`` in German and English, word by word the same."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in (("train", n), ("valid", 8), ("test", 6)):
        sides = [[], []]
        for _ in range(count):
            words = [_WORDS[i] for i in random.integers(0, len(_WORDS), random.integers(2, 8))]
            for side, sentence in enumerate(zip(*words, strict=True)):
                sides[side].append(" ".join(sentence) + " .")
        for language, lines in zip(("de", "en"), sides, strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_glue(folder, n=16):
    """The five tasks' files with their columns as GLUE publishes them."""

    def sentence(i):
        return f'the "film" number {i} is {("bad", "good")[i % 2]}'

    tables = {
        "CoLA": (None, lambda i: ("gj04", str(i % 2), "" if i % 2 else "*", sentence(i))),
        "SST-2": (("sentence", "label"), lambda i: (sentence(i), str(i % 2))),
        "QNLI": (
            ("index", "question", "sentence", "label"),
            lambda i: (str(i), "what ?", sentence(i), ("entailment", "not_entailment")[i % 2]),
        ),
        "QQP": (
            ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
            lambda i: (str(i), "1", "2", sentence(i), sentence(i + 1), str(i % 2)),
        ),
        "MNLI": (
            ("index", "promptID", "genre", "sentence1", "sentence2", "label1", "gold_label"),
            lambda i: (
                str(i),
                "1",
                "fiction",
                sentence(i),
                sentence(i + 1),
                "neutral",
                ("contradiction", "entailment", "neutral")[i % 3],
            ),
        ),
    }
    for task, (head, line) in tables.items():
        (folder / task).mkdir(parents=True)
        dev = "dev_matched" if task == "MNLI" else "dev"
        for name, count in (("train", n), (dev, n // 2)):
            rows = [] if head is None else ["\t".join(head)]
            rows += ["\t".join(line(i)) for i in range(count)]
            (folder / task / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_bert(folder):
    """A checkpoint of a BERT of 2 layers and 16 numbers a token, with a word-piece vocabulary."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    words = ["the", "film", "number", "is", "bad", "good", "what", "?", '"', *"0123456789"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{i}" for i in range(10))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
