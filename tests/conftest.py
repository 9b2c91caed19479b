"""Fixtures that more than one room of the test suite uses."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from playwright.sync_api import Page, sync_playwright

# Side by side (`make test`), every process of tests, and what it starts, computes on one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Timings are no subject of tests, and a busy machine is no failure.
settings.register_profile("k25lite", deadline=None)
settings.load_profile("k25lite")

# A shell that starts the suite in the background has it and its children ignore interrupts; some tests send them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

QUIET = [
    "--no-sandbox",  # as root, which is what containers run as, Chromium starts only without one
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-sync",
    "--disable-component-update",
]


@dataclass
class BrowserPage:
    """A page of headless Chromium, cut off from the network, that remembers what went wrong on it."""

    page: Page
    errors: list[str] = field(default_factory=list)  # exceptions, and warnings and errors on the console
    requests: list[str] = field(default_factory=list)  # every address asked for, the opened file's own included

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path, width: int = 1280, height: int = 900) -> Page:
        """Show a local file at a window size in CSS pixels."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.goto(path.as_uri())
        return self.page

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


# One browser per test: playwright keeps an event loop running while a browser is open, which other tests must not meet.
@pytest.fixture
def browser_page() -> Iterator[BrowserPage]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        context = browser.new_context(offline=True)
        yield BrowserPage(context.new_page())
        browser.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one: fastest for small models, and results do not depend on how many cores the machine has."""
    import torch  # not before OMP_NUM_THREADS is set, above

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
