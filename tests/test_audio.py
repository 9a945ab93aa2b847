"""Decoding: exact stretches, bounded memory, headers that lie, damage, and what decoders print."""

import io
import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datasets_scripts import corpus_report, decode_audio, load_corpus, opened_sound
from datasets_scripts.__main__ import main
from datasets_scripts.errors import AudioError, CorpusError

REPOSITORY = Path(__file__).resolve().parents[1]
RATE = 44100


def sweep(seconds=3.0, rate=RATE, channels=2):
    """Sound of which every stretch is another: a sweep and noise that comes and goes."""
    time = np.arange(round(seconds * rate)) / rate
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(time)) * (np.sin(9 * time) > 0)
    mono = 0.3 * np.sin(2 * np.pi * (300 + 100 * time) * time) + noise
    return np.stack([mono * (1 - 0.1 * channel) for channel in range(channels)], axis=1).astype(np.float32)


def encoded(form, subtype=None, samples=None, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, sweep() if samples is None else samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def wav_file(data, declared, bits=16, rate=RATE, riff=None):
    fmt = struct.pack("<HHIIHH", 1, 1, rate, rate * bits // 8, bits // 8, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", declared) + data
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def pcm(seconds=1.0):
    return (sweep(seconds, channels=1) * 32767).astype("<i2").tobytes()


def xing(content, frames):
    """An MP3 whose first frame counts this many frames."""
    place = content.index(b"Xing" if b"Xing" in content[:200] else b"Info") + 8
    return content[:place] + struct.pack(">I", frames) + content[place + 4 :]


def cell(content):
    return {"bytes": content, "path": "memo.wav"}


def loaded(tmp_path, content, name="memo.wav", **options):
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / name).write_bytes(content)
    return load_corpus("audiofolder", tmp_path / "sounds", cache_dir=tmp_path / "cache", **options)


# ----------------------------------------------------------------------------------------------------------- stretches

CODECS = {
    f"{form}-{subtype}": (form, subtype, rate, channels)
    for form, subtype, rate, channels in [
        ("WAV", "PCM_U8", RATE, 2),
        ("WAV", "PCM_24", RATE, 2),
        ("WAV", "DOUBLE", 384_000, 1),
        ("WAV", "ULAW", 8000, 1),
        ("WAV", "IMA_ADPCM", RATE, 2),
        ("WAV", "GSM610", 8000, 1),
        ("WAVEX", "PCM_16", RATE, 16),
        ("RF64", "PCM_16", RATE, 2),
        ("W64", "PCM_16", RATE, 2),
        ("AIFF", "PCM_16", RATE, 2),
        ("AU", "G721_32", 8000, 1),
        ("CAF", "ALAC_16", RATE, 2),
        ("FLAC", "PCM_16", RATE, 2),
        ("OGG", "VORBIS", RATE, 2),
        ("OGG", "OPUS", 48_000, 2),
        ("MP3", "MPEG_LAYER_III", RATE, 2),
        ("MP3", "MPEG_LAYER_III", 22_050, 1),
    ]
}


@pytest.mark.parametrize(("form", "subtype", "rate", "channels"), CODECS.values(), ids=CODECS)
def test_stretch_is_the_same_part_of_a_whole_decode(form, subtype, rate, channels, tmp_path):
    path = tmp_path / "memo.sound"
    path.write_bytes(encoded(form, subtype, sweep(6.0, rate, channels), rate))
    audio = {"bytes": None, "path": str(path)}
    whole, found = decode_audio(audio)
    assert (whole.dtype, len(whole), found) == (np.float32, channels, rate)
    random = np.random.default_rng(0)
    with opened_sound(audio) as sound:
        assert sound.num_frames >= whole.shape[1] >= 6.0 * rate
        for trial in range(60):
            first = int(random.integers(0, whole.shape[1] - 1))
            last = min(whole.shape[1], first + int(random.integers(1, 20_000)))
            if trial % 2:
                blocks = list(sound.blocks(first / rate, last / rate, frames=1000))
                assert all(block.shape[1] <= 1000 and block.flags.c_contiguous for block in blocks)
                stretch = np.concatenate(blocks, axis=1)
            else:
                stretch = decode_audio(audio, first / rate, last / rate)[0]
            assert np.array_equal(stretch, whole[:, first:last]), (first, last)


def test_consecutive_stretches_leave_no_gap():
    content, third = cell(encoded("FLAC")), 1 / 3
    parts = [decode_audio(content, third * n, third * (n + 1))[0] for n in range(9)]
    assert np.array_equal(np.concatenate(parts, axis=1), decode_audio(content)[0])


def test_stretch_that_is_not_there():
    content = cell(encoded("WAV"))
    assert decode_audio(content, 2.9, 5.0)[0].shape == (2, round(0.1 * RATE))
    for start, end, words in [
        (3.0, 4.0, "ends after 3.000 s"),
        (2.0, 2.0, "no stretch"),
        (-1.0, 2.0, "no stretch"),
        (np.nan, 2.0, "no stretch"),
    ]:
        with pytest.raises(AudioError, match=rf"memo\.wav: .*{words}"):
            decode_audio(content, start, end)


def test_sound_is_read_from_several_threads_at_once():
    contents = [cell(encoded(form)) for form in ("MP3", "OGG", "FLAC", "WAV")] * 4
    alone = [decode_audio(content, 1.0, 2.0)[0] for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda content: decode_audio(content, 1.0, 2.0)[0], contents * 4))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 4, together, strict=True))


# -------------------------------------------------------------------------------------------------------------- memory

PEAK = """
import resource, sys
from datasets_scripts import opened_sound
from datasets_scripts.audio import inspect_audio
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inspect_audio(sys.argv[1])
with opened_sound({"bytes": None, "path": sys.argv[1]}) as sound:
    blocks = sum(1 for _ in sound.blocks(10.0, frames=10**9))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(("channels", "minutes"), [(1, 20), (64, 1)])
def test_memory_does_not_depend_on_length_or_channels(channels, minutes, tmp_path):
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 48_000, channels, subtype="PCM_U8") as file:
        for _ in range(minutes * 6):
            file.write(np.zeros((480_000, channels), np.int16))
    command = [sys.executable, "-c", PEAK, tmp_path / "long.wav"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, f"{done.stdout} MiB"  # decoded it would be 230 and 740


# -------------------------------------------------------------------------------------------------- headers that lie


def test_mp3_that_counts_more_frames_than_fit_into_memory(tmp_path):
    content = xing(encoded("MP3"), 0x7FFFFFFF)[:3700]
    (row,) = loaded(tmp_path, content, "memo.mp3")
    assert 0.1 < row["num_frames"] / RATE < 0.3
    assert decode_audio(row["audio"])[0].shape == (2, row["num_frames"])
    with pytest.raises(AudioError, match=r"memo\.mp3: nothing can be decoded after"):
        decode_audio(row["audio"], 1e6)


def test_mp3_of_changing_bit_rate_that_does_not_count_its_frames():
    """libsndfile guesses the length from the first frame, and decodes no further."""
    quiet = sweep(10.0) * np.where(np.arange(10 * RATE) < RATE, 1, 1e-3)[:, None].astype(np.float32)
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", RATE, 2, format="MP3", compression_level=0.5, bitrate_mode="VARIABLE"
    ) as sound:
        sound.write(quiet)
    content = file.getvalue()
    bare = content[content.index(b"\xff\xfb", 4) :]
    for plain in (bare, b"ID3\3\0\0\0\0\1\0" + bytes(128) + bare):
        samples, _ = decode_audio(cell(plain))
        assert abs(samples.shape[1] - 10 * RATE) < 3000
        assert np.array_equal(decode_audio(cell(plain), 5.0, 6.0)[0], samples[:, 5 * RATE : 6 * RATE])


def flac_of(total):
    content = bytearray(encoded("FLAC"))
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return bytes(content)


def test_flac_of_unknown_length_is_whole():
    content = flac_of(0)
    whole, _ = decode_audio(cell(content))
    assert whole.shape == (2, 3 * RATE)
    assert np.array_equal(decode_audio(cell(content), 1.0, 2.0)[0], whole[:, RATE : 2 * RATE])


REFUSED = {
    "FLAC that promises 17 days": (lambda: flac_of((1 << 36) - 1), "3.000 of .* s can be decoded"),
    "WAV cut in half": (lambda: wav_file(pcm()[: len(pcm()) // 2], len(pcm())), "0.500 of 1.000 s"),
    "MP3 cut in half": (lambda: encoded("MP3")[: len(encoded("MP3")) // 2], "truncated or damaged: 1.* of 3.000 s"),
    "1 Hz": (lambda: encoded("WAV", samples=sweep(0.1), rate=1), "sampling rate of 1 Hz"),
    "2147483647 Hz": (lambda: wav_file(pcm(), len(pcm()), rate=2**31 - 1), "sampling rate of 2147483647 Hz"),
    "500 channels": (lambda: encoded("WAV", samples=np.zeros((100, 500))), "500 channels"),
    "one sample of 1e30": (lambda: encoded("WAV", "FLOAT", spiked(1e30)), r"a sample of 1e\+30"),
    "one sample of 1e300": (lambda: encoded("WAV", "DOUBLE", spiked(1e300)), "NaN or infinite"),
    "one sample of -1e12": (lambda: encoded("AIFF", "FLOAT", spiked(-1e12)), r"a sample of 1e\+12"),
}


def spiked(value):
    samples = sweep().astype(np.float64)
    samples[5000, 1] = value
    return samples


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(make, words, tmp_path, capsys):
    content = make()
    with pytest.raises(AudioError, match=rf"memo\.wav: .*{words}"):
        decode_audio(cell(content))
    with pytest.raises(CorpusError, match=rf"1 unreadable: memo\.wav: .*{words}"):
        loaded(tmp_path, content)
    (tmp_path / "sounds" / "good.wav").write_bytes(encoded("WAV"))
    folder = str(tmp_path / "sounds")
    assert main(["describe", "audiofolder", "--data_dir", folder, "--picture", str(tmp_path / "p.png")]) == 2
    assert "memo.wav" in capsys.readouterr().err
    dataset = load_corpus("audiofolder", folder, skip_unreadable=True, cache_dir=tmp_path / "cache")
    assert len(dataset) == 1
    assert corpus_report(dataset)["skipped"][0].startswith("memo.wav: ")


WHOLE = {
    "float in 32-bit units": (lambda: encoded("WAV", "DOUBLE", spiked(-(2.0**31))), 3 * RATE),
    "16 channels": (lambda: encoded("WAVEX", "PCM_24", sweep(channels=16)), 3 * RATE),
    "384 kHz": (lambda: encoded("FLAC", samples=sweep(1.0, 384_000), rate=384_000), 384_000),
    "one byte of length too many": (lambda: wav_file(pcm(), len(pcm()) + 1), RATE),
    "the pad byte counted": (lambda: wav_file(pcm()[: 3 * 29_001], 3 * 29_001 + 1, bits=24), 29_001),
    "length never written": (lambda: wav_file(pcm(), 0), RATE),
    "no length ever written": (lambda: wav_file(pcm(), 0, riff=0), RATE),
    "empty last Ogg page": (lambda: encoded("OGG") + ogg_page(), 3 * RATE),
}


def ogg_page():
    """A page without a segment, as some programs write to end a stream."""
    last = encoded("OGG")
    last = last[last.rindex(b"OggS") :][:27]
    return last[:22] + bytes(4) + b"\0"


@pytest.mark.parametrize(("make", "frames"), WHOLE.values(), ids=WHOLE)
def test_nothing_is_missing(make, frames, tmp_path, caplog):
    (row,) = dataset = loaded(tmp_path, make())
    assert row["num_frames"] == frames
    assert decode_audio(row["audio"])[0].shape == (row["num_channels"], frames)
    assert not caplog.text and not corpus_report(dataset)["shortened"]


def test_length_that_was_never_written_is_read_from_a_file(tmp_path):
    (row,) = loaded(tmp_path, wav_file(pcm(), 0))
    whole, truth = decode_audio(row["audio"])[0], np.frombuffer(pcm(), "<i2") / np.float32(32768)
    assert np.array_equal(whole[0], truth)
    assert np.array_equal(decode_audio(row["audio"], 0.2, 0.5)[0], whole[:, round(0.2 * RATE) : round(0.5 * RATE)])


def test_length_of_zero_with_nothing_but_notes_behind_it():
    with pytest.raises(AudioError, match="holds no samples: its header gives a length of 0"):
        decode_audio(cell(wav_file(b"LIST" + struct.pack("<I", 4) + b"INFO", 0)))


# -------------------------------------------------------------------------------------------------- what was lost

SHORTENED = {
    "WAV": (lambda: encoded("WAV")[:-8000], 2000),
    "AIFF": (lambda: encoded("AIFF")[:-8000], 2000),
    "W64": (lambda: encoded("W64")[:-8000], 2000),
    "FLAC": (lambda: encoded("FLAC")[:-500], 4096),
    "MP3": (lambda: encoded("MP3")[:-500], 3000),
    "MP3 with noise near its end": (lambda: noisy(encoded("MP3")), 8000),
    "Ogg Vorbis": (lambda: quick_ogg()[:-50], 13_000),
    "Ogg without a page's number": (lambda: quick_ogg()[: quick_ogg().rindex(b"OggS") + 8], 20_000),
}


def quick_ogg():
    """Pages of a tenth of a second."""
    return encoded("OGG", samples=np.random.default_rng(0).uniform(-1, 1, (3 * RATE, 2)))


def noisy(content):
    return content[:-2500] + np.random.default_rng(0).bytes(2000) + content[-500:]


@pytest.mark.parametrize(("make", "most_lost"), SHORTENED.values(), ids=SHORTENED)
def test_what_decodes_is_used_and_what_is_missing_is_said(make, most_lost, tmp_path, caplog):
    (row,) = dataset = loaded(tmp_path, make())
    assert 3 * RATE - most_lost <= row["num_frames"] < 3 * RATE
    assert decode_audio(row["audio"])[0].shape == (2, row["num_frames"])
    (line,) = corpus_report(dataset)["shortened"]
    assert line.startswith(f"memo.wav: {row['num_frames'] / RATE:.3f} of ") and line.endswith(" s decode")
    caplog.clear()
    load_corpus("audiofolder", tmp_path / "sounds", cache_dir=tmp_path / "cache")
    assert line in caplog.text, "said once only"


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", RATE), ("OPUS", 48_000)])
@pytest.mark.parametrize("lost", [1, 700, 2000])
def test_packets_of_an_ogg_page_that_was_cut_are_used(subtype, rate, lost):
    content = encoded("OGG", subtype, sweep(6.0, rate), rate)
    whole, cut = decode_audio(cell(content))[0], cell(content[:-lost])
    found, _ = decode_audio(cut)
    assert np.array_equal(found, whole[:, : found.shape[1]])
    bytes_per_second = len(content) / 6
    assert whole.shape[1] - found.shape[1] < rate * (lost / bytes_per_second + 0.1)
    assert np.array_equal(decode_audio(cut, 5.0, 5.5)[0], whole[:, 5 * rate : round(5.5 * rate)])


def test_sound_before_the_damage_is_to_be_had():
    content = cell(wav_file(pcm()[: len(pcm()) // 2], len(pcm())))
    assert decode_audio(content, 0.1, 0.4)[0].shape == (1, round(0.3 * RATE))


def test_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "memo.wav"
    audio = {"bytes": None, "path": str(path)}
    path.write_bytes(encoded("WAV"))
    with opened_sound(audio) as sound:
        blocks = sound.blocks(frames=1000)
        next(blocks)
        os.truncate(path, 20_000)
        with pytest.raises(AudioError, match=r"memo\.wav: is truncated"):
            list(blocks)
    path.write_bytes(encoded("FLAC"))
    with opened_sound(audio) as sound:
        list(sound.blocks())
        path.unlink()
        with pytest.raises(AudioError, match=r"memo\.wav: the file does not exist"):
            list(sound.blocks(1.0))
        path.write_bytes(encoded("WAV", rate=8000))
        with pytest.raises(AudioError, match=r"memo\.wav: was replaced"):
            list(sound.blocks(1.0))


def test_recording_that_still_grows_is_refused(tmp_path, monkeypatch):
    import datasets_scripts.audio

    def digest(path):
        with open(path, "ab") as file:
            file.write(b"more")
        return "digest"

    monkeypatch.setattr(datasets_scripts.audio, "file_digest", digest)
    with pytest.raises(CorpusError, match=r"memo\.wav: was changed while it was read"):
        loaded(tmp_path, encoded("WAV"))


# ---------------------------------------------------------------------------------------------- what decoders print

NOTES = """
import sys, threading
from datasets_scripts import decode_audio
from datasets_scripts.errors import AudioError
audio = {"bytes": None, "path": sys.argv[1]}
def decode():
    for _ in range(20):
        try:
            decode_audio(audio)
        except AudioError as error:
            message = str(error)
threads = [threading.Thread(target=decode) for _ in range(4)]
for thread in threads: thread.start()
for number in range(200): print("ours", file=sys.stderr)
for thread in threads: thread.join()
import ctypes
libc = ctypes.CDLL(None)
libc.fputs(b"theirs\\n", ctypes.c_void_p.in_dll(libc, "stderr"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="C's stderr has another name")
def test_notes_of_decoders_are_not_shown_and_ours_are(tmp_path):
    content = encoded("MP3")
    (tmp_path / "memo.mp3").write_bytes(content[:20_000] + np.random.default_rng(0).bytes(4000) + content[24_000:])
    command = [sys.executable, "-c", NOTES, tmp_path / "memo.mp3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == "ours\n" * 200 + "theirs\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_process_forked_amid_decoding_decodes():
    content, stop = cell(encoded("MP3")), threading.Event()

    def decode():
        while not stop.is_set():
            decode_audio(content)

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        if (child := os.fork()) == 0:
            os._exit(decode_audio(content)[0].shape != (2, 3 * RATE))
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join()
