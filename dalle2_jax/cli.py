"""The `dalle2` command over trained runs: generate, describe, evaluate. Bad input is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from dalle2_jax._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dalle2", description="Draw from, describe and evaluate trained runs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="pictures of captions")
    generate.add_argument("run", help="a run's folder, such as runs/demo")
    generate.add_argument("prompt", nargs="+", help="one or more captions, each in quotes")
    generate.add_argument("--count", type=int, default=1, help="pictures a caption (default 1)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--out", default=None, help="a PNG (one picture) or a folder (default: samples/)")
    generate.add_argument("--guidance-scale", type=float, default=None, help="the decoder's guidance scale")
    generate.add_argument("--steps", default=None, help="the decoder's sampling steps, such as 50 or 10,10,3,2,2")
    generate.add_argument("--strict", action="store_true", help="refuse a prompt that is too long, rather than cut it")
    generate.add_argument("--stages", action="store_true", help="write each stage's picture too")

    describe = commands.add_parser("describe", help="what a run is")
    describe.add_argument("run")

    evaluate = commands.add_parser("evaluate", help="the oracle, retrieval, the prior's suite, the upsampler")
    evaluate.add_argument("run")
    evaluate.add_argument("--count", type=int, default=240, help="captions of the test split (default 240)")
    evaluate.add_argument("--seed", type=int, default=0)

    options = parser.parse_args(arguments)
    command = {"generate": _generate, "describe": _describe, "evaluate": _evaluate}[options.command]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"dalle2: warning: {message}", file=sys.stderr)
        try:
            return command(options)
        except (ValueError, OSError) as error:
            print(f"dalle2: {error}", file=sys.stderr)
            return 2


def _prepare_jax() -> None:
    """CPU cores as devices, and compiled programs kept below ~/.cache, so that a second call starts in seconds."""
    import jax

    from dalle2_jax.sharding import use_cpu_cores

    use_cpu_cores()
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle2_jax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _check_numbers(options: argparse.Namespace) -> None:
    if options.count < 1:
        raise ValueError(f"--count is {options.count}; it must be 1 or more")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}; it must lie in 0 to {2**32 - 1}")


def _generate(options: argparse.Namespace) -> int:
    import jax

    from dalle2_jax.evaluation.grid import save_png
    from dalle2_jax.unclip import DALLE2

    _check_numbers(options)
    total = len(options.prompt) * options.count
    out = Path(options.out or "samples")
    single = out.suffix.lower() == ".png"
    if single and total > 1:
        raise ValueError(f"--out {out} is one file but {total} pictures are to be drawn; name a folder")
    if out.exists() and (out.is_dir() if single else not out.is_dir()):
        raise ValueError(f"--out {out} is {'a folder' if single else 'a file'}; give another name")
    _prepare_jax()
    model = DALLE2.load(options.run)
    captions = [prompt for prompt in options.prompt for _ in range(options.count)]
    numbers = [number for _ in options.prompt for number in range(options.count)]
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(options.seed), n))(jax.numpy.asarray(numbers))
    generated = model.generate(
        keys,
        captions,
        guidance_scale=options.guidance_scale,
        decoder={} if options.steps is None else {"steps": options.steps},
        strict=options.strict,
        return_stages=True,
    )
    if single:
        paths = [out]
    else:
        paths = [
            out / f"{index:03d}_{_slug(caption)}_{number}.png"
            for index, (caption, number) in enumerate(zip(captions, numbers, strict=True))
        ]
    for index, path in enumerate(paths):
        facts = {"prompt": captions[index], "seed": str(options.seed), "number": str(numbers[index])}
        facts["software"] = f"dalle2_jax {__version__}"
        save_png(path, generated.pictures[index], facts)
        if options.stages and generated.upsampled:
            save_png(path.with_name(f"{path.stem}_decoder.png"), generated.decoded[index], facts)
            for number, pictures in enumerate(generated.upsampled[:-1]):
                save_png(path.with_name(f"{path.stem}_upsampler{number}.png"), pictures[index], facts)
        print(path)
    return 0


def _slug(caption: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in caption)[:40].strip("_") or "picture"


def _describe(options: argparse.Namespace) -> int:
    from dalle2_jax.checkpoint import CheckpointError, describe_stage

    run = Path(options.run)
    paths = sorted(run.glob("*/stage.json")) if run.is_dir() else []
    if not paths:
        raise CheckpointError(
            f"there is no trained stage in {run}; train one with `python -m train configs/shapes.py all`"
        )
    print(f"{run}: {len(paths)} stage{'s' if len(paths) > 1 else ''}")
    for path in paths:
        print(describe_stage(path.parent))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from dalle2_jax.evaluation.grid import caption_grid, save_png
    from dalle2_jax.evaluation.suite import evaluate, format_report
    from dalle2_jax.unclip import DALLE2

    _check_numbers(options)
    _prepare_jax()
    run = Path(options.run)
    model = DALLE2.load(run)
    data = model.clip.part("data")
    if data.name != "captioned_shapes":
        raise ValueError(f"{run} was trained on {data.name}; the oracle reads only captioned_shapes")
    if data.config not in (None, "one_object"):
        raise ValueError(f"{run} was trained on captioned_shapes/{data.config}; only one_object is evaluated")
    report, shown = evaluate(
        model, data, count=options.count, seed=options.seed, say=lambda line: print(line, flush=True)
    )
    stages = (model.clip, model.prior, model.decoder, *model.upsamplers)
    report["seconds"] = {stage.name: round(stage.info.get("seconds", 0.0), 1) for stage in stages}
    report["version"] = __version__
    partial = run / "report.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(run / "report.json")
    test, unseen = shown["test"], shown["unseen"]
    seen_first, unseen_first = slice(0, 16), slice(0, 8)
    sheet = caption_grid(
        [
            [*test.pictures[seen_first], *unseen.pictures[unseen_first]],
            [*shown["generated"].decoded[seen_first], *shown["unseen_generated"].decoded[unseen_first]],
            [*shown["generated"].pictures[seen_first], *shown["unseen_generated"].pictures[unseen_first]],
        ],
        [*test.captions[seen_first], *(f"{caption} (unseen pair)" for caption in unseen.captions[unseen_first])],
        labels=("real", "decoder", "final"),
    )
    save_png(run / "samples.png", sheet)
    print(format_report(report))
    print(f"wrote {run / 'report.json'} and {run / 'samples.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
