"""A real browser for the tests of the page."""

import json
import os
import shutil
import time

import pytest

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)


class Browser:
    """A window of Chromium that keeps what its pages log and ask the network for."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, until=".plot, #map, #line"):
        """Open a file and scroll to each place that matches `until`, the pictures by default, until all are drawn."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.resolve().as_uri())
        self.driver.set_script_timeout(60)
        self.driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            const open = () => [...document.querySelectorAll(arguments[0] || "none")].filter((e) => !e._fullLayout);
            const begin = performance.now();
            (function next() {
              const [first] = open();
              if ((!first && document.readyState === "complete") || performance.now() - begin > 50000) return done();
              first?.scrollIntoView({ block: "center", behavior: "instant" });
              setTimeout(next, 30);
            })();
            """,
            until,
        )

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def point_at(self, selector, across, down):
        """Move the mouse to a place in an element, in fractions of its size, and return what plotly tells there."""
        box = self.run(
            """
            const element = document.querySelector(arguments[0]);
            element.scrollIntoView({ block: "center", behavior: "instant" });
            const box = element.getBoundingClientRect();
            return [box.left, box.top, box.width, box.height];
            """,
            selector,
        )
        place = {"x": box[0] + across * box[2], "y": box[1] + down * box[3]}
        label = ""
        for _ in range(40):
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **place})
            time.sleep(0.1)
            label = self.run("return [...document.querySelectorAll('.hoverlayer')].map((e) => e.textContent).join('')")
            if label:
                break
            place["x"] += 1
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 2, "y": 2})
        time.sleep(0.3)
        return label

    def emulate(self, width=1400, **media):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def errors(self):
        """Everything that the page logged."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Every address that was asked for, but data that the page itself contains."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    missing = [path for path in (CHROMIUM, DRIVER) if not shutil.which(path)]
    if missing:
        reason = f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
