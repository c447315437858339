"""python -m train CONFIG [ARGUMENT ...] STAGE|all [--run NAME] [--seed N] [--dry-run] [path.to.field=value ...]
python -m train describe CONFIG [ARGUMENT ...] [STAGE] [--topology NAME] [path.to.field=value ...]

A config's arguments are those of its function `system(...)`: configs/folder.py wants a FOLDER of images,
configs/karlo.py the RUN of converted weights and the folder of IMAGES.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.arguments import Parser
from dalle2_jax.errors import InputError, sentence_for_user
from train.config.find import arguments_of, find_config, find_stage, load_config
from train.loop.profile import profiled_steps
from train.machine import backend

DEFAULT_RUNS = Path("runs")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        prog="python -m train",
        description="Trains the stages of a system, or describes it (python -m train describe CONFIG).",
    )
    result.add_argument("config", metavar="CONFIG", help="a file of configs/, such as configs/shapes.py")
    result.add_argument(
        "rest",
        metavar="[ARGUMENT ...] STAGE [path.to.field=value ...]",
        nargs="*",
        help="what the config wants to know (configs/folder.py: a FOLDER); a stage of it, or: all; fields to change",
    )
    result.add_argument("--run", metavar="NAME", help="the run's folder below --runs-dir (default: the config's name)")
    result.add_argument("--runs-dir", metavar="DIR", type=Path, default=DEFAULT_RUNS, help="default: runs")
    result.add_argument("--seed", type=int, metavar="N", help="the seed of every stage (default: the config's)")
    result.add_argument("--init-from", metavar="RUN", type=Path, help="start each stage from that run's of its name")
    result.add_argument(
        "--mesh",
        metavar="AXIS=SIZE,...",
        help="how devices share the work: data=2,fsdp=4,tensor=1 (default: all of them data; with --topology all fsdp)",
    )
    result.add_argument(
        "--topology",
        metavar="NAME",
        help="with describe: compile for accelerators: v5e:4x4 (TPUs, and their shape), h200:8 (NVIDIA GPUs of one "
        "host), h200:2x8 (hosts x GPUs of each)",
    )
    result.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="FIRST:LAST",
        help="record a trace of these steps, counted from the start, or of N steps (default: 10:15)",
    )
    result.add_argument(
        "--stop-after-steps",
        type=int,
        metavar="N",
        help="stop and save a stage that has taken so many; the same command without it goes on",
    )
    result.add_argument("--dry-run", action="store_true", help="build and lower everything, write nothing")
    result.add_argument("--distributed", action="store_true", help="one of several processes, as the cluster says")
    result.add_argument("--coordinator", metavar="HOST:PORT", help="one of several processes: where the first listens")
    result.add_argument("--processes", type=int, metavar="N", help="with --coordinator: how many there are")
    result.add_argument("--process", type=int, metavar="I", help="with --coordinator: which one this is, 0 to N-1")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. What is wrong with the input is one sentence and code 2."""
    options = parser().parse_args(arguments)
    if not is_one_of_several(options):
        return _answer(options, _run)
    from train.machine import hosts

    try:
        return hosts.leave(_answer(options, lambda options: hosts.watched(lambda: _run(options))))
    except BaseException as error:
        hosts.fail(error)
        raise


def is_one_of_several(options: argparse.Namespace) -> bool:
    """Whether the command is that of one of several processes."""
    return options.distributed or any(
        value is not None for value in (options.coordinator, options.processes, options.process)
    )


def _answer(options: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    try:
        return run(options)
    except Exception as error:
        sentence = sentence_for_user(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    profile = None if options.profile is None else profiled_steps(options.profile)
    words = [options.config, *options.rest]
    describing = words[0] == "describe"
    if describing and len(words) < 2:
        raise InputError("describe wants a config: python -m train describe configs/shapes.py")
    config = words[1] if describing else words[0]
    path = find_config(config)
    several = is_one_of_several(options)
    if several and describing:
        raise InputError("describe runs in one process; leave out --distributed, --coordinator, --processes, --process")
    backend.setup(several)
    if several:
        from train.machine import hosts

        hosts.join(hosts.cluster_of(options.distributed, options.coordinator, options.processes, options.process))
    from dalle2_jax.sharding import make_mesh, mesh_sizes
    from dalle2_jax.sharding.processes import only_first
    from train.config.overrides import apply_overrides
    from train.step.topology import prepare

    if options.topology and not describing:
        raise InputError(f"--topology {options.topology} goes with describe: python -m train describe {config}")
    if options.topology:
        prepare(options.topology)
    make_system = load_config(path)
    wanted = arguments_of(make_system)
    words = words[1 + describing :]
    given, words = words[: len(wanted)], words[len(wanted) :]
    if len(given) < len(wanted) or not (words or describing):
        usage = " ".join(["python -m train", config, *(name.upper() for name in wanted), "STAGE|all"])
        raise InputError(f"{path} wants {'more arguments' if wanted else 'a stage'}: {usage}")
    system = make_system(*given)
    if options.seed is not None:
        system = with_seed(system, options.seed)
    if options.init_from is not None:
        system = with_start(system, options.init_from, only_first(print))
    named = bool(words) and (not describing or "=" not in words[0])
    stage = words[0] if named else "all"
    usual = list(system.stages) if describing else system.usual_stages
    names = usual if stage == "all" else [find_stage(stage, system)]
    system = apply_overrides(system, words[named:])
    sizes = {} if options.mesh is None else mesh_sizes(options.mesh)
    if describing:
        from train.describe import describe

        return describe(system, names, topology=options.topology, mesh=sizes)
    return _train(options, path, given, names, words[1:], system, make_mesh(**sizes), profile)


def _train(
    options: argparse.Namespace,
    path: Path,
    arguments: Sequence[str],
    names: Sequence[str],
    overrides: Sequence[str],
    system: Any,
    mesh: Any,
    profile: tuple[int, int] | None,
) -> int:
    from train.loop.loop import LoopOptions
    from train.run.cascade import train_stages
    from train.run.plan import plan_stages

    if str(options.runs_dir).partition("/")[0].endswith(":"):
        raise InputError(f"--runs-dir {options.runs_dir} is an address; mount what it names and give the folder's path")
    run_dir = options.runs_dir / (options.run or system.name)
    if options.dry_run:
        plan_stages(system, names, run_dir, mesh)
        return 0
    command = " ".join(["python -m train", *map(shlex.quote, (options.config, *arguments)), "{stage}"])
    command += f" --run {shlex.quote(options.run)}" if options.run else ""
    if options.init_from is not None:
        command += f" --init-from {shlex.quote(str(options.init_from))}"
    for option in ("seed", "mesh"):
        if getattr(options, option) is not None:
            command += f" --{option} {getattr(options, option)}"
    if options.runs_dir != DEFAULT_RUNS:
        command += f" --runs-dir {shlex.quote(str(options.runs_dir))}"
    command += "".join(f" {shlex.quote(override)}" for override in overrides)
    text = path.read_text(encoding="utf-8")
    config = {"name": system.name, "text": text, "arguments": list(arguments), "overrides": list(overrides)}
    loop = LoopOptions(profile=profile, stop_after_steps=options.stop_after_steps)
    result = train_stages(system, names, run_dir, mesh, command=command, config=config, options=loop)
    return 0 if result.signal is None else 128 + result.signal


def with_seed(system: Any, seed: int) -> Any:
    """The system with every stage's seed set; checked.

    Raises:
        InputError: for a seed that is no unsigned 32-bit number.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}; it must lie in 0 to {2**32 - 1}")
    stages = {name: dataclasses.replace(stage, seed=seed) for name, stage in system.stages.items()}
    return dataclasses.replace(system, stages=stages)


def with_start(system: Any, run: Path, log: Callable[[str], None] = print) -> Any:
    """The system with every stage starting from the stage of its name in `run`, where there is one; says so if not.

    Raises:
        InputError: if there is none at all.
    """
    from dalle2_jax.checkpoint.record import has_record

    found = [name for name in system.stages if has_record(run / name)]
    if not found:
        raise InputError(f"--init-from {run} has none of the stages {', '.join(system.stages)}; name a run's folder")
    for name in system.usual_stages:
        if name not in found:
            log(f"{run} has no stage {name}: it starts from nothing")
    for name in found:
        system = system.with_stage(name, dataclasses.replace(system.stages[name], init_from=str(run / name)))
    return system


if __name__ == "__main__":
    sys.exit(main())
