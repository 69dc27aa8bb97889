"""The data sets of the papers: what their folders hold and where they come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        title: for people.
        holds: what the folder must hold.
        origin: who publishes it.
    """

    title: str
    holds: str
    origin: str


SOURCES = {
    "cifar10": Source(
        "CIFAR-10",
        "the published pickles (data_batch_1 ... test_batch) or binaries (.bin), or "
        "train/CLASS/*.jpg and test/CLASS/*.jpg",
        "Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html, 170 MB",
    ),
    "cifar100": Source(
        "CIFAR-100",
        "the published pickles (train, test) or binaries (train.bin, test.bin), or folders of "
        "images as above",
        "Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html, 170 MB",
    ),
    "imagenet": Source(
        "ImageNet (ILSVRC-2012)",
        "train/CLASS/*.JPEG and val/CLASS/*.JPEG, 1,000 classes each",
        "www.image-net.org, with an account; the validation images have to be sorted into their "
        "classes; 150 GB",
    ),
    "wmt14": Source(
        "WMT14 German-English",
        "train.de and train.en (or a folder train with such pairs), valid.de and valid.en, test.de "
        "and test.en, one sentence a line",
        "www.statmt.org/wmt14/translation-task.html: Europarl, Common Crawl, News Commentary; "
        "newstest2013 to validate; the test set by `sacrebleu -t wmt14/full -l de-en --echo src` "
        "(and `ref`)",
    ),
    "glue": Source(
        "GLUE",
        "CoLA, MNLI, QNLI, QQP, SST-2 with train.tsv and dev.tsv (MNLI: dev_matched.tsv)",
        "gluebenchmark.com/tasks",
    ),
    "bert": Source(
        "BERT",
        "a checkpoint that transformers reads, or its name on a hub (bert-base-uncased)",
        "Devlin et al. 2018",
    ),
}
