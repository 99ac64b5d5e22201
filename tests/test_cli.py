"""The command line as a whole: every command's help, and every way to end."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import bincomm
from bincomm import cli
from bincomm.configuration import configure
from bincomm.data.cache import cache_folder
from bincomm.recipes import recipe_names


def test_doctor_tells_what_runs_where(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "sign_bce_backward" in text
    assert bincomm.doctor()["extension"].get("compiler", "is missing") in text
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"]["coding_rate_factor"]["cpu"] == "C++"
    assert report["kernels"]["coding_rate_backward"]["cpu"] == "C++, BLAS"
    assert report["kernels"]["sign_bce"]["cpu"] == "C++"


def test_help_version_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "pretrain" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["pretrian"]) == 2
    assert "there is no command 'pretrian'; did you mean pretrain?" in capsys.readouterr().err
    assert cli.main(["data", "varify"]) == 2
    assert "data: there is no command 'varify'; did you mean verify?" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bincomm {bincomm.__version__}\n"


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("--output=~/x", "--output=HOME/x"), ("~/x", "HOME/x"), ("--data={'~/x': 1}", "--data={'~/x': 1}"),
        ("--output=./~/x", "--output=./~/x"), ("--output=a~/x", "--output=a~/x"), ("x=~/y", "x=~/y"),
    ],
)  # fmt: skip
def test_the_home_directory_in_arguments(argument, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    assert cli.expand_argument(argument) == expanded


def test_the_home_directory_in_keys_and_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("output: ~/run\ninit_from: ~/other\n")
    config = configure(str(tmp_path / "recipe.yaml"))
    assert (config.output, config.init_from) == (f"{tmp_path}/run", f"{tmp_path}/other")
    assert configure("digits", output="~/run").output == f"{tmp_path}/run"
    monkeypatch.setenv("BINCOMM_CACHE", "~/kept")
    assert cache_folder() == tmp_path / "kept"
    monkeypatch.delenv("BINCOMM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache/bincomm"

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    with pytest.raises(ValueError, match="set BINCOMM_CACHE"):
        cache_folder()


@pytest.mark.slow
def test_the_plotting_backend_of_a_notebook_is_no_hindrance():
    """Matplotlib cannot even be imported where MPLBACKEND names a module that is missing."""
    code = "from bincomm.cli import main; assert main(['doctor']) == 0; import matplotlib.figure"
    environment = os.environ | {"MPLBACKEND": "module://of_the_notebook"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: bincomm {name} ")
    assert "--quiet" in text
    assert "--verbose" in text
    assert ("--reset_every" in text) == cli.COMMANDS[name].takes_run_keys


def test_help_explains_every_key_and_what_is_the_commands_own(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    help_of_key = "reset the head to random weights every this many epochs; 0 = never. auto: every tenth "
    help_of_key += "of the run, in whole epochs, if that is at least 2000 steps, else never; default auto"
    assert f"--reset_every RESET_EVERY {help_of_key}" in text
    assert "--seeds N,N,..." in text
    assert "--method METHOD" not in text
    assert "<class" not in text


@pytest.mark.slow
def test_help_names_the_methods_and_protocols_there_are():
    from bincomm.commands import compare, evaluate
    from bincomm.comparison import DEFAULT_METHODS, METHODS
    from bincomm.evaluation.evaluate import PROTOCOLS

    assert ", ".join(METHODS) == compare.METHODS
    assert ",".join(DEFAULT_METHODS) == compare.DEFAULT_METHODS
    assert ", ".join(PROTOCOLS) == evaluate.PROTOCOLS


@pytest.mark.slow
def test_help_and_errors_of_the_parser_are_quick_because_they_import_no_large_package():
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "timm", "nvidia", "matplotlib", "sklearn", "pyarrow", "faiss")))
from bincomm import cli
for name in cli.COMMANDS:
    try:
        cli.main([*name.split(), "--help"])
    except SystemExit as ended:
        assert ended.code == 0
assert cli.main(["--help"]) == cli.main(["--version"]) == 0
assert cli.main(["pretrain", "--epochs=many"]) == cli.main(["pretrian"]) == 2
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--recipe=digits", "--data=none", "--output"],
        ["compare", "--recipe=digits", "--data=none", "--output"],
        ["evaluate", "none", "--data=none", "--output"],
        ["encode", "none", "--data=none", "--output"],
        ["codes", "none", "--data=none", "--output"],
        ["search", "none", "--query=none", "--sheet"],
        ["data", "look", "--recipe=digits", "--data=none", "--sheet"],
        ["data", "verify", "--data=none", "--output"],
        ["data", "shard", "--data=digits", "--output"],
    ],
)
def test_an_output_that_cannot_be_written_is_told_first(arguments, capsys):
    """Before other arguments, which are wrong too, are looked at."""
    *others, option = arguments
    assert cli.main([*others, f"{option}=/proc/none/x"]) == 2
    assert f"{option.removeprefix('--')}: expected a f" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m bincomm.cli doctor | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.split() == ["141"]
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "codes", "--query=a", "--k=1.5"], "k: expected an integer of at least 1, got '1.5'"),
        (["evaluate", "runs/x", "--threads=0"], "threads: expected an integer from 1 to 1024, got '0'"),
        (["evaluate", "", "--data=digits"], "expected a path or a name, got an empty string"),
        (["search", "codes"], "expected also --query"),
        (["codes"], "expected also WEIGHTS, --data, --output"),
        (["evaluate", "x", "--device=gpu"], "device: expected one of auto, cpu, cuda, got gpu"),
        (["evaluate", "x", "--eval_crop=y"], "eval_crop: expected a number, such as 0.875, got 'y'"),
        (["doctor", "--jason"], "there is no option --jason; did you mean --json?"),
        (["data", "verify", "--dat=x", "--data=x"], "there is no option --dat; did you mean --data?"),
    ],
)
def test_options_that_are_wrong_end_a_command_without_keys(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("bincomm: error: ")
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--method=dino"], "method: compare trains several methods"),
        (["compare", "--seeds=a"], "seeds: expected integers separated by commas, such as 0,1,2"),
        (["compare", "--seed"], "seed: expected one argument"),
        (["profile", "--steps=0"], "steps: expected an integer of at least 1, got '0'"),
        (["data", "look", "--sheets=x"], "there is no option --sheets; did you mean --sheet?"),
        (["adapt", "--data=x"], "expected also --from"),
        (
            ["adapt", "--from=x", "--data=digits", "--init_from=y"],
            "init_from: adapt sets it to its weights",
        ),
        (["pretrain", "--jitter", "0.1"], "for example --jitter='[0.4, 0.4, 0.2, 0.1]'"),
        (["pretrain", "--quiet", "--verbose"], "not allowed with"),
    ],
)
def test_options_that_are_wrong_end_a_command_with_keys(arguments, words, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bincomm: error: ")
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_recipe_that_cannot_be_read_is_told_without_a_traceback(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.symlink_to("/proc/self/mem")  # a file, at whose beginning nothing can be read
    assert cli.main(["pretrain", f"--recipe={recipe}"]) == 2
    assert capsys.readouterr().err == "bincomm: error: [Errno 5] Input/output error\n"


@pytest.mark.parametrize(
    "name", ["compare", "search", "codes", "profile", "data look", "data verify", "data shard"]
)
def test_commands_for_one_process_refuse_several(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    assert cli.main(name.split()) == 2
    assert f"{name}: expected one process; start it without torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.main(name.split()) == 2
    assert capsys.readouterr().err == ""  # it is told once
    assert statuses == [2, 2]


@pytest.fixture
def ends(monkeypatch, tmp_path):
    """Run `bincomm pretrain`, whose training ends with an error; returns the status."""

    def run(error, *arguments):
        def pretrain(config):
            raise error

        monkeypatch.setattr("bincomm.pretraining.pretrain", pretrain)
        return cli.main(["pretrain", "--recipe=digits", f"--output={tmp_path / 'run'}", *arguments])

    return run


def test_every_error_of_training_has_its_status(ends, tmp_path, capsys):
    from bincomm.data.loader import TooManyUnusableError
    from bincomm.distributed.ranks import FirstRankError
    from bincomm.pretraining import Interrupted, TrainingError

    for error, status in (
        (ValueError("x"), 2),
        (OSError("x"), 1),
        (TrainingError("x"), 1),
        (TooManyUnusableError("x"), 1),
    ):
        assert ends(error, "--quiet") == status
        assert capsys.readouterr().err == "bincomm: error: x\n"
    assert ends(ImportError("x"), "--quiet") == 1
    assert "pretrain needs more packages (x): pip install 'bincomm[train]'" in capsys.readouterr().err
    assert ends(FirstRankError("x"), "--quiet") == 1
    assert capsys.readouterr().err == ""
    assert ends(Interrupted(signal.SIGTERM), "--quiet") == cli.SAVED == 75
    text = capsys.readouterr().err
    assert text == f"\nSIGTERM: saved in {tmp_path / 'run'}; run the same command again to resume\n"
    assert ends(KeyboardInterrupt(), "--quiet") == 130
    assert capsys.readouterr().err == "\ninterrupted; nothing was saved\n"
    (tmp_path / "run" / "dino" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "dino" / "checkpoints" / "step-000000001.ckpt").touch()
    assert ends(KeyboardInterrupt(), "--quiet") == 130
    assert (
        "interrupted; run the same command again to resume from the last checkpoint"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:134] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("Failed to decode sample #23:\nCurrent pipeline object is no longer valid."),
        ImportError("libdali.so: failed to map segment from shared object"),
    ],
)
def test_too_little_memory_is_told_in_one_line(ends, capsys, error):
    assert ends(error, "--quiet") == 1
    text = capsys.readouterr().err
    assert text.startswith("bincomm: error: memory: most likely there is too little (")
    assert "lower batch_size, global_size or threads, raise accumulate" in text
    assert text.count("\n") == 1


def test_a_limit_below_what_imports_need_is_told_before_they_abort(ends, capsys, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (3_000_000 << 10, resource.RLIM_INFINITY))
    assert ends(None, "--quiet") == 1
    assert "ulimit -v allows 2.9 GB of address space, imports alone take 4" in capsys.readouterr().err


def test_a_name_is_no_reason_to_speak_of_memory(ends, capsys):
    assert ends(FileNotFoundError(2, "No such file or directory", "out of memory.png"), "--quiet") == 1
    assert "memory: " not in capsys.readouterr().err


def test_what_is_not_expected_keeps_its_traceback(ends, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="a mistake"):
        ends(RuntimeError("a mistake"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", lambda status: None)
    assert ends(RuntimeError("a mistake")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_rank_tells_its_own_errors_and_not_those_of_all(ends, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(os, "_exit", lambda status: None)
    assert ends(ValueError("device: no GPU")) == 2
    assert capsys.readouterr().err == "bincomm: error: rank 1: device: no GPU\n"
    assert ends(None, "--epochs=many") == 2
    assert capsys.readouterr().err == ""


def test_what_is_logged_goes_to_standard_error_as_far_as_it_is_wanted(ends, capsys):
    for options, begins, traced in (([], "recipe digits, data", False), (["--verbose"], "recipe", True)):
        assert ends(ValueError("x"), *options) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(begins)
        assert ("Traceback" in output.err) == traced


@pytest.mark.slow
def test_without_packages_a_command_says_what_to_install():
    code = """
import sys
sys.modules.update(dict.fromkeys(("timm", "nvidia", "jsonargparse", "tqdm", "yaml", "pyarrow", "numpy")))
from bincomm import cli
assert cli.main(["doctor", "--verbose"]) == 0
print(*(cli.main(arguments.split()) for arguments in (
    "pretrain", "data verify --data=x", "encode x --data=y --output=z", "search x --query=y")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("\n1 1 1 1\n"), result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("bincomm: error: ")]
    assert [line.partition(" needs more packages ")[0] for line in lines] == [
        f"bincomm: error: {name}" for name in ("pretrain", "data verify", "encode", "search")
    ]
    assert [line.partition("pip install ")[2] for line in lines] == [
        "'bincomm[train]'", "'bincomm[train]'", "'bincomm[eval]'", "'bincomm[eval]'"
    ]  # fmt: skip


@pytest.fixture
def completions():
    """A function that returns what a shell may go on with at the end of a line, by argcomplete's protocol."""
    pytest.importorskip("argcomplete")
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "numpy")))  # not imported: a shell waits for the answer
from bincomm.cli import main
main()
"""
    command = ["bash", "-c", '"$@" 8>&1 1>/dev/null 9>/dev/null', "bash", sys.executable, "-c", code]

    def complete(line):
        position = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
        result = subprocess.run(command, env=os.environ | position, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return result.stdout.split("\v")

    return complete


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bincomm pre", ["pretrain "]),
        ("bincomm data ", ["-h", "--help", "look", "verify", "stats", "shard"]),
        ("bincomm data look --shee", ["--sheet "]),
        ("bincomm pretrain --dr", ["--dry_run", "--drop_path"]),
        ("bincomm compare --recipe cifar", ["cifar10", "cifar10_cpu"]),
        ("bincomm pretrain --seed 1 --recipe=dig", ["--recipe=digits "]),
        ("bincomm pretrain --precision ", ["auto", "bf16", "fp32"]),
        ("bincomm pretrain --fsdp ", ["true", "false"]),
        ("bincomm adapt --lr a", ["auto "]),
        ("bincomm evaluate runs/x --device c", ["cpu", "cuda"]),
        ("bincomm doctor --j", ["--json "]),
        ("bincomm pretrain --epochs ", [""]),
        ("bincomm pretrian --e", [""]),
    ],
)
def test_a_shell_completes_commands_options_and_values(completions, line, expected):
    assert completions(line) == expected


@pytest.mark.slow
def test_a_shell_offers_every_command_recipe_and_backbone(completions):
    """timm's names are read from its source, in place of an import that takes seconds."""
    import timm

    names = {name.split()[0] for name in cli.COMMANDS}
    assert set(completions("bincomm ")) == names | {"-h", "--help"}
    assert completions("bincomm pretrain --recipe ") == recipe_names()
    assert completions("bincomm pretrain --backbone ") == sorted(timm.list_models())
    assert completions("bincomm evaluate --backbone resnetv2_18") == ["resnetv2_18", "resnetv2_18d"]
