"""What an export's directory holds, and its model card: README.md with YAML front matter, as model hubs read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.config.recipes import SQUEEZE
from pipeline.data.decoding import shorter_side
from pipeline.errors import printable

FILES = {
    "safetensors": "model.safetensors",
    "safetensors-bf16": "model.bf16.safetensors",
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
    "torchscript": "model.torchscript",
}
"""Format to its file."""
ROUNDED = ("safetensors-bf16", "onnx-int8")
"""Formats with fewer bits than the checkpoint, whose scores do not hold for them."""
CARD, CONFIG = "README.md", "config.json"
SCHEMA = "titn-pipeline/export/1"

LIBRARY = "titn-pipeline"
TASK = "image-classification"
HUB_DATASETS = {
    "mnist": ("ylecun/mnist", "MNIST"),
    "cifar10": ("uoft-cs/cifar10", "CIFAR-10"),
    "cifar100": ("uoft-cs/cifar100", "CIFAR-100"),
}
"""Source of a data set to its name on the hub and its proper name."""
OTHER_DATASETS = {"digits": "scikit-learn's handwritten digits", "folder": "an image folder"}
SCORES = {
    "top1": ("Top-1 accuracy", "accuracy"),
    "top5": ("Top-5 accuracy", "accuracy"),
    "precision": ("Macro precision", "precision"),
    "recall": ("Macro recall", "recall"),
    "f1": ("Macro F1", "f1"),
    "class_top1": ("Top-1 accuracy, class head alone", "accuracy"),
    "distillation_top1": ("Top-1 accuracy, distillation head alone", "accuracy"),
}
"""Score to its title and its metric on the hub."""
PERCENT = ("top1", "top5", "class_top1", "distillation_top1")
NUM_NAMED = 20
READING = """if image.mode.startswith("I"):  # 16-bit grey
    image = Image.fromarray(((np.asarray(image, np.int32) + 128) // 257).astype(np.uint8))
if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[1]:  # laid on white
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
image = image.convert("RGB")"""
"""What pipeline.data.decoding.in_rgb does, as a card's example writes it."""
CITATION = """@article{rahman2025titn,
  title         = {A Transformer-in-Transformer Network Utilizing Knowledge Distillation for Image Recognition},
  author        = {Rahman, Dewan Tauhid and Sarker, Yeahia and Mazumder, Antar and Anower, Md. Shamim},
  year          = {2025},
  eprint        = {2502.16762},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CV}
}"""


def model_card(config: Mapping[str, Any]) -> str:
    """Return the card, Markdown behind YAML front matter, of an export's config.json; see stages.export."""
    sections = (
        _introduction(config),
        _use(config),
        _files(config),
        _training(config),
        _figures(config),
        _limits(config),
        f"## Citation\n\nThe method:\n\n```bibtex\n{CITATION}\n```",
    )
    return "\n\n".join((_front_matter(config), *sections)) + "\n"


def _front_matter(config: Mapping[str, Any]) -> str:
    hub_name, name = _dataset(config)
    tags = [TASK, "knowledge-distillation", "pytorch"] + (["onnx"] if "onnx" in config["files"] else [])
    tags += ["transformer-in-transformer"] if config["model"] in ("titn", "tnt") else []
    scored = [(key, value) for key, value in config["scores"].items() if key in SCORES]
    front: dict[str, Any] = {"license": config["license"], "library_name": LIBRARY, "pipeline_tag": TASK, "tags": tags}
    if hub_name:
        front["datasets"] = [hub_name]
    if scored:
        dataset = {"type": hub_name or "imagefolder", "name": name, "split": config["scores_split"] or "unknown"}
        metrics = [
            {"type": SCORES[key][1], "name": SCORES[key][0], "value": _share(key, value)} for key, value in scored
        ]
        result = {"task": {"type": TASK, "name": "Image Classification"}, "dataset": dataset, "metrics": metrics}
        front["metrics"] = sorted({SCORES[key][1] for key, _ in scored})
        front["model-index"] = [{"name": _name(config), "results": [result]}]
    return "\n".join(("---", *_yaml(front), "---"))


def _yaml(value: Any) -> list[str]:
    """Write dicts and lists as lines of YAML; scalars as JSON, which is valid YAML."""
    if isinstance(value, dict):
        pairs = [(f"{key}:", item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [("-", item) for item in value]
    else:
        return [json.dumps(value, ensure_ascii=False)]
    lines = []
    for head, item in pairs:
        first, *rest = _yaml(item)
        if head == "-" or not isinstance(item, dict | list):
            lines += [f"{head} {first}", *(f"  {line}" for line in rest)]
        else:
            lines += [head, *(f"  {line}" for line in (first, *rest))]
    return lines


def _introduction(config: Mapping[str, Any]) -> str:
    names = [f"`{_text(name)}`" for name in config["class_names"][:NUM_NAMED]]
    more = " and others, see config.json" if len(config["class_names"]) > NUM_NAMED else ""
    side = config["image_size"]
    return (
        f"# {_name(config)}\n\n"
        f"A {config['kind']} of the architecture `{config['model']}` with {config['parameters']:,} parameters, which "
        f"classifies {side}x{side} images into {len(config['class_names'])} classes: {', '.join(names)}{more}.\n"
        f"Made with titn-pipeline {config['versions'][LIBRARY]} after arXiv:2502.16762."
    )


def _use(config: Mapping[str, Any]) -> str:
    formats = list(config["files"])
    choice = ', format="torchscript"' if formats == ["torchscript"] else ""
    text = f"""## Use

```python
from PIL import Image
import pipeline

model, transform = pipeline.load("."{choice})  # this directory
probabilities = model(transform(Image.open("image.png"))[None])[0]
print(model.class_names[probabilities.argmax()], float(probabilities.max()))
```"""
    side = config["image_size"]
    if "onnx" in formats:
        text += f"""

Without PyTorch:

```python
import json, numpy as np, onnxruntime, pathlib
from PIL import Image, ImageOps

names = json.loads(pathlib.Path("config.json").read_text())["class_names"]
session = onnxruntime.InferenceSession("model.onnx")
image = ImageOps.exif_transpose(Image.open("image.png"))
{READING}
{_square(config)}
batch = np.asarray(image).transpose(2, 0, 1)[None]  # uint8
probabilities = session.run(["probabilities"], {{"images": batch}})[0][0]
print(names[probabilities.argmax()], float(probabilities.max()))
```"""
    mean = " The probabilities are the mean of both heads'." if len(config["outputs"]) > 2 else ""
    outputs = ", ".join(f"`{output['name']}`" for output in config["outputs"])
    return f"""{text}

Input: `images`, uint8 RGB, (batch, 3, {side}, {side}), values 0 to 255; normalisation is part of the model.
Outputs, float32, (batch, {len(config["class_names"])}): {outputs}.{mean}"""


def _square(config: Mapping[str, Any]) -> str:
    """Return the lines of Python that make an image the model's square."""
    side = config["image_size"]
    if config["resize"] == SQUEEZE:
        return f"image = image.resize(({side}, {side}), Image.Resampling.BILINEAR)"
    return f"""sides = [{shorter_side(side)} * side // min(image.size) for side in image.size]
image = image.resize(sides, Image.Resampling.BILINEAR)
left, top = [round((side - {side}) / 2) for side in sides]
image = image.crop((left, top, left + {side}, top + {side}))"""


def _files(config: Mapping[str, Any]) -> str:
    lines = ["## Files", "", "| file | MB | SHA-256 | differs from PyTorch by | top-1 % |", "|---|---:|---|---:|---:|"]
    for entry in config["files"].values():
        agreement = entry["agreement"]
        difference = f"{agreement['max_difference']:.1e}"
        top1 = f"{entry['top1']:.2f}" if "top1" in entry else ""
        lines.append(
            f"| {entry['file']} | {entry['bytes'] / 1e6:.2f} | `{entry['sha256'][:16]}` | {difference} | {top1} |"
        )
    images = _text(config["checked_on"]["images"])
    lines += [
        "",
        f"Differences are the largest of any probability, on images of {images} in batches of several sizes.",
    ]
    if "safetensors-bf16" in config["files"]:
        entry = config["files"]["safetensors-bf16"]
        lines.append(
            f"In {entry['file']} the weights are rounded to bfloat16 (8 significant bits), for a smaller file; "
            f"`pipeline.load` computes with them in float32. Its top-1 was measured with PyTorch on "
            f"{entry['top1_images']} images of {images}, where the trained weights reach "
            f"{entry['top1_of_checkpoint']:.2f} %."
        )
    if "onnx-int8" in config["files"]:
        entry = config["files"]["onnx-int8"]
        lines.append(
            f"Top-1 was measured with onnxruntime on {entry['top1_images']} images of {images}. In model.int8.onnx the "
            "matrix products have 8-bit weights, and activations are scaled by batch: an image's probabilities "
            "depend slightly on the other images of its batch."
        )
    if "torchscript" in config["files"]:
        lines.append("A TorchScript archive is a program: load one only from someone you trust.")
    return "\n".join(lines)


def _training(config: Mapping[str, Any]) -> str:
    training, trained, teacher = config["training"] or {}, config["trained"], config["teacher"]
    _, name = _dataset(config)
    rows = [("data", f"{name}, recipe `{_text(config['recipe'])}`, SHA-256 `{config['dataset_sha256']}`")]
    rows += [("training images", f"{config['num_train']:,}")] if config["num_train"] else []
    if decoders := config["decoders"]:
        rows.append(("decoded by", ", ".join(f"{_text(name)} {_text(value)}" for name, value in decoders.items())))
    if teacher:
        on_test = isinstance(teacher.get("test_top1"), float)
        evaluated_on = config["selected_on"] or config["evaluated_on"]
        top1, split = (teacher["test_top1"], "test") if on_test else (teacher.get("top1"), evaluated_on)
        accuracy = f", top-1 {top1:.2f} % on {_split(split)}" if isinstance(top1, float) else ""
        labels = f", labels `{_text(teacher['labels'])}`" if teacher.get("labels") else ""
        rows.append(("teacher", f"`{_text(teacher.get('name'))}`{accuracy}{labels}"))
    elif config["kind"] == "student":
        rows.append(("teacher", "none"))
    fields = ["epochs", "batch_size", "optimizer", "lr", "weight_decay", "schedule", "weights", "views"]
    fields += ["alpha"] if len(config["outputs"]) > 2 else []
    rows += [(key.replace("_", " "), f"`{_text(training[key])}`") for key in fields if training.get(key) is not None]
    rows.append(("this checkpoint", f"epoch {config['epoch']}, seed {config['seed']}"))
    if trained:
        rows.append(("trained on", f"{_text(trained['device'])}, {_text(trained['date'])} UTC"))
        rows.append(("commit", f"`{_text(trained['commit'])}`"))
    lines = [f"| {key} | {value} |" for key, value in rows]
    return "\n".join(("## Training", "", "| | |", "|---|---|", *lines))


def _figures(config: Mapping[str, Any]) -> str:
    if not config["scores"]:
        return "## Figures\n\nThe checkpoint came without figures."
    split = _split(config["scores_split"])
    count = f" ({config['num_test']:,} images)" if config["num_test"] and config["scores_split"] == "test" else ""
    precision = f", computed in {config['scores_precision']}" if config["scores_precision"] else ""
    lines = [f"## Figures\n\nOn {split}{count}{precision}, one training run:\n", "| | |", "|---|---:|"]
    for key, value in config["scores"].items():
        if key == "agreement":
            lines.append(f"| Agreement with the teacher | {value:.2f} % |")
        else:
            lines.append(f"| {SCORES[key][0]} | {f'{value:.2f} %' if key in PERCENT else f'{value:.3f}'} |")
    return "\n".join(lines)


def _split(name: str | None) -> str:
    return f"the split `{name}`" if name else "the split that chose the checkpoint"


def _limits(config: Mapping[str, Any]) -> str:
    side = config["image_size"]
    seen = f"Images of any shape are resized to {side}x{side}: finer detail is lost."
    if config["resize"] != SQUEEZE:
        shorter = shorter_side(side)
        seen = f"Images are resized so that the shorter side has {shorter} pixels; what is beyond the {side}x{side} in "
        seen += "the middle is not seen, and finer detail is lost."
    lines = [
        f"The model knows only its {len(config['class_names'])} classes: every image gets one of them.",
        seen,
        "The probabilities are not calibrated, and nothing was measured on images from other sources.",
    ]
    if config["selected_on"] and config["selected_on"] == config["scores_split"]:
        lines.append(
            f"The epoch was chosen on the split of the figures above (`{config['selected_on']}`): they are optimistic."
        )
    lines += [f"Training warned: {_text(warning)}." for warning in config["warnings"]]
    if config["license"] == "unknown":
        lines.append("The license of these weights is not stated; that of the code is Apache-2.0.")
    return "\n".join(("## Limits", "", *(f"- {line}" for line in lines)))


def _dataset(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the data set's name on the hub, if any, and its name for people."""
    source = config["data_source"]
    if source in HUB_DATASETS:
        return HUB_DATASETS[source]
    return None, OTHER_DATASETS.get(source or "", f"the data of recipe {_text(config['recipe'])}")


def _name(config: Mapping[str, Any]) -> str:
    return f"{config['model']}-{_text(config['recipe'])}"


def _share(key: str, value: float) -> float:
    return round(value / 100 if key in PERCENT else value, 6)


def _text(value: Any) -> str:
    """Return a value as one line that is safe in Markdown's code and tables."""
    return printable(str(value)).replace("`", "'").replace("|", "/")
