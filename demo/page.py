"""The page itself: `python -m demo.page --server URL --port 7860`.

A person chooses a clip, asks, reads the answer as it comes, and sees what it cost. Every question is
one HTTP request to the server; Stop closes its connection. Listens on loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from demo import view
from demo.client import MAX_FILE_BYTES, AskError, Client, Delta, Options
from demo.library import ALWAYS, load_clips
from mmserve.methods import NAMES, WITH_WEIGHTS, Kind

CLIPS = Path(__file__).parent / "clips"
KEY_VARIABLE = "MMSERVE_API_KEY"  # a key on the command line would be seen by every user of the host
QUESTIONS = (*ALWAYS, "What happens in this clip?")  # about a clip of one's own
_STATUS_EVERY_S = 5.0
_MAX_AT_ONCE = 8
_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]

Show = dict[Any, Any]  # component -> its new value


class Page:
    """Builds the components and answers their events. One stop signal per browser session."""

    def __init__(self, client: Client, clips: Path) -> None:
        self._client = client
        self._clips = load_clips(clips)
        self._stops: dict[str, asyncio.Event] = {}
        with gr.Blocks(
            title="mmserve", analytics_enabled=False, delete_cache=(600, 3600), fill_width=False
        ) as self.blocks:
            self._build()

    def _build(self) -> None:
        self._header = gr.HTML(
            view.header(False, "looking for the server"), elem_id="head", apply_default_css=False
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._build_inputs()
            with gr.Column(scale=6, min_width=320):
                self._build_question()
        self._wire()

    def _build_inputs(self) -> None:
        names = list(self._clips)
        first = names[0] if names else None
        self._clip = gr.Dropdown(
            names,
            value=first,
            label="Clip",
            elem_id="clip",
            visible=bool(names),
            info="or drop your own below",
        )
        self._video = gr.Video(
            value=str(self._clips[first].path) if first else None,
            sources=["upload"],
            label="Video",
            elem_id="video",
            height=300,
            autoplay=True,
            loop=True,
            buttons=[],
        )
        with gr.Accordion("Make it smaller", open=False, elem_id="options"):
            with gr.Row():
                self._prune = gr.Dropdown(
                    _offered("prune"), value="none", label="Prune tokens", elem_id="prune"
                )
                self._keep = gr.Slider(0.05, 1.0, value=0.25, step=0.05, label="Share kept", elem_id="keep")
            with gr.Row():
                self._kv = gr.Dropdown(_offered("kv"), value="none", label="Compress KV", elem_id="kv")
                self._budget = gr.Slider(0.05, 1.0, value=0.5, step=0.05, label="KV budget", elem_id="budget")
            with gr.Row():
                self._frames = gr.Slider(1, 64, value=16, step=1, label="Frames", elem_id="frames")
                self._max_tokens = gr.Slider(1, 256, value=64, step=1, label="Max tokens")

    def _build_question(self) -> None:
        self._question = gr.Textbox(
            label="Question",
            placeholder="What moves?",
            lines=1,
            max_lines=4,
            elem_id="question",
            autofocus=True,
        )
        self._try = gr.Dataset(
            components=[self._question],
            samples=[[text] for text in self._questions_for(next(iter(self._clips), None))],
            label="Try",
            type="values",
            elem_id="try",
        )
        with gr.Row():
            self._ask = gr.Button("Ask", variant="primary", elem_id="ask")
            self._stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        self._answer = gr.HTML(view.empty_answer(), elem_id="answer", apply_default_css=False)
        self._report = gr.HTML("", elem_id="report", apply_default_css=False)

    def _wire(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        inputs = [self._question, self._clip, self._video, self._prune, self._keep, self._kv, self._budget]
        inputs += [self._frames, self._max_tokens]
        gr.on(
            [self._ask.click, self._question.submit],
            self._answer_question,
            inputs,
            [self._answer, self._report, self._ask, self._stop],
            trigger_mode="once",
            concurrency_limit=_MAX_AT_ONCE,
            **private,
        )
        # not queued: it must arrive while a question runs
        self._stop.click(self._stop_session, None, None, queue=False, **private)
        self.blocks.unload(self._stop_session)
        self._clip.input(self._choose_clip, self._clip, [self._video, self._try], **private)
        self._video.upload(self._choose_own, None, [self._clip, self._try], **private)
        self._try.click(lambda sample: sample[0], self._try, self._question, queue=False, **private)
        self.blocks.load(self._look, None, self._header, **private)
        gr.Timer(_STATUS_EVERY_S).tick(self._look, None, self._header, **private)

    async def _answer_question(
        self,
        question: str,
        clip: str | None,
        video: str | None,
        prune: str,
        keep: float,
        kv: str,
        budget: float,
        frames: float,
        max_tokens: float,
        request: gr.Request,
    ) -> AsyncIterator[Show]:
        if not question.strip() or video is None:
            missing = "Please write a question." if video else "Please choose a clip or drop a video first."
            yield self._idle(view.failed_answer(missing))
            return
        options = Options(
            prune=prune,
            keep=keep,
            kv=kv,
            kv_budget=budget,
            num_frames=int(frames),
            max_tokens=int(max_tokens),
        )
        session = str(request.session_hash)
        stop = self._stops[session] = asyncio.Event()
        text, report = "", ""
        yield {
            self._answer: view.waiting_answer(),
            self._report: "",
            self._ask: gr.Button(visible=False),
            self._stop: gr.Button(visible=True),
        }
        try:
            async for news in self._client.ask(question.strip(), Path(video), options, stop):
                if isinstance(news, Delta):
                    text += news.text
                    yield {self._answer: view.running_answer(text)}
                else:
                    report = view.report(news.data)
        except AskError as error:
            yield self._idle(view.failed_answer(str(error), text))
        else:
            note = "Stopped." if stop.is_set() else self._known_answer(clip, question.strip())
            yield self._idle(view.finished_answer(text, note), report)
        finally:
            # also when the browser is gone: it ends the request in the server
            stop.set()
            self._stops.pop(session, None)

    def _idle(self, answer: str, report: str = "") -> Show:
        return {
            self._answer: answer,
            self._report: report,
            self._ask: gr.Button(visible=True),
            self._stop: gr.Button(visible=False),
        }

    async def _stop_session(self, request: gr.Request) -> None:
        if stop := self._stops.get(str(request.session_hash)):
            stop.set()

    def _choose_clip(self, name: str) -> tuple[str, gr.Dataset]:
        return str(self._clips[name].path), self._samples(name)

    def _choose_own(self) -> tuple[None, gr.Dataset]:
        return None, self._samples(None)

    async def _look(self) -> str:
        return view.header(*await self._client.status())

    def _samples(self, name: str | None) -> gr.Dataset:
        return gr.Dataset(samples=[[text] for text in self._questions_for(name)])

    def _questions_for(self, name: str | None) -> list[str]:
        return list(QUESTIONS) if name is None else self._clips[name].suggestions

    def _known_answer(self, clip: str | None, question: str) -> str:
        known = self._clips[clip].answers.get(question) if clip is not None else None
        return "" if known is None else f"Expected: {known}"


def build_page(server_url: str, api_key: str | None = None, *, clips: Path = CLIPS) -> gr.Blocks:
    """The page for a server; `launch` shows it."""
    blocks: gr.Blocks = Page(Client(server_url, api_key), clips).blocks
    return blocks


def launch(page: gr.Blocks, port: int | None = None, *, wait: bool = True) -> str:
    """Serve a page on loopback and return its address; with `wait`, until interrupted."""
    _, url, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        footer_links=[],
        prevent_thread_lock=not wait,
        max_file_size=MAX_FILE_BYTES,
        theme=_theme(),
        css=view.CSS,
        ssr_mode=False,
    )
    return str(url)


def _offered(kind: Kind) -> list[str]:
    """Methods that need no file of the deployment's."""
    return [name for name in NAMES[kind] if name not in WITH_WEIGHTS]


def _theme() -> gr.themes.Base:
    """Fonts of the reader's own system, because the page must not load any from elsewhere."""
    plain: dict[str, str] = {}
    for kind in ("block_title", "block_label"):
        for mode in ("", "_dark"):
            plain[f"{kind}_background_fill{mode}"] = "none"
            plain[f"{kind}_text_color{mode}"] = "*body_text_color_subdued"
        plain[f"{kind}_text_weight"] = "500"
    # over the video, where plain text could not be read
    plain |= {"block_label_background_fill": "white", "block_label_background_fill_dark": "*neutral_800"}
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=_SANS, font_mono=_MONO)
    plain |= {"body_background_fill": "*neutral_50", "body_background_fill_dark": "*neutral_950"}
    return theme.set(**plain, block_title_padding="0", block_border_width="1px", block_shadow="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="URL of a running mmserve server")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    page = build_page(arguments.server, os.environ.get(KEY_VARIABLE))
    launch(page, arguments.port)


if __name__ == "__main__":
    main()
