"""The Space: a web page to ask a trained system about a picture.

It streams the rationale, and shows the answer with and without the picture, and the patches that the model attended to;
users can edit the rationale and get the answer to their version. `python app.py MODEL` runs it; without MODEL, as on
the Hub, `model.json` beside this file names the model. The page answers one problem at a time: `mmcot.predict` and
`mmcot.evaluate` score a dataset. The app imports nothing from this repository: it loads the pipeline together with the
weights, as any other user does.
"""

import argparse
import json
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from string import ascii_uppercase as LETTERS  # the labels of choices in prompts
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from transformers import Pipeline, TextStreamer, pipeline

FOLDER = Path(__file__).parent
MODEL_FILE = FOLDER / "model.json"

MAX_LENGTH = 4_000  # characters of a text
MAX_PIXELS = 50_000_000
MAX_FILE_SIZE = "10mb"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # of an upload; Pillow would pass PostScript to Ghostscript
FULL_ATTENTION = 4  # the overlay has its full colour from this multiple of uniform attention
OVERLAY = (245, 60, 0)
OPACITY = 0.75
SHOWN_SIDE = 480  # the longer side of a picture with its overlay, px

INTRODUCTION = """# Ask about a picture

A demonstration of `{model}`. **Its answers can be wrong.**
"""
MAPS_TEXT = """### Where the model looked

Choose a token to see which patches of the picture it attended to. Attention does not prove why the model gives an
answer.
"""
CROPPED = "The model saw only the central square of the picture: the map covers that part."
NO_PICTURE = "This file is damaged, or its format is not supported. Upload a PNG, JPEG, WebP or GIF."
TOO_LARGE = f"This picture has more than {MAX_PIXELS // 1_000_000} million pixels. Upload a smaller one."

# Fonts of the user's system: a page that loads fonts from a server does not open without a network.
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
    """Return the error that a user sees for invalid input, without a traceback in the log."""
    return gr.Error(message, title="Please check", print_exception=False)


def read_problem(answer: Pipeline, file: dict | None, question: str, choices: str, context: str, caption: str) -> dict:
    """
    Convert the form to a problem of the pipeline.

    Raises:
        gr.Error: the problem cannot be answered; the message is for the user.
    """
    for name, text in {"question": question, "choices": choices, "context": context, "caption": caption}.items():
        check_length(name, text)
    if not question.strip():
        raise refusal("Write a question first.")
    lines = [line.strip() for line in choices.splitlines() if line.strip()]
    if len(lines) > len(LETTERS):
        raise refusal(f"There are {len(lines)} choices; at most {len(LETTERS)} are supported.")
    path = None if file is None else uploaded(file)
    if path is not None:
        read_picture(answer, path)
    problem = {"question": question, "choices": lines, "context": context, "caption": caption}
    first = answer.processor.stages.with_models[0]
    unwritten = {stage.writes: "" if stage.has_model else [] for stage in answer.processor.stages}
    if answer.processor.is_too_long(answer.processor.fit_source({**unwritten, **problem}, first), first):
        raise refusal(
            f"Question and choices are longer than the {first.max_source_length} tokens that the model reads."
        )
    return {**problem, "image": path}


def uploaded(file: dict) -> str:
    """Return the path of an uploaded picture. Other paths are refused: a client could send any path of the server."""
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise refusal(NO_PICTURE)
    return path


def read_picture(answer: Pipeline, path: str) -> Image.Image:
    """Read a picture as the pipeline does: upright and RGB."""
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
        raise refusal(f"The {name} field has {len(text):,} characters; at most {MAX_LENGTH:,} are allowed.")


def is_cropped(image_processor: Any) -> bool:
    """Whether the model sees only the centre of a picture. (Without cropping, `do_center_crop` can be None.)"""
    return bool(getattr(image_processor, "do_center_crop", None))


class ReaderLeft(Exception):
    """Ends the generation of a text after the visitor has left the page."""


class QueueStreamer(TextStreamer):
    """Puts each piece of generated text into a queue, and whether it ends the text of a stage."""

    def __init__(self, tokenizer, pieces: queue.SimpleQueue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = pieces
        self.has_reader = True

    def put(self, value: torch.Tensor) -> None:
        if not self.has_reader:
            raise ReaderLeft
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.put((text, stream_end))


def stream(answer: Pipeline, problem: dict, given: dict[str, str]) -> Iterator[dict]:
    """
    Yield the partial result after each piece of text, and the pipeline's result at the end.

    Args:
        given: texts that replace the output of stages, by column.
    """
    stages = [
        stage for stage in answer.processor.stages if stage.generates or (stage.answers and not problem["choices"])
    ]
    unwritten = ["answer" if stage.answers else stage.writes for stage in stages if stage.writes not in given]
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    streamer = QueueStreamer(answer.processor.tokenizer, pieces)
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
            streamer.has_reader = False  # if the visitor left, generation ends at the next token
        yield future.result()


# The texts of users and models are escaped here and passed to the page as HTML: a template of `gr.HTML` ("{{value}}")
# would run "${…}" in them as JavaScript.


def answer_html(result: dict, choices: list[str]) -> str:
    """Format the answer, and a bar for each choice's probability."""
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


def verdicts_html(result: dict, columns: list[str]) -> str:
    """Format the verdicts on the answer, and the texts that a rejected answer replaced."""
    texts = {title(column): result[column] for column in columns if column in result}
    rejected = result.get("rejected", {})
    texts |= {f"Rejected {title(name).lower()}": text for name, text in rejected.items() if isinstance(text, str)}
    return "".join(text_html(name, text) for name, text in texts.items())


def passages_html(passages: list[dict]) -> str:
    """Format the retrieved passages with their sources, the best one first."""
    items = [
        "<li><strong>{title}</strong> {text} <em>{source}</em></li>".format(
            **{name: escape(passage[name]) for name in ("title", "text", "source")}
        )
        for passage in passages
    ]
    return f'<p><strong>Passages</strong></p><ol class="written">{"".join(items)}</ol>' if items else ""


def shown_token(token: str) -> str:
    """Replace the mark at the start of a word by a space; keep a single mark, which would be invisible as a space."""
    return token if token == "▁" else token.replace("▁", " ")


def tokens_html(tokens: list[str]) -> str:
    """Format a button for each token."""
    buttons = [
        f'<button type="button" data-token="{number}" aria-pressed="false">{escape(shown_token(token))}</button>'
        for number, token in enumerate(tokens)
    ]
    return f'<div class="tokens">{"".join(buttons)}</div>'


def overlay(picture: Image.Image, token_map: torch.Tensor) -> Image.Image:
    """Draw a token's map over the picture; patches with uniform attention or less stay unchanged."""
    multiples = token_map * token_map.numel()  # of uniform attention
    strength = ((multiples - 1) / (FULL_ATTENTION - 1)).clamp(0, 1) * OPACITY * 255
    shown = resized(picture)
    mask = Image.fromarray(strength.byte().cpu().numpy()).resize(shown.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", shown.size, OVERLAY), shown, mask)


def resized(picture: Image.Image) -> Image.Image:
    """Resize a picture to the size at which the page shows it."""
    scale = SHOWN_SIDE / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def title(column: str) -> str:
    return column.replace("_", " ").capitalize()


class Page:
    """
    The page for a pipeline: a text box for each stage that writes a text, maps for each stage that sees pictures.

    Args:
        name: the name of the model, shown on the page.
    """

    def __init__(self, answer: Pipeline, name: str):
        self.answer = answer
        stages = answer.processor.stages
        self.written = [stage.writes for stage in stages if stage.generates]
        self.verdicts = [stage.writes for stage in stages.with_models if not (stage.generates or stage.answers)]
        self.retrieved = [stage.writes for stage in stages if not stage.has_model]
        self.picture_stages = [stage.name for stage in stages if stage.sees_pictures]
        self.columns_read = {column for stage in stages for column in stage.reads}
        with gr.Blocks(
            title="Ask about a picture", analytics_enabled=False, delete_cache=(3600, 86_400)
        ) as self.blocks:
            gr.Markdown(INTRODUCTION.format(model=name))
            self.lay_out_form()
            self.lay_out_results()
            self.connect_events()

    def lay_out_form(self) -> None:
        with gr.Row():
            picture = gr.Image(
                label="Picture (or none)",
                sources=["upload", "clipboard"],
                height=345,
                visible=bool(self.picture_stages),
                elem_id="picture",
            )
            with gr.Column():
                question = gr.Textbox("", label="Question", lines=2, elem_id="question")
                choices = gr.Textbox("", label="Choices, one per line (or none)", lines=4, elem_id="choices")
                context = gr.Textbox("", label="Context", visible="context" in self.columns_read)
                caption = gr.Textbox("", label="Caption of the picture", visible="caption" in self.columns_read)
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
        """Lay out the results, which are hidden until a question is asked."""
        self.state = gr.State()  # the problem, and the texts that the answer stage reads
        self.token_maps = gr.State()  # the token maps of the shown stage
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
                    self.passages = gr.HTML(visible=bool(self.retrieved), elem_id="passages")
                with gr.Column() as self.unseen_part:
                    gr.Markdown("### Answer without the picture")
                    self.unseen = gr.HTML(elem_id="unseen-answered")
            with gr.Column() as self.maps_part:
                gr.Markdown(MAPS_TEXT)
                self.cropped = gr.Markdown(CROPPED, visible=is_cropped(self.answer.processor.image_processor))
                self.stage = gr.Radio(
                    self.picture_stages,
                    value=next(iter(self.picture_stages), None),
                    label="Stage",
                    visible=len(self.picture_stages) > 1,
                    elem_id="stage",
                )
                with gr.Row():
                    with gr.Column(min_width=320):
                        self.tokens = gr.HTML(js_on_load=CHOOSE_TOKEN, apply_default_css=False, elem_id="tokens")
                    with gr.Column(min_width=320):
                        self.overlay = gr.Image(show_label=False, interactive=False, buttons=[], elem_id="overlay")

    def connect_events(self) -> None:
        private = {"api_visibility": "private"}  # not part of the public API
        ask = {**private, "concurrency_id": "model", "show_progress_on": self.boxes or self.answered}
        maps = [self.maps_part, self.token_maps, self.tokens, self.overlay]
        show_maps = {
            "fn": self.show_maps,
            "inputs": [self.state, self.stage],
            "outputs": maps,
            **private,
            "concurrency_id": "model",
        }
        results = [self.results, self.heading, self.state, *self.boxes, self.answered, self.passages]
        results += [self.unseen_part, self.unseen]
        # Without preprocessing: gr.Image would show Pillow's exception to the user if a file is not a picture.
        asking = self.ask_button.click(self.ask, self.form, [*results, self.maps_part], preprocess=False, **ask)
        asking = asking.success(self.answer_without_picture, self.state, self.unseen, **private, concurrency_id="model")
        asking.success(**show_maps)
        texts = [self.state, *self.boxes]
        self.again_button.click(self.ask_again, texts, [*texts, self.answered, self.passages], **ask).success(
            **show_maps
        )
        self.stage.input(**show_maps)
        self.tokens.select(
            self.show_token, [self.state, self.token_maps], self.overlay, **private, show_progress="hidden"
        )

    def ask(self, *form) -> Iterator[dict]:
        problem = read_problem(self.answer, *form)
        yield {
            self.results: gr.Column(visible=True),
            self.heading: f'<h2 class="written">{escape(problem["question"])}</h2>',
            **dict.fromkeys([*self.boxes, self.answered, self.passages, self.unseen], ""),
            self.unseen_part: gr.Column(visible=problem["image"] is not None),
            self.maps_part: gr.Column(visible=False),
        }
        yield from self.respond(problem, {})

    def ask_again(self, state: dict, *texts: str) -> Iterator[dict]:
        """Answer again from the texts that the user edited."""
        if state is None:
            raise refusal("Ask a question first.")
        given = dict(zip(self.written, texts, strict=True))
        for column, text in given.items():
            check_length(column, text)
        yield from self.respond(state["problem"], given)

    def respond(self, problem: dict, given: dict[str, str]) -> Iterator[dict]:
        for result in stream(self.answer, problem, given):
            texts = [result.get(column, "") for column in self.written]
            passages = {column: result[column] for column in self.retrieved if column in result}
            yield {
                self.state: {
                    "problem": problem,
                    "given": dict(zip(self.written, texts, strict=True)),
                    "passages": passages,
                },
                self.answered: answer_html(result, problem["choices"]) + verdicts_html(result, self.verdicts),
                self.passages: passages_html([passage for found in passages.values() for passage in found]),
                **dict(zip(self.boxes, texts, strict=True)),
            }

    def answer_without_picture(self, state: dict) -> str:
        if state["problem"]["image"] is None:
            return ""
        result = self.answer({**state["problem"], "image": None})
        texts = "".join(text_html(title(column), result[column]) for column in self.written)
        return texts + answer_html(result, state["problem"]["choices"]) + verdicts_html(result, self.verdicts)

    def show_maps(self, state: dict, stage: str | None) -> dict:
        """Show the maps, the tokens to choose from, and the picture without an overlay."""
        if state["problem"]["image"] is None:
            return {self.maps_part: gr.Column(visible=False)}
        try:
            token_maps = self.answer.token_maps({**state["problem"], **state["passages"]}, stage, given=state["given"])
            tokens = tokens_html(token_maps.tokens)
        except ValueError as error:  # the tower's patches have no positions
            token_maps, tokens = None, f"<p>This model has no maps: {escape(str(error))}</p>"
        return {
            self.maps_part: gr.Column(visible=True),
            self.token_maps: token_maps,
            self.tokens: tokens,
            self.overlay: gr.Image(resized(self.picture_of(state)), alt_text="The picture"),
        }

    def show_token(self, state: dict, token_maps, event: gr.EventData) -> gr.Image:
        token = shown_token(token_maps.tokens[event.token]).strip()
        shown = overlay(self.picture_of(state), token_maps.maps[0][event.token])
        return gr.Image(shown, alt_text=f"The picture with the patches that “{token}” attended to")

    def picture_of(self, state: dict) -> Image.Image:
        return read_picture(self.answer, state["problem"]["image"])


def published_model() -> dict[str, str]:
    """Read the published model from `model.json`, as arguments of `pipeline`."""
    if not MODEL_FILE.is_file():
        raise SystemExit(
            "No model is given. Name a folder or an id on the Hub: python app.py MODEL\n"
            f"or write {MODEL_FILE}, in the format of a Space: "
            '{"repo_id": "user/name", "revision": "the commit, 40 hexadecimal digits"}'
        )
    published = json.loads(MODEL_FILE.read_text(encoding="utf-8"))
    return {"model": published["repo_id"], "revision": published["revision"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="A web page to ask a trained system about a picture.")
    parser.add_argument("model", nargs="?", help="a folder or an id on the Hub; default: the model in model.json")
    parser.add_argument("--port", type=int, help="the port on 127.0.0.1; default: the first free port from 7860")
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
