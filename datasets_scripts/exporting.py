"""A corpus in its published form: Parquet shards with the sound inside and a dataset card; written and read back."""

import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import yaml
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.errors import EntryNotFoundError

from .builder import (
    SCHEMA_VERSION,
    blank_report,
    common_features,
    corpus_report,
    describe_with_report,
    shortfalls,
)
from .corpus import Corpus
from .describing import class_table, measures, state
from .errors import CorpusError
from .markdown import Markdown, rendered

_SHARD_BYTES = 400_000_000
_BATCH_BYTES = 64_000_000
_SEED = 0  # of the clips' order within folds
_POSITION = "position"
_TEMPLATE = Path(__file__).with_name("export_card.md")
_CARD_KEY = "dls_corpus"  # the corpus report, in the card's header
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def export_corpus(dataset: datasets.Dataset, corpus: Corpus, output_dir: str | Path, command: str) -> None:
    """Write a corpus as a folder that loads anywhere with `load_dataset(folder)` and can be uploaded as it is.

    Args:
        dataset: from `load_corpus`.
        corpus: what it is, for licence and citation.
        output_dir: a folder that does not exist yet, or an empty one.
        command: what made the export, for the card.

    Raises:
        CorpusError: the folder has something in it or cannot be written. Nothing half-written is left.
    """
    target = Path(output_dir).expanduser().absolute()
    unfinished = target.with_name(target.name + ".incomplete")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CorpusError(f"{output_dir}: exists and is not an empty folder; choose another --output_dir")
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "data").mkdir(parents=True)
        folds = _published_folds(dataset)
        for fold, rows in folds.items():
            _write_shards(rows, unfinished / "data", f"fold-{fold}")
        _make_card(dataset, next(iter(folds.values())).features, corpus, command).save(unfinished / "README.md")
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
    except OSError as error:
        raise CorpusError(f"{output_dir}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _published_folds(dataset: datasets.Dataset) -> dict[int, datasets.Dataset]:
    """{fold: its clips}, shuffled: who streams them, or splits them by a share, meets all classes.

    The column `position` is each clip's place in the dataset, which `load_export` brings it back to.
    """
    dataset = dataset.add_column(_POSITION, list(range(len(dataset))))
    numbers, names = np.array(dataset["fold"][:]), np.array(dataset["clip_id"][:])
    found = {}
    for fold in sorted(set(numbers.tolist())):
        rows = np.flatnonzero(numbers == fold)
        rows = rows[np.argsort(names[rows], kind="stable")]
        found[fold] = dataset.select(np.random.default_rng(_SEED).permutation(rows))
    return found


def _configs(folds: list[int]) -> list[dict]:
    """The whole; and for each fold, it as `test` and the others as `train`."""

    def files(**splits: list[int]) -> list[dict]:
        return [
            {"split": split, "path": [f"data/fold-{fold}.*.parquet" for fold in some]}
            for split, some in splits.items()
        ]

    numbered = [fold for fold in folds if fold] if len(folds) > 1 else []
    whole = {"config_name": "default", "data_files": files(train=folds)}
    return [whole] + [
        {"config_name": f"fold-{fold}", "data_files": files(train=[f for f in folds if f != fold], test=[fold])}
        for fold in numbered
    ]


def _write_shards(dataset: datasets.Dataset, folder: Path, name: str) -> None:
    # Flat in memory: a batch of sounds at a time, of long recordings a single one, is put into the table and written.
    sizes = [_size_of(audio) for audio in dataset.with_format(None)["audio"]]
    shards = max(1, -(-sum(sizes) // _SHARD_BYTES))
    batch_size = max(1, min(32, _BATCH_BYTES // max(sizes)))
    for index in range(shards):
        shard = dataset.shard(shards, index, contiguous=True)
        # Not NAME-00000-of-00001, of which `datasets` would take NAME for a split where there is no card.
        path = folder / f"{name}.{index:05d}.parquet"
        with datasets.arrow_writer.ParquetWriter(
            path=os.fspath(path), features=dataset.features, embed_local_files=True
        ) as writer:
            for batch in shard.with_format("arrow").iter(batch_size=batch_size):
                writer.write_table(batch)
            writer.finalize()


def _size_of(audio: dict) -> int:
    return len(audio["bytes"]) if audio["bytes"] is not None else os.path.getsize(audio["path"])


def _make_card(dataset: datasets.Dataset, features: datasets.Features, corpus: Corpus, command: str) -> DatasetCard:
    configs = _configs(sorted(set(dataset["fold"][:])))
    data = DatasetCardData(
        pretty_name=corpus.title,
        license=corpus.licence_id,
        task_categories=["audio-classification"],
        tags=["audio", corpus.name],
        configs=configs,
    )
    about = datasets.DatasetInfo(features=features)
    DatasetInfosDict({config["config_name"]: about for config in configs}).to_dataset_card_data(data)
    data = DatasetCardData(**data.to_dict(), **{_CARD_KEY: corpus_report(dataset)})
    text = rendered(
        _TEMPLATE.read_text(encoding="utf-8"), card_data=Markdown(data.to_yaml()), corpus=corpus,
        columns=list(features), folds=[config["config_name"] for config in configs[1:]],
        measures=Markdown(measures(dataset)), classes=Markdown(class_table(dataset)),
        state=Markdown(state(dataset)), command=command, schema=SCHEMA_VERSION,
    )  # fmt: skip
    return DatasetCard(text)


def is_export(folder: Path) -> bool:
    """Whether a folder has the form that `export_corpus` writes."""
    return any(folder.glob("data/*.parquet"))


def is_export_of(folder: Path, dataset: datasets.Dataset) -> bool:
    """Whether a folder holds what `export_corpus` would write there; the sound itself is compared by its digests."""
    folds = list(_published_folds(dataset).values())
    features, folds = folds[0].features, [rows.remove_columns("audio") for rows in folds]
    shards = sorted(folder.glob("data/*.parquet"), key=_place)
    try:
        tables = [pyarrow.parquet.read_table(path, columns=folds[0].column_names) for path in shards]
        published = [row for table in tables for row in table.to_pylist()]
        return (
            bool(shards)
            and report_in_card(folder / "README.md") == corpus_report(dataset)
            and datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(shards[0])) == features
            and published == [row for rows in folds for row in rows.to_list()]
        )
    except (OSError, ValueError, KeyError, yaml.YAMLError):  # damaged, or something else
        return False


def _place(shard: Path) -> tuple[int, ...]:
    """Of a shard among the others: its fold and its number."""
    return tuple(int(number) for number in re.findall(r"\d+", shard.name))


def is_hub_id(source: str) -> bool:
    """Whether a text could be the name of a dataset on the Hub."""
    return bool(_HUB_ID.fullmatch(source))


def load_export(corpus: Corpus, source: str, cache_dir: str) -> datasets.Dataset:
    """Load an export from its folder or from the Hub.

    Args:
        corpus: what it must be.
        source: folder or Hub id.
        cache_dir: as for `load_corpus`.

    Raises:
        CorpusError: it cannot be loaded, or is an export of something else.
    """
    folder = Path(source) if Path(source).is_dir() else None
    try:
        dataset = datasets.load_dataset(source, split="train", cache_dir=cache_dir)
        report = report_in_card(folder / "README.md" if folder else source)
    except Exception as error:  # whatever the Hub, Parquet or YAML may raise: for the user it is one problem
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
        kind = (
            "its Parquet files or card cannot be read as" if folder else "no such folder or archive, and no Hub id of"
        )
        raise CorpusError(f"{source}: {kind} an export of {corpus.name} ({reason})") from error
    if report and report["corpus"] != corpus.name:
        raise CorpusError(f"{source}: an export of {report['corpus']}, expected one of {corpus.name}")
    names = list(corpus.class_sizes) or getattr(dataset.features.get("label"), "names", [])
    expected = common_features(names, corpus.columns)
    different = [column for column, feature in expected.items() if dataset.features.get(column) != feature]
    if different:
        raise CorpusError(f"{source}: not an export of {corpus.name}: columns {', '.join(different)} lack or differ")
    if report and report["clips"] != len(dataset):
        raise CorpusError(f"{source}: {len(dataset)} of {report['clips']} clips; export or download it again")
    if _POSITION in dataset.column_names:  # not in exports of earlier versions, which have the corpus's own order
        order = np.argsort(dataset[_POSITION][:])
        dataset = dataset.remove_columns(_POSITION).select(order)
    # Cards of earlier versions have fewer lists.
    report = blank_report(corpus.name, len(dataset)) | (report or _shortfalls_only(dataset, corpus))
    dataset.info.description = describe_with_report(corpus.title, report)
    return dataset


def report_in_card(source: str | Path) -> dict | None:
    """The report in an export's card; None without one, as after `datasets`' own upload, which writes a new card."""
    if isinstance(source, Path) and not source.exists():
        return None
    try:
        return DatasetCard.load(source).data.to_dict().get(_CARD_KEY)
    except EntryNotFoundError:
        return None


def _shortfalls_only(dataset: datasets.Dataset, corpus: Corpus) -> dict:
    plain, names = dataset.with_format(None), dataset.features["label"].names
    labels = [None if label is None else names[label] for label in plain["label"][:]]
    return {"shortfalls": shortfalls(plain["fold"][:], labels, corpus)}
