"""A base transformer that translates, on parallel text files: subwords, beam search, BLEU.

Subwords are learned by ``tokenizers``, the model and its beam search are those of ``transformers``
(Marian's, which is the transformer of Vaswani et al. 2017 with fixed sinusoidal positions), and
``sacrebleu`` computes BLEU.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from training.ranks import Ranks
from training.task import Scores

from .recipe import PaperRecipe

SOURCE, TARGET = "de", "en"  # UAI 2024, section 6.2: German to English
SUBWORDS = 37_000  # of both languages together, Vaswani et al. 2017
_PAD, _UNKNOWN, _END = "<pad>", "<unk>", "</s>"
_SMOOTHING = 0.1
_MOST_TOKENS = 256  # longer pairs are left out of training
_BEAMS, _LENGTH_PENALTY, _LONGER = 4, 0.6, 50  # Vaswani et al. 2017: at most 50 more than the input
_TRANSLATED = 64  # sentences at a time
_ENCODED = 10_000  # sentences at a time
STEPS = 1000  # of a nominal epoch: 10,000 iterations are ten of them


def read_pairs(root: Path, split: str) -> tuple[list[str], list[str]]:
    """Source and target sentences of ``SPLIT.de`` and ``SPLIT.en``, or of all in folder ``SPLIT``.

    Raises:
        FileNotFoundError: there is no such pair of files.
        ValueError: the two files differ in their numbers of lines.
    """
    places = [root] if (root / f"{split}.{SOURCE}").is_file() else [root / split]
    sources = [p for place in places for p in sorted(place.glob(f"*.{SOURCE}"))]
    if places == [root]:
        sources = [root / f"{split}.{SOURCE}"]
    if not sources:
        raise FileNotFoundError(
            f"{root}: expected {split}.{SOURCE} and {split}.{TARGET}, one sentence a line, or a "
            f"folder {split} with pairs of such files, found neither"
        )
    sides: tuple[list[str], list[str]] = ([], [])
    for source in sources:
        target = source.with_suffix(f".{TARGET}")
        if not target.is_file():
            raise FileNotFoundError(f"{target}: expected the translations of {source.name}")
        # Not splitlines(): sentences contain other separators, such as U+2028.
        lines = [p.read_text(encoding="utf-8").rstrip("\n").split("\n") for p in (source, target)]
        if len(lines[0]) != len(lines[1]):
            raise ValueError(
                f"{target}: expected {len(lines[0])} lines, as in {source.name}, got "
                f"{len(lines[1])}"
            )
        for side, part in zip(sides, lines, strict=True):
            side += part
    return sides


class Sentences(Sequence[np.ndarray]):
    """Token ids of many sentences, end to end in one array.

    Args:
        ids: uint16 ``[tokens]``.
        lengths: int64 ``[n]``, tokens of each sentence.
    """

    def __init__(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.ids, self.lengths = ids, lengths
        self._starts = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: Any) -> np.ndarray:
        start = self._starts[i]
        return self.ids[start : start + self.lengths[i]]

    def only(self, kept: np.ndarray) -> Sentences:
        """Those that a mask ``[n]`` chooses."""
        return Sentences(self.ids[np.repeat(kept, self.lengths)], self.lengths[kept])


class Translation:
    """A transformer on parallel text.

    An epoch is 1,000 steps by name, and draws its batches from all training sentences, of similar
    lengths together. The test sentences are translated by beam search.

    Args:
        paper: the recipe.
        data: folder with ``train``, ``valid`` and ``test`` in both languages; see
            :func:`read_pairs`.
        device: where the model trains.
        cache: file of the vocabulary; ``subwords.json`` next to the data unless given. The encoded
            training sentences are kept next to it.
        batch: tokens a step of each language, padding included.
        subset: pairs to train on, and at most as many to validate and to test on; None: all.
        validation: translate the validation sentences instead of the test's.
        subwords: how many are learned.
        size: of the model; see :func:`build`.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_pairs`; or no pair fits a batch.
        ImportError: a package is missing; the message names the extra that brings it.
    """

    measure = "100 - BLEU"
    evaluate_every = 1  # UAI 2024, Figure 12, is a curve

    def __init__(
        self,
        paper: PaperRecipe,
        data: str | Path,
        *,
        device: torch.device,
        cache: str | Path | None = None,
        batch: int | None = None,
        subset: int | None = None,
        validation: bool = False,
        subwords: int = SUBWORDS,
        size: str = "base",
    ) -> None:
        self.recipe, self._device, self._size, self._ranks = paper.recipe, device, size, Ranks()
        root = Path(data)
        train = [side[:subset] for side in read_pairs(root, "train")]
        valid = [side[:subset] for side in read_pairs(root, "valid")]
        test = valid if validation else [side[:subset] for side in read_pairs(root, "test")]
        path = root / "subwords.json" if cache is None else Path(cache)
        self._vocabulary = _vocabulary(path, train, subwords)
        self._end = self._vocabulary.token_to_id(_END)
        self._pad = self._vocabulary.token_to_id(_PAD)
        self._train = self._encoded_once(path, train)
        self._valid = self._encoded(valid)
        self._test_sources = self._side(test[0])
        self._references = test[1]
        self._tokens = (batch or 25_000) // self._ranks.size
        self._sizes = np.maximum(self._train[0].lengths, self._train[1].lengths)
        if not len(self._sizes):
            raise ValueError(
                f"{root}: expected training pairs of 1 to {_MOST_TOKENS - 1} subwords, got none"
            )
        if int(self._sizes.min()) > self._tokens:
            raise ValueError(
                f"batch: expected at least {self._sizes.min()} tokens for each of "
                f"{self._ranks.size} ranks, the shortest training pair, got {self._tokens}"
            )
        self._order: list[np.ndarray] = []
        # Fewer than 1,000 only where the data have no more batches: an epoch repeats none.
        self.steps_per_epoch = min(STEPS, len(self._cut(np.argsort(self._sizes))))

    def model(self) -> nn.Module:
        """On the device."""
        return build(self._vocabulary.get_vocab_size(), self._pad, self._end, self._size).to(
            self._device
        )

    def start_epoch(self, random: Generator) -> None:
        """Draw this epoch's batches; every rank draws the same and takes its own of each."""
        device = random.device
        noise = torch.rand(len(self._sizes), generator=random, device=device).cpu().numpy()
        # Of equal lengths in a new order each time, of lengths within 10 % mixed.
        batches = self._cut(np.argsort(self._sizes * (1 + 0.1 * noise)))
        drawn = torch.randperm(len(batches), generator=random, device=device).cpu().tolist()
        mine = [drawn[i] for i in range(self._ranks.rank, len(drawn), self._ranks.size)]
        while len(mine) < self.steps_per_epoch:  # more ranks than batches for them
            mine += mine
        self._order = [batches[i] for i in mine[: self.steps_per_epoch]][::-1]

    def loss(self, model: nn.Module, random: Generator) -> Tensor:
        """Cross entropy of the next batch with smoothed labels, in nats per target token."""
        return self._cross_entropy(model, self._train, self._order.pop(), _SMOOTHING)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        """100 - BLEU of the test sentences, and the validation loss in nats per token."""
        sacrebleu = _needed("sacrebleu")
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for part in self._cut(np.arange(len(self._valid[0])), self._valid):
            tokens = sum(len(self._valid[1][i]) for i in part)
            total[0] += float(self._cross_entropy(model, self._valid, part, 0.0)) * tokens
            total[1] += tokens
        bleu = sacrebleu.corpus_bleu(self.translate(model), [self._references]).score
        return Scores(100.0 - bleu, float(total[0] / total[1]))

    @torch.no_grad()
    def translate(self, model: nn.Module) -> list[str]:
        """The test sentences by beam search; with several ranks every one translates its share."""
        mine = list(range(self._ranks.rank, len(self._test_sources), self._ranks.size))
        # Long ones first: if memory is short, it is so at once.
        mine.sort(key=lambda i: -len(self._test_sources[i]))
        texts = {}
        for start in range(0, len(mine), _TRANSLATED):
            part = mine[start : start + _TRANSLATED]
            ids, mask = self._padded([self._test_sources[i] for i in part])
            made = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                num_beams=_BEAMS,
                length_penalty=_LENGTH_PENALTY,
                max_new_tokens=ids.shape[1] + _LONGER,
                do_sample=False,
            )
            for i, row in zip(part, made.tolist(), strict=True):
                texts[i] = self._vocabulary.decode(row, skip_special_tokens=True)
        if self._ranks.size > 1:
            shares: list[Any] = [None] * self._ranks.size
            torch.distributed.all_gather_object(shares, texts)
            texts = {i: text for share in shares for i, text in share.items()}
        return [texts[i] for i in range(len(self._test_sources))]

    def inputs(self, random: Generator) -> Iterator[Tensor]:
        """None: there is no batch norm."""
        return iter(())

    def _cross_entropy(
        self,
        model: nn.Module,
        data: tuple[Sentences, Sentences],
        part: np.ndarray,
        smoothing: float,
    ) -> Tensor:
        sources, mask = self._padded([data[0][i] for i in part])
        targets, _ = self._padded([data[1][i] for i in part])
        # The decoder sees the target moved by one, with a pad in front, as Marian starts.
        moved = torch.cat([torch.full_like(targets[:, :1], self._pad), targets[:, :-1]], dim=1)
        logits = model(input_ids=sources, attention_mask=mask, decoder_input_ids=moved).logits
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=self._pad,
            label_smoothing=smoothing,
        )

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Token ids ``[n, longest]`` and a mask of what is no padding."""
        ids = torch.full((len(rows), max(map(len, rows))), self._pad)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = torch.from_numpy(values.astype(np.int64))
        ids = ids.to(self._device)
        return ids, (ids != self._pad).long()

    def _cut(
        self, order: np.ndarray, data: tuple[Sentences, Sentences] | None = None
    ) -> list[np.ndarray]:
        """Batches of neighbours in an order, each of as many pairs as its longest side allows."""
        sizes = self._sizes if data is None else np.maximum(data[0].lengths, data[1].lengths)
        batches: list[np.ndarray] = []
        start, longest = 0, 0
        for end, index in enumerate(order):
            longest = max(longest, int(sizes[index]))
            if longest * (end + 1 - start) > self._tokens and end > start:
                batches.append(order[start:end])
                start, longest = end, int(sizes[index])
        batches.append(order[start:])
        return batches

    def _encoded(self, sides: Sequence[list[str]]) -> tuple[Sentences, Sentences]:
        """Token ids with an end each."""
        return self._side(sides[0]), self._side(sides[1])

    def _side(self, lines: list[str]) -> Sentences:
        blocks, lengths = [np.empty(0, np.uint16)], []
        # All at once, millions of the library's encodings with their offsets would fill the memory.
        for start in range(0, len(lines), _ENCODED):
            encoded = self._vocabulary.encode_batch(lines[start : start + _ENCODED])
            ids = [np.array([*e.ids, self._end], np.uint16) for e in encoded]
            lengths += [len(row) for row in ids]
            blocks.append(np.concatenate(ids))
        return Sentences(np.concatenate(blocks), np.array(lengths, np.int64))

    def _encoded_once(self, path: Path, sides: Sequence[list[str]]) -> tuple[Sentences, Sentences]:
        """The training pairs that are neither empty nor too long, encoded or from their file."""
        kept_in = path.with_name(f"{path.name}.train.npz")
        key = hashlib.sha256(f"{_MOST_TOKENS} {self._vocabulary.to_str()}".encode())
        key.update(_digest(sides).encode())
        if kept_in.exists():
            with np.load(kept_in) as kept:
                if str(kept["key"]) == key.hexdigest():
                    names = (("sources", "source_lengths"), ("targets", "target_lengths"))
                    source, target = (Sentences(kept[ids], kept[n]) for ids, n in names)
                    return source, target
        encoded = self._encoded(sides)
        lengths = np.stack([side.lengths for side in encoded])
        kept_pairs = ((lengths > 1) & (lengths <= _MOST_TOKENS)).all(axis=0)
        source, target = (side.only(kept_pairs) for side in encoded)
        part = kept_in.with_name(f"{kept_in.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(
                file,
                key=key.hexdigest(),
                sources=source.ids,
                source_lengths=source.lengths,
                targets=target.ids,
                target_lengths=target.lengths,
            )
        os.replace(part, kept_in)
        return source, target


def build(subwords: int, pad: int, end: int, size: str = "base") -> nn.Module:
    """Vaswani's base transformer with one embedding for both languages and the output.

    Args:
        subwords: in the vocabulary.
        pad: token of padding, with which a translation also starts.
        end: token that ends a sentence.
        size: "base", or "tiny" for tests.
    """
    transformers = _needed("transformers")
    width, layers, heads, inner = {"base": (512, 6, 8, 2048), "tiny": (16, 1, 2, 32)}[size]
    config = transformers.MarianConfig(
        vocab_size=subwords,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        activation_function="relu",
        dropout=0.1,
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        # The configuration's own 0.02 is for larger models: scaled by sqrt(512) the embeddings
        # should have the size of the positions, about 1.
        init_std=width**-0.5,
        max_position_embeddings=1024,
        pad_token_id=pad,
        eos_token_id=end,
        decoder_start_token_id=pad,
        forced_eos_token_id=None,
        bad_words_ids=None,
    )
    return transformers.MarianMTModel(config)


def _vocabulary(path: Path, train: Sequence[list[str]], subwords: int) -> Any:
    """Byte-pair subwords learned from both sides of the training text, kept in a file.

    The file says which text it was learned from; for other text or another size it is not used.
    """
    tokenizers = _needed("tokenizers")
    learned_from = f"{subwords} {_digest(train)}"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("learned_from") == learned_from:
            return tokenizers.Tokenizer.from_str(kept["vocabulary"])
    vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN))
    vocabulary.normalizer = tokenizers.normalizers.NFKC()
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    vocabulary.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=subwords, special_tokens=[_PAD, _UNKNOWN, _END], show_progress=False
    )
    vocabulary.train_from_iterator((line for side in train for line in side), trainer)
    content = {"learned_from": learned_from, "vocabulary": vocabulary.to_str()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)
    return vocabulary


def _digest(sides: Sequence[list[str]]) -> str:
    """Of all lines, one side after the other."""
    digest = hashlib.sha256()
    for side in sides:
        for line in side:
            digest.update(line.encode())
            digest.update(b"\n")
    return digest.hexdigest()


def _needed(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"translation needs {name}: pip install 'autodrop_ext[bench]'", name=name
        ) from error
