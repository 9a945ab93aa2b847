"""The Space as a visitor meets it: the real command, real clips, headless Chromium. `make test-browser` runs it."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from browser import BrowserPage, chromium, save_picture, served, skip_without_browser
from scripts import succeed

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def esc10(shared_dir) -> Path:
    return shared_dir / "data" / "ESC-10"


@pytest.fixture(scope="module")
def run_folder(request, esc10, tmp_path_factory) -> Path:
    """A small real run, with fold 1 held out of all training; or the one that is named on the command line."""
    skip_without_browser()
    if folder := request.config.getoption("--space_run"):
        return folder.resolve()
    folder = tmp_path_factory.mktemp("runs")
    common = ["--recipe", "recommended", "--corpus", f"esc10={esc10}", "--report_to", "none"]
    pretraining = ["--exclude_fold", "1", "--num_train_epochs", "2", "--output_dir", folder / "npid"]
    succeed("train_npid.py", *common, *pretraining)
    fine_tuning = ["--fold", "1", "--num_train_epochs", "0", "--output_dir", folder / "esc10"]
    succeed("train_classification.py", *common, *fine_tuning, "--model_name_or_path", folder / "npid")
    return folder / "esc10"


@pytest.fixture(scope="module")
def address(run_folder) -> str:
    """Of the page, while the command runs."""
    with served("-m", "hub_cards", "space", run_folder) as address:
        yield address


@pytest.fixture(scope="module")
def driver(address, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(driver, address):
    return Page(driver, address)


class Page(BrowserPage):
    """What a visitor does on the page and sees of it."""

    READY = "#sound input[type=file]"

    def upload(self, path: Path) -> None:
        self.find("#sound input[type=file]")[0].send_keys(str(path))

    def wait_for_pictures(self, *places: str) -> None:
        loaded = "return [...document.querySelectorAll(arguments[0])].filter(i => i.naturalWidth > 200).length"
        for place in places:
            self.wait(lambda place=place: self.driver.execute_script(loaded, f"{place} img"), f"a picture in {place}")

    def durations(self) -> list[float]:
        script = "return [...document.querySelectorAll('#neighbours audio')].map(a => a.duration || 0)"
        return self.driver.execute_script(script)

    def requested(self) -> set[str]:
        """Every address that the browser has asked for since this was last called."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url for url in sent if not url.startswith(("data:", "blob:", "chrome:", "chrome-extension:"))}


@pytest.fixture(scope="module")
def rooster(esc10) -> Path:
    """Of the fold that was held out."""
    return next(esc10.glob("*Rooster*/1-27724-A.ogg"))


@pytest.fixture(scope="module")
def label_of(run_folder):
    """The top label of a file, by transformers' own pipeline."""
    from transformers import pipeline

    classify = pipeline("audio-classification", model=str(run_folder), trust_remote_code=True)

    def top(path: Path) -> str:
        samples, rate = soundfile.read(path, dtype="float32")
        return classify({"array": samples, "sampling_rate": rate}, top_k=1)[0]["label"]

    return top


def test_a_real_clip(page, rooster, label_of, request):
    page.upload(rooster)
    page.wait_for("h2", inside="#labels")
    assert page.find("#labels h2")[0].text == label_of(rooster)
    page.wait_for_pictures("#spectrogram", "#map")
    page.wait_for("audio", inside="#neighbours", count=5)
    page.wait(lambda: min(page.durations()) > 4, "the length of five players' sounds")
    rows = [row.text for row in page.find("#neighbours tr")][1:]
    distances = [float(row.split()[-1]) for row in rows]
    assert len(rows) == 5 and distances == sorted(distances) and all("esc10/" in row for row in rows)
    assert not any("esc10/1-" in row for row in rows)  # fold 1 was never heard
    play = "const a = document.querySelector('#neighbours audio'); a.play(); return a"
    player = page.driver.execute_script(play)
    page.wait(lambda: player.get_property("currentTime") > 0.2, "a neighbour's sound, played,")
    page.driver.execute_script("arguments[0].pause(); arguments[0].currentTime = 0", player)
    assert not page.find("#time-line img") and not page.find("#problem p")
    # A new tab's own page is the browser's matter.
    elsewhere = {url for url in page.requested() if not url.startswith((page.address, "chrome"))}
    assert not elsewhere
    if picture := request.config.getoption("--space_picture"):
        save_picture(page, picture)


def test_a_phone(page, rooster):
    """Nothing is wider than the window, however much is shown."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.upload(rooster)
        page.wait_for("audio", inside="#neighbours", count=5)
        page.wait_for_pictures("#spectrogram", "#map")
        page.check_width(390)
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_long_sound(page, esc10, tmp_path):
    clips = [soundfile.read(path)[0][:220500] for path in sorted(esc10.glob("*/1-*.ogg"))[:12:4]]
    soundfile.write(tmp_path / "long.wav", np.concatenate([0.3 * clips[0], clips[1] / 2, 0.1 * clips[2]]), 44100)
    page.upload(tmp_path / "long.wav")
    page.wait_for_pictures("#time-line", "#spectrogram")
    page.wait_for_text("#windows", "5.0 to 10.0 s")
    shown = page.find("#spectrogram")[0].text
    assert " of 3, the loudest" in shown
    other = 1 if "window 1 of" not in shown else 2
    (cell,) = page.find(f"#windows [role=gridcell][data-row='{other - 1}'][data-col='0']")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    cell.click()
    page.wait(lambda: page.find("#spectrogram")[0].text.rstrip().endswith(f"window {other} of 3"), "the other window")


def test_a_bad_file_has_a_message_and_the_page_goes_on(page, rooster, tmp_path):
    (tmp_path / "notes.wav").write_text("these are words, not a sound")
    page.upload(tmp_path / "notes.wav")
    words = page.wait_for_text("#problem", "cannot be read as a sound")
    assert "notes.wav" in words and "Traceback" not in page.find("body")[0].text
    assert not page.find("#labels") or not page.find("#labels")[0].is_displayed()
    page.wait_for("button[aria-label='Clear']", inside="#sound")[0].click()
    page.wait_for("input[type=file]", inside="#sound")
    page.upload(rooster)
    page.wait_for_text("#labels", "%")
    page.wait(lambda: not page.find("#problem p"), "a page without the message")


def test_a_recording(page):
    """From Chromium's own microphone, which beeps."""
    page.find("#sound button[aria-label='Record audio']")[0].click()
    page.wait_for(".record-button", inside="#sound")[0].click()
    stop = page.wait(lambda: [b for b in page.find("#sound .stop-button") if b.is_displayed()], "a button to stop")
    page.driver.execute_async_script("setTimeout(arguments[0], 1500)")
    stop[0].click()
    page.wait_for_text("#labels", "%")
    page.wait_for_pictures("#spectrogram")


def test_an_example(page):
    page.wait(lambda: [b for b in page.find(".gallery-item") if b.text.strip() == "dog"], "an example")[0].click()
    page.wait_for_text("#labels", "%")
    page.wait_for("audio", inside="#neighbours", count=5)


def test_two_visitors_at_once(page, esc10, rooster, label_of):
    """Each has the answer to their own sound."""
    sounds = [rooster, *sorted(esc10.glob("*/1-*.ogg"))]
    other = next(sound for sound in sounds if label_of(sound) != label_of(rooster))
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    second = Page(page.driver, page.address)
    second.upload(other)
    page.driver.switch_to.window(first)
    page.upload(rooster)
    page.wait_for("h2", inside="#labels")
    assert page.find("#labels h2")[0].text == label_of(rooster)
    page.driver.switch_to.window(next(handle for handle in page.driver.window_handles if handle != first))
    second.wait_for("h2", inside="#labels")
    assert second.find("#labels h2")[0].text == label_of(other)
    page.driver.close()
    page.driver.switch_to.window(first)


def test_one_machine_only(address):
    """The command listens on 127.0.0.1 and on no other interface."""
    port = int(address.rstrip("/").rpartition(":")[2])
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    listening = [line[1] for line in lines if line[3] == "0A"]
    assert [place for place in listening if int(place.rpartition(":")[2], 16) == port] == [f"0100007F:{port:04X}"]
