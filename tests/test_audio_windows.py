"""Long recordings cut into windows."""

import time

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from corpora_trees import write_table

from datasets_scripts import ClipIdentities, corpus_report, cut_into_windows, decode_audio, load_corpus
from datasets_scripts.errors import AudioError, CorpusError
from datasets_scripts.windows import MIN_NEW_SHARE
from modeling_dls import feature_extraction_esresnet

RATE = 8000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """20 s with silence from 5 to 10 s, 3 s, 1 s, and 7 s in stereo; by length."""
    folder = tmp_path_factory.mktemp("recordings")
    sound = 0.1 * np.random.default_rng(0).standard_normal((RATE * 20, 2))
    sound[RATE * 5 : RATE * 10] *= 1e-4
    rows = []
    for name, seconds, channels in (("20.wav", 20, 1), ("3.wav", 3, 1), ("1.wav", 1, 1), ("7.ogg", 7, 2)):
        soundfile.write(folder / name, sound[: RATE * seconds, :channels], RATE)
        rows.append({"file_name": name, "label": "abcd"[len(rows)], "fold": len(rows) + 1, "source_id": name})
    write_table(folder / "metadata.csv", rows)
    return load_corpus("audiofolder", folder, cache_dir=folder.parent / "cache")


def spans(dataset, file):
    rows = [row for row in dataset if row["source_id"] == file]
    return [(row["clip_start"], row["clip_end"]) for row in rows]


def test_windows_of_each_file(recordings):
    windows, left_out = cut_into_windows(recordings, 2.5)
    assert left_out == 0
    assert spans(windows, "20.wav") == [(2.5 * n, 2.5 * n + 2.5) for n in range(8)]
    assert spans(windows, "7.ogg") == [(0, 2.5), (2.5, 5), (4.5, 7)], "the last ends with the file"
    assert spans(windows, "3.wav") == [(0, 2.5), (0.5, 3)]
    assert spans(windows, "1.wav") == [(0, np.inf)], "what one window holds stays as it is"
    assert spans(cut_into_windows(recordings, 2.75)[0], "3.wav") == [(0, np.inf)], "next to nothing would be new"
    assert len(set(windows["clip_id"][:])) == len(windows)
    whole = {row["source_id"]: row for row in recordings}
    for row in windows:
        file = whole[row["source_id"]]
        part = row["clip_end"] != np.inf
        assert row["clip_id"] == file["clip_id"] + (f"@{row['clip_start']:.3f}" if part else "")
        assert row["num_frames"] == (20_000 if part else file["num_frames"])
        assert all(row[key] == file[key] for key in ("audio", "label", "fold", "digest", "sampling_rate"))
        samples, _ = decode_audio(row["audio"], row["clip_start"], row["clip_end"])
        assert samples.shape == (row["num_channels"], row["num_frames"])
    assert corpus_report(windows) == corpus_report(recordings)
    assert windows.features["label"] == recordings.features["label"]


def test_windows_know_what_they_share(recordings):
    windows = ClipIdentities.of(cut_into_windows(recordings, 2.5)[0])
    files = ClipIdentities.of(recordings)
    assert windows.is_whole.sum() == 1
    assert windows.shared_with(files).all()
    one, next_one, later = windows[[0]], windows[[1]], windows[[2]]
    assert not one.shared_with(next_one).any() and not next_one.shared_with(later).any(), "they only touch"
    halves = ClipIdentities.of(cut_into_windows(recordings, 2.5, overlap=0.5)[0])
    assert halves[[0]].shared_with(halves[[1]]).all()


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.95])
def test_windows_cover_the_file(recordings, overlap):
    for seconds in (0.7, 1.3, 3.2):
        found = np.array(spans(cut_into_windows(recordings, seconds, overlap)[0], "20.wav"))
        starts, ends = found.T
        assert starts[0] == 0 and ends[-1] <= 20
        assert ends[-1] > 20 - MIN_NEW_SHARE * seconds - 2 / RATE
        steps = np.diff(starts)
        assert np.allclose(steps[:-1], seconds * (1 - overlap), atol=1 / RATE) and (steps > 0).all()
        assert np.allclose(ends - starts, seconds, atol=1 / RATE)


def test_silent_windows_are_left_out(recordings):
    windows, left_out = cut_into_windows(recordings, 2.5, silence_db=-60)
    assert left_out == 2
    assert spans(windows, "20.wav") == [(2.5 * n, 2.5 * n + 2.5) for n in (0, 1, 4, 5, 6, 7)]
    with pytest.raises(CorpusError, match="no window is left: all 14 are below 10 dB"):
        cut_into_windows(recordings, 2.5, silence_db=10)
    loud, left_out = cut_into_windows(recordings, 2.5, silence_db=-20.1)
    assert left_out and len(loud), "noise with a standard deviation of 0.1 is at -20 dB"


def test_levels_are_those_of_the_windows(recordings):
    """Overlapping windows, summed from the stretches between their edges."""
    windows, _ = cut_into_windows(recordings, 1.7, overlap=0.8)
    levels = [
        10 * np.log10(np.mean(np.square(decode_audio(row["audio"], row["clip_start"], row["clip_end"])[0], dtype="d")))
        for row in windows
    ]
    for limit in (-70.0, -25.0, -20.05, -20.0, -19.95):
        try:
            kept = len(cut_into_windows(recordings, 1.7, overlap=0.8, silence_db=limit)[0])
        except CorpusError:
            kept = 0
        assert kept == sum(level >= limit for level in levels)


def test_windows_of_windows(recordings):
    twice, _ = cut_into_windows(cut_into_windows(recordings, 10.0)[0], 2.5)
    once, _ = cut_into_windows(recordings, 2.5)
    assert spans(twice, "20.wav") == spans(once, "20.wav")
    assert len(set(twice["clip_id"][:])) == len(twice)


@pytest.mark.parametrize(
    ("seconds", "overlap"),
    [(0, 0), (-1, 0), (float("nan"), 0), (float("inf"), 0), (1, 1), (1, -0.1), (1, float("nan")), (1e-4, 0)],
)
def test_nonsense_is_refused(recordings, seconds, overlap):
    with pytest.raises(CorpusError, match="expected an overlap from 0 to below 1"):
        cut_into_windows(recordings, seconds, overlap)


def test_file_that_cannot_be_decoded_is_named(recordings, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(RATE), RATE)
    dataset = load_corpus("audiofolder", tmp_path, cache_dir=tmp_path / "cache")
    (tmp_path / "a.wav").unlink()
    with pytest.raises(AudioError, match=r"a\.wav: the file does not exist"):
        cut_into_windows(dataset, 0.1, silence_db=-60)


def test_many_windows_of_long_recordings(recordings):
    """Ten hours are not decoded, and 100,000 windows take seconds."""
    long = recordings.remove_columns("num_frames").add_column("num_frames", [RATE * 36_000] * len(recordings))
    begun = time.perf_counter()
    windows, _ = cut_into_windows(long, 2.5, overlap=0.5)
    assert len(windows) == 4 * 28_799
    assert windows[len(windows) - 1]["clip_end"] == 36_000
    assert time.perf_counter() - begun < 20


def test_embedded_sound_is_not_copied(recordings):
    content = bytes(2_000_000)
    rows = [row | {"audio": {"bytes": content, "path": "a.wav"}} for row in recordings]
    table = pa.Table.from_pylist(rows, schema=recordings.features.arrow_schema)
    embedded = datasets.Dataset(table, info=recordings.info, fingerprint="embedded").select([3, 0, 1])
    before = pa.total_allocated_bytes()
    windows, _ = cut_into_windows(embedded, 2.5, overlap=0.9)
    assert len(windows) > 70
    assert pa.total_allocated_bytes() - before < 1_000_000
    assert not windows.cache_files, "nothing was written"
    assert windows[5]["audio"]["bytes"] == content
    assert windows.remove_columns("audio")[0]["source_id"] == "7.ogg"


def test_a_published_model_and_a_corpus_agree_when_a_last_window_is_worth_it():
    """A checkpoint's code is by itself, and has the number once more."""
    assert feature_extraction_esresnet.MIN_NEW_SHARE == MIN_NEW_SHARE
