"""The command line: `bincomm pretrain | adapt | compare | evaluate | encode | search | codes | ...`."""

import argparse
import difflib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SAVED = 75  # status of a run that a signal ended once it was saved (EX_TEMPFAIL: the same command goes on)
NEEDS_MORE = "training needs more packages ({}): pip install 'bincomm[train]'"
MEASURING_NEEDS_MORE = "what was learned needs more packages ({}): pip install 'bincomm[eval]'"

USAGE = """usage: bincomm COMMAND [OPTIONS]

  pretrain   pretrain a backbone on images without labels, or go on with an unfinished run
  adapt      go on training a pretrained backbone on unlabeled images of another domain
  compare    train several methods with the same budget, and put them into one table
  evaluate   measure what was pretrained on labeled images
  encode     write the codes of images into a folder
  search     the images of such a folder nearest to one
  codes      a page about what the bits mean
  profile    where the time of a training step goes
  data       look at crops, find images that cannot be used, write tar shards
  doctor     tell what is built, found and used on this machine

`bincomm COMMAND --help` lists a command's options."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 failed, 2 bad arguments, SAVED, or 130 interrupted with
    nothing saved since the last checkpoint."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    commands = {
        "pretrain": run_pretrain,
        "adapt": run_adapt,
        "compare": run_compare,
        "evaluate": run_evaluate,
        "encode": run_encode,
        "search": run_search,
        "codes": run_codes,
        "data": run_data,
        "profile": run_profile,
        "doctor": run_doctor,
    }
    try:
        status = dispatch(arguments, commands, USAGE)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was saved", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # what read the output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except Exception:
        if ranks() == 1:
            raise
        traceback.print_exc()
        status = 1
    if "torch.distributed" in sys.modules and ranks() > 1:
        # DistributedDataParallel keeps threads of the process group alive, beside which taking down the
        # interpreter can take long, or abort the process, its work long done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def dispatch(
    arguments: list[str], commands: dict[str, Callable[[list[str]], int]], usage: str, of: str = ""
) -> int:
    """Run the command that the arguments begin with; an error about it begins with `of`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        near = difflib.get_close_matches(arguments[0], commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return fail(f"{of}there is no command {arguments[0]!r}{hint}")
    return commands[arguments[0]](arguments[1:])


def run_pretrain(arguments: list[str]) -> int:
    """`bincomm pretrain`."""
    try:
        from bincomm.config import parse
        from bincomm.evaluation.run import summary
        from bincomm.pretraining import pretrain
    except ImportError as error:
        return fail(NEEDS_MORE.format(error), status=1)
    try:
        config, recipe = parse(arguments)
    except (ValueError, OSError) as error:
        return fail(str(error), once=True)

    def run() -> str | None:
        result = pretrain(config)
        return None if result is None else summary(result, config.output)

    if rank() == 0:
        print(f"recipe {recipe}, data {config.data}, output {config.output}", flush=True)
    return carry_out(run, config.output)


def run_adapt(arguments: list[str]) -> int:
    """`bincomm adapt`."""
    try:
        from bincomm.adaptation import adapt, configure, summary
    except ImportError as error:
        return fail(NEEDS_MORE.format(error), status=1)
    parser = argparse.ArgumentParser(
        prog="bincomm adapt",
        allow_abbrev=False,
        description="Train a pretrained backbone on, under a new head, on unlabeled images of a target.",
        epilog="All options of `bincomm pretrain` are options here too: --output, --epochs, --lr ... Without "
        "them, and besides what recipe adapt says, they are those of the run that --from names.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="WEIGHTS",
        help="a run's directory, a .safetensors file, or a timm model with pretrained weights, by name",
    )
    parser.add_argument("--data", required=True, help="the target's images, as in `bincomm pretrain`")
    own, rest = parser.parse_known_args(arguments)
    try:
        config = configure(own.source, [f"--data={own.data}", *rest])
    except (ValueError, OSError) as error:
        return fail(str(error), once=True)

    def run() -> str | None:
        result = adapt(config)
        return None if result is None else summary(result, config.output)

    if rank() == 0:
        print(f"from {config.init_from}, data {config.data}, output {config.output}", flush=True)
    return carry_out(run, config.output)


def run_compare(arguments: list[str]) -> int:
    """`bincomm compare`."""
    if ranks() > 1:
        return fail("compare: expected to be started without torchrun, which is for single runs", once=True)
    try:
        from bincomm.comparison import DEFAULT_METHODS, METHODS, as_markdown, compare
        from bincomm.config import parse
    except ImportError as error:
        return fail(NEEDS_MORE.format(error), status=1)
    parser = argparse.ArgumentParser(
        prog="bincomm compare",
        allow_abbrev=False,
        description="Train several methods on the same images, steps and seeds, and measure them alike. "
        "The same command goes on with what is unfinished.",
        epilog="All options of `bincomm pretrain` but --method are options here too, and hold for every run: "
        "--data, --recipe, --epochs ... Where --reset_every is 0, bits-reset takes 10. Finished runs of "
        "other methods in the folder are in the table too.",
    )
    parser.add_argument(
        "--methods",
        type=names,
        default=list(DEFAULT_METHODS),
        metavar="NAMES",
        help=f"of {', '.join(METHODS)}; default {','.join(DEFAULT_METHODS)}",
    )
    parser.add_argument(
        "--seeds",
        type=whole_numbers,
        metavar="N,N,...",
        help="a run of every method for each; default --seed alone",
    )
    parser.add_argument(
        "--prototypes",
        type=positive,
        metavar="N",
        help="of dino; default the power of two from a twentieth of the number of images on, at most 65536",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="of the runs and the table, default runs/compare-RECIPE"
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args(arguments)
    if own.method is not None:
        return fail("method: compare takes --methods")
    try:
        config, recipe = parse(rest)
    except (ValueError, OSError) as error:
        return fail(str(error))
    config = replace(config, output=own.output or f"runs/compare-{recipe}")

    def run() -> str:
        table = compare(config, own.methods, own.seeds, own.prototypes)
        return f"\n{as_markdown(table)}\nin {config.output}: table.md, table.json, plot.png, and every run"

    print(f"recipe {recipe}, data {config.data}, output {config.output}", flush=True)
    return carry_out(run, config.output)


def run_evaluate(arguments: list[str]) -> int:
    """`bincomm evaluate`."""
    try:
        from bincomm.config import parse_data
        from bincomm.data.sources import evaluation_sources, open_source
        from bincomm.distributed.ranks import join_ranks
        from bincomm.evaluation.dense import evaluate_segmentation
        from bincomm.evaluation.evaluate import PROTOCOLS, describe, evaluate
        from bincomm.evaluation.pretrained import load_pretrained
        from bincomm.evaluation.video import evaluate_davis
        from bincomm.files import write_json
    except ImportError as error:
        return fail(MEASURING_NEEDS_MORE.format(error), status=1)
    parser = weights_parser(
        "evaluate",
        "Measure what was pretrained: on labeled images k-NN, linear probes, retrieval by features and by "
        "codes, dimensions and bits in use; on DAVIS the following of objects; on masks segmentation.",
        head=False,
    )
    parser.add_argument("--data", type=given, help="labeled images, as in `bincomm pretrain`")
    parser.add_argument(
        "--protocols",
        type=names,
        metavar="NAMES",
        help=f"on these, of {', '.join(PROTOCOLS)}; default all that it can be asked",
    )
    parser.add_argument("--davis", metavar="FOLDER", help="DAVIS-2017, which ImageSets lies in")
    parser.add_argument(
        "--segmentation", metavar="FOLDER", help="with train/images, train/masks, val/images and val/masks"
    )
    parser.add_argument("--output", type=given, metavar="FILE", help="JSON file to write")
    options = parser.parse_args(arguments)
    if not (options.data or options.davis or options.segmentation):
        return fail("evaluate: expected at least one of --data, --davis and --segmentation", once=True)
    if options.protocols and not options.data:
        return fail("protocols: they measure on --data, got none", once=True)
    for name in ("davis", "segmentation"):
        folder = getattr(options, name)
        if folder and not Path(folder).expanduser().is_dir():
            return fail(f"{name}: expected a folder, got {folder}", once=True)
    if options.output and not can_be_file(options.output):
        return fail(f"output: expected a file in a folder that exists, got {options.output}", once=True)

    def run() -> None:
        with join_ranks(options.device) as ranks:
            model = load_pretrained(options.weights, ranks.device, **shown(options))
            found: dict[str, Any] = {"weights": options.weights}

            def tell(part: dict[str, Any]) -> None:  # at once, for what comes after it may fail
                found.update(part)
                print(describe(part), flush=True)
                if options.output:
                    write_json(Path(options.output), found)

            # First, as all ranks work at it; what follows is measured by one.
            if options.davis:
                followed = evaluate_davis(model, options.davis, ranks=ranks)
                if ranks.rank == 0:
                    tell({"davis": followed})
            if options.data:
                data = parse_data(options.data)
                source = ranks.leaders_first(lambda: open_source(data))
                sources = ranks.leaders_first(lambda: evaluation_sources(data, source))
                if sources is None:
                    expected = (
                        "images with labels (folders named after two classes or more), got none"
                        if source.labels is None
                        else "folders train and val, or five images of a class at least, got fewer"
                    )
                    raise ValueError(f"data: expected {expected} in {options.data}")
                gallery, queries, held_out = sources
                measured = evaluate(model, gallery, queries, options.protocols, ranks=ranks)
                if ranks.rank == 0:
                    tell({"data": options.data, "queries_held_out": held_out, **measured})
            ranks.leave()
            if ranks.rank == 0 and options.segmentation:
                tell({"segmentation": evaluate_segmentation(model, options.segmentation)})

    return attempt(run)


def run_encode(arguments: list[str]) -> int:
    """`bincomm encode`."""
    try:
        from bincomm.codes.encode import encode
        from bincomm.codes.search import build_index
        from bincomm.config import parse_data
        from bincomm.data.sources import open_source
        from bincomm.distributed.ranks import join_ranks
        from bincomm.evaluation.pretrained import load_pretrained
    except ImportError as error:
        return fail(MEASURING_NEEDS_MORE.format(error), status=1)
    parser = weights_parser(
        "encode",
        "Write the codes of images into a folder of Parquet files. The same command goes on with what is "
        "unfinished, also under torchrun.",
    )
    parser.add_argument("--data", required=True, type=given, help="images, as in `bincomm pretrain`")
    parser.add_argument(
        "--output", required=True, type=given, metavar="FOLDER", help="for part-00000.parquet, ..."
    )
    parser.add_argument("--features", action="store_true", help="write the backbone's features, too")
    parser.add_argument("--index", action="store_true", help="write index.faiss, a flat binary index, too")
    options = parser.parse_args(arguments)
    if options.index and not find_spec("faiss"):
        return fail(MEASURING_NEEDS_MORE.format("no module named 'faiss'"), status=1)

    def run() -> str | None:
        with join_ranks(options.device) as ranks:
            weights = os.path.expanduser(options.weights)
            if os.path.exists(weights):  # for `bincomm search` from anywhere
                weights = os.path.abspath(weights)
            model = load_pretrained(weights, ranks.device, **shown(options))
            source = ranks.leaders_first(lambda: open_source(parse_data(options.data)))
            for note in source.notes if ranks.rank == 0 else ():
                print(f"note: {note}", flush=True)
            found = encode(model, source, options.output, features=options.features, ranks=ranks)
            if ranks.rank:
                return None
            lines = [f"{found.codes} codes of {found.bits} bits in {found.parts} files in {options.output}"]
            if found.unusable:
                lines.append(f"{len(found.unusable)} images cannot be used, listed in unusable.txt there")
            if options.index:
                lines.append(f"index: {build_index(options.output)}")
            return "\n".join(lines)

    try:
        return attempt(run)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the files that are missing", file=sys.stderr)
        return 128 + signal.SIGINT


def run_search(arguments: list[str]) -> int:
    """`bincomm search`."""
    if ranks() > 1:
        return fail("search: expected one process; start it without torchrun", once=True)
    try:
        import torch

        from bincomm.codes.encode import open_parts
        from bincomm.codes.search import MOST, contact_sheet, nearest
        from bincomm.evaluation.pretrained import load_pretrained
        from bincomm.files import write_file
    except ImportError as error:
        return fail(MEASURING_NEEDS_MORE.format(error), status=1)
    parser = argparse.ArgumentParser(
        prog="bincomm search",
        allow_abbrev=False,
        description="The images of an encoded folder whose codes are nearest to that of an image.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="of codes, as `bincomm encode` left it")
    parser.add_argument("--query", required=True, metavar="IMAGE", help="file of an image")
    parser.add_argument("--weights", help="that the codes are of; default those that the folder names")
    parser.add_argument("--k", type=positive, default=20, metavar="N", help="images, default 20")
    parser.add_argument(
        "--sheet", default="nearest.png", metavar="FILE", help="PNG to write, default nearest.png"
    )
    options = parser.parse_args(arguments)
    if not can_be_file(options.sheet):
        return fail(f"sheet: expected a file in a folder that exists, got {options.sheet}")

    def run() -> str:
        parts = open_parts(options.folder)
        made = parts[0].made
        weights = options.weights or made.get("weights", "")
        if not options.weights and not os.path.exists(weights):
            raise ValueError(
                f"weights: those of the codes in {options.folder} were {weights or 'not noted'}, which is "
                "not there; expected --weights to say where they are"
            )
        model = load_pretrained(weights, torch.device("cpu"))
        (found,) = nearest(model, options.folder, [options.query], options.k)
        sheet = contact_sheet(options.query, found)
        write_file(Path(options.sheet), lambda file: sheet.save(file, format="png"))
        lines = [f"{n.distance:5}  {n.path}" + (f"  ({n.label})" if n.label else "") for n in found]
        lines.append(f"in {options.sheet}: the query and " + ("these" if len(found) < MOST else "the first"))
        whole = -(-made.get("images", 0) // made.get("rows", 1))
        if len(parts) < whole:
            lines.append(f"note: {len(parts)} of {whole} files are there; `bincomm encode` makes the others")
        return "\n".join([" bits  image", *lines])

    return attempt(run)


def run_codes(arguments: list[str]) -> int:
    """`bincomm codes`."""
    if ranks() > 1:
        return fail("codes: expected one process; start it without torchrun", once=True)
    try:
        from bincomm.codes.report import report
        from bincomm.config import parse_data
        from bincomm.data.sources import open_source
        from bincomm.distributed.ranks import join_ranks
        from bincomm.evaluation.pretrained import load_pretrained
    except ImportError as error:
        return fail(MEASURING_NEEDS_MORE.format(error), status=1)
    parser = weights_parser("codes", "A page about the code: what its bits carry, and images that show it.")
    parser.add_argument("--data", required=True, type=given, help="images, as in `bincomm pretrain`")
    parser.add_argument(
        "--output",
        required=True,
        type=given,
        metavar="FOLDER",
        help="for codes.html, which a browser opens, and codes.json",
    )
    parser.add_argument(
        "--attributes", metavar="FILE", help="CSV: its first column names images, the others are attributes"
    )
    parser.add_argument(
        "--classes", type=two_names, metavar="A,B", help="to tell apart; default the two most alike"
    )
    parser.add_argument(
        "--bits", type=whole_numbers, metavar="N,N,...", help="shown with images; default some that tell most"
    )
    parser.add_argument(
        "--other", metavar="WEIGHTS", help="the same run before or after a reset of its head, to compare with"
    )
    options = parser.parse_args(arguments)

    def run() -> str:
        with join_ranks(options.device) as one:
            device = one.device
        model = load_pretrained(options.weights, device, **shown(options))
        other = load_pretrained(options.other, device, **shown(options)) if options.other else None
        report(
            model,
            open_source(parse_data(options.data)),
            Path(options.output),
            attributes=Path(options.attributes) if options.attributes else None,
            classes=options.classes,
            bits=options.bits,
            other=other,
        )
        return f"in {options.output}: codes.html, codes.json"

    return attempt(run)


def attempt(run: Callable[[], str | None]) -> int:
    """Carry out a command that trains nothing, print what it returns, and put into words what ended it."""
    from torch import OutOfMemoryError

    from bincomm.distributed.ranks import FirstRankError

    try:
        text = run()
        if text is not None:
            print(text, flush=True)
    except FirstRankError:
        return 1
    except BrokenPipeError:
        raise
    except (ImportError, OSError, OutOfMemoryError) as error:
        return fail(str(error), status=1)
    except ValueError as error:
        return fail(str(error), once=True)
    return 0


def given(text: str) -> str:
    """What is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path or a name, got an empty string")
    return text


def can_be_file(path: str) -> bool:
    """Whether a file may be written there; asked before the work for it, not after."""
    return Path(path).parent.is_dir() and not Path(path).is_dir()


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",")]


def two_names(text: str) -> tuple[str, str]:
    """Two names with a comma between."""
    found = names(text)
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"expected two names with a comma between, got {text!r}")
    return found[0], found[1]


def weights_parser(command: str, description: str, head: bool = True) -> argparse.ArgumentParser:
    """Options of a command that shows images to what was pretrained, a head with it or not; see `shown`."""
    parser = argparse.ArgumentParser(prog=f"bincomm {command}", allow_abbrev=False, description=description)
    of = "a run's directory, or a checkpoint"
    if not head:
        of = "a run's directory, a checkpoint, a .safetensors file, or a timm model with pretrained weights"
        parser.add_argument("--backbone", help="timm's name of it, for a .safetensors file that does not say")
    parser.add_argument("weights", metavar="WEIGHTS", type=given, help=of)
    parser.add_argument("--global_size", type=positive, metavar="PIXELS", help="side of the center crop")
    parser.add_argument("--eval_crop", type=float, metavar="SHARE", help="of the resized image's side")
    parser.add_argument("--batch_size", type=positive, metavar="N", help="images at a time, 256 at most")
    parser.add_argument("--threads", type=positive, metavar="N", help="that read images")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU when there is one"
    )
    return parser


def shown(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load_pretrained` that a command line has, the others as in training."""
    keys = ("backbone", "global_size", "eval_crop", "batch_size", "threads")
    return {key: value for key in keys if (value := getattr(options, key, None)) is not None}


def run_profile(arguments: list[str]) -> int:
    """`bincomm profile`."""
    if ranks() > 1:
        return fail("profile: expected one process; start it without torchrun", once=True)
    try:
        from bincomm.config import parse
        from bincomm.profiling import describe, profile
    except ImportError as error:
        return fail(NEEDS_MORE.format(error), status=1)
    parser = argparse.ArgumentParser(
        prog="bincomm profile",
        allow_abbrev=False,
        description="Where the time of a training step goes, and how much of the machine is used.",
        epilog="All options of `bincomm pretrain` are options here too: --recipe, --data, --batch_size ...",
    )
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="steps measured, default 20")
    own, rest = parser.parse_known_args(arguments)
    try:
        config, recipe = parse(rest)
        print(f"recipe {recipe}, data {config.data}, batches of {config.batch_size}", flush=True)
        print(describe(profile(config, own.steps)))
    except (RuntimeError, OSError) as error:
        return fail(str(error), status=1)
    except ValueError as error:
        return fail(str(error))
    return 0


def carry_out(run: Callable[[], str | None], output: str) -> int:
    """Train, print what it returns, and put into words what ended it early; returns the exit status."""
    from bincomm.data.loader import TooManyUnusableError
    from bincomm.distributed.ranks import FirstRankError
    from bincomm.pretraining import Interrupted, TrainingError

    try:
        text = run()
    except (TrainingError, TooManyUnusableError, OSError) as error:
        return fail(str(error), status=1)
    except ValueError as error:
        return fail(str(error))
    except FirstRankError:
        return 1
    except Interrupted as error:
        if rank() == 0:
            name = signal.Signals(error.args[0]).name
            print(f"\n{name}: saved in {output}; the same command goes on from here", file=sys.stderr)
        return SAVED
    except KeyboardInterrupt:
        if not any(Path(output).glob("**/checkpoints/*.ckpt")):
            raise
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    if text is not None:
        print(text)
    return 0


DATA_USAGE = """usage: bincomm data COMMAND [OPTIONS]

  look     a contact sheet of the crops of a few images, as the network will see them
  verify   find the images of a source that cannot be used, and why
  shard    write the images of a source into tar shards

`bincomm data COMMAND --help` lists a command's options."""


def run_data(arguments: list[str]) -> int:
    """`bincomm data look | verify | shard`."""
    commands = {"look": look, "verify": verify, "shard": shard}
    try:
        return dispatch(arguments, commands, DATA_USAGE, of="data: ")
    except ImportError as error:
        return fail(f"data needs more packages ({error}): pip install 'bincomm[train]'", status=1)
    except ValueError as error:
        return fail(str(error))
    except (RuntimeError, OSError) as error:
        return fail(str(error), status=1)


def look(arguments: list[str]) -> int:
    """`bincomm data look`."""
    from bincomm.config import parse
    from bincomm.data.contact_sheet import contact_sheet
    from bincomm.data.sources import open_source
    from bincomm.files import write_file

    parser = argparse.ArgumentParser(
        prog="bincomm data look",
        allow_abbrev=False,
        description="A contact sheet of the crops of the images that a run begins with, a row for an image.",
        epilog="All options of `bincomm pretrain` are options here too: --data, --recipe, --global_scale ...",
    )
    parser.add_argument("--sheet", default="look.png", metavar="FILE", help="PNG to write, default look.png")
    parser.add_argument("--images", type=positive, default=8, metavar="N", help="rows, default 8")
    own, rest = parser.parse_known_args(arguments)
    config, recipe = parse(rest)
    sheet, names = contact_sheet(open_source(config.data), config.crops, seed=config.seed, images=own.images)
    write_file(Path(own.sheet), lambda file: sheet.save(file, format="png"))
    lines = [f"recipe {recipe}, data {config.data}", *names, f"in {own.sheet}, a row each"]
    print("\n".join(lines))
    return 0


def verify(arguments: list[str]) -> int:
    """`bincomm data verify`; status 1 where images cannot be used, or were not taken."""
    from bincomm.config import parse_data
    from bincomm.data.export import verify, write_unusable
    from bincomm.data.sources import open_source

    parser = data_parser(
        "verify", "Read and decode every image, and list those that cannot be used, with the reason."
    )
    parser.add_argument(
        "--output", default="unusable.txt", metavar="FILE", help="list to write, default unusable.txt"
    )
    options = parser.parse_args(arguments)
    if not Path(options.output).absolute().parent.is_dir():
        raise ValueError(f"output: the folder of {options.output} does not exist")
    source = open_source(parse_data(options.data))
    for note in source.notes:
        print(f"note: {note}")
    unusable = verify(source, threads=options.threads)
    write_unusable(Path(options.output), unusable)
    print(f"{len(source.images)} images, {len(unusable)} cannot be used, listed in {options.output}")
    return 1 if unusable or source.notes else 0


def shard(arguments: list[str]) -> int:
    """`bincomm data shard`."""
    from bincomm.config import parse_data
    from bincomm.data.export import write_shards
    from bincomm.data.sources import open_source

    parser = data_parser("shard", "Write images into tar shards in WebDataset's layout, in random order.")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="a new folder for data-00000.tar, ..."
    )
    parser.add_argument(
        "--size", type=positive, default=256, metavar="MIB", help="of a shard, about, default 256"
    )
    options = parser.parse_args(arguments)
    source = open_source(parse_data(options.data))
    left_out = write_shards(source, options.output, shard_bytes=options.size << 20, threads=options.threads)
    for name, why in left_out:
        print(f"left out: {name}: {why}")
    print(f"{len(source.images) - len(left_out)} images, {len(left_out)} left out, in {options.output}")
    return 0


def data_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Options that verify and shard share."""
    parser = argparse.ArgumentParser(prog=f"bincomm data {name}", description=description, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="as in `bincomm pretrain`")
    parser.add_argument("--threads", type=positive, default=4, metavar="N", help="CPU threads, default 4")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def whole_numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas between them, got {text!r}"
        ) from error


def run_doctor(arguments: list[str]) -> int:
    """`bincomm doctor [--json]`."""
    from bincomm.diagnosis import describe, doctor

    if arguments in (["-h"], ["--help"]):
        print("usage: bincomm doctor [--json]\n\nTell what is built, found and used on this machine.")
        return 0
    if arguments not in ([], ["--json"]):
        return fail(f"doctor: unknown arguments {' '.join(arguments)}; there is --json alone")
    report = doctor()
    print(json.dumps(report, indent=2) if arguments else describe(report))
    return 0


def fail(message: str, status: int = 2, once: bool = False) -> int:
    """Print an error, `once` of all ranks that meet it, and return the exit status."""
    where = f"rank {rank()}: " if rank() else ""
    if not (once and rank()):
        print(f"bincomm: error: {where}{message}", file=sys.stderr, flush=True)
    return status


def rank() -> int:
    """This process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    sys.exit(main())
