"""`sdlora-edge train`: a new run, one more task of a run, or the rest of a run that was killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import UsageError
from .output import Json, emit, output, say, table

if TYPE_CHECKING:
    from ..train.run import Run


def _numbers(text: str, name: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text!r}: give three numbers, such as 0.5,0.5,0.5") from error
    return values * 3 if len(values) == 1 else values


def train(
    preset: Annotated[Optional[str], typer.Option(help="Settings of a published experiment, such as imagenet-r-10 or authors-imagenet-r-10; file and flags win.")] = None,
    config: Annotated[Optional[Path], typer.Option(help="A TOML file with these same keys, such as config.toml of a run; flags win.")] = None,
    data: Annotated[Optional[str], typer.Option(help="Folder or ZIP, a folder per class (train/ and test/ inside, or split by the seed), or a set's name. Default: built-in digits. val/ serves --validate, or testing if there is no test/.")] = None,
    data_root: Annotated[Optional[str], typer.Option(help="Where sets with a name lie.")] = None,
    run: Annotated[Optional[Path], typer.Option(help="An existing run: with --data, learn ONE more task, of one class or more; without, go on where it was stopped.")] = None,
    name: Annotated[Optional[str], typer.Option(help="With --run and --data: the new task's name. Default: the folder's.")] = None,
    protocol: Annotated[Optional[str], typer.Option(help="class: each task brings new classes; domain: new images of the same (folders <domain>/<class>/).")] = None,
    tasks: Annotated[Optional[int], typer.Option(help="Number of tasks to split the classes (or domains) into.")] = None,
    base_classes: Annotated[Optional[int], typer.Option(help="Train the whole backbone on so many classes first, then freeze it.")] = None,
    test_fraction: Annotated[Optional[float], typer.Option(help="Share of each class kept for testing, where there is no test/ folder.")] = None,
    validate: Annotated[Optional[float], typer.Option(help="Score on this share of the training images instead: to choose settings by.")] = None,
    train_limit: Annotated[Optional[int], typer.Option(help="At most so many training images of a class (of a domain). 0: all.")] = None,
    max_megapixels: Annotated[Optional[int], typer.Option(help="Skip images with more pixels than this, before they are decoded. Default: 64.")] = None,
    strict: Annotated[Optional[bool], typer.Option("--strict/--no-strict", help="Stop before training if there is a warning about the images.")] = None,
    augment: Annotated[Optional[str], typer.Option(help="Random views of training images: none, flip, crop, flip-crop.")] = None,
    backbone: Annotated[Optional[str], typer.Option(help="A timm model: ViT, DeiT, DINOv2, EVA, Swin, EfficientNet, MobileNet, ConvNeXt.")] = None,
    weights: Annotated[Optional[str], typer.Option(help="Its weights, a safetensors file. Default: timm's own download.")] = None,
    targets: Annotated[Optional[str], typer.Option(help="Modules to adapt, patterns with commas between. Default: the family's.")] = None,
    image_size: Annotated[Optional[int], typer.Option(help="Side of the model's input, in pixels.")] = None,
    mean: Annotated[Optional[str], typer.Option(help="Override the backbone's normalisation: R,G,B in 0..1.")] = None,
    std: Annotated[Optional[str], typer.Option(help="Override the backbone's normalisation: R,G,B in 0..1.")] = None,
    method: Annotated[Optional[str], typer.Option(help="sdlora; lora: one direction trained on and on; frozen: the head only.")] = None,
    rank: Annotated[Optional[str], typer.Option(help="Rank of each task's direction, or a schedule (RR): 10,8@4,6@8 is 8 from task 4, 6 from task 8.")] = None,
    directions: Annotated[Optional[str], typer.Option(help="Where A comes from: free (random), shared (the first task's).")] = None,
    absorb: Annotated[Optional[float], typer.Option(help="KD: drop a direction if earlier ones reproduce it within this relative squared error. 0 disables.")] = None,
    magnitudes: Annotated[Optional[str], typer.Option(help="Old ones at a new task: carry on from the last; reset (the authors' code); fixed: not trained.")] = None,
    magnitude_norm: Annotated[Optional[str], typer.Option(help="What divides an old direction: direction (the paper), factors (the authors' code).")] = None,
    magnitude_init: Annotated[Optional[float], typer.Option(help="A magnitude's first value.")] = None,
    head: Annotated[Optional[str], typer.Option(help="paper: a row is trained with its task; aligned: all rows are fitted again after each task.")] = None,
    encoding: Annotated[Optional[str], typer.Option(help="How factors travel: fp32, fp16, int8 or int4.")] = None,
    epochs: Annotated[Optional[int], typer.Option(help="Epochs for each task.")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Learning rate.")] = None,
    head_lr_factor: Annotated[Optional[float], typer.Option(help="The head learns at this share of the rate.")] = None,
    magnitude_lr_factor: Annotated[Optional[float], typer.Option(help="The magnitudes learn at this share of the rate.")] = None,
    optimizer: Annotated[Optional[str], typer.Option(help="sgd (momentum 0.9), adam or adamw.")] = None,
    weight_decay: Annotated[Optional[float], typer.Option(help="Of the new direction.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Images in a step, over all processes.")] = None,
    accumulate: Annotated[Optional[int], typer.Option(help="Gradient accumulation: split each batch into this many micro-batches.")] = None,
    precision: Annotated[Optional[str], typer.Option(help="fp32, or autocast to bf16 or fp16.")] = None,
    compile: Annotated[Optional[bool], typer.Option("--compile/--no-compile", help="torch.compile the training step.")] = None,
    workers: Annotated[Optional[int], typer.Option(help="Processes that decode images which do not fit the cache.")] = None,
    cache_gb: Annotated[Optional[float], typer.Option(help="Keep decoded images in memory up to so much.")] = None,
    tensorboard: Annotated[Optional[bool], typer.Option("--tensorboard/--no-tensorboard", help="Write event files into the run.")] = None,
    device: Annotated[Optional[str], typer.Option(help="auto, cpu or cuda.")] = None,
    out: Annotated[Optional[Path], typer.Option(callback=output, help="Folder of the new run. Default: runs/<time>.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of class order, split and training.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Learn a stream of classes task by task, keeping no image of an earlier task.

    Several GPUs: torchrun --nproc-per-node N -m -- sdlora_edge train ...
    """
    given = {
        flag: value
        for flag, value in locals().items()
        if value is not None and flag not in ("preset", "config", "run", "name", "out", "json")
    }
    if name is not None and (run is None or data is None):
        raise UsageError("--name names the task that --run RUN --data FOLDER adds")
    flags = given | {flag: _numbers(given[flag], flag) for flag in ("mean", "std") if flag in given}
    if run is None:
        done = _new(config, flags, preset, out, json)
    else:
        more = given | {
            flag: value
            for flag, value in (("preset", preset), ("config", config), ("out", out))
            if value is not None
        }
        allowed = () if data is None else ("data", "strict")
        if strict is not None and data is None:
            raise UsageError("--strict goes with --data: it is about the images of a new task")
        if extra := sorted(flag.replace("_", "-") for flag in more if flag not in allowed):
            raise UsageError(
                f"--{', --'.join(extra)}: a run keeps the settings it was begun with; give only --data, --name and --strict"
            )
        done = _more(run, data, name, strict, json)
    from ..train import distributed

    result = {
        "run": str(done.path),
        "tasks": len(done.updates),
        "classes": list(done.states[-1].classes),
        "metrics": done.metrics[-1],
    }
    if distributed.first():
        emit(result, json, lambda: _summary(done))


def _new(
    config: Path | None, flags: dict[str, Any], preset: str | None, out: Path | None, json: bool
) -> Run:
    from ..train import config as settings
    from ..train import plan, presets

    chosen = settings.resolve(config, flags, presets.preset(preset) if preset else {})
    source = plan.new_run(chosen, out)
    from ..train import loop  # torch, which takes seconds, comes after the checks

    return loop.train(chosen, out, _reporting(json), source)


def _more(run: Path, data: str | None, name: str | None, strict: bool | None, json: bool) -> Run:
    from ..train import plan

    if data is None:
        asked = plan.resumed(run)
        from ..train import loop

        return loop.resume(run, _reporting(json), asked)
    task = replace(plan.one_more(run, data, name), strict=strict)
    from ..train import loop

    return loop.learn(task, _reporting(json))


def _reporting(json: bool) -> Callable[[Run], None]:
    from ..train import distributed

    def report(progress: Run) -> None:
        if not json and distributed.first():
            say(accuracy_row(progress))

    return report


def accuracy_row(run: Run) -> str:
    """One line of the growing table: accuracy on every task so far, in percent."""
    entry = run.metrics[-1]
    cells = [
        "-" if c is None else f"{100 * c / n:5.1f}" if n else "no test"
        for c, n in zip(entry["correct"][-1], entry["totals"])
    ]
    whole = f"all {100 * entry['accuracy'][-1]:5.1f} | " if "accuracy" in entry else ""
    return f"task {entry['task']:>3} {entry['name'][:16]:16} {len(entry['classes']):>4} classes {entry['seconds']:>7.1f} s | {whole}{' '.join(cells)}"


def _summary(run: Run) -> list[str]:
    entry = run.metrics[-1]
    names = ("last", "average_anytime", "forgetting", "backward_transfer")
    scores = [[n.replace("_", " "), f"{100 * entry[n]:.2f} %"] for n in names if n in entry]
    return [*(table(["", "accuracy"], scores) if scores else []), f"run: {run.path}"]
