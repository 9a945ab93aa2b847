"""`dls label` as a person meets it: the real command, headless Chromium, the keyboard alone. `make test-browser`."""

import shutil
import signal

import pytest
from browser import BrowserPage, chromium, save_picture, served, skip_without_browser
from sound_networks import save

from datasets_scripts.labels import read_labels
from dls_sounds.__main__ import main
from modeling_dls import ESResNetForInstanceDiscrimination

pytestmark = pytest.mark.browser

MARKUP = "<img src=x onerror=alert(1)> ${1+1} {{x}}.wav"
WIDTHS = {"desktop": (1280, 1000), "phone": (390, 844)}


class Page(BrowserPage):
    READY = "#card [data-round]"

    def press(self, *keys) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def type(self, field: str, text: str) -> None:
        """Goes to a field by its key, writes into it and presses Enter: something else is shown then."""
        from selenium.webdriver.common.keys import Keys

        before = self.round()
        self.press(field)
        self.wait(
            lambda: self.driver.execute_script("return document.activeElement.matches('input, textarea')"), field
        )
        self.press(text, Keys.ENTER)
        self.wait(lambda: self.round() != before and self.no_field(), f"what follows {text!r}")

    def no_field(self) -> bool:
        return not self.driver.execute_script("return document.activeElement.matches('input, textarea')")

    def answer(self, key: str) -> None:
        before = self.round()
        self.press(key)
        self.wait(lambda: self.round() != before, f"what follows the key {key}")

    def round(self) -> str:
        return self.driver.execute_script("return document.querySelector('#card [data-round]')?.dataset.round")

    def heard(self) -> str:
        """The file that is shown."""
        return self.find("#card .clip")[0].text.rpartition(",")[0]

    def look(self, width: int, height: int, scheme: str) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(self.address)
        self.wait(lambda: self.find(self.READY), self.READY)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    skip_without_browser()
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def index(sound_folder, tmp_path):
    """Of forty sounds of four kinds, one of which has a name that is markup."""
    shutil.copytree(sound_folder, tmp_path / "sounds", ignore=shutil.ignore_patterns("metadata.csv"))
    (tmp_path / "sounds" / "39.wav").rename(tmp_path / "sounds" / MARKUP)
    network = save(ESResNetForInstanceDiscrimination, tmp_path / "npid")
    output = tmp_path / "index.parquet"
    assert main(["embed", str(tmp_path / "sounds"), "--model", str(network), "--output", str(output)]) == 0
    return output


def lines(index) -> list[tuple[str, str, bool]]:
    path = index.parent / "sounds" / "labels.csv"
    return [(said.name, said.label, said.present) for said in read_labels(path, path.name, None)]


@pytest.mark.parametrize(("width", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_the_loop_by_keyboard(driver, index, width, scheme):
    """Named, heard, answered, undone; killed and opened again."""
    expected = []
    with served("-m", "dls_sounds", "label", index, end=signal.SIGKILL) as address:
        page = Page(driver, address)
        page.look(*WIDTHS[width], scheme)
        assert "What do you want to find?" in page.find("#card")[0].text
        page.type("c", "low <b>tone</b>")
        assert "low <b>tone</b>: 0 yes, 0 no" in page.find("#counts")[0].text
        page.type("e", "no such file")
        assert "in the names of 0 files" in page.find("#teaching-problem")[0].text
        page.type("e", MARKUP)
        expected.append((MARKUP, "low <b>tone</b>", True))
        for key in "ynyn":
            expected.append((page.heard(), "low <b>tone</b>", key == "y"))
            page.answer(key)
        assert lines(index) == expected
        page.wait(lambda: driver.execute_script("return document.querySelector('#card img').naturalWidth") > 200, "it")
        shown = page.heard()
        page.answer("s")
        assert page.heard() != shown
        page.answer("u")
        assert page.heard() == shown
        page.answer("u")
        assert page.heard() == expected.pop()[0] and lines(index) == expected
        page.type("c", "high tone")
        other = page.heard()
        page.answer("1")
        expected = [line for line in expected if line[:2] != (other, "low <b>tone</b>")]
        expected += [(other, "low <b>tone</b>", True), (other, "high tone", False)]
        assert lines(index) == expected
        page.check_width(WIDTHS[width][0])
    with served("-m", "dls_sounds", "label", index) as address:
        page = Page(driver, address)
        page.type("c", "low <b>tone</b>")
        assert lines(index) == expected
        present = sum(yes for _, label, yes in expected if label == "low <b>tone</b>")
        assert f"low <b>tone</b>: {present} yes" in page.find("#counts")[0].text


def test_two_pages_and_a_hand_on_one_file(driver, index):
    """Of one command and of two; a line that is wrong has a message, and no answer is lost."""
    labels = index.parent / "sounds" / "labels.csv"
    with served("-m", "dls_sounds", "label", index) as one, served("-m", "dls_sounds", "label", index) as other:
        first = Page(driver, one)
        first.type("c", "tone")
        first.type("e", "00.wav")
        window = driver.current_window_handle
        for address in (one, other):
            driver.switch_to.new_window("tab")
            second = Page(driver, address)
            second.type("c", "tone")
            assert "tone: 1 yes" in second.find("#counts")[0].text or "tone: 2 yes" in second.find("#counts")[0].text
            second.answer("y")
            driver.close()
            driver.switch_to.window(window)
        assert [yes for _, _, yes in lines(index)] == [True] * 3
        right, before = labels.read_text(), lines(index)
        labels.write_text(right + "01.wav,,,tone,maybe\n")
        first.answer("n")
        assert "line 5: present must be 1" in first.find("#teaching-problem")[0].text
        labels.write_text(right + "01.wav,,,tone,0\n")
        heard = first.heard()
        first.answer("n")
        # Another page may have answered about what this one still showed: what is said later takes its place.
        expected = [line for line in before if line[0] != heard]
        assert lines(index) == [*expected, ("01.wav", "tone", False), (heard, "tone", False)]


def test_pictures(driver, request, tmp_path):
    """Of the page with real recordings, for the documents: `make docs/label.png` takes them."""
    index, folder = (request.config.getoption(name) for name in ("--label_index", "--label_pictures"))
    if not (index and folder):
        pytest.skip("--label_index and --label_pictures are not given")
    with served("-m", "dls_sounds", "label", index.resolve(), "--labels", tmp_path / "labels.csv") as address:
        page = Page(driver, address)
        page.type("c", "dog")
        page.type("e", "1-100032-A-0.ogg")
        for _ in range(10):
            page.answer("y" if "-0.ogg" in page.heard() else "n")
        for width, size in WIDTHS.items():
            for scheme in ("light", "dark"):
                page.look(*size, scheme)
                page.type("c", "dog")
                page.wait(lambda: driver.execute_script("return document.querySelector('#card img').complete"), "it")
                page.check_width(size[0])
                save_picture(page, folder / f"label-{width}-{scheme}.png")
