"""The arguments of each command of ``augbench``, as dataclasses that tyro reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand


def _default(text: str) -> object:
    """Describe in the help what applies if an option is not given."""
    return arg(help_behavior_hint=f"(default: {text})")


class UsageError(ValueError):
    """An invalid value on the command line; the message names the option and what is allowed."""


OF_PRESET = _default("the preset's")
DATA = _default("AUGBENCH_DATA, else ~/.cache/augbench")
MAIN = _default("accuracy,auc; where AUC leads auc,auprc,balanced_accuracy")
WITH = arg(name="with", metavar="PATH ...", help_behavior_hint="(default: none)")


@dataclass(kw_only=True)
class Setting:
    """What a run trains on, and how."""

    benchmark: str = "digits"
    """digits, a MedMNIST set such as pneumoniamnist(size=64), npz:FILE, folder:DIR(size=224), or a
    table: csv:FILE(target=COLUMN)"""
    model: str = "resnet18"
    """a network such as resnet18(width=0.25), timm:NAME or py:package.module:factory"""
    width: Annotated[float | None, _default("the model's, 1")] = None
    """multiplies the network's channels"""
    preset: str = "medmnist"
    """training preset, medmnist or autodo; the options below override it"""
    epochs: Annotated[int | None, OF_PRESET] = None
    """passes over the labelled rows"""
    batch_size: Annotated[int | None, OF_PRESET] = None
    """rows per step"""
    optimizer: Annotated[Literal["adam", "adamw", "sgd"] | None, OF_PRESET] = None
    """optimiser"""
    learning_rate: Annotated[float | None, OF_PRESET] = None
    """initial learning rate"""
    weight_decay: Annotated[float | None, OF_PRESET] = None
    """L2 penalty (adamw: decoupled)"""
    momentum: Annotated[float | None, OF_PRESET] = None
    """momentum (sgd only)"""
    schedule: Annotated[Literal["multistep", "cosine", "constant"] | None, OF_PRESET] = None
    """decay of the learning rate"""
    warmup_epochs: Annotated[int | None, OF_PRESET] = None
    """epochs of linear warm-up"""
    precision: Annotated[
        Literal["auto", "float32", "tf32", "bfloat16", "float16"] | None, OF_PRESET
    ] = None
    """of the training step (auto: bfloat16 on GPUs that have it, float16 on older ones)"""
    ema: Annotated[float | None, OF_PRESET] = None
    """predict with running means of the weights, which keep this share at each step (0: off)"""
    steps_per_epoch: Annotated[int | None, OF_PRESET] = None
    """steps of an epoch, where a pass over the labelled rows is too short (0: one pass)"""
    channels_last: bool = True
    """memory format of images and convolutions; faster, and part of the run's id"""
    compile: bool = False
    """torch.compile for the training forward"""
    protocol: Literal["equal", "paper"] = "equal"
    """equal: meta rows are taken from the train split; paper: they are the validation split"""
    meta_fraction: float = 0.2
    """share of each class that becomes meta rows (equal only)"""
    crossfit: int = 1
    """number of folds that take turns as meta rows, one per epoch (equal only); 1 is off. They are
    trained on in the other epochs, so their gradient fades as they are memorised"""
    threads: int = 1
    """CPU threads per run; part of its id"""
    oracle_test: bool = False
    """also record test metrics each epoch, to compare with papers that chose epochs on them"""
    corruptions: Annotated[str, _default("none")] = ""
    """also evaluate on corrupted test images: medmnist-c (for the 2D MedMNIST sets) or common (for
    any images); finished runs whose network was saved are evaluated without training"""


@dataclass(kw_only=True)
class Place:
    """Where files are and how runs are executed; none of this changes results."""

    out: Path = Path("runs")
    """results folder"""
    data: Annotated[Path | None, DATA] = None
    """data folder"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a GPU if there is one"""
    allow_unverified: bool = False
    """accept an official file with a different checksum; the result says so"""
    memory_gib: float = 4.0
    """larger data sets are decoded once and streamed from disk"""
    checkpoint_every: int = 1
    """epochs between checkpoints"""
    retry_failed: bool = False
    """run failed runs and failed evaluations on corrupted images again"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class RunCommand(Setting, Place):
    """Train one cell and print its metrics.

    Example: augbench run --benchmark pneumoniamnist --method "mixup(alpha=0.4)" --seed 1
    """

    method: str = "none"
    """method, such as crop+flip+mixup(alpha=0.2), or control row, such as none@train"""
    seed: int = 0
    """seeds initialisation, the order of rows and every random draw"""
    save_model: bool = False
    """keep the network for augbench predict"""
    no_wait: bool = False
    """if another process holds this run, name it and exit instead of waiting"""


@dataclass(kw_only=True)
class CompareCommand(Setting, Place):
    """Compare methods over several seeds, each with its upstream; finished runs are reused.

    Example: augbench compare --benchmark breastmnist --methods none,crop,mixup --seeds 10
    """

    methods: str = "none,crop,mixup,cutmix"
    """methods and control rows, separated by commas"""
    seeds: Annotated[int | None, _default("10; 30 with under 500 test rows")] = None
    """number of seeds, counted from 0"""
    jobs: Annotated[int | None, _default("cores / threads; on a GPU measured")] = None
    """runs at a time"""
    executor: Literal["local", "ray"] = "local"
    """processes on this machine, or Ray (a cluster if RAY_ADDRESS names one)"""
    save_model: bool = False
    """keep the networks, to evaluate them on corrupted images later and for augbench predict"""
    controls: bool = False
    """add the control rows of each method that learns or adapts"""
    same: Annotated[Literal["passes", "time"] | None, _default("no such row")] = None
    """add each method's upstream with as many passes, or as much time"""
    shard: Annotated[str, _default("all runs")] = ""
    """share of the runs, such as 3/8, for machines that share no folder"""
    time_limit: Annotated[str, _default("none; in a SLURM job 2 minutes before its end")] = ""
    """stop after this time, such as 3h50m: runs write checkpoints, the exit code is 3, and the same
    command resumes; SIGUSR1 does the same"""
    selection: Literal["last", "selected"] = "last"
    """epoch to show: the last, or the one with the best select AUC if available"""
    verbose: bool = False
    """also show calibration, both intervals, detectable differences and more of the cost"""
    beside: Annotated[tuple[Path, ...], WITH] = ()
    """results folders, packs, or records.parquet of a report: their rows (but controls) are shown
    beside these, without a run, where data, network, protocol and training are the same"""
    records: Annotated[Path | None, _default("none")] = None
    """also write one line per run to this .csv file"""
    figure: Annotated[Path | None, _default("none")] = None
    """also plot accuracies and differences to this .png, .pdf or .svg file (one benchmark)"""


@dataclass(kw_only=True)
class SweepCommand:
    """Run a study file on this machine or on a Ray cluster; finished runs are skipped.

    Example: augbench sweep quickstart --dry-run
    """

    file: Annotated[Positional[Path | None], _default("none")] = None
    """study file (YAML), or the name of a shipped study"""
    list: bool = False
    """show the shipped studies and what they cost"""
    init: Annotated[Path | None, _default("none")] = None
    """write a commented template study to this file"""
    dry_run: bool = False
    """print every run, what is done, and how long the rest takes"""
    tier: str = "full"
    """part of the study: paper, fair or another that the file names; full: all of it"""
    only: str = ""
    """only runs whose name, as printed by the dry run, contains this; * and ? are wildcards"""
    shard: Annotated[str, _default("all runs")] = ""
    """share of the runs, such as 3/8, for machines that share no folder"""
    time_limit: Annotated[str, _default("none; in a SLURM job 2 minutes before its end")] = ""
    """stop after this time, such as 3h50m: runs write checkpoints, the exit code is 3, and the same
    command resumes; SIGUSR1 does the same"""
    settings: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(name="set", metavar="KEY=VALUE ...", help_behavior_hint="(default: none)"),
    ] = ()
    """values that override those of the file, such as training.epochs=5 seeds=3"""
    workers: Annotated[int | None, _default("the file's, else as many as fit")] = None
    """runs at a time"""
    address: str = ""
    """Ray cluster (auto, HOST:PORT, ray://HOST:PORT); local: none, whatever RAY_ADDRESS says"""
    executor: Literal["ray", "local"] = "ray"
    """Ray, or processes on this machine, which start sooner"""
    out: Annotated[Path | None, _default("the file's, else runs")] = None
    """results folder"""
    data: Annotated[Path | None, DATA] = None
    """data folder"""
    retry_failed: bool = False
    """run failed runs and failed evaluations on corrupted images again"""
    verbose: bool = False
    """also show calibration, both intervals, detectable differences and more of the cost"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class ListCommand:
    """Show methods, benchmarks, models and training presets, one per line with its source.

    Example: augbench list --check
    """

    check: bool = False
    """import every method; exit 1 if one is unavailable"""


@dataclass(kw_only=True)
class PredictCommand:
    """Predict images, or rows of a table, with the network of a run made with --save-model.

    Example: augbench predict runs/0123456789abcdef --data npz:scans.npz --out scans.csv
    """

    run: Positional[Path]
    """run directory"""
    data: str
    """npz:FILE with images (and labels), or with MedMNIST's keys (the test split is used); or
    folder:DIR, all images below it, resized as for training; csv:FILE for a run on a table, with
    its columns (and classes), whose own table must still be there"""
    out: Path = Path("predictions.csv")
    """.csv (row or file, probability of each class) or .npz (probabilities, logits, files)"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a GPU if there is one"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class ShowCommand:
    """Draw training images, or rows of a table, as a method augments them: a PNG, PDF or SVG file.

    Example: augbench show --benchmark pneumoniamnist --method randaugment --out show.png
    """

    benchmark: str = "digits"
    """data set, as for run"""
    method: str = "none"
    """method, as for run"""
    model: str = "small_cnn"
    """network, for methods that need one"""
    epochs: int = 0
    """passes that first train the network under the method, as run does; 0: as initialised"""
    by: Literal["rows", "weight", "class", "cam", "embedding"] = "rows"
    """rows: images and their draws, of a table the cells that changed; weight: of 512 rows, those
    with extreme weights and labels; class: learned probability and magnitude of each operation;
    cam: heat maps of the trained network on select images; embedding: its features of training and
    select rows, by t-SNE"""
    rows: int = 6
    """by rows and cam: number of images or rows, from each class in turn (added rows are drawn with
    originals)"""
    draws: Annotated[int | None, _default("8; of a table 3")] = None
    """by rows: draws per image or row, or one if the method adds rows; by weight: rows per band"""
    seed: int = 0
    """seeds images, draws and network"""
    out: Path = Path("show.png")
    """file to write: .png, .pdf or .svg"""
    data: Annotated[Path | None, DATA] = None
    """data folder"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class GenerateCommand:
    """Make images like the training images of data sets, for the method generated: for digits
    digits.npz, with labels and the classes that images really show, digits.json and digits.png.

    Example: augbench generate --benchmark "digits(rows_per_class=20)" --wrong 0.2 --out made
    """

    benchmark: str
    """data sets, as for compare; a generator learns from all training images that its runs have"""
    out: Path
    """folder to write to"""
    kind: Literal["pca", "vae", "real"] = "pca"
    """pca: a mixture of Gaussians over the principal components of each class; vae: a small
    conditional variational autoencoder; real: training images that rows_per_class leaves out"""
    rows: Annotated[int | None, _default("as many as it learns from")] = None
    """number of images; each class has its share of the training images"""
    wrong: float = 0.0
    """share of the images whose label is changed to another class"""
    epochs: int = 300
    """of the vae"""
    seed: int = 0
    """seeds the generator and the wrong labels"""
    data: Annotated[Path | None, DATA] = None
    """data folder"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class PolicyCommand:
    """Write the policy of operations that a run learned, for autoaugment(policy=FILE).

    Example: augbench policy runs/0123456789abcdef --out policy.yaml
    """

    run: Positional[Path]
    """run directory, of a run with autodo, adaaug, madaug, randaugment, trivialaugment or
    autoaugment"""
    out: Annotated[Path | None, _default("policy.yaml")] = None
    """file to write (beside code to paste, only if it is given); one that exists with other content
    is left as it is, with an error"""
    by: Literal["class", "all"] = "class"
    """what is averaged if each row learned its own policy: the rows of each class, or all rows"""
    torchvision: bool = False
    """print code to paste, for transforms of torchvision.transforms.v2"""
    data: Annotated[Path | None, DATA] = None
    """data folder, for the labels of the rows"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class DataCommand:
    """List the data sets and what is on disk, fetch or show some, or verify their checksums.

    Large sets are decoded once and then streamed from disk: list shows those, too, and remove
    deletes them by name.

    Example: augbench data show breastmnist "folder:scans(size=64)"
    """

    action: Positional[Literal["list", "fetch", "show", "verify", "remove"]]
    """what to do; show prints classes, rows of each split, size, range, duplicates, omissions"""
    names: Annotated[
        Positional[tuple[str, ...]], _default("all; but for list and verify, required")
    ] = ()
    """data sets; for remove, streamed sets"""
    data: Annotated[Path | None, DATA] = None
    """data folder"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class DoctorCommand:
    """Show what a run would use here, and check a training step on the GPU against the CPU.

    Exits with 1 if the step is wrong, or the data or results folder cannot be used.

    Example: augbench doctor --jobs 4 --threads 2
    """

    out: Path = Path("runs")
    """results folder"""
    data: Annotated[Path | None, DATA] = None
    """data folder"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a GPU if there is one"""
    threads: int = 1
    """CPU threads per run"""
    jobs: Annotated[int | None, _default("cores / threads; on a GPU measured")] = None
    """runs at a time"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class ReportCommand:
    """Write one page on a folder of runs: tables, statistics, figures, costs, failures.

    Example: augbench report runs --out report --published
    """

    runs: Positional[tuple[Path, ...]]
    """results folder; study.yaml in it gives question, family, margin and prediction. Runs of
    further folders and packs count as if they were in the first"""
    beside: Annotated[tuple[Path, ...], WITH] = ()
    """results folders, packs, or records.parquet of a report: their runs are shown beside these
    where data, network, protocol and training are the same, and paired by seed and image"""
    study: str = ""
    """report only the runs of this study, which augbench sweep ran there"""
    out: Path = Path("report")
    """folder to write: report.html (one file), report.md, figures, tables, records.parquet"""
    published: bool = False
    """show published numbers next to ours"""
    metrics: Annotated[str, MAIN] = ""
    """more metrics, each with a table: f1,precision,sensitivity,specificity,mcc,auprc,nll,
    corrupted_auc,..."""
    format: str = "html,md,tex,csv"
    """which of html, md, tex, csv, separated by commas"""
    recompute: bool = False
    """recompute all metrics from the stored logits"""
    all_versions: bool = False
    """also show runs of older versions of the code, as separate rows"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class TableCommand:
    """Print one table for a paper: chosen rows, benchmarks and metrics, in this order.

    Example: augbench table runs --rows "none=No Aug, mixup=Mixup" --benchmarks blood,derma
    """

    runs: Positional[Path]
    """results folder"""
    beside: Annotated[tuple[Path, ...], WITH] = ()
    """results folders, packs, or records.parquet of a report: their rows are shown as well where
    data, network, protocol and training are the same"""
    rows: Annotated[str, _default("all but control rows")] = ""
    """methods and control rows, separated by commas; NAME=LABEL shows a row under a label; put a
    label with a comma in quotes"""
    benchmarks: Annotated[str, _default("all")] = ""
    """benchmarks, by name or an unambiguous part of it; NAME=LABEL as for rows"""
    metrics: Annotated[str, MAIN] = ""
    """metrics, separated by commas; corrupted_accuracy and others on corrupted test images, and f1,
    mcc, specificity, ece and others, which are not tested"""
    format: Annotated[
        Literal["text", "md", "tex", "csv", "html"] | None, _default("that of --out, else text")
    ] = None
    """format of the table; tex needs booktabs, and graphicx where the table is wide"""
    out: Annotated[Path | None, _default("none: print it")] = None
    """file to write: .tex, .md, .csv, .html or .txt"""
    caption: Annotated[str, _default("metrics, seeds, network, protocol and epochs")] = ""
    """caption of the table"""
    no_legend: bool = False
    """leave out the full names behind labels"""
    label: Annotated[str, _default("tab: and the name of the file")] = ""
    """label for references in LaTeX"""
    average: bool = False
    """add the mean over the benchmarks"""
    rank: bool = False
    """add the mean rank over the benchmarks"""
    published: bool = False
    """show published numbers below ours; with --rows, only those of the same methods"""
    selection: Literal["last", "selected"] = "last"
    """epoch to show: the last, or the one with the best select AUC if available"""
    study: str = ""
    """use only the runs of this study, which augbench sweep ran there"""
    model: Annotated[str, _default("the only one")] = ""
    """network of the runs"""
    protocol: Annotated[str, _default("the only one")] = ""
    """protocol of the runs"""
    block: Annotated[int | None, _default("the only one")] = None
    """number of the block, if runs differ in more than network and protocol"""
    all_versions: bool = False
    """also show runs of older versions of the code, as separate rows"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class PlanCommand:
    """Estimate from finished runs how many seeds, and hours, would show a given difference.

    Example: augbench plan runs --detect 1.0
    """

    runs: Positional[Path]
    """results folder with the runs to estimate from, or a study file that was swept into --out"""
    out: Path = Path("runs")
    """results folder of the study file"""
    study: str = ""
    """use only the runs of this study, which augbench sweep ran there"""
    benchmarks: Annotated[str, _default("all")] = ""
    """benchmarks, by name or an unambiguous part of it, separated by commas"""
    detect: float = 1.0
    """the difference to show, in points of accuracy, or of AUC where it leads"""
    power: float = 0.8
    """probability of finding it"""
    all_versions: bool = False
    """also use runs of older versions of the code, as separate rows"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class RunsCommand:
    """List the runs of a results folder by row and state, with their size, or delete some of them.

    Example: augbench runs --where state=failed,benchmark=digits --where older=30d --delete
    """

    folder: Positional[Path] = Path("runs")
    """results folder"""
    where: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(metavar="KEY=VALUE,...", help_behavior_hint="(default: all)"),
    ] = ()
    """the runs that match, by benchmark, model, row, protocol, seed, id, state (done, failed,
    skipped, stopped, interrupted, running, unreadable, copy), version (newest, outdated), searched
    (yes, no) and older (30d, 12h); every key must match, with any of its values; * and ? are
    wildcards"""
    each: bool = False
    """one line per run, with its id and why it failed"""
    format: Literal["text", "csv", "json"] = "text"
    """csv and json give sizes in bytes"""
    delete: bool = False
    """delete the runs that match, except those that are running; asks first"""
    yes: bool = False
    """delete without asking"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class PackCommand:
    """Pack the results of a folder's finished runs into one file, for another machine.

    Checkpoints, saved networks, sample images and unfinished runs are left out.

    Example: augbench pack runs runs.tar.zst --where benchmark=breastmnist
    """

    paths: Annotated[Positional[tuple[Path, ...]], _default("runs runs.tar.zst")] = ()
    """results folder and file to write; either may be left out"""
    study: Annotated[str, _default("all runs")] = ""
    """pack only the runs of this study, which augbench sweep ran there"""
    where: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(metavar="KEY=VALUE,...", help_behavior_hint="(default: all)"),
    ] = ()
    """pack only the runs that match, as for augbench runs"""
    piece: Annotated[int | None, _default("one file")] = None
    """split into pieces of at most this many MiB: runs.tar.zst.001, runs.tar.zst.002 and so on"""
    debug: bool = False
    """show the traceback of an error"""


@dataclass(kw_only=True)
class UnpackCommand:
    """Add the runs of a pack to a results folder; every file is checked against its SHA-256.

    Existing runs are kept. Runs from another device or with other versions of torch or augbench go
    into a separate folder beside it.

    Example: augbench unpack runs.tar.zst --into runs
    """

    files: Annotated[Positional[tuple[Path, ...]], arg(help_behavior_hint="(required)")]
    """files written by augbench pack; for a pack in pieces name the first, with the others beside
    it"""
    into: Path = Path("runs")
    """results folder, created if it does not exist"""
    debug: bool = False
    """show the traceback of an error"""


Command = (
    Annotated[ListCommand, subcommand("list")]
    | Annotated[RunCommand, subcommand("run")]
    | Annotated[CompareCommand, subcommand("compare")]
    | Annotated[SweepCommand, subcommand("sweep")]
    | Annotated[PredictCommand, subcommand("predict")]
    | Annotated[ShowCommand, subcommand("show")]
    | Annotated[GenerateCommand, subcommand("generate")]
    | Annotated[PolicyCommand, subcommand("policy")]
    | Annotated[ReportCommand, subcommand("report")]
    | Annotated[TableCommand, subcommand("table")]
    | Annotated[PlanCommand, subcommand("plan")]
    | Annotated[RunsCommand, subcommand("runs")]
    | Annotated[PackCommand, subcommand("pack")]
    | Annotated[UnpackCommand, subcommand("unpack")]
    | Annotated[DataCommand, subcommand("data")]
    | Annotated[DoctorCommand, subcommand("doctor")]
)


def overrides(setting: Setting) -> dict[str, object]:
    """The fields of Training that the user gave."""
    from analysis.runs import FLAGS, OPTIONS  # noqa: PLC0415 - the help needs no numbers

    values = dataclasses.asdict(setting)
    given = {name: values[name] for name in OPTIONS if values[name] is not None}
    return {**given, **{name: values[name] for name in FLAGS}}
