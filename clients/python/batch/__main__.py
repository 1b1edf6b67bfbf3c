"""Classify any number of pictures: one row for each, resumable, with a server or in this process.

    resnet-batch photos/ --output predictions.parquet
    find . -name '*.jpg' | resnet-batch - --output rows/ --url http://gpu:8000 --protocol center
    resnet-batch shard-*.tar --output rows/ --format parquet --bundle bundles/cifar10
    RAY_ADDRESS=auto resnet-batch s3://photos --output rows/ --bundle /shared/bundle --ray 16

INPUT is a folder, a pattern such as 'photos/**/*.jpg', - (paths on the standard input), a list (.txt, .jsonl, .csv,
.tsv, .parquet), an archive (.tar, .tgz), one picture, or any of these at an address that fsspec knows (s3://...).
OUT is a folder for shards, or one file that ends in .jsonl or .parquet. The same command again goes on where it was.

exit codes: 0; 3 finished, with error rows; 130 interrupted (143 by SIGTERM); 1 stopped early; 2 refused to begin
"""

import argparse
import io
import itertools
import math
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from resnet_ensemble.client._errors import ResnetError
from resnet_ensemble.client.batch._extras import MissingExtraError
from resnet_ensemble.client.batch._inputs import Columns
from resnet_ensemble.client.batch._job import Job, Summary, run
from resnet_ensemble.client.batch._output import Output, OutputError, differences
from resnet_ensemble.client.batch._places import InputError
from resnet_ensemble.client.batch._progress import Progress, duration
from resnet_ensemble.client.batch._selection import Seen
from resnet_ensemble.client.batch._servers import BundleUnusableError

_PLAIN_SECONDS = 10.0  # between lines where there is no terminal


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and do the job. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the locale can't show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    job = _job(arguments)
    show = _Lines()
    try:
        if arguments.dry_run:
            _preview(job)
            return 0
        summary = run(job, on_progress=show.progress, tell=show.tell)
    except (OutputError, InputError, MissingExtraError, BundleUnusableError, ResnetError, OSError) as error:
        show.tell(f"{error}")
        return 2
    except KeyboardInterrupt:
        show.tell("left at once; what the ledger tells is kept")
        return 130
    show.end()
    with suppress(OSError):
        print(_told(summary), file=sys.stderr)
    return summary.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resnet-batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="where the pictures are")
    parser.add_argument("--output", "-o", metavar="OUT", type=_local, required=True, help="where the rows go")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="the server (default: $RESNET_CLIENT_URL or http://localhost:8000)")
    where.add_argument("--bundle", metavar="DIR", type=Path, help="classify in this process with this bundle instead")
    parser.add_argument("--ray", metavar="N", type=_positive, help="in so many actors of Ray, on its cluster or here")
    how = parser.add_argument_group("how")
    how.add_argument("--top-k", type=_positive, default=Job.top_k, help="classes in a row (default: %(default)s)")
    how.add_argument("--protocol", help="which views to average (default: the server's own)")
    how.add_argument("--stop", help="when to stop evaluating views (default: the server's own)")
    how.add_argument(
        "--max-concurrency", type=_positive, default=Job.max_concurrency,
        help="requests in flight at most; how many there are follows the server (default: %(default)s)",
    )  # fmt: skip
    how.add_argument("--timeout", metavar="S", type=_seconds, default=Job.timeout, help="for an answer (default: 60)")
    how.add_argument(
        "--patience", metavar="S", type=_seconds, default=Job.patience,
        help="without any answer, after which the job stops (default: 600)",
    )  # fmt: skip
    which = parser.add_argument_group("which inputs")
    which.add_argument("--path-column", metavar="C", default=Columns.path, help="of a list (default: %(default)s)")
    which.add_argument("--bytes-column", metavar="C", help="of a list that holds the pictures; base64 in text")
    which.add_argument(
        "--id-column", metavar="C", help="of a list: the id of rows (default: path, or list:row for bytes)"
    )
    which.add_argument("--root", metavar="DIR", help="what relative paths in lists begin from (default: here)")
    which.add_argument("--limit", metavar="N", type=_positive, help="the first so many")
    which.add_argument("--sample", metavar="P", type=_share, help="about this share, the same ones every time: 0.01")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--format", choices=("jsonl", "parquet"), default=Job.format, help="of shards in a folder")
    rows.add_argument("--order", choices=("completion", "input"), default=Job.order, help="default: %(default)s")
    rows.add_argument("--shard-rows", metavar="N", type=_positive, default=Job.shard_rows, help="default: %(default)s")
    rows.add_argument("--max-errors", metavar="N", type=int, help="stop after more error rows than this in a run")
    rows.add_argument("--retry-errors", action="store_true", help="do the inputs of error rows again")
    rows.add_argument(
        "--force", action="store_true",
        help="begin again, without the rows that there are, if the configuration or the bundle changed",
    )  # fmt: skip
    rows.add_argument("--dry-run", action="store_true", help="read the inputs, say what would be done, and do nothing")
    return parser


def _job(arguments: argparse.Namespace) -> Job:
    given = vars(arguments)
    columns = Columns(given["path_column"], given["bytes_column"], given["id_column"])
    names = Job.__dataclass_fields__.keys() & given.keys() - {"inputs"}
    return Job(inputs=tuple(given["inputs"]), columns=columns, **{name: given[name] for name in names})


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is an address; rows are written to a local disk")
    return Path(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{seconds:g} is no number of seconds from 0")
    return seconds


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{share} is not above 0 and at most 1")
    return share


def _preview(job: Job) -> None:
    """Say what a run would do."""
    inputs = job.items()
    inputs.check()
    output = Output(job.output, form=job.format)
    begun = output.look()
    # the server is not asked, so what it serves is taken to be the same
    now = job.configuration(begun["bundle"], begun["protocol"], begun["stop"]) if begun else {}
    changed = differences(begun or {}, now)
    seen = Seen(() if changed and job.force else output.ids())
    items = job.chosen(inputs)
    first = list(itertools.islice(items, 3))
    new = total = 0
    for item in itertools.chain(first, items):
        total += 1
        new += seen.add(item.id)
    for item in first:
        print(item.id + (f": {item.problem}" if item.problem else ""))
    print(f"{total:,} inputs, {total - new:,} of them with a row already or named twice; {new:,} to do")
    if inputs.left_out:
        print(f"{inputs.left_out:,} other files left out, by their suffix")
    if begun is None:
        print(f"{job.output}: nothing yet")
        return
    print(f"{job.output}: {output.rows:,} rows, {output.errors:,} of them errors, of {begun['bundle']}")
    if job.retry_errors and output.errors and not changed:
        print(f"the {output.errors:,} error rows are taken away first, and their inputs done again")
    if changed:
        forced = f"takes these {output.rows:,} rows away and begins again"
        allowed = job.force or not output.rows
        print(f"changed: {'; '.join(changed)}; a run {forced if allowed else 'is refused without --force'}")


class _Lines:
    """What a person sees on the standard error: one line that changes, or plain lines where there is no terminal.

    Where nobody can read it any more, such as on a full disk or a pipe that was closed, the job goes on.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = -math.inf
        self._width = 0

    def progress(self, progress: Progress) -> None:
        line = progress.line()
        if self._terminal:
            # A line that is wrapped would not be written over.
            line = line[: shutil.get_terminal_size().columns - 1]
            self._print(f"\r{line:<{self._width}}", end="")
            self._width = len(line)
        elif time.monotonic() - self._last >= _PLAIN_SECONDS:
            self._print(line)
            self._last = time.monotonic()

    def tell(self, message: str) -> None:
        self.end()
        self._print(f"resnet-batch: {message}")

    def end(self) -> None:
        if self._width:
            self._print("")
            self._width = 0

    @staticmethod
    def _print(line: str, end: str = "\n") -> None:
        with suppress(OSError):
            print(line, end=end, file=sys.stderr, flush=True)


def _told(summary: Summary) -> str:
    rate = summary.rows / summary.seconds if summary.seconds else 0.0
    lines = [f"{summary.rows:,} rows in {duration(summary.seconds)} ({rate:.1f}/s), {summary.errors:,} of them errors"]
    if summary.skipped:
        lines.append(f"{summary.skipped:,} inputs skipped: they had a row, or were named twice")
    if summary.left_out:
        lines.append(f"{summary.left_out:,} other files left out, by their suffix")
    if summary.refusals:
        lines.append(f"{summary.refusals:,} of {summary.requests:,} requests refused and sent again")
    if summary.views_planned > summary.views_used:
        saved = 1 - summary.views_used / summary.views_planned
        lines.append(f"{saved:.0%} of the views saved: {summary.views_used:,} of {summary.views_planned:,} evaluated")
    if summary.stopped:
        lines.append(f"not finished: {summary.stopped}; the same command goes on from here")
    place = str(summary.files[0]) if len(summary.files) == 1 else f"{len(summary.files)} files"
    errors = (
        f", {summary.total_errors:,} of them errors (--retry-errors does them again)" if summary.total_errors else ""
    )
    lines.append(f"{summary.total_rows:,} rows in {place}{errors}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
