"""The page of `llava-triton chat --web`, used by a real browser: Debian's Chromium, headless."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llava_triton.server.triton_server import TritonServer, free_ports

pytest.importorskip("gradio")
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "five-shapes.png"
SCREENSHOT = os.environ.get("LLAVA_SCREENSHOT")
"""Where the picture of the README is to go."""
PATIENCE_MS = 60_000
COST = r"first token after \d+ ms, \d+ of \d+ prompt tokens reused, \d+ tokens"
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # In containers the sandbox and /dev/shm are not always to be had.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Served:
    """`llava-triton chat --web URL` as a child process."""

    def __init__(self, url: str) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava_cli", "chat", "--web", url, "--web-port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout
        output = ""
        for line in self.process.stdout:
            output += line
            if "Running on" in line:
                return
        raise AssertionError(output)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def served(server: TritonServer) -> Iterator[Served]:
    served = Served(server.grpc_url)
    yield served
    served.stop()


@contextmanager
def opened(browser: Browser, served: Served) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 860, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page.goto(served.url)
    yield page
    page.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with opened(browser, served) as page:
        yield page


def ask(page: Page, text: str, picture: Path | None = None) -> None:
    if picture is not None:
        page.locator("#question input[type=file]").set_input_files(picture)
        expect(page.locator("#question .thumbnail-item")).to_have_count(1)
    box = page.locator("#question textarea")
    box.fill(text)
    box.press("Enter")


def edit_last(page: Page, instead: str) -> None:
    page.locator("#chat").get_by_label("Edit").last.click()
    page.locator("#chat textarea").fill(instead)
    page.locator("#chat").get_by_label("Submit").click()


def said(text: str, cost: str = COST) -> re.Pattern[str]:
    """An answer as it is shown in the end."""
    return re.compile(rf"^{text}\s+{cost}$")


def answers(page: Page) -> Locator:
    return page.get_by_test_id("bot")


def test_a_conversation(page: Page) -> None:
    ask(page, "How many shapes are there?", PICTURE)
    expect(answers(page)).to_have_text([said("There are five shapes.")])
    ask(page, "How many of those are red?")
    first = said("There are five shapes.")
    expect(answers(page)).to_have_text([first, said("Three of them are red.")])
    if SCREENSHOT:
        page.mouse.move(0, 0)
        page.screenshot(path=SCREENSHOT)
    edit_last(page, "Where is the circle?")
    expect(answers(page)).to_have_text([first, said("The circle is at the bottom right.")])
    # The picture has stayed with its question, and is not computed again.
    expect(page.get_by_test_id("user").locator("img")).to_have_count(1)
    assert not re.search(r", 0 of", answers(page).last.inner_text())
    page.locator("#again").click()
    page.locator("#new").click()  # whether the other answer has come or not
    expect(answers(page)).to_have_count(0)
    ask(page, "Hello!")
    expect(answers(page)).to_have_count(1)


def test_an_error_is_a_sentence_and_nothing_is_lost(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"- no picture -")
    ask(page, "How many shapes are there?", PICTURE)
    expect(answers(page)).to_have_text(said("There are five shapes."))
    ask(page, "And here?", broken)
    problem = page.locator("#problem textarea")
    expect(problem).to_have_value(re.compile("^image is no picture: .* expected an encoded"))
    expect(page.locator("#question textarea")).to_have_value("And here?")
    expect(answers(page)).to_have_count(1)
    page.get_by_label("Remove file").click()
    ask(page, "How many of those are red?")
    expect(answers(page).last).to_have_text(said("Three of them are red."))
    expect(problem).to_be_hidden()


class Slow(BaseHTTPRequestHandler):
    """OpenAI's chat completions: "answer N", or "on and on ..." until the client leaves."""

    asked: ClassVar[list[dict[str, Any]]] = []
    left = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.send_response(200)
        self.end_headers()
        try:
            if "long" in body["messages"][-1]["content"][-1]["text"]:
                while not self.left.wait(0.05):
                    self.piece("on and ")
            self.piece(f"answer {len(self.asked)}")
            usage = {"prompt_tokens": 9, "completion_tokens": 2}
            self.event({"choices": [], "usage": usage | {"prompt_tokens_details": None}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.left.set()

    def piece(self, text: str) -> None:
        self.event({"choices": [{"delta": {"content": text}}]})

    def event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


def test_stop_and_regenerate_over_openais_paths(browser: Browser) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    try:
        with opened(browser, served) as page:
            ask(page, "a long story, please", PICTURE)
            expect(answers(page).first).to_contain_text("on and on and")
            page.locator("#stop").click()
            expect(answers(page)).to_have_text([said("on and.*", "stopped")])
            assert Slow.left.wait(PATIENCE_MS / 1000)
            ask(page, "a short one")
            expect(answers(page)).to_have_text([said("on and.*", "stopped"), said("answer 2")])
            page.locator("#again").click()
            expect(answers(page).last).to_have_text(said("answer 3"))
            edit_last(page, "another one")
            expect(answers(page).last).to_have_text(said("answer 4"))
    finally:
        served.stop()
        server.shutdown()
        server.server_close()
    first, second, again, edited = [request["messages"] for request in Slow.asked]
    picture = first[0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(picture.partition(",")[2]) == PICTURE.read_bytes()
    assert second[1]["content"].startswith("on and on")
    assert again == second
    assert Slow.asked[2]["temperature"] > 0
    assert edited[:2] == second[:2]
    assert edited[2]["content"] == [{"type": "text", "text": "another one"}]
