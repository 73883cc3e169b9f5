"""Look inside a model: the attention of each token over the picture, and the inputs that an answer depends on.

python -m examples.look_inside [MODEL] [OUTPUT.png]

MODEL is a folder in the Hub's layout or a Hub id, with a picture tower. The default is the model that
`examples/fine_tune.py` trains. The first part draws the attention of the fusion over the picture. The second part asks
the same question without the picture, and with a rationale that names another choice. `python -m mmcot.probes` repeats
this for a whole split.
"""

import sys
from pathlib import Path

import matplotlib
from PIL import Image
from transformers import pipeline

matplotlib.use("Agg")
from matplotlib import pyplot

PICTURE = Path(__file__).parents[1] / "space" / "examples" / "bar_chart.png"


def draw_maps(picture: Image.Image, tokens: list[str], maps, output: str) -> None:
    """Draw one panel per token: the picture, overlaid with the attention to each patch."""
    columns = 8
    rows = -(-len(tokens) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, token, weights in zip(panels.flat, tokens, maps, strict=False):
        panel.imshow(picture, extent=(0, 1, 0, 1))
        panel.imshow(weights, extent=(0, 1, 0, 1), cmap="hot", alpha=0.5)
        panel.set_title(token, fontsize=8)
    figure.savefig(output, bbox_inches="tight")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "runs/own_data/hub"
    output = sys.argv[2] if len(sys.argv) > 2 else "attention.png"
    answer = pipeline("multimodal-cot", model=model, trust_remote_code=True)
    picture = Image.open(PICTURE).convert("RGB")
    problem = {"image": picture, "question": "Which bar is the tallest?", "choices": ["red", "green", "black"]}

    first = answer.processor.stages.with_models[0].name
    attention = answer.token_maps(problem, first)
    draw_maps(picture, attention.tokens, attention.maps[0].numpy(), output)
    print(f"attention of each token of the {first} stage: {output}")

    other = {"rationale": "Solution: The black bar is the tallest. So, it is black."}
    for name, result in {
        "unchanged": answer(problem),
        "without the picture": answer({**problem, "image": None}),
        "another rationale": answer(problem, given=other),
    }.items():
        pairs = zip(problem["choices"], result["scores"], strict=True)
        scores = ", ".join(f"{choice} {score:.2f}" for choice, score in pairs)
        print(f"{name:>20}: {result['answer']:6} ({scores})  {result['rationale']}")
