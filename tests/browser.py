"""A page that a command serves, in headless Chromium."""

import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scripts import ROOT, start

PROGRAMS = ("chromium", "chromedriver")
CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--window-size=1280,1080",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
PATIENCE = 120  # s, for anything to appear


def skip_without_browser() -> None:
    for name in ("gradio", "selenium"):
        pytest.importorskip(name, reason=f"{name} is not installed: `make test-browser` installs it")
    for program in PROGRAMS:
        if not shutil.which(program):
            pytest.skip(f"there is no {program} program: on Debian, apt-get install chromium chromium-driver")


@contextmanager
def served(*command, end: int = signal.SIGTERM) -> Iterator[str]:
    """The address of a page, while Python runs a command that serves it; no error may be printed.

    Args:
        *command: Python's options.
        end: The signal that ends it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start([sys.executable, *command, "--port", port], cwd=ROOT)
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if "open http" in line:
                break
        else:
            pytest.fail("".join(printed))
        reading = threading.Thread(target=lambda: printed.extend(process.stdout), daemon=True)
        reading.start()
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(end)
        process.wait(timeout=PATIENCE)
    assert "Traceback" not in "".join(printed), "".join(printed)


@contextmanager
def chromium(profile: Path) -> Iterator:
    """A browser that can ask no other machine for anything."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for argument in [*CHROMIUM, f"--user-data-dir={profile}"]:
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class BrowserPage:
    """What a visitor does on a page and sees of it.

    Attributes:
        READY: Selector of what is there when the page can be used.
    """

    READY: str

    def __init__(self, driver, address: str):
        self.driver, self.address = driver, address
        driver.get(address)
        self.wait(lambda: self.find(self.READY), self.READY)

    def find(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition, what: str):
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException:
            pytest.fail(f"{what} does not appear; the page says: {self.find('body')[0].text}")

    def wait_for(self, selector: str, inside: str, count: int = 1) -> list:
        found = f"{inside} {selector}"
        return self.wait(lambda: len(self.find(found)) >= count and self.find(found), found)

    def wait_for_text(self, selector: str, text: str) -> str:
        return self.wait(
            lambda: next((e.text for e in self.find(selector) if text in e.text), None), f"{text!r} in {selector}"
        )

    def check_width(self, width: int) -> None:
        """Nothing is wider than so many pixels; a phone would widen its window to what is."""
        assert self.driver.execute_script("return document.documentElement.scrollWidth") <= width


def save_picture(page: BrowserPage, path: Path) -> None:
    """The whole page, in few enough colours to be small."""
    from PIL import Image

    page.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    unfinished = path.with_suffix(".unfinished.png")
    page.driver.save_screenshot(str(unfinished))
    with Image.open(unfinished) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(unfinished, optimize=True)
    unfinished.replace(path)
