"""A real browser without a screen: Debian's chromium, driven by Selenium."""

from __future__ import annotations

import base64
from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """A window that is as wide and as bright as asked for.

    Attributes:
      driver: Selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._devtools("Network.enable")
        # Nobody looks at the window, so it is not the one that has the keyboard.
        self._devtools("Emulation.setFocusEmulationEnabled", enabled=True)

    def open(
        self, path: Path, anchor: str = "", width: int = 1400, scheme: str = "light", **media: str
    ) -> Browser:
        """Loads a file, for a screen so wide; ``media="print"`` for paper."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", features=features, **media)
        self.driver.get("about:blank")  # else an address that differs by its anchor is not loaded
        self.driver.get(f"{path.resolve().as_uri()}{anchor}")
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function with this body returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """The elements of a selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The first of them."""
        return self.driver.find_element("css selector", selector)

    def shoot(self, path: Path) -> None:
        """Writes a picture of the whole page, of as much as has room in one."""
        script = "return [innerWidth, document.documentElement.scrollHeight]"
        width, height = self.run(script)
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 8000), "scale": 1}
        found = self._devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """What the browser has said of pages since this was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What pages have asked for since this was asked last, themselves included."""
        messages = (json.loads(x["message"]) for x in self.driver.get_log("performance"))
        found = (x["message"] for x in messages)
        return [
            x["params"]["request"]["url"]
            for x in found
            if x["method"] == "Network.requestWillBeSent"
        ]

    def _devtools(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Starts one; skips the test where there is none, unless it is required.

    Args:
      profile: an empty folder.
    """
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    chromedriver = shutil.which("chromedriver")
    try:
        if binary is None or chromedriver is None:
            raise ModuleNotFoundError("neither chromium nor chromedriver is installed")
        from selenium import webdriver
    except ModuleNotFoundError as error:
        if os.environ.get("ADAMW_XLA_REQUIRE_BROWSER"):
            raise
        pytest.skip(f"no browser: {error}")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
