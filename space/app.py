"""The Space: a page on which to ask a trained system about a picture.

It shows the rationale as it is written, the answer with and without the picture, and where the model looked; the
rationale can be edited and answered from. `python app.py MODEL` runs it, or, as on the Hub, `model.json` beside this
file names the model. One problem at a time: scores over a dataset are `mmcot.predict`'s and `mmcot.evaluate`'s. Nothing
is imported from this repository: the pipeline comes with the weights, as anyone loads it.
"""

import argparse
import json
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from string import ascii_uppercase as LETTERS  # the prompts letter the choices by them
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from transformers import Pipeline, TextStreamer, pipeline

FOLDER = Path(__file__).parent
MODEL_FILE = FOLDER / "model.json"

MAX_LENGTH = 4_000  # of a text, characters
MAX_PIXELS = 50_000_000
MAX_FILE_SIZE = "10mb"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # of an upload; Pillow would hand PostScript to Ghostscript
FULL = 4  # times an even share of the attention, which the overlay shows in full colour
OVERLAY = (245, 60, 0)
OPACITY = 0.75
SHOWN_SIDE = 480  # of the longer side of a picture with its overlay, px

INTRODUCTION = """# Ask about a picture

A demonstration of `{model}`. **Its answers can be wrong.**
"""
LOOKED = """### Where the model looked

Choose a token to see which patches of the picture it attended to. That is not a proof of why the model answers as it
does.
"""
CROPPED = "The model saw the middle of the picture only, cut to a square: the map is of that."
NO_PICTURE = "This file is not a whole picture that can be read here. Give a PNG, JPEG, WebP or GIF."
TOO_LARGE = f"This picture has more than {MAX_PIXELS // 1_000_000} million pixels. Give a smaller one."

# Fonts of the reader's system: a page that asks a server for fonts does not open without network.
THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container .html-container { padding: 0; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
.answer { font-size: 1.15em; margin: 0 0 .6em; overflow-wrap: anywhere; }
.bars { list-style: none; margin: 0; padding: 0; }
.bars li { margin: 0 0 .6em; }
.bars .choice { display: flex; justify-content: space-between; gap: 1em; }
.bars .choice span:first-child { overflow-wrap: anywhere; }
.bars .rail { height: .5em; border-radius: .25em; background: var(--border-color-primary); overflow: hidden; }
.bars .bar { height: 100%; background: var(--neutral-400); }
.bars .chosen .choice { font-weight: 600; }
.bars .chosen .bar { background: var(--primary-500); }
.written { overflow-wrap: anywhere; white-space: pre-wrap; }
.tokens { max-height: 16em; overflow-y: auto; line-height: 2.2; }
.tokens button { padding: .35em .15em; border-radius: .3em; white-space: pre; line-height: 1.2; }
.tokens button:hover, .tokens button:focus-visible { background: var(--border-color-primary); }
.tokens button[aria-pressed=true] { background: rgb(245, 60, 0); color: white; }
"""
CHOOSE_TOKEN = """
element.addEventListener("click", (event) => {
  const chosen = event.target.closest("button");
  if (!chosen) return;
  for (const button of element.querySelectorAll("button")) button.setAttribute("aria-pressed", button === chosen);
  trigger("select", {token: Number(chosen.dataset.token)});
});
"""


def refusal(message: str) -> gr.Error:
    """What the user sees of bad input; the log needs no traceback of it."""
    return gr.Error(message, title="Please check", print_exception=False)


def read_problem(answer: Pipeline, file: dict | None, question: str, choices: str, context: str, caption: str) -> dict:
    """
    The form as a problem of the pipeline.

    Raises:
        gr.Error: it is not one that can be answered, in words for the user.
    """
    for name, text in {"question": question, "choices": choices, "context": context, "caption": caption}.items():
        check_length(name, text)
    if not question.strip():
        raise refusal("Write a question first.")
    lines = [line.strip() for line in choices.splitlines() if line.strip()]
    if len(lines) > len(LETTERS):
        raise refusal(f"There are {len(lines)} choices; at most {len(LETTERS)} are taken.")
    path = None if file is None else uploaded(file)
    if path is not None:
        read_picture(answer, path)
    problem = {"question": question, "choices": lines, "context": context, "caption": caption}
    first = answer.processor.stages[0]
    if answer.processor.is_too_long(answer.processor.fit_source(problem, first), first):
        raise refusal(
            f"Question and choices are longer than the {first.max_source_length} tokens that the model reads."
        )
    return {**problem, "image": path}


def uploaded(file: dict) -> str:
    """The path of a picture that was uploaded to this page: a client could name any file of the machine."""
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise refusal(NO_PICTURE)
    return path


def read_picture(answer: Pipeline, path: str) -> Image.Image:
    """As the pipeline reads it: upright and RGB."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError
        return answer.preprocess({"question": "", "image": path})["images"][0]
    except Image.DecompressionBombError as error:
        raise refusal(TOO_LARGE) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise refusal(NO_PICTURE) from error


def check_length(name: str, text: str) -> None:
    if len(text) > MAX_LENGTH:
        raise refusal(f"The {name} field has {len(text):,} characters; at most {MAX_LENGTH:,} are taken.")


def is_cropped(image_processor: Any) -> bool:
    """Whether the model sees the middle of a picture only. (Of one that does not crop, `do_center_crop` is None.)"""
    return bool(getattr(image_processor, "do_center_crop", None))


class NobodyListens(Exception):
    """Ends a generation whose reader has left."""


class Pieces(TextStreamer):
    """Puts into a queue what is written, piece by piece: the text, and whether a stage's text ends with it."""

    def __init__(self, tokenizer, pieces: queue.SimpleQueue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = pieces
        self.is_heard = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_heard:
            raise NobodyListens
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.put((text, stream_end))


def stream(answer: Pipeline, problem: dict, given: dict[str, str]) -> Iterator[dict]:
    """
    The result as far as it is written, growing; the last one is the pipeline's.

    Args:
        given: texts that stand in place of what a stage would write.
    """
    stages = [stage for stage in answer.processor.stages if not (stage.answers and problem["choices"])]
    unwritten = ["answer" if stage.answers else stage.writes for stage in stages if stage.writes not in given]
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    streamer = Pieces(answer.processor.tokenizer, pieces)
    result = dict(given)
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(answer, problem, given=given, streamer=streamer)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            for text, is_end in iter(pieces.get, None):
                result[unwritten[0]] = result.get(unwritten[0], "") + text
                if is_end:
                    del unwritten[0]
                yield dict(result)
        finally:
            streamer.is_heard = False  # a visitor who leaves is not waited for longer than a token
        yield future.result()


# What users and models write reaches the page as HTML that is escaped here: in a template of `gr.HTML` ("{{value}}") a
# "${…}" in it would be run as JavaScript.


def answer_html(result: dict, choices: list[str]) -> str:
    """The answer, and a bar for each choice's probability."""
    if "answer" not in result:
        return ""
    html = f'<p class="answer">Answer: <strong>{escape(result["answer"])}</strong></p>'
    bars = [
        f'<li class="{"chosen" if number == result["answer_index"] else ""}">'
        f'<div class="choice"><span>({LETTERS[number]}) {escape(choice)}</span><span>{score:.1%}</span></div>'
        f'<div class="rail"><div class="bar" style="width: {score:.1%}"></div></div></li>'
        for number, (choice, score) in enumerate(zip(choices, result.get("scores", []), strict=True))
    ]
    return f'{html}<ol class="bars">{"".join(bars)}</ol>'


def text_html(name: str, text: str) -> str:
    return f'<p><strong>{escape(name)}</strong></p><p class="written">{escape(text)}</p>'


def shown_token(token: str) -> str:
    """A word's first with a blank before it; a blank alone as it is written, to be seen."""
    return token if token == "▁" else token.replace("▁", " ")


def tokens_html(tokens: list[str]) -> str:
    """A button for each token."""
    buttons = [
        f'<button type="button" data-token="{number}" aria-pressed="false">{escape(shown_token(token))}</button>'
        for number, token in enumerate(tokens)
    ]
    return f'<div class="tokens">{"".join(buttons)}</div>'


def overlay(picture: Image.Image, token_map: torch.Tensor) -> Image.Image:
    """The picture with a token's map on it; where it looked no more than everywhere, nothing is on it."""
    shares = token_map * token_map.numel()
    strength = ((shares - 1) / (FULL - 1)).clamp(0, 1) * OPACITY * 255
    shown = enlarged(picture)
    mask = Image.fromarray(strength.byte().cpu().numpy()).resize(shown.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", shown.size, OVERLAY), shown, mask)


def enlarged(picture: Image.Image) -> Image.Image:
    """As large as it is shown, or as small."""
    scale = SHOWN_SIDE / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def title(column: str) -> str:
    return column.replace("_", " ").capitalize()


class Page:
    """
    The page for a pipeline: a text box for each stage that writes a text, maps for each that sees pictures.

    Args:
        name: of the model, for the reader.
    """

    def __init__(self, answer: Pipeline, name: str):
        self.answer = answer
        stages = answer.processor.stages
        self.written = [stage.writes for stage in stages if not stage.answers]
        self.seeing = [stage.name for stage in stages if stage.sees_pictures]
        self.read = {column for stage in stages for column in stage.reads}
        with gr.Blocks(
            title="Ask about a picture", analytics_enabled=False, delete_cache=(3600, 86_400)
        ) as self.blocks:
            gr.Markdown(INTRODUCTION.format(model=name))
            self.lay_out_form()
            self.lay_out_results()
            self.listen()

    def lay_out_form(self) -> None:
        with gr.Row():
            picture = gr.Image(
                label="Picture (or none)",
                sources=["upload", "clipboard"],
                height=345,
                visible=bool(self.seeing),
                elem_id="picture",
            )
            with gr.Column():
                question = gr.Textbox("", label="Question", lines=2, elem_id="question")
                choices = gr.Textbox("", label="Choices, one per line (or none)", lines=4, elem_id="choices")
                context = gr.Textbox("", label="Context", visible="context" in self.read)
                caption = gr.Textbox("", label="Caption of the picture", visible="caption" in self.read)
                self.ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
        self.form = [picture, question, choices, context, caption]
        folder = FOLDER / "examples"
        rows = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
        pictures = [row["image"] and str(folder / row["image"]) for row in rows]
        texts = [[row["question"], "\n".join(row["choices"]), row["context"], ""] for row in rows]
        gr.Examples(
            [[picture, *columns] for picture, columns in zip(pictures, texts, strict=True)],
            self.form,
            example_labels=[row["question"] for row in rows],
        )

    def lay_out_results(self) -> None:
        """What is filled when a question is asked; hidden until then."""
        self.asked = gr.State()  # the problem, and the texts that its answer is from
        self.found = gr.State()  # the token maps that are shown
        with gr.Column(visible=False) as self.results:
            self.heading = gr.HTML()
            with gr.Row():
                with gr.Column():
                    gr.Markdown("### Answer")
                    self.boxes = [
                        gr.Textbox(label=title(column), lines=3, interactive=True, elem_id=f"text-{column}")
                        for column in self.written
                    ]
                    texts = f"this {title(self.written[0]).lower()}" if len(self.written) == 1 else "these texts"
                    self.again_button = gr.Button(f"Answer from {texts}", visible=bool(self.written), elem_id="again")
                    self.answered = gr.HTML(elem_id="answered")
                with gr.Column() as self.unseen_part:
                    gr.Markdown("### Answer without the picture")
                    self.unseen = gr.HTML(elem_id="unseen-answered")
            with gr.Column() as self.looked_part:
                gr.Markdown(LOOKED)
                self.cropped = gr.Markdown(CROPPED, visible=is_cropped(self.answer.processor.image_processor))
                self.stage = gr.Radio(
                    self.seeing,
                    value=next(iter(self.seeing), None),
                    label="Stage",
                    visible=len(self.seeing) > 1,
                    elem_id="stage",
                )
                with gr.Row():
                    with gr.Column(min_width=320):
                        self.tokens = gr.HTML(js_on_load=CHOOSE_TOKEN, apply_default_css=False, elem_id="tokens")
                    with gr.Column(min_width=320):
                        self.overlay = gr.Image(show_label=False, interactive=False, buttons=[], elem_id="overlay")

    def listen(self) -> None:
        private = {"api_visibility": "private"}  # of the page, and nobody's API
        ask = {**private, "concurrency_id": "model", "show_progress_on": self.boxes or self.answered}
        maps = [self.looked_part, self.found, self.tokens, self.overlay]
        look = {
            "fn": self.look,
            "inputs": [self.asked, self.stage],
            "outputs": maps,
            **private,
            "concurrency_id": "model",
        }
        results = [self.results, self.heading, self.asked, *self.boxes, self.answered, self.unseen_part, self.unseen]
        # Without preprocessing: gr.Image's own would show the user Pillow's exception of a file that is no picture.
        asking = self.ask_button.click(self.ask, self.form, [*results, self.looked_part], preprocess=False, **ask)
        asking = asking.success(self.answer_unseen, self.asked, self.unseen, **private, concurrency_id="model")
        asking.success(**look)
        texts = [self.asked, *self.boxes]
        self.again_button.click(self.ask_again, texts, [*texts, self.answered], **ask).success(**look)
        self.stage.input(**look)
        self.tokens.select(self.show_token, [self.asked, self.found], self.overlay, **private, show_progress="hidden")

    def ask(self, *form) -> Iterator[dict]:
        problem = read_problem(self.answer, *form)
        yield {
            self.results: gr.Column(visible=True),
            self.heading: f'<h2 class="written">{escape(problem["question"])}</h2>',
            **dict.fromkeys([*self.boxes, self.answered, self.unseen], ""),
            self.unseen_part: gr.Column(visible=problem["image"] is not None),
            self.looked_part: gr.Column(visible=False),
        }
        yield from self.respond(problem, {})

    def ask_again(self, asked: dict, *texts: str) -> Iterator[dict]:
        """From the texts as the user has edited them."""
        if asked is None:
            raise refusal("Ask a question first.")
        given = dict(zip(self.written, texts, strict=True))
        for column, text in given.items():
            check_length(column, text)
        yield from self.respond(asked["problem"], given)

    def respond(self, problem: dict, given: dict[str, str]) -> Iterator[dict]:
        for result in stream(self.answer, problem, given):
            texts = [result.get(column, "") for column in self.written]
            yield {
                self.asked: {"problem": problem, "given": dict(zip(self.written, texts, strict=True))},
                self.answered: answer_html(result, problem["choices"]),
                **dict(zip(self.boxes, texts, strict=True)),
            }

    def answer_unseen(self, asked: dict) -> str:
        if asked["problem"]["image"] is None:
            return ""
        result = self.answer({**asked["problem"], "image": None})
        texts = "".join(text_html(title(column), result[column]) for column in self.written)
        return texts + answer_html(result, asked["problem"]["choices"])

    def look(self, asked: dict, stage: str | None) -> dict:
        """The maps, the tokens to choose from, and the picture with nothing chosen."""
        if asked["problem"]["image"] is None:
            return {self.looked_part: gr.Column(visible=False)}
        try:
            found = self.answer.token_maps(asked["problem"], stage, given=asked["given"])
            tokens = tokens_html(found.tokens)
        except ValueError as error:  # of a tower whose patches have no places
            found, tokens = None, f"<p>There are no maps for this model: {escape(str(error))}</p>"
        return {
            self.looked_part: gr.Column(visible=True),
            self.found: found,
            self.tokens: tokens,
            self.overlay: gr.Image(enlarged(self.picture_of(asked)), alt_text="The picture"),
        }

    def show_token(self, asked: dict, found, event: gr.EventData) -> gr.Image:
        token = shown_token(found.tokens[event.token]).strip()
        shown = overlay(self.picture_of(asked), found.maps[0][event.token])
        return gr.Image(shown, alt_text=f"The picture, and on it what “{token}” attended to")

    def picture_of(self, asked: dict) -> Image.Image:
        return read_picture(self.answer, asked["problem"]["image"])


def published_model() -> dict[str, str]:
    """What our publishing command wrote, as arguments of `pipeline`."""
    if not MODEL_FILE.is_file():
        raise SystemExit(
            "Which model? Name a folder or an id of the Hub: python app.py MODEL\n"
            f"or, as a Space does, write {MODEL_FILE}: "
            '{"repo_id": "user/name", "revision": "the commit, 40 hexadecimal digits"}'
        )
    published = json.loads(MODEL_FILE.read_text(encoding="utf-8"))
    return {"model": published["repo_id"], "revision": published["revision"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="A page on which to ask a trained system about a picture.")
    parser.add_argument("model", nargs="?", help="a folder or an id of the Hub; without it, what model.json names")
    parser.add_argument("--port", type=int, help="of 127.0.0.1; without it, the first free one from 7860")
    options = parser.parse_args()
    source = {"model": options.model} if options.model else published_model()
    answer = pipeline("multimodal-cot", **source, trust_remote_code=True)
    page = Page(answer, source["model"]).blocks
    page.queue(max_size=20, default_concurrency_limit=1)
    page.launch(
        server_port=options.port,
        max_file_size=MAX_FILE_SIZE,
        theme=THEME,
        css=CSS,
        footer_links=["gradio"],
        run_history=False,
        enable_monitoring=False,
    )


if __name__ == "__main__":
    main()
