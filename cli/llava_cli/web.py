"""`llava-triton chat --web`: a page to chat on, by Gradio."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from llava_cli.errors import CommandError
from llava_cli.files import SHARED, example_pictures
from llava_cli.open_chat import open_chat
from llava_cli.page_chat import Message, PageChat, sentence
from llava_triton.client import SessionError

QUESTIONS = ("How many shapes are there?", "Describe the picture.")
CHATS_AT_ONCE = 64
ENDED = "this chat has ended, because its page was not heard of for an hour; press New chat"
UPLOADS = (3600, 2 * 86_400)
"""How often pictures that were dropped on a page are deleted, and at what age, in seconds: later
than Gradio ends a chat that nobody uses. What is left is deleted at Ctrl-C."""
MAX_FILE_SIZE = "32mb"
"""The server's own limit of a picture, by default."""
CSS = """
#chat .message { white-space: pre-wrap }
#chat .message img { max-height: 160px }
#problem textarea { color: #b00020 }
footer { display: none !important }
"""

Shown = tuple[Any, Any, Any, Any, Any]
"""New values of the chat, the messages, the input, the problem, the stop button. The chat is the
one there was: Gradio ends one that was not set for an hour, once the page's connection has broken
off."""


def make_page(url: str) -> gr.Blocks:
    """The page; every browser that opens it has a chat of its own.

    Args:
        url: see `open_chat`.
    """
    pictures = example_pictures()
    with gr.Blocks(
        title="LLaVA on Triton", fill_height=True, analytics_enabled=False, delete_cache=UPLOADS
    ) as page:
        gr.Markdown(f"## LLaVA on Triton\n`{url}`")
        chat = gr.State(None, delete_callback=lambda ended: ended and ended.close())
        shown = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            editable="user",
            # An answer is text. As Markdown, a picture could make it load one from anywhere.
            render_markdown=False,
            buttons=["copy"],  # the others send a conversation elsewhere
            # Gradio 6.31 cannot edit a text that shares its bubble with a picture.
            group_consecutive_messages=False,
            height="55vh",
            scale=1,
            placeholder="Drop a picture below and ask about it.",
        )
        problem = gr.Textbox(elem_id="problem", show_label=False, visible=False, interactive=False)
        box = gr.MultimodalTextbox(
            elem_id="question",
            show_label=False,
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask, or drop pictures here",
            autofocus=True,
        )
        with gr.Row():
            stop = gr.Button("Stop", elem_id="stop", interactive=False)
            again = gr.Button("Regenerate", elem_id="again")
            new = gr.Button("New chat", elem_id="new")
        gr.Examples(
            [
                {"text": question, "files": [str(picture)]}
                for picture, question in zip(pictures, QUESTIONS * len(pictures), strict=False)
            ],
            box,
            examples_per_page=2,
            label="Pictures that the demo model understands",
        )

        outputs = [chat, shown, box, problem, stop]
        answers: dict[str, Any] = {
            "outputs": outputs,
            "concurrency_limit": CHATS_AT_ONCE,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        plain: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        page.load(lambda: PageChat(url), None, chat, **plain)
        box.submit(ask, [chat, box], **answers)
        again.click(ask_again, [chat], **answers)
        shown.edit(ask_instead, [chat], **answers)
        stop.click(lambda chat: chat and chat.stop(), [chat], **plain)
        for begin_anew in (new.click, shown.clear):
            begin_anew(lambda chat: chat and chat.close(), [chat], **plain).then(
                lambda: (PageChat(url), [], *_idle()), None, outputs, **plain
            )
    return page


def run(url: str, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        url: see `open_chat`.
        host, port: where the page is.

    Raises:
        OSError: the port is taken.
        SessionError: INVALID_ARG, the URL names no server.
    """
    open_chat(url)  # to refuse it here, and not on every page
    make_page(url).launch(
        server_name=host,
        server_port=port,
        allowed_paths=[str(SHARED / "examples" / "pictures")],
        max_file_size=MAX_FILE_SIZE,
        css=CSS,
        footer_links=[],
        share=False,
        ssr_mode=False,
    )


def ask(chat: PageChat | None, question: dict[str, Any]) -> Iterator[Shown]:
    """Answer what the user has sent."""
    yield from _shown(chat, lambda chat: chat.ask(question["text"], question["files"]), question)


def ask_again(chat: PageChat | None) -> Iterator[Shown]:
    """Answer the last question again."""
    yield from _shown(chat, lambda chat: chat.again(), None)


def ask_instead(chat: PageChat | None, edit: gr.EditData) -> Iterator[Shown]:
    """Go back to a question that the user has edited, and answer it."""
    index = edit.index[0] if isinstance(edit.index, list | tuple) else edit.index
    yield from _shown(chat, lambda chat: chat.ask_instead(index, str(edit.value)), None)


def _shown(
    chat: PageChat | None,
    start: Callable[[PageChat], Iterator[list[Message]]],
    question: dict[str, Any] | None,
) -> Iterator[Shown]:
    """What the page shows while an answer comes, and after it.

    Args:
        chat: None where it has ended.
        question: is put back into the input where it gets no answer.
    """
    if chat is None or chat.closed:
        # Not over what may be in its place by now.
        yield gr.skip(), gr.skip(), *_told(question, ENDED)
        return
    try:
        for messages in start(chat):
            if chat.closed:
                return
            box = gr.update(value=None, interactive=False)
            yield chat, messages, box, gr.update(visible=False), gr.update(interactive=True)
        after = _idle()
    except (SessionError, CommandError) as error:
        after = _told(question, sentence(error))
    except Exception:  # the page must be of use after any error
        logging.exception("a chat's page has failed")
        after = _told(question, "this page has made a mistake; its log says more. Ask again")
    if not chat.closed:
        yield chat, chat.messages(), *after


def _idle() -> tuple[Any, Any, Any]:
    """The input, the problem and the stop button while no answer comes."""
    hidden, dead = gr.update(visible=False), gr.update(interactive=False)
    return gr.update(value=None, interactive=True), hidden, dead


def _told(question: dict[str, Any] | None, problem: str) -> tuple[Any, Any, Any]:
    """The same three with a problem; the question is back in the input."""
    shown, dead = gr.update(value=problem, visible=True), gr.update(interactive=False)
    return gr.update(value=question, interactive=True), shown, dead
